// The device functions behind statistics.h; internal. cpu:: in statistics_cpu.cc, cuda:: in
// statistics_cuda.cu.
#pragma once

#include <vernier/kernels/element_type.h>
#include <vernier/kernels/histogram_bins.h>

namespace vernier {

/// Extremes over the finite values of a set ({0, 0} where there are none) and what stands apart
/// from its histogram.
struct Extremes {
  float min = 0;
  float max = 0;
  int64_t finite = 0;
  int64_t zeros = 0;
  int64_t nans = 0;
  int64_t infinities = 0;
};

}  // namespace vernier

namespace vernier::cpu {

Extremes extremes(const void* input, ElementType type, int64_t numel);
/// Adds every finite value but zero to counts int64 [2 * bins] at width 2^exponent, into which all
/// must fit.
void count_bins(const void* input, ElementType type, int64_t numel, int64_t bins, int32_t exponent,
                int64_t* counts);
/// counts int64 [2 * bins], range float [2], tallies int64 [4], as HistogramTensors; written whole.
void histogram(const void* input, ElementType type, int64_t numel, int64_t bins, int64_t* counts,
               float* range, int64_t* tallies);
/// range float [2 * columns]: minima, then maxima; {+inf, -inf} for a column without a finite
/// value.
void channel_range(const void* input, ElementType type, int64_t rows, int64_t columns,
                   float* range);

}  // namespace vernier::cpu

namespace vernier::cuda {

/// Bytes of `scratch`, aligned to 4, that histogram needs on the current GPU.
int64_t histogram_scratch(int64_t numel, int64_t bins);
void histogram(const void* input, ElementType type, int64_t numel, int64_t bins, int64_t* counts,
               float* range, int64_t* tallies, void* scratch, void* stream);
void channel_range(const void* input, ElementType type, int64_t rows, int64_t columns, float* range,
                   void* stream);

}  // namespace vernier::cuda
