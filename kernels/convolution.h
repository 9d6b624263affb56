// INT8 convolutions in one, two and three dimensions, forward and transposed: exact int32
// accumulators and int8_linear's epilogue on them.
//
// Codes are [N, C, spatial...] in any memory format. Weights are int8 [O, kernel..., C / groups]
// (convolution_weight), so that a row of the product reads runs of channels. Results are
// [N, O, spatial...] in channels-last memory, as the product leaves them.
//
// Without groups the patches of a band of output positions become the rows of a matrix (im2col:
// Chellapilla 2006, "High Performance Convolutional Neural Networks for Document Processing"), 64
// MiB at most, and the matrix goes through int8_linear; kernels of one element need no patches. A
// transposed convolution is the same product, whose patches have gaps. Grouped convolutions take a
// direct kernel.
#pragma once

#include <ATen/core/Tensor.h>
#include <vernier/kernels/int8_gemm.h>

#include <optional>
#include <vector>

namespace vernier {

/// How a kernel moves over the input, as torch::nn's options say; a value for each spatial axis.
struct ConvolutionSettings {
  std::vector<int64_t> stride;
  std::vector<int64_t> padding;  ///< on both sides, with codes that stand for 0: the zero point
  std::vector<int64_t> dilation;
  int64_t groups = 1;
  bool transposed = false;
  std::vector<int64_t> output_padding = {};  ///< transposed only; empty for 0
};

/// torch::nn's weight in the order of these operations, contiguous [O, kernel..., C / groups]: from
/// [O, C / groups, kernel...], or [C, O / groups, kernel...] if transposed. Any dtype.
at::Tensor convolution_weight(const at::Tensor& weight, int64_t groups, bool transposed);

/// Accumulators: int32 [N, O, spatial...], the sums of (code - zero point) * weight. Throws Error
/// where shapes, dtypes, devices or settings do not fit, or a sum could overflow.
at::Tensor int8_convolution_accumulators(const at::Tensor& codes, const at::Tensor& weight,
                                         const std::optional<at::Tensor>& input_zero_point,
                                         const std::optional<at::Tensor>& weight_sum,
                                         const ConvolutionSettings& settings);

/// int8_linear's y of these accumulators. Operands as there, but codes and weight as above; one
/// input_scale; weight_sum [O] sums over all but the first axis. Returns `dtype` [N, O,
/// spatial...].
at::Tensor int8_convolution(const Int8LinearOperands& operands, const ConvolutionSettings& settings,
                            at::ScalarType dtype = at::kFloat);

/// The codes of y for a next layer, as int8_linear_requantize.
at::Tensor int8_convolution_requantize(const Int8LinearOperands& operands,
                                       const ConvolutionSettings& settings,
                                       const at::Tensor& output_scale,
                                       const std::optional<at::Tensor>& output_zero_point,
                                       const Scheme& scheme);

}  // namespace vernier
