// The device functions behind convolution.h; internal. cpu:: in convolution_cpu.cc, cuda:: in
// convolution_cuda.cu.
#pragma once

#include <vernier/kernels/scheme.h>

namespace vernier {

/// One spatial axis of a convolution.
struct ConvolutionAxis {
  int32_t input = 1;
  int32_t output = 1;
  int32_t kernel = 1;
  int32_t stride = 1;
  int32_t padding = 0;
  int32_t dilation = 1;

  /// The input position that kernel element `tap` reads for an output position; negative where
  /// there is none. No sum here leaves int32: the dispatch file sees to it.
  VERNIER_HOST_DEVICE int32_t source(int32_t position, int32_t tap, bool transposed) const {
    int32_t i = 0;
    if (transposed) {
      i = position + padding - tap * dilation;
      if (i < 0 || i % stride != 0) return -1;
      i /= stride;
    } else {
      i = position * stride - padding + tap * dilation;
    }
    return i < input ? i : -1;
  }
};

/// A convolution over channels-last codes [batch, input..., channels] with weight
/// [out_channels, kernel..., channels / groups]; the first axes are 1 below three dimensions.
struct ConvolutionShape {
  int64_t batch = 0;
  int64_t channels = 1;
  int64_t out_channels = 1;
  int64_t groups = 1;
  bool transposed = false;
  ConvolutionAxis axes[3];

  VERNIER_HOST_DEVICE int64_t taps() const {
    return int64_t{axes[0].kernel} * axes[1].kernel * axes[2].kernel;
  }
  VERNIER_HOST_DEVICE int64_t outputs() const {
    return int64_t{axes[0].output} * axes[1].output * axes[2].output;
  }
  /// Output positions of the batch.
  int64_t rows() const { return batch * outputs(); }
  int64_t group_channels() const { return channels / groups; }
  /// Products in a sum.
  int64_t depth() const { return taps() * group_channels(); }
};

}  // namespace vernier

// Rows are output positions of the batch in their order in memory. `zero_point` is [1] on the
// kernel's device, or null for 0.

namespace vernier::cpu {

/// patches [count, taps, channels]: what output positions first, first + 1, ... read, and the zero
/// point where they read nothing. Groups do not matter.
void im2col(const int8_t* codes, const ConvolutionShape& shape, const int32_t* zero_point,
            int64_t first, int64_t count, int8_t* patches);
/// accumulators [count, out_channels] of these positions without patches, any groups.
void direct_convolution(const int8_t* codes, const int8_t* weight, const ConvolutionShape& shape,
                        const int32_t* zero_point, int64_t first, int64_t count,
                        int32_t* accumulators);

}  // namespace vernier::cpu

namespace vernier::cuda {

/// `stream` is a cudaStream_t. Each call only enqueues work; a launch that fails throws Error.
void im2col(const int8_t* codes, const ConvolutionShape& shape, const int32_t* zero_point,
            int64_t first, int64_t count, int8_t* patches, void* stream);
void direct_convolution(const int8_t* codes, const int8_t* weight, const ConvolutionShape& shape,
                        const int32_t* zero_point, int64_t first, int64_t count,
                        int32_t* accumulators, void* stream);

}  // namespace vernier::cuda
