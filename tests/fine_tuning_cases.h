// A tiny model in training: what the tests of fine-tuning on the CPU and on a GPU share.
#pragma once

#include <torch/torch.h>
#include <vernier/recipes/calibration_run.h>
#include <vernier/recipes/fine_tuning.h>
#include <vernier/recipes/language_model.h>
#include <vernier/recipes/recipe.h>
#include <vernier/tests/tiny_llama.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace vernier::testing {

inline constexpr const char* kTokenRecipe =
    "name: t\n"
    "weights: {bits: 4, calibrator: mse, ranges: learned}\n"
    "activations: {bits: 8, granularity: per_token}\n";
inline constexpr const char* kStaticRecipe =
    "name: s\n"
    "weights: {bits: 4, calibrator: mse, ranges: learned}\n"
    "activations: {bits: 8, ranges: learned}\n";
inline constexpr const char* kClippedRecipe =
    "name: c\n"
    "weights: {bits: 4, calibrator: mse, ranges: learned}\n"
    "activations: {bits: 5, granularity: per_token, ranges: learned}\n";

inline TokenDataset random_windows(int64_t count, int64_t length, uint64_t seed = 1) {
  auto generator = at::detail::createCPUGenerator(seed);
  return TokenDataset::of_windows(
      torch::randint(kVocabulary, {count, length}, generator, torch::kLong), "windows");
}

inline FineTuningSettings short_training(int64_t steps) {
  FineTuningSettings settings;
  settings.steps = steps;
  settings.batch_size = 4;
  settings.rate = 2e-3;
  settings.range_rate = 5e-3;
  settings.warmup = 5;
  settings.report_every = 1;
  return settings;
}

/// A float model and its quantized copy, calibrated.
struct TunedModel {
  TunedModel(const std::filesystem::path& folder, const TokenDataset& data,
             const std::string& yaml = kTokenRecipe, torch::Device device = torch::kCPU)
      : recipe(parse_recipe(yaml, "test")),
        reference(load_text_model(folder)),
        model(load_text_model(folder)) {
    reference->to(device);
    model->to(device);
    apply_recipe(*model, recipe);
    ModelStatistics statistics;
    if (!recipe.activations.scheme.dynamic) {
      statistics = plan_statistics(*model, data, 0, data.size());
      collect_statistics(*model, data, statistics);
    }
    calibrate_layers(*model, statistics);
    set_mode(*model, Mode::fake_quant);
  }

  double divergence(const TokenDataset& data) const {
    return logits_kl(causal(*model, "test"), causal(*reference, "test"), data, 8);
  }

  /// Every parameter under its name.
  std::map<std::string, torch::Tensor> parameters() const {
    std::map<std::string, torch::Tensor> all;
    for (const auto& item : model->named_parameters())
      all.emplace(item.key(), item.value().detach().cpu().clone());
    return all;
  }

  Recipe recipe;
  std::shared_ptr<TextModel> reference, model;
};

/// The losses of a training, from its present step to its end or `until`.
inline std::vector<double> train(FineTuner& tuner, int64_t until = -1) {
  std::vector<double> losses;
  tuner.run([&](const FineTuningProgress& progress) {
    losses.push_back(progress.loss);
    return progress.step != until;
  });
  return losses;
}

}  // namespace vernier::testing
