#include <ATen/Parallel.h>
#include <vernier/kernels/error.h>
#include <vernier/recipes/calibration_run.h>
#include <vernier/recipes/models/causal_lm.h>
#include <vernier/recipes/recipe.h>

#include <algorithm>
#include <atomic>

namespace vernier {
namespace {

constexpr int64_t kBlockSamples = 32;
constexpr int64_t kLogitsRows = 64;

// Where statistics are gathered: the quantizers of all activations.
struct Site {
  std::string name;
  std::shared_ptr<QuantizerImpl> quantizer;
};

std::vector<Site> sites_of(const torch::nn::Module& model) {
  std::vector<Site> sites;
  for (const auto& [layer_name, layer] : quantized_layers(model))
    for (const auto& [what, quantizer] : layer->quantizers())
      if (quantizer->operand() == Operand::activation)
        sites.push_back({site_name(layer_name, what), quantizer});
  return sites;
}

// Whether a causal model's logits come out of a layer that is to be quantized.
bool quantizes_logits(const TextModel& model) {
  const auto* predicting = dynamic_cast<const CausalLanguageModel*>(&model);
  if (!predicting) return false;
  for (const auto& [name, layer] : quantized_layers(model))
    if (name == predicting->output_layer()) return layer->quantized();
  return false;
}

void forward_all(TextModel& model, bool to_logits, const std::vector<std::vector<int64_t>>& samples,
                 torch::Device device) {
  const auto forward = [&](int64_t i) {
    const torch::NoGradGuard no_grad;  // thread-local: each worker needs its own
    const torch::Tensor hidden = model.forward(make_batch({samples[i]}, device));
    if (!to_logits) return;
    // Only the layer's input counts: a few rows of logits at a time.
    for (const torch::Tensor& rows : hidden.split(kLogitsRows))
      static_cast<CausalLanguageModel&>(model).logits(rows);
  };
  const auto count = static_cast<int64_t>(samples.size());
  if (!device.is_cpu()) {
    for (int64_t i = 0; i < count; ++i) forward(i);
    return;
  }
  // Workers take the next sample when they are done with one: lengths differ too much for fixed
  // shares. All of them start even for a single sample, since inside the parallel region, and only
  // there, its products run on one thread.
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) forward(i);
  });
}

}  // namespace

ModelStatistics plan_statistics(const TextModel& model, const TokenDataset& data, int64_t first,
                                int64_t count) {
  VERNIER_CHECK(first >= 0 && first < data.size() && count > 0 && count <= data.size() - first,
                data.name(), " has ", data.size(), " samples: ", count, " from number ", first,
                " on are not all there");
  ModelStatistics statistics;
  statistics.fingerprint = model.info.fingerprint;
  statistics.data = data.fingerprint();
  statistics.first_sample = first;
  statistics.planned = count;
  for (const Site& site : sites_of(model)) statistics.sites[site.name];
  return statistics;
}

void collect_statistics(TextModel& model, const TokenDataset& data, ModelStatistics& statistics,
                        const std::function<void(const ModelStatistics&)>& after_block) {
  const std::vector<Site> sites = sites_of(model);
  VERNIER_CHECK(!sites.empty(), "the model has no layer to calibrate");
  const torch::Device device = model.parameters().front().device();
  const bool to_logits = quantizes_logits(model);
  const ModeGuard observing(model, Mode::observe);
  for (const Site& site : sites) site.quantizer->observer().reset();
  while (statistics.samples < statistics.planned) {
    const int64_t count = std::min(kBlockSamples, statistics.planned - statistics.samples);
    forward_all(model, to_logits,
                data.read(statistics.first_sample + statistics.samples, count, model.vocabulary(),
                          model.max_length()),
                device);
    for (const Site& site : sites) {
      Observer& observer = site.quantizer->observer();
      statistics.sites[site.name].merge(observer.statistics());
      observer.reset();
    }
    check_statistics(statistics);
    statistics.samples += count;
    if (after_block) after_block(statistics);
  }
}

}  // namespace vernier
