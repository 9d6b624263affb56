// Codes by a product with 1 / scale where that provably gives the code of the division, which costs
// several times as much; internal, for .cu files only.
#pragma once

#include <vernier/kernels/scheme.h>

namespace vernier::cuda {

/// The numeric contract's round_half_even(clamp(x / scale)) for many x and one scale.
///
/// x times the reciprocal stands within 2^-23 of x / scale relative to it, and x / scale as IEEE
/// division rounds it within 2^-24 again: together within 2^-14 for any quotient inside [-256,
/// 256], where all codes are. Unless the product is that close to the middle between two integers,
/// both round to the same integer; where it is, one divides. A scale that is a power of two has an
/// exact reciprocal, and the product is always right.
class ScaleDivision {
 public:
  ScaleDivision() = default;

  /// `scale` is positive. Scales whose reciprocal is not a normal number, and NaN, divide always.
  __device__ explicit ScaleDivision(float scale) : scale_(scale) {
    // The approximation, within 2^-22, and a step of Newton's: the rounded reciprocal but for cases
    // that stand next to the middle between two floats, without the tests for what is not normal.
    float approximate;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(approximate) : "f"(scale));
    const float error = __fmaf_rn(-scale, approximate, 1.0f);
    reciprocal_ = scale > 0x1p-120f && scale < 0x1p120f ? __fmaf_rn(approximate, error, approximate)
                                                        : kNoReciprocal;
    const bool power_of_two = (__float_as_uint(scale) & 0x7fffffu) == 0;
    // Not infinity: what is infinite or NaN is never sure.
    largest_remainder_ = power_of_two ? 0x1.fffffep127f : 0.5f - 0x1p-13f;
  }

  __device__ float scale() const { return scale_; }

  /// round_half_even(x / scale) before any clamp; right inside [-256, 256], and outside of that
  /// range on the same side of it as the right one. `remainder` becomes x / scale less that
  /// integer, within 2^-15. `sure` becomes false where the result may be wrong and divided() is to
  /// tell; it is never set to true.
  __device__ float likely(float x, float& remainder, bool& sure) const {
    const float code = __fmaf_rn(x, reciprocal_, kRounder) - kRounder;
    remainder = __fmaf_rn(x, reciprocal_, -code);
    sure &= fabsf(remainder) <= largest_remainder_;  // not &&, which would branch
    return code;
  }

  /// The same by division, always right; NaN stays NaN.
  __device__ float divided(float x, float& remainder) const {
    const float quotient = __fdiv_rn(x, scale_);
    const float code = rintf(quotient) + 0.0f;  // zero is +0.0
    remainder = quotient - code;
    return code;
  }

  /// round_half_even(x / scale) clamped to [low, high], integers of magnitude 256 at most; NaN
  /// becomes `low`. `sure` as in likely().
  __device__ float likely_code(float x, float low, float high, bool& sure) const {
    float remainder;
    return fminf(fmaxf(likely(x, remainder, sure), low), high);
  }

  /// likely_code as the low byte of a word, in two's complement: cheaper than a conversion.
  __device__ uint32_t likely_bits(float x, float low, float high, bool& sure) const {
    const float shifted = __fmaf_rn(x, reciprocal_, kRounder);
    const float remainder = __fmaf_rn(x, reciprocal_, -__fsub_rn(shifted, kRounder));
    sure &= fabsf(remainder) <= largest_remainder_;
    return __float_as_uint(fminf(fmaxf(shifted, low + kRounder), high + kRounder));
  }

  /// A word with an integer code in its low byte.
  __device__ static uint32_t integer_bits(float code) {
    return __float_as_uint(__fadd_rn(code, kRounder));
  }

  /// likely_code by division, always right.
  __device__ float divided_code(float x, float low, float high) const {
    float remainder;
    return fminf(fmaxf(divided(x, remainder), low), high);
  }

  /// The same, for a single x.
  __device__ float code(float x, float low, float high) const {
    bool sure = true;
    const float likely = likely_code(x, low, high, sure);
    return sure ? likely : divided_code(x, low, high);
  }

 private:
  /// Added to this a number of magnitude below 2^22 is rounded to an integer, ties to even, whose
  /// two's complement is then in the low bits.
  static constexpr float kRounder = 0x1.8p23f;
  static constexpr float kNoReciprocal = __builtin_nanf("");

  float scale_;
  float reciprocal_;
  float largest_remainder_;
};

}  // namespace vernier::cuda
