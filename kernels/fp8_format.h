// The two formats of the OCP 8-bit Floating Point Specification (OFP8) revision 1.0: conversions
// to and from float32 by plain bit operations, shared by host and device.
#pragma once

#include <vernier/kernels/scheme.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace vernier {

VERNIER_HOST_DEVICE inline uint32_t bits_of_float(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

VERNIER_HOST_DEVICE inline float float_of_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

/// One of the formats; kFormat is e4m3 or e5m2.
template <NumberFormat kFormat>
struct Fp8 {
  static_assert(kFormat == NumberFormat::e4m3 || kFormat == NumberFormat::e5m2);
  static constexpr bool kE4M3 = kFormat == NumberFormat::e4m3;

  static constexpr int kMantissaBits = kE4M3 ? 3 : 2;
  static constexpr int kExponentBias = kE4M3 ? 7 : 15;
  static constexpr float kMax = kE4M3 ? 448.0f : 57344.0f;
  /// Half of the smallest code: what is no larger becomes zero.
  static constexpr float kHalfOfSmallest = kE4M3 ? 0x1p-10f : 0x1p-17f;
  /// Where rounding without saturation would pass kMax: 448 keeps its tie at 464, being even;
  /// 57344 loses its own at 61440.
  static constexpr float kLastUnclipped = kE4M3 ? 464.0f : 0x1.dffffep15f;
  static constexpr uint8_t kNaN = 0x7f;

  /// Round to nearest, ties to even; beyond kMax, and infinite, becomes the largest code of that
  /// sign (the specification's saturating conversion); NaN becomes kNaN.
  VERNIER_HOST_DEVICE static uint8_t from_float(float x) {
    constexpr int kShift = 23 - kMantissaBits;
    constexpr uint32_t kMaxBits = kE4M3 ? 0x43e00000u : 0x47600000u;
    constexpr uint32_t kMinNormalBits = static_cast<uint32_t>(128 - kExponentBias) << 23;
    // A float to whose magnitude a subnormal code is rounded as it is added: one step of the code
    // is one step of this float.
    constexpr uint32_t kAlignBits = static_cast<uint32_t>(128 - kExponentBias + kShift) << 23;

    const uint32_t bits = bits_of_float(x);
    const uint32_t all = bits & 0x7fffffffu;
    const uint32_t magnitude = all < kMaxBits ? all : kMaxBits;
    const uint32_t rounded =
        magnitude + ((uint32_t{1} << (kShift - 1)) - 1) + ((magnitude >> kShift) & 1);
    const uint32_t normal =
        (rounded >> kShift) - (static_cast<uint32_t>(127 - kExponentBias) << kMantissaBits);
    const uint32_t subnormal =
        bits_of_float(float_of_bits(magnitude) + float_of_bits(kAlignBits)) - kAlignBits;
    const uint32_t code = magnitude < kMinNormalBits ? subnormal : normal;
    const uint32_t sign = (bits >> 24) & 0x80u;
    return static_cast<uint8_t>(all > 0x7f800000u ? kNaN : code | sign);
  }

  /// Exact. E5M2's infinities, which from_float never makes, are infinite.
  VERNIER_HOST_DEVICE static float to_float(uint8_t code) {
    constexpr int kShift = 23 - kMantissaBits;
    const uint32_t magnitude = code & 0x7fu;
    const uint32_t sign = uint32_t{code & 0x80u} << 24;
    const bool special = kE4M3 ? magnitude == 0x7f : magnitude >= 0x7c;
    // E5M2's mantissa tells infinity from NaN in float32 as well.
    const uint32_t special_bits = 0x7f800000u | ((kE4M3 ? 4u : magnitude & 3u) << kShift);
    const uint32_t normal =
        (magnitude << kShift) + (static_cast<uint32_t>(127 - kExponentBias) << 23);
    // A subnormal is a normal number's mantissa without its leading one.
    constexpr uint32_t kMinNormalBits = static_cast<uint32_t>(128 - kExponentBias) << 23;
    const uint32_t subnormal = bits_of_float(float_of_bits(kMinNormalBits | (magnitude << kShift)) -
                                             float_of_bits(kMinNormalBits));
    uint32_t bits = magnitude < (1u << kMantissaBits) ? subnormal : normal;
    bits = special ? special_bits : bits;
    return float_of_bits(bits | sign);
  }

  /// Whether the straight-through gradient passes x / scale: rounding does not go beyond kMax.
  /// False for NaN.
  VERNIER_HOST_DEVICE static bool passes_gradient(float quotient) {
    return float_of_bits(bits_of_float(quotient) & 0x7fffffffu) <= kLastUnclipped;
  }
};

/// IEEE float32 division on either device.
VERNIER_HOST_DEVICE inline float divided(float x, float scale) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(x, scale);
#else
  return x / scale;
#endif
}

/// The code of x: from_float(x / scale).
template <NumberFormat kFormat>
VERNIER_HOST_DEVICE uint8_t fp8_code(float x, float scale) {
  return Fp8<kFormat>::from_float(divided(x, scale));
}

/// The real value of a code: one rounding.
template <NumberFormat kFormat>
VERNIER_HOST_DEVICE float fp8_value(uint8_t code, float scale) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(Fp8<kFormat>::to_float(code), scale);
#else
  return Fp8<kFormat>::to_float(code) * scale;
#endif
}

/// Calls f with a std::integral_constant of the format: a run-time choice between two
/// instantiations.
template <typename F>
void with_fp8_format(NumberFormat format, const F& f) {
  if (format == NumberFormat::e4m3) {
    f(std::integral_constant<NumberFormat, NumberFormat::e4m3>{});
  } else {
    f(std::integral_constant<NumberFormat, NumberFormat::e5m2>{});
  }
}

}  // namespace vernier
