// Ranges that go on changing while a model trains: learned, averaged, following their tensor.
#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/kernels/fake_quantize.h>
#include <vernier/qat/linear.h>
#include <vernier/qat/session.h>
#include <vernier/tests/expect_error.h>

#include <cmath>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

namespace vernier {
namespace {

using testing::message_of;
using torch::Tensor;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

QuantizerSettings learned(const Scheme& scheme) {
  return {scheme, {CalibrationMethod::mse}, RangePolicy::learned};
}
QuantizerSettings averaged(const Scheme& scheme, double averaging = 0.25) {
  return {scheme, {}, RangePolicy::moving_average, averaging};
}
QuantizerSettings following(const Scheme& scheme) { return {scheme, {}, RangePolicy::following}; }

std::vector<Scheme> learnable_schemes() {
  std::vector<Scheme> schemes;
  for (const int bits : {2, 3, 4, 8}) {
    schemes.push_back(symmetric_scheme(bits));
    schemes.push_back(asymmetric_scheme(bits));
    schemes.push_back(symmetric_scheme(bits, Granularity::per_channel));
    schemes.push_back(asymmetric_scheme(bits, Granularity::per_channel));
    schemes.push_back(symmetric_scheme(bits, Granularity::per_group, 4));
  }
  return schemes;
}

/// A scale or zero point of [6, 8] as it broadcasts over [6, 2, 4].
Tensor spread(const Tensor& values, const Scheme& scheme) {
  if (scheme.granularity == Granularity::per_channel) return values.reshape({6, 1, 1});
  if (scheme.granularity == Granularity::per_group) return values.reshape({6, 2, 1});
  return values.reshape({1, 1, 1});
}

class QatQuantizer : public ::testing::Test {
 protected:
  QatQuantizer() { torch::manual_seed(13); }
};

// ---- Learned ranges -----------------------------------------------------------------------------

TEST_F(QatQuantizer, LearnedGradientsAreThoseOfAFloat64Reference) {
  for (const Scheme& scheme : learnable_schemes()) {
    SCOPED_TRACE(to_string(scheme));
    Quantizer quantizer(learned(scheme), 0, Operand::weight);
    Tensor x = (2 * torch::randn({6, 8})).requires_grad_();
    quantizer->calibrate(x);
    const Tensor g = torch::randn({6, 8});
    quantizer->forward(x).backward(g);

    // Round is the identity to the gradient; all else is autograd's business.
    const auto as_double = [](const Tensor& t) {
      return t.detach().to(torch::kDouble).requires_grad_();
    };
    Tensor x64 = as_double(x), s64 = as_double(quantizer->scale());
    Tensor z64 = scheme.symmetric ? torch::zeros({1}, torch::kDouble).requires_grad_()
                                  : as_double(*quantizer->zero_point());
    const Tensor s = spread(s64, scheme);
    const Tensor z = scheme.symmetric ? z64.reshape({1, 1, 1}) : spread(z64, scheme);
    const Tensor v = x64.reshape({6, 2, 4}) / s;
    const Tensor rounded = v + (v.round() - v).detach();
    const Tensor y = ((rounded + z).clamp(scheme.qmin(), scheme.qmax()) - z) * s;
    y.backward(g.to(torch::kDouble).reshape({6, 2, 4}));

    EXPECT_TRUE(torch::equal(x.grad(), x64.grad().to(torch::kFloat)));
    const auto parameters = quantizer->named_parameters();
    const int64_t per_scale = 48 / quantizer->scale().numel();
    const double scaling = 1 / std::sqrt(static_cast<double>(per_scale) * scheme.qmax());
    const double terms = g.abs().sum().item<double>() * (1 << scheme.bits);
    EXPECT_LE(
        (parameters["learned_scale"].grad() - scaling * s64.grad()).abs().max().item<double>(),
        scaling * terms * std::ldexp(1, -22));
    ASSERT_EQ(parameters.contains("learned_zero_point"), !scheme.symmetric);
    if (!scheme.symmetric) {
      EXPECT_LE((parameters["learned_zero_point"].grad() - scaling * z64.grad())
                    .abs()
                    .max()
                    .item<double>(),
                scaling * terms * std::ldexp(1, -22));
    }
  }
}

TEST_F(QatQuantizer, FiniteDifferencesConfirmTheScaleGradient) {
  // Where a value is clipped the function itself is smooth in the scale. Elsewhere the estimator's
  // surrogate is, whose rounding error stays what it was.
  const Scheme scheme = symmetric_scheme(4);
  Quantizer quantizer(learned(scheme));
  const double s0 = 0.25, h = 1e-4;
  quantizer->set_scale(torch::tensor({static_cast<float>(s0)}), std::nullopt);
  const std::vector<double> values{-9.0, -3.1, -1.7, -0.6, 0.01, 0.4, 1.3, 1.74, 5.0, 100.0};
  for (const double value : values) {
    const Tensor x = torch::tensor({static_cast<float>(value)});
    quantizer->zero_grad();
    quantizer->forward(x).backward(torch::ones({1}));
    const double gradient =
        quantizer->scale().grad().item<double>() * std::sqrt(static_cast<double>(scheme.qmax()));
    const double exact = static_cast<float>(value);
    const double error = std::nearbyint(exact / s0) - exact / s0;
    const bool clipped = exact / s0 > scheme.qmax() + 0.5 || exact / s0 < scheme.qmin() - 0.5;
    const auto surrogate = [&](double s) {
      if (!clipped) return (exact / s + error) * s;
      const Tensor scale = torch::tensor({static_cast<float>(s)});
      return fake_quantize(x, scale, std::nullopt, scheme).item<double>();
    };
    EXPECT_NEAR(gradient, (surrogate(s0 + h) - surrogate(s0 - h)) / (2 * h), 2e-2) << value;
  }
}

TEST_F(QatQuantizer, GradientScaleCountsElementsOfAWeightOrASample) {
  const Scheme scheme = symmetric_scheme(8);
  const Tensor x = torch::randn({4, 10});
  const auto gradient = [&](Operand operand, const Tensor& values) {
    Quantizer quantizer(learned(scheme), 0, operand);
    quantizer->set_scale(torch::tensor({0.01f}), std::nullopt);
    quantizer->forward(values).sum().backward();
    return quantizer->scale().grad().item<double>();
  };
  EXPECT_NEAR(gradient(Operand::activation, x) / gradient(Operand::weight, x), 2, 1e-5);
  // The step of a batch of equal samples is the sample's, summed.
  EXPECT_NEAR(gradient(Operand::activation, x.repeat({3, 1})), 3 * gradient(Operand::activation, x),
              1e-4);
  EXPECT_EQ(gradient(Operand::activation, torch::empty({0, 10})), 0);
}

TEST_F(QatQuantizer, LearnedRangesAreParametersBeforeTheyAreCalibrated) {
  nn::Linear layer(8, 4);
  layer->weight_quantizer->set_settings(learned(symmetric_scheme(4, Granularity::per_channel)));
  layer->input_quantizer->set_settings(learned(asymmetric_scheme(4)));
  EXPECT_EQ(layer->named_parameters().keys(),
            (std::vector<std::string>{"weight", "bias", "input_quantizer.learned_scale",
                                      "input_quantizer.learned_zero_point",
                                      "weight_quantizer.learned_scale"}));
  EXPECT_FALSE(layer->weight_quantizer->calibrated());
  torch::optim::Adam optimizer(
      std::vector<torch::optim::OptimizerParamGroup>{
          {parameters_without_ranges(*layer)},
          {learned_ranges(*layer), std::make_unique<torch::optim::AdamOptions>(1e-4)}},
      torch::optim::AdamOptions(1e-2));
  const Tensor x = torch::randn({16, 8}), target = torch::randn({16, 4});
  layer->forward(x).sum().backward();
  optimizer.step();
  layer->weight_quantizer->calibrate(layer->weight);
  layer->input_quantizer->set_ranges({{-2, 3}}, torch::kCPU);
  const Tensor scale = layer->weight_quantizer->scale().detach().clone();
  const Tensor zero_point =
      layer->named_parameters()["input_quantizer.learned_zero_point"].detach().clone();
  layer->set_mode(Mode::fake_quant);
  double first = 0, last = 0;
  for (int i = 0; i < 100; ++i) {
    optimizer.zero_grad();
    const Tensor loss = (layer->forward(x) - target).square().mean();
    loss.backward();
    optimizer.step();
    (i == 0 ? first : last) = loss.item<double>();
  }
  EXPECT_LT(last, 0.9 * first);
  EXPECT_FALSE(torch::equal(layer->weight_quantizer->scale(), scale));
  EXPECT_FALSE(
      torch::equal(layer->named_parameters()["input_quantizer.learned_zero_point"], zero_point));
  // The integer mode rounds the zero point as fake-quantization does.
  layer->eval();
  const torch::NoGradGuard no_grad;
  const Tensor fake = layer->forward(x);
  layer->set_mode(Mode::integer);
  EXPECT_TRUE(torch::allclose(layer->forward(x), fake, 1e-5, 1e-5));
}

TEST_F(QatQuantizer, ScalesThatStopBeingScalesAreNamed) {
  for (const float wrong : {0.0f, -0.5f, kNaN, std::numeric_limits<float>::infinity()}) {
    torch::nn::Sequential model(nn::Linear(4, 4), nn::Linear(4, 2));
    auto& layer = model->at<nn::LinearImpl>(1);
    for (const auto& item : quantized_layers(*model)) {
      item.layer->input_quantizer->set_ranges({{-1, 1}}, torch::kCPU);
      item.layer->weight_quantizer->calibrate(item.layer->float_weight());
    }
    layer.weight_quantizer->set_policy(RangePolicy::learned);
    set_mode(*model, Mode::fake_quant);
    EXPECT_EQ(message_of([&] { model->forward(torch::ones({1, 4})); }), "");
    {
      const torch::NoGradGuard no_grad;
      layer.weight_quantizer->scale()[1] = wrong;
    }
    const std::string message = message_of([&] { model->forward(torch::ones({1, 4})); });
    EXPECT_CONTAINS(message, "layer '1'");
    EXPECT_CONTAINS(message, "number 1 of 2");
    EXPECT_CONTAINS(message, "smaller learning rate");
    EXPECT_CONTAINS(message_of([&] { set_mode(*model, Mode::integer); }), "layer '1'");
  }
}

TEST_F(QatQuantizer, PoliciesChangeAndKeepTheScale) {
  const Tensor x = torch::randn({6, 8});
  for (const Scheme& scheme : {symmetric_scheme(8), asymmetric_scheme(8)}) {
    Quantizer quantizer(QuantizerSettings{scheme, {}});
    quantizer->set_ranges({{-1.5f, 2}}, torch::kCPU);
    const Tensor expected = quantizer->forward(x).detach();
    for (const RangePolicy policy :
         {RangePolicy::learned, RangePolicy::frozen, RangePolicy::moving_average,
          RangePolicy::learned, RangePolicy::moving_average}) {
      quantizer->set_policy(policy);
      quantizer->eval();
      EXPECT_TRUE(torch::equal(quantizer->forward(x).detach(), expected)) << to_string(policy);
      EXPECT_EQ(quantizer->parameters().empty(), policy != RangePolicy::learned);
    }
  }
}

TEST_F(QatQuantizer, ContradictingSettingsAreRefused) {
  const Scheme per_token = {.granularity = Granularity::per_token, .dynamic = true};
  const std::pair<QuantizerSettings, const char*> cases[] = {
      {learned(fp8_scheme(NumberFormat::e4m3)), "cannot be learned"},
      {averaged(per_token), "static scheme"},
      {learned({.dynamic = true}), "a clip of integers per_token"},
      {following(asymmetric_scheme(8)), "symmetric"},
      {{symmetric_scheme(8), {CalibrationMethod::mse}, RangePolicy::following}, "min_max"},
      {averaged(symmetric_scheme(8, Granularity::per_group, 4)), "per_group"},
      {averaged(symmetric_scheme(8), 0), "averaging"},
      {averaged(symmetric_scheme(8), kNaN), "averaging"},
      {averaged(symmetric_scheme(8), 1.5), "averaging"}};
  for (const auto& [settings, part] : cases) {
    EXPECT_CONTAINS(message_of([&, s = settings] { Quantizer{s}; }), part);
    Quantizer fine;
    EXPECT_CONTAINS(message_of([&, s = settings] { fine->set_settings(s); }), part);
  }
  for (const RangePolicy policy : {RangePolicy::frozen, RangePolicy::moving_average,
                                   RangePolicy::following, RangePolicy::learned})
    EXPECT_EQ(range_policy_from_string(to_string(policy)), policy);
  EXPECT_CONTAINS(message_of([] { range_policy_from_string("ema"); }), "'ema'");
}

TEST_F(QatQuantizer, ArchivesAndClonesKeepWhatWasLearned) {
  for (const QuantizerSettings& settings :
       {learned(asymmetric_scheme(3)), learned(symmetric_scheme(4, Granularity::per_channel)),
        averaged(asymmetric_scheme(8)), averaged(symmetric_scheme(8, Granularity::per_channel))}) {
    Quantizer quantizer(settings);
    const Tensor x = torch::randn({6, 8});
    quantizer->calibrate(x);
    quantizer->forward(3 * x);
    if (settings.policy == RangePolicy::learned) {
      const torch::NoGradGuard no_grad;
      for (Tensor& parameter : quantizer->parameters()) parameter += 0.3;  // between integers
    }
    std::stringstream bytes;
    torch::save(quantizer, bytes);
    Quantizer loaded;
    torch::load(loaded, bytes);
    const auto copy = std::dynamic_pointer_cast<QuantizerImpl>(quantizer->clone());
    for (QuantizerImpl* other : {loaded.get(), copy.get()}) {
      EXPECT_EQ(other->settings().policy, settings.policy);
      EXPECT_EQ(other->scheme(), settings.scheme);
      EXPECT_TRUE(torch::equal(other->scale(), quantizer->scale()));
      const auto mine = quantizer->named_parameters(), theirs = other->named_parameters();
      ASSERT_EQ(mine.keys(), theirs.keys());
      for (const auto& item : mine) EXPECT_TRUE(torch::equal(item.value(), theirs[item.key()]));
      EXPECT_TRUE(
          torch::equal(quantizer->named_buffers()["average"], other->named_buffers()["average"]));
      // They go on alike: averages too.
      for (const double factor : {1.0, 5.0, 0.1})
        EXPECT_TRUE(
            torch::equal(Quantizer(std::dynamic_pointer_cast<QuantizerImpl>(quantizer->clone()))
                             ->forward(factor * x),
                         Quantizer(std::dynamic_pointer_cast<QuantizerImpl>(other->clone()))
                             ->forward(factor * x)));
    }
    quantizer->to(torch::kBFloat16);
    EXPECT_EQ(quantizer->scale().scalar_type(), torch::kFloat);
  }
}

// ---- Averages -----------------------------------------------------------------------------------

TEST_F(QatQuantizer, AveragesFollowTheExtremesInTrainingMode) {
  for (const Scheme& scheme : {symmetric_scheme(8), asymmetric_scheme(8), symmetric_scheme(4)}) {
    SCOPED_TRACE(to_string(scheme));
    Quantizer quantizer(averaged(scheme));
    EXPECT_CONTAINS(message_of([&] { quantizer->forward(torch::ones({2})); }), "no scale yet");
    quantizer->set_ranges({{-1, 1}}, torch::kCPU);
    const float s = quantizer->scale().item<float>();
    const int z = scheme.symmetric ? 0 : quantizer->zero_point()->item<int>();
    float low = static_cast<float>(scheme.qmin() - z) * s,
          high = static_cast<float>(scheme.qmax() - z) * s;
    for (int i = 0; i < 5; ++i) {
      Tensor x = torch::randn({3, 7}) * (i + 1);
      low += 0.25f * (x.min().item<float>() - low);
      high += 0.25f * (x.max().item<float>() - high);
      if (i == 2) x[1][1] = kNaN;
      if (i == 3) x = torch::cat({x, torch::full({1, 7}, -std::numeric_limits<float>::infinity())});
      quantizer->forward(x);
      const ScaleAndZeroPoint expected = scale_from_range({low, high}, scheme);
      EXPECT_NEAR(quantizer->scale().item<float>(), expected.scale, 1e-5 * expected.scale) << i;
      if (!scheme.symmetric) {
        EXPECT_NEAR(quantizer->zero_point()->item<int>(), expected.zero_point, 1);
      }
      if (i == 2) {  // the extremes may have been where the NaN is now
        low = quantizer->named_buffers()["average"][0].item<float>();
        high = quantizer->named_buffers()["average"][1].item<float>();
      }
    }
    const Tensor scale = quantizer->scale().clone();
    quantizer->forward(torch::empty({0, 7}));
    quantizer->eval();
    quantizer->forward(100 * torch::randn({3, 7}));
    quantizer->train();
    quantizer->set_policy(RangePolicy::frozen);
    quantizer->forward(100 * torch::randn({3, 7}));
    EXPECT_TRUE(torch::equal(quantizer->scale(), scale));
  }
}

TEST_F(QatQuantizer, AveragesMoveBetweenForwardAndBackward) {
  // Gradient accumulation: the second forward must not change what the first one's backward needs.
  Quantizer quantizer(averaged(symmetric_scheme(8), 1.0));
  quantizer->set_ranges({{-1, 1}}, torch::kCPU);
  Tensor x = torch::tensor({0.5f, -2.0f}).requires_grad_();
  const Tensor y = quantizer->forward(x);
  const Tensor other = quantizer->forward(torch::tensor({0.01f, -0.02f}));
  (y.sum() + other.sum()).backward();
  EXPECT_TRUE(torch::equal(x.grad(), torch::ones({2})));  // with the second scale both were clipped
}

TEST_F(QatQuantizer, AveragesOfAnyShapeAndLayout) {
  for (const std::vector<int64_t>& shape : std::vector<std::vector<int64_t>>{
           {1}, {5}, {3, 7}, {2, 3, 4, 4}, {4, 8, 8, 4}, {2, 1024}, {0, 3}}) {
    Quantizer quantizer(averaged(symmetric_scheme(8), 1.0));
    quantizer->set_ranges({{-1, 1}}, torch::kCPU);
    Tensor x = 5 * torch::randn(shape);
    const Tensor strided = torch::stack({x, 100 * x}, -1).select(-1, 0);
    std::vector<Tensor> layouts{x, strided};
    if (x.dim() == 4) layouts.push_back(x.contiguous(at::MemoryFormat::ChannelsLast));
    for (const Tensor& values : layouts) {
      quantizer->forward(values);
      const float amax = x.numel() ? x.abs().max().item<float>() : 1.0f;
      EXPECT_EQ(quantizer->scale().item<float>(), amax / 127) << x.sizes();
    }
  }
}

TEST_F(QatQuantizer, AveragesPerChannel) {
  Quantizer quantizer(averaged(symmetric_scheme(8, Granularity::per_channel), 1.0), 1);
  const Tensor x = torch::randn({5, 3, 4});
  quantizer->calibrate(x);
  quantizer->forward(2 * x);
  EXPECT_TRUE(torch::allclose(quantizer->scale(), (2 * x).abs().amax(at::IntArrayRef{0, 2}) / 127.0,
                              1e-6, 0));
}

TEST_F(QatQuantizer, ObservesTensorsWhoseLastAxisChanges) {
  Quantizer quantizer(QuantizerSettings{symmetric_scheme(8), {}});
  const Tensor wide = torch::randn({2, 3, 9}), narrow = 4 * torch::randn({2, 3, 5});
  quantizer->observe(wide, /*last_axis_is_channels=*/false);
  quantizer->observe(narrow, /*last_axis_is_channels=*/false);
  const SiteStatistics seen = quantizer->observer().statistics();
  EXPECT_EQ(seen.histogram.total(), wide.numel() + narrow.numel());
  ASSERT_EQ(seen.channels.size(), 1u);
  EXPECT_EQ(seen.channels[0].max, std::max(wide.max().item<float>(), narrow.max().item<float>()));
  quantizer->calibrate(seen);
  EXPECT_TRUE(quantizer->calibrated());
}

// ---- Scales that follow, and dynamic ones -------------------------------------------------------

TEST_F(QatQuantizer, FollowingScalesAreTheTensorsOwn) {
  const Tensor weight = torch::randn({6, 8});
  for (const Scheme& scheme :
       {symmetric_scheme(8), symmetric_scheme(4, Granularity::per_channel),
        symmetric_scheme(4, Granularity::per_group, 4),
        fp8_scheme(NumberFormat::e4m3, Granularity::per_channel), fp8_scheme(NumberFormat::e5m2)}) {
    SCOPED_TRACE(to_string(scheme));
    Quantizer moving(following(scheme), 0, Operand::weight);
    EXPECT_TRUE(moving->calibrated());
    for (const float factor : {1.0f, 3.0f, 0.25f}) {
      const Tensor w = factor * weight;
      Quantizer fixed(QuantizerSettings{scheme, {}});
      fixed->calibrate(w);
      EXPECT_TRUE(torch::equal(moving->forward(w), fixed->forward(w)));
      EXPECT_TRUE(torch::equal(moving->scale(), fixed->scale()));
      EXPECT_TRUE(torch::equal(moving->codes(w).codes.to(torch::kFloat),
                               fixed->codes(w).codes.to(torch::kFloat)));
    }
  }
}

TEST_F(QatQuantizer, FollowingWeightsReachIntegerModeUpToDate) {
  nn::Linear layer(8, 5);
  layer->weight_quantizer->set_settings(following(symmetric_scheme(8, Granularity::per_channel)));
  layer->input_quantizer->set_ranges({{-3, 3}}, torch::kCPU);
  layer->set_mode(Mode::fake_quant);
  const torch::NoGradGuard no_grad;
  const Tensor x = torch::randn({4, 8});
  layer->forward(x);
  layer->weight *= 2.5;  // the optimizer's last step, after the last forward
  const Tensor fake = layer->forward(x);
  layer->weight_quantizer->forward(torch::ones({5, 8}));  // whatever it saw last
  layer->set_mode(Mode::integer);
  EXPECT_TRUE(torch::allclose(layer->forward(x), fake, 1e-5, 1e-5));
}

TEST_F(QatQuantizer, DynamicScalesOfEveryGranularity) {
  const Tensor x = torch::randn({6, 8});
  for (Scheme scheme : {symmetric_scheme(8), symmetric_scheme(8, Granularity::per_channel),
                        symmetric_scheme(8, Granularity::per_group, 4),
                        symmetric_scheme(8, Granularity::per_token)}) {
    SCOPED_TRACE(to_string(scheme));
    scheme.dynamic = true;
    Quantizer quantizer(QuantizerSettings{scheme, {}});
    const auto [codes, scale] = quantizer->codes(x);
    Scheme fixed = scheme;
    fixed.dynamic = false;
    EXPECT_TRUE(torch::equal(fake_quantize(x, scale, std::nullopt, fixed), quantizer->forward(x)));
    EXPECT_EQ(codes.abs().max().item<int>(), 127);
  }
}

// ---- As torch::nn trains ------------------------------------------------------------------------

nn::Linear trainable(torch::Dtype dtype = torch::kFloat) {
  nn::Linear layer(8, 4);
  layer->to(dtype);
  layer->weight_quantizer->set_settings(learned(symmetric_scheme(4, Granularity::per_channel)));
  layer->input_quantizer->set_settings(learned(asymmetric_scheme(4)));
  layer->weight_quantizer->calibrate(layer->weight);
  layer->input_quantizer->set_ranges({{-2, 3}}, torch::kCPU);
  layer->set_mode(Mode::fake_quant);
  return layer;
}

TEST_F(QatQuantizer, HalfPrecisionLayersTrainWithFloatScales) {
  for (const torch::Dtype dtype : {torch::kHalf, torch::kBFloat16}) {
    nn::Linear layer = trainable(dtype);
    layer->forward(torch::randn({3, 8}).to(dtype)).to(torch::kFloat).square().sum().backward();
    for (const auto& item : layer->named_parameters()) {
      ASSERT_TRUE(item.value().grad().defined()) << item.key();
      EXPECT_EQ(item.value().grad().scalar_type(),
                item.key().find("learned") == std::string::npos ? dtype : torch::kFloat);
      EXPECT_TRUE(item.value().grad().isfinite().all().item<bool>());
    }
  }
}

TEST_F(QatQuantizer, AutocastComputesInHalfPrecision) {
  nn::Linear layer = trainable();
  const Tensor x = torch::randn({3, 8});
  const Tensor expected = layer->forward(x);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  const Tensor y = layer->forward(x);
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  EXPECT_EQ(y.scalar_type(), torch::kBFloat16);
  EXPECT_TRUE(torch::allclose(y.to(torch::kFloat), expected, 2e-2, 2e-2));
  y.to(torch::kFloat).sum().backward();
  EXPECT_EQ(layer->weight.grad().scalar_type(), torch::kFloat);
  EXPECT_TRUE(layer->weight_quantizer->scale().grad().defined());
}

TEST_F(QatQuantizer, GradientsAccumulate) {
  nn::Linear layer = trainable();
  const Tensor x = torch::randn({6, 8});
  layer->forward(x.slice(0, 0, 3)).sum().backward();
  std::vector<Tensor> sums;
  for (const Tensor& parameter : layer->parameters()) sums.push_back(parameter.grad().clone());
  layer->zero_grad();
  layer->forward(x.slice(0, 3)).sum().backward();
  for (size_t i = 0; i < sums.size(); ++i) sums[i] += layer->parameters()[i].grad();
  layer->zero_grad();
  layer->forward(x.slice(0, 0, 3)).sum().backward();
  layer->forward(x.slice(0, 3)).sum().backward();
  for (size_t i = 0; i < sums.size(); ++i)
    EXPECT_TRUE(torch::equal(layer->parameters()[i].grad(), sums[i]));
}

TEST_F(QatQuantizer, BatchesOfAnySizeTrain) {
  nn::Linear layer = trainable();
  for (const int64_t rows : {1, 0, 5, 2}) {
    layer->zero_grad();
    const Tensor y = layer->forward(torch::randn({rows, 8}));
    EXPECT_EQ(y.sizes(), (std::vector<int64_t>{rows, 4}));
    y.sum().backward();
    for (const Tensor& parameter : layer->parameters())
      EXPECT_TRUE(parameter.grad().isfinite().all().item<bool>());
  }
}

TEST_F(QatQuantizer, InputsOnAnotherDeviceAreRefused) {
  torch::nn::Sequential model(trainable());
  set_mode(*model, Mode::fake_quant);
  const std::string message = message_of([&] {
    model->forward(torch::empty({3, 8}, torch::kMeta));
  });
  EXPECT_CONTAINS(message, "layer '0'");
  EXPECT_CONTAINS(message, "the input is on meta and the layer on cpu");
}

// ---- The start of learned steps -----------------------------------------------------------------

TEST_F(QatQuantizer, LsqCalibratorIsTwoMeansOverTheRootOfQmax) {
  const Tensor x = torch::randn({1000});
  for (const int bits : {2, 4, 8}) {
    const Scheme scheme = symmetric_scheme(bits);
    Quantizer quantizer(QuantizerSettings{scheme, {CalibrationMethod::lsq}});
    quantizer->calibrate(x);
    const double expected =
        2 * x.abs().mean().item<double>() / std::sqrt(static_cast<double>(scheme.qmax()));
    EXPECT_NEAR(quantizer->scale().item<double>(), expected, 1e-3 * expected);
  }
  EXPECT_EQ(calibration_method_from_string("lsq"), CalibrationMethod::lsq);
  EXPECT_CONTAINS(
      message_of([&] {
        Quantizer quantizer(QuantizerSettings{asymmetric_scheme(4), {CalibrationMethod::lsq}});
        quantizer->calibrate(x);
      }),
      "symmetric");
}

}  // namespace
}  // namespace vernier
