// Quantization that notes in the same pass where codes were clipped, a bit an element, so that a
// backward needs neither the input nor a pass over it.
//
// Tensors, scales and zero points as in quantize.h. The same operations stand in torch.ops.vernier.
#pragma once

#include <ATen/core/Tensor.h>
#include <vernier/kernels/scheme.h>

#include <optional>
#include <utility>

namespace vernier {

struct MaskedQuantized {
  at::Tensor output;   ///< like the input, in the dtype asked for
  at::Tensor clipped;  ///< uint8 [ceil(numel / 8)]: bit i % 8 of byte i / 8 is set where element i
                       ///< of the input, counted row-major, was clipped (NaN is); bits behind the
                       ///< last are 0. Empty where no mask was wanted.
};

/// quantize(input) where `dtype` is int8, else dequantize(quantize(input)) rounded once to `dtype`
/// (float32, float16 or bfloat16), which need not be the input's. `scheme` has integer codes. Not
/// differentiable by itself. Throws Error as quantize().
MaskedQuantized quantize_masked(const at::Tensor& input, const at::Tensor& scale,
                                const std::optional<at::Tensor>& zero_point, const Scheme& scheme,
                                int64_t axis, at::ScalarType dtype, bool mask = true);

/// What quantize_masked is given.
struct MaskedOperand {
  at::Tensor input;
  at::Tensor scale;
  std::optional<at::Tensor> zero_point = std::nullopt;
  Scheme scheme = {};
  int64_t axis = 0;
  bool mask = true;
};

/// The same of two tensors on one device, in one launch where that can be done.
std::pair<MaskedQuantized, MaskedQuantized> quantize_masked(const MaskedOperand& first,
                                                            const MaskedOperand& second,
                                                            at::ScalarType dtype);

/// Sets the elements of `gradient` whose bits are set to zero, in place: what fake_quantize's
/// backward does, at the price of reading the mask and writing what it names. `gradient` is
/// contiguous, float32, float16 or bfloat16; an empty mask names nothing. Throws Error when the
/// sizes do not fit.
void zero_clipped_(at::Tensor& gradient, const at::Tensor& clipped);

/// The same of two gradients on one device, in one launch where that can be done.
void zero_clipped_(at::Tensor& first, const at::Tensor& first_clipped, at::Tensor& second,
                   const at::Tensor& second_clipped);

}  // namespace vernier
