// INT8 matrix products: exact int32 accumulators, and a linear layer with scales and bias applied
// to them.
//
// Weights are stored as nn.Linear stores them, [N, K]: every operation computes codes * weight^T.
#pragma once

#include <ATen/core/Tensor.h>
#include <vernier/kernels/scheme.h>

#include <optional>

namespace vernier {

/// The largest K that int8_linear takes and whose sum of products of codes of the two schemes
/// cannot overflow int32: 131,071 for symmetric codes, 65,793 for asymmetric activations, where
/// |code - zero_point| goes up to qmax - qmin.
int64_t max_int8_gemm_k(const Scheme& activations, const Scheme& weights);

/// Accumulators: int32 [M, N] = codes int8 [M, K] times weight int8 [N, K] transposed, exact on
/// every device. Throws Error when shapes, dtypes or devices do not fit or K >
/// 131,071, where products of -128 and -128 could overflow.
at::Tensor int8_matmul(const at::Tensor& codes, const at::Tensor& weight);

/// y[m, n] = ((acc[m, n] - input_zero_point * weight_sum[n]) * weight_scale[n]) * input_scale[m] +
/// bias[n], the integer part exact, then one float32 rounding an operation in the order written,
/// then a cast to `dtype`.
///   codes int8 [M, K], weight int8 [N, K];
///   input_scale float32 [1] (static) or [M] (per token); weight_scale float32 [1] or [N];
///   bias float32 [N] or absent; input_zero_point int32 [1] with weight_sum int32 [N] (the sums
///   over K of the weight codes), or both absent for symmetric activations.
/// Returns `dtype` (float32, float16, bfloat16) [M, N]. Throws Error as int8_matmul, and with an
/// input_zero_point where K > 65,793.
at::Tensor int8_linear(const at::Tensor& codes, const at::Tensor& weight,
                       const at::Tensor& input_scale, const at::Tensor& weight_scale,
                       const std::optional<at::Tensor>& bias,
                       const std::optional<at::Tensor>& input_zero_point = std::nullopt,
                       const std::optional<at::Tensor>& weight_sum = std::nullopt,
                       at::ScalarType dtype = at::kFloat);

/// Bound on |float epilogue - exact value| in units of float32 epsilon / 2 relative to each term:
/// conversion of the accumulator, two products, the sum with the bias; see docs/numerics.md.
inline constexpr double kEpilogueRoundings = 4;

}  // namespace vernier
