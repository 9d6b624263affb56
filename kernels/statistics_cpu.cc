#include <vernier/kernels/element_cpu.h>
#include <vernier/kernels/parallel.h>
#include <vernier/kernels/statistics_device.h>

#include <bit>
#include <limits>
#include <mutex>
#include <vector>

namespace vernier::cpu {
namespace {

constexpr uint32_t kSignBit = 0x80000000u;
constexpr uint32_t kInfinityBits = 0x7f800000u;

// Order-preserving map of finite floats to unsigned integers, so that minima and maxima are integer
// operations, which vectorize and know no NaN.
inline uint32_t ordered_from_bits(uint32_t bits) {
  return (bits & kSignBit) ? ~bits : bits | kSignBit;
}
float float_from_ordered(uint32_t ordered) {
  return float_from_bits((ordered & kSignBit) ? ordered & ~kSignBit : ~ordered);
}

// Extremes as ordered integers while they are gathered.
struct Gathered {
  uint32_t low = std::numeric_limits<uint32_t>::max();
  uint32_t high = 0;
  int64_t zeros = 0;
  int64_t nans = 0;
  int64_t infinities = 0;

  void merge(const Gathered& other) {
    low = std::min(low, other.low);
    high = std::max(high, other.high);
    zeros += other.zeros;
    nans += other.nans;
    infinities += other.infinities;
  }
  bool any() const { return low <= high; }
  // + 0.0f turns -0.0 into +0.0, so that equal sets give equal bits.
  float min() const { return float_from_ordered(low) + 0.0f; }
  float max() const { return float_from_ordered(high) + 0.0f; }
};

VERNIER_SIMD void gather(const float* x, int64_t n, Gathered& result) {
  uint32_t low = std::numeric_limits<uint32_t>::max(), high = 0;
  int32_t zeros = 0, nans = 0, infinities = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(x[i]);
    const uint32_t magnitude = bits & ~kSignBit;
    const uint32_t ordered = ordered_from_bits(bits);
    const bool finite = magnitude < kInfinityBits;
    const uint32_t for_low = finite ? ordered : std::numeric_limits<uint32_t>::max();
    const uint32_t for_high = finite ? ordered : 0;
    low = low < for_low ? low : for_low;
    high = high > for_high ? high : for_high;
    zeros += magnitude == 0;
    nans += magnitude > kInfinityBits;
    infinities += magnitude == kInfinityBits;
  }
  result.merge({low, high, zeros, nans, infinities});
}

// Bins of n <= kBlock values: [0, bins) negative, [bins, 2 * bins) positive; -1 for what stands
// apart.
VERNIER_SIMD void bins_of(const float* x, int64_t n, float inverse_width, int32_t bins,
                          int32_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(x[i]);
    const uint32_t magnitude = bits & ~kSignBit;
    const bool counted = magnitude != 0 && magnitude < kInfinityBits;
    const float value = std::bit_cast<float>(counted ? magnitude : 0u);
    const int32_t bin = bin_of(value, inverse_width) + ((bits & kSignBit) ? 0 : bins);
    out[i] = counted ? bin : -1;
  }
}

constexpr int64_t kGrain = 64 * kBlock;

}  // namespace

Extremes extremes(const void* input, ElementType type, int64_t numel) {
  Gathered all;
  with_element_type(type, [&]<typename T>(T*) {
    const T* x = static_cast<const T*>(input);
    std::mutex mutex;
    parallel_for(numel, kGrain, [&](int64_t begin, int64_t end) {
      FloatBlock block;
      Gathered mine;
      for (int64_t i = begin; i < end; i += kBlock) {
        const int64_t n = std::min(kBlock, end - i);
        gather(load_block(x + i, n, block), n, mine);
      }
      const std::lock_guard lock(mutex);
      all.merge(mine);
    });
  });
  return {all.any() ? all.min() : 0.0f,
          all.any() ? all.max() : 0.0f,
          numel - all.nans - all.infinities,
          all.zeros,
          all.nans,
          all.infinities};
}

void count_bins(const void* input, ElementType type, int64_t numel, int64_t bins, int32_t exponent,
                int64_t* counts) {
  const float inverse_width = power_of_two(-exponent);
  with_element_type(type, [&]<typename T>(T*) {
    const T* x = static_cast<const T*>(input);
    const auto count_range = [&](int64_t begin, int64_t end, int64_t* into) {
      FloatBlock block;
      std::array<int32_t, kBlock> bin;
      for (int64_t i = begin; i < end; i += kBlock) {
        const int64_t n = std::min(kBlock, end - i);
        bins_of(load_block(x + i, n, block), n, inverse_width, static_cast<int32_t>(bins),
                bin.data());
        for (int64_t j = 0; j < n; ++j)
          if (bin[j] >= 0) ++into[bin[j]];
      }
    };
    std::mutex mutex;
    parallel_for(numel, kGrain, [&](int64_t begin, int64_t end) {
      if (end - begin == numel) return count_range(begin, end, counts);
      std::vector<int64_t> mine(2 * bins);
      count_range(begin, end, mine.data());
      const std::lock_guard lock(mutex);
      for (int64_t b = 0; b < 2 * bins; ++b) counts[b] += mine[b];
    });
  });
}

void histogram(const void* input, ElementType type, int64_t numel, int64_t bins, int64_t* counts,
               float* range, int64_t* tallies) {
  const Extremes found = extremes(input, type, numel);
  const float amax = std::max(std::fabs(found.min), std::fabs(found.max));
  const int32_t log2_bins = std::countr_zero(static_cast<uint64_t>(bins));
  const int32_t exponent = amax > 0 ? width_exponent(amax, log2_bins) : kSmallestExponent;
  std::fill_n(counts, 2 * bins, 0);
  if (amax > 0) count_bins(input, type, numel, bins, exponent, counts);
  range[0] = found.min;
  range[1] = found.max;
  tallies[0] = exponent;
  tallies[1] = found.zeros;
  tallies[2] = found.nans;
  tallies[3] = found.infinities;
}

namespace {

VERNIER_SIMD void update_channels(const float* x, int64_t n, uint32_t* low, uint32_t* high) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(x[i]);
    const uint32_t ordered = ordered_from_bits(bits);
    const bool finite = (bits & ~kSignBit) < kInfinityBits;
    const uint32_t for_low = finite ? ordered : std::numeric_limits<uint32_t>::max();
    const uint32_t for_high = finite ? ordered : 0;
    low[i] = low[i] < for_low ? low[i] : for_low;
    high[i] = high[i] > for_high ? high[i] : for_high;
  }
}

}  // namespace

void channel_range(const void* input, ElementType type, int64_t rows, int64_t columns,
                   float* range) {
  with_element_type(type, [&]<typename T>(T*) {
    const T* x = static_cast<const T*>(input);
    std::vector<uint32_t> low(columns, std::numeric_limits<uint32_t>::max()), high(columns, 0);
    // Columns are shared out, so threads never write to the same channel.
    const int64_t grain = std::max<int64_t>(kBlock, 64 * kBlock / std::max<int64_t>(rows, 1));
    parallel_for(columns, grain, [&](int64_t begin, int64_t end) {
      FloatBlock block;
      for (int64_t c = begin; c < end; c += kBlock) {
        const int64_t n = std::min(kBlock, end - c);
        for (int64_t row = 0; row < rows; ++row)
          update_channels(load_block(x + row * columns + c, n, block), n, &low[c], &high[c]);
      }
    });
    for (int64_t c = 0; c < columns; ++c) {
      const Gathered channel{low[c], high[c], 0, 0, 0};
      range[c] = channel.any() ? channel.min() : std::numeric_limits<float>::infinity();
      range[columns + c] = channel.any() ? channel.max() : -std::numeric_limits<float>::infinity();
    }
  });
}

}  // namespace vernier::cpu
