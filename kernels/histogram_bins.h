// Where a value falls in a histogram whose bin width is a power of two; shared by host and device
// code.
//
// With such widths bin b of width 2^e lies wholly inside bin b / 2 of width 2^(e+1), so growing the
// range loses nothing: the histogram of a set of values at its final width is the same whatever
// order they came in.
#pragma once

#include <vernier/kernels/scheme.h>

#include <cstdint>
#include <cstring>

namespace vernier {

/// Bins of each sign. The largest magnitude lies in the upper half, so at least half of them are in
/// use.
inline constexpr int64_t kHistogramBins = 4096;

/// Widths below 2^-126 are not used: their reciprocal would overflow float32.
inline constexpr int32_t kSmallestExponent = -126;

VERNIER_HOST_DEVICE inline float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

VERNIER_HOST_DEVICE inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

/// 2^exponent, for -126 <= exponent <= 127: what widths of 4 bins or more and their reciprocals
/// need.
VERNIER_HOST_DEVICE inline float power_of_two(int32_t exponent) {
  return float_from_bits(static_cast<uint32_t>(exponent + 127) << 23);
}

/// The smallest width exponent e with amax < bins * 2^e. amax is finite and positive; bins =
/// 2^log2_bins.
VERNIER_HOST_DEVICE inline int32_t width_exponent(float amax, int32_t log2_bins) {
  // amax = 1.m * 2^p lies in [2^p, 2^(p+1)); denormals count as p = -127, which the bound below
  // makes irrelevant.
  const int32_t p = static_cast<int32_t>(bits_from_float(amax) >> 23) - 127;
  const int32_t exponent = p + 1 - log2_bins;
  return exponent < kSmallestExponent ? kSmallestExponent : exponent;
}

/// Bin of a finite magnitude; inverse_width = 2^-e. The product is exact or below the first bin's
/// edge.
VERNIER_HOST_DEVICE inline int32_t bin_of(float magnitude, float inverse_width) {
  return static_cast<int32_t>(magnitude * inverse_width);
}

}  // namespace vernier
