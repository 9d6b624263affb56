#include <vernier/calibration/calibrators.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/fp8_format.h>

#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

namespace vernier {
namespace {

constexpr std::array<const char*, 5> kMethodNames = {"min_max", "percentile", "mse", "entropy",
                                                     "lsq"};

// Bins of each side in use: one past the outermost that holds a value.
struct UsedBins {
  int64_t negative = 0;
  int64_t positive = 0;

  explicit UsedBins(const Histogram& histogram) {
    for (int64_t b = 0; b < histogram.bins(); ++b) {
      if (histogram.negative()[b] > 0) negative = b + 1;
      if (histogram.positive()[b] > 0) positive = b + 1;
    }
  }
  int64_t largest() const { return std::max(negative, positive); }
};

// The range of so many bins below and above zero.
Range range_of_bins(const Histogram& histogram, const Scheme& scheme, int64_t low, int64_t high) {
  if (scheme.symmetric) low = high = std::max(low, high);
  const auto edge = [&](int64_t bins) {
    // The outermost edge of the widest bins is 2^128, beyond float32.
    return static_cast<float>(std::min(static_cast<double>(bins) * histogram.bin_width(),
                                       static_cast<double>(std::numeric_limits<float>::max())));
  };
  return {-edge(low) + 0.0f, edge(high)};
}

// Bins with something in them: centre and count.
struct Points {
  Eigen::ArrayXf value;
  Eigen::ArrayXf count;
};

Points points_of(const Histogram& histogram) {
  std::vector<float> values, counts;
  const double width = histogram.bin_width();
  for (const double sign : {-1.0, 1.0}) {
    const auto side = sign < 0 ? histogram.negative() : histogram.positive();
    for (size_t b = 0; b < side.size(); ++b) {
      if (side[b] == 0) continue;
      values.push_back(static_cast<float>(sign * (static_cast<double>(b) + 0.5) * width));
      counts.push_back(static_cast<float>(side[b]));
    }
  }
  const auto n = static_cast<Eigen::Index>(values.size());
  return {Eigen::Map<Eigen::ArrayXf>(values.data(), n),
          Eigen::Map<Eigen::ArrayXf>(counts.data(), n)};
}

// Values in units of the scale, rounded to the scheme's codes.
Eigen::ArrayXf rounded_to_codes(const Eigen::ArrayXf& scaled, float low, float high,
                                NumberFormat format) {
  if (format == NumberFormat::integer) return scaled.max(low).min(high).rint();
  Eigen::ArrayXf rounded(scaled.size());
  with_fp8_format(format, [&](auto constant) {
    using Format = Fp8<constant.value>;
    for (Eigen::Index i = 0; i < scaled.size(); ++i)
      rounded[i] = Format::to_float(Format::from_float(scaled[i]));
  });
  return rounded;
}

double squared_error(const Points& points, Range range, const Scheme& scheme) {
  const auto [scale, zero_point] = scale_from_range(range, scheme);
  const auto low = static_cast<float>(scheme.qmin() - zero_point);
  const auto high = static_cast<float>(scheme.qmax() - zero_point);
  // Divided by the scale, so that squares of tiny or huge values stay inside float.
  const Eigen::ArrayXf scaled = points.value / scale;
  const Eigen::ArrayXf error = scaled - rounded_to_codes(scaled, low, high, scheme.format);
  return (error.square() * points.count).cast<double>().sum() * scale * static_cast<double>(scale);
}

// Numbers of bins from `used` down by so many steps an octave.
std::vector<int64_t> geometric_bins(int64_t used, int steps) {
  std::vector<int64_t> bins;
  for (int i = 0;; ++i) {
    const int64_t b =
        std::llround(static_cast<double>(used) * std::exp2(-i / static_cast<double>(steps)));
    if (b < 1) return bins;
    if (bins.empty() || b < bins.back()) bins.push_back(b);
  }
}

// The number of bins in [1, used] with the least cost; ties go to the larger range. Searched in
// eighths of an octave, then closely around the best. The error of few distinct values jumps from
// bin to bin: then `exhaustive` tries every one.
template <typename Cost>
int64_t best_bins(int64_t used, int64_t start, bool exhaustive, const Cost& cost) {
  if (used == 0) return 0;
  int64_t best = start;
  double least = cost(start);
  const auto consider = [&](int64_t bins) {
    if (bins < 1 || bins > used || bins == best) return;
    const double value = cost(bins);
    if (value < least || (value == least && bins > best)) {
      least = value;
      best = bins;
    }
  };
  if (exhaustive) {
    for (int64_t bins = used; bins >= 1; --bins) consider(bins);
    return best;
  }
  for (const int64_t bins : geometric_bins(used, 8)) consider(bins);
  for (const int fineness : {64, 512}) {
    const auto centre = static_cast<double>(best);
    for (int i = -8; i <= 8; ++i)
      consider(std::llround(centre * std::exp2(i / static_cast<double>(fineness))));
  }
  return best;
}

}  // namespace

CalibrationMethod calibration_method_from_string(const std::string& name) {
  if (name == "kl") return CalibrationMethod::entropy;
  const auto found = std::find(kMethodNames.begin(), kMethodNames.end(), name);
  VERNIER_CHECK(found != kMethodNames.end(), "unknown calibrator '", name,
                "': use min_max, percentile, mse, entropy or lsq");
  return static_cast<CalibrationMethod>(found - kMethodNames.begin());
}

std::string to_string(CalibrationMethod method) {
  return kMethodNames[static_cast<size_t>(method)];
}

Range min_max_range(const Histogram& histogram, const Scheme& scheme) {
  const Range extremes = histogram.range();
  if (scheme.symmetric) return {-histogram.amax(), histogram.amax()};
  return {std::min(0.0f, extremes.min), std::max(0.0f, extremes.max)};
}

Range percentile_range(const Histogram& histogram, const Scheme& scheme, double percentile) {
  VERNIER_CHECK(percentile > 0 && percentile <= 100, "percentile must be in (0, 100], not ",
                percentile);
  const auto negative = histogram.negative(), positive = histogram.positive();
  const auto finite = static_cast<double>(histogram.finite());
  // A whole number of values: 90 % of ten are nine, though 10 * 0.9 need not be 9 in floating
  // point.
  const double cut = finite - std::ceil(finite * (percentile / 100) * (1 - 1e-12));
  // The fewest bins outside of which at most `allowed` values lie, walking in from the outermost.
  const auto bins_for = [&](const auto& count_at, double allowed) -> int64_t {
    double outside = 0;
    for (int64_t b = histogram.bins() - 1; b >= 0; --b) {
      outside += static_cast<double>(count_at(b));
      if (outside > allowed) return b + 1;
    }
    return 0;
  };
  if (scheme.symmetric) {
    const int64_t bins = bins_for([&](int64_t b) { return negative[b] + positive[b]; }, cut);
    return range_of_bins(histogram, scheme, bins, bins);
  }
  return range_of_bins(histogram, scheme, bins_for([&](int64_t b) { return negative[b]; }, cut / 2),
                       bins_for([&](int64_t b) { return positive[b]; }, cut / 2));
}

Range mse_range(const Histogram& histogram, const Scheme& scheme) {
  constexpr Eigen::Index kFewPoints = 64;
  const UsedBins used(histogram);
  const Points points = points_of(histogram);
  const bool exhaustive = points.value.size() <= kFewPoints;
  const auto cost = [&](int64_t low, int64_t high) {
    return squared_error(points, range_of_bins(histogram, scheme, low, high), scheme);
  };
  if (scheme.symmetric) {
    const int64_t bins = best_bins(used.largest(), used.largest(), exhaustive,
                                   [&](int64_t b) { return cost(b, b); });
    return range_of_bins(histogram, scheme, bins, bins);
  }
  // Both sides at once on a coarse grid, so that the search of each side in turn starts in the
  // right valley.
  int64_t low = used.negative, high = used.positive;
  double least = cost(low, high);
  const auto coarse = [](int64_t side) {
    constexpr size_t kSixOctaves = 24;
    std::vector<int64_t> bins = side ? geometric_bins(side, 4) : std::vector<int64_t>{0};
    bins.resize(std::min(bins.size(), kSixOctaves));
    return bins;
  };
  const std::vector<int64_t> lows = coarse(low), highs = coarse(high);
  for (const int64_t l : lows) {
    for (const int64_t h : highs) {
      const double value = cost(l, h);
      if (value >= least) continue;
      least = value;
      low = l;
      high = h;
    }
  }
  for (int round = 0; round < 4; ++round) {
    const int64_t low_before = low, high_before = high;
    high = best_bins(used.positive, high, exhaustive, [&](int64_t b) { return cost(low, b); });
    low = best_bins(used.negative, low, exhaustive, [&](int64_t b) { return cost(b, high); });
    // Both by one factor: along that line the zero point stays, and the valley is narrow across it.
    const int64_t low_now = low, high_now = high;
    double now = cost(low, high);
    for (int i = -16; i <= 16; ++i) {
      const auto moved = [&](int64_t bins, int64_t most) {
        return std::clamp<int64_t>(std::llround(static_cast<double>(bins) * std::exp2(i / 64.0)),
                                   std::min<int64_t>(bins, 1), most);
      };
      const int64_t l = moved(low_now, used.negative), h = moved(high_now, used.positive);
      const double value = cost(l, h);
      if (value >= now) continue;
      now = value;
      low = l;
      high = h;
    }
    if (low == low_before && high == high_before) break;
  }
  return range_of_bins(histogram, scheme, low, high);
}

Range entropy_range(const Histogram& histogram, const Scheme& scheme) {
  VERNIER_CHECK(!scheme.is_fp8(), "the entropy calibrator counts evenly spaced levels, which ",
                to_string(scheme.format), " does not have: use min_max, percentile or mse");
  const int64_t bins = histogram.bins();
  const int64_t levels = int64_t{1} << (scheme.bits - 1);
  std::vector<double> magnitude(bins);
  for (int64_t b = 0; b < bins; ++b)
    magnitude[b] = static_cast<double>(histogram.negative()[b] + histogram.positive()[b]);
  std::vector<double> outside(bins + 1);  // count in bins [i, bins)
  for (int64_t b = bins - 1; b >= 0; --b) outside[b] = outside[b + 1] + magnitude[b];
  const UsedBins used(histogram);
  const int64_t last = used.largest();
  if (last == 0) return {0, 0};

  // Divergence of the first i bins, the rest added to the last of them, from their image: each
  // level spreads its count evenly over those of its bins that are not empty.
  const auto divergence = [&](int64_t i) {
    const double clipped = outside[i];
    const double total = outside[0], inside = total - clipped;
    double sum = 0;
    for (int64_t level = 0; level < levels; ++level) {
      const int64_t begin = level * i / levels, end = (level + 1) * i / levels;
      double count = 0, filled = 0;
      for (int64_t b = begin; b < end; ++b) {
        count += magnitude[b];
        filled += magnitude[b] > 0 || (b == i - 1 && clipped > 0);
      }
      if (filled == 0) continue;
      const double q = count / filled / inside;
      for (int64_t b = begin; b < end; ++b) {
        const double p = (magnitude[b] + (b == i - 1 ? clipped : 0)) / total;
        if (p == 0) continue;
        if (q == 0) return std::numeric_limits<double>::infinity();
        sum += p * std::log(p / q);
      }
    }
    return sum;
  };
  const int64_t step = std::max<int64_t>(1, bins / 512);
  int64_t best = last;
  double least = divergence(last);
  for (int64_t i = last - step; i >= levels; i -= step) {
    const double value = divergence(i);
    if (value < least) {
      least = value;
      best = i;
    }
  }
  return range_of_bins(histogram, scheme, std::min(best, used.negative),
                       std::min(best, used.positive));
}

Range lsq_range(const Histogram& histogram, const Scheme& scheme) {
  VERNIER_CHECK(scheme.symmetric && !scheme.is_fp8(),
                "the lsq calibrator is for symmetric integers, not ", to_string(scheme),
                ": use min_max, percentile or mse");
  const int64_t count = histogram.finite();
  if (count == 0) return {0, 0};
  double sum = 0;
  for (const auto side : {histogram.negative(), histogram.positive()})
    for (size_t b = 0; b < side.size(); ++b)
      sum += static_cast<double>(side[b]) * (static_cast<double>(b) + 0.5);
  const double mean = sum * histogram.bin_width() / static_cast<double>(count);
  const auto bound = static_cast<float>(2 * mean * std::sqrt(static_cast<double>(scheme.qmax())));
  return {-bound, bound};
}

namespace {

Range found_range(const Histogram& histogram, const Scheme& scheme, const Calibrator& calibrator) {
  switch (calibrator.method) {
    case CalibrationMethod::min_max:
      return min_max_range(histogram, scheme);
    case CalibrationMethod::percentile:
      return percentile_range(histogram, scheme, calibrator.percentile);
    case CalibrationMethod::mse:
      return mse_range(histogram, scheme);
    case CalibrationMethod::entropy:
      return entropy_range(histogram, scheme);
    case CalibrationMethod::lsq:
      return lsq_range(histogram, scheme);
  }
  throw Error("unknown calibration method");
}

}  // namespace

Range calibrate(const Histogram& histogram, const Scheme& scheme, const Calibrator& calibrator) {
  double low = calibrator.keep_low, high = calibrator.keep_high;
  VERNIER_CHECK(low > 0 && low <= 1 && high > 0 && high <= 1,
                "what is kept of a range must be in (0, 1], not ", low, " and ", high);
  if (scheme.symmetric) low = high = std::max(low, high);
  const Range found = found_range(histogram, scheme, calibrator);
  return {static_cast<float>(found.min * low), static_cast<float>(found.max * high)};
}

}  // namespace vernier
