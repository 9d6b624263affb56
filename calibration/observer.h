// Fills the statistics of one site from the tensors that pass it.
#pragma once

#include <ATen/core/Tensor.h>
#include <vernier/calibration/histogram.h>

#include <array>
#include <memory>
#include <mutex>
#include <vector>

namespace vernier {

/// What is known of the values at one site. Like Histogram a function of the multiset of values
/// alone.
struct SiteStatistics {
  Histogram histogram;
  std::vector<Range> channels;  ///< extremes of each index of the last axis, {+inf, -inf} without a
                                ///< finite value; empty until something was seen

  /// Adds another site's values. Throws Error when the number of channels or bins differs.
  void merge(const SiteStatistics& other);
  bool operator==(const SiteStatistics&) const;
};

/// Gathers SiteStatistics. Safe to call from several threads at once, which do not wait for each
/// other: they gather apart, and what is gathered does not depend on who came first.
class Observer {
 public:
  /// Adds a float32, float16 or bfloat16 tensor of any shape on any device; the last axis holds the
  /// channels, or all is one channel where the last axis means something else and may change.
  /// Throws Error when the number of channels changes.
  void observe(const at::Tensor& values, bool last_axis_is_channels = true);

  /// Adds what another observer saw, e.g. before a program was stopped.
  void add(const SiteStatistics& statistics);

  /// Everything seen so far, by all threads. Throws Error when they saw different numbers of
  /// channels.
  SiteStatistics statistics() const;
  void reset();

 private:
  // A share of the statistics. Threads that count into one histogram pull its memory from core to
  // core, which costs more than the counting, so each has a slot by its number; those beyond the
  // last double up.
  struct Slot {
    std::mutex mutex;
    std::unique_ptr<SiteStatistics>
        statistics;  // made when first used: most observers see one thread
  };
  mutable std::array<Slot, 32> slots_;
};

}  // namespace vernier
