// Quantize and dequantize: the element-wise operations of the numeric contract (scheme.h).
// fake_quantize.h has what trains.
//
// All take contiguous or strided float32, float16 or bfloat16 tensors on the CPU or a GPU. Scales
// are float32 on the same device, in number as the granularity says:
//   per_tensor 1; per_channel size(axis); per_token numel / size(-1); per_group numel / group_size.
// Zero points are int32 within the scheme's codes, as many as scales, or absent for all zero.
// Scales are positive. The values of both are not checked, which would make the host wait for the
// GPU: whoever makes them does (qat/quantizer.h). A scheme of format e4m3 or e5m2 goes to the
// operations of fp8.h: codes are then of that dtype, without zero points. The same operations stand
// in torch.ops.vernier for Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <vernier/kernels/scheme.h>

#include <optional>
#include <utility>

namespace vernier {

/// Codes of a tensor, int8 in the shape of `input`: scheme.h's quantize_value.
/// Throws Error when scale or zero_point do not fit the scheme, a dtype or device is wrong.
at::Tensor quantize(const at::Tensor& input, const at::Tensor& scale,
                    const std::optional<at::Tensor>& zero_point, const Scheme& scheme,
                    int64_t axis = 0);

/// Real values of codes, `dtype` (float32, float16, bfloat16) in the shape of `codes`.
at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scale,
                      const std::optional<at::Tensor>& zero_point, const Scheme& scheme,
                      int64_t axis = 0, at::ScalarType dtype = at::kFloat);

/// Symmetric scales of each row from its own absolute maximum: float32 [input.sizes() without the
/// last]. Rows of zeros get scale 1.
at::Tensor per_token_scale(const at::Tensor& input, const Scheme& scheme);

/// Symmetric codes of each row with its own scale, one pass: {int8 like input, float32 as
/// per_token_scale}.
std::pair<at::Tensor, at::Tensor> quantize_per_token(const at::Tensor& input, const Scheme& scheme);

}  // namespace vernier
