// Convolutions, batches of products, sums and look-ups of codes on the GPU against the CPU.
#include <ATen/ATen.h>
#include <vernier/kernels/code_tensor.h>
#include <vernier/kernels/convolution.h>
#include <vernier/kernels/int8_bmm.h>
#include <vernier/tests/convolution_cases.h>
#include <vernier/tests/gpu_compare.h>
#include <vernier/tests/int8_linear_operands.h>

namespace vernier {
namespace {

using at::Tensor;
using testing::convolution_cases;
using testing::ConvolutionCase;
using testing::ConvolutionOperands;
using testing::gpu;
using testing::kConvolutionVariants;
using testing::random_operands;
using testing::same;

class ConvolutionGpuTest : public testing::GpuTest {};

void expect_same(const ConvolutionCase& c, const Int8LinearOperands& cpu,
                 const Int8LinearOperands& on_gpu) {
  EXPECT_TRUE(
      same(int8_convolution_accumulators(cpu.codes, cpu.weight, cpu.input_zero_point,
                                         cpu.weight_sum, c.settings),
           int8_convolution_accumulators(on_gpu.codes, on_gpu.weight, on_gpu.input_zero_point,
                                         on_gpu.weight_sum, c.settings)));
  for (const at::ScalarType dtype : {at::kFloat, at::kHalf, at::kBFloat16})
    EXPECT_TRUE(same(int8_convolution(cpu, c.settings, dtype),
                     int8_convolution(on_gpu, c.settings, dtype)));
  const Scheme scheme = asymmetric_scheme(8);
  const Tensor scale = at::full({1}, 0.037f), zero_point = at::full({1}, 11, at::kInt);
  EXPECT_TRUE(
      same(int8_convolution_requantize(cpu, c.settings, scale, zero_point, scheme),
           int8_convolution_requantize(on_gpu, c.settings, gpu(scale), gpu(zero_point), scheme)));
}

TEST_F(ConvolutionGpuTest, EqualsTheCpu) {
  for (const ConvolutionCase& c : convolution_cases()) {
    for (int variant = 0; variant < kConvolutionVariants; ++variant) {
      SCOPED_TRACE(concat(c, " variant ", variant));
      const ConvolutionOperands o = random_operands(c, variant);
      expect_same(c, o.codes, to(o.codes, at::kCUDA));
    }
  }
}

TEST_F(ConvolutionGpuTest, TakesCodesThatAreNotAligned) {
  for (const int64_t groups : {1, 4}) {
    const ConvolutionCase c = {2, 16, 12, {9, 7}, {3, 3}, {{1, 1}, {1, 1}, {1, 1}, groups}};
    const ConvolutionOperands o = random_operands(c, 7);
    Int8LinearOperands shifted = to(o.codes, at::kCUDA);
    const Tensor last = shifted.codes.movedim(1, -1).contiguous();
    const Tensor storage = at::empty({last.numel() + 1}, last.options());
    storage.slice(0, 1).copy_(last.flatten());
    shifted.codes = storage.slice(0, 1).view(last.sizes()).movedim(-1, 1);
    expect_same(c, o.codes, shifted);
  }
}

// More output positions than one matrix of patches, or one launch's threads, hold.
TEST_F(ConvolutionGpuTest, ManyPositions) {
  const ConvolutionCase cases[] = {
      {2, 256, 2, {150, 130}, {3, 3}, {{1, 1}, {1, 1}, {1, 1}}},
      {8, 3, 8, {120, 130}, {7, 7}, {{2, 2}, {3, 3}, {1, 1}}},
      {8, 64, 64, {60, 70}, {3, 3}, {{1, 1}, {1, 1}, {1, 1}, 64}},
      {2, 64, 32, {60, 70}, {4, 4}, {{2, 2}, {1, 1}, {1, 1}, 1, true}},
  };
  for (const ConvolutionCase& c : cases) {
    SCOPED_TRACE(concat(c));
    const ConvolutionOperands o = random_operands(c, 7);
    expect_same(c, o.codes, to(o.codes, at::kCUDA));
  }
}

TEST_F(ConvolutionGpuTest, BatchesOfProductsEqualTheCpu) {
  const std::vector<int64_t> shapes[] = {
      {3, 70, 130, 64}, {5, 1, 33, 7}, {2, 128, 64, 1}, {0, 3, 4, 5}};
  for (const auto& shape : shapes) {
    for (int variant = 0; variant < 8; ++variant) {
      SCOPED_TRACE(concat(at::IntArrayRef(shape), " variant ", variant));
      const int64_t batch = shape[0], m = shape[1], n = shape[2], k = shape[3];
      Int8BmmOperands o = {at::randint(-128, 128, {batch, m, k}, at::kChar),
                           at::randint(-128, 128, {batch, n, k}, at::kChar), at::full({1}, 0.5f),
                           at::full({1}, 0.003f)};
      if (variant & 1) o.a_scale = at::rand({batch, m}) + 0.5f;
      if (variant & 2) o.b_scale = at::rand({batch, n}) * 0.01f + 0.001f;
      if (variant & 4) o.a_zero_point = at::full({1}, -128, at::kInt);
      const Int8BmmOperands moved = {gpu(o.a), gpu(o.b), gpu(o.a_scale), gpu(o.b_scale),
                                     gpu(o.a_zero_point)};
      EXPECT_TRUE(same(int8_bmm_accumulators(o.a, o.b, o.a_zero_point),
                       int8_bmm_accumulators(moved.a, moved.b, moved.a_zero_point)));
      for (const at::ScalarType dtype : {at::kFloat, at::kHalf, at::kBFloat16})
        EXPECT_TRUE(same(int8_bmm(o, dtype), int8_bmm(moved, dtype)));
      const Tensor scale = at::full({1}, 0.1f);
      const Scheme scheme = symmetric_scheme(8);
      EXPECT_TRUE(same(int8_bmm_requantize(o, scale, std::nullopt, scheme),
                       int8_bmm_requantize(moved, gpu(scale), std::nullopt, scheme)));
    }
  }
}

TEST_F(ConvolutionGpuTest, CodeTensorsEqualTheCpu) {
  const auto codes = [](float scale, int zero_point) {
    return CodeTensor{
        at::randint(-128, 128, {37, 24}, at::kChar),
        {at::full({1}, scale), at::full({1}, zero_point, at::kInt), asymmetric_scheme(8)}};
  };
  const auto move = [](const CodeTensor& t) {
    return CodeTensor{gpu(t.codes),
                      {gpu(t.scale.scale), gpu(t.scale.zero_point), t.scale.scheme, t.scale.axis}};
  };
  const CodeTensor a = codes(0.05f, 7), b = codes(0.013f, -20);
  const CodeTensor on_a = move(a), on_b = move(b);
  EXPECT_TRUE(same(add_codes(a, b, a.scale), add_codes(on_a, on_b, on_a.scale)));
  EXPECT_TRUE(same(concat_codes({a, b}, 1, b.scale), concat_codes({on_a, on_b}, 1, on_b.scale)));
  CodeTensor table = {
      a.codes,
      {at::rand({37}) + 0.1f, std::nullopt, symmetric_scheme(8, Granularity::per_channel)}};
  const Tensor indices = at::randint(37, {5, 9}, at::kLong);
  EXPECT_TRUE(same(embedding_of_codes(table, indices, at::kHalf),
                   embedding_of_codes(move(table), gpu(indices), at::kHalf)));
}

}  // namespace
}  // namespace vernier
