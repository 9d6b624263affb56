// The device functions behind norm_quantize.h, and the order of their sums, which both devices
// follow; internal. cpu:: in norm_quantize_cpu.cc, cuda:: in norm_quantize_cuda.cu.
#pragma once

#include <vernier/kernels/row_codes.h>

namespace vernier {

/// Element c of a row is added to partial sum (c / kNormChunk) % kNormLanes, in the order of c;
/// then partial sum i takes in i + 128, i + 64, ..., i + 1.
inline constexpr int kNormChunk = 8;
inline constexpr int kNormLanes = 256;

/// Raw arguments; everything is contiguous.
struct NormQuantizeArguments {
  RowCodes codes;
  const void* input = nullptr;     ///< [rows, columns] of codes.type
  const void* residual = nullptr;  ///< likewise, or null
  void* sum = nullptr;             ///< likewise, input + residual; null without residual
  const void* weight = nullptr;    ///< [columns] of weight_type, or null: ones
  const void* bias = nullptr;      ///< [columns] of weight_type, or null: zeros
  ElementType weight_type = ElementType::f32;  ///< codes.type or f32
  bool centered = false;                       ///< LayerNorm; else RMSNorm
  float epsilon = 0;

  /// 1 / columns, by which sums become means.
  float inverse_columns() const { return 1.0f / static_cast<float>(codes.columns); }
};

namespace cpu {
void norm_quantize(const NormQuantizeArguments& arguments);
}

namespace cuda {
/// `stream` is a cudaStream_t. Only enqueues work; a launch that fails throws Error.
void norm_quantize(const NormQuantizeArguments& arguments, void* stream);
}  // namespace cuda

}  // namespace vernier
