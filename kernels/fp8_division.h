// FP8 codes by a product with 1 / scale where that provably gives the code of the division;
// internal, for .cu files only.
#pragma once

#include <cuda_fp8.h>
#include <vernier/kernels/fp8_format.h>
#include <vernier/kernels/launch.h>

namespace vernier::cuda {

template <NumberFormat kFormat>
inline constexpr __nv_fp8_interpretation_t kFp8Interpretation =
    kFormat == NumberFormat::e4m3 ? __NV_E4M3 : __NV_E5M2;

/// V codes as the conversions have them, in pairs, the first in the low byte; V is even or 1.
template <int V>
using Fp8Codes = std::conditional_t<V == 1, Vector<uint8_t, 1>, Vector<uint16_t, V / 2 + (V == 1)>>;

/// 1 / scale; NaN for scales whose reciprocal is not a normal number, so that nothing is concluded
/// from a product with it.
__device__ inline float reciprocal_of_scale(float scale) {
  return scale > 0x1p-120f && scale < 0x1p120f ? __frcp_rn(scale) : __builtin_nanf("");
}

/// The codes of x / scale by division. Apart from the code around it: it is rarely called and long.
template <NumberFormat kFormat, typename T, int V>
__device__ __noinline__ Fp8Codes<V> divided_fp8_codes(Vector<T, V> x, float scale) {
  Fp8Codes<V> out;
  if constexpr (V == 1) {
    out[0] = fp8_code<kFormat>(to_float(x[0]), scale);
  } else {
#pragma unroll
    for (int j = 0; j < V; j += 2)
      out[j / 2] = static_cast<uint16_t>(fp8_code<kFormat>(to_float(x[j]), scale) |
                                         fp8_code<kFormat>(to_float(x[j + 1]), scale) << 8);
  }
  return out;
}

/// The code of x / scale for many x and one scale.
///
/// 1 / scale and its product with x, each rounded once, stand within 2 * 2^-24 of x / scale, and
/// the rounded quotient within 2^-24: they are at most four floats apart. So their codes differ
/// only where a middle between two codes lies within four floats of the product. Middles between
/// normal codes, of m mantissa bits, have a one behind the last of them and zeros from there on,
/// those between subnormal codes zeros from there on already: in either case the lowest 22 - m bits
/// of the float are zero. Where those of the product are within four of that, one divides. What is
/// so small that both become zero need not be asked.
template <NumberFormat kFormat>
class Fp8Division {
 public:
  /// `scale` is positive.
  __device__ explicit Fp8Division(float scale)
      : scale_(scale), reciprocal_(reciprocal_of_scale(scale)) {
    // The product with a power of two is the quotient; only NaN, 0x7fffffff, is left to the
    // division, whose code for it is the format's.
    const bool exact = (__float_as_uint(scale) & 0x7fffffu) == 0;
    offset_ = exact ? 1 : 4;
    width_ = exact ? 1 : 9;
  }

  __device__ float scale() const { return scale_; }

  /// The codes of a vector.
  template <typename T, int V>
  __device__ Fp8Codes<V> codes(const Vector<T, V>& x) const {
    Fp8Codes<V> out;
    bool unsure = false;
#pragma unroll
    for (int j = 0; j < V; j += 2) {
      const float low = __fmul_rn(to_float(x[j]), reciprocal_);
      const float high = V == 1 ? low : __fmul_rn(to_float(x[V == 1 ? 0 : j + 1]), reciprocal_);
      unsure |= is_unsure(low) | is_unsure(high);
      out[j / 2] =
          static_cast<std::conditional_t<V == 1, uint8_t, uint16_t>>(__nv_cvt_float2_to_fp8x2(
              make_float2(low, high), __NV_SATFINITE, kFp8Interpretation<kFormat>));
    }
    return unsure ? divided_fp8_codes<kFormat>(x, scale_) : out;
  }

 private:
  __device__ bool is_unsure(float product) const {
    constexpr uint32_t kLowBits = (uint32_t{1} << (22 - Fp8<kFormat>::kMantissaBits)) - 1;
    const bool near_middle = ((__float_as_uint(product) + offset_) & kLowBits) < width_;
    // NaN is not small. No branches: both sides are cheaper than one.
    return !(fabsf(product) <= Fp8<kFormat>::kHalfOfSmallest / 2) & near_middle;
  }

  float scale_;
  float reciprocal_;
  uint32_t offset_;
  uint32_t width_;
};

/// The real values of V codes, without their scale: exact.
template <NumberFormat kFormat, int V>
__device__ Vector<float, V> fp8_to_float(const Fp8Codes<V>& codes) {
  Vector<float, V> out;
  if constexpr (V == 1) {
    out[0] = Fp8<kFormat>::to_float(codes[0]);
  } else {
#pragma unroll
    for (int j = 0; j < V; j += 2) {
      // Half precision holds every value of both formats.
      const __half2 halves(__nv_cvt_fp8x2_to_halfraw2(codes[j / 2], kFp8Interpretation<kFormat>));
      out[j] = __low2float(halves);
      out[j + 1] = __high2float(halves);
    }
  }
  return out;
}

}  // namespace vernier::cuda
