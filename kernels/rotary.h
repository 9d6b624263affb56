// Rotary position embeddings in one pass: half the reading and writing of the operations that they
// are made of, of which each would go over the heads anew.
#pragma once

#include <ATen/core/Tensor.h>

namespace vernier {

/// Turns pairs of dimensions (i, i + R / 2), i < R / 2, of every head by the angle of its token
/// (Su 2021, arXiv 2104.09864):
///   y[i]         = x[i] * cosine[i] - x[i + R / 2] * sine[i]
///   y[i + R / 2] = x[i + R / 2] * cosine[i] + x[i] * sine[i]
/// and takes dimensions from R on as they are. x float32, float16 or bfloat16 [tokens, heads, D]
/// whose last axis is contiguous, so that heads may be slices of a wider matrix; cosine and sine
/// float32 [rows, R / 2], R <= D, where token t has row t % rows: sequences of one length share a
/// table of one. Float32 with one rounding an operation, then a rounding to x's dtype: the same
/// bits on every device. Returns [tokens, heads, D], contiguous. Differentiable in x. Throws Error
/// when a shape, dtype or device does not fit.
at::Tensor rotary_embedding(const at::Tensor& x, const at::Tensor& cosine, const at::Tensor& sine);

}  // namespace vernier
