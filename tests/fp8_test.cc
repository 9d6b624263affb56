// FP8 on the CPU: the conversions against LibTorch's where the two agree by specification, the
// operations against the division and the conversion written out, the linear layer against float64.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/fp8.h>
#include <vernier/kernels/fp8_format.h>
#include <vernier/tests/expect_error.h>

#include <cmath>
#include <limits>
#include <vector>

namespace vernier {
namespace {

using at::Tensor;
using vernier::testing::message_of;

constexpr NumberFormat kE4M3 = NumberFormat::e4m3, kE5M2 = NumberFormat::e5m2;
constexpr NumberFormat kFormats[] = {kE4M3, kE5M2};
constexpr at::ScalarType kElementTypes[] = {at::kFloat, at::kHalf, at::kBFloat16};
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

Tensor scalar(float value) { return at::full({1}, value, at::kFloat); }

Tensor random_bits(int64_t n) {
  return at::randint(-(int64_t{1} << 31), int64_t{1} << 31, {n}, at::kInt).view(at::kFloat);
}

Tensor all_patterns(at::ScalarType type) {
  return at::arange(-32768, 32768, at::kShort).view(type);
}

Tensor bytes(const Tensor& codes) { return codes.contiguous().view(at::kByte); }

/// LibTorch's conversion of float32 made saturating: it rounds alike, but lets what is too large
/// become NaN or infinite, and keeps the sign of NaN.
Tensor saturated_conversion(const Tensor& x, NumberFormat format) {
  const float largest = format == kE4M3 ? 448.0f : 57344.0f;
  const Tensor codes = bytes(x.to(at::kFloat).clamp(-largest, largest).to(fp8_dtype(format)));
  return at::where(x.isnan(), at::full_like(codes, 0x7f), codes);
}

::testing::AssertionResult same(const Tensor& expected, const Tensor& actual) {
  if (expected.sizes() != actual.sizes() || expected.scalar_type() != actual.scalar_type())
    return ::testing::AssertionFailure() << "shape or dtype";
  const Tensor a = expected.flatten(), b = actual.flatten();
  const Tensor both_nan = at::isFloatingType(a.scalar_type()) ? a.isnan().logical_and(b.isnan())
                                                              : at::zeros_like(a, at::kBool);
  const Tensor differing = at::nonzero(a.ne(b).logical_and(both_nan.logical_not())).flatten();
  if (differing.numel() == 0) return ::testing::AssertionSuccess();
  const int64_t i = differing[0].item<int64_t>();
  return ::testing::AssertionFailure()
         << differing.numel() << " differ, first [" << i << "]: " << a[i].item<double>() << " and "
         << b[i].item<double>();
}

TEST(Fp8Format, EveryCodeHasLibTorchsValue) {
  const Tensor codes = at::arange(256, at::kInt).to(at::kByte);
  for (const NumberFormat format : kFormats) {
    const Tensor values = codes.view(fp8_dtype(format)).to(at::kFloat);
    with_fp8_format(format, [&](auto constant) {
      for (int code = 0; code < 256; ++code) {
        const float value = Fp8<constant.value>::to_float(static_cast<uint8_t>(code));
        const float expected = values[code].template item<float>();
        EXPECT_TRUE(value == expected || (std::isnan(value) && std::isnan(expected))) << code;
        EXPECT_EQ(std::signbit(value), std::signbit(expected)) << code;
        // A code's value has that code.
        if (std::isfinite(value)) {
          EXPECT_EQ(Fp8<constant.value>::from_float(value), code) << value;
        }
      }
    });
  }
}

TEST(Fp8Format, HandWrittenCodes) {
  using E4M3 = Fp8<kE4M3>;
  using E5M2 = Fp8<kE5M2>;
  const std::tuple<float, int, int> cases[] = {
      {0.0f, 0x00, 0x00},
      {-0.0f, 0x80, 0x80},
      {1.0f, 0x38, 0x3c},
      {-1.0f, 0xb8, 0xbc},
      {1.0625f, 0x38, 0x3c},     // the middle of 1 and 1.125: to even
      {1.1875f, 0x3a, 0x3d},     // the middle of 1.125 and 1.25: to even
      {1.0625001f, 0x39, 0x3c},  // just beyond it
      {448.0f, 0x7e, 0x5f},
      {464.0f, 0x7e, 0x5f},
      {465.0f, 0x7e, 0x5f},
      {1e9f, 0x7e, 0x7b},
      {57344.0f, 0x7e, 0x7b},
      {-61440.0f, 0xfe, 0xfb},
      {kInf, 0x7e, 0x7b},
      {-kInf, 0xfe, 0xfb},
      {kNaN, 0x7f, 0x7f},
      {-kNaN, 0x7f, 0x7f},
      {0x1p-9f, 0x01, 0x18},    // the smallest subnormal of E4M3
      {0x1p-10f, 0x00, 0x14},   // half of it: to even
      {0x1.8p-9f, 0x02, 0x1a},  // one and a half of it: to even
      {0x1.000002p-10f, 0x01, 0x14},
      {0x1p-16f, 0x00, 0x01},  // the smallest subnormal of E5M2
      {0x1p-17f, 0x00, 0x00},
      {0x1.000002p-17f, 0x00, 0x01},
      {0x1.ep-7f, 0x08, 0x24},  // 7.5 subnormal steps become the smallest normal number
      {1e-45f, 0x00, 0x00},
      {-1e-45f, 0x80, 0x80}};
  for (const auto& [x, e4m3, e5m2] : cases) {
    EXPECT_EQ(E4M3::from_float(x), e4m3) << x;
    EXPECT_EQ(E5M2::from_float(x), e5m2) << x;
  }
  EXPECT_TRUE(E4M3::passes_gradient(464.0f));
  EXPECT_FALSE(E4M3::passes_gradient(std::nextafter(464.0f, kInf)));
  EXPECT_FALSE(E5M2::passes_gradient(-61440.0f));
  EXPECT_TRUE(E5M2::passes_gradient(std::nextafter(-61440.0f, 0.0f)));
  EXPECT_FALSE(E4M3::passes_gradient(kNaN));
  EXPECT_FALSE(E5M2::passes_gradient(kInf));
}

TEST(QuantizeFp8, EveryHalfAndManyFloats) {
  at::manual_seed(1);
  for (const NumberFormat format : kFormats) {
    const Scheme scheme = fp8_scheme(format);
    for (const Tensor& x :
         {all_patterns(at::kHalf), all_patterns(at::kBFloat16), random_bits(1 << 20)}) {
      SCOPED_TRACE(concat(to_string(scheme), " ", c10::toString(x.scalar_type())));
      const Tensor codes = quantize_fp8(x, scalar(1), scheme);
      EXPECT_EQ(codes.scalar_type(), fp8_dtype(format));
      EXPECT_TRUE(same(saturated_conversion(x, format), bytes(codes)));
    }
  }
}

TEST(QuantizeFp8, GranularitiesAgainstTheDivision) {
  at::manual_seed(2);
  using enum Granularity;
  const std::tuple<Granularity, int64_t, int64_t, std::vector<int64_t>> cases[] = {
      {per_tensor, 0, 0, {1, 1, 1, 1}},  {per_channel, 0, 0, {3, 1, 1, 1}},
      {per_channel, 1, 0, {1, 5, 1, 1}}, {per_channel, -1, 0, {1, 1, 8, 1}},
      {per_token, 0, 0, {3, 5, 1, 1}},   {per_group, 0, 4, {3, 5, 2, 1}}};
  for (const NumberFormat format : kFormats) {
    for (const at::ScalarType type : kElementTypes) {
      for (const auto& [granularity, axis, group, shape] : cases) {
        const Scheme scheme = fp8_scheme(format, granularity, group);
        SCOPED_TRACE(concat(to_string(scheme), ", axis ", axis));
        const Tensor x = (at::randn({3, 5, 8}) * 100).to(type);
        const Tensor scale = at::rand(shape) + 0.1;
        // [3, 5, 2, 4] where groups of four share a scale, [3, 5, 8, 1] elsewhere.
        const Tensor spread = x.to(at::kFloat).view({3, 5, group ? 2 : 8, -1});
        const Tensor expected = saturated_conversion(spread.div(scale), format);
        const Tensor codes = quantize_fp8(x, scale.flatten(), scheme, axis);
        EXPECT_TRUE(same(expected.view(x.sizes()), bytes(codes)));
        for (const at::ScalarType out : kElementTypes) {
          const Tensor values =
              codes.to(at::kFloat).view(spread.sizes()).mul(scale).view(x.sizes()).to(out);
          EXPECT_TRUE(same(values, dequantize_fp8(codes, scale.flatten(), scheme, axis, out)));
          if (out == type) {
            EXPECT_TRUE(same(values, fake_quantize_fp8(x, scale.flatten(), scheme, axis)));
          }
        }
      }
    }
  }
}

TEST(QuantizeFp8, StridedAndEmpty) {
  at::manual_seed(3);
  const Scheme scheme = fp8_scheme(kE4M3, Granularity::per_channel);
  const Tensor x = at::randn({7, 6}).t(), scale = at::rand({6}) + 0.1;
  EXPECT_TRUE(same(bytes(quantize_fp8(x.contiguous(), scale, scheme)),
                   bytes(quantize_fp8(x, scale, scheme))));
  EXPECT_EQ(quantize_fp8(at::empty({6, 0}), scale, scheme).numel(), 0);
  EXPECT_EQ(quantize_fp8_per_token(at::empty({0, 4}), kE4M3).second.numel(), 0);
}

TEST(FakeQuantizeFp8, GradientPassesWhereNothingIsClipped) {
  for (const NumberFormat format : kFormats) {
    const bool e4m3 = format == kE4M3;
    const Scheme scheme = fp8_scheme(format);
    const float scale = 0.5f;
    const std::vector<float> quotients = {0,     1,     -3.3f,  464,  -464,  465, 57344,
                                          61439, 61440, -61440, kInf, -kInf, kNaN};
    const std::vector<float> mask = e4m3
                                        ? std::vector<float>{1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0}
                                        : std::vector<float>{1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0};
    Tensor x = at::tensor(quotients).mul(scale).requires_grad_(true);
    const Tensor gradient = at::arange(1, 14, at::kFloat);
    fake_quantize_fp8(x, scalar(scale), scheme).backward(gradient);
    EXPECT_TRUE(same(gradient * at::tensor(mask), x.grad())) << to_string(format);
  }
}

TEST(QuantizeFp8PerToken, ScaleIsTheRowsLargestOverTheFormats) {
  at::manual_seed(4);
  for (const NumberFormat format : kFormats) {
    for (const at::ScalarType type : kElementTypes) {
      Tensor x = at::randn({2, 3, 130}).to(type);
      x[0][1].zero_();
      x[1][0][7] = kNaN;
      x[1][1][3] = -kInf;
      const Tensor finite = at::where(x.isfinite(), x, at::zeros_like(x)).to(at::kFloat);
      const float largest = format == kE4M3 ? 448 : 57344;
      Tensor expected = finite.abs().amax(-1) / largest;
      expected = at::where(expected > 0, expected, at::ones_like(expected));
      const auto [codes, scale] = quantize_fp8_per_token(x, format);
      EXPECT_TRUE(same(expected, scale));
      EXPECT_TRUE(same(scale, per_token_scale_fp8(x, format)));
      EXPECT_TRUE(same(bytes(quantize_fp8(x, scale, fp8_scheme(format, Granularity::per_token))),
                       bytes(codes)));
      // The largest of a row has the largest code.
      EXPECT_EQ(codes.to(at::kFloat).nan_to_num().abs().amax(-1)[0][0].item<float>(), largest);
    }
  }
}

/// The bound of fp8.h for products summed in float32, rounding of the output included.
void expect_within_float_bound(const Tensor& codes, const Tensor& weight, const Tensor& x_scale,
                               const Tensor& w_scale, const std::optional<Tensor>& bias,
                               at::ScalarType dtype) {
  const Tensor x = codes.to(at::kDouble).mul(x_scale.to(at::kDouble).view({-1, 1}));
  const Tensor w = weight.to(at::kDouble).mul(w_scale.to(at::kDouble).view({-1, 1}));
  Tensor exact = x.mm(w.t()), magnitude = x.abs().mm(w.abs().t());
  if (bias) {
    const Tensor rounded = bias->to(dtype).to(at::kDouble);
    exact += rounded;
    magnitude += rounded.abs();
  }
  const double output_unit = dtype == at::kFloat ? 0x1p-24 : dtype == at::kHalf ? 0x1p-11 : 0x1p-8;
  const Tensor bound = magnitude * (static_cast<double>(codes.size(1) + 8) * 0x1p-24) +
                       exact.abs() * output_unit * 1.01 + 0x1p-25;  // subnormal halves
  const Tensor y = fp8_linear(codes, weight, x_scale, w_scale, bias, dtype);
  EXPECT_EQ(y.scalar_type(), dtype);
  ASSERT_EQ(y.sizes(), exact.sizes());
  EXPECT_TRUE((y.to(at::kDouble) - exact).abs().le(bound).all().item<bool>());
}

TEST(Fp8Linear, WithinTheBoundOfFloat64) {
  at::manual_seed(5);
  for (const auto& [m, n, k] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{
           {1, 1, 1}, {3, 5, 7}, {17, 33, 130}, {16, 32, 64}}) {
    for (const NumberFormat x_format : kFormats) {
      for (const NumberFormat w_format : kFormats) {
        const Tensor codes = at::randn({m, k}).to(fp8_dtype(x_format));
        const Tensor weight = at::randn({n, k}).to(fp8_dtype(w_format));
        for (const at::ScalarType dtype : kElementTypes) {
          SCOPED_TRACE(concat(m, " ", n, " ", k, " ", c10::toString(dtype)));
          const Tensor rows = at::rand({m}) + 0.1, columns = at::rand({n}) + 0.1;
          const Tensor bias = at::randn({n});
          expect_within_float_bound(codes, weight, scalar(0.3f), scalar(0.7f), std::nullopt, dtype);
          expect_within_float_bound(codes, weight, rows, columns, bias, dtype);
          expect_within_float_bound(codes, weight, scalar(0.3f), columns, bias.to(dtype), dtype);
          expect_within_float_bound(codes, weight, rows, scalar(0.7f), bias, dtype);
        }
      }
    }
  }
}

TEST(Fp8Linear, EmptySizes) {
  const auto codes = [](int64_t rows, int64_t k) {
    return at::zeros({rows, k}).to(at::kFloat8_e4m3fn);
  };
  EXPECT_EQ(fp8_linear(codes(0, 4), codes(3, 4), scalar(1), scalar(1)).sizes(),
            (at::IntArrayRef{0, 3}));
  EXPECT_EQ(fp8_linear(codes(2, 4), codes(0, 4), scalar(1), scalar(1)).sizes(),
            (at::IntArrayRef{2, 0}));
  const Tensor bias = at::randn({3});
  EXPECT_TRUE(
      same(bias.expand({2, 3}), fp8_linear(codes(2, 0), codes(3, 0), scalar(1), scalar(1), bias)));
}

TEST(Fp8Errors, NameWhatIsWrong) {
  const Scheme scheme = fp8_scheme(kE4M3);
  const Tensor x = at::randn({4, 8}), one = scalar(1);
  const Tensor codes = quantize_fp8(x, one, scheme);
  EXPECT_CONTAINS(message_of([&] { quantize_fp8(x, one, symmetric_scheme(8)); }), "e4m3 or e5m2");
  EXPECT_CONTAINS(message_of([&] { quantize_fp8(x.to(at::kDouble), one, scheme); }), "float32");
  EXPECT_CONTAINS(message_of([&] { quantize_fp8(x, at::ones({3}), scheme); }), "scale has 3");
  EXPECT_CONTAINS(message_of([&] { quantize_fp8(x, one.to(at::kDouble), scheme); }), "scale must");
  EXPECT_CONTAINS(
      message_of([&] { quantize_fp8(x, one, fp8_scheme(kE4M3, Granularity::per_channel), 2); }),
      "axis 2");
  EXPECT_CONTAINS(
      message_of([&] { quantize_fp8(x, one, fp8_scheme(kE4M3, Granularity::per_group, 3)); }),
      "group_size 3");
  EXPECT_CONTAINS(message_of([&] { dequantize_fp8(x, one, scheme); }), "codes are");
  EXPECT_CONTAINS(message_of([&] { dequantize_fp8(codes, one, fp8_scheme(kE5M2)); }), "e5m2");
  EXPECT_CONTAINS(message_of([&] { fp8_linear(x, codes, one, one); }), "codes must be float8");
  EXPECT_CONTAINS(message_of([&] { fp8_linear(codes, x, one, one); }), "weight must be float8");
  EXPECT_CONTAINS(message_of([&] { fp8_linear(codes, codes.t(), one, one); }), "[N, K]");
  EXPECT_CONTAINS(message_of([&] { fp8_linear(codes, codes, at::ones({3}), one); }),
                  "input_scale has 3");
  EXPECT_CONTAINS(message_of([&] { fp8_linear(codes, codes, one, at::ones({3})); }),
                  "weight_scale has 3");
  EXPECT_CONTAINS(message_of([&] { fp8_linear(codes, codes, one, one, at::ones({3})); }),
                  "bias has 3");
  EXPECT_CONTAINS(message_of([&] { fp8_linear(codes, codes, one, one, {}, at::kDouble); }),
                  "dtype must be");
}

TEST(Fp8Meta, ShapesWithoutData) {
  const Tensor x = at::empty({4, 8}, at::kMeta), one = at::empty({1}, at::kMeta);
  const Tensor codes = quantize_fp8(x, one, fp8_scheme(kE5M2));
  EXPECT_EQ(codes.scalar_type(), at::kFloat8_e5m2);
  EXPECT_EQ(codes.sizes(), x.sizes());
  EXPECT_EQ(dequantize_fp8(codes, one, fp8_scheme(kE5M2), 0, at::kHalf).scalar_type(), at::kHalf);
  EXPECT_EQ(quantize_fp8_per_token(x, kE4M3).second.sizes(), (at::IntArrayRef{4}));
  EXPECT_EQ(fp8_linear(codes, codes, one, one).sizes(), (at::IntArrayRef{4, 4}));
}

TEST(Fp8Scheme, NamesRangesAndChecks) {
  const Scheme token = fp8_scheme(kE4M3, Granularity::per_token);
  EXPECT_EQ(to_string(token), "e4m3 per_token symmetric [-448, 448]");
  EXPECT_EQ(to_string(fp8_scheme(kE5M2)), "e5m2 per_tensor symmetric [-57344, 57344]");
  EXPECT_EQ(scale_from_range({-3, 7}, fp8_scheme(kE4M3)).scale, 7.0f / 448);
  EXPECT_EQ(scale_from_range({0, 0}, fp8_scheme(kE5M2)).scale, 1.0f);
  for (const NumberFormat format : {NumberFormat::integer, kE4M3, kE5M2})
    EXPECT_EQ(number_format_from_string(to_string(format)), format);
  EXPECT_CONTAINS(message_of([] { number_format_from_string("fp8"); }), "int, e4m3 or e5m2");
  EXPECT_CONTAINS(message_of([] { fp8_scheme(NumberFormat::integer); }), "not int");
  EXPECT_CONTAINS(message_of([] { Scheme{.format = kE4M3, .bits = 4}.check(); }), "8 bits");
  EXPECT_CONTAINS(message_of([] { Scheme{.format = kE4M3, .symmetric = false}.check(); }),
                  "symmetric");
}

}  // namespace
}  // namespace vernier
