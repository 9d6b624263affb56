// The numeric contract on the CPU: literals worked out by hand, and every operation against the
// scalar functions of scheme.h.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <vernier/kernels/dispatch.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/fake_quantize.h>
#include <vernier/kernels/int8_gemm.h>
#include <vernier/kernels/int8_gemm_device.h>
#include <vernier/kernels/parallel.h>
#include <vernier/kernels/quantize.h>
#include <vernier/kernels/statistics.h>
#include <vernier/tests/expect_error.h>

#include <atomic>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <limits>
#include <string>
#include <vector>

using namespace vernier;

namespace {

using at::Tensor;
using vernier::testing::message_of;
using OptionalTensor = std::optional<Tensor>;

constexpr at::ScalarType kElementTypes[] = {at::kFloat, at::kHalf, at::kBFloat16};
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kDenormal = std::numeric_limits<float>::denorm_min();
constexpr float kLargest = std::numeric_limits<float>::max();

constexpr Granularity kTensor = Granularity::per_tensor, kChannel = Granularity::per_channel,
                      kToken = Granularity::per_token, kGroup = Granularity::per_group;
const Scheme kInt8 = symmetric_scheme(8), kInt4 = symmetric_scheme(4), kInt2 = symmetric_scheme(2);
const Scheme kAsymmetric = asymmetric_scheme(8), kChannels = symmetric_scheme(8, kChannel);
const Scheme kWide = {.narrow_range = false};  // [-128, 127]

Tensor scalar(float value) { return at::full({1}, value, at::kFloat); }
Tensor zero_point_of(int64_t value) { return at::full({1}, value, at::kInt); }
Tensor random_codes(at::IntArrayRef sizes) { return at::randint(-128, 128, sizes, at::kChar); }

/// Normal values with the specials of every kind strewn in.
Tensor mixed(at::IntArrayRef sizes, at::ScalarType type = at::kFloat) {
  const Tensor x = at::randn(sizes, at::kFloat);
  const float specials[] = {kNaN, kInf, -kInf, 0.0f, -0.0f, 1e-40f, -kDenormal};
  for (int64_t i = 3, s = 0; i < x.numel(); i += 37, ++s) x.data_ptr<float>()[i] = specials[s % 7];
  return x.to(type);
}

/// Equal dtype, shape and bits: NaN equals NaN and -0.0 differs from 0.0.
::testing::AssertionResult same(const Tensor& expected, const Tensor& actual) {
  const auto bits = [](const Tensor& tensor) {
    const Tensor dense = tensor.detach().contiguous().flatten();
    if (!at::isFloatingType(dense.scalar_type())) return dense;
    return dense.view(dense.element_size() == 4 ? at::kInt : at::kShort);
  };
  auto failure = ::testing::AssertionFailure()
                 << concat("expected ", expected.scalar_type(), expected.sizes(), ", got ",
                           actual.scalar_type(), actual.sizes());
  if (expected.scalar_type() != actual.scalar_type() || expected.sizes() != actual.sizes())
    return failure;
  const Tensor differing = at::nonzero(bits(expected) != bits(actual)).flatten();
  if (differing.numel() == 0) return ::testing::AssertionSuccess();
  const int64_t i = differing[0].item<int64_t>();
  return failure << ", " << differing.numel() << " differ, first [" << i
                 << "]: " << expected.detach().flatten()[i].item<double>() << " and "
                 << actual.detach().flatten()[i].item<double>();
}

/// Else threads spin at their barriers, for seconds where others keep the cores busy.
[[maybe_unused]] const bool kOneThread = (at::set_num_threads(1), true);

// ---- Schemes and scales -------------------------------------------------------------------------

TEST(SchemeTest, CodeRangesAndNames) {
  EXPECT_EQ(to_string(kChannels), "int8 per_channel symmetric [-127, 127]");
  EXPECT_EQ(to_string(kWide), "int8 per_tensor symmetric [-128, 127]");
  EXPECT_EQ(to_string(kAsymmetric), "int8 per_tensor asymmetric [-128, 127]");
  EXPECT_EQ(to_string(kInt4), "int4 per_tensor symmetric [-8, 7]");
  EXPECT_EQ(to_string(Scheme{.bits = 4}), "int4 per_tensor symmetric [-7, 7]");
  EXPECT_EQ(to_string(asymmetric_scheme(4, kGroup, 32)), "int4 per_group 32 asymmetric [-8, 7]");
  for (const Granularity granularity : {kTensor, kChannel, kToken, kGroup})
    EXPECT_EQ(granularity_from_string(to_string(granularity)), granularity);
  EXPECT_CONTAINS(message_of([&] { granularity_from_string("per_row"); }), "per_row");
}

TEST(SchemeTest, CheckNamesWhatIsWrong) {
  EXPECT_CONTAINS(message_of([&] { Scheme{.bits = 1}.check(); }), "bits must be 2 to 8, not 1");
  EXPECT_CONTAINS(message_of([&] { Scheme{.bits = 9}.check(); }), "bits must be 2 to 8, not 9");
  EXPECT_CONTAINS(message_of([&] { Scheme{.group_size = 32}.check(); }), "group_size 32");
  EXPECT_CONTAINS(message_of([&] { Scheme{.granularity = kGroup}.check(); }), "group_size 0");
  EXPECT_CONTAINS(message_of([&] { Scheme{.symmetric = false, .dynamic = true}.check(); }),
                  "dynamic");
  EXPECT_CONTAINS(message_of([&] { asymmetric_scheme(8, kGroup, -1); }), "group_size -1");
  EXPECT_NO_THROW(Scheme{.dynamic = true}.check());
}

TEST(ScaleFromRange, Literals) {
  const std::tuple<Range, Scheme, float, int> cases[] = {
      {{-1, 2}, kInt8, 2.0f / 127, 0},
      {{-7, 3}, kInt4, 1, 0},
      {{0, 0}, kInt8, 1, 0},
      {{0, 0}, kAsymmetric, 1, 0},
      {{-kDenormal, kDenormal}, kInt8, 1, 0},  // 1e-45 / 127 is 0 in float32
      {{0, kDenormal}, kAsymmetric, 1, 0},
      {{0, 127 * kDenormal}, kInt8, kDenormal, 0},
      {{-1, 3}, kAsymmetric, 4.0f / 255, -64},  // -128 + round(63.75)
      {{0, 255}, kAsymmetric, 1, -128},
      {{-255, 0}, kAsymmetric, 1, 127},
      {{2, 10}, kAsymmetric, 10.0f / 255, -128},      // extended to hold 0
      {{-2.5f, 12.5f}, asymmetric_scheme(4), 1, -6},  // -8 + 2: half to even
      {{-kLargest, kLargest}, kAsymmetric, kLargest / 255 + kLargest / 255, 0},
      {{-kLargest, 0}, kAsymmetric, kLargest / 255, 127}};
  for (const auto& [range, scheme, expected_scale, expected_zero_point] : cases) {
    SCOPED_TRACE(concat("[", range.min, ", ", range.max, "] ", to_string(scheme)));
    const auto [scale, zero_point] = scale_from_range(range, scheme);
    EXPECT_EQ(scale, expected_scale);
    EXPECT_EQ(zero_point, expected_zero_point);
    // 0.0 has an exact code.
    const int32_t code = quantize_value(0, scale, zero_point, scheme.qmin(), scheme.qmax());
    EXPECT_EQ(dequantize_value(code, scale, zero_point), 0);
  }
  for (const Range range : {Range{kNaN, 1}, {0, kNaN}, {-kInf, 0}, {0, kInf}, {1, 0}}) {
    for (const Scheme& scheme : {kInt8, kAsymmetric})
      EXPECT_CONTAINS(message_of([&] { scale_from_range(range, scheme); }), "finite and ordered");
  }
}

// ---- Codes --------------------------------------------------------------------------------------

TEST(Quantize, HandWrittenCodes) {
  const std::tuple<Scheme, float, int, std::vector<float>, std::vector<int>> cases[] = {
      // Half to even at exact halves, and no half where the float is just beside one.
      {kInt8, 1, 0, {0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f}, {0, 2, 2, 0, -2, -2}},
      {kInt8, 1, 0, {0.49999997f, 0.50000006f, -0.50000006f}, {0, 1, -1}},
      {kInt8, 0.25f, 0, {0.125f, 0.375f, -0.625f, 31.625f}, {0, 2, -2, 126}},
      {kAsymmetric, 1, -3, {0.5f, 1.5f, -0.5f, -2.5f}, {-3, -1, -3, -5}},
      // Division, not multiplication by the reciprocal.
      {kInt8, 0x1.c58794p-5f, 0, {0x1.29a0fap-1f, -0x1.29a0fap-1f}, {10, -10}},
      // Clamping.
      {kInt8, 1, 0, {126.5f, 127.5f, 128, -127.5f, -1e30f}, {126, 127, 127, -127, -127}},
      {kWide, 1, 0, {-127.5f, -128.5f, -129, kLargest}, {-128, -128, -128, 127}},
      {kInt4, 1, 0, {6.5f, 7.5f, 8, -8.5f, -9}, {6, 7, 7, -8, -8}},
      {kInt2, 1, 0, {0.5f, 1.5f, -1.5f, -9}, {0, 1, -2, -2}},
      {kAsymmetric, 1, 100, {27, 28, -228, -229}, {127, 127, -128, -128}},
      {kAsymmetric, 1, -128, {0, -1, 255, 256}, {-128, -128, 127, 127}},
      // What is no number or has no bound.
      {kInt8, 1, 0, {kNaN, -kNaN, kInf, -kInf}, {-127, -127, 127, -127}},
      {kInt4, kLargest, 0, {kNaN, kLargest, kInf, -kInf}, {-8, 1, 7, -8}},
      // Denormal values and scales.
      {kInt8, 1, 0, {kDenormal, -kDenormal, 1e-40f, -0.0f}, {0, 0, 0, 0}},
      {kInt8, kDenormal, 0, {3 * kDenormal, -kDenormal, 1e-40f, 1}, {3, -1, 127, 127}},
      {kInt8, 4 * kDenormal, 0, {2 * kDenormal, 6 * kDenormal, -10 * kDenormal}, {0, 2, -2}}};
  for (const auto& [scheme, scale, zero_point, values, codes] : cases) {
    SCOPED_TRACE(concat(to_string(scheme), ", scale ", scale, ", zero point ", zero_point));
    const auto z = scheme.symmetric ? OptionalTensor() : zero_point_of(zero_point);
    EXPECT_TRUE(same(at::tensor(codes).to(at::kChar),
                     quantize(at::tensor(values), scalar(scale), z, scheme)));
  }
}

/// The scale (or zero point) of every element by the definition of the granularity.
Tensor spread(const Tensor& per_scale, const Tensor& x, const Scheme& scheme, int64_t axis) {
  if (scheme.granularity == kGroup)
    return per_scale.flatten().repeat_interleave(scheme.group_size).view(x.sizes());
  std::vector<int64_t> shape(x.dim(), 1);
  if (scheme.granularity == kChannel)
    shape.at(axis < 0 ? axis + x.dim() : axis) = per_scale.numel();
  if (scheme.granularity == kToken) std::copy_n(x.sizes().begin(), x.dim() - 1, shape.begin());
  return per_scale.reshape(shape).expand(x.sizes()).contiguous();
}

struct Expected {
  Tensor codes, values, passes;  // int8, float32, bool
};

/// What the scalar functions of the contract say, element by element.
Expected by_definition(const Tensor& x, const Tensor& scale, const OptionalTensor& zero_point,
                       const Scheme& scheme, int64_t axis) {
  const Tensor values = x.to(at::kFloat).contiguous(), scales = spread(scale, x, scheme, axis);
  const Tensor all_zero = at::zeros_like(scale, at::kInt);
  const Tensor zeros = spread(zero_point.value_or(all_zero), x, scheme, axis);
  Expected e{values.to(at::kChar), values.clone(), values.to(at::kBool)};
  for (int64_t i = 0; i < x.numel(); ++i) {
    const float value = values.const_data_ptr<float>()[i], s = scales.const_data_ptr<float>()[i];
    const int32_t z = zeros.const_data_ptr<int32_t>()[i];
    const int32_t code = quantize_value(value, s, z, scheme.qmin(), scheme.qmax());
    e.codes.data_ptr<int8_t>()[i] = static_cast<int8_t>(code);
    e.values.data_ptr<float>()[i] = dequantize_value(code, s, z);
    e.passes.data_ptr<bool>()[i] = passes_gradient(value, s, z, scheme.qmin(), scheme.qmax());
  }
  return e;
}

Tensor straight_through(const Tensor& x, const Tensor& scale, const OptionalTensor& zero_point,
                        const Scheme& scheme, int64_t axis, const Tensor& gradient) {
  const Tensor leaf = x.detach().requires_grad_(true);
  fake_quantize(leaf, scale, zero_point, scheme, axis).backward(gradient);
  return leaf.grad();
}

/// quantize, dequantize, fake_quantize and its gradient against the definition.
void expect_contract(const Tensor& x, const Tensor& scale, const OptionalTensor& z,
                     const Scheme& scheme, int64_t axis = 0) {
  SCOPED_TRACE(concat(to_string(scheme), ", axis ", axis, ", ", x.scalar_type(), x.sizes()));
  const Expected expected = by_definition(x, scale, z, scheme, axis);
  const Tensor codes = quantize(x, scale, z, scheme, axis);
  EXPECT_TRUE(same(expected.codes, codes));
  const Tensor values = dequantize(codes, scale, z, scheme, axis);
  EXPECT_FALSE(at::logical_and(values == 0, at::signbit(values)).any().item<bool>()) << "-0.0";
  for (const at::ScalarType type : kElementTypes)
    EXPECT_TRUE(same(expected.values.to(type), dequantize(codes, scale, z, scheme, axis, type)));
  EXPECT_TRUE(same(dequantize(codes, scale, z, scheme, axis, x.scalar_type()),
                   fake_quantize(x, scale, z, scheme, axis)));
  const Tensor gradient = at::randn(x.sizes()).to(x.scalar_type());
  EXPECT_TRUE(same(at::where(expected.passes, gradient, at::zeros_like(gradient)),
                   straight_through(x, scale, z, scheme, axis, gradient)));
}

/// expect_contract with `count` random scales, symmetric and asymmetric.
void expect_contract(const Tensor& x, Scheme scheme, int64_t count, int64_t axis = 0) {
  const Tensor scale = at::rand({count}) * 0.1f + 1e-3f;
  expect_contract(x, scale, {}, scheme, axis);
  scheme.symmetric = scheme.narrow_range = false;
  const Tensor z = at::randint(scheme.qmin(), scheme.qmax() + 1, {count}, at::kInt);
  expect_contract(x, scale, z, scheme, axis);
}

/// Every granularity, every axis from both ends, several group sizes.
void expect_contract_in_every_granularity(const Tensor& x) {
  expect_contract(x, kInt8, 1);
  for (int64_t axis = -x.dim(); axis < x.dim(); ++axis)
    expect_contract(x, kChannels, x.size(axis), axis);
  expect_contract(x, symmetric_scheme(8, kToken), rows_of(x));
  for (const int64_t group : {1, 3, 32}) {
    if (x.size(-1) % group == 0)
      expect_contract(x, symmetric_scheme(4, kGroup, group), x.numel() / group);
  }
}

TEST(Quantize, EveryGranularityAtOddSizes) {
  const std::vector<std::vector<int64_t>> shapes = {
      {1}, {19}, {1, 1}, {99, 111}, {7, 19, 5}, {1, 4, 64}, {3, 2049}, {2, 3, 1, 96}};
  for (const at::ScalarType type : kElementTypes) {
    for (const auto& shape : shapes) expect_contract_in_every_granularity(mixed(shape, type));
  }
  expect_contract(at::scalar_tensor(2.3f), scalar(0.5f), {}, kInt8);  // no axes
}

TEST(Quantize, StridedInputs) {
  for (const at::ScalarType type : kElementTypes) {
    const Tensor x = mixed({51, 99}, type);
    expect_contract_in_every_granularity(x.t());
    expect_contract_in_every_granularity(x.slice(0, 1, 40, 2).slice(1, 1, 91, 3));
    expect_contract_in_every_granularity(x.select(0, 1).expand({5, 99}));
    expect_contract_in_every_granularity(x.view({3, 17, 33, 3}).permute({2, 0, 3, 1}));
  }
  // Scales and zero points may be strided too.
  const Tensor scale = (at::rand({2, 19}) + 0.01f).t().select(1, 1);
  const Tensor z = at::arange(38, at::kInt).slice(0, 0, 38, 2);
  expect_contract(mixed({19, 5}), scale, z, asymmetric_scheme(8, kChannel));
}

TEST(Quantize, NegativeZeroComesBackPositive) {
  for (const at::ScalarType type : kElementTypes) {
    const Tensor x = at::tensor({-0.0f, -kDenormal, -1e-7f, -0.4f}).to(type).repeat({4, 8});
    EXPECT_TRUE(same(at::zeros_like(x), fake_quantize(x, scalar(1), {}, kInt8)));
    expect_contract_in_every_granularity(x);  // which says the same of every zero
  }
}

TEST(Quantize, EveryHalfAndBfloat16Pattern) {
  for (const at::ScalarType type : {at::kHalf, at::kBFloat16}) {
    const Tensor x = at::arange(-32768, 32768, at::kShort).view(type);
    for (const float scale : {1.0f, 0.0123f, kDenormal, 500.0f, 3e38f}) {
      expect_contract(x, scalar(scale), {}, kInt8);
      expect_contract(x, scalar(scale), {}, kInt4);
      expect_contract(x, scalar(scale), zero_point_of(-37), kAsymmetric);
    }
  }
}

TEST(Quantize, EmptyTensors) {
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{0}, {0, 5}, {5, 0}, {2, 0, 3}}) {
    const Tensor x = at::empty(shape), no_rows = at::ones(x.sizes().slice(0, x.dim() - 1));
    expect_contract(x, scalar(1), {}, kInt8);
    expect_contract(x, at::ones({x.size(0)}), {}, kChannels);
    EXPECT_TRUE(same(x.to(at::kChar), quantize_per_token(x, kInt8).first));
    EXPECT_TRUE(same(no_rows, quantize_per_token(x, kInt8).second));
    EXPECT_TRUE(same(no_rows, per_token_scale(x, kInt8)));
  }
}

TEST(StraightThrough, PassesWhereTheCodeIsNotClipped) {
  // 127.5 and -127.5 round to even, beyond the codes; 126.5 does not.
  const Tensor x =
      at::tensor({126.5f, 127.49f, 127.5f, -127.49f, -127.5f, -0.0f, kNaN, kInf, -kInf});
  const Tensor expected = at::tensor({3.0f, 3.0f, 0.0f, 3.0f, 0.0f, 3.0f, 0.0f, 0.0f, 0.0f});
  const Tensor scale = scalar(1).requires_grad_(true), gradient = scalar(3).expand({9});
  EXPECT_TRUE(same(expected, straight_through(x, scale, {}, kInt8, 0, gradient)));
  EXPECT_FALSE(scale.grad().defined());
}

TEST(StraightThrough, AgreesWithAMaskInDoublePrecision) {
  const Tensor x = at::randn({64, 301}), scale = at::rand({301}) * 0.02f;
  const Tensor z = at::randint(-8, 8, {301}, at::kInt), gradient = at::randn(x.sizes());
  for (const Scheme& scheme : {asymmetric_scheme(8, kChannel), asymmetric_scheme(4, kChannel)}) {
    const Tensor position = x.to(at::kDouble) / scale.to(at::kDouble) + z;
    const Tensor low = position - (scheme.qmin() - 0.5), high = (scheme.qmax() + 0.5) - position;
    const Tensor passes = at::logical_and(low > 0, high > 0);
    // Float division may round onto the edge what lies next to it.
    const Tensor clear = at::logical_and(low.abs() > 1e-3, high.abs() > 1e-3);
    EXPECT_GT(clear.to(at::kFloat).mean().item<float>(), 0.99);
    EXPECT_TRUE(passes.any().item<bool>() && !passes.all().item<bool>());
    const Tensor result = straight_through(x, scale, z, scheme, 1, gradient);
    EXPECT_TRUE(at::equal((gradient * passes).masked_select(clear), result.masked_select(clear)));

    // Through bfloat16: the mask of the rounded input, on the rounded gradient.
    const Tensor leaf = x.detach().requires_grad_(true), rounded = leaf.to(at::kBFloat16);
    fake_quantize(rounded, scale, z, scheme, 1).backward(gradient.to(at::kBFloat16));
    const Tensor mask = by_definition(rounded.detach(), scale, z, scheme, 1).passes;
    EXPECT_TRUE(at::equal(gradient.to(at::kBFloat16).to(at::kFloat) * mask, leaf.grad()));
  }
}

TEST(PerToken, RowsByHand) {
  const Tensor x = at::tensor({0.0f, -0.0f, 0.0f,            // zeros: scale 1
                               kNaN, kInf, -kInf,            // nothing finite: scale 1
                               kNaN, -254.0f, kInf,          // scale 2
                               1.0f, -127.0f, 2.5f,          // scale 1
                               kDenormal, -kDenormal, 0.0f,  // 1e-45 / 127 is 0: scale 1
                               63.5f, 0.25f, -0.75f});       // scale 0.5, ties to even
  const std::vector<int> codes = {0, 0,    0, -127, 127, -127, -127, -127, 127,
                                  1, -127, 2, 0,    0,   0,    127,  0,    -2};
  const auto [actual, scale] = quantize_per_token(x.view({3, 2, 3}), kInt8);
  EXPECT_TRUE(same(at::tensor(codes).to(at::kChar).view({3, 2, 3}), actual));
  EXPECT_TRUE(same(at::tensor({1.0f, 1.0f, 2.0f, 1.0f, 1.0f, 0.5f}).view({3, 2}), scale));
}

TEST(PerToken, IsQuantizeWithTheScaleOfEachRow) {
  for (const at::ScalarType type : kElementTypes) {
    const Tensor base = mixed({33, 1, 1031}, type);
    for (const Tensor& x : {base, base.transpose(0, 2), base.slice(2, 5, 900, 3), base[2][0]}) {
      for (Scheme scheme : {kInt8, kWide, kInt4}) {
        SCOPED_TRACE(concat(type, x.sizes(), to_string(scheme)));
        const Tensor wide = x.to(at::kFloat), finite = at::where(at::isfinite(wide), wide, 0.0f);
        const Tensor expected = finite.abs().amax(-1) / static_cast<float>(scheme.qmax());
        const auto [codes, scale] = quantize_per_token(x, scheme);
        EXPECT_TRUE(same(at::where(expected > 0, expected, 1.0f), scale));
        EXPECT_TRUE(same(scale, per_token_scale(x, scheme)));
        scheme.granularity = kToken;
        EXPECT_TRUE(same(quantize(x, scale, {}, scheme), codes));
      }
    }
  }
}

// ---- INT8 products ------------------------------------------------------------------------------
// The suite Int8Matmul runs again in processes without VNNI: see Int8MatmulElsewhere.

Tensor int8_matmul_reference(const Tensor& codes, const Tensor& weight) {
  return operator_handle<Tensor(const Tensor&, const Tensor&)>("vernier::int8_matmul_reference")
      .call(codes, weight);
}

void expect_exact_product(const Tensor& codes, const Tensor& weight) {
  SCOPED_TRACE(concat("codes ", codes.sizes(), ", weight ", weight.sizes()));
  const Tensor expected = at::mm(codes.to(at::kLong), weight.to(at::kLong).t()).to(at::kInt);
  EXPECT_TRUE(same(expected, int8_matmul(codes, weight)));
  EXPECT_TRUE(same(expected, int8_matmul_reference(codes, weight)));
}

TEST(Int8Matmul, EveryShape) {
  const int64_t sizes[] = {0, 1, 2, 3, 5, 16, 17, 64, 67};
  for (const int64_t m : sizes) {
    for (const int64_t n : sizes) {
      for (const int64_t k : {0, 1, 2, 3, 4, 15, 16, 33, 63, 111, 257})
        expect_exact_product(random_codes({m, k}), random_codes({n, k}));
    }
  }
  expect_exact_product(random_codes({129, 1025}), random_codes({513, 1025}));
}

TEST(Int8Matmul, ExtremeCodes) {
  for (const int a : {-128, -127, 127}) {
    for (const int b : {-128, -127, 127}) {
      for (const int64_t k : {1, 2, 31, 64, 1001, 40000})
        expect_exact_product(at::full({3, k}, a, at::kChar), at::full({5, k}, b, at::kChar));
    }
  }
  const Tensor longest = at::full({3, kMaxInt8GemmK}, 127, at::kChar);
  expect_exact_product(longest, longest);
  expect_exact_product(longest, -longest);
}

TEST(Int8Matmul, StridedOperands) {
  const Tensor codes = random_codes({65, 130}), weight = random_codes({33, 130});
  expect_exact_product(codes.slice(1, 1, 98), weight.slice(1, 3, 100));
  expect_exact_product(codes.slice(0, 0, 65, 2), weight.t().contiguous().t());
  expect_exact_product(codes.flatten().narrow(0, 1, 64 * 130).view({64, 130}), weight);
  expect_exact_product(codes.select(0, 1).expand({9, 130}), weight);
}

// Without VNNI the product of LibTorch 2.11 clips sums of pairs to 16 bits. Ours must not.
TEST(Int8MatmulElsewhere, IsExactOnOlderCpus) {
  const std::string program = std::filesystem::read_symlink("/proc/self/exe").string();
  for (const char* isa : {"AVX512_CORE", "AVX2", "SSE41"}) {
    SCOPED_TRACE(isa);
    const std::string command = concat("unset GTEST_OUTPUT; ONEDNN_MAX_CPU_ISA=", isa, " '",
                                       program, "' --gtest_filter='Int8Matmul.*' 2>&1");
    FILE* child = popen(command.c_str(), "r");
    ASSERT_NE(child, nullptr);
    std::string output;
    char buffer[4096];
    while (const size_t n = fread(buffer, 1, sizeof buffer, child)) output.append(buffer, n);
    EXPECT_EQ(pclose(child), 0) << output;
    EXPECT_NE(output.find("[  PASSED  ] 3 tests."), std::string::npos) << output;
  }
}

TEST(Int8Limits, LargestK) {
  EXPECT_EQ(max_int8_gemm_k(kInt8, kInt8), 131071);
  EXPECT_EQ(max_int8_gemm_k(kInt8, kWide), 131071);
  EXPECT_EQ(max_int8_gemm_k(kWide, kWide), 131071);
  EXPECT_EQ(max_int8_gemm_k(kAsymmetric, kInt8), 65793);
  EXPECT_EQ(max_int8_gemm_k(kInt4, kInt4), 131071);
  const Tensor longer = at::zeros({1, 131072}, at::kChar), one = scalar(1);
  EXPECT_CONTAINS(message_of([&] { int8_matmul(longer, longer); }), "K = 131072");
  EXPECT_CONTAINS(message_of([&] { int8_matmul_reference(longer, longer); }), "K = 131072");
  EXPECT_CONTAINS(message_of([&] { int8_linear(longer, longer, one, one, {}); }), "K = 131072");
  const Tensor wide = at::zeros({1, 65794}, at::kChar), z = zero_point_of(3);
  EXPECT_NO_THROW(int8_linear(wide, wide, one, one, {}));
  EXPECT_CONTAINS(message_of([&] { int8_linear(wide, wide, one, one, {}, z, z); }), "K = 65794");
  // The longest sum of the most extreme codes, which one more product would overflow.
  const Tensor low = at::full({1, 131071}, -128, at::kChar);
  EXPECT_EQ(int8_matmul(low, low).item<int64_t>(), int64_t{131071} * 128 * 128);
  EXPECT_EQ(int8_matmul_reference(low, low).item<int64_t>(), int64_t{131071} * 128 * 128);
}

/// Operands of one linear layer; each bit of a variant switches a feature on.
struct Layer {
  Tensor codes, weight, input_scale, weight_scale;
  OptionalTensor bias, zero_point, sum;

  Layer(int64_t m, int64_t n, int64_t k, int variant)
      : codes(random_codes({m, k})),
        weight(at::randint(-127, 128, {n, k}, at::kChar)),
        input_scale(at::rand({variant & 1 ? m : 1}) * 0.05f + 1e-4f),
        weight_scale(at::rand({variant & 2 ? n : 1}) * 0.01f + 1e-4f) {
    if (variant & 4) bias = at::randn({n});
    if (variant & 8) zero_point = zero_point_of(-37), sum = weight.sum(1, false, at::kInt);
  }

  Tensor run(at::ScalarType dtype = at::kFloat) const {
    return int8_linear(codes, weight, input_scale, weight_scale, bias, zero_point, sum, dtype);
  }

  /// The formula with everything in one type: in float32 it rounds as the epilogue must, in float64
  /// it is exact for the purpose. Integers below 2^53 are exact in between.
  Tensor formula(at::ScalarType type) const {
    const Tensor shifted = codes.to(at::kDouble) - (zero_point ? -37 : 0);
    const Tensor acc = at::mm(shifted, weight.to(at::kDouble).t()).to(type);
    return acc * weight_scale.to(type) * input_scale.to(type).unsqueeze(1) + term(type);
  }
  Tensor term(at::ScalarType type) const { return bias.value_or(scalar(0)).to(type); }
};

TEST(Int8Linear, RoundsInOrderAndStaysInItsBound) {
  constexpr int64_t kSizes[][3] = {{1, 1, 1}, {3, 19, 99}, {111, 1, 301}, {5, 2051, 7}};
  for (const auto& [m, n, k] : kSizes) {
    for (int variant = 0; variant < 16; ++variant) {
      SCOPED_TRACE(concat(m, "x", n, "x", k, ", variant ", variant));
      const Layer layer(m, n, k, variant);
      for (const at::ScalarType type : kElementTypes)
        EXPECT_TRUE(same(layer.formula(at::kFloat).to(type), layer.run(type)));
      const Tensor exact = layer.formula(at::kDouble), term = layer.term(at::kDouble);
      const Tensor bound = ((exact - term).abs() + term.abs()) * (kEpilogueRoundings * 0x1p-24);
      EXPECT_TRUE(((layer.run().to(at::kDouble) - exact).abs() <= bound).all().item<bool>());
    }
  }
  // Every other order of the operations differs here in the last bits.
  EXPECT_EQ(epilogue_value(47, 0.1f, 0.7f, 0.3f), 0x1.cb851cp+1f);
}

TEST(Int8Linear, EmptyOperands) {
  for (const auto& [m, n, k] : std::vector<std::array<int64_t, 3>>{{0, 4, 8}, {4, 0, 8}, {0, 0, 0}})
    EXPECT_TRUE(same(at::empty({m, n}, at::kHalf), Layer(m, n, k, 7).run(at::kHalf)));
  const Layer nothing_to_sum(3, 2, 0, 7);
  EXPECT_TRUE(same(nothing_to_sum.bias->expand({3, 2}), nothing_to_sum.run()));
}

// ---- Threads, tracing, bad input ----------------------------------------------------------------

/// The results of every operation; `on` moves each input to where it should run.
std::vector<Tensor> every_operation(const std::function<Tensor(const Tensor&)>& on) {
  at::manual_seed(7);
  const Tensor x = on(mixed({301, 999})), row = on(at::rand({301}) + 0.1f), one = on(scalar(0.1f));
  const Tensor column = on(at::rand({999}) + 0.1f), half = x.to(at::kHalf), gradient = on(half);
  const Tensor weight = on(random_codes({259, 999})), sum = on(at::ones({259}, at::kInt));
  const auto [codes, scale] = quantize_per_token(x, kInt8);
  const HistogramTensors h = vernier::histogram(x, 1024);
  return {codes,
          scale,
          per_token_scale(half, kInt4),
          quantize(x, one, {}, kInt8),
          quantize(half, row, {}, kChannels, 0),
          dequantize(codes, column, {}, kChannels, 1, at::kBFloat16),
          fake_quantize(x.t(), column, {}, kChannels, 0),
          straight_through(half, row, {}, kChannels, 0, gradient),
          h.counts,
          h.range,
          h.tallies,
          channel_range(half.view({11137, 27})),
          int8_matmul(codes, weight),
          int8_matmul_reference(codes, weight),
          int8_linear(codes, weight, row, one, {}, on(zero_point_of(5)), sum, at::kHalf)};
}

TEST(Threads, FollowLibTorchAndChangeNoResult) {
  const auto here = [](const Tensor& tensor) { return tensor; };
  const std::vector<Tensor> expected = every_operation(here);
  for (const int threads : {2, 5}) {
    at::set_num_threads(threads);
    std::atomic<int> single = 0;
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) { single += end - begin == 1; });
    EXPECT_EQ(single, threads);
    const std::vector<Tensor> actual = every_operation(here);
    for (size_t i = 0; i < expected.size(); ++i)
      EXPECT_TRUE(same(expected[i], actual[i])) << "result " << i << ", " << threads << " threads";
  }
  at::set_num_threads(1);
}

TEST(Meta, HasShapesAndDtypesWithoutData) {
  const auto expected = every_operation([](const Tensor& tensor) { return tensor; });
  const auto actual = every_operation([](const Tensor& tensor) { return tensor.to(at::kMeta); });
  for (size_t i = 0; i < expected.size(); ++i) {
    const at::TensorOptions meta = expected[i].options().device(at::kMeta);
    EXPECT_EQ(actual[i].sizes(), expected[i].sizes()) << "result " << i;
    EXPECT_EQ(actual[i].toString(), at::empty({0}, meta).toString()) << "result " << i;
  }
}

TEST(BadInput, ThrowsErrorThatNamesIt) {
  const Scheme groups = symmetric_scheme(8, kGroup, 4);
  const Tensor x = at::randn({3, 10}), s = scalar(0.1f), two = at::ones({2}), z = zero_point_of(1);
  const Tensor codes = random_codes({4, 8}), weight = random_codes({6, 8});
  const Tensor integers = x.to(at::kInt), doubles = x.to(at::kDouble), sd = s.to(at::kDouble);
  const auto linear = [&](const Tensor& input_scale, const Tensor& weight_scale,
                          const OptionalTensor& bias = {}, const OptionalTensor& zero = {},
                          const OptionalTensor& sums = {}, at::ScalarType type = at::kFloat) {
    int8_linear(codes, weight, input_scale, weight_scale, bias, zero, sums, type);
  };
  const std::pair<std::function<void()>, const char*> cases[] = {
      {[&] { quantize(doubles, s, {}, kInt8); }, "input must be float32"},
      {[&] { quantize(x, sd, {}, kInt8); }, "scale must be Float"},
      {[&] { quantize(x, two, {}, kInt8); }, "scale has 2 elements but per_tensor needs 1"},
      {[&] { quantize(x, two, {}, kChannels, 1); }, "per_channel needs 10"},
      {[&] { quantize(x, two, {}, kChannels, -3); }, "axis -3"},
      {[&] { quantize(x[0][0], s, {}, kChannels); }, "axis 0"},
      {[&] { quantize(x, two, {}, groups); }, "group_size 4 does not divide"},
      {[&] { quantize(x, s, z, kInt8); }, "takes no zero_point"},
      {[&] { quantize(x, s, {}, kAsymmetric); }, "needs a zero_point"},
      {[&] { quantize(x, s, two, kAsymmetric); }, "zero_point must be Int"},
      {[&] { quantize(x, s, two.to(at::kInt), kAsymmetric); }, "zero_point has 2"},
      {[&] { dequantize(x, s, {}, kInt8); }, "codes must be Char"},
      {[&] { dequantize(codes, s, {}, kInt8, 0, at::kDouble); }, "dtype must be float32"},
      {[&] { per_token_scale(integers, kInt8); }, "input must be float32"},
      {[&] { vernier::histogram(doubles); }, "input must be float32"},
      {[&] { vernier::histogram(x, 1000); }, "bins must be a power of two"},
      {[&] { channel_range(integers); }, "input must be float32"},
      {[&] { int8_matmul(integers, weight); }, "codes must be Char"},
      {[&] { int8_matmul(codes, weight.to(at::kByte)); }, "weight must be Char"},
      {[&] { int8_matmul(codes, weight.t()); }, "[4, 8] and [8, 6]"},
      {[&] { int8_matmul(codes[0], weight); }, "[8] and [6, 8]"},
      {[&] { linear(two, s); }, "input_scale has 2 elements"},
      {[&] { linear(s, two); }, "weight_scale has 2 elements"},
      {[&] { linear(s, sd); }, "weight_scale must be Float"},
      {[&] { linear(s, s, two); }, "bias has 2 elements"},
      {[&] { linear(s, s, {}, z); }, "go together"},
      {[&] { linear(s, s, {}, s, z); }, "input_zero_point must be Int"},
      {[&] { linear(s, s, {}, z, z); }, "weight_sum 6, not 1 and 1"},
      {[&] { linear(s, s, {}, {}, {}, at::kDouble); }, "dtype must be float32"},
      {[&] { check_tensor(s.to(at::kMeta), "scale", at::kFloat, x); }, "scale is on meta but"}};
  for (const auto& [call, part] : cases) EXPECT_CONTAINS(message_of(call), part);
}

}  // namespace
