// The device functions behind fp8.h; internal. cpu:: in fp8_cpu.cc, cuda:: in fp8_cuda.cu and
// fp8_gemm_cuda.cu.
#pragma once

#include <vernier/kernels/element_type.h>

namespace vernier {

/// Raw arguments of the element-wise FP8 kernels. Pointers are on the kernel's device.
struct Fp8Arguments {
  NumberFormat format = NumberFormat::e4m3;
  const void* input = nullptr;  ///< [numel] of `type`; codes for dequantize
  ElementType type = ElementType::f32;
  int64_t numel = 0;
  const float* scale = nullptr;  ///< [map.count]
  ScaleMap map;
};

/// What turns sums of products of codes [rows, columns] into real values.
struct Fp8EpilogueArguments {
  const float* products = nullptr;  ///< [rows, stride]; may be `output` itself where it is float
  int64_t stride = 0;               ///< columns, or more
  int64_t rows = 0;
  int64_t columns = 0;
  const float* input_scale = nullptr;  ///< [rows] if per row, else [1]; null: 1
  bool input_scale_per_row = false;
  const float* weight_scale = nullptr;  ///< [columns] if per column, else [1]; null: 1
  bool weight_scale_per_column = false;
  const float* bias = nullptr;  ///< [columns] or null
  void* output = nullptr;       ///< [rows, columns] of output_type
  ElementType output_type = ElementType::f32;
};

/// A product of codes [m, k] with weight [n, k] transposed, in cuBLASLt's reach: k and n multiples
/// of 16, codes, weight and output 16-byte aligned.
struct Fp8GemmArguments {
  const void* codes = nullptr;
  NumberFormat codes_format = NumberFormat::e4m3;
  const void* weight = nullptr;
  NumberFormat weight_format = NumberFormat::e4m3;
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  /// Either both null (unscaled), both [1], or with `vector_scales` [m] and [n].
  const float* input_scale = nullptr;
  const float* weight_scale = nullptr;
  bool vector_scales = false;
  const void* bias = nullptr;  ///< [n] of output_type, a half-precision type; or null
  void* output = nullptr;      ///< [m, n] of output_type
  ElementType output_type = ElementType::f32;
  bool fast_accumulation = false;
  void* workspace = nullptr;  ///< 256-byte aligned
  int64_t workspace_bytes = 0;
};

}  // namespace vernier

namespace vernier::cpu {

void quantize_fp8(const Fp8Arguments& arguments, uint8_t* codes);
/// `arguments.type` names the output.
void dequantize_fp8(const Fp8Arguments& arguments, void* output);
void fake_quantize_fp8(const Fp8Arguments& arguments, void* output);
/// Gradient where x / scale was not clipped, zero elsewhere; both of arguments.type.
void fake_quantize_fp8_backward(const Fp8Arguments& arguments, const void* gradient, void* output);
void fp8_epilogue(const Fp8EpilogueArguments& arguments);

}  // namespace vernier::cpu

namespace vernier::cuda {

/// `stream` is a cudaStream_t. Each call only enqueues work; a launch that fails throws Error.
void quantize_fp8(const Fp8Arguments& arguments, uint8_t* codes, void* stream);
void dequantize_fp8(const Fp8Arguments& arguments, void* output, void* stream);
void fake_quantize_fp8(const Fp8Arguments& arguments, void* output, void* stream);
void fake_quantize_fp8_backward(const Fp8Arguments& arguments, const void* gradient, void* output,
                                void* stream);
void quantize_fp8_per_token(NumberFormat format, const void* input, ElementType type, int64_t rows,
                            int64_t columns, uint8_t* codes, float* scale, void* stream);
void fp8_epilogue(const Fp8EpilogueArguments& arguments, void* stream);

/// cuBLASLt's FP8 product; false, with nothing enqueued, where it has no algorithm for it.
bool fp8_matmul(const Fp8GemmArguments& arguments, void* stream);
/// Times the algorithms and keeps the best for later calls of fp8_matmul; false as there. Waits for
/// the GPU.
bool tune_fp8_matmul(const Fp8GemmArguments& arguments, void* stream);
/// What fp8_matmul can make use of.
inline constexpr int64_t kFp8WorkspaceBytes = int64_t{32} << 20;

}  // namespace vernier::cuda
