#include <math_constants.h>
#include <vernier/kernels/packed.h>
#include <vernier/kernels/statistics_device.h>

namespace vernier::cuda {
namespace {

// Minima and maxima are gathered in the output buffers themselves, as integers that grow from zero:
// atomicMax then serves both, a memset prepares them, and zero stays free to say "none".
//
// ordered(x) maps finite floats to integers in the same order; neither it nor its complement is
// ever zero.
__device__ uint32_t ordered_from_float(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & kSignBit) ? ~bits : bits | kSignBit;
}

/// The float of an ordered integer; +0.0 for either zero.
__device__ float float_from_ordered(uint32_t ordered) {
  const uint32_t bits = (ordered & kSignBit) ? ordered & ~kSignBit : ~ordered;
  return (bits & ~kSignBit) == 0 ? 0.0f : __uint_as_float(bits);
}

struct Extremes {
  uint32_t low = 0;   // complement of the ordered minimum, 0: none
  uint32_t high = 0;  // ordered maximum, 0: none

  __device__ void include(float x) {
    if (finite_magnitude_bits(x) == 0 && x != 0.0f) return;  // NaN or infinite
    const uint32_t ordered = ordered_from_float(x);
    low = max(low, ~ordered);
    high = max(high, ordered);
  }
  /// The extremes, or `otherwise` where there are none.
  __device__ float min_value(float otherwise) const {
    return low == 0 ? otherwise : float_from_ordered(~low);
  }
  __device__ float max_value(float otherwise) const {
    return high == 0 ? otherwise : float_from_ordered(high);
  }
};

// The larger or smaller of two, NaN where one is: so a NaN is noticed at the end.
__device__ float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
__device__ float min_or_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// Minima and maxima of words of a Pack<T, V>, place by place; of 16-bit types two at a time.
template <typename T>
struct WordExtent {
  using Value = std::conditional_t<kIsBfloat16<T>, __nv_bfloat162,
                                   std::conditional_t<kIsHalf<T>, __half2, float>>;
  Value low, high;

  __device__ WordExtent() {
    if constexpr (sizeof(T) == 4) {
      low = CUDART_INF_F;
      high = -CUDART_INF_F;
    } else {
      const float2 infinities = {CUDART_INF_F, CUDART_INF_F};
      const float2 negative = {-CUDART_INF_F, -CUDART_INF_F};
      if constexpr (kIsBfloat16<T>) {
        low = __float22bfloat162_rn(infinities);
        high = __float22bfloat162_rn(negative);
      } else {
        low = __float22half2_rn(infinities);
        high = __float22half2_rn(negative);
      }
    }
  }

  /// A single 16-bit element counts twice.
  template <typename Word>
  __device__ void include(Word bits) {
    if constexpr (sizeof(T) == 4) {
      low = min_or_nan(low, __uint_as_float(bits));
      high = max_or_nan(high, __uint_as_float(bits));
    } else {
      const uint32_t word = sizeof(Word) == 2 ? bits * 0x10001u : bits;
      Value pair;
      __builtin_memcpy(&pair, &word, sizeof pair);
      low = __hmin2_nan(low, pair);
      high = __hmax2_nan(high, pair);
    }
  }

  __device__ float2 lows() const { return both(low); }
  __device__ float2 highs() const { return both(high); }

 private:
  __device__ static float2 both(Value value) {
    if constexpr (sizeof(T) == 4) {
      return {value, value};
    } else {
      return {to_float(value.x), to_float(value.y)};
    }
  }
};

// Whether a minimum and a maximum gathered by WordExtent met finite values only. (Nothing at all
// leaves +infinity and -infinity, which are not among what it says no to.)
__device__ bool finite_extent(float low, float high) {
  return low > -CUDART_INF_F && high < CUDART_INF_F;
}

// ---- Histogram in one read ----------------------------------------------------------------------
//
// Each block counts at an exponent of its own, that of the largest magnitude it has met, and merges
// its bins in pairs when a larger one comes. At the end the blocks' counts are merged at the
// largest exponent of all. The counts are those of a histogram made at that exponent from the
// start.

/// Above it the counters of a block do not fit its shared memory.
constexpr int32_t kLog2SharedBins = 12;
constexpr int32_t kSharedBins = 1 << kLog2SharedBins;
constexpr int kHistogramThreads = 512;
constexpr int kHistogramBlocks = 2;  // on each multiprocessor

/// What a block met, beside its counts.
struct BlockSummary {
  int32_t exponent;
  uint32_t low, high;  // as in Extremes
  uint32_t counted, nans, infinities;
};

/// A block's counters in shared memory, of positive values and then of negative ones.
class SharedCounters {
 public:
  static constexpr int kZeros = 2 * kSharedBins;  // where zeros go
  static constexpr int kStorage = 2 * kSharedBins + 1;

  __device__ SharedCounters(uint32_t* counters, int32_t) : counters_(counters) {}

  /// From here on bins are 2^exponent wide.
  __device__ void set_exponent(int32_t exponent) { inverse_width_ = power_of_two(-exponent); }

  /// Counts finite values that fit; zeros where nobody looks, as a branch would cost more.
  template <typename T, int W>
  __device__ void count(const Pack<T, W>& x) const {
    const Vector<float, W> values = to_floats(x);
#pragma unroll
    for (const float value : values.values) count(value);
  }

  /// Merges bins in pairs `times` times, in place, by all threads of the block, which are in step
  /// here and afterwards.
  __device__ void widen(int32_t times) const {
    // Merged once for each bin that there is, all are one.
    for (times = min(times, kLog2SharedBins); times > 0; --times) {
#pragma unroll 1
      for (int32_t sign = 0; sign < 2 * kSharedBins; sign += kSharedBins) {
#pragma unroll 1
        for (int32_t base = 0; base < kSharedBins; base += kHistogramThreads) {
          // Pairs lie at or behind what is written, and those of later rounds wholly behind.
          const int32_t bin = base + static_cast<int32_t>(threadIdx.x);
          const uint32_t sum =
              bin < kSharedBins / 2 ? at(sign + 2 * bin) + at(sign + 2 * bin + 1) : 0;
          __syncthreads();
          at(sign + bin) = sum;
        }
      }
      __syncthreads();
    }
  }

  __device__ uint32_t bin(bool negative, int32_t number) const {
    return at(negative ? kSharedBins + number : number);
  }

 private:
  __device__ uint32_t& at(int32_t number) const { return counters_[place(4 * number) / 4]; }

  __device__ void count(float x) const {
    const uint32_t sign = __float_as_uint(x) >> (31 - kLog2SharedBins - 2) & (4 * kSharedBins);
    // place() of four times the bin: of 2^21 + v, rounded towards zero, the lowest bits hold v in
    // quarters; a 32nd of v is the shift.
    const uint32_t quarters =
        __float_as_uint(__fmaf_rz(fabsf(x), inverse_width_, 0x1p21f)) & (4 * kSharedBins - 4);
    const uint32_t shifted =
        __float_as_uint(__fmaf_rz(fabsf(x), inverse_width_ * 0x1p-5f, 0x1p21f)) & 0x7cu;
    const uint32_t place = x != 0.0f ? (quarters | sign) ^ shifted : 4 * kZeros;
    atomicAdd(reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(counters_) + place), 1u);
  }

  // Where a counter lies, in bytes. Floats of few digits hit every so many bins only, which without
  // this would share memory banks.
  __device__ static uint32_t place(uint32_t number_times_4) {
    return number_times_4 ^ (number_times_4 >> 5 & 0x7cu);
  }

  uint32_t* counters_;
  float inverse_width_ = 0;
};

/// The same for bfloat16, a counter for each value of at least a bin's width and one for all below:
/// bins are told apart at the end, and two values at a time find their counters by integer
/// arithmetic on their bits.
class PatternCounters {
 public:
  static constexpr int kSlots = 2048;  // of a sign
  static constexpr int kStorage = 2 * kSlots;

  __device__ PatternCounters(uint32_t* counters, int32_t log2_bins)
      : counters_(counters), values_(log2_bins << kLog2Octave) {}

  __device__ void set_exponent(int32_t exponent) {
    const uint32_t width = static_cast<uint32_t>(exponent + 127) << kLog2Octave;  // its bits
    floor_ = (width - 2) * kBoth;
    minus_floor_ = (-(width - 2) & 0xffffu) * kBoth;
  }

  template <int W>
  __device__ void count(const Pack<__nv_bfloat16, W>& x) const {
#pragma unroll
    for (const uint32_t word : x.words) {
      // Slot 0: below the width; 1: the width; and so on; behind the last value zeros, whose bits
      // less one are the largest.
      const uint32_t from_floor = __viaddmax_u16x2(word & 0x7fff7fffu, ~0u, floor_);
      const uint32_t slot = __viaddmin_u16x2(from_floor, minus_floor_, (values_ + 1) * kBoth);
      const uint32_t place = slot * 4 | (word >> 2 & 4 * kSlots * kBoth);  // in bytes
      add_one(place & 0xffffu);
      if constexpr (W > 1) add_one(place >> 16);
    }
  }

  __device__ void widen(int32_t times) const {
    const int32_t shift = min(times, values_ >> kLog2Octave) << kLog2Octave;
#pragma unroll 1
    for (uint32_t* sign = counters_; sign < counters_ + kStorage; sign += kSlots) {
      uint32_t below = 0;
      for (int32_t slot = 1 + static_cast<int32_t>(threadIdx.x); slot <= shift;
           slot += kHistogramThreads)
        below += sign[slot];
      __syncthreads();
#pragma unroll 1
      for (int32_t base = 1; base <= values_; base += kHistogramThreads) {
        // What is read lies behind all that is written before.
        const int32_t slot = base + static_cast<int32_t>(threadIdx.x);
        const uint32_t value = slot + shift <= values_ ? sign[slot + shift] : 0;
        __syncthreads();
        if (slot <= values_) sign[slot] = value;
      }
      atomicAdd(sign, below);
    }
    __syncthreads();
  }

  __device__ uint32_t bin(bool negative, int32_t number) const {
    const uint32_t* const sign = counters_ + (negative ? kSlots : 0);
    if (number == 0) return sign[0];
    // Octave k of values has 2^k bins.
    const int32_t octave = 31 - __clz(number), place = number - (1 << octave);
    const uint32_t* const first = sign + 1 + (octave << kLog2Octave);
    const int32_t finer = octave - kLog2Octave;
    if (finer >= 0) return (place & ((1 << finer) - 1)) == 0 ? first[place >> finer] : 0;
    uint32_t sum = 0;
    for (int32_t i = place << -finer; i < (place + 1) << -finer; ++i) sum += first[i];
    return sum;
  }

 private:
  static constexpr int kLog2Octave = 7;  // digits behind the leading one
  static constexpr uint32_t kBoth = 0x10001u;
  static_assert((kLog2SharedBins << kLog2Octave) + 2 <= kSlots);
  static_assert(4 * kSlots == 0x8000 >> 2);  // where the sign goes

  __device__ void add_one(uint32_t place) const {
    atomicAdd(reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(counters_) + place), 1u);
  }

  uint32_t* counters_;
  int32_t values_;
  uint32_t floor_ = 0;
  uint32_t minus_floor_ = 0;
};

template <typename T, int V>
__global__ void __launch_bounds__(kHistogramThreads, kHistogramBlocks)
    histogram_kernel(const T* input, int64_t numel, int32_t log2_bins, BlockSummary* summaries,
                     uint32_t* block_counts) {
  using Counters = std::conditional_t<kIsBfloat16<T>, PatternCounters, SharedCounters>;
  __shared__ uint32_t storage[Counters::kStorage];
  __shared__ uint32_t sums[3];
  for (int i = threadIdx.x; i < Counters::kStorage; i += kHistogramThreads) storage[i] = 0;
  if (threadIdx.x < 3) sums[threadIdx.x] = 0;
  __syncthreads();
  Counters counters(storage, log2_bins);
  counters.set_exponent(kSmallestExponent);
  const int32_t bins = 1 << log2_bins;

  int32_t exponent = kSmallestExponent;
  float limit = static_cast<float>(bins) * power_of_two(kSmallestExponent);
  bool empty = true;
  Extremes extremes;
  uint32_t nans = 0, infinities = 0;

  // Takes `count` packs of up to kUnroll; every thread of the block calls.
  const auto take = [&]<int W>(Pack<T, W>(&x)[kUnroll], int count) {
    WordExtent<T> extent;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= count) break;
#pragma unroll
      for (const auto word : x[u].words) extent.include(word);
    }
    const float2 lows = extent.lows(), highs = extent.highs();
    float low = min_or_nan(lows.x, lows.y), high = max_or_nan(highs.x, highs.y);
    if (!finite_extent(low, high)) [[unlikely]] {  // tell apart what enters nothing, and drop it
      low = CUDART_INF_F;
      high = -CUDART_INF_F;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (u >= count) break;
        Vector<float, W> values = to_floats(x[u]);
#pragma unroll
        for (float& value : values.values) {
          const bool is_nan = value != value, is_infinite = fabsf(value) == CUDART_INF_F;
          nans += is_nan;
          infinities += is_infinite;
          if (is_nan || is_infinite) {
            value = 0.0f;
          } else {
            low = fminf(low, value);
            high = fmaxf(high, value);
          }
        }
        x[u] = from_floats<T>(values);
      }
    }
    if (low <= high) {
      extremes.include(low);
      extremes.include(high);
    }

    const float amax = fmaxf(-low, high);
    if (__syncthreads_or(amax >= limit)) {
      const uint32_t largest =
          group_max<kHistogramThreads>(amax > 0.0f ? __float_as_uint(amax) : 0);
      const int32_t wanted = width_exponent(__uint_as_float(largest), log2_bins);
      if (!empty) counters.widen(wanted - exponent);
      exponent = wanted;
      counters.set_exponent(exponent);
      limit = static_cast<float>(bins) * power_of_two(exponent);
    }
    empty = false;

#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= count) break;
      counters.count(x[u]);
    }
  };

  constexpr int64_t kTile = int64_t{kHistogramThreads} * kUnroll * V;  // elements
  const int64_t tiles = numel / kTile;
  Pack<T, V> next[kUnroll];
  const auto load = [&](int64_t tile) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      next[u] = load_pack<V>(input + tile * kTile + (u * kHistogramThreads + threadIdx.x) * V);
  };
  int64_t tile = blockIdx.x;
  if (tile < tiles) load(tile);
  while (tile < tiles) {
    Pack<T, V> x[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) x[u] = next[u];
    tile += gridDim.x;
    if (tile < tiles) load(tile);  // on their way while the others are counted
    take(x, kUnroll);
  }
  if (tile == tiles) {  // what is left is the next block's
    for (int64_t base = tiles * kTile; base < numel; base += kHistogramThreads * kUnroll) {
      Pack<T, 1> x[kUnroll];
      int count = 0;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t i = base + u * kHistogramThreads + threadIdx.x;
        if (i >= numel) break;
        x[u] = load_pack<1>(input + i);
        count = u + 1;
      }
      take(x, count);
    }
  }

  __syncthreads();
  uint32_t* const out = block_counts + (int64_t{blockIdx.x} << (log2_bins + 1));
  uint32_t counted = 0;
  for (int32_t i = threadIdx.x; i < 2 * bins; i += kHistogramThreads) {
    const uint32_t value = counters.bin(i < bins, i & (bins - 1));
    counted += value;
    out[i] = value;
  }
  const uint32_t low = group_max<kHistogramThreads>(extremes.low);
  const uint32_t high = group_max<kHistogramThreads>(extremes.high);
  const uint32_t mine[3] = {counted, nans, infinities};
  for (int k = 0; k < 3; ++k) {
    const uint32_t sum = __reduce_add_sync(kFullWarp, mine[k]);
    if (threadIdx.x % kWarp == 0 && sum > 0) atomicAdd(sums + k, sum);
  }
  __syncthreads();
  if (threadIdx.x == 0) summaries[blockIdx.x] = {exponent, low, high, sums[0], sums[1], sums[2]};
}

constexpr int kMergeThreads = 256;
constexpr int kMergeCounters = 32;  // of a block; as many threads as go into it share a counter

// The blocks' counts at the largest of their exponents; range and tallies.
__global__ void __launch_bounds__(kMergeThreads)
    merge_histograms_kernel(const BlockSummary* summaries, const uint32_t* block_counts, int blocks,
                            int64_t numel, int32_t log2_bins, int64_t* counts, float* range,
                            int64_t* tallies) {
  uint32_t biased = 0;
  for (int b = threadIdx.x; b < blocks; b += kMergeThreads)
    biased = max(biased, static_cast<uint32_t>(summaries[b].exponent - kSmallestExponent));
  const int32_t exponent =
      static_cast<int32_t>(group_max<kMergeThreads>(biased)) + kSmallestExponent;

  const int32_t bins = 1 << log2_bins;
  const int32_t counter = blockIdx.x * kMergeCounters + threadIdx.x % kMergeCounters;
  const int32_t bin = counter & (bins - 1);
  unsigned long long sum = 0;
  if (counter < 2 * bins) {
    constexpr int kAtOnce = 8, kGroups = kMergeThreads / kMergeCounters;
    for (int base = threadIdx.x / kMergeCounters; base < blocks; base += kAtOnce * kGroups) {
      // Most blocks have the largest exponent: one counter of theirs is one of all, and the loads
      // of these need not wait for each other.
      const uint32_t* theirs[kAtOnce];
      int32_t first[kAtOnce], shift[kAtOnce];
      uint32_t value[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int b = min(base + j * kGroups, blocks - 1);
        shift[j] = min(exponent - summaries[b].exponent, log2_bins);
        theirs[j] = block_counts + (int64_t{b} << (log2_bins + 1)) + counter - bin;
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        first[j] = base + j * kGroups < blocks ? bin << shift[j] : bins;
        value[j] = first[j] < bins ? theirs[j][first[j]] : 0;
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        sum += value[j];
        const int32_t end = min(first[j] + (1 << shift[j]), bins);
        for (int32_t i = first[j] + 1; i < end; ++i) sum += theirs[j][i];
      }
    }
  }
  __shared__ unsigned long long shared[kMergeThreads];
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x < kMergeCounters && counter < 2 * bins) {
    for (int t = threadIdx.x + kMergeCounters; t < kMergeThreads; t += kMergeCounters)
      sum += shared[t];
    counts[counter] = static_cast<int64_t>(sum);
  }
  if (blockIdx.x != 0) return;

  Extremes extremes;
  __shared__ unsigned long long totals[3];
  if (threadIdx.x < 3) totals[threadIdx.x] = 0;
  __syncthreads();
  for (int b = threadIdx.x; b < blocks; b += kMergeThreads) {
    const BlockSummary summary = summaries[b];
    extremes.low = max(extremes.low, summary.low);
    extremes.high = max(extremes.high, summary.high);
    atomicAdd(totals, static_cast<unsigned long long>(summary.counted));
    atomicAdd(totals + 1, static_cast<unsigned long long>(summary.nans));
    atomicAdd(totals + 2, static_cast<unsigned long long>(summary.infinities));
  }
  extremes.low = group_max<kMergeThreads>(extremes.low);
  extremes.high = group_max<kMergeThreads>(extremes.high);
  __syncthreads();
  if (threadIdx.x == 0) {
    range[0] = extremes.min_value(0.0f);
    range[1] = extremes.max_value(0.0f);
    tallies[0] = exponent;
    const int64_t apart = static_cast<int64_t>(totals[1] + totals[2]);
    tallies[1] = numel - apart - static_cast<int64_t>(totals[0]);
    tallies[2] = static_cast<int64_t>(totals[1]);
    tallies[3] = static_cast<int64_t>(totals[2]);
  }
}

unsigned histogram_blocks(int64_t numel, int64_t bins) {
  // Clearing and merging the counters costs a block as much as some thousand values.
  const int64_t worth = std::max<int64_t>(divide_up(numel, 8 * bins), 1);
  const unsigned blocks =
      grid_size(divide_up(numel, kHistogramThreads * kUnroll), kHistogramBlocks);
  // No 32-bit counter may overflow, were all values of a block to fall in one bin.
  return static_cast<unsigned>(
      std::max(std::min<int64_t>(blocks, worth), divide_up(numel, int64_t{1} << 31)));
}

template <typename T>
void run_shared_histogram(const T* input, int64_t numel, int32_t log2_bins, int64_t* counts,
                          float* range, int64_t* tallies, void* scratch, void* stream) {
  constexpr const char* kName = "histogram";
  const int64_t bins = int64_t{1} << log2_bins;
  const unsigned blocks = histogram_blocks(numel, bins);
  auto* const block_counts = static_cast<uint32_t*>(scratch);
  auto* const summaries = reinterpret_cast<BlockSummary*>(block_counts + 2 * bins * blocks);
  with_flag(is_aligned(input, 16), [&](auto aligned) {
    constexpr int V = aligned.value ? kVectorSize<T> : 1;
    launch(kName, histogram_kernel<T, V>, blocks, kHistogramThreads, stream, input, numel,
           log2_bins, summaries, block_counts);
  });
  launch(kName, merge_histograms_kernel, static_cast<unsigned>(divide_up(2 * bins, kMergeCounters)),
         kMergeThreads, stream, static_cast<const BlockSummary*>(summaries),
         static_cast<const uint32_t*>(block_counts), static_cast<int>(blocks), numel, log2_bins,
         counts, range, tallies);
}

// ---- Histogram of more bins, in two reads -------------------------------------------------------

constexpr int kExtremesThreads = 256;

/// Adds the block's sum of `count` to *target.
__device__ void add_block_sum(uint32_t count, unsigned long long* shared, int64_t* target) {
  if (threadIdx.x == 0) *shared = 0;
  __syncthreads();
  const uint32_t warp_sum = __reduce_add_sync(kFullWarp, count);
  if (threadIdx.x % kWarp == 0 && warp_sum > 0)
    atomicAdd(shared, static_cast<unsigned long long>(warp_sum));
  __syncthreads();
  if (threadIdx.x == 0 && *shared > 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(target), *shared);
  __syncthreads();
}

// First pass: extremes into `range` (as integers), zeros, NaNs and infinities into tallies[1..3];
// all start as zero.
template <typename T, int V>
__global__ void __launch_bounds__(kExtremesThreads)
    extremes_kernel(const T* input, int64_t numel, uint32_t* range, int64_t* tallies) {
  Extremes extremes;
  uint32_t zeros = 0, nans = 0, infinities = 0;
  for_each_element<V>(input, numel, [&](T element) {
    const float x = to_float(element);
    const uint32_t magnitude = __float_as_uint(x) & ~kSignBit;
    const uint32_t ordered = ordered_from_float(x);
    const bool finite = magnitude < kInfinityBits;
    extremes.low = max(extremes.low, finite ? ~ordered : 0);
    extremes.high = max(extremes.high, finite ? ordered : 0);
    zeros += magnitude == 0;
    nans += magnitude > kInfinityBits;
    infinities += magnitude == kInfinityBits;
  });
  __shared__ unsigned long long sum;
  const uint32_t low = group_max<kExtremesThreads>(extremes.low);
  const uint32_t high = group_max<kExtremesThreads>(extremes.high);
  if (threadIdx.x == 0) {
    atomicMax(range, low);
    atomicMax(range + 1, high);
  }
  add_block_sum(zeros, &sum, tallies + 1);
  add_block_sum(nans, &sum, tallies + 2);
  add_block_sum(infinities, &sum, tallies + 3);
}

// Between the passes: integers to floats in place, and the exponent that the largest magnitude asks
// for.
__global__ void exponent_kernel(float* range, int64_t* tallies, int32_t log2_bins) {
  const Extremes extremes{__float_as_uint(range[0]), __float_as_uint(range[1])};
  const float low = extremes.min_value(0.0f), high = extremes.max_value(0.0f);
  const float amax = fmaxf(fabsf(low), fabsf(high));
  range[0] = low;
  range[1] = high;
  tallies[0] = amax > 0.0f ? width_exponent(amax, log2_bins) : kSmallestExponent;
}

constexpr int kCountThreads = 512;

/// The counter of a value, negative ones first; -1 for zeros, NaNs and infinities.
__device__ int32_t counter_of(float x, float inverse_width, int32_t bins) {
  const uint32_t magnitude = finite_magnitude_bits(x);
  if (magnitude == 0) return -1;
  return bin_of(__uint_as_float(magnitude), inverse_width) + (signbit(x) ? 0 : bins);
}

// Second pass. counts[2 * bins] starts as zeros.
template <typename T, int V>
__global__ void __launch_bounds__(kCountThreads)
    count_kernel(const T* input, int64_t numel, int32_t bins, const int64_t* tallies,
                 unsigned long long* counts) {
  const float inverse_width = power_of_two(-static_cast<int32_t>(tallies[0]));
  for_each_element<V>(input, numel, [&](T element) {
    const int32_t counter = counter_of(to_float(element), inverse_width, bins);
    if (counter >= 0) atomicAdd(counts + counter, 1ull);
  });
}

template <typename T>
void run_histogram(const T* input, int64_t numel, int64_t bins, int64_t* counts, float* range,
                   int64_t* tallies, void* scratch, void* stream) {
  constexpr const char* kName = "histogram";
  int32_t log2_bins = 0;
  while ((int64_t{1} << log2_bins) < bins) ++log2_bins;
  if (bins <= kSharedBins)
    return run_shared_histogram(input, numel, log2_bins, counts, range, tallies, scratch, stream);

  const cudaStream_t cuda_stream = as_stream(stream);
  check(cudaMemsetAsync(counts, 0, 2 * bins * sizeof(int64_t), cuda_stream), kName);
  check(cudaMemsetAsync(range, 0, 2 * sizeof(float), cuda_stream), kName);
  check(cudaMemsetAsync(tallies, 0, 4 * sizeof(int64_t), cuda_stream), kName);
  with_flag(is_aligned(input, 16), [&](auto aligned) {
    constexpr int V = aligned.value ? kVectorSize<T> : 1;
    if (numel > 0) {
      const int64_t tiles = divide_up(numel, kExtremesThreads * kUnroll * V);
      launch(kName, extremes_kernel<T, V>, grid_size(tiles, 8), kExtremesThreads, stream, input,
             numel, reinterpret_cast<uint32_t*>(range), tallies);
    }
    launch(kName, exponent_kernel, 1, 1, stream, range, tallies, log2_bins);
    if (numel <= 0) return;
    const int64_t tiles = divide_up(numel, kCountThreads * kUnroll * V);
    launch(kName, count_kernel<T, V>, grid_size(tiles, 4), kCountThreads, stream, input, numel,
           static_cast<int32_t>(bins), static_cast<const int64_t*>(tallies),
           reinterpret_cast<unsigned long long*>(counts));
  });
}

// ---- Channel ranges -----------------------------------------------------------------------------

constexpr int kChannelThreads = 256;
constexpr int kChannelBlocks = 4;  // on each multiprocessor, all at once

// Threads (x, y) of a block take V columns and every so many rows; the block's rows meet in shared
// memory, the grid's in `range`, as integers that start as zeros: [0, columns) minima, then maxima.
template <typename T, int V>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    channel_extremes_kernel(const T* input, int64_t rows, int64_t columns, uint32_t* range) {
  __shared__ uint32_t lows[V][kChannelThreads], highs[V][kChannelThreads];
  const int64_t column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * V;
  const int64_t first = int64_t{blockIdx.y} * blockDim.y + threadIdx.y;
  const int64_t stride = int64_t{gridDim.y} * blockDim.y;
  constexpr int kWords = Pack<T, V>::kWords;
  Extremes mine[V];
  if (column < columns) {
    WordExtent<T> extents[kWords];
    for_each_row_pack<V>(input + column, columns, first, rows, stride, [&](const Pack<T, V>& x) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) extents[w].include(x.words[w]);
    });
    bool all_finite = true;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const WordExtent<T>& extent = extents[j * kWords / V];
      const float2 low_pair = extent.lows(), high_pair = extent.highs();
      const bool second = j % (V / kWords) == 1;
      const float low = second ? low_pair.y : low_pair.x;
      const float high = second ? high_pair.y : high_pair.x;
      all_finite &= finite_extent(low, high);
      if (low <= high) {
        mine[j].include(low);
        mine[j].include(high);
      }
    }
    if (!all_finite) [[unlikely]] {  // once more, with care
#pragma unroll
      for (Extremes& extremes : mine) extremes = Extremes();
#pragma unroll 1
      for (int64_t row = first; row < rows; row += stride) {
        const Vector<float, V> x = to_floats(load_pack<V>(input + row * columns + column));
#pragma unroll
        for (int j = 0; j < V; ++j) mine[j].include(x[j]);
      }
    }
  }
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    lows[j][thread] = mine[j].low;
    highs[j][thread] = mine[j].high;
  }
  __syncthreads();

  // Row 0 of the threads, V columns each, would leave the others idle: one thread a column instead.
  for (int local = thread; local < static_cast<int>(blockDim.x) * V; local += kChannelThreads) {
    const int64_t target = int64_t{blockIdx.x} * blockDim.x * V + local;
    if (target >= columns) break;
    uint32_t low = 0, high = 0;
    for (unsigned y = 0; y < blockDim.y; ++y) {
      low = max(low, lows[local % V][y * blockDim.x + local / V]);
      high = max(high, highs[local % V][y * blockDim.x + local / V]);
    }
    atomicMax(range + target, low);
    atomicMax(range + columns + target, high);
  }
}

__global__ void __launch_bounds__(kChannelThreads)
    channel_floats_kernel(float* range, int64_t columns) {
  for (int64_t c = int64_t{blockIdx.x} * kChannelThreads + threadIdx.x; c < columns;
       c += int64_t{gridDim.x} * kChannelThreads) {
    const Extremes extremes{__float_as_uint(range[c]), __float_as_uint(range[columns + c])};
    range[c] = extremes.min_value(CUDART_INF_F);
    range[columns + c] = extremes.max_value(-CUDART_INF_F);
  }
}

template <typename T>
void run_channel_range(const T* input, int64_t rows, int64_t columns, float* range, void* stream) {
  constexpr const char* kName = "channel_range";
  if (columns <= 0) return;
  check(cudaMemsetAsync(range, 0, 2 * columns * sizeof(float), as_stream(stream)), kName);
  constexpr int kVector = kVectorSize<T>;
  with_flag(columns % kVector == 0 && is_aligned(input, 16), [&](auto aligned) {
    if (rows <= 0) return;
    constexpr int V = aligned.value ? kVector : 1;
    const int64_t vectors = columns / V;
    unsigned width = 1;  // a power of two, so that few columns leave no thread without work
    while (width < kWarp && width < vectors) width *= 2;
    const dim3 block(width, kChannelThreads / width);
    const int64_t tiles = divide_up(vectors, width);
    // All blocks at once; each should see some rows per thread, to be worth its atomics.
    const int64_t fitting =
        std::clamp<int64_t>(int64_t{multiprocessors()} * kChannelBlocks / tiles, 1, 65535);
    const int64_t parts = std::clamp<int64_t>(divide_up(rows, int64_t{block.y} * 16), 1, fitting);
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(parts));
    launch(kName, channel_extremes_kernel<T, V>, grid, block, stream, input, rows, columns,
           reinterpret_cast<uint32_t*>(range));
  });
  launch(kName, channel_floats_kernel, grid_size(divide_up(columns, kChannelThreads), 8),
         kChannelThreads, stream, range, columns);
}

}  // namespace

int64_t histogram_scratch(int64_t numel, int64_t bins) {
  if (bins > kSharedBins) return 0;
  const int64_t each = 2 * bins * sizeof(uint32_t) + sizeof(BlockSummary);
  return each * histogram_blocks(numel, bins);
}

void histogram(const void* input, ElementType type, int64_t numel, int64_t bins, int64_t* counts,
               float* range, int64_t* tallies, void* scratch, void* stream) {
  with_element_type(type, [&]<typename T>(T*) {
    run_histogram(static_cast<const T*>(input), numel, bins, counts, range, tallies, scratch,
                  stream);
  });
}

void channel_range(const void* input, ElementType type, int64_t rows, int64_t columns, float* range,
                   void* stream) {
  with_element_type(type, [&]<typename T>(T*) {
    run_channel_range(static_cast<const T*>(input), rows, columns, range, stream);
  });
}

}  // namespace vernier::cuda
