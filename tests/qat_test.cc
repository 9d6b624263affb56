// Quantizers, vernier::nn::Linear in its four modes, and the functions over all layers of a model.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/kernels/quantize.h>
#include <vernier/qat/linear.h>
#include <vernier/tests/expect_error.h>

#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace vernier {
namespace {

using testing::message_of;
using torch::Tensor;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kIn = 24, kOut = 10;

const Scheme kSymmetric = symmetric_scheme(8);
const Scheme kAsymmetric = asymmetric_scheme(8);
const Scheme kPerToken = {.granularity = Granularity::per_token, .dynamic = true};
const Scheme kPerChannel = symmetric_scheme(8, Granularity::per_channel);
const Scheme kActivations[] = {kSymmetric, kAsymmetric, kPerToken};
constexpr torch::Dtype kDtypes[] = {torch::kFloat, torch::kHalf, torch::kBFloat16};
constexpr Mode kModes[] = {Mode::full, Mode::observe, Mode::fake_quant, Mode::integer};

nn::Linear make_linear(bool bias = true, int64_t in = kIn, int64_t out = kOut) {
  return nn::Linear(torch::nn::LinearOptions(in, out).bias(bias));
}

/// Calibrates on `x` as a program does: statistics of one forward, then ranges.
void calibrate(nn::Linear& layer, const Scheme& activations, const Tensor& x) {
  layer->input_quantizer->set_settings({activations, {}});
  layer->set_mode(Mode::observe);
  layer->forward(x);
  layer->set_mode(Mode::full);
  if (!activations.dynamic)
    layer->input_quantizer->calibrate(layer->input_quantizer->observer().statistics());
  layer->weight_quantizer->calibrate(layer->weight);
}

nn::Linear calibrated_linear(const Scheme& activations = kSymmetric, bool bias = true) {
  nn::Linear layer = make_linear(bias);
  calibrate(layer, activations, torch::randn({32, kIn}) + 0.5);
  return layer;
}

Tensor forward_in(nn::Linear& layer, Mode mode, const Tensor& x) {
  layer->set_mode(mode);
  const Tensor y = layer->forward(x);
  layer->set_mode(Mode::full);
  return y;
}

/// f(value, scale, zero point) of every element of a matrix; one scale for all or one a row.
template <typename F>
Tensor elementwise(const Tensor& values, const Tensor& scale,
                   const std::optional<Tensor>& zero_point, const F& f) {
  const Tensor x = values.detach().to(torch::kFloat).reshape({-1, values.size(-1)}).clone();
  for (int64_t r = 0; r < x.size(0); ++r) {
    const int64_t s = scale.numel() == 1 ? 0 : r;
    float* row = x.data_ptr<float>() + r * x.size(1);
    for (int64_t c = 0; c < x.size(1); ++c)
      row[c] = f(row[c], scale.data_ptr<float>()[s], zero_point ? (*zero_point)[0].item<int>() : 0);
  }
  return x.reshape(values.sizes());
}

/// The scale that a quantizer uses for `x`, by the contract: of itself, or of each row.
Tensor scale_of(const QuantizerImpl& quantizer, const Tensor& x) {
  if (!quantizer.scheme().dynamic) return quantizer.scale();
  const Tensor amax =
      std::get<0>(x.to(torch::kFloat).abs().reshape({-1, x.size(-1)}).max(1, false));
  return amax / static_cast<float>(quantizer.scheme().qmax());
}

Tensor hand_codes(const QuantizerImpl& quantizer, const Tensor& x) {
  const Scheme& scheme = quantizer.scheme();
  return elementwise(
      x, scale_of(quantizer, x), quantizer.zero_point(), [&](float v, float s, int z) {
        return static_cast<float>(quantize_value(v, s, z, scheme.qmin(), scheme.qmax()));
      });
}

Tensor hand_fake_quant(const QuantizerImpl& quantizer, const Tensor& x) {
  return elementwise(hand_codes(quantizer, x), scale_of(quantizer, x), quantizer.zero_point(),
                     [](float code, float s, int z) {
                       return dequantize_value(static_cast<int32_t>(code), s, z);
                     });
}

Tensor hand_mask(const QuantizerImpl& quantizer, const Tensor& x) {
  const Scheme& scheme = quantizer.scheme();
  return elementwise(x, quantizer.scale(), quantizer.zero_point(), [&](float v, float s, int z) {
    return passes_gradient(v, s, z, scheme.qmin(), scheme.qmax()) ? 1.0f : 0.0f;
  });
}

std::vector<std::string> archive_keys(const nn::Linear& layer) {
  std::stringstream bytes;
  torch::save(layer, bytes);
  torch::serialize::InputArchive archive;
  archive.load_from(bytes);
  return archive.keys();
}

class QatTest : public ::testing::Test {
 protected:
  QatTest() { torch::manual_seed(3); }
};

// ---- Mode full and observe ----------------------------------------------------------------------

TEST_F(QatTest, StartsAsTorchsLinearUnderTheSameSeed) {
  for (const bool bias : {true, false}) {
    torch::manual_seed(11);
    const torch::nn::Linear theirs(torch::nn::LinearOptions(kIn, kOut).bias(bias));
    torch::manual_seed(11);
    const nn::Linear ours = make_linear(bias);
    const auto expected = theirs->named_parameters(), actual = ours->named_parameters();
    EXPECT_EQ(actual.keys(), expected.keys());
    for (const auto& item : expected) EXPECT_TRUE(torch::equal(actual[item.key()], item.value()));
    EXPECT_EQ(ours->mode(), Mode::full);
    EXPECT_TRUE(ours->quantized());
  }
}

TEST_F(QatTest, FullModeIsTorchsLinearBitForBit) {
  for (const bool bias : {true, false}) {
    for (const torch::Dtype dtype : kDtypes) {
      torch::nn::Linear theirs(torch::nn::LinearOptions(kIn, kOut).bias(bias));
      nn::Linear ours = make_linear(bias);
      std::stringstream bytes;
      torch::save(theirs, bytes);
      torch::load(ours, bytes);
      theirs->to(dtype);
      ours->to(dtype);
      const Tensor x = torch::randn({3, 5, kIn}).to(dtype);
      const Tensor expected = theirs->forward(x), y = ours->forward(x);
      EXPECT_EQ(y.scalar_type(), dtype);
      EXPECT_TRUE(torch::equal(y, expected));
      expected.sum().backward();
      y.sum().backward();
      EXPECT_TRUE(torch::equal(ours->weight.grad(), theirs->weight.grad()));
    }
  }
}

TEST_F(QatTest, ArchivesInterchangeWithTorchsLinear) {
  nn::Linear ours = make_linear();
  EXPECT_EQ(archive_keys(ours), (std::vector<std::string>{"weight", "bias"}));
  std::stringstream bytes;
  torch::save(ours, bytes);
  torch::nn::Linear theirs(kIn, kOut);
  torch::load(theirs, bytes);
  EXPECT_TRUE(torch::equal(theirs->weight, ours->weight));
  EXPECT_TRUE(torch::equal(theirs->bias, ours->bias));
}

TEST_F(QatTest, ArchivesOfCalibratedLayersHoldTheScales) {
  nn::Linear saved = calibrated_linear(kAsymmetric), loaded = calibrated_linear(kAsymmetric);
  ASSERT_FALSE(torch::equal(loaded->weight_quantizer->scale(), saved->weight_quantizer->scale()));
  std::stringstream bytes;
  torch::save(saved, bytes);
  torch::load(loaded, bytes);
  EXPECT_TRUE(torch::equal(loaded->weight_quantizer->scale(), saved->weight_quantizer->scale()));
  EXPECT_TRUE(torch::equal(loaded->input_quantizer->scale(), saved->input_quantizer->scale()));
  EXPECT_TRUE(
      torch::equal(*loaded->input_quantizer->zero_point(), *saved->input_quantizer->zero_point()));
}

TEST_F(QatTest, ObserveGathersAndReturnsTheFloatResult) {
  nn::Linear layer = make_linear();
  const Tensor x = torch::randn({4, kIn}), more = 3 * torch::randn({2, 3, kIn});
  layer->forward(x);
  EXPECT_EQ(layer->input_quantizer->observer().statistics().histogram.total(), 0);
  EXPECT_TRUE(torch::equal(forward_in(layer, Mode::observe, x), layer->forward(x)));
  EXPECT_TRUE(torch::equal(forward_in(layer, Mode::observe, more), layer->forward(more)));

  const SiteStatistics seen = layer->input_quantizer->observer().statistics();
  const Tensor all = torch::cat({x, more.reshape({-1, kIn})});
  EXPECT_EQ(seen.histogram.total(), all.numel());
  EXPECT_EQ(seen.histogram.range().min, all.min().item<float>());
  EXPECT_EQ(seen.histogram.range().max, all.max().item<float>());
  ASSERT_EQ(seen.channels.size(), static_cast<size_t>(kIn));
  for (int64_t c = 0; c < kIn; ++c)
    EXPECT_EQ(seen.channels[c].max, all.select(1, c).max().item<float>());
}

// ---- Mode fake_quant ----------------------------------------------------------------------------

TEST_F(QatTest, FakeQuantIsTheFormula) {
  for (const Scheme& scheme : kActivations) {
    SCOPED_TRACE(to_string(scheme));
    nn::Linear layer = calibrated_linear(scheme);
    const Tensor x = 2 * torch::randn({6, kIn});
    const Tensor expected = torch::nn::functional::linear(
        hand_fake_quant(*layer->input_quantizer, x),
        hand_fake_quant(*layer->weight_quantizer, layer->weight), layer->bias);
    EXPECT_TRUE(torch::equal(forward_in(layer, Mode::fake_quant, x), expected));
    EXPECT_FALSE(torch::equal(layer->forward(x), expected));
  }
}

TEST_F(QatTest, GradientsPassStraightThroughInsideTheRange) {
  for (const Scheme& scheme : {kSymmetric, kAsymmetric}) {
    SCOPED_TRACE(to_string(scheme));
    nn::Linear layer = make_linear();
    layer->input_quantizer->set_settings({scheme, {}});
    layer->input_quantizer->set_ranges({{-0.4f, 1.1f}}, torch::kCPU);
    layer->weight_quantizer->set_ranges(std::vector<Range>(kOut, Range{-0.1f, 0.1f}), torch::kCPU);
    Tensor x = torch::randn({7, kIn}).requires_grad_();
    const Tensor gradient = torch::randn({7, kOut});
    forward_in(layer, Mode::fake_quant, x).backward(gradient);

    const torch::NoGradGuard no_grad;
    const Tensor x_mask = hand_mask(*layer->input_quantizer, x);
    const Tensor w_mask = hand_mask(*layer->weight_quantizer, layer->weight);
    for (const Tensor& mask : {x_mask, w_mask}) {  // some of both, or nothing is shown
      ASSERT_GT(mask.sum().item<float>(), 0);
      ASSERT_LT(mask.sum().item<float>(), static_cast<float>(mask.numel()));
    }
    const Tensor x_quantized = hand_fake_quant(*layer->input_quantizer, x);
    const Tensor w_quantized = hand_fake_quant(*layer->weight_quantizer, layer->weight);
    EXPECT_TRUE(torch::allclose(x.grad(), gradient.mm(w_quantized) * x_mask, 1e-5, 1e-6));
    EXPECT_TRUE(torch::equal(x.grad().ne(0), x_mask.to(torch::kBool)));
    EXPECT_TRUE(
        torch::allclose(layer->weight.grad(), gradient.t().mm(x_quantized) * w_mask, 1e-5, 1e-6));
    EXPECT_TRUE(torch::equal(layer->weight.grad().ne(0), w_mask.to(torch::kBool)));
    EXPECT_TRUE(torch::allclose(layer->bias.grad(), gradient.sum(0), 1e-5, 1e-6));
  }
}

TEST_F(QatTest, DynamicScalesAreConstantsToTheGradient) {
  nn::Linear layer = calibrated_linear(kPerToken);
  Tensor x = torch::randn({5, kIn}).requires_grad_();
  const Tensor gradient = torch::randn({5, kOut});
  forward_in(layer, Mode::fake_quant, x).backward(gradient);
  const Tensor expected = gradient.mm(hand_fake_quant(*layer->weight_quantizer, layer->weight));
  EXPECT_TRUE(torch::allclose(x.grad(), expected, 1e-5, 1e-6));
}

// ---- Mode integer -------------------------------------------------------------------------------

/// The bound of export/validate.h on |integer - fake_quant|; half precision adds its roundings.
Tensor output_bound(const nn::Linear& layer, const Tensor& x) {
  const Tensor magnitude = hand_fake_quant(*layer->input_quantizer, x)
                               .abs()
                               .to(torch::kDouble)
                               .matmul(hand_fake_quant(*layer->weight_quantizer, layer->weight)
                                           .abs()
                                           .t()
                                           .to(torch::kDouble));
  const Tensor total = layer->bias.defined() ? magnitude + layer->bias.abs() : magnitude;
  const double half = x.scalar_type() == torch::kHalf       ? std::ldexp(1, -10)
                      : x.scalar_type() == torch::kBFloat16 ? std::ldexp(1, -7)
                                                            : 0;
  return total * ((kIn + 8) * std::ldexp(1, -24) + half);
}

TEST_F(QatTest, IntegerComputesWhatFakeQuantSays) {
  for (const Scheme& scheme : kActivations) {
    for (const torch::Dtype dtype : kDtypes) {
      for (const bool bias : {true, false}) {
        SCOPED_TRACE(concat(to_string(scheme), ", ", c10::toString(dtype), ", bias ", bias));
        nn::Linear layer = make_linear(bias);
        layer->to(dtype);
        calibrate(layer, scheme, (torch::randn({32, kIn}) + 0.5).to(dtype));
        const torch::NoGradGuard no_grad;
        for (const Tensor& values :
             {torch::randn({kIn}), 3 * torch::randn({9, kIn}), torch::randn({2, 3, kIn})}) {
          const Tensor x = values.to(dtype);
          const Tensor fake = forward_in(layer, Mode::fake_quant, x);
          const Tensor y = forward_in(layer, Mode::integer, x);
          EXPECT_EQ(y.scalar_type(), dtype);
          EXPECT_EQ(y.sizes(), fake.sizes());
          const Tensor difference = (y.to(torch::kDouble) - fake.to(torch::kDouble)).abs();
          EXPECT_TRUE(difference.le(output_bound(layer, x)).all().item<bool>())
              << difference.max().item<double>();
        }
      }
    }
  }
}

TEST_F(QatTest, CodesAndAccumulatorsAreExact) {
  for (const Scheme& scheme : kActivations) {
    SCOPED_TRACE(to_string(scheme));
    nn::Linear layer = calibrated_linear(scheme);
    EXPECT_FALSE(layer->weight_codes().defined());
    layer->set_mode(Mode::integer);
    const Tensor x = 3 * torch::randn({9, kIn});
    const Tensor codes = layer->input_quantizer->codes(x).codes;
    EXPECT_TRUE(torch::equal(codes.to(torch::kFloat), hand_codes(*layer->input_quantizer, x)));
    EXPECT_TRUE(torch::equal(layer->weight_codes().to(torch::kFloat),
                             hand_codes(*layer->weight_quantizer, layer->weight)));

    const auto zero_point = layer->input_quantizer->zero_point();
    ASSERT_NE(zero_point ? zero_point->item<int>() : 1, 0);  // or nothing is shown
    const Tensor centred = codes.to(torch::kLong) - (zero_point ? zero_point->to(torch::kLong)
                                                                : torch::zeros({1}, torch::kLong));
    const Tensor exact =
        centred.to(torch::kDouble).mm(layer->weight_codes().t().to(torch::kDouble));
    const Tensor sums = layer->accumulators(codes);
    EXPECT_EQ(sums.scalar_type(), torch::kInt);
    EXPECT_TRUE(torch::equal(sums.to(torch::kDouble), exact));
  }
}

TEST_F(QatTest, PerTokenScalesAreOfEachRow) {
  nn::Linear layer = calibrated_linear(kPerToken);
  Tensor x = torch::randn({3, kIn}) * torch::tensor({1e-3, 1.0, 1e4}).reshape({3, 1});
  const auto [codes, scale] = layer->input_quantizer->codes(x);
  EXPECT_TRUE(torch::equal(scale, scale_of(*layer->input_quantizer, x)));
  EXPECT_TRUE(torch::equal(std::get<0>(codes.abs().max(1)), torch::full({3}, 127, torch::kChar)));
}

TEST_F(QatTest, EmptyBatchesAndStridedInputs) {
  for (const Scheme& scheme : kActivations) {
    nn::Linear layer = calibrated_linear(scheme);
    for (const Mode mode : kModes) {
      SCOPED_TRACE(to_string(scheme) + ", " + to_string(mode));
      EXPECT_EQ(forward_in(layer, mode, torch::empty({0, kIn})).sizes(),
                (std::vector<int64_t>{0, kOut}));
      EXPECT_EQ(forward_in(layer, mode, torch::empty({2, 0, kIn})).sizes(),
                (std::vector<int64_t>{2, 0, kOut}));
      const Tensor strided = torch::randn({kIn, 6}).t();
      EXPECT_TRUE(torch::allclose(forward_in(layer, mode, strided),
                                  forward_in(layer, mode, strided.contiguous()), 1e-6, 1e-6));
    }
  }
}

TEST_F(QatTest, CodesFollowTheWeightWhenIntegerModeIsSet) {
  nn::Linear layer = calibrated_linear();
  layer->set_mode(Mode::integer);
  const Tensor before = layer->weight_codes().clone();
  layer->set_mode(Mode::full);
  layer->weight.set_data(-layer->weight);
  layer->set_mode(Mode::integer);
  EXPECT_TRUE(torch::equal(layer->weight_codes(), -before));
}

TEST_F(QatTest, LoadedCodesBecomeTheWeight) {
  nn::Linear layer = calibrated_linear(kAsymmetric);
  const Tensor codes = torch::randint(-127, 128, {kOut, kIn}, torch::kChar);
  layer->load_weight_codes(codes);
  EXPECT_TRUE(torch::equal(layer->weight_codes(), codes));
  EXPECT_TRUE(torch::equal(
      layer->weight, codes.to(torch::kFloat) * layer->weight_quantizer->scale().reshape({-1, 1})));
  layer->set_mode(Mode::integer);  // makes the codes anew: the same
  EXPECT_TRUE(torch::equal(layer->weight_codes(), codes));

  const std::pair<Tensor, const char*> wrong[] = {
      {codes.to(torch::kInt), "int8"},
      {codes.t(), "of shape"},
      {codes.flatten(), "of shape"},
      {torch::full({kOut, kIn}, -128, torch::kChar), "[-127, 127]"}};
  for (const auto& [values, part] : wrong)
    EXPECT_CONTAINS(message_of([&] { layer->load_weight_codes(values); }), part);
}

// ---- Quantizers ---------------------------------------------------------------------------------

TEST_F(QatTest, ScalesKeepTheirDtypeWhenTheModuleIsMoved) {
  nn::Linear layer = calibrated_linear(kAsymmetric);
  const Tensor scale = layer->weight_quantizer->scale().clone();
  layer->to(torch::kBFloat16);
  layer->to(torch::kCPU, torch::kHalf);
  EXPECT_EQ(layer->weight.scalar_type(), torch::kHalf);
  EXPECT_EQ(layer->input_quantizer->scale().scalar_type(), torch::kFloat);
  EXPECT_EQ(layer->input_quantizer->zero_point()->scalar_type(), torch::kInt);
  EXPECT_TRUE(torch::equal(layer->weight_quantizer->scale(), scale));
}

TEST_F(QatTest, RangesBecomeScales) {
  Quantizer symmetric(QuantizerSettings{kSymmetric, {}});
  EXPECT_FALSE(symmetric->calibrated());
  symmetric->set_ranges({{-1.0f, 2.54f}}, torch::kCPU);
  EXPECT_TRUE(symmetric->calibrated());
  EXPECT_EQ(symmetric->scale().item<float>(), 2.54f / 127);
  EXPECT_FALSE(symmetric->zero_point().has_value());

  Quantizer asymmetric(QuantizerSettings{kAsymmetric, {}});
  asymmetric->set_ranges({{-1.0f, 1.55f}}, torch::kCPU);
  EXPECT_EQ(asymmetric->scale().item<float>(), 2.55f / 255);
  EXPECT_EQ(asymmetric->zero_point()->item<int>(), -28);

  asymmetric->set_settings({kAsymmetric, {CalibrationMethod::mse}});
  EXPECT_FALSE(asymmetric->calibrated());
  EXPECT_EQ(asymmetric->settings().calibrator.method, CalibrationMethod::mse);
  EXPECT_TRUE(Quantizer(QuantizerSettings{kPerToken, {}})->calibrated());
}

TEST_F(QatTest, WeightsAreCalibratedByGranularity) {
  const Tensor weight =
      torch::tensor({{1.0f, -127.0f, 2.0f, 0.5f}, {-0.25f, 0.125f, 0.0f, 254.0f}});
  const std::pair<Scheme, std::vector<float>> cases[] = {
      {kSymmetric, {2}},
      {kPerChannel, {1, 2}},
      {symmetric_scheme(8, Granularity::per_group, 2), {1, 2.0f / 127, 0.25f / 127, 2}}};
  for (const auto& [scheme, scales] : cases) {
    Quantizer quantizer(QuantizerSettings{scheme, {}});
    quantizer->calibrate(weight);
    EXPECT_TRUE(torch::equal(quantizer->scale(), torch::tensor(scales))) << to_string(scheme);
  }
}

TEST_F(QatTest, QuantizersRefuseWhatIsNoScale) {
  Quantizer symmetric(QuantizerSettings{kSymmetric, {}});
  Quantizer asymmetric(QuantizerSettings{kAsymmetric, {}});
  Quantizer dynamic(QuantizerSettings{kPerToken, {}});
  const Tensor one = torch::ones({1}), zero = torch::zeros({1}, torch::kInt);
  const auto set = [](Quantizer& quantizer, const Tensor& scale,
                      const std::optional<Tensor>& zero_point = std::nullopt) {
    return [quantizer, scale, zero_point]() mutable { quantizer->set_scale(scale, zero_point); };
  };
  const std::pair<std::function<void()>, const char*> cases[] = {
      {set(symmetric, one * kNaN), "finite and positive"},
      {set(symmetric, one * kInf), "finite and positive"},
      {set(symmetric, one * 0), "finite and positive"},
      {set(symmetric, -one), "finite and positive"},
      {set(symmetric, one.to(torch::kDouble)), "float32"},
      {set(symmetric, one, zero), "zero point"},
      {set(asymmetric, one), "zero point"},
      {set(asymmetric, one, zero + 128), "[-128, 127]"},
      {set(asymmetric, one, zero.to(torch::kLong)), "int32"},
      {set(asymmetric, one, torch::zeros({2}, torch::kInt)), "one a scale"},
      {set(dynamic, torch::ones({2})), "one factor"},
      {[&] {
         symmetric->set_ranges({{0, kInf}}, torch::kCPU);
       },
       "finite"},
      {[&] {
         symmetric->set_ranges({{kNaN, 1}}, torch::kCPU);
       },
       "finite"},
      {[&] { symmetric->forward(one); }, "no scale yet"},
      {[&] { symmetric->codes(one); }, "no scale yet"},
      {[&] {
         dynamic->calibrate(torch::ones({2, 2}));
       },
       "per_token"},
      {[&] { dynamic->calibrate(SiteStatistics{}); }, "per_tensor"},
      {[&] {
         Quantizer(QuantizerSettings{kPerChannel, {}})->calibrate(SiteStatistics{});
       },
       "per_tensor"}};
  for (const auto& [action, part] : cases) EXPECT_CONTAINS(message_of(action), part);
  EXPECT_FALSE(symmetric->calibrated());
  EXPECT_FALSE(asymmetric->calibrated());
}

TEST_F(QatTest, WeightsWithNaNOrInfAreRefused) {
  for (const float value : {kNaN, kInf, -kInf}) {
    nn::Linear layer = make_linear();
    const torch::NoGradGuard no_grad;
    layer->weight[4][1] = value;
    const std::string message =
        message_of([&] { layer->weight_quantizer->calibrate(layer->weight); });
    EXPECT_CONTAINS(message, std::isnan(value) ? "1 NaN" : "1 infinite");
    EXPECT_CONTAINS(message, "row 4");
    EXPECT_FALSE(layer->weight_quantizer->calibrated());
  }
}

// ---- Modes --------------------------------------------------------------------------------------

TEST_F(QatTest, ModeNames) {
  for (const Mode mode : kModes) EXPECT_EQ(mode_from_string(to_string(mode)), mode);
  EXPECT_EQ(mode_from_string("full"), Mode::full);
  EXPECT_CONTAINS(message_of([] { mode_from_string("int8"); }), "'int8'");
}

TEST_F(QatTest, UncalibratedLayersAreRefused) {
  for (const Mode mode : {Mode::fake_quant, Mode::integer}) {
    nn::Linear layer = make_linear();
    EXPECT_CONTAINS(message_of([&] { layer->set_mode(mode); }), "input has no scale");
    layer->input_quantizer->set_ranges({{-1, 1}}, torch::kCPU);
    EXPECT_CONTAINS(message_of([&] { layer->set_mode(mode); }), "weight has no scale");
    EXPECT_EQ(layer->mode(), Mode::full);
  }
  EXPECT_CONTAINS(message_of([&] {
                    calibrated_linear()->integer_forward(torch::zeros({1, kIn}));
                  }),
                  "no weight codes");
}

TEST_F(QatTest, InputsOfAnotherSizeAreRefused) {
  for (const Scheme& scheme : kActivations) {
    for (const Mode mode : {Mode::fake_quant, Mode::integer}) {
      SCOPED_TRACE(to_string(scheme) + ", " + to_string(mode));
      nn::Linear layer = calibrated_linear(scheme);
      layer->set_mode(mode);
      for (const Tensor& x :
           {torch::zeros({3, kIn + 1}), torch::zeros({kIn, 1}), torch::tensor(1.0f)})
        EXPECT_CONTAINS(message_of([&] { layer->forward(x); }), "takes [..., 24]");
    }
  }
}

TEST_F(QatTest, InputsThatCouldOverflowAreRefused) {
  const std::pair<Scheme, int64_t> cases[] = {{kSymmetric, kMaxInt8GemmK},
                                              {kPerToken, kMaxInt8GemmK},
                                              {kAsymmetric, kMaxInt8GemmKAsymmetric}};
  for (const auto& [scheme, limit] : cases) {
    SCOPED_TRACE(to_string(scheme));
    for (const int64_t k : {limit, limit + 1}) {
      nn::Linear layer = make_linear(false, k, 1);
      calibrate(layer, scheme, torch::randn({1, k}));
      const std::string message = message_of([&] { layer->set_mode(Mode::integer); });
      if (k == limit) {
        EXPECT_EQ(message, "");
        continue;
      }
      EXPECT_CONTAINS(message, "overflow");
      EXPECT_CONTAINS(message, std::to_string(limit));
    }
  }
}

TEST_F(QatTest, LargestSumsAreExact) {
  // Every product is 255 * 127 and the sum is the last that fits.
  nn::Linear layer = make_linear(false, kMaxInt8GemmKAsymmetric, 1);
  const torch::NoGradGuard no_grad;
  layer->weight.fill_(127);
  layer->input_quantizer->set_settings({kAsymmetric, {}});
  layer->input_quantizer->set_ranges({{0, 255}}, torch::kCPU);
  layer->weight_quantizer->calibrate(layer->weight);
  layer->set_mode(Mode::integer);
  const Tensor x = torch::full({1, kMaxInt8GemmKAsymmetric}, 255.0f);
  EXPECT_EQ(layer->accumulators(layer->input_quantizer->codes(x).codes).item<int64_t>(),
            kMaxInt8GemmKAsymmetric * 255 * 127);
}

TEST_F(QatTest, WeightsThatTheKernelsLackAreRefused) {
  for (const Scheme& scheme :
       {asymmetric_scheme(8), symmetric_scheme(8, Granularity::per_group, 8)}) {
    nn::Linear layer = calibrated_linear();
    layer->weight_quantizer->set_settings({scheme, {}});
    layer->weight_quantizer->calibrate(layer->weight);
    EXPECT_CONTAINS(message_of([&] { layer->set_mode(Mode::integer); }), "kernels");
  }
}

TEST_F(QatTest, SkippedLayersStayFloat) {
  nn::Linear layer = calibrated_linear();
  const Tensor x = torch::randn({3, kIn}), expected = layer->forward(x);
  layer->set_mode(Mode::integer);
  layer->set_quantized(false);
  EXPECT_EQ(layer->mode(), Mode::full);
  for (const Mode mode : kModes) {
    layer->set_mode(mode);
    EXPECT_EQ(layer->mode(), Mode::full);
    EXPECT_TRUE(torch::equal(layer->forward(x), expected));
  }
  EXPECT_EQ(layer->input_quantizer->observer().statistics().histogram.total(), 32 * kIn)
      << "only what calibrated_linear() showed";
}

TEST_F(QatTest, ProbesSeeInputAndOutputInEveryMode) {
  nn::Linear layer = calibrated_linear();
  const Tensor x = torch::randn({3, kIn});
  Tensor input, output;
  layer->set_probe([&](const std::vector<Tensor>& in, const Tensor& out) {
    input = in.at(0);
    output = out;
  });
  for (const Mode mode : kModes) {
    const Tensor y = forward_in(layer, mode, x);
    EXPECT_TRUE(input.is_same(x));
    EXPECT_TRUE(output.is_same(y));
  }
  layer->set_probe(nullptr);
  const Tensor last = output;
  layer->forward(x);
  EXPECT_TRUE(output.is_same(last));
}

// ---- Models -------------------------------------------------------------------------------------

/// "first" calibrated, then "inner" with the layer "second" and a float layer.
struct Model : torch::nn::Module {
  explicit Model(bool second_calibrated) {
    first = register_module("first", calibrated_linear());
    auto inner = register_module("inner", std::make_shared<torch::nn::Module>());
    inner->register_module("plain", torch::nn::Linear(kOut, kOut));
    second =
        inner->register_module("second", second_calibrated ? calibrated_linear() : make_linear());
  }
  nn::Linear first{nullptr}, second{nullptr};
};

TEST_F(QatTest, LayersAreFoundUnderTheirNames) {
  const auto model = std::make_shared<Model>(true);
  const std::vector<NamedLayer> layers = quantized_layers(*model);
  ASSERT_EQ(layers.size(), 2u);
  EXPECT_EQ(layers[0].name, "first");
  EXPECT_EQ(layers[0].layer.get(), model->first.get());
  EXPECT_EQ(layers[1].name, "inner.second");
  EXPECT_EQ(layers[1].layer.get(), model->second.get());
  EXPECT_TRUE(quantized_layers(torch::nn::SequentialImpl()).empty());
}

TEST_F(QatTest, SetModeNamesTheLayerItFailsAt) {
  const auto model = std::make_shared<Model>(false);
  set_mode(*model, Mode::observe);
  EXPECT_EQ(model->second->mode(), Mode::observe);
  EXPECT_CONTAINS(message_of([&] { set_mode(*model, Mode::integer); }), "layer 'inner.second'");
}

TEST_F(QatTest, ModeGuardGivesBackEveryMode) {
  const auto model = std::make_shared<Model>(true);
  model->first->set_mode(Mode::observe);
  model->second->set_mode(Mode::integer);
  const auto expect_before = [&] {
    EXPECT_EQ(model->first->mode(), Mode::observe);
    EXPECT_EQ(model->second->mode(), Mode::integer);
  };
  {
    const ModeGuard outer(*model, Mode::integer);
    const ModeGuard inner(*model, Mode::fake_quant);
    EXPECT_EQ(model->first->mode(), Mode::fake_quant);
    EXPECT_EQ(model->second->mode(), Mode::fake_quant);
  }
  expect_before();
  try {
    const ModeGuard guard(*model, Mode::full);
    throw std::runtime_error("in between");
  } catch (const std::runtime_error&) {
  }
  expect_before();
}

TEST_F(QatTest, ModeGuardThatCannotBeMadeLeavesTheModes) {
  const auto model = std::make_shared<Model>(false);
  EXPECT_THROW(ModeGuard(*model, Mode::integer), Error);
  EXPECT_EQ(model->first->mode(), Mode::full);
  EXPECT_EQ(model->second->mode(), Mode::full);
}

}  // namespace
}  // namespace vernier
