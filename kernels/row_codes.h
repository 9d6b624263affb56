// How the operations that end in codes of whole rows (norm_quantize.h, activation_quantize.h) hand
// their quantization to the device files; internal.
#pragma once

#include <vernier/kernels/element_type.h>

namespace vernier {

/// Columns of a COL32 block.
inline constexpr int64_t kCol32 = 32;

/// The matrix of real values, one row a token, and what becomes of it. Pointers are on the kernel's
/// device.
struct RowCodes {
  ElementType type = ElementType::f32;  ///< of the operation's input and of `output`
  int64_t rows = 0;
  int64_t columns = 0;
  void* output = nullptr;               ///< [rows, columns] real values before pre_scale, or null
  const float* pre_scale = nullptr;     ///< [columns] or null: multiplies what is quantized
  const float* scale = nullptr;         ///< [1], or null: a scale a row from its absolute maximum
  const int32_t* zero_point = nullptr;  ///< [1] beside `scale`, or null: zero
  float* row_scale = nullptr;           ///< [rows], written where `scale` is null
  int8_t* codes = nullptr;              ///< code_columns() * rows, at a multiple of 8 bytes
  bool col32 = false;                   ///< layout of the codes; else row-major
  int32_t qmin = -127;
  int32_t qmax = 127;

  /// Columns that have a code: COL32 fills its last block with codes 0.
  VERNIER_HOST_DEVICE int64_t code_columns() const {
    return col32 ? (columns + kCol32 - 1) / kCol32 * kCol32 : columns;
  }
  VERNIER_HOST_DEVICE int64_t code_offset(int64_t row, int64_t column) const {
    return col32 ? column / kCol32 * kCol32 * rows + row * kCol32 + column % kCol32
                 : row * columns + column;
  }
};

}  // namespace vernier
