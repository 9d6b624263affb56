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
        reciprocal_(scale > 0x1p-120f && scale < 0x1p120f ? __frcp_rn(scale) : kNoReciprocal) {}

  __device__ float scale() const { return scale_; }

  /// round_half_even(x / scale) clamped to [low, high], integers of magnitude 256 at most; NaN
  /// becomes `low`. `sure` becomes false where the result may be wrong and divided_code() is to
  /// tell; it is never set to true.
  __device__ float likely_code(float x, float low, float high, bool& sure) const {
    const float quotient = __fmul_rn(x, reciprocal_);
    const float code = rintf(quotient);
    // NaN (also infinity - infinity) is not sure either.
    sure = sure && fabsf(quotient - code) <= 0.5f - 0x1p-13f;
    return fminf(fmaxf(code, low), high);
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

 private:
  static constexpr float kNoReciprocal = __builtin_nanf("");

  float scale_;
  float reciprocal_;
};

}  // namespace vernier::cuda
