// Where a matrix's elements stand in memory in cuBLASLt's orders. Host and device code share it.
#pragma once

#include <vernier/kernels/scheme.h>

#include <cstdint>

namespace vernier {

/// The orders of a matrix's elements, as cublasLtOrder_t of the cuBLASLt documentation (and
/// cublasLt.h) names and describes them. The last three cut the matrix into groups of 32 columns,
/// one behind the other; the last two, of int8, are what the tensor cores of Turing (COL4_4R2_8C)
/// and Ampere (COL32_2R_4R4) take as the second operand.
enum class Layout {
  row,           ///< ROW: rows one behind the other
  col,           ///< COL: columns one behind the other
  col32,         ///< COL32: in a group, rows of 32 elements
  col4_4r2_8c,   ///< COL4_4R2_8C: in a group, tiles of 8 rows; see address()
  col32_2r_4r4,  ///< COL32_2R_4R4: in a group, tiles of 32 rows; see address()
};

/// Columns of a group, in the layouts that have groups.
inline constexpr int64_t kLayoutGroup = 32;

/// How a matrix of `rows` x `columns` lies in memory: `lines` runs of `leading` elements, no gap
/// between them. `leading` is cuBLASLt's leading dimension, at its smallest: the step from a row
/// (ROW), a column (COL) or a group of 32 columns to the next. Elements that a group or tile holds
/// beyond the matrix are padding.
struct LayoutShape {
  Layout layout = Layout::row;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t lines = 0;
  int64_t leading = 0;

  VERNIER_HOST_DEVICE LayoutShape(Layout which, int64_t row_count, int64_t column_count)
      : layout(which), rows(row_count), columns(column_count) {
    const int64_t groups = (columns + kLayoutGroup - 1) / kLayoutGroup;
    switch (layout) {
      case Layout::row:
        lines = rows;
        leading = columns;
        break;
      case Layout::col:
        lines = columns;
        leading = rows;
        break;
      case Layout::col32:
        lines = groups;
        leading = rows * kLayoutGroup;
        break;
      case Layout::col4_4r2_8c:
        lines = groups;
        leading = (rows + 7) / 8 * 8 * kLayoutGroup;
        break;
      case Layout::col32_2r_4r4:
        lines = groups;
        leading = (rows + 31) / 32 * 32 * kLayoutGroup;
        break;
    }
  }

  /// Elements in memory, padding included.
  VERNIER_HOST_DEVICE int64_t size() const { return lines * leading; }

  /// Where element (row, column) stands.
  ///
  /// COL4_4R2_8C: "composite tiles with total 32 columns and 8 rows, tile composed of interleaved
  /// inner tiles of 4 columns within 4 even or odd rows": the inner tile is 4 rows of one parity
  /// by 4 columns, 16 elements; eight of them side by side hold the even rows of the tile, eight
  /// more the odd ones.
  ///
  /// COL32_2R_4R4: "composite tiles with total 32 columns and 32 rows. Element offset within the
  /// tile is calculated as (((row%8)/2*4+row/8)*2+row%2)*32+col".
  VERNIER_HOST_DEVICE int64_t address(int64_t row, int64_t column) const {
    const int64_t group = column / kLayoutGroup * leading, c = column % kLayoutGroup;
    switch (layout) {
      case Layout::row:
        return row * leading + column;
      case Layout::col:
        return column * leading + row;
      case Layout::col32:
        return group + row * kLayoutGroup + c;
      case Layout::col4_4r2_8c:
        return group + row / 8 * (8 * kLayoutGroup) + row % 2 * 128 + c / 4 * 16 + row % 8 / 2 * 4 +
               c % 4;
      case Layout::col32_2r_4r4: {
        const int64_t r = row % 32;
        return group + (row - r) * kLayoutGroup + ((r % 8 / 2 * 4 + r / 8) * 2 + r % 2) * 32 + c;
      }
    }
    return 0;
  }
};

}  // namespace vernier
