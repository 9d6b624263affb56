// Activation functions that end in codes: what stands between the two linear layers of a
// transformer's feed-forward block, in one pass.
#pragma once

#include <ATen/core/Tensor.h>
#include <vernier/kernels/activation.h>
#include <vernier/kernels/row_quantize.h>

#include <optional>

namespace vernier {

/// Codes of activation(input) in float32, or of that times pre_scale, as `quantization` says. input
/// float32, float16 or bfloat16 [..., C]. The functions are those of math_functions.h, whose bits
/// are the same on every device: so are codes, scales and outputs. Throws Error when a shape,
/// dtype, device or option does not fit.
RowCodesResult activation_quantize(const at::Tensor& input, Activation activation,
                                   const RowQuantization& quantization);

/// Codes of activation(gate) * up, one float32 rounding after the activation (SwiGLU, GeGLU:
/// Shazeer 2020, arXiv 2002.05202). gate and up of one shape [..., C] and dtype, which may be
/// slices of the columns of one matrix; without `up`, `gate` is [..., 2 C] and holds both, up
/// behind gate.
RowCodesResult gated_activation_quantize(const at::Tensor& gate,
                                         const std::optional<at::Tensor>& up, Activation activation,
                                         const RowQuantization& quantization);

}  // namespace vernier
