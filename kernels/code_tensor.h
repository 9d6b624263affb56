// Operations on tensors of codes that carry their scale: change of scale, sum, concatenation, table
// look-up. Made of quantize and dequantize, of which they have the values bit for bit.
#pragma once

#include <ATen/core/Tensor.h>
#include <vernier/kernels/scheme.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace vernier {

/// What turns codes into real values.
struct CodeScale {
  at::Tensor scale;                                     ///< float32, as in quantize.h
  std::optional<at::Tensor> zero_point = std::nullopt;  ///< int32, for asymmetric schemes
  Scheme scheme;
  int64_t axis = 0;
};

/// int8 codes with their scale.
struct CodeTensor {
  at::Tensor codes;
  CodeScale scale;
};

/// Their real values: `dtype` (float32, float16, bfloat16) in the shape of the codes.
at::Tensor dequantize(const CodeTensor& tensor, at::ScalarType dtype = at::kFloat);

/// Codes of the same values, in float32, with another scale; the codes themselves where it is the
/// same tensor of scales, zero points and the same scheme.
at::Tensor requantize(const CodeTensor& tensor, const CodeScale& scale);

/// Codes of the sum of two tensors' values, in float32. Sizes broadcast.
at::Tensor add_codes(const CodeTensor& a, const CodeTensor& b, const CodeScale& scale);

/// Codes of the tensors' values along an axis, all with one scale.
at::Tensor concat_codes(const std::vector<CodeTensor>& tensors, int64_t dim,
                        const CodeScale& scale);

/// Rows of a table of codes [rows, columns] at `indices` (int32 or int64, any shape): `dtype`
/// [indices..., columns]. Scales are per_tensor, per_channel along axis 0 (one a row) or 1, or
/// per_group. Throws Error when an index on the CPU lies outside the table; on the GPU the device
/// asserts, as with torch::embedding.
at::Tensor embedding_of_codes(const CodeTensor& table, const at::Tensor& indices,
                              at::ScalarType dtype = at::kFloat);

}  // namespace vernier
