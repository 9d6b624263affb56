// The search for alphas and clipping on a toy with planted outliers.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/smoothquant/search.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/smoothquant_toy.h>
#include <nlohmann/json.hpp>

#include <limits>

namespace vernier {
namespace {

using nlohmann::json;
using testing::message_of;
using testing::Toy;
using torch::Tensor;

class SmoothquantSearch : public ::testing::Test {
 protected:
  static constexpr int64_t kBatches = 4;

  SmoothquantSearch() {
    torch::set_num_threads(1);  // operations this small do not gain from more
    auto generator = at::detail::createCPUGenerator(7);
    for (int64_t i = 0; i < kBatches; ++i)
      batches_.push_back(torch::randint(Toy::kVocabulary, {64}, generator, torch::kLong));
  }

  SearchedModel searched(Toy& toy) const {
    return {toy, 2, 2, [this, &toy](int64_t batch) { return toy.forward(batches_.at(batch)); },
            [&toy](const Tensor& rows) { return toy.logits(rows); }};
  }

  static SearchOptions quick() {
    SearchOptions options;
    options.sample_rows = 64;
    options.rounds = 2;
    options.refine_steps = 24;
    return options;
  }

  /// Mean KL divergence of the logits of the batches that decide.
  double divergence(Toy& toy, const std::vector<Tensor>& reference) const {
    const torch::NoGradGuard no_grad;
    Tensor sum = torch::zeros({}, torch::kDouble);
    for (int64_t i = 2; i < kBatches; ++i) {
      const Tensor exact = reference[i].log_softmax(-1);
      const Tensor found = toy.logits(toy.forward(batches_[i])).log_softmax(-1);
      sum += (exact.exp() * (exact - found)).sum(torch::kDouble);
    }
    return sum.item<double>() / 128;
  }

  std::vector<Tensor> logits(Toy& toy) const {
    const torch::NoGradGuard no_grad;
    std::vector<Tensor> all;
    for (const Tensor& tokens : batches_) all.push_back(toy.logits(toy.forward(tokens)));
    return all;
  }

  void calibrate(Toy& toy) const {
    const torch::NoGradGuard no_grad;
    set_mode(toy, Mode::observe);
    for (const Tensor& tokens : batches_) toy.forward(tokens);
    for (const NamedLayer& item : quantized_layers(toy)) {
      item.layer->weight_quantizer->calibrate(item.layer->float_weight());
      QuantizerImpl& input = *item.layer->input_quantizer;
      if (!input.scheme().dynamic) input.calibrate(input.observer().statistics());
    }
  }

  std::vector<Tensor> batches_;
};

TEST_F(SmoothquantSearch, FindsWhatOutliersNeedAndCalibrationReproducesIt) {
  for (const bool dynamic : {false, true}) {
    for (const bool symmetric : {false, true}) {
      if (dynamic && symmetric) continue;
      SCOPED_TRACE(dynamic ? "dynamic" : symmetric ? "symmetric" : "asymmetric");
      Toy toy;
      toy.plant_outliers();
      testing::set_settings(toy, dynamic, symmetric);
      const std::vector<Tensor> reference = logits(toy);
      const SmoothingResult result = search_smoothing(searched(toy), toy.groups(), quick());
      EXPECT_EQ(result.metric, "kl");
      EXPECT_LT(result.after.held_out, 0.5 * result.before.held_out);
      EXPECT_LT(result.after.proposing, 0.5 * result.before.proposing);
      ASSERT_EQ(result.groups.size(), 4u);
      EXPECT_FALSE(result.groups[3].folded);
      EXPECT_LT(result.groups[2].error_after, 0.5 * result.groups[2].error_before);
      EXPECT_FALSE(result.curve.empty());
      EXPECT_LT(result.passes, 20 * 4 + 3 * 24);
      for (const SmoothedGroup& group : result.groups) {
        if (!dynamic) continue;
        EXPECT_EQ(group.choice.keep_low * group.choice.keep_high, 1) << group.name;
      }

      // The float function is what it was, and the layers are as they were.
      const std::vector<Tensor> smoothed = logits(toy);
      for (int64_t i = 0; i < kBatches; ++i)
        EXPECT_LE((smoothed[i] - reference[i]).abs().max().item<float>(),
                  2e-5f * reference[i].abs().max().item<float>());
      calibrate(toy);
      set_mode(toy, Mode::fake_quant);
      EXPECT_NEAR(divergence(toy, reference), result.after.held_out, 0.02 * result.after.held_out);
    }
  }
}

TEST_F(SmoothquantSearch, OneAlphaForAllGroups) {
  Toy toy;
  toy.plant_outliers();
  testing::set_settings(toy, /*dynamic=*/false);
  SearchOptions options = quick();
  options.per_group = false;
  const SmoothingResult result = search_smoothing(searched(toy), toy.groups(), options);
  EXPECT_LT(result.after.held_out, result.before.held_out);
  EXPECT_FALSE(result.refined);
  for (const SmoothedGroup& group : result.groups)
    EXPECT_EQ(group.choice.alpha, result.groups.front().choice.alpha);
}

TEST_F(SmoothquantSearch, WhatTheHeldOutSamplesDoNotConfirmIsNotTaken) {
  Toy toy;
  toy.plant_outliers();
  testing::set_settings(toy, /*dynamic=*/false);
  const Tensor before = toy.down->weight.detach().clone();
  SearchedModel model = searched(toy);
  // On the deciding samples no quantizer makes a difference.
  model.run = [&](int64_t batch) {
    const Tensor output = toy.forward(batches_[batch]);
    return batch < 2 ? output : torch::ones_like(output);
  };
  SearchOptions options = quick();
  int steps = 0;
  options.progress = [&](const std::string&, double share) {
    ++steps;
    EXPECT_TRUE(share >= 0 && share <= 1);
  };
  const SmoothingResult result = search_smoothing(model, toy.groups(), options);
  EXPECT_GT(steps, 4);
  EXPECT_EQ(result.after.proposing, result.before.proposing);
  EXPECT_FALSE(result.refined);
  for (const SmoothedGroup& group : result.groups)
    EXPECT_EQ(group.choice, SmoothingChoice()) << group.name;
  EXPECT_TRUE(toy.down->weight.equal(before));
}

TEST_F(SmoothquantSearch, AnInterruptedSearchEndsAsOneThatWasNot) {
  std::vector<json> states;
  const auto run = [&](const json* resume) {
    Toy toy;
    toy.plant_outliers();
    testing::set_settings(toy, /*dynamic=*/false);
    SearchOptions options = quick();
    options.refine_steps = 8;
    options.resume = resume;
    if (!resume) options.save = [&](const json& state) { states.push_back(state); };
    json result = search_smoothing(searched(toy), toy.groups(), options);
    result["weight"] = toy.down->weight.sum(torch::kDouble).item<double>();
    result.erase("passes");  // the float model's own pass is made anew
    return result;
  };
  const json whole = run(nullptr);
  ASSERT_GT(states.size(), 4u);
  for (const size_t at : {size_t{0}, states.size() / 2, states.size() - 1})
    EXPECT_EQ(run(&states[at]), whole) << at;
  EXPECT_CONTAINS(message_of([&] {
                    const json damaged = {{"choices", 3}};
                    run(&damaged);
                  }),
                  "remove it to start anew");
}

TEST_F(SmoothquantSearch, ResultsSurviveJson) {
  Toy toy;
  toy.plant_outliers();
  testing::set_settings(toy, /*dynamic=*/false);
  SearchOptions options = quick();
  options.per_group = false;
  const json written = search_smoothing(searched(toy), toy.groups(), options);
  EXPECT_EQ(json(written.get<SmoothingResult>()), written);
}

TEST_F(SmoothquantSearch, OutputsStandInForLogits) {
  Toy toy;
  toy.plant_outliers();
  testing::set_settings(toy, /*dynamic=*/false);
  SearchedModel model = searched(toy);
  model.logits = nullptr;
  const SmoothingResult result = search_smoothing(model, toy.groups(), quick());
  EXPECT_EQ(result.metric, "output");
  EXPECT_LT(result.after.held_out, 0.5 * result.before.held_out);
}

TEST_F(SmoothquantSearch, LayersThatStayFloatAreLeftOut) {
  Toy toy;
  toy.last->set_quantized(false);
  toy.q->set_quantized(false);
  const auto groups = quantized_groups(toy, toy.groups());
  ASSERT_EQ(groups.size(), 3u);
  EXPECT_EQ(groups[0].readers, (std::vector<std::string>{"q", "v"}));
  toy.plant_outliers();
  testing::set_settings(toy, /*dynamic=*/false);
  const std::vector<Tensor> reference = logits(toy);
  SearchOptions options = quick();
  options.refine_steps = 8;
  const SmoothingResult result = search_smoothing(searched(toy), toy.groups(), options);
  EXPECT_LT(result.after.held_out, result.before.held_out);
  EXPECT_LE((logits(toy)[0] - reference[0]).abs().max().item<float>(), 1e-3f);
}

TEST_F(SmoothquantSearch, WhatCannotBeSearchedIsRefused) {
  Toy toy;
  SearchedModel model = searched(toy);
  model.deciding = 0;
  EXPECT_CONTAINS(message_of([&] { search_smoothing(model, toy.groups(), quick()); }),
                  "at least two");
  EXPECT_CONTAINS(message_of([&] { search_smoothing(searched(toy), {}, quick()); }),
                  "no smoothing group");
  model.deciding = 2;
  model.run = [&](int64_t batch) {
    return toy.forward(batches_[batch]) * std::numeric_limits<float>::quiet_NaN();
  };
  EXPECT_CONTAINS(message_of([&] { search_smoothing(model, toy.groups(), quick()); }),
                  "NaN or infinite");
  model.run = [](int64_t) { return torch::zeros({4, Toy::kWidth}); };
  EXPECT_CONTAINS(message_of([&] { search_smoothing(model, toy.groups(), quick()); }),
                  "never reached");
  // Nothing was left in the layers.
  EXPECT_EQ(toy.q->mode(), Mode::full);
  EXPECT_TRUE(toy.forward(batches_[0]).isfinite().all().item<bool>());
}

}  // namespace
}  // namespace vernier
