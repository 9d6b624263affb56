// The statistics of one site: a histogram that merges without loss, whatever order its values came
// in.
#pragma once

#include <vernier/kernels/element_type.h>
#include <vernier/kernels/histogram_bins.h>
#include <vernier/kernels/scheme.h>

#include <cstdint>
#include <span>
#include <vector>

namespace vernier {

/// Counts by magnitude and sign in bins of width 2^exponent, the smallest power of two for which
/// every finite value seen falls inside. When a larger one comes, bins are merged in pairs. The
/// state is a function of the multiset of values alone, so any order, batch size or split into
/// shards gives the same bits, and shards merge by addition. Counts are int64. Zeros, NaNs and
/// infinities are counted apart and have no bin.
class Histogram {
 public:
  /// `bins` of each sign, a power of two. Throws Error otherwise.
  explicit Histogram(int64_t bins);
  Histogram() : Histogram(kHistogramBins) {}

  /// Restores a saved state; counts [2 * bins]: negative, then positive values. Throws Error when
  /// the parts contradict each other (a negative count, a range outside the bins, an exponent that
  /// is not the smallest).
  Histogram(std::vector<int64_t> counts, int32_t exponent, Range range, int64_t zeros, int64_t nans,
            int64_t infinities);

  /// Adds `count` values in CPU memory.
  void add(const void* values, ElementType type, int64_t count);
  void add(std::span<const float> values) {
    add(values.data(), ElementType::f32, static_cast<int64_t>(values.size()));
  }

  /// Adds another histogram's values. Throws Error when the number of bins differs.
  void merge(const Histogram& other);

  int64_t bins() const { return static_cast<int64_t>(counts_.size()) / 2; }
  int32_t exponent() const { return exponent_; }
  double bin_width() const;
  std::span<const int64_t> negative() const { return {counts_.data(), counts_.size() / 2}; }
  std::span<const int64_t> positive() const {
    return {counts_.data() + counts_.size() / 2, counts_.size() / 2};
  }
  std::span<const int64_t> counts() const { return counts_; }

  /// Exact extremes over finite values; {0, 0} where there are none.
  Range range() const { return range_; }
  float amax() const;
  int64_t zeros() const { return zeros_; }
  int64_t nans() const { return nans_; }
  int64_t infinities() const { return infinities_; }
  /// Finite values, zeros included.
  int64_t finite() const { return finite_; }
  /// Everything seen.
  int64_t total() const { return finite() + nans_ + infinities_; }

  bool operator==(const Histogram&) const;

 private:
  void grow(int32_t exponent);
  void widen(Range range, int64_t finite);

  std::vector<int64_t> counts_;
  int32_t exponent_ = kSmallestExponent;
  Range range_;
  int64_t finite_ = 0;
  int64_t zeros_ = 0;
  int64_t nans_ = 0;
  int64_t infinities_ = 0;
};

}  // namespace vernier
