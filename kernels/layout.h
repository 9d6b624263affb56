// Matrices between the orders of elements that cuBLASLt knows.
#pragma once

#include <ATen/core/Tensor.h>
#include <vernier/kernels/layout_address.h>

#include <string>
#include <string_view>

namespace vernier {

/// "row", "col", "col32", "col4_4r2_8c" or "col32_2r_4r4".
std::string to_string(Layout layout);
/// Throws Error for another name.
Layout layout_from_string(std::string_view name);

/// A matrix of `rows` x `columns` in another layout (layout_address.h).
///   matrix int8, or int32 in layouts row, col and col32 (cuBLASLt has the others for int8 alone):
///   as many elements as LayoutShape(from, rows, columns).size(), in their order in memory, in any
///   shape; what its padding holds does not matter.
/// Returns the same dtype [lines, leading] of LayoutShape(to, rows, columns): [rows, columns] for
/// row, [columns, rows] for col, a line a group of 32 columns for the others, whose padding is
/// zero. Throws Error for another dtype or another number of elements.
///
/// torch.ops.vernier.convert_layout(matrix, source, target, rows, columns), with layouts by name.
at::Tensor convert_layout(const at::Tensor& matrix, Layout from, Layout to, int64_t rows,
                          int64_t columns);

}  // namespace vernier
