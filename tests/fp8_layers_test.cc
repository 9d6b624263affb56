// FP8 above the kernels: recipes, calibrators, layers in every mode, checkpoints and validation.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/export/checkpoint.h>
#include <vernier/export/validate.h>
#include <vernier/kernels/fp8.h>
#include <vernier/kernels/fp8_format.h>
#include <vernier/qat/linear.h>
#include <vernier/recipes/recipe.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/temporary_folder.h>

#include <cmath>
#include <memory>
#include <string>
#include <vector>

namespace vernier {
namespace {

using testing::message_of;
using testing::TemporaryFolder;
using torch::Tensor;

constexpr int64_t kIn = 48, kHidden = 32, kOut = 7, kRows = 20;

struct Chain : torch::nn::Module {
  Chain() {
    first = register_module("first", nn::Linear(kIn, kHidden));
    second = register_module("second", nn::Linear(kHidden, kOut));
  }
  Tensor forward(const Tensor& x) { return second(torch::relu(first(x))); }

  nn::Linear first{nullptr}, second{nullptr};
};

Tensor sample_input() { return torch::randn({kRows, kIn}) + 0.3; }

std::shared_ptr<Chain> calibrated_chain(const Recipe& recipe, torch::Dtype dtype = torch::kFloat) {
  const torch::NoGradGuard no_grad;
  auto model = std::make_shared<Chain>();
  model->to(dtype);
  apply_recipe(*model, recipe);
  ModelStatistics statistics;
  const ModeGuard observing(*model, Mode::observe);
  model->forward(sample_input().to(dtype));
  for (const auto& [name, layer] : quantized_layers(*model))
    statistics.sites[name] = layer->input_quantizer->observer().statistics();
  calibrate_layers(*model, statistics);
  return model;
}

Recipe recipe_with(const std::string& weights, const std::string& activations) {
  return parse_recipe("{name: x, weights: {" + weights + "}, activations: {" + activations + "}}",
                      "source");
}

std::vector<Recipe> fp8_recipes() {
  return {load_recipe("fp8-static"), load_recipe("fp8-dynamic"),
          recipe_with("format: e4m3, granularity: per_tensor", "format: e5m2, calibrator: mse")};
}

Tensor output_in(Chain& model, Mode mode, const Tensor& x) {
  const torch::NoGradGuard no_grad;
  const ModeGuard guard(model, mode);
  return model.forward(x);
}

class Fp8LayersTest : public ::testing::Test {
 protected:
  Fp8LayersTest() { torch::manual_seed(8); }
  TemporaryFolder folder_;
};

TEST_F(Fp8LayersTest, RecipesSayWhichFormat) {
  const Recipe fixed = load_recipe("fp8-static"), dynamic = load_recipe("fp8-dynamic");
  EXPECT_EQ(fixed.weights.scheme, fp8_scheme(NumberFormat::e4m3, Granularity::per_channel));
  EXPECT_EQ(fixed.activations.scheme, fp8_scheme(NumberFormat::e4m3));
  EXPECT_TRUE(dynamic.activations.scheme.dynamic);
  EXPECT_EQ(dynamic.activations.scheme.format, NumberFormat::e4m3);
  EXPECT_EQ(load_recipe("w8a8-static").weights.scheme.format, NumberFormat::integer);

  const std::tuple<const char*, const char*, const char*> wrong[] = {
      {"format: e4m3", "bits: 8", "both"},
      {"bits: 8", "format: e5m2", "both"},
      {"format: fp8", "format: e4m3", "'fp8'"},
      {"format: e4m3, bits: 4", "format: e4m3", "8 bits"},
      {"format: e4m3", "format: e4m3, symmetric: false", "symmetric"},
      {"format: e4m3", "format: e4m3, calibrator: entropy", "entropy"}};
  for (const auto& [weights, activations, part] : wrong)
    EXPECT_CONTAINS(message_of([&, w = weights, a = activations] { recipe_with(w, a); }), part);
}

TEST_F(Fp8LayersTest, CalibratorsChooseRangesForTheFormat) {
  const Scheme scheme = fp8_scheme(NumberFormat::e4m3);
  const Tensor x = torch::randn({4096});
  Histogram histogram;
  histogram.add({x.const_data_ptr<float>(), static_cast<size_t>(x.numel())});
  EXPECT_EQ(min_max_range(histogram, scheme).max, x.abs().max().item<float>());
  EXPECT_LT(percentile_range(histogram, scheme, 99).max, x.abs().max().item<float>());
  EXPECT_CONTAINS(message_of([&] { entropy_range(histogram, scheme); }), "entropy");

  // No range serves better than that of mse, up to its bins.
  const auto squared_error = [&](const Tensor& values, Range range) {
    const Tensor scale = torch::full({1}, scale_from_range(range, scheme).scale);
    return (fake_quantize_fp8(values, scale, scheme) - values).square().sum().item<double>();
  };
  const double least = squared_error(x, mse_range(histogram, scheme));
  for (double factor = 0.25; factor <= 1; factor *= 1.07) {
    const float max = static_cast<float>(factor) * histogram.amax();
    EXPECT_LE(least, squared_error(x, {-max, max}) * 1.02) << factor;
  }
  // Values on a grid of the format: it is found, and nothing is lost.
  const Tensor exact = torch::tensor({-448.0f, 1.0f, 26.0f, 240.0f, 448.0f}) / 64;
  Histogram few;
  few.add({exact.const_data_ptr<float>(), static_cast<size_t>(exact.numel())});
  EXPECT_EQ(squared_error(exact, min_max_range(few, scheme)), 0);
}

TEST_F(Fp8LayersTest, IntegerModeComputesWhatFakeQuantSays) {
  for (const Recipe& recipe : fp8_recipes()) {
    SCOPED_TRACE(to_string(recipe.activations.scheme));
    const auto model = calibrated_chain(recipe);
    const Tensor x = sample_input();
    const Tensor full = output_in(*model, Mode::full, x);
    const Tensor fake = output_in(*model, Mode::fake_quant, x);
    const Tensor real = output_in(*model, Mode::integer, x);
    EXPECT_EQ(model->first->weight_codes().scalar_type(), torch::kFloat8_e4m3fn);
    EXPECT_TRUE(model->first->is_fp8());
    EXPECT_LT((fake - real).norm().item<double>(), 2e-2 * real.norm().item<double>());
    const double error = ((real - full).norm() / full.norm()).item<double>();
    EXPECT_GT(error, 0);
    EXPECT_LT(error, 0.15);
    EXPECT_CONTAINS(message_of([&] { model->first->accumulators(model->first->weight_codes()); }),
                    "no integer accumulators");
  }
}

TEST_F(Fp8LayersTest, FakeQuantTrains) {
  const auto model = calibrated_chain(load_recipe("fp8-static"));
  const ModeGuard guard(*model, Mode::fake_quant);
  model->forward(sample_input()).square().sum().backward();
  for (const auto& parameter : model->parameters()) {
    ASSERT_TRUE(parameter.grad().defined());
    EXPECT_GT(parameter.grad().abs().sum().item<double>(), 0);
  }
}

TEST_F(Fp8LayersTest, FormatsDoNotMix) {
  const auto model = calibrated_chain(load_recipe("fp8-static"));
  QuantizerSettings integer;
  model->first->input_quantizer->set_settings(integer);
  model->first->input_quantizer->set_scale(torch::ones({1}), std::nullopt);
  EXPECT_CONTAINS(message_of([&] { set_mode(*model, Mode::integer); }), "integers or FP8");
}

TEST_F(Fp8LayersTest, CheckpointsRoundTrip) {
  for (const Recipe& recipe : fp8_recipes()) {
    for (const torch::Dtype dtype : {torch::kFloat, torch::kBFloat16}) {
      SCOPED_TRACE(to_string(recipe.activations.scheme));
      const auto model = calibrated_chain(recipe, dtype);
      save_checkpoint(*model, {"Chain", "{}", "x", "f"}, folder_ / "m.h5");
      const auto loaded = std::make_shared<Chain>();
      loaded->to(dtype);
      Checkpoint::open(folder_ / "m.h5").load_into(*loaded);
      EXPECT_EQ(loaded->second->weight_quantizer->scheme(),
                model->second->weight_quantizer->scheme());
      EXPECT_EQ(loaded->second->input_quantizer->scheme(),
                model->second->input_quantizer->scheme());
      const Tensor x = sample_input().to(dtype);
      EXPECT_TRUE(
          torch::equal(output_in(*model, Mode::integer, x), output_in(*loaded, Mode::integer, x)));
    }
  }
}

TEST_F(Fp8LayersTest, CheckpointsWithoutAFormatHoldIntegers) {
  // As older versions wrote them.
  const auto model = calibrated_chain(load_recipe("w8a8-static"));
  save_checkpoint(*model, {"Chain", "{}", "x", "f"}, folder_ / "new.h5");
  const hdf5::File file = hdf5::File::open(folder_ / "new.h5");
  EXPECT_EQ(file.attribute_string("layers/first", "weight_format"), "int");
  EXPECT_EQ(file.attribute_string("layers/first", "input_format"), "int");
  hdf5::write_atomically(folder_ / "old.h5", [&](hdf5::File& old) {
    for (const char* name : {"format", "architecture", "recipe", "model_fingerprint"})
      old.set_attribute("/", name, file.attribute_string("/", name));
    old.set_attribute("/", "version", file.attribute_int("/", "version"));
    old.write_text("config", "{}");
    old.create_group("layers");
    old.create_group("tensors");
    for (const std::string layer : {"layers/first", "layers/second"}) {
      old.create_group(layer);
      for (const std::string prefix : {"weight_", "input_"}) {
        old.set_attribute(layer, prefix + "bits", file.attribute_int(layer, prefix + "bits"));
        old.set_attribute(layer, prefix + "granularity",
                          file.attribute_string(layer, prefix + "granularity"));
        old.set_attribute(layer, prefix + "group_size",
                          file.attribute_int(layer, prefix + "group_size"));
        for (const std::string flag : {"symmetric", "narrow_range", "dynamic"})
          old.set_attribute(layer, prefix + flag, file.attribute_bool(layer, prefix + flag));
      }
      const auto copy = [&]<typename T>(const std::string& name, T) {
        const auto shape = file.info(layer + "/" + name).shape;
        const auto values = file.read<T>(layer + "/" + name);
        old.write<T>(layer + "/" + name, std::span<const T>(values),
                     std::span<const int64_t>(shape));
      };
      copy("weight_codes", int8_t{});
      copy("weight_scale", float{});
      copy("input_scale", float{});
      copy("input_zero_point", int32_t{});
    }
    for (const std::string name : {"tensors/first.bias", "tensors/second.bias"}) {
      const auto shape = file.info(name).shape;
      const auto values = file.read<float>(name);
      old.write<float>(name, std::span<const float>(values), std::span<const int64_t>(shape));
    }
  });
  const auto loaded = std::make_shared<Chain>();
  Checkpoint::open(folder_ / "old.h5").load_into(*loaded);
  const Tensor x = sample_input();
  EXPECT_TRUE(
      torch::equal(output_in(*model, Mode::integer, x), output_in(*loaded, Mode::integer, x)));
}

TEST_F(Fp8LayersTest, CodesOfNoNumberAreRefused) {
  const auto model = calibrated_chain(load_recipe("fp8-static"));
  set_mode(*model, Mode::integer);
  Tensor bytes = model->first->weight_codes().view(torch::kByte).clone();
  bytes[0][0] = 0x7f;
  EXPECT_CONTAINS(
      message_of([&] { model->first->load_weight_codes(bytes.view(torch::kFloat8_e4m3fn)); }),
      "leave [-448, 448]");
  EXPECT_CONTAINS(message_of([&] { model->first->load_weight_codes(bytes); }), "must be");
}

TEST_F(Fp8LayersTest, GoodModelsPassValidation) {
  for (const Recipe& recipe : fp8_recipes()) {
    for (const torch::Dtype dtype : {torch::kFloat, torch::kBFloat16}) {
      SCOPED_TRACE(to_string(recipe.activations.scheme));
      const auto model = calibrated_chain(recipe, dtype);
      Validator validator(*model);
      validator.add([&] { return model->forward(sample_input().to(dtype)); });
      const ValidationReport& report = validator.report();
      using V = LayerValidation;
      EXPECT_EQ(report.total(&V::codes), kRows * (kIn + kHidden));
      EXPECT_EQ(report.total(&V::weight_codes), kHidden * (kIn + kOut));
      EXPECT_EQ(report.total(&V::code_mismatches), 0);
      EXPECT_EQ(report.total(&V::weight_code_mismatches), 0);
      EXPECT_EQ(report.total(&V::accumulators), 0);
      EXPECT_EQ(report.total(&V::outputs), kRows * (kHidden + kOut));
      EXPECT_EQ(report.total(&V::outside_bound), 0);
    }
  }
}

TEST_F(Fp8LayersTest, AnAlteredWeightCodeIsFound) {
  const auto model = calibrated_chain(load_recipe("fp8-static"));
  set_mode(*model, Mode::integer);
  Tensor code = model->first->weight_codes().view(torch::kByte)[2][3];
  code.copy_(code.bitwise_xor(0x80));  // the sign alone
  Validator validator(*model);
  const Tensor x = sample_input();
  validator.add([&] { return model->forward(x); });
  const LayerValidation& first = validator.report().layers[0];
  EXPECT_EQ(first.weight_code_mismatches, 1);
  EXPECT_EQ(first.code_mismatches, 0);
  EXPECT_GT(first.outside_bound, 0);
  EXPECT_EQ(validator.report().layers[1].weight_code_mismatches, 0);
  EXPECT_FALSE(validator.report().passed(1e9));
}

}  // namespace
}  // namespace vernier
