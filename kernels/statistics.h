// One-pass statistics of a tensor: what observers gather. The counts depend only on the multiset of
// values, so CPU and GPU agree bit for bit and parts add up.
#pragma once

#include <ATen/core/Tensor.h>
#include <vernier/kernels/histogram_bins.h>

namespace vernier {

/// Counts of the finite, non-zero values of a tensor by magnitude and sign, and what stood apart.
struct HistogramTensors {
  at::Tensor counts;   ///< int64 [2, bins]: row 0 the negative values, row 1 the positive ones
  at::Tensor range;    ///< float32 [2]: min and max over finite values; {0, 0} where there are none
  at::Tensor tallies;  ///< int64 [4]: exponent (bin width is 2^exponent), zeros, NaNs, infinities
};

/// Histogram of a float32, float16 or bfloat16 tensor. `bins` is a power of two of at least 4. The
/// width is the smallest power of two for which the largest magnitude falls inside
/// (histogram_bins.h). No host synchronization. On a GPU up to 4096 bins take one read of the
/// tensor, more take two.
HistogramTensors histogram(const at::Tensor& input, int64_t bins = kHistogramBins);

/// Minimum and maximum of every channel (index of the last axis) over finite values, float32 [2,
/// channels];
/// {+inf, -inf} for a channel without one, so that parts merge by min and max. The absolute maxima
/// of the channels are max(-row 0, row 1).
at::Tensor channel_range(const at::Tensor& input);

}  // namespace vernier
