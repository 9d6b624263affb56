// FP8: quantize, dequantize and fake-quantize to E4M3 and E5M2 of the OCP 8-bit Floating Point
// Specification, and a linear layer on such codes.
//
// Codes are at::kFloat8_e4m3fn or at::kFloat8_e5m2 tensors. Tensors, scales and granularities are
// as in quantize.h; schemes are symmetric with format e4m3 or e5m2 (scheme.h). The same operations
// stand in torch.ops.vernier for Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <vernier/kernels/scheme.h>

#include <optional>
#include <utility>

namespace vernier {

/// float8_e4m3fn or float8_e5m2. Throws Error for integers.
at::ScalarType fp8_dtype(NumberFormat format);

/// Codes of a tensor in its shape: x / scale, an IEEE float32 division, rounded to nearest even.
/// What lies beyond the format's largest value, infinities with it, becomes the largest value of
/// that sign (the specification's saturating mode, which at::Tensor::to is not); NaN becomes the
/// code 0x7f. Throws Error when the scale does not fit the scheme, a dtype or device is wrong.
at::Tensor quantize_fp8(const at::Tensor& input, const at::Tensor& scale, const Scheme& scheme,
                        int64_t axis = 0);

/// Real values of codes, value * scale in float32 and then rounded to `dtype` (float32, float16,
/// bfloat16). The format is that of the codes' dtype.
at::Tensor dequantize_fp8(const at::Tensor& codes, const at::Tensor& scale, const Scheme& scheme,
                          int64_t axis = 0, at::ScalarType dtype = at::kFloat);

/// dequantize_fp8(quantize_fp8(input)) in the input's dtype. Differentiable in `input` by the
/// straight-through estimator (Bengio 2013, arXiv 1308.3432): the gradient passes where x / scale
/// rounds to a value of the format and is zero where it was clipped, and for NaN; recomputed from
/// `input`.
at::Tensor fake_quantize_fp8(const at::Tensor& input, const at::Tensor& scale, const Scheme& scheme,
                             int64_t axis = 0);

/// Scales of each row, its largest finite magnitude over the format's largest value: float32
/// [input.sizes() without the last]. Rows of zeros get scale 1.
at::Tensor per_token_scale_fp8(const at::Tensor& input, NumberFormat format);

/// Codes of each row with its own scale, one pass: {codes like input, per_token_scale_fp8}.
std::pair<at::Tensor, at::Tensor> quantize_fp8_per_token(const at::Tensor& input,
                                                         NumberFormat format);

/// y = (codes * weight^T) scaled: y[m, n] = sum_k codes[m, k] weight[n, k] * weight_scale[n] *
/// input_scale[m] + bias[n] as `dtype` (float32, float16, bfloat16) [M, N].
///   codes float8_e4m3fn or float8_e5m2 [M, K], weight either of them [N, K];
///   input_scale float32 [1] or [M] (per token); weight_scale float32 [1] or [N];
///   bias [N] in float32 or in `dtype`; for a half-precision `dtype` it is rounded to that first.
/// Products are exact. They are summed
///   on the CPU, and on GPUs or for formats without FP8 tensor cores (before compute capability
///   8.9; e5m2 with e5m2), in float32: |y - y_exact| <= (K + 8) 2^-24 (scales sum |x||w| + |bias|);
///   by FP8 tensor cores, which keep 13 bits behind the point of the largest of 32 products (Li
///   2024, "FTTN", arXiv 2403.00232): within kFp8TensorCoreError (sum |x||w| scales + |bias|);
/// plus half a unit in the last place of `dtype`. `fast_accumulation` leaves partial sums in the
/// tensor core for all of K: faster on some shapes, and its errors grow with K.
/// Any M, N, K; sizes that are no multiples of 16 cost a padded copy. Throws Error when shapes,
/// dtypes or devices do not fit.
at::Tensor fp8_linear(const at::Tensor& codes, const at::Tensor& weight,
                      const at::Tensor& input_scale, const at::Tensor& weight_scale,
                      const std::optional<at::Tensor>& bias = std::nullopt,
                      at::ScalarType dtype = at::kFloat, bool fast_accumulation = false);

/// Times every algorithm that cuBLASLt offers for one fp8_linear and keeps the fastest for calls of
/// that shape in this process; without it they take the library's first choice. Waits for the GPU:
/// call it before capturing a graph. Does nothing on the CPU.
void tune_fp8_linear(const at::Tensor& codes, const at::Tensor& weight,
                     const at::Tensor& input_scale, const at::Tensor& weight_scale,
                     const std::optional<at::Tensor>& bias = std::nullopt,
                     at::ScalarType dtype = at::kFloat, bool fast_accumulation = false);

/// Error of the FP8 tensor cores' sums relative to sum |x||w|, with room to spare for operands
/// whose products differ in sign and size as those of networks do. 32 products and the sum so far
/// lose less than 2^-13 of the largest each, so that chosen operands can lose more: 33 * 2^-13.
inline constexpr double kFp8TensorCoreError = 0x1p-9;

}  // namespace vernier
