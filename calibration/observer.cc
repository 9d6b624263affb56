#include <vernier/calibration/observer.h>
#include <vernier/kernels/dispatch.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/statistics.h>

#include <algorithm>
#include <atomic>

namespace vernier {
namespace {

std::vector<Range> channels_of(const at::Tensor& values) {
  const at::Tensor bounds = channel_range(values).cpu();
  const int64_t columns = bounds.size(1);
  const float* bound = bounds.const_data_ptr<float>();
  std::vector<Range> channels;
  channels.reserve(columns);
  for (int64_t c = 0; c < columns; ++c) channels.push_back({bound[c], bound[columns + c]});
  return channels;
}

Histogram histogram_of(const at::Tensor& values) {
  const HistogramTensors parts = histogram(values);
  const at::Tensor counts = parts.counts.cpu(), range = parts.range.cpu(),
                   tallies = parts.tallies.cpu();
  const int64_t* count = counts.const_data_ptr<int64_t>();
  const int64_t* tally = tallies.const_data_ptr<int64_t>();
  const float* extreme = range.const_data_ptr<float>();
  return Histogram({count, count + counts.numel()}, static_cast<int32_t>(tally[0]),
                   {extreme[0], extreme[1]}, tally[1], tally[2], tally[3]);
}

void merge_channels(std::vector<Range>& into, const std::vector<Range>& from) {
  if (into.empty()) {
    into = from;
    return;
  }
  VERNIER_CHECK(from.empty() || into.size() == from.size(), "statistics of ", into.size(), " and ",
                from.size(), " channels do not merge");
  for (size_t c = 0; c < from.size(); ++c)
    into[c] = {std::min(into[c].min, from[c].min), std::max(into[c].max, from[c].max)};
}

// Numbers threads from 0 in the order they first observe something.
size_t thread_number() {
  static std::atomic<size_t> next{0};
  thread_local const size_t mine = next++;
  return mine;
}

}  // namespace

void SiteStatistics::merge(const SiteStatistics& other) {
  merge_channels(channels, other.channels);
  histogram.merge(other.histogram);
}

bool SiteStatistics::operator==(const SiteStatistics& other) const {
  return histogram == other.histogram &&
         std::equal(channels.begin(), channels.end(), other.channels.begin(), other.channels.end(),
                    [](Range a, Range b) { return a.min == b.min && a.max == b.max; });
}

void Observer::observe(const at::Tensor& values, bool last_axis_is_channels) {
  if (values.numel() == 0) return;
  const at::Tensor x = values.detach().contiguous();
  const ElementType type = element_type_of(x.scalar_type(), "the observed tensor");
  std::vector<Range> channels;
  if (last_axis_is_channels) channels = channels_of(x);
  Slot& slot = slots_[thread_number() % slots_.size()];
  const std::lock_guard lock(slot.mutex);
  if (!slot.statistics) slot.statistics = std::make_unique<SiteStatistics>();
  if (x.is_cpu()) {
    // Counted straight into the result: for small tensors a histogram of their own would cost more
    // than they do.
    slot.statistics->histogram.add(x.const_data_ptr(), type, x.numel());
  } else {
    slot.statistics->histogram.merge(histogram_of(x));
  }
  if (!last_axis_is_channels) channels.push_back(slot.statistics->histogram.range());
  merge_channels(slot.statistics->channels, channels);
}

void Observer::add(const SiteStatistics& statistics) {
  Slot& slot = slots_[thread_number() % slots_.size()];
  const std::lock_guard lock(slot.mutex);
  if (!slot.statistics) slot.statistics = std::make_unique<SiteStatistics>();
  slot.statistics->merge(statistics);
}

SiteStatistics Observer::statistics() const {
  SiteStatistics sum;
  for (Slot& slot : slots_) {
    const std::lock_guard lock(slot.mutex);
    if (slot.statistics) sum.merge(*slot.statistics);
  }
  return sum;
}

void Observer::reset() {
  for (Slot& slot : slots_) {
    const std::lock_guard lock(slot.mutex);
    slot.statistics.reset();
  }
}

}  // namespace vernier
