#include <vernier/kernels/error.h>
#include <vernier/kernels/scheme.h>

#include <algorithm>
#include <array>

namespace vernier {
namespace {

constexpr std::array<const char*, 4> kGranularityNames = {"per_tensor", "per_channel", "per_token",
                                                          "per_group"};
constexpr std::array<const char*, 3> kFormatNames = {"int", "e4m3", "e5m2"};

}  // namespace

void Scheme::check() const {
  VERNIER_CHECK(bits >= 2 && bits <= 8, "bits must be 2 to 8, not ", bits);
  VERNIER_CHECK(granularity == Granularity::per_group ? group_size > 0 : group_size == 0,
                "group_size ", group_size, " does not go with ", to_string(granularity),
                ": set it above 0 for per_group and leave it 0 otherwise");
  if (is_fp8()) {
    VERNIER_CHECK(bits == 8, to_string(format), " codes have 8 bits, not ", bits);
    VERNIER_CHECK(symmetric, to_string(format),
                  " codes are symmetric: they have no zero point. Set symmetric to true");
  }
  VERNIER_CHECK(symmetric || !dynamic, "dynamic scales are symmetric: set symmetric to true");
}

Scheme symmetric_scheme(int bits, Granularity granularity, int64_t group_size) {
  Scheme scheme;
  scheme.bits = bits;
  scheme.granularity = granularity;
  scheme.group_size = group_size;
  scheme.narrow_range = bits == 8;
  scheme.check();
  return scheme;
}

Scheme asymmetric_scheme(int bits, Granularity granularity, int64_t group_size) {
  Scheme scheme = symmetric_scheme(bits, granularity, group_size);
  scheme.symmetric = false;
  scheme.narrow_range = false;
  return scheme;
}

Scheme fp8_scheme(NumberFormat format, Granularity granularity, int64_t group_size) {
  Scheme scheme = symmetric_scheme(8, granularity, group_size);
  scheme.format = format;
  VERNIER_CHECK(scheme.is_fp8(), "a floating-point scheme needs e4m3 or e5m2, not int");
  return scheme;
}

std::string to_string(NumberFormat format) { return kFormatNames[static_cast<size_t>(format)]; }

NumberFormat number_format_from_string(const std::string& name) {
  const auto found = std::find(kFormatNames.begin(), kFormatNames.end(), name);
  VERNIER_CHECK(found != kFormatNames.end(), "unknown number format '", name,
                "': use int, e4m3 or e5m2");
  return static_cast<NumberFormat>(found - kFormatNames.begin());
}

std::string to_string(Granularity granularity) {
  return kGranularityNames[static_cast<size_t>(granularity)];
}

Granularity granularity_from_string(const std::string& name) {
  const auto found = std::find(kGranularityNames.begin(), kGranularityNames.end(), name);
  VERNIER_CHECK(found != kGranularityNames.end(), "unknown granularity '", name,
                "': use per_tensor, per_channel, per_token or per_group");
  return static_cast<Granularity>(found - kGranularityNames.begin());
}

std::string to_string(const Scheme& scheme) {
  std::string text = to_string(scheme.format);
  if (!scheme.is_fp8()) text += concat(scheme.bits);
  text += concat(" ", to_string(scheme.granularity));
  if (scheme.granularity == Granularity::per_group) text += concat(" ", scheme.group_size);
  text += scheme.symmetric ? " symmetric" : " asymmetric";
  if (scheme.dynamic) text += " dynamic";
  return text + concat(" [", scheme.qmin(), ", ", scheme.qmax(), "]");
}

ScaleAndZeroPoint scale_from_range(Range range, const Scheme& scheme) {
  VERNIER_CHECK(std::isfinite(range.min) && std::isfinite(range.max) && range.min <= range.max,
                "a range must be finite and ordered, not [", range.min, ", ", range.max, "]");
  if (scheme.symmetric) {
    const float amax = std::max(std::fabs(range.min), std::fabs(range.max));
    return {scale_from_amax(amax, scheme.qmax()), 0};
  }
  const float low = std::min(range.min, 0.0f);
  const float high = std::max(range.max, 0.0f);
  const auto levels = static_cast<float>(scheme.qmax() - scheme.qmin());
  // high - low overflows for ranges beyond half of float32; the quotients apart do not.
  const float scale =
      std::isfinite(high - low) ? (high - low) / levels : high / levels - low / levels;
  if (!(scale > 0.0f)) return {1.0f, 0};
  const float zero_point = static_cast<float>(scheme.qmin()) - std::nearbyintf(low / scale);
  return {scale, static_cast<int32_t>(std::clamp(zero_point, static_cast<float>(scheme.qmin()),
                                                 static_cast<float>(scheme.qmax())))};
}

}  // namespace vernier
