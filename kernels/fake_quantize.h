// Fake quantization for training: quantize and dequantize in one operation, with gradients.
//
// Tensors, scales and zero points as in quantize.h; scheme.h defines the codes. No operation makes
// the host wait for the GPU, and none keeps a mask: the backward finds out again, from the input,
// what was clipped. The same operations stand in torch.ops.vernier for Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <vernier/kernels/scheme.h>

#include <cmath>
#include <optional>
#include <utility>

namespace vernier {

/// dequantize(quantize(input)) in the input's dtype. Differentiable in `input` by the
/// straight-through estimator (Bengio 2013, arXiv 1308.3432): the gradient passes where the code
/// was not clipped and is zero elsewhere.
/// Throws Error when scale or zero_point do not fit the scheme, a dtype or device is wrong.
at::Tensor fake_quantize(const at::Tensor& input, const at::Tensor& scale,
                         const std::optional<at::Tensor>& zero_point, const Scheme& scheme,
                         int64_t axis = 0);

/// fake_quantize with symmetric scales found in the same operation, each from the absolute maximum
/// of its own finite elements (scale_from_amax): {output like input, scale float32 [count]}. A
/// tensor whose scales' elements lie together (per token, per group, per channel of axis 0) is read
/// once. `scheme` is symmetric.
///
/// The gradient passes to `input` unchanged: with a scale from the maximum nothing finite is
/// clipped, and the scale counts as a constant, though it follows the data.
std::pair<at::Tensor, at::Tensor> fake_quantize_dynamic(const at::Tensor& input,
                                                        const Scheme& scheme, int64_t axis = 0);

/// fake_quantize whose scale, and where it is float32 whose zero point, are learned: differentiable
/// in `input` (as fake_quantize), `scale` and `zero_point`.
///
/// Over the elements that share a scale, with g the gradient of the output, q the code and z the
/// zero point,
///
///     d scale      = gradient_scale * sum of g * (q - z - x / scale)   where the code was not
///     clipped
///                                            g * (q - z)               where it was: q is qmin or
///                                            qmax
///     d zero_point = gradient_scale * sum of g * -scale                where the code was clipped
///
/// (learned step size, Esser 2020, arXiv 1902.08153, equations 3 and 5; zero point as in LSQ+,
/// Bhalgat 2020, arXiv 2004.09576). A float32 zero point is rounded to the nearest integer, ties to
/// even, and clamped to [qmin, qmax] before it is used; its gradient ignores both. An int32 one is
/// not learned.
///
/// The sums are made in the pass that makes the input's gradient, in an order that depends on the
/// shape alone: equal calls give equal bits. On a GPU at most 32 terms are added up in float32 and
/// those sums in double; with u = 2^-24,
///
///     |d scale - exact| <= gradient_scale * (2^-15 sum |g| + 40 u sum |g| |t|) + u |d scale|
///
/// where t are the bracketed terms, and 2^-15 bounds the float32 quotient x / scale. The clipped
/// sum knows the second term only.
at::Tensor fake_quantize_learned(const at::Tensor& input, const at::Tensor& scale,
                                 const std::optional<at::Tensor>& zero_point, const Scheme& scheme,
                                 int64_t axis = 0, double gradient_scale = 1.0);

/// The gradient scale that Esser 2020 recommends (section 2.2): 1 / sqrt(n * qmax) for n elements
/// that share a scale.
inline double learned_gradient_scale(int64_t elements_per_scale, const Scheme& scheme) {
  return 1.0 / std::sqrt(static_cast<double>(elements_per_scale) * scheme.qmax());
}

}  // namespace vernier
