// The last step of the CPU kernels that end in codes of whole rows; internal.
#pragma once

#include <vernier/kernels/element_cpu.h>
#include <vernier/kernels/parallel.h>
#include <vernier/kernels/row_codes.h>

#include <algorithm>
#include <bit>
#include <vector>

namespace vernier::cpu {

/// Rows that are worth a thread.
inline int64_t row_grain(const RowCodes& r) {
  return std::max<int64_t>(1, 16 * kBlock / std::max<int64_t>(r.columns, 1));
}

/// Largest magnitude of n values, NaN and infinities left out.
inline float finite_row_amax(const float* values, int64_t n) {
  uint32_t best = 0;  // the bits of magnitudes order them
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(values[i]) & 0x7fffffffu;
    best = std::max(best, bits < 0x7f800000u ? bits : 0);
  }
  return std::bit_cast<float>(best);
}

/// Stores a row of real values where the operation wants them, and their codes. `values` is
/// overwritten.
inline void finish_row(const RowCodes& r, int64_t row, float* values) {
  if (r.output) {
    with_element_type(r.type, [&]<typename T>(T*) {
      T* target = static_cast<T*>(r.output) + row * r.columns;
      for (int64_t c = 0; c < r.columns; ++c) target[c] = static_cast<T>(values[c]);
    });
  }
  if (r.pre_scale)
    for (int64_t c = 0; c < r.columns; ++c) values[c] *= r.pre_scale[c];
  float scale;
  if (r.scale) {
    scale = *r.scale;
  } else {
    scale = scale_from_amax(finite_row_amax(values, r.columns), r.qmax);
    r.row_scale[row] = scale;
  }
  const int32_t zero_point = r.zero_point ? *r.zero_point : 0;
  for (int64_t c = 0; c < r.columns; ++c)
    r.codes[r.code_offset(row, c)] =
        static_cast<int8_t>(quantize_value(values[c], scale, zero_point, r.qmin, r.qmax));
  for (int64_t c = r.columns; c < r.code_columns(); ++c) r.codes[r.code_offset(row, c)] = 0;
}

}  // namespace vernier::cpu
