// FP8 on the GPU: codes, scales and gradients equal to the CPU's bit for bit, the linear layer
// within its bound of float64.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/fp8.h>
#include <vernier/kernels/fp8_format.h>

#include <cmath>
#include <functional>
#include <limits>
#include <vector>

namespace vernier {
namespace {

using at::Tensor;
using View = std::function<Tensor(const Tensor&)>;

constexpr NumberFormat kE4M3 = NumberFormat::e4m3, kE5M2 = NumberFormat::e5m2;
constexpr NumberFormat kFormats[] = {kE4M3, kE5M2};
constexpr at::ScalarType kElementTypes[] = {at::kFloat, at::kHalf, at::kBFloat16};
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

class Fp8GpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA()) GTEST_SKIP() << "no GPU found";
    at::manual_seed(20260402);
  }
};

Tensor gpu(const Tensor& tensor) { return tensor.to(at::kCUDA); }
Tensor scalar(float value) { return at::full({1}, value, at::kFloat); }

Tensor random_bits(int64_t n) {
  return at::randint(-(int64_t{1} << 31), int64_t{1} << 31, {n}, at::kInt).view(at::kFloat);
}

Tensor all_patterns(at::ScalarType type) {
  return at::arange(-32768, 32768, at::kShort).view(type);
}

Tensor mixed(at::IntArrayRef sizes, at::ScalarType type) {
  const Tensor x = at::randn(sizes, at::kFloat) * 50;
  const float specials[] = {kNaN, kInf, -kInf, 0.0f, -0.0f, 1e-40f};
  for (int64_t i = 3, s = 0; i < x.numel(); i += 37, ++s) x.data_ptr<float>()[i] = specials[s % 6];
  return x.to(type);
}

/// Bits, so that -0.0 differs from 0.0; every NaN is the same one.
Tensor bits(const Tensor& tensor) {
  const Tensor dense = tensor.detach().cpu().contiguous();
  if (dense.element_size() == 1) return dense.view(at::kByte);
  if (!at::isFloatingType(dense.scalar_type())) return dense;
  const Tensor words = dense.view(dense.element_size() == 4 ? at::kInt : at::kShort);
  return at::where(dense.isnan(), at::full_like(words, -1), words);
}

::testing::AssertionResult same(const Tensor& cpu, const Tensor& from_gpu) {
  if (!from_gpu.is_cuda()) return ::testing::AssertionFailure() << "the result is not on the GPU";
  if (cpu.scalar_type() != from_gpu.scalar_type() || cpu.sizes() != from_gpu.sizes())
    return ::testing::AssertionFailure() << "dtype or shape";
  const Tensor a = bits(cpu).flatten(), b = bits(from_gpu).flatten();
  if (at::equal(a, b)) return ::testing::AssertionSuccess();
  const Tensor differing = at::nonzero(a != b);
  const int64_t i = differing[0].item<int64_t>();
  return ::testing::AssertionFailure()
         << differing.size(0) << " of " << a.numel() << " differ, first [" << i << "]: CPU bits "
         << a[i].item<int64_t>() << ", GPU bits " << b[i].item<int64_t>();
}

Tensor straight_through(const Tensor& x, const Tensor& scale, const Scheme& scheme, int64_t axis,
                        const Tensor& gradient) {
  Tensor leaf = x.detach().requires_grad_(true);
  fake_quantize_fp8(leaf, scale, scheme, axis).backward(gradient);
  return leaf.grad();
}

/// Every operation on view(base), by one scheme.
void expect_same(
    const Tensor& base, const Tensor& scale, const Scheme& scheme, int64_t axis = 0,
    const View& view = [](const Tensor& t) { return t; }) {
  SCOPED_TRACE(concat(to_string(scheme), ", axis ", axis, ", ", c10::toString(base.scalar_type()),
                      base.sizes(), ", first scale ",
                      scale.numel() ? scale.flatten()[0].item<float>() : 0.0f));
  const Tensor x = view(base), x_gpu = view(gpu(base)), s = gpu(scale);
  const Tensor codes = quantize_fp8(x, scale, scheme, axis);
  const Tensor codes_gpu = quantize_fp8(x_gpu, s, scheme, axis);
  EXPECT_TRUE(same(codes, codes_gpu)) << "quantize_fp8";
  EXPECT_TRUE(
      same(fake_quantize_fp8(x, scale, scheme, axis), fake_quantize_fp8(x_gpu, s, scheme, axis)))
      << "fake_quantize_fp8";
  for (const at::ScalarType type : kElementTypes)
    EXPECT_TRUE(same(dequantize_fp8(codes, scale, scheme, axis, type),
                     dequantize_fp8(codes_gpu, s, scheme, axis, type)))
        << "dequantize_fp8 to " << c10::toString(type);
  const Tensor gradient = at::randn(x.sizes(), at::kFloat).to(x.scalar_type());
  EXPECT_TRUE(same(straight_through(x, scale, scheme, axis, gradient),
                   straight_through(x_gpu, s, scheme, axis, gpu(gradient))))
      << "gradient";
}

TEST_F(Fp8GpuTest, EveryHalfAndManyFloatsByManyScales) {
  const float scales[] = {1.0f,    0.5f,       3.0f,     0.1f,       0x1.c58794p-5f, 1.0f / 448,
                          0.0073f, 0x1p-130f,  1e-40f,   0x1p-121f,  0x1p-120f,      0x1p120f,
                          1e30f,   0x1.8p126f, 0x1p-60f, 1.00000012f};
  for (const NumberFormat format : kFormats) {
    for (const float scale : scales) {
      for (const Tensor& x :
           {all_patterns(at::kHalf), all_patterns(at::kBFloat16), random_bits(1 << 18)})
        expect_same(x, scalar(scale), fp8_scheme(format));
    }
  }
}

TEST_F(Fp8GpuTest, AroundEveryMiddleBetweenTwoCodes) {
  // Quotients within a few floats of every middle, where the product with the reciprocal may stand
  // on the other side.
  for (const NumberFormat format : kFormats) {
    std::vector<float> middles = {format == kE4M3 ? 464.0f : 61440.0f};
    with_fp8_format(format, [&](auto constant) {
      using Format = Fp8<constant.value>;
      for (int code = 0; Format::to_float(static_cast<uint8_t>(code)) < Format::kMax; ++code)
        middles.push_back((Format::to_float(static_cast<uint8_t>(code)) +
                           Format::to_float(static_cast<uint8_t>(code + 1))) /
                          2);
    });
    for (int i = 0; i < 60; ++i) {
      const float scale = std::exp2(at::rand({1}).item<float>() * 40 - 20);
      const Tensor centre = at::tensor(middles).mul(scale).view(at::kInt).view({-1, 1});
      const Tensor x = (centre + at::arange(-8, 9, at::kInt)).view(at::kFloat).flatten();
      expect_same(at::cat({x, -x}), scalar(scale), fp8_scheme(format));
    }
  }
}

TEST_F(Fp8GpuTest, GranularitiesShapesAndViews) {
  using enum Granularity;
  const auto transposed = [](const Tensor& t) { return t.transpose(0, 1); };
  const auto shifted = [](const Tensor& t) { return t.flatten().slice(0, 1).view({-1, 1}); };
  for (const NumberFormat format : kFormats) {
    for (const at::ScalarType type : kElementTypes) {
      for (const std::vector<int64_t>& sizes : std::vector<std::vector<int64_t>>{
               {1, 1}, {3, 7}, {5, 64}, {33, 129}, {64, 4096}, {7, 40000}, {0, 8}, {8, 0}}) {
        const Tensor x = mixed(sizes, type);
        const auto scales = [](int64_t n) { return at::rand({n}) + 0.05; };
        expect_same(x, scales(1), fp8_scheme(format));
        expect_same(x, scales(sizes[0]), fp8_scheme(format, per_channel), 0);
        expect_same(x, scales(sizes[1]), fp8_scheme(format, per_channel), 1);
        expect_same(x, scales(sizes[0]), fp8_scheme(format, per_token));
        if (sizes[1] % 8 == 0)
          expect_same(x, scales(x.numel() / 8), fp8_scheme(format, per_group, 8));
        expect_same(x, scales(sizes[1]), fp8_scheme(format, per_channel), 0, transposed);
        if (x.numel() > 1) expect_same(x, scales(1), fp8_scheme(format), 0, shifted);
      }
    }
  }
}

TEST_F(Fp8GpuTest, PerToken) {
  for (const NumberFormat format : kFormats) {
    for (const at::ScalarType type : kElementTypes) {
      for (const std::vector<int64_t>& sizes : std::vector<std::vector<int64_t>>{{1, 1},
                                                                                 {9, 7},
                                                                                 {300, 64},
                                                                                 {5, 1000},
                                                                                 {130, 2048},
                                                                                 {17, 4104},
                                                                                 {6, 8192},
                                                                                 {140, 33000},
                                                                                 {3, 70000},
                                                                                 {2, 70001},
                                                                                 {0, 8},
                                                                                 {4, 0},
                                                                                 {2, 3, 5}}) {
        SCOPED_TRACE(concat(to_string(format), " ", c10::toString(type), " ", sizes.back()));
        const Tensor x = mixed(sizes, type);
        const auto [codes, scale] = quantize_fp8_per_token(x, format);
        const auto [codes_gpu, scale_gpu] = quantize_fp8_per_token(gpu(x), format);
        EXPECT_TRUE(same(scale, scale_gpu));
        EXPECT_TRUE(same(codes, codes_gpu));
        EXPECT_TRUE(same(scale, per_token_scale_fp8(gpu(x), format)));
      }
    }
  }
}

struct Shape {
  int64_t m, n, k;
};

/// |y - exact| against the bound of fp8.h.
void expect_within_bound(const Tensor& codes, const Tensor& weight, const Tensor& x_scale,
                         const Tensor& w_scale, const std::optional<Tensor>& bias,
                         at::ScalarType dtype, bool fast = false) {
  const Tensor x = gpu(codes).to(at::kDouble).mul(gpu(x_scale).to(at::kDouble).view({-1, 1}));
  const Tensor w = gpu(weight).to(at::kDouble).mul(gpu(w_scale).to(at::kDouble).view({-1, 1}));
  Tensor exact = x.mm(w.t()), magnitude = x.abs().mm(w.abs().t());
  if (bias) {
    const Tensor rounded = gpu(*bias).to(dtype).to(at::kDouble);
    exact += rounded;
    magnitude += rounded.abs();
  }
  const double output_unit = dtype == at::kFloat ? 0x1p-24 : dtype == at::kHalf ? 0x1p-11 : 0x1p-8;
  const Tensor bound = magnitude * kFp8TensorCoreError + exact.abs() * output_unit * 1.01 + 0x1p-25;
  const auto run = [&] {
    return fp8_linear(gpu(codes), gpu(weight), gpu(x_scale), gpu(w_scale),
                      bias ? std::optional<Tensor>(gpu(*bias)) : std::nullopt, dtype, fast);
  };
  for (int repeat = 0; repeat < 2; ++repeat) {  // the second takes the algorithm of the first
    const Tensor y = run();
    EXPECT_EQ(y.scalar_type(), dtype);
    ASSERT_EQ(y.sizes(), exact.sizes());
    const Tensor share = (y.to(at::kDouble) - exact).abs() / bound;
    EXPECT_LE(share.max().item<double>(), 1.0);
  }
}

TEST_F(Fp8GpuTest, LinearWithinItsBound) {
  for (const auto& [m, n, k] :
       {Shape{16, 16, 16}, Shape{1, 32, 64}, Shape{3, 5, 7}, Shape{33, 48, 128}, Shape{128, 40, 72},
        Shape{64, 1000, 1000}, Shape{257, 512, 2048}, Shape{1, 1, 1}}) {
    for (const NumberFormat x_format : kFormats) {
      for (const NumberFormat w_format : kFormats) {
        const Tensor codes = at::randn({m, k}).to(fp8_dtype(x_format));
        const Tensor weight = at::randn({n, k}).to(fp8_dtype(w_format));
        const Tensor rows = at::rand({m}) + 0.1, columns = at::rand({n}) + 0.1;
        const Tensor bias = at::randn({n});
        for (const at::ScalarType dtype : kElementTypes) {
          SCOPED_TRACE(concat(m, " ", n, " ", k, " ", to_string(x_format), " ", to_string(w_format),
                              " ", c10::toString(dtype)));
          expect_within_bound(codes, weight, scalar(0.3f), scalar(0.7f), std::nullopt, dtype);
          expect_within_bound(codes, weight, scalar(0.3f), scalar(0.7f), bias, dtype);
          expect_within_bound(codes, weight, rows, columns, std::nullopt, dtype);
          expect_within_bound(codes, weight, rows, columns, bias, dtype);
          expect_within_bound(codes, weight, scalar(0.3f), columns, bias.to(dtype), dtype);
          expect_within_bound(codes, weight, rows, scalar(0.7f), bias, dtype);
        }
        expect_within_bound(codes, weight, rows, columns, bias, at::kBFloat16, /*fast=*/true);
      }
    }
  }
}

TEST_F(Fp8GpuTest, ExactWhereSumsAreSmallIntegers) {
  // Integers up to 8 and sums that fit in 13 bits: every order and every accumulator is exact.
  const int64_t m = 64, n = 96, k = 64;
  const Tensor codes = at::randint(-4, 5, {m, k}, at::kFloat).to(at::kFloat8_e4m3fn);
  const Tensor weight = at::randint(-4, 5, {n, k}, at::kFloat).to(at::kFloat8_e4m3fn);
  const Tensor expected = codes.to(at::kFloat).mm(weight.to(at::kFloat).t());
  const Tensor y = fp8_linear(gpu(codes), gpu(weight), gpu(scalar(1)), gpu(scalar(1)));
  EXPECT_TRUE(same(expected, y));
}

TEST_F(Fp8GpuTest, EmptySizes) {
  const auto codes = [](int64_t rows, int64_t k) {
    return gpu(at::zeros({rows, k}).to(at::kFloat8_e4m3fn));
  };
  const Tensor one = gpu(scalar(1)), bias = at::randn({3});
  EXPECT_EQ(fp8_linear(codes(0, 4), codes(3, 4), one, one).sizes(), (at::IntArrayRef{0, 3}));
  EXPECT_EQ(fp8_linear(codes(2, 4), codes(0, 4), one, one).sizes(), (at::IntArrayRef{2, 0}));
  EXPECT_TRUE(same(bias.expand({2, 3}).contiguous(),
                   fp8_linear(codes(2, 0), codes(3, 0), one, one, gpu(bias))));
}

TEST_F(Fp8GpuTest, UnalignedOperands) {
  const Tensor storage = at::randn({33 * 64}).to(at::kFloat8_e4m3fn);
  const Tensor codes = storage.slice(0, 3, 3 + 16 * 64).view({16, 64});
  const Tensor weight = storage.slice(0, 5, 5 + 32 * 64).view({32, 64});
  const Tensor on_gpu = gpu(storage);
  const Tensor y =
      fp8_linear(on_gpu.slice(0, 3, 3 + 16 * 64).view({16, 64}),
                 on_gpu.slice(0, 5, 5 + 32 * 64).view({32, 64}), gpu(scalar(1)), gpu(scalar(1)));
  const Tensor exact = codes.to(at::kDouble).mm(weight.to(at::kDouble).t());
  const Tensor bound = codes.to(at::kDouble).abs().mm(weight.to(at::kDouble).abs().t());
  EXPECT_TRUE(
      (y.cpu().to(at::kDouble) - exact).abs().le(bound * kFp8TensorCoreError).all().item<bool>());
}

TEST_F(Fp8GpuTest, TuningKeepsTheResultInBounds) {
  const Tensor codes = at::randn({64, 256}).to(at::kFloat8_e4m3fn);
  const Tensor weight = at::randn({128, 256}).to(at::kFloat8_e4m3fn);
  const Tensor rows = at::rand({64}) + 0.1, columns = at::rand({128}) + 0.1;
  tune_fp8_linear(gpu(codes), gpu(weight), gpu(rows), gpu(columns), std::nullopt, at::kBFloat16);
  expect_within_bound(codes, weight, rows, columns, std::nullopt, at::kBFloat16);
}

}  // namespace
}  // namespace vernier
