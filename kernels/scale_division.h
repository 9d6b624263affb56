// Codes by a product with 1 / scale where that provably gives the code of the division, which costs
// several times as much; internal, for .cu files only.
#pragma once

#include <vernier/kernels/scheme.h>

namespace vernier::cuda {

/// Added to this a number of magnitude below 2^22 is rounded to an integer, ties to even, whose
/// two's complement is then in the low bits.
constexpr float kRounder = 0x1.8p23f;

/// 1 / scale within 2^-23 of it, for scales within 2^-120 and 2^120: the approximation, within
/// 2^-22, and a step of Newton's. That is the rounded reciprocal but for cases that stand next to
/// the middle between two floats, without the tests for what is not normal.
__device__ inline float refined_reciprocal(float scale) {
  float approximate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(approximate) : "f"(scale));
  return __fmaf_rn(approximate, __fmaf_rn(-scale, approximate, 1.0f), approximate);
}

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
    reciprocal_ = scale > 0x1p-120f && scale < 0x1p120f ? refined_reciprocal(scale) : kNoReciprocal;
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
  static constexpr float kNoReciprocal = __builtin_nanf("");

  float scale_;
  float reciprocal_;
  float largest_remainder_;
};

/// The whole code, round_half_even(x / scale) + zero_point clamped to [qmin, qmax], as the low byte
/// of a word, for many x and one scale. x is multiplied by a number just below 1 / scale and by one
/// just above: the quotient of IEEE division lies between, so that where both products round to one
/// integer, that is its code. This takes fewer instructions than ScaleDivision's test and lets
/// through more.
class ScaleBracket {
 public:
  /// `zero_point`, `qmin` and `qmax` have magnitudes of at most 256.
  __device__ ScaleBracket(float scale, int32_t zero_point, int32_t qmin, int32_t qmax)
      : scale_(scale),
        rounder_(kRounder + static_cast<float>(zero_point)),
        low_(kRounder + static_cast<float>(qmin)),
        high_(kRounder + static_cast<float>(qmax)) {
    const float reciprocal = refined_reciprocal(scale);  // within 2^-23
    const bool usual = scale > 0x1p-120f && scale < 0x1p120f;
    // Six times 2^-24 off: 2^-23 for the reciprocal, 2^-24 for the rounding of this product and
    // 2^-24 for that of the quotient make four. Other scales leave every x in doubt.
    below_ = usual ? reciprocal * (1.0f - 0x1.8p-22f) : __builtin_nanf("");
    above_ = usual ? reciprocal * (1.0f + 0x1.8p-22f) : 1.0f;
  }

  /// The code, unless a bit of `doubt` is set, which divided() resolves. A tie is always in doubt,
  /// so that it does not matter that the zero point is added before the rounding.
  __device__ uint32_t likely(float x, uint32_t& doubt) const {
    const float a = __fmaf_rn(x, below_, rounder_), b = __fmaf_rn(x, above_, rounder_);
    doubt |= __float_as_uint(a) ^ __float_as_uint(b);
    return __float_as_uint(fminf(fmaxf(a, low_), high_));
  }

  /// The same by division, always right.
  __device__ uint32_t divided(float x) const {
    const float code = rintf(__fdiv_rn(x, scale_));
    // Clamped before the zero point is added, where the sum could round; NaN becomes qmin.
    const float zero_point = rounder_ - kRounder;
    const float inside =
        fminf(fmaxf(code, low_ - kRounder - zero_point), high_ - kRounder - zero_point);
    return __float_as_uint(inside + rounder_);
  }

 private:
  float scale_;
  float below_, above_;
  float rounder_, low_, high_;
};

}  // namespace vernier::cuda
