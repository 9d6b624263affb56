// Codes by a product with 1 / scale where that provably gives the code of the division, which costs
// several times as much; internal, for .cu files only.
#pragma once

#include <vernier/kernels/scheme.h>

namespace vernier::cuda {

/// The numeric contract's round_half_even(clamp(x / scale)) for many x and one scale.
///
/// 1 / scale rounded once and x * (1 / scale) rounded once stand within 3 * 2^-24 of x / scale
/// relative to it, the rounding of x / scale included: within 2^-14 for any quotient inside [-256,
/// 256], where all codes are. Unless the product is that close to the middle between two integers,
/// both round to the same integer; where it is, one divides.
class ScaleDivision {
 public:
  /// `scale` is positive. Scales whose reciprocal is not a normal number, and NaN, divide always.
  __device__ explicit ScaleDivision(float scale)
      : scale_(scale),
        reciprocal_(scale > 0x1p-120f && scale < 0x1p120f ? 1.0f / scale : kNoReciprocal) {}

  __device__ float scale() const { return scale_; }

  /// round_half_even(x / scale) clamped to [low, high], integers of magnitude 256 at most; NaN
  /// becomes `low`. `sure` becomes false where the result may be wrong and divided_code() is to
  /// tell; it is never set to true.
  __device__ float likely_code(float x, float low, float high, bool& sure) const {
    const float quotient = __fmul_rn(x, reciprocal_);
    // Adding 1.5 * 2^23 rounds to an integer, half to even; far larger quotients come out as
    // something that the clamp cuts all the same. rintf runs at half the rate.
    const float code = __fsub_rn(__fadd_rn(quotient, kShift), kShift);
    // NaN (also infinity - infinity) is not sure either.
    sure = sure && fabsf(quotient - code) <= 0.5f - 0x1p-13f;
    return fminf(fmaxf(code, low), high);
  }

  /// The same as the low byte of a word.
  __device__ uint32_t likely_bits(float x, float low, float high, bool& sure) const {
    const float quotient = __fmul_rn(x, reciprocal_);
    const float shifted = __fadd_rn(quotient, kShift);
    sure = sure && fabsf(quotient - __fsub_rn(shifted, kShift)) <= 0.5f - 0x1p-13f;
    return __float_as_uint(fminf(fmaxf(shifted, low + kShift), high + kShift));
  }

  /// The same by division, always right.
  __device__ float divided_code(float x, float low, float high) const {
    return fminf(fmaxf(rintf(__fdiv_rn(x, scale_)), low), high);
  }

  /// The same, for a single x.
  __device__ float code(float x, float low, float high) const {
    bool sure = true;
    const float likely = likely_code(x, low, high, sure);
    return sure ? likely : divided_code(x, low, high);
  }

  /// A word whose low byte is the two's complement of an integer code: cheaper than a conversion.
  __device__ static uint32_t integer_bits(float code) {
    return __float_as_uint(__fadd_rn(code, kShift));
  }

 private:
  static constexpr float kShift = 0x1.8p23f;
  static constexpr float kNoReciprocal = __builtin_nanf("");

  float scale_;
  float reciprocal_;
};

}  // namespace vernier::cuda
