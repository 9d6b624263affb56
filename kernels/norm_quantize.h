// LayerNorm and RMSNorm that end in codes: one pass over the input instead of the norm's and the
// quantizer's, as transformer blocks need before their linear layers.
#pragma once

#include <ATen/core/Tensor.h>
#include <vernier/kernels/row_quantize.h>

#include <optional>

namespace vernier {

/// What a norm may do beside normalizing.
struct NormOptions {
  /// Added to the input, of its shape and dtype: a pre-norm transformer's residual stream.
  std::optional<at::Tensor> residual;
  double epsilon = 1e-5;
};

/// Codes of a normalized tensor and what came with them.
struct NormCodes : RowCodesResult {
  std::optional<at::Tensor> sum;  ///< input + residual in the input's dtype; with a residual only
};

/// LayerNorm (Ba 2016, arXiv 1607.06450) over the last axis, then codes:
///   x = input + residual, rounded to the input's dtype, where there is a residual, else input;
///   y = (x - mean(x)) / sqrt(var(x) + epsilon) * weight + bias in float32;
///   codes of y, or of y * pre_scale, as `quantization` says.
/// input float32, float16 or bfloat16 [..., C]; weight and bias [C], float32 or the input's dtype,
/// both of one dtype, or absent. The order of the sums is fixed (docs/numerics.md): codes, scales
/// and outputs are the same bits on every device. Throws Error when a shape, dtype, device or
/// option does not fit.
NormCodes layer_norm_quantize(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                              const std::optional<at::Tensor>& bias,
                              const RowQuantization& quantization, const NormOptions& options = {});

/// RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467), likewise:
///   y = x * weight / sqrt(mean(x^2) + epsilon).
NormCodes rms_norm_quantize(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                            const RowQuantization& quantization, const NormOptions& options = {});

}  // namespace vernier
