// The device functions behind int8_gemm.h; internal. cpu:: in int8_gemm_cpu.cc, cuda:: in
// int8_gemm_cuda.cu.
#pragma once

#include <vernier/kernels/activation.h>
#include <vernier/kernels/element_type.h>

#include <string>
#include <utility>

namespace vernier {

/// What a product leaves behind.
enum class GemmOutput {
  i32,  ///< the accumulators; of the epilogue's arguments only sizes and output are used
  f32,
  f16,
  bf16,
  i8  ///< codes of the output's scale
};

/// What turns accumulators [rows, columns] into the output; pointers on the kernel's device.
struct EpilogueArguments {
  int64_t rows = 0;
  int64_t columns = 0;
  const float* input_scale = nullptr;  ///< [rows] if input_scale_per_row, else [1]
  bool input_scale_per_row = false;
  const float* weight_scale = nullptr;  ///< [columns] if weight_scale_per_column, else [1]
  bool weight_scale_per_column = false;
  const float* bias = nullptr;                ///< [columns] or null
  const int32_t* input_zero_point = nullptr;  ///< [1] or null
  const int32_t* weight_sum = nullptr;        ///< [columns], with input_zero_point
  Activation activation = Activation::none;
  const float* output_scale = nullptr;         ///< i8: [1]
  const int32_t* output_zero_point = nullptr;  ///< i8: [1] or null
  int32_t qmin = -127;                         ///< i8: the codes' range
  int32_t qmax = 127;
  void* output = nullptr;  ///< [rows, columns] of output_type
  GemmOutput output_type = GemmOutput::f32;
};

/// One element of the epilogue before the activation, rounding by rounding; shared by host and
/// device. `accumulator` has the zero point's part taken off.
VERNIER_HOST_DEVICE inline float epilogue_value(int32_t accumulator, float input_scale,
                                                float weight_scale, float bias) {
#ifdef __CUDA_ARCH__
  const float scaled = __fmul_rn(__fmul_rn(__int2float_rn(accumulator), weight_scale), input_scale);
  return __fadd_rn(scaled, bias);
#else
  return (static_cast<float>(accumulator) * weight_scale) * input_scale + bias;
#endif
}

}  // namespace vernier

namespace vernier::cpu {

/// Exact on every x86-64: products widened to 16 bits, pairs summed in 32. The oracle of the fast
/// paths, and the path itself where the CPU's int8 instructions saturate.
void int8_matmul(const int8_t* codes, const int8_t* weight, int64_t m, int64_t n, int64_t k,
                 int32_t* accumulators);
/// `accumulators` [rows, columns]; every output type but i32.
void int8_epilogue(const int32_t* accumulators, const EpilogueArguments& arguments);

}  // namespace vernier::cpu

namespace vernier::cuda {

/// Enqueues output = epilogue(codes [m, k] * weight [n, k]^T) on device pointers, all matrices
/// row-major; m and n are the epilogue's rows and columns. On GPUs of compute capability 9.0 with
/// Vernier's own kernels, elsewhere with cuBLASLt (i8 x i8 -> i32) and a kernel for the epilogue.
/// Any m, n, k >= 1: operands that these cannot address are padded in the workspace first, which
/// has int8_gemm_workspace_bytes() bytes, 256-byte aligned.
void int8_gemm(const int8_t* codes, const int8_t* weight, int64_t k,
               const EpilogueArguments& epilogue, void* workspace, int64_t workspace_bytes,
               void* stream);
int64_t int8_gemm_workspace_bytes(int64_t m, int64_t n, int64_t k, GemmOutput output);
/// Output = epilogue(accumulators [rows, columns]) alone, every output type but i32.
void int8_epilogue(const int32_t* accumulators, const EpilogueArguments& arguments, void* stream);
/// What int8_gemm runs on the current GPU for a shape: the kernel's name and the reason, for
/// people.
std::pair<std::string, std::string> int8_gemm_kernel(int64_t m, int64_t n, int64_t k);
void set_int8_gemm_autotune(bool on);
/// The accumulators from plain integer instructions, without a library or a workspace: the oracle
/// of the fast paths on the GPU, and the path itself where cuBLASLt has no algorithm.
void int8_matmul_reference(const int8_t* codes, const int8_t* weight, int64_t m, int64_t n,
                           int64_t k, int32_t* accumulators, void* stream);

}  // namespace vernier::cuda
