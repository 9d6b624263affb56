// Chains of layers that hand on int8 codes, with no real values in between.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/export/checkpoint.h>
#include <vernier/export/validate.h>
#include <vernier/kernels/quantize.h>
#include <vernier/qat/linear.h>
#include <vernier/qat/prepare.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/temporary_folder.h>

#include <sstream>
#include <string>

namespace vernier {
namespace {

using testing::message_of;
using testing::TemporaryFolder;
using torch::Tensor;

constexpr int64_t kIn = 20, kHidden = 33, kOut = 6;

struct Chained : torch::nn::Cloneable<Chained> {
  Chained() { Chained::reset(); }
  void reset() override {
    first = register_module("first", nn::Linear(kIn, kHidden));
    second = register_module("second", nn::Linear(kHidden, kOut));
    third = register_module("third", nn::Linear(kHidden, kOut));
  }
  Tensor forward(const Tensor& x) {
    between = first(x);
    if (relu) between = torch::relu(between);
    return second(between) + third(between);
  }
  nn::Linear first{nullptr}, second{nullptr}, third{nullptr};
  bool relu = true;
  Tensor between;
};

QuantizationRules rules_with(const Scheme& activations) {
  QuantizationRules rules;
  rules.weights.scheme = symmetric_scheme(8, Granularity::per_channel);
  rules.activations.scheme = activations;
  return rules;
}

void calibrate(Chained& model, const Tensor& x) {
  const torch::NoGradGuard no_grad;
  set_mode(model, Mode::observe);
  model.forward(x);
  calibrate_from_observers(model);
  set_mode(model, Mode::full);
}

std::shared_ptr<Chained> chained(const Scheme& activations, torch::Dtype dtype = torch::kFloat) {
  auto model = std::make_shared<Chained>();
  model->relu = activations.symmetric;
  model->to(dtype);
  apply_rules(*model, rules_with(activations));
  chain(*model, "first", "second");
  chain(*model, "first", "third");
  calibrate(*model, torch::randn({64, kIn}).to(dtype));
  model->eval();
  return model;
}

Tensor output_in(Chained& model, Mode mode, const Tensor& x) {
  const torch::NoGradGuard no_grad;
  const ModeGuard guard(model, mode);
  return model.forward(x);
}

const Scheme kSchemes[] = {symmetric_scheme(8), asymmetric_scheme(8), symmetric_scheme(4)};

class QatChain : public ::testing::Test {
 protected:
  QatChain() { torch::manual_seed(21); }
};

TEST_F(QatChain, CodesTravelInIntegerMode) {
  for (const Scheme& scheme : kSchemes) {
    for (const torch::Dtype dtype : {torch::kFloat, torch::kBFloat16}) {
      SCOPED_TRACE(concat(to_string(scheme), " ", c10::toString(dtype)));
      const auto model = chained(scheme, dtype);
      const Tensor x = torch::randn({17, kIn}).to(dtype);
      const Tensor fake = output_in(*model, Mode::fake_quant, x);
      const Tensor values = model->between;
      const Tensor real = output_in(*model, Mode::integer, x);
      EXPECT_EQ(model->between.scalar_type(), torch::kChar);
      EXPECT_EQ(real.scalar_type(), dtype);

      // What fake-quantization passes on lies on the codes' grid and is the same.
      const QuantizerImpl& quantizer = *model->first->output_quantizer;
      const Tensor implied =
          quantize(values, quantizer.scale(), quantizer.zero_point(), quantizer.scheme());
      const auto moved = implied.ne(model->between).sum().item<int64_t>();
      EXPECT_LE(moved, dtype == torch::kFloat ? 1 : implied.numel() / 8);
      EXPECT_LE((implied.to(torch::kInt) - model->between.to(torch::kInt)).abs().max().item<int>(),
                1);
      if (moved == 0) {
        EXPECT_TRUE(torch::allclose(real, fake, dtype == torch::kFloat ? 1e-5 : 2e-2,
                                    dtype == torch::kFloat ? 1e-5 : 2e-2));
      }
    }
  }
}

TEST_F(QatChain, TrainingQuantizesTheOutputOnce) {
  const auto model = chained(symmetric_scheme(8));
  set_mode(*model, Mode::fake_quant);
  const Tensor x = torch::randn({5, kIn});
  const Tensor y = model->forward(x);
  // By hand: the consumers' inputs are not quantized again.
  nn::Linear& first = model->first;
  const Tensor hidden =
      torch::nn::functional::linear(first->input_quantizer->forward(x),
                                    first->weight_quantizer->forward(first->weight), first->bias);
  const Tensor between = torch::relu(first->output_quantizer->forward(hidden));
  Tensor expected;
  for (nn::Linear* layer : {&model->second, &model->third}) {
    const Tensor part = torch::nn::functional::linear(
        between, (*layer)->weight_quantizer->forward((*layer)->weight), (*layer)->bias);
    expected = expected.defined() ? expected + part : part;
  }
  EXPECT_TRUE(torch::equal(y, expected));
  y.sum().backward();
  EXPECT_GT(first->weight.grad().abs().sum().item<double>(), 0);
  EXPECT_EQ(quantized_layers(*model)[1].layer->quantizers().size(), 1u);  // the weight's
}

TEST_F(QatChain, LearnedOutputScalesReachTheConsumers) {
  const auto model = chained(asymmetric_scheme(8));
  model->relu = false;
  model->first->output_quantizer->set_policy(RangePolicy::learned);
  {
    const torch::NoGradGuard no_grad;
    for (Tensor& parameter : model->first->output_quantizer->parameters()) parameter *= 1.25;
  }
  const Tensor x = torch::randn({9, kIn});
  const Tensor fake = output_in(*model, Mode::fake_quant, x);
  EXPECT_TRUE(torch::allclose(output_in(*model, Mode::integer, x), fake, 1e-4, 1e-3));
}

TEST_F(QatChain, ValidatesAndSurvivesCopies) {
  const TemporaryFolder folder;
  for (const Scheme& scheme : kSchemes) {
    SCOPED_TRACE(to_string(scheme));
    const auto model = chained(scheme);
    const Tensor x = torch::randn({12, kIn});
    Validator validator(*model);
    validator.add([&] { return model->forward(x); });
    EXPECT_TRUE(validator.report().passed(0.05));
    EXPECT_GT(validator.report().total(&LayerValidation::accumulators), 0);

    const Tensor expected = output_in(*model, Mode::integer, x);
    const auto clone = std::dynamic_pointer_cast<Chained>(model->clone());
    {  // the copy's chain is the copy's
      const torch::NoGradGuard no_grad;
      model->first->output_quantizer->scale().mul_(3);
    }
    EXPECT_TRUE(torch::equal(output_in(*clone, Mode::integer, x), expected));

    std::stringstream bytes;
    torch::save(clone, bytes);
    auto loaded = std::make_shared<Chained>();
    torch::load(loaded, bytes);
    loaded->relu = clone->relu;
    EXPECT_TRUE(torch::equal(output_in(*loaded, Mode::integer, x), expected));

    save_checkpoint(*clone, {"Chained", "{}", "mine", ""}, folder.path() / "model.h5");
    auto exported = std::make_shared<Chained>();
    Checkpoint::open(folder.path() / "model.h5").load_into(*exported);
    exported->relu = clone->relu;
    EXPECT_TRUE(torch::equal(output_in(*exported, Mode::integer, x), expected));
    EXPECT_EQ(exported->between.scalar_type(), torch::kChar);
  }
}

TEST_F(QatChain, WhatIsNoChainIsRefused) {
  Chained model;
  apply_rules(model, rules_with(symmetric_scheme(8)));
  EXPECT_CONTAINS(message_of([&] { chain(model, "first", "fourth"); }), "'fourth'");
  EXPECT_CONTAINS(message_of([&] { chain(model, "first", "first"); }), "two different");
  chain(model, "first", "second");
  model.third->input_quantizer->set_settings({asymmetric_scheme(8), {}});
  EXPECT_CONTAINS(message_of([&] { chain(model, "first", "third"); }), "same scheme");
  QuantizationRules rules = rules_with(symmetric_scheme(8, Granularity::per_token));
  rules.activations.scheme.dynamic = true;
  Chained dynamic;
  apply_rules(dynamic, rules);
  EXPECT_CONTAINS(message_of([&] { chain(dynamic, "first", "second"); }), "one static scale");

  // Codes without a chain, and a chain without its scale.
  model.second->set_input_from("");
  model.third->input_quantizer->set_settings({symmetric_scheme(8), {}});
  calibrate(model, torch::randn({8, kIn}));
  EXPECT_CONTAINS(message_of([&] {
                    output_in(model, Mode::integer, torch::randn({2, kIn}));
                  }),
                  "arrives as codes");
  Chained fresh;
  apply_rules(fresh, rules_with(symmetric_scheme(8)));
  chain(fresh, "first", "second");
  fresh.first->weight_quantizer->calibrate(fresh.first->weight);
  EXPECT_CONTAINS(message_of([&] { set_mode(fresh, Mode::integer); }), "output has no scale");
}

}  // namespace
}  // namespace vernier
