// Dynamic and learned fake-quantization on the CPU: against the operations they are made of,
// formulas in double, and finite differences.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/fake_quantize.h>
#include <vernier/kernels/quantize.h>
#include <vernier/tests/expect_error.h>

#include <limits>
#include <vector>

using namespace vernier;

namespace {

using at::Tensor;
using vernier::testing::message_of;
using OptionalTensor = std::optional<Tensor>;

constexpr at::ScalarType kElementTypes[] = {at::kFloat, at::kHalf, at::kBFloat16};
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr Granularity kTensor = Granularity::per_tensor, kChannel = Granularity::per_channel,
                      kToken = Granularity::per_token, kGroup = Granularity::per_group;

[[maybe_unused]] const bool kOneThread = (at::set_num_threads(1), true);

Tensor scalar(float value) { return at::full({1}, value, at::kFloat); }

/// Equal dtype, shape and values; NaN equals NaN.
bool same(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         at::allclose(a.to(at::kDouble), b.to(at::kDouble), 0, 0, /*equal_nan=*/true);
}

/// x as [outer, count, inner]: elements that share a scale share the middle index.
Tensor by_scale(const Tensor& x, const Scheme& scheme, int64_t axis) {
  switch (scheme.granularity) {
    case Granularity::per_tensor:
      return x.reshape({1, 1, -1});
    case Granularity::per_token:
      return x.reshape({1, -1, x.size(-1)});
    case Granularity::per_group:
      return x.reshape({1, -1, scheme.group_size});
    case Granularity::per_channel:
      break;
  }
  axis = axis < 0 ? axis + x.dim() : axis;
  int64_t outer = 1;
  for (int64_t i = 0; i < axis; ++i) outer *= x.size(i);
  return x.reshape({outer, x.size(axis), -1});
}

struct Case {
  std::vector<int64_t> shape;
  Scheme scheme;
  int64_t axis = 0;
};

std::vector<Case> cases(bool symmetric) {
  const auto scheme = [&](int bits, Granularity granularity, int64_t group = 0) {
    return symmetric ? symmetric_scheme(bits, granularity, group)
                     : asymmetric_scheme(bits, granularity, group);
  };
  return {{{7, 33}, scheme(8, kTensor)},        {{7, 33}, scheme(4, kToken)},
          {{7, 33}, scheme(8, kChannel), 0},    {{70, 5}, scheme(8, kChannel), 1},
          {{5, 6, 50}, scheme(8, kChannel), 1}, {{40, 3, 7}, scheme(4, kChannel), -2},
          {{6, 96}, scheme(4, kGroup, 32)},     {{2, 3, 4}, scheme(2, kToken)},
          {{1, 70001}, scheme(8, kTensor)}};
}

TEST(FakeQuantizeDynamic, IsFakeQuantizeWithTheScaleOfTheMaximum) {
  at::manual_seed(1);
  for (const at::ScalarType type : kElementTypes) {
    for (const Case& c : cases(true)) {
      SCOPED_TRACE(concat(to_string(c.scheme), at::IntArrayRef(c.shape), type));
      Tensor x = at::randn(c.shape).to(type);
      x.flatten()[0] = kNaN;
      x.flatten()[x.numel() - 1] = -kInf;
      const Tensor finite = at::nan_to_num(x.to(at::kFloat), 0.0, 0.0, 0.0);
      const Tensor amax = at::amax(by_scale(finite, c.scheme, c.axis).abs(), {0, 2});
      Tensor expected = amax / static_cast<float>(c.scheme.qmax());
      expected = at::where(expected > 0, expected, at::ones_like(expected));
      const auto [output, scale] = fake_quantize_dynamic(x, c.scheme, c.axis);
      EXPECT_TRUE(same(expected, scale));
      EXPECT_TRUE(same(fake_quantize(x, expected, {}, c.scheme, c.axis), output));
    }
  }
}

TEST(FakeQuantizeDynamic, GradientPassesUnchanged) {
  const Tensor x = at::randn({4, 9}).requires_grad_(true), gradient = at::randn({4, 9});
  auto [output, scale] = fake_quantize_dynamic(x, symmetric_scheme(4, kToken));
  EXPECT_FALSE(scale.requires_grad());
  output.backward(gradient);
  EXPECT_TRUE(same(gradient, x.grad()));
}

TEST(FakeQuantizeDynamic, EmptyAndDeadTensors) {
  for (const Granularity granularity : {kTensor, kChannel, kToken}) {
    const Scheme scheme = symmetric_scheme(8, granularity);
    const auto [empty, scale] = fake_quantize_dynamic(at::empty({3, 0}), scheme);
    EXPECT_EQ(empty.sizes(), (std::vector<int64_t>{3, 0}));
    EXPECT_TRUE(same(at::ones({granularity == kTensor ? 1 : 3}), scale));
    const auto [none, no_scale] = fake_quantize_dynamic(at::empty({0, 3}), scheme);
    EXPECT_EQ(no_scale.numel(), granularity == kTensor ? 1 : 0);
    const auto [zeros, ones] = fake_quantize_dynamic(at::zeros({3, 4}), scheme);
    EXPECT_TRUE(same(at::zeros({3, 4}), zeros));
    EXPECT_TRUE(same(at::ones_like(ones), ones));
  }
  const auto [empty, scale] =
      fake_quantize_dynamic(at::empty({0, 3}), symmetric_scheme(8, kChannel), 1);
  EXPECT_TRUE(same(at::ones({3}), scale));
}

TEST(FakeQuantizeDynamic, MetaKnowsTheShapes) {
  for (const Case& c : cases(true)) {
    const Tensor x = at::randn(c.shape);
    const auto [output, scale] = fake_quantize_dynamic(x, c.scheme, c.axis);
    const auto [meta, meta_scale] = fake_quantize_dynamic(x.to(at::kMeta), c.scheme, c.axis);
    EXPECT_EQ(output.sizes(), meta.sizes());
    EXPECT_EQ(scale.sizes(), meta_scale.sizes());
  }
}

struct Gradients {
  Tensor input, scale, zero_point;
};

Gradients learned(const Tensor& x, const Tensor& scale, const OptionalTensor& zero_point,
                  const Case& c, const Tensor& gradient, double gradient_scale = 1.0) {
  const Tensor leaf = x.detach().requires_grad_(true);
  const Tensor s = scale.detach().requires_grad_(true);
  OptionalTensor z;
  if (zero_point) z = zero_point->detach().requires_grad_(zero_point->scalar_type() == at::kFloat);
  fake_quantize_learned(leaf, s, z, c.scheme, c.axis, gradient_scale).backward(gradient);
  return {leaf.grad(), s.grad(), z ? z->grad() : Tensor()};
}

TEST(FakeQuantizeLearned, SumsAreTheFormulasInDouble) {
  at::manual_seed(2);
  for (const at::ScalarType type : kElementTypes) {
    for (const bool symmetric : {true, false}) {
      for (const Case& c : cases(symmetric)) {
        SCOPED_TRACE(concat(to_string(c.scheme), at::IntArrayRef(c.shape), type));
        const Tensor x = at::randn(c.shape).to(type), gradient = at::randn(c.shape).to(type);
        const double low = c.scheme.qmin(), high = c.scheme.qmax();
        // [outer, count, inner], with about a tenth clipped.
        const Tensor values = by_scale(x, c.scheme, c.axis).to(at::kDouble);
        const Tensor g = by_scale(gradient, c.scheme, c.axis).to(at::kDouble);
        const int64_t count = values.size(1);
        const Tensor scale = (at::rand({count}) + 1.0f) * (1.2f / static_cast<float>(high));
        OptionalTensor zero_point;
        if (!symmetric) zero_point = at::rand({count}) * 3.0f - 1.6f;
        const double factor = 0.37;
        const Gradients result = learned(x, scale, zero_point, c, gradient, factor);

        const Tensor s = scale.to(at::kDouble).unsqueeze(1);
        const Tensor z = zero_point
                             ? zero_point->round().clamp(low, high).to(at::kDouble).unsqueeze(1)
                             : at::zeros({count, 1}, at::kDouble);
        // As the contract: the code is that of the float32 quotient.
        const Tensor quotient =
            (values.to(at::kFloat) / scale.unsqueeze(1)).round().to(at::kDouble);
        const Tensor code = at::minimum(at::maximum(quotient, low - z), high - z);
        const Tensor passes = code == quotient;
        const Tensor term = at::where(passes, code - values / s, code);
        const Tensor expected = (g * term).sum(at::IntArrayRef({0, 2})) * factor;
        const Tensor bound =
            factor * (std::exp2(-15) * g.abs().sum(at::IntArrayRef({0, 2})) +
                      40 * std::exp2(-24) * (g * term).abs().sum(at::IntArrayRef({0, 2}))) +
            std::exp2(-24) * expected.abs();
        EXPECT_TRUE(((result.scale - expected).abs() <= bound).all().item<bool>());
        EXPECT_TRUE(same(at::where(passes, g, at::zeros_like(g)).to(type),
                         by_scale(result.input, c.scheme, c.axis)));
        if (!symmetric) {
          const Tensor clipped = at::where(passes, at::zeros_like(g), g);
          const Tensor expected_zero =
              -(clipped.sum(at::IntArrayRef({0, 2})) * scale.to(at::kDouble)) * factor;
          EXPECT_TRUE(at::allclose(result.zero_point.to(at::kDouble), expected_zero, 1e-6, 1e-12));
          // An integer zero point gives the same gradients and has none.
          const Gradients fixed = learned(x, scale, z.flatten().to(at::kInt), c, gradient, factor);
          EXPECT_TRUE(same(result.scale, fixed.scale));
          EXPECT_FALSE(fixed.zero_point.defined());
        }
        // The forward is fake_quantize's, and so is the input's gradient.
        const OptionalTensor integer =
            symmetric ? OptionalTensor() : OptionalTensor(z.flatten().to(at::kInt));
        EXPECT_TRUE(same(fake_quantize(x, scale, integer, c.scheme, c.axis),
                         fake_quantize_learned(x, scale, zero_point, c.scheme, c.axis)));
      }
    }
  }
}

TEST(FakeQuantizeLearned, FiniteDifferencesOfTheSmoothPart) {
  // The estimator takes rounding for x / s plus a constant. With that constant held, and with who
  // is clipped, the output is a smooth function of s and z.
  at::manual_seed(3);
  const Case c{{400}, asymmetric_scheme(4, kTensor)};
  const Tensor x = at::randn({400}) * 2.0f, gradient = at::randn({400});
  const float s = 0.31f, z = 1.0f;
  const Tensor values = x.to(at::kDouble), g = gradient.to(at::kDouble);
  const Tensor code = (x / s).round().to(at::kDouble);
  const Tensor rounding = code - values / s;
  const Tensor below = code<-9, above = code> 6;  // [-8, 7] less the zero point
  EXPECT_GT(below.sum().item<int64_t>(), 10);
  EXPECT_GT(above.sum().item<int64_t>(), 10);
  EXPECT_GT((~(below | above)).sum().item<int64_t>(), 100);
  const auto loss = [&](double scale, double zero) {
    Tensor smooth = values / scale + rounding;
    smooth = smooth.masked_fill(below, -8 - zero).masked_fill(above, 7 - zero);
    return (g * smooth * scale).sum().item<double>();
  };
  const double h = 1e-6, s0 = s;
  const Gradients result = learned(x, scalar(s), scalar(z), c, gradient);
  EXPECT_NEAR((loss(s0 + h, z) - loss(s0 - h, z)) / (2 * h), result.scale.item<double>(), 1e-3);
  EXPECT_NEAR((loss(s0, z + h) - loss(s0, z - h)) / (2 * h), result.zero_point.item<double>(),
              1e-3);
}

TEST(FakeQuantizeLearned, NonFiniteInputsCountAsClipped) {
  const Case c{{4}, symmetric_scheme(8)};
  const Tensor x = at::tensor({kNaN, kInf, -kInf, 0.25f});
  const Tensor gradient = at::tensor({1.0f, 10.0f, 100.0f, 1000.0f});
  const Gradients result = learned(x, scalar(1), {}, c, gradient);
  EXPECT_TRUE(same(at::tensor({0.0f, 0.0f, 0.0f, 1000.0f}), result.input));
  EXPECT_EQ(result.scale.item<float>(), -127.0f + 1270.0f - 12700.0f - 250.0f);
}

TEST(FakeQuantizeLearned, EmptyTensorsAndMeta) {
  const Case c{{0, 3}, asymmetric_scheme(8, kChannel), 1};
  const Gradients result =
      learned(at::empty({0, 3}), at::ones({3}), at::zeros({3}), c, at::empty({0, 3}));
  EXPECT_TRUE(same(at::zeros({3}), result.scale));
  EXPECT_TRUE(same(at::zeros({3}), result.zero_point));
  const Tensor meta = at::empty({2, 3}, at::TensorOptions(at::kMeta)).requires_grad_(true);
  const Tensor scale = at::empty({3}, at::TensorOptions(at::kMeta)).requires_grad_(true);
  fake_quantize_learned(meta, scale, {}, symmetric_scheme(8, kChannel), 1)
      .backward(at::empty({2, 3}, at::TensorOptions(at::kMeta)));
  EXPECT_EQ(scale.grad().sizes(), (std::vector<int64_t>{3}));
}

TEST(FakeQuantizeLearned, GradientScaleOfThePaper) {
  EXPECT_DOUBLE_EQ(learned_gradient_scale(100, symmetric_scheme(8)), 1 / std::sqrt(12700.0));
}

TEST(FakeQuantizeErrors, SayWhatIsWrong) {
  const Tensor x = at::randn({2, 3}), one = scalar(1);
  EXPECT_CONTAINS(message_of([&] { fake_quantize_dynamic(x, asymmetric_scheme(8)); }), "symmetric");
  EXPECT_CONTAINS(
      message_of([&] { fake_quantize_dynamic(x.to(at::kDouble), symmetric_scheme(8)); }),
      "must be float32");
  EXPECT_CONTAINS(message_of([&] { fake_quantize_dynamic(x, symmetric_scheme(8, kChannel), 2); }),
                  "axis 2");
  EXPECT_CONTAINS(message_of([&] { fake_quantize_dynamic(x, symmetric_scheme(8, kGroup, 2)); }),
                  "group_size 2");
  EXPECT_CONTAINS(
      message_of([&] { fake_quantize_learned(x, one, one.to(at::kHalf), asymmetric_scheme(8)); }),
      "float32 to be learned");
  EXPECT_CONTAINS(message_of([&] { fake_quantize_learned(x, one, one, symmetric_scheme(8)); }),
                  "takes no zero_point");
  EXPECT_CONTAINS(
      message_of([&] { fake_quantize_learned(x, at::ones({3}), {}, symmetric_scheme(8)); }),
      "scale has 3 elements");
}

}  // namespace
