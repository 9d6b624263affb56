// The device functions behind int8_gemm.h; internal. cpu:: in int8_gemm_cpu.cc, cuda:: in
// int8_gemm_cuda.cu.
#pragma once

#include <vernier/kernels/element_type.h>

namespace vernier {

/// What turns accumulators [rows, columns] into real values; pointers on the kernel's device.
struct EpilogueArguments {
  const int32_t* accumulators = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
  const float* input_scale = nullptr;  ///< [rows] if input_scale_per_row, else [1]
  bool input_scale_per_row = false;
  const float* weight_scale = nullptr;  ///< [columns] if weight_scale_per_column, else [1]
  bool weight_scale_per_column = false;
  const float* bias = nullptr;                ///< [columns] or null
  const int32_t* input_zero_point = nullptr;  ///< [1] or null
  const int32_t* weight_sum = nullptr;        ///< [columns], with input_zero_point
  void* output = nullptr;                     ///< [rows, columns] of output_type
  ElementType output_type = ElementType::f32;
};

/// One element of the epilogue, rounding by rounding; shared by host and device.
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
void int8_epilogue(const EpilogueArguments& arguments);

}  // namespace vernier::cpu

namespace vernier::cuda {

/// cuBLASLt i8 x i8 -> i32 on device pointers; `codes` [m, k] and `weight` [n, k] row-major,
/// accumulators [m, n] row-major. Any m, n, k >= 1: operands whose k or n is no multiple of 16 are
/// padded in a workspace first. `workspace` has int8_workspace_bytes(m, n, k) bytes, 256-byte
/// aligned.
void int8_matmul(const int8_t* codes, const int8_t* weight, int64_t m, int64_t n, int64_t k,
                 int32_t* accumulators, void* workspace, int64_t workspace_bytes, void* stream);
int64_t int8_workspace_bytes(int64_t m, int64_t n, int64_t k);
/// The same product from plain integer instructions, without a library or a workspace: the oracle
/// of the fast path on the GPU, and the path itself where cuBLASLt has no algorithm.
void int8_matmul_reference(const int8_t* codes, const int8_t* weight, int64_t m, int64_t n,
                           int64_t k, int32_t* accumulators, void* stream);
void int8_epilogue(const EpilogueArguments& arguments, void* stream);

}  // namespace vernier::cuda
