// The numeric contract: which codes a tensor is quantized to, which elements share a scale, and how
// a scale turns a number into a code. Host and device code share this header, so CPU and GPU cannot
// differ.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#ifdef __CUDACC__
#define VERNIER_HOST_DEVICE __host__ __device__
#else
#define VERNIER_HOST_DEVICE
#endif

namespace vernier {

/// Which elements of a tensor share one scale.
enum class Granularity {
  per_tensor,   ///< one scale
  per_channel,  ///< one scale for each index of one axis (weights: the output channel, axis 0)
  per_token,    ///< one scale for each row: all axes but the last
  per_group     ///< one scale for each `group_size` consecutive elements of the last axis
};

/// What a code is: an integer, or a floating-point number of the OCP 8-bit Floating Point
/// Specification 1.0 (fp8_format.h).
enum class NumberFormat {
  integer,  ///< `bits` wide, two's complement
  e4m3,     ///< E4M3 ("fn": no infinities), at most 448; codes are stored as float8_e4m3fn
  e5m2      ///< E5M2, at most 57344; codes are stored as float8_e5m2
};

/// How a tensor is quantized.
struct Scheme {
  NumberFormat format = NumberFormat::integer;
  int bits = 8;  ///< integer: 2..8, stored as int8 whatever the width; e4m3, e5m2: 8
  Granularity granularity = Granularity::per_tensor;
  int64_t group_size = 0;    ///< per_group only; divides the last axis
  bool symmetric = true;     ///< zero_point is 0; always for e4m3 and e5m2
  bool narrow_range = true;  ///< symmetric integers: leave out the lowest code, [-127, 127]
  bool dynamic = false;  ///< the scale comes from each tensor as it passes, not from calibration

  bool is_fp8() const { return format != NumberFormat::integer; }

  /// The least and the largest value of a code, in units of the scale: of e4m3 -448 and 448.
  int32_t qmin() const {
    if (is_fp8()) return -qmax();
    return -(int32_t{1} << (bits - 1)) + (symmetric && narrow_range ? 1 : 0);
  }
  int32_t qmax() const {
    if (format == NumberFormat::e4m3) return 448;
    if (format == NumberFormat::e5m2) return 57344;
    return (int32_t{1} << (bits - 1)) - 1;
  }

  bool operator==(const Scheme&) const = default;

  /// Throws Error when a field is outside its range or the fields contradict each other.
  void check() const;
};

/// The default scheme of a width: symmetric; 8 bits use [-127, 127], fewer bits the full range
/// (int4 [-8, 7]), since giving up one code of sixteen costs more than symmetry gains.
Scheme symmetric_scheme(int bits, Granularity granularity = Granularity::per_tensor,
                        int64_t group_size = 0);

/// The asymmetric scheme of a width: codes [-2^(b-1), 2^(b-1) - 1] and a zero point inside them.
Scheme asymmetric_scheme(int bits, Granularity granularity = Granularity::per_tensor,
                         int64_t group_size = 0);

/// Floating-point codes: e4m3 or e5m2.
Scheme fp8_scheme(NumberFormat format, Granularity granularity = Granularity::per_tensor,
                  int64_t group_size = 0);

/// int, e4m3 or e5m2.
std::string to_string(NumberFormat format);
/// Throws Error for an unknown name.
NumberFormat number_format_from_string(const std::string& name);
std::string to_string(Granularity granularity);
/// Throws Error for an unknown name.
Granularity granularity_from_string(const std::string& name);
/// For people: "int8 per_channel symmetric [-127, 127]", "e4m3 per_token symmetric dynamic
/// [-448, 448]".
std::string to_string(const Scheme& scheme);

/// A closed interval of real values, float32.
struct Range {
  float min = 0;
  float max = 0;
};

/// What maps real values to codes.
struct ScaleAndZeroPoint {
  float scale = 1;
  int32_t zero_point = 0;
};

/// scale = range / qmax in float32 (symmetric: range = max(|min|, |max|)); asymmetric: scale = (max
/// - min) / (qmax - qmin) over the range extended to hold 0, zero_point = qmin - round(min /
/// scale), so that 0.0 has an exact code. A range of zero (or one so small that its scale is no
/// number) gives scale 1. Throws Error when a bound is NaN or infinite.
ScaleAndZeroPoint scale_from_range(Range range, const Scheme& scheme);

/// Symmetric scale of an absolute maximum; the device form of scale_from_range.
VERNIER_HOST_DEVICE inline float scale_from_amax(float amax, int32_t qmax) {
#ifdef __CUDA_ARCH__
  const float scale = __fdiv_rn(amax, static_cast<float>(qmax));
#else
  const float scale = amax / static_cast<float>(qmax);
#endif
  return scale > 0.0f ? scale : 1.0f;
}

/// code = clamp(round_half_even(x / scale) + zero_point, qmin, qmax), as ONNX QuantizeLinear. The
/// clamp comes before the rounding: with integer bounds the result is the same, and no value leaves
/// the range where float holds every integer. NaN becomes qmin on every device.
VERNIER_HOST_DEVICE inline int32_t quantize_value(float x, float scale, int32_t zero_point,
                                                  int32_t qmin, int32_t qmax) {
#ifdef __CUDA_ARCH__
  float q = __fdiv_rn(x, scale);
#else
  float q = x / scale;
#endif
  const float low = static_cast<float>(qmin - zero_point);
  const float high = static_cast<float>(qmax - zero_point);
  q = q > low ? q : low;
  q = q < high ? q : high;
#ifdef __CUDA_ARCH__
  return __float2int_rn(q) + zero_point;
#else
  return static_cast<int32_t>(std::nearbyintf(q)) + zero_point;
#endif
}

/// (code - zero_point) * scale in float32: one rounding.
VERNIER_HOST_DEVICE inline float dequantize_value(int32_t code, float scale, int32_t zero_point) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(static_cast<float>(code - zero_point), scale);
#else
  return static_cast<float>(code - zero_point) * scale;
#endif
}

/// Whether the straight-through gradient passes: the unclamped code lies in [qmin, qmax]
/// (Bengio 2013, arXiv 1308.3432; clipping as in Jacob 2018, arXiv 1712.05877).
VERNIER_HOST_DEVICE inline bool passes_gradient(float x, float scale, int32_t zero_point,
                                                int32_t qmin, int32_t qmax) {
#ifdef __CUDA_ARCH__
  const float q = rintf(__fdiv_rn(x, scale));
#else
  const float q = std::nearbyintf(x / scale);
#endif
  const bool above = q >= static_cast<float>(qmin - zero_point);
  const bool below = q <= static_cast<float>(qmax - zero_point);
  return above & below;  // not &&: loops of this vectorize
}

/// The largest K for which K products of any two int8 codes, at most 128 * 128 each, fit an int32
/// sum. The kernels do not know whether a scheme excludes -128.
inline constexpr int64_t kMaxInt8GemmK = 131071;
/// The same where activation codes are asymmetric: |code - zero_point| <= 255 against |weight| <=
/// 128.
inline constexpr int64_t kMaxInt8GemmKAsymmetric = 65793;

}  // namespace vernier
