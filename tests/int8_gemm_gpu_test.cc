// INT8 products on the GPU against the CPU: every kernel, every output, odd sizes. All bits equal.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <gtest/gtest.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/int8_gemm.h>
#include <vernier/kernels/int8_gemm_choice.h>
#include <vernier/kernels/int8_gemm_sm90.h>

#include <cstdlib>

#include <vernier/tests/gpu_compare.h>
#include <vernier/tests/int8_linear_operands.h>
#include <vernier/tests/temporary_folder.h>

namespace vernier {
namespace {

using at::Tensor;
using testing::same;

class Int8GemmGpuTest : public testing::GpuTest {};

constexpr Activation kActivations[] = {Activation::none, Activation::relu, Activation::gelu,
                                       Activation::gelu_tanh, Activation::silu};

constexpr int64_t kShapes[][3] = {{1, 1, 1},      {1, 4096, 512}, {3, 5, 160},     {17, 33, 127},
                                  {64, 64, 128},  {65, 63, 129},  {128, 256, 64},  {300, 520, 1040},
                                  {257, 777, 96}, {1000, 24, 48}, {33, 2050, 2064}};

TEST_F(Int8GemmGpuTest, EveryOutputOfEveryShape) {
  int variant = 0;
  for (const auto& [m, n, k] : kShapes) {
    for (const Activation activation : kActivations) {
      variant = (variant + 5) % kOperandVariants;
      SCOPED_TRACE(concat(m, "x", k, "x", n, " ", to_string(activation), " variant ", variant));
      const Int8LinearOperands cpu = random_operands(m, n, k, variant, activation);
      const Int8LinearOperands gpu = to(cpu, at::kCUDA);
      ASSERT_TRUE(same(int8_matmul(cpu.codes, cpu.weight), int8_matmul(gpu.codes, gpu.weight)));
      for (const at::ScalarType dtype : {at::kFloat, at::kHalf, at::kBFloat16})
        ASSERT_TRUE(same(int8_linear(cpu, dtype), int8_linear(gpu, dtype))) << dtype;
      for (const bool symmetric : {true, false}) {
        const Scheme scheme = symmetric ? symmetric_scheme(8) : asymmetric_scheme(5);
        // A power of two, so that values on the middle between codes do occur.
        const Tensor scale = at::full({1}, variant & 2 ? 0x1p-4f : 0.0713f);
        std::optional<Tensor> zero, gpu_zero;
        if (!symmetric) zero = at::full({1}, -3, at::kInt), gpu_zero = zero->to(at::kCUDA);
        ASSERT_TRUE(same(int8_linear_requantize(cpu, scale, zero, scheme),
                         int8_linear_requantize(gpu, scale.to(at::kCUDA), gpu_zero, scheme)));
      }
    }
  }
}

/// One product by one configuration, the output poisoned before and guarded behind.
Tensor run_configuration(int configuration, const Int8LinearOperands& o, GemmOutput type,
                         at::ScalarType dtype, const Tensor& output_scale) {
  const int64_t m = o.codes.size(0), n = o.weight.size(0);
  const auto poison = [&](const Tensor& t) { t.view(at::kByte).fill_(0xa5); };
  Tensor memory = at::empty({m * n + 64}, o.codes.options().dtype(dtype));
  poison(memory);
  EpilogueArguments e;
  e.rows = m;
  e.columns = n;
  e.input_scale = o.input_scale.const_data_ptr<float>();
  e.input_scale_per_row = o.input_scale.numel() > 1;
  e.weight_scale = o.weight_scale.const_data_ptr<float>();
  e.weight_scale_per_column = o.weight_scale.numel() > 1;
  if (o.bias) e.bias = o.bias->const_data_ptr<float>();
  if (o.input_zero_point) {
    e.input_zero_point = o.input_zero_point->const_data_ptr<int32_t>();
    e.weight_sum = o.weight_sum->const_data_ptr<int32_t>();
  }
  e.activation = o.activation;
  e.output_scale = output_scale.const_data_ptr<float>();
  e.output = memory.data_ptr();
  e.output_type = type;
  cuda::sm90::int8_gemm(configuration, o.codes.const_data_ptr<int8_t>(),
                        o.weight.const_data_ptr<int8_t>(), o.codes.size(1), e,
                        c10::cuda::getCurrentCUDAStream().stream());
  const Tensor guard = memory.slice(0, m * n).view(at::kByte);
  EXPECT_TRUE(guard.eq(0xa5).all().item<bool>()) << "written behind the output";
  return memory.slice(0, 0, m * n).view({m, n});
}

TEST_F(Int8GemmGpuTest, EveryConfiguration) {
  if (!cuda::sm90::is_available()) GTEST_SKIP() << "the GPU is not of compute capability 9.0";
  const int count = static_cast<int>(gemm_configurations().size());
  const Tensor scale = at::full({1}, 0.0713f);
  const Tensor gpu_scale = scale.to(at::kCUDA);
  for (const auto& [m, n, k] : kShapes) {
    if (k % 16 != 0) continue;
    const int variant = static_cast<int>((m + n) % kOperandVariants);
    const Int8LinearOperands cpu = random_operands(m, n, k, variant, kActivations[m % 5]);
    const Int8LinearOperands gpu = to(cpu, at::kCUDA);
    const Tensor sums = int8_matmul(cpu.codes, cpu.weight);
    const Tensor floats = int8_linear(cpu), halves = int8_linear(cpu, at::kHalf);
    const Tensor codes = int8_linear_requantize(cpu, scale, std::nullopt, symmetric_scheme(8));
    for (int i = 0; i < count; ++i) {
      SCOPED_TRACE(concat(gemm_configurations()[i].name, " ", m, "x", k, "x", n));
      ASSERT_TRUE(same(sums, run_configuration(i, gpu, GemmOutput::i32, at::kInt, gpu_scale)));
      ASSERT_TRUE(same(floats, run_configuration(i, gpu, GemmOutput::f32, at::kFloat, gpu_scale)));
      ASSERT_TRUE(same(halves, run_configuration(i, gpu, GemmOutput::f16, at::kHalf, gpu_scale)));
      ASSERT_TRUE(same(codes, run_configuration(i, gpu, GemmOutput::i8, at::kChar, gpu_scale)));
    }
  }
}

TEST_F(Int8GemmGpuTest, ManyTilesForEachBlock) {
  const Int8LinearOperands cpu = random_operands(5000, 3000, 640, 7);
  const Int8LinearOperands gpu = to(cpu, at::kCUDA);
  EXPECT_TRUE(same(int8_linear(cpu, at::kBFloat16), int8_linear(gpu, at::kBFloat16)));
}

TEST_F(Int8GemmGpuTest, SumsReachTheEndOfInt32) {
  constexpr int64_t kLongest = 131056;  // the largest multiple of 16 that is allowed
  const Tensor low = at::full({2, kLongest}, -128, at::kChar);
  EXPECT_TRUE(same(int8_matmul(low, low), int8_matmul(low.to(at::kCUDA), low.to(at::kCUDA))));
}

TEST_F(Int8GemmGpuTest, RunsInGraphsAndBesideOtherStreams) {
  const Int8LinearOperands cpu = random_operands(200, 512, 256, 3);
  const Int8LinearOperands gpu = to(cpu, at::kCUDA);
  const Tensor expected = int8_linear(cpu);
  at::cuda::CUDAGraph graph;
  Tensor y = int8_linear(gpu);
  {
    const auto side = c10::cuda::getStreamFromPool();
    const c10::cuda::CUDAStreamGuard guard(side);
    graph.capture_begin();
    y = int8_linear(gpu);
    graph.capture_end();
    y.zero_();
    graph.replay();
    side.synchronize();
  }
  EXPECT_TRUE(same(expected, y));
}

TEST_F(Int8GemmGpuTest, TuningKeepsTheResult) {
  if (!cuda::sm90::is_available()) GTEST_SKIP() << "the GPU is not of compute capability 9.0";
  const Int8LinearOperands cpu = random_operands(130, 640, 336, 6);
  const Int8LinearOperands gpu = to(cpu, at::kCUDA);
  EXPECT_FALSE(int8_gemm_kernel(130, 640, 336).reason.empty());
  set_int8_gemm_autotune(true);
  const Tensor tuned = int8_linear(gpu);
  set_int8_gemm_autotune(false);
  EXPECT_TRUE(same(int8_linear(cpu), tuned));
  EXPECT_TRUE(same(int8_linear(cpu), int8_linear(gpu)));
  EXPECT_NE(int8_gemm_kernel(130, 640, 336).reason.find("timed"), std::string::npos);
}

}  // namespace
}  // namespace vernier

// The tuning cache of the tests is theirs alone.
int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  const vernier::testing::TemporaryFolder folder;
  ::setenv("VERNIER_CACHE_DIR", folder.path().c_str(), 1);
  return RUN_ALL_TESTS();
}
