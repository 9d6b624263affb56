#include <vernier/calibration/histogram.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/statistics_device.h>

#include <algorithm>
#include <array>
#include <bit>
#include <numeric>
#include <utility>

namespace vernier {
namespace {

int32_t log2_of(int64_t bins) { return std::countr_zero(static_cast<uint64_t>(bins)); }

}  // namespace

Histogram::Histogram(int64_t bins) {
  VERNIER_CHECK(
      bins >= 4 && bins <= (int64_t{1} << 20) && std::has_single_bit(static_cast<uint64_t>(bins)),
      "a histogram needs a power of two of bins from 4 to 1048576, not ", bins);
  counts_.resize(2 * bins);
}

Histogram::Histogram(std::vector<int64_t> counts, int32_t exponent, Range range, int64_t zeros,
                     int64_t nans, int64_t infinities)
    : Histogram(static_cast<int64_t>(counts.size()) / 2) {
  counts_ = std::move(counts);
  exponent_ = exponent;
  range_ = range;
  zeros_ = zeros;
  nans_ = nans;
  infinities_ = infinities;

  // Each part fits, and so must their sum: an overflow here would be a hostile file's.
  int64_t sum = 0;
  bool valid = counts_.size() % 2 == 0 && std::isfinite(range.min) && std::isfinite(range.max) &&
               range.min <= range.max;
  const auto add = [&](int64_t count) {
    valid = valid && count >= 0 && !__builtin_add_overflow(sum, count, &sum);
  };
  std::for_each(counts_.begin(), counts_.end(), add);
  const int64_t binned = sum;
  add(zeros);
  finite_ = sum;
  add(nans);
  add(infinities);
  // The outermost bin of each side in use is the one that the extreme of that side falls into.
  const auto agrees = [&](std::span<const int64_t> side, float extreme) {
    const auto last =
        std::find_if(side.rbegin(), side.rend(), [](int64_t count) { return count != 0; });
    const int64_t used = side.rend() - last;
    return used == (extreme > 0 ? bin_of(extreme, power_of_two(-exponent_)) + int64_t{1} : 0);
  };
  const float largest = amax();
  if (valid && largest > 0 && exponent >= kSmallestExponent && exponent <= 127)
    valid = agrees(negative(), -range.min) && agrees(positive(), range.max);
  if (largest > 0) {
    valid = valid && exponent == width_exponent(largest, log2_of(this->bins())) && binned > 0;
  } else {
    valid = valid && exponent == kSmallestExponent && binned == 0;
  }
  VERNIER_CHECK(valid, "the histogram's counts, exponent and range contradict each other");
}

double Histogram::bin_width() const { return std::ldexp(1.0, exponent_); }

float Histogram::amax() const { return std::max(std::fabs(range_.min), std::fabs(range_.max)); }

void Histogram::grow(int32_t exponent) {
  const int32_t shift = std::min(exponent - exponent_, 30);
  if (shift <= 0) return;
  for (int64_t sign = 0; sign < 2; ++sign) {
    int64_t* side = counts_.data() + sign * bins();
    // Bin b goes to b >> shift, never behind b, so one ascending pass can work in place.
    for (int64_t b = 0; b < bins(); ++b) {
      const int64_t count = std::exchange(side[b], 0);
      side[b >> shift] += count;
    }
  }
  exponent_ = exponent;
}

void Histogram::add(const void* values, ElementType type, int64_t count) {
  const Extremes found = cpu::extremes(values, type, count);
  widen({found.min, found.max}, found.finite);
  const float largest = std::max(std::fabs(found.min), std::fabs(found.max));
  if (largest > 0) {
    grow(width_exponent(largest, log2_of(bins())));
    cpu::count_bins(values, type, count, bins(), exponent_, counts_.data());
  }
  finite_ += found.finite;
  zeros_ += found.zeros;
  nans_ += found.nans;
  infinities_ += found.infinities;
}

// A side without finite values says {0, 0}, which must not widen the other's range.
void Histogram::widen(Range range, int64_t finite) {
  if (finite_ == 0) {
    range_ = range;
  } else if (finite > 0) {
    range_ = {std::min(range_.min, range.min), std::max(range_.max, range.max)};
  }
}

void Histogram::merge(const Histogram& other) {
  VERNIER_CHECK(bins() == other.bins(), "histograms of ", bins(), " and ", other.bins(),
                " bins do not merge: gather both with the same number of bins");
  widen(other.range_, other.finite_);
  grow(other.exponent_);
  const int32_t shift = std::min(exponent_ - other.exponent_, 30);
  for (int64_t sign = 0; sign < 2; ++sign) {
    int64_t* side = counts_.data() + sign * bins();
    const int64_t* from = other.counts_.data() + sign * bins();
    if (shift == 0) {
      for (int64_t b = 0; b < bins(); ++b) side[b] += from[b];
    } else {
      for (int64_t b = 0; b < bins(); ++b) side[b >> shift] += from[b];
    }
  }
  finite_ += other.finite_;
  zeros_ += other.zeros_;
  nans_ += other.nans_;
  infinities_ += other.infinities_;
}

bool Histogram::operator==(const Histogram& other) const {
  return counts_ == other.counts_ && exponent_ == other.exponent_ &&
         range_.min == other.range_.min && range_.max == other.range_.max &&
         zeros_ == other.zeros_ && nans_ == other.nans_ && infinities_ == other.infinities_;
}

}  // namespace vernier
