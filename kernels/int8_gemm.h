// INT8 matrix products: exact int32 accumulators, and a linear layer with scales and bias applied
// to them.
//
// Weights are stored as nn.Linear stores them, [N, K]: every operation computes codes * weight^T.
#pragma once

#include <ATen/core/Tensor.h>
#include <vernier/kernels/activation.h>
#include <vernier/kernels/scheme.h>

#include <optional>
#include <string>

namespace vernier {

/// The largest K that int8_linear takes and whose sum of products of codes of the two schemes
/// cannot overflow int32: 131,071 for symmetric codes, 65,793 for asymmetric activations, where
/// |code - zero_point| goes up to qmax - qmin.
int64_t max_int8_gemm_k(const Scheme& activations, const Scheme& weights);

/// Accumulators: int32 [M, N] = codes int8 [M, K] times weight int8 [N, K] transposed, exact on
/// every device. Throws Error when shapes, dtypes or devices do not fit or K >
/// 131,071, where products of -128 and -128 could overflow.
at::Tensor int8_matmul(const at::Tensor& codes, const at::Tensor& weight);

/// The operands of a linear layer on codes: what turns accumulators into real values.
struct Int8LinearOperands {
  at::Tensor codes;                               ///< int8 [M, K]
  at::Tensor weight;                              ///< int8 [N, K]
  at::Tensor input_scale;                         ///< float32 [1] (static) or [M] (per token)
  at::Tensor weight_scale;                        ///< float32 [1] or [N]
  std::optional<at::Tensor> bias = std::nullopt;  ///< float32 [N]
  std::optional<at::Tensor> input_zero_point =
      std::nullopt;                                     ///< int32 [1], for asymmetric activations
  std::optional<at::Tensor> weight_sum = std::nullopt;  ///< int32 [N]: sums over K of the weight's
                                                        ///< codes; goes with input_zero_point
  Activation activation = Activation::none;
};

/// y[m, n] = activation(((acc[m, n] - input_zero_point * weight_sum[n]) * weight_scale[n]) *
/// input_scale[m] + bias[n]), the integer part exact, then one float32 rounding an operation in the
/// order written, the activation as in math_functions.h, then a cast to `dtype`: the same bits on
/// every device.
/// Returns `dtype` (float32, float16, bfloat16) [M, N]. Throws Error as int8_matmul, and where
/// shapes, dtypes or devices of the other operands do not fit.
at::Tensor int8_linear(const Int8LinearOperands& operands, at::ScalarType dtype = at::kFloat);
/// The same without an activation.
at::Tensor int8_linear(const at::Tensor& codes, const at::Tensor& weight,
                       const at::Tensor& input_scale, const at::Tensor& weight_scale,
                       const std::optional<at::Tensor>& bias,
                       const std::optional<at::Tensor>& input_zero_point = std::nullopt,
                       const std::optional<at::Tensor>& weight_sum = std::nullopt,
                       at::ScalarType dtype = at::kFloat);

/// The codes of y, as quantize(y, output_scale, output_zero_point, scheme) would give them from
/// float32: int8 [M, N] for the next layer, with no real values in between. `output_scale` float32
/// [1], `output_zero_point` int32 [1] or absent; `scheme` is per_tensor and says range and symmetry
/// of the codes.
at::Tensor int8_linear_requantize(const Int8LinearOperands& operands,
                                  const at::Tensor& output_scale,
                                  const std::optional<at::Tensor>& output_zero_point,
                                  const Scheme& scheme);

/// Which kernel int8_matmul and int8_linear run on the current GPU, and why, for people.
struct Int8GemmKernel {
  std::string name;
  std::string reason;
};
/// Throws Error without a GPU.
Int8GemmKernel int8_gemm_kernel(int64_t m, int64_t n, int64_t k);

/// Whether products of a shape not met before are first timed with every kernel, which makes the
/// host wait, and the fastest kept: for this process, and in a file for later ones. The file stands
/// in $VERNIER_CACHE_DIR, else $XDG_CACHE_HOME/vernier, else ~/.cache/vernier, one a GPU model and
/// version of Vernier; what it holds is used whether tuning is on or not. Off unless the
/// environment has VERNIER_AUTOTUNE=1. Nothing is timed while a CUDA graph is captured.
void set_int8_gemm_autotune(bool on);

/// Bound on |float epilogue - exact value| in units of float32 epsilon / 2 relative to each term:
/// conversion of the accumulator, two products, the sum with the bias; see docs/numerics.md.
inline constexpr double kEpilogueRoundings = 4;

}  // namespace vernier
