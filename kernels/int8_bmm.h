// Batches of INT8 matrix products of two activations, as in attention: int8_matmul and int8_linear
// for every matrix of a batch.
#pragma once

#include <ATen/core/Tensor.h>
#include <vernier/kernels/int8_gemm.h>

#include <optional>

namespace vernier {

/// The operands of a product of two activations. The second is symmetric: a zero point on both
/// sides would take sums over both.
struct Int8BmmOperands {
  at::Tensor a;        ///< int8 codes [..., M, K]
  at::Tensor b;        ///< int8 codes [..., N, K], the same axes before the last two
  at::Tensor a_scale;  ///< float32 [1], or one a row of every matrix: [..., M]
  at::Tensor b_scale;  ///< float32 [1], or one a row of every matrix: [..., N]
  std::optional<at::Tensor> a_zero_point = std::nullopt;  ///< int32 [1], for an asymmetric a
};

/// Accumulators: int32 [..., M, N], the sums of (a - zero point) * b over K, exact. Throws Error
/// where shapes, dtypes or devices do not fit, or K is over int8_linear's limits.
at::Tensor int8_bmm_accumulators(const at::Tensor& a, const at::Tensor& b,
                                 const std::optional<at::Tensor>& a_zero_point = std::nullopt);

/// (accumulator * b_scale) * a_scale by int8_linear's epilogue: `dtype` (float32, float16,
/// bfloat16) [..., M, N].
at::Tensor int8_bmm(const Int8BmmOperands& operands, at::ScalarType dtype = at::kFloat);

/// The codes of these values for a next layer, as int8_linear_requantize.
at::Tensor int8_bmm_requantize(const Int8BmmOperands& operands, const at::Tensor& output_scale,
                               const std::optional<at::Tensor>& output_zero_point,
                               const Scheme& scheme);

}  // namespace vernier
