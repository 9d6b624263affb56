// A linear layer that is trained quantized, forward and backward in one operation: what
// fake_quantize of both operands followed by a linear layer computes, with a fraction of its
// memory traffic, memory and host time.
#pragma once

#include <ATen/core/Tensor.h>
#include <vernier/kernels/scheme.h>

#include <optional>

namespace vernier {

/// How one operand of a linear layer is quantized while it is trained.
struct TrainedOperand {
  Scheme scheme;
  /// float32, in number as the granularity says. Absent: symmetric scales from the tensor's own
  /// absolute maxima, as fake_quantize_dynamic finds them.
  std::optional<at::Tensor> scale = std::nullopt;
  /// int32, or float32 where it is learned; for asymmetric schemes.
  std::optional<at::Tensor> zero_point = std::nullopt;
  /// Present: scale and float32 zero point are learned, their gradients times this
  /// (fake_quantize_learned).
  std::optional<double> gradient_scale = std::nullopt;
};

/// What the forward multiplies.
enum class TrainedProduct {
  real,  ///< dequantized operands, rounded to the operands' dtype
  codes  ///< int8 codes, exactly what the layer computes in integer mode, bit for bit
};

struct TrainedLinear {
  at::Tensor output;
  at::Tensor input_scale, weight_scale;  ///< float32, found in this call; undefined if given
};

/// output = fake_quantize(input) * fake_quantize(weight)^T + bias: [..., out] of input [..., in],
/// weight [out, in], bias [out].
///
/// Differentiable once in input, weight, bias and what is learned; gradients are those of the
/// composition: grad_input = mask * (g * weight_q), grad_weight = mask * (g^T * input_q), where the
/// mask is zero where a code was clipped. The backward multiplies dequantized operands whatever the
/// forward's product was. Kept for it are the quantized operands (TrainedProduct::codes: as int8)
/// and, where codes can be clipped, a bit an element; the operand itself only where its scale is
/// learned.
///
/// Operands and output have `dtype` (float32, float16 or bfloat16); absent, the input's dtype, or
/// autocast's where that is on. Schemes are of integers: of the input per_tensor, per_token or
/// per_group, of the weight any. TrainedProduct::codes takes what int8_linear takes: inputs
/// per_tensor or per_token, weights symmetric, per_tensor or per_channel. No call makes the host
/// wait for the GPU.
/// Throws Error where shapes, dtypes, devices, scales or schemes do not fit.
TrainedLinear fake_quantized_linear(const at::Tensor& input, const at::Tensor& weight,
                                    const std::optional<at::Tensor>& bias,
                                    const TrainedOperand& input_quantizer,
                                    const TrainedOperand& weight_quantizer,
                                    TrainedProduct product = TrainedProduct::real,
                                    std::optional<at::ScalarType> dtype = std::nullopt);

}  // namespace vernier
