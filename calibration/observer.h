// Fills the statistics of one site from the tensors that pass it.
#pragma once

#include <ATen/core/Tensor.h>
#include <vernier/calibration/histogram.h>

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

/// Gathers SiteStatistics. Safe to call from several threads at once: tensors are counted apart and
/// merged under a lock, and the result does not depend on who came first.
class Observer {
 public:
  /// Adds a float32, float16 or bfloat16 tensor of any shape on any device; the last axis holds the
  /// channels. Throws Error when the number of channels changes.
  void observe(const at::Tensor& values);

  SiteStatistics statistics() const;
  void reset();

 private:
  mutable std::mutex mutex_;
  SiteStatistics statistics_;
};

}  // namespace vernier
