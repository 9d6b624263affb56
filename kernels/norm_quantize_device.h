// The device functions behind norm_quantize.h, and the order of their sums, which both devices
// follow; internal. cpu:: in norm_quantize_cpu.cc, cuda:: in norm_quantize_cuda.cu.
#pragma once

#include <vernier/kernels/row_codes.h>

namespace vernier {

/// The order of the sums. A row has norm_lanes() lanes of kNormWays partial sums; element c is
/// added to lane (c / kNormChunk) % lanes, way c % kNormWays, in the order of c. Then way i takes
/// in i + 2, then i + 1; lane i of each 32 takes in i + 16, i + 8, ..., i + 1; and of the lanes /
/// 32 sums that remain, sum i takes in the one half of them further on, until one is left.
inline constexpr int kNormChunk = 8;
inline constexpr int kNormWays = 4;
inline constexpr int kMostNormLanes = 512;

/// A power of two: at most four chunks a lane, as far as there are lanes.
VERNIER_HOST_DEVICE inline int norm_lanes(int64_t columns) {
  int lanes = 32;
  while (lanes < kMostNormLanes && lanes * 4 * kNormChunk < columns) lanes *= 2;
  return lanes;
}

/// Raw arguments; everything is contiguous.
struct NormQuantizeArguments {
  RowCodes codes;
  const void* input = nullptr;     ///< [rows, columns] of codes.type
  const void* residual = nullptr;  ///< likewise, or null
  void* sum = nullptr;             ///< likewise, input + residual; null without residual
  const void* weight = nullptr;    ///< [columns] of weight_type, or null: ones
  const void* bias = nullptr;      ///< likewise, or null: zeros; null unless centered
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
