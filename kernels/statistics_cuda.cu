#include <math_constants.h>
#include <vernier/kernels/launch.h>
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

// ---- Histogram ----------------------------------------------------------------------------------

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
/// Above it the counters of a block do not fit its shared memory, and every value is counted in
/// global memory.
constexpr int64_t kMaxSharedBins = 4096;

/// The counter of a value, negative ones first; -1 for zeros, NaNs and infinities.
__device__ int32_t counter_of(float x, float inverse_width, int32_t bins) {
  const uint32_t magnitude = finite_magnitude_bits(x);
  if (magnitude == 0) return -1;
  return bin_of(__uint_as_float(magnitude), inverse_width) + (signbit(x) ? 0 : bins);
}

// Second pass. counts[2 * bins] starts as zeros.
template <typename T, int V, bool kShared>
__global__ void __launch_bounds__(kCountThreads)
    count_kernel(const T* input, int64_t numel, int32_t bins, const int64_t* tallies,
                 unsigned long long* counts) {
  const float inverse_width = power_of_two(-static_cast<int32_t>(tallies[0]));
  if constexpr (kShared) {
    // 32 bits suffice: the launch gives no block more than 2^31 values and a tile.
    __shared__ uint32_t mine[2 * kMaxSharedBins];
    for (int i = threadIdx.x; i < 2 * bins; i += kCountThreads) mine[i] = 0;
    __syncthreads();
    for_each_element<V>(input, numel, [&](T element) {
      const int32_t counter = counter_of(to_float(element), inverse_width, bins);
      if (counter >= 0) atomicAdd(mine + counter, 1u);
    });
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * bins; i += kCountThreads)
      if (mine[i] > 0) atomicAdd(counts + i, static_cast<unsigned long long>(mine[i]));
  } else {
    for_each_element<V>(input, numel, [&](T element) {
      const int32_t counter = counter_of(to_float(element), inverse_width, bins);
      if (counter >= 0) atomicAdd(counts + counter, 1ull);
    });
  }
}

template <typename T>
void run_histogram(const T* input, int64_t numel, int64_t bins, int64_t* counts, float* range,
                   int64_t* tallies, void* stream) {
  constexpr const char* kName = "histogram";
  const cudaStream_t cuda_stream = as_stream(stream);
  check(cudaMemsetAsync(counts, 0, 2 * bins * sizeof(int64_t), cuda_stream), kName);
  check(cudaMemsetAsync(range, 0, 2 * sizeof(float), cuda_stream), kName);
  check(cudaMemsetAsync(tallies, 0, 4 * sizeof(int64_t), cuda_stream), kName);
  int32_t log2_bins = 0;
  while ((int64_t{1} << log2_bins) < bins) ++log2_bins;

  with_flag(is_aligned(input, 16), [&](auto aligned) {
    constexpr int V = aligned.value ? kVectorSize<T> : 1;
    if (numel > 0) {
      const int64_t tiles = divide_up(numel, kExtremesThreads * kUnroll * V);
      launch(kName, extremes_kernel<T, V>, grid_size(tiles, 8), kExtremesThreads, stream, input,
             numel, reinterpret_cast<uint32_t*>(range), tallies);
    }
    launch(kName, exponent_kernel, 1, 1, stream, range, tallies, log2_bins);
    if (numel <= 0) return;

    auto* out = reinterpret_cast<unsigned long long*>(counts);
    const auto bin_count = static_cast<int32_t>(bins);
    const int64_t tiles = divide_up(numel, kCountThreads * kUnroll * V);
    with_flag(bins <= kMaxSharedBins, [&](auto shared) {
      unsigned blocks = grid_size(tiles, 4);
      if constexpr (shared.value) {
        // Clearing and adding up the counters costs a block as much as some thousand values.
        blocks = std::min(blocks, static_cast<unsigned>(divide_up(numel, 16 * bins)));
        // No 32-bit counter may overflow, were all values of a block to fall in one bin.
        blocks = std::max(blocks, static_cast<unsigned>(divide_up(numel, int64_t{1} << 31)));
      }
      launch(kName, count_kernel<T, V, shared.value>, blocks, kCountThreads, stream, input, numel,
             bin_count, static_cast<const int64_t*>(tallies), out);
    });
  });
}

// ---- Channel ranges -----------------------------------------------------------------------------

constexpr int kChannelThreads = 256;

// Threads (x, y) of a block take V columns and every so many rows; the block's rows meet in shared
// memory, the grid's in `range`, as integers that start as zeros: [0, columns) minima, then maxima.
template <typename T, int V>
__global__ void __launch_bounds__(kChannelThreads)
    channel_extremes_kernel(const T* input, int64_t rows, int64_t columns, uint32_t* range) {
  __shared__ uint32_t lows[V][kChannelThreads], highs[V][kChannelThreads];
  const int64_t column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * V;
  const int64_t stride = int64_t{gridDim.y} * blockDim.y;
  Extremes mine[V];
  if (column < columns) {
#pragma unroll 4
    for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; row < rows; row += stride) {
      const Vector<T, V> x = load_vector<V>(input + row * columns + column);
#pragma unroll
      for (int j = 0; j < V; ++j) mine[j].include(to_float(x[j]));
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
    // Each block should see some rows per thread, to be worth its atomics.
    const int64_t wanted = divide_up(int64_t{multiprocessors()} * 16, tiles);
    const int64_t parts = std::clamp<int64_t>(divide_up(rows, int64_t{block.y} * 16), 1,
                                              std::min<int64_t>(wanted, 65535));
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(parts));
    launch(kName, channel_extremes_kernel<T, V>, grid, block, stream, input, rows, columns,
           reinterpret_cast<uint32_t*>(range));
  });
  launch(kName, channel_floats_kernel, grid_size(divide_up(columns, kChannelThreads), 8),
         kChannelThreads, stream, range, columns);
}

}  // namespace

void histogram(const void* input, ElementType type, int64_t numel, int64_t bins, int64_t* counts,
               float* range, int64_t* tallies, void* stream) {
  with_element_type(type, [&]<typename T>(T*) {
    run_histogram(static_cast<const T*>(input), numel, bins, counts, range, tallies, stream);
  });
}

void channel_range(const void* input, ElementType type, int64_t rows, int64_t columns, float* range,
                   void* stream) {
  with_element_type(type, [&]<typename T>(T*) {
    run_channel_range(static_cast<const T*>(input), rows, columns, range, stream);
  });
}

}  // namespace vernier::cuda
