#include <vernier/kernels/fake_quantize_device.h>
#include <vernier/kernels/quantize_launch.h>

namespace vernier::cuda {
namespace {

// ---- Backward -----------------------------------------------------------------------------------

template <typename T>
struct FakeQuantizeBackward {
  using Input = T;
  using Output = T;
  static constexpr bool kUsesGradient = true;
  static constexpr const char* kName = "fake_quantize_backward";

  template <int V, typename Grids>
  __device__ Pack<T, V> operator()(const Pack<T, V>& x, const Pack<T, V>& gradient,
                                   const Grids& grids) const {
    const Vector<float, V> code = Rounded<V>(to_floats(x), grids).code;
    return passed_gradient(
        gradient, [&](int j) { return code[j] >= grids[j].low && code[j] <= grids[j].high; });
  }

  __device__ T element(T x, T gradient, float scale, int32_t zero, int32_t qmin,
                       int32_t qmax) const {
    return passes_gradient(to_float(x), scale, zero, qmin, qmax) ? gradient : from_float<T>(0.0f);
  }
};

// ---- Scales from maxima -------------------------------------------------------------------------

// Leaves the bits of the largest finite magnitude in `amax`, but asks first: most find theirs
// beaten already.
__device__ void raise(uint32_t* amax, uint32_t bits) {
  if (bits > *static_cast<volatile uint32_t*>(amax)) atomicMax(amax, bits);
}

// The maxima of runs, a warp a tile; `amax` starts as zeros.
template <typename T, int V>
__global__ void __launch_bounds__(kQuantizeThreads)
    tile_amax_kernel(const T* input, Tiles tiles, DeviceMap map, uint32_t* amax) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t t = int64_t{blockIdx.x} * kQuantizeWarps + threadIdx.x / kWarp; t < tiles.count;
       t += int64_t{gridDim.x} * kQuantizeWarps) {
    const Tile tile(t, tiles);
    Pack<T, V> x[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (lane + u * kWarp < tile.vectors)
        x[u] = load_pack<V>(input + (tile.first + lane + u * kWarp) * V);
    }
    const uint32_t bits = group_max<kWarp>(finite_amax_bits<T>([&](const auto& include) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (lane + u * kWarp < tile.vectors) include(x[u]);
    }));
    if (lane == 0) raise(amax + map.index_of_run(tile.run), bits);
  }
}

// How threads share a tensor of short runs, many to a scale: as a matrix of map.count * map.inner
// columns; thread (x, y) of a block takes a column and part number (block, y) of the rows.
struct Columns {
  int64_t columns;
  int64_t rows;
  dim3 block;
  dim3 grid;
  int64_t part_rows;
  int64_t parts;

  Columns(int64_t numel, const ScaleMap& map)
      : columns(map.inner * map.count), rows(numel / columns) {
    unsigned width = 1;
    while (width < kWarp && width < columns) width *= 2;
    block = dim3(width, kQuantizeThreads / width);
    // Enough rows a thread to be worth its end; no count that depends on the GPU, so that sums are
    // the same on each.
    const int64_t wanted =
        std::clamp<int64_t>(divide_up(int64_t{1} << 19, columns), 1, divide_up(rows, 16));
    part_rows = divide_up(rows, wanted);
    parts = divide_up(rows, part_rows);
    grid = dim3(static_cast<unsigned>(std::min<int64_t>(divide_up(columns, width), 1 << 20)),
                static_cast<unsigned>(std::min<int64_t>(divide_up(parts, block.y), 65535)));
  }
};

// Calls f(column, part, first row, end of the rows) for what is the calling thread's.
template <typename F>
__device__ void for_each_column_part(const Columns& c, const F& f) {
  for (int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; column < c.columns;
       column += int64_t{gridDim.x} * blockDim.x) {
    for (int64_t part = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; part < c.parts;
         part += int64_t{gridDim.y} * blockDim.y)
      f(column, part, part * c.part_rows, min((part + 1) * c.part_rows, c.rows));
  }
}

template <typename T>
__global__ void __launch_bounds__(kQuantizeThreads)
    column_amax_kernel(const T* input, Columns columns, DeviceMap map, uint32_t* amax) {
  for_each_column_part(columns, [&](int64_t column, int64_t, int64_t row, int64_t end) {
    uint32_t bits = 0;
#pragma unroll 8
    for (; row < end; ++row)
      bits = max(bits, finite_magnitude_bits(to_float(input[row * columns.columns + column])));
    raise(amax + map.inner.divide(column), bits);
  });
}

// The same a vector at a time, of columns with a scale each.
template <typename T, int V>
__global__ void __launch_bounds__(kQuantizeThreads)
    column_vector_amax_kernel(const T* input, ColumnVectors columns, uint32_t* amax) {
  using Words = Pack<T, V>;
  __shared__ uint32_t shared[kQuantizeWarps][V][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t vector = columns.vector(), step = columns.row_step();
  uint32_t bits[V] = {};
  if (vector < columns.vectors) {
    const T* const x = input + vector * V;
    LargestMagnitude<T> largest[Words::kWords];
    for_each_row_pack<V>(x, columns.vectors * V, columns.first_row(), columns.rows, step,
                         [&](const Words& words) {
#pragma unroll
                           for (int w = 0; w < Words::kWords; ++w)
                             largest[w].include_word(words.words[w]);
                         });
    bool all_finite = true;
#pragma unroll
    for (int w = 0; w < Words::kWords; ++w) all_finite &= largest[w].all_finite();
    if (all_finite) [[likely]] {
#pragma unroll
      for (int j = 0; j < V; ++j)
        bits[j] = largest[j * Words::kWords / V].float_bits_of(j % (V / Words::kWords));
    } else {
#pragma unroll 1
      for (int64_t row = columns.first_row(); row < columns.rows; row += step) {
        const Vector<float, V> values = to_floats(load_pack<V>(x + row * columns.vectors * V));
#pragma unroll
        for (int j = 0; j < V; ++j) bits[j] = max(bits[j], finite_magnitude_bits(values[j]));
      }
    }
  }
#pragma unroll
  for (int j = 0; j < V; ++j) shared[warp][j][lane] = bits[j];
  __syncthreads();
  const int64_t first = int64_t{blockIdx.x} * kWarp * V;
  for (int c = threadIdx.x; c < kWarp * V && first + c < columns.vectors * V;
       c += kQuantizeThreads) {
    uint32_t most = 0;
#pragma unroll
    for (int w = 0; w < kQuantizeWarps; ++w) most = max(most, shared[w][c % V][c / V]);
    raise(amax + first + c, most);
  }
}

// Runs of fewer elements do not fill a warp: where many share a scale, they go by columns.
constexpr int64_t kShortRun = 16;

bool goes_by_columns(int64_t numel, const ScaleMap& map) {
  return map.count > 1 && map.inner < kShortRun && numel >= 16 * map.inner * map.count;
}

// Vectors that do not straddle scales, of aligned operands.
template <typename T>
bool has_vectors(const ScaleMap& map, std::initializer_list<const void*> operands) {
  return (map.count == 1 || map.inner % kVectorSize<T> == 0) &&
         std::all_of(operands.begin(), operands.end(),
                     [](const void* operand) { return is_aligned(operand, 16); });
}

// Scales whose elements lie apart.
template <typename T>
void run_strided_scales(const QuantizeArguments& a, float* scale, void* stream) {
  constexpr const char* kName = "fake_quantize_dynamic";
  check(cudaMemsetAsync(scale, 0, a.map.count * sizeof(float), as_stream(stream)), kName);
  const auto* input = static_cast<const T*>(a.input);
  auto* amax = reinterpret_cast<uint32_t*>(scale);
  const DeviceMap map(a);
  if (constexpr int V = kVectorSize<T>;
      goes_by_column_vectors(a.numel, a.map, V) && is_aligned(input, 16)) {
    const ColumnVectors columns(a.numel, a.map, V);
    launch(kName, column_vector_amax_kernel<T, V>, columns.grid(8), kQuantizeThreads, stream, input,
           columns, amax);
  } else if (goes_by_columns(a.numel, a.map)) {
    const Columns columns(a.numel, a.map);
    launch(kName, column_amax_kernel<T>, columns.grid, columns.block, stream, input, columns, map,
           amax);
  } else {
    with_flag(has_vectors<T>(a.map, {input}), [&](auto vectorized) {
      constexpr int V = vectorized.value ? kVectorSize<T> : 1;
      const Tiles tiles(a.numel, a.map, V, kWarp);
      const unsigned blocks = grid_size(divide_up(tiles.count, kQuantizeWarps), kQuantizeBlocks);
      launch(kName, tile_amax_kernel<T, V>, blocks, kQuantizeThreads, stream, input, tiles, map,
             amax);
    });
  }
  scales_from_amax(kName, scale, a.map.count, a.qmax, stream);
}

template <typename T>
void run_dynamic(const QuantizeArguments& a, void* output, float* scale, void* stream) {
  if (a.map.count <= 0) return;
  if (a.numel == a.map.inner * a.map.count || a.numel == 0) {
    const int64_t columns = a.numel / a.map.count;
    return run_rows<FakeQuantize<T>>("fake_quantize_dynamic", a.input, a.input_type, a.map.count,
                                     columns, a.qmin, a.qmax, static_cast<T*>(output), scale,
                                     stream);
  }
  run_strided_scales<T>(a, scale, stream);
  QuantizeArguments with_scale = a;
  with_scale.scale = scale;
  run_elementwise<FakeQuantize<T>>(with_scale, nullptr, output, stream);
}

// ---- Learned scales -----------------------------------------------------------------------------

// Sums over elements: of gradient * d output / d scale, and of the gradients of clipped elements.
struct Sums {
  float scale = 0;
  float clipped = 0;

  // A vector's elements add to the same sums, or each to its own.
  __device__ Sums& operator[](int) { return *this; }
};

// The sums of V neighbouring columns.
template <int V>
struct ColumnSums {
  Sums sums[V];

  __device__ Sums& operator[](int j) { return sums[j]; }
};

// The input's gradient of a vector; adds to the sums.
template <typename T, int V, bool kZeroPoint, typename Grids, typename SumsOfVector>
__device__ Pack<T, V> learned_backward(const Pack<T, V>& x, const Pack<T, V>& gradient,
                                       const Grids& grids, SumsOfVector& sums) {
  const Rounded<V> rounded(to_floats(x), grids);
  const Vector<float, V> g = to_floats(gradient);
  bool passes[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float code = rounded.code[j];
    const float clamped = fminf(fmaxf(code, grids[j].low), grids[j].high);  // NaN: low
    passes[j] = code == clamped;
    Sums& sum = sums[j];
    sum.scale = __fmaf_rn(g[j], passes[j] ? -rounded.remainder[j] : clamped, sum.scale);
    if constexpr (kZeroPoint) sum.clipped += passes[j] ? 0.0f : g[j];
  }
  return passed_gradient(gradient, [&](int j) { return passes[j]; });
}

// Sums of a few threads' elements, in double where they add up over many.
struct WideSums {
  double scale = 0;
  double clipped = 0;

  __device__ void add(const Sums& sums) {
    scale += static_cast<double>(sums.scale);
    clipped += static_cast<double>(sums.clipped);
  }
};

// The sum over kLanes consecutive threads of a warp, in the same order every time.
template <int kLanes>
__device__ double lanes_sum(double value) {
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2)
    value += __shfl_xor_sync(kFullWarp, value, distance);
  return value;
}

// The gradients of a scale and its zero point.
__device__ void write_gradients(const LearnedGradients& gradients, int64_t index, float scale,
                                const WideSums& total) {
  gradients.scale[index] = static_cast<float>(total.scale * gradients.gradient_scale);
  if (gradients.zero_point)
    gradients.zero_point[index] =
        static_cast<float>(-static_cast<double>(scale) * total.clipped * gradients.gradient_scale);
}

// Scales of kLanes consecutive vectors each, which as many threads of a warp add up at once.
template <typename T, int V, int kLanes, bool kZeroPoint>
__global__ void __launch_bounds__(kQuantizeThreads, 4)
    learned_groups_kernel(const T* input, const T* gradient, T* output, int64_t vectors,
                          DeviceMap map, LearnedGradients gradients) {
  constexpr int kAtOnce = 2;
  constexpr int64_t kTile = kQuantizeThreads * kAtOnce;
  // Every thread makes the same rounds, as the exchange in lanes_sum wants.
  for (int64_t base = blockIdx.x * kTile; base < vectors; base += gridDim.x * kTile) {
    Pack<T, V> x[kAtOnce], g[kAtOnce];
    float scale[kAtOnce];
    int32_t zero_point[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t v = base + u * kQuantizeThreads + threadIdx.x;
      if (v >= vectors) break;
      x[u] = load_pack<V>(input + v * V);
      g[u] = load_pack<V>(gradient + v * V);
      scale[u] = map.scale_at(v / kLanes);
      zero_point[u] = map.zero_point_at(v / kLanes);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t v = base + u * kQuantizeThreads + threadIdx.x;
      WideSums total;
      if (v < vectors) {
        Sums sums;
        const CodeGrid grid(scale[u], zero_point[u], map.qmin, map.qmax);
        store_pack(output + v * V, learned_backward<T, V, kZeroPoint>(x[u], g[u], grid, sums));
        total.add(sums);
      }
      total.scale = lanes_sum<kLanes>(total.scale);
      if constexpr (kZeroPoint) total.clipped = lanes_sum<kLanes>(total.clipped);
      if (threadIdx.x % kLanes == 0 && v < vectors)
        write_gradients(gradients, v / kLanes, scale[u], total);
    }
  }
}

// How the learned backward is cut: segments of so many tiles, each of one run. No number depends on
// the GPU, so that sums are the same on each.
struct Segments {
  Tiles tiles;
  int64_t tiles_each;
  Divider per_run;
  int64_t count;
  // Sums that are left for add_partials_kernel: one a segment, or, where all share one scale, one
  // for every block's segments.
  int64_t parts;

  Segments(int64_t numel, const ScaleMap& map, int vector_size, int lanes)
      : tiles(numel, map, vector_size, lanes),
        tiles_each(std::clamp<int64_t>(tiles.count >> 15, 1, tiles.per_run.divisor())),
        per_run(divide_up(tiles.per_run.divisor(), tiles_each)),
        // One at least, for a tensor of less than a vector.
        count(std::max<int64_t>(tiles.count / tiles.per_run.divisor() * per_run.divisor(), 1)),
        parts(map.count == 1 ? divide_up(count, kQuantizeThreads / lanes) : count) {}
};

// A segment's sums go to partial[segment], or those of a block's segments to partial[block's number
// among them], the clipped ones `parts` behind. kLanes threads take a segment.
template <typename T, int V, int kLanes, bool kZeroPoint>
__global__ void __launch_bounds__(kQuantizeThreads, 3)
    learned_backward_kernel(const T* input, const T* gradient, T* output, int64_t numel,
                            Segments segments, DeviceMap map, double* partial) {
  constexpr int kGroups = kQuantizeThreads / kLanes;
  const int lane = threadIdx.x % kLanes;
  const Tiles& tiles = segments.tiles;
  // Every thread makes the same rounds, as the exchange in lanes_sum wants.
  for (int64_t first = int64_t{blockIdx.x} * kGroups; first < segments.count;
       first += int64_t{gridDim.x} * kGroups) {
    const int64_t segment = first + threadIdx.x / kLanes;
    WideSums total;
    if (segment < segments.count) {
      const int64_t run = segments.per_run.divide(segment);
      const int64_t part = segment - run * segments.per_run.divisor();
      const int64_t begin = part * segments.tiles_each;
      const int64_t end = min(begin + segments.tiles_each, tiles.per_run.divisor());
      const CodeGrid grid = map.at(map.index_of_run(run));
      for (int64_t t = begin; t < end; ++t) {
        const int64_t offset = t * tiles.tile_vectors;
        const int64_t start = run * tiles.run_vectors + offset;
        const auto vectors = static_cast<int>(min(tiles.tile_vectors, tiles.run_vectors - offset));
        Pack<T, V> x[kUnroll], g[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (lane + u * kLanes >= vectors) break;
          const int64_t i = (start + lane + u * kLanes) * V;
          x[u] = load_pack<V>(input + i);
          g[u] = load_pack<V>(gradient + i);
        }
        Sums sums;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (lane + u * kLanes >= vectors) break;
          store_pack(output + (start + lane + u * kLanes) * V,
                     learned_backward<T, V, kZeroPoint>(x[u], g[u], grid, sums));
        }
        total.add(sums);
      }
      // What is left behind the last whole vector, where all share one scale.
      if (const int64_t i = tiles.run_vectors * V + lane;
          segment + 1 == segments.count && map.count.divisor() == 1 && i < numel) {
        Sums sums;
        store_pack(output + i,
                   learned_backward<T, 1, kZeroPoint>(load_pack<1>(input + i),
                                                      load_pack<1>(gradient + i), grid, sums));
        total.add(sums);
      }
    }
    total.scale = lanes_sum<kLanes>(total.scale);
    if constexpr (kZeroPoint) total.clipped = lanes_sum<kLanes>(total.clipped);
    if (segments.parts == segments.count) {
      if (lane == 0 && segment < segments.count) {
        partial[segment] = total.scale;
        if constexpr (kZeroPoint) partial[segments.parts + segment] = total.clipped;
      }
    } else {
      __shared__ double scales[kGroups], clips[kGroups];
      if (lane == 0) {
        scales[threadIdx.x / kLanes] = total.scale;
        clips[threadIdx.x / kLanes] = total.clipped;
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        for (int group = 1; group < kGroups; ++group) {
          total.scale += scales[group];
          total.clipped += clips[group];
        }
        partial[first / kGroups] = total.scale;
        if constexpr (kZeroPoint) partial[segments.parts + first / kGroups] = total.clipped;
      }
      __syncthreads();  // the reader is done
    }
  }
}

// The same by columns: part p of column c goes to partial[p * columns + c].
template <typename T, bool kZeroPoint>
__global__ void __launch_bounds__(kQuantizeThreads)
    learned_columns_kernel(const T* input, const T* gradient, T* output, Columns columns,
                           DeviceMap map, double* partial) {
  for_each_column_part(columns, [&](int64_t column, int64_t part, int64_t row, int64_t end) {
    const CodeGrid grid = map.at(map.inner.divide(column));
    WideSums total;
#pragma unroll 4
    for (; row < end; ++row) {
      const int64_t i = row * columns.columns + column;
      Sums sums;
      store_pack(output + i, learned_backward<T, 1, kZeroPoint>(
                                 load_pack<1>(input + i), load_pack<1>(gradient + i), grid, sums));
      total.add(sums);
    }
    const int64_t target = part * columns.columns + column;
    partial[target] = total.scale;
    if constexpr (kZeroPoint) partial[columns.parts * columns.columns + target] = total.clipped;
  });
}

// Rows whose sums a block adds up, few enough for float sums of a thread. No number depends on the
// GPU, so that sums are the same on each.
constexpr int64_t kSummedRows = 32 * kQuantizeWarps;

// The same a vector at a time, of columns with a scale each: those of rows p * kSummedRows and on
// go to partial[p * columns + c], the clipped ones `clipped` behind.
template <typename T, int V, bool kZeroPoint>
__global__ void __launch_bounds__(kQuantizeThreads, 2)
    learned_column_vectors_kernel(const T* input, const T* gradient, T* output,
                                  ColumnVectors columns, DeviceMap map, double* partial,
                                  int64_t clipped) {
  constexpr int kAtOnce = 2;
  __shared__ float scales[kQuantizeWarps][V][kWarp];
  __shared__ float clips[kZeroPoint ? kQuantizeWarps : 1][V][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t vector = columns.vector();
  const int64_t parts = (columns.rows + kSummedRows - 1) / kSummedRows;
  // Threads behind the last column read its scales, and nothing else.
  const ColumnGrids<V, kZeroPoint> grids(map, min(vector, columns.vectors - 1) * V);
  for (int64_t part = blockIdx.y; part < parts; part += gridDim.y) {
    ColumnSums<V> sums;
    const int64_t end =
        vector < columns.vectors ? min((part + 1) * kSummedRows, columns.rows) : int64_t{0};
    for (int64_t first = part * kSummedRows + warp; first < end;
         first += kAtOnce * kQuantizeWarps) {
      Pack<T, V> x[kAtOnce], g[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t row = first + u * kQuantizeWarps;
        if (row >= end) break;
        const int64_t i = (row * columns.vectors + vector) * V;
        x[u] = load_pack<V>(input + i);
        g[u] = load_pack<V>(gradient + i);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t row = first + u * kQuantizeWarps;
        if (row >= end) break;
        store_pack(output + (row * columns.vectors + vector) * V,
                   learned_backward<T, V, kZeroPoint>(x[u], g[u], grids, sums));
      }
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      scales[warp][j][lane] = sums[j].scale;
      if constexpr (kZeroPoint) clips[warp][j][lane] = sums[j].clipped;
    }
    __syncthreads();
    const int64_t begin = int64_t{blockIdx.x} * kWarp * V;
    for (int c = threadIdx.x; c < kWarp * V && begin + c < columns.vectors * V;
         c += kQuantizeThreads) {
      WideSums total;
#pragma unroll
      for (int w = 0; w < kQuantizeWarps; ++w)
        total.add({scales[w][c % V][c / V], kZeroPoint ? clips[kZeroPoint * w][c % V][c / V] : 0});
      const int64_t target = part * columns.vectors * V + begin + c;
      partial[target] = total.scale;
      if constexpr (kZeroPoint) partial[clipped + target] = total.clipped;
    }
    __syncthreads();  // the readers are done
  }
}

// Partial sums [outer][map.count][inner] of each scale, added up by kGroup threads, a warp or a
// block, in the same order every time. The clipped ones lie `clipped` behind.
template <int kGroup>
__global__ void __launch_bounds__(kGroup > kQuantizeThreads ? kGroup : kQuantizeThreads)
    add_partials_kernel(const double* partial, int64_t outer, int64_t count, Divider inner,
                        int64_t clipped, const float* scale, LearnedGradients gradients) {
  constexpr int kGroups = std::max(kGroup, kQuantizeThreads) / kGroup;
  const int thread = threadIdx.x % kGroup;
  for (int64_t first = int64_t{blockIdx.x} * kGroups; first < count;
       first += int64_t{gridDim.x} * kGroups) {
    const int64_t index = first + threadIdx.x / kGroup;
    const int64_t terms = index < count ? outer * inner.divisor() : 0;
    WideSums total;
    constexpr int kAtOnce = 8;  // loads under way
    for (int64_t base = thread; base < terms; base += kGroup * kAtOnce) {
      WideSums parts[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int64_t t = base + j * kGroup;
        if (t >= terms) break;
        const int64_t o = inner.divide(t);
        const int64_t i = (o * count + index) * inner.divisor() + t - o * inner.divisor();
        parts[j].scale = partial[i];
        if (gradients.zero_point) parts[j].clipped = partial[clipped + i];
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        total.scale += parts[j].scale;
        total.clipped += parts[j].clipped;
      }
    }
    total.scale = lanes_sum<kWarp>(total.scale);
    total.clipped = lanes_sum<kWarp>(total.clipped);
    if constexpr (kGroup > kWarp) {
      __shared__ double scales[kGroup / kWarp], clips[kGroup / kWarp];
      __syncthreads();  // the previous round's readers are done
      if (threadIdx.x % kWarp == 0) {
        scales[threadIdx.x / kWarp] = total.scale;
        clips[threadIdx.x / kWarp] = total.clipped;
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        for (int w = 1; w < kGroup / kWarp; ++w) {
          total.scale += scales[w];
          total.clipped += clips[w];
        }
      }
    }
    if (thread == 0 && index < count) write_gradients(gradients, index, scale[index], total);
  }
}

// Runs of at most so many vectors are shared by kFewLanes threads.
constexpr int64_t kFewVectors = 16;
constexpr int kFewLanes = 4;

// Partial sums of a backward: [outer][map.count][inner].
struct Partials {
  int64_t outer = 0;
  int64_t inner = 1;
};

// Calls f(std::integral_constant of the vector size, of the lanes) as the shape asks for.
template <typename T, typename F>
void with_segment_shape(const ScaleMap& map, bool vectors, const F& f) {
  with_flag(vectors, [&](auto vectorized) {
    constexpr int V = vectorized.value ? kVectorSize<T> : 1;
    with_flag(map.count > 1 && map.inner / V <= kFewVectors, [&](auto few) {
      f(std::integral_constant<int, V>{}, std::integral_constant < int,
        few.value ? kFewLanes : kWarp > {});
    });
  });
}

// Starts learned_groups_kernel where it serves.
template <typename T>
bool run_learned_groups(const char* name, const QuantizeArguments& a, const T* x, const T* g, T* y,
                        const LearnedGradients& gradients, void* stream) {
  constexpr int V = kVectorSize<T>;
  if (a.numel != a.map.inner * a.map.count || !has_vectors<T>(a.map, {x, g, y})) return false;
  const auto start = [&]<int kLanes>() {
    if (a.map.inner != kLanes * V) return false;
    const int64_t vectors = a.numel / V;
    with_flag(gradients.zero_point != nullptr, [&](auto zero_point) {
      launch(name, learned_groups_kernel<T, V, kLanes, zero_point.value>,
             grid_size(divide_up(vectors, 2 * kQuantizeThreads), kQuantizeBlocks), kQuantizeThreads,
             stream, x, g, y, vectors, DeviceMap(a), gradients);
    });
    return true;
  };
  return start.template operator()<4>() || start.template operator()<8>() ||
         start.template operator()<16>() || start.template operator()<32>();
}

template <typename T>
void run_learned_backward(const QuantizeArguments& a, const void* gradient, void* output,
                          const LearnedGradients& gradients, double* partial, void* stream) {
  constexpr const char* kName = "fake_quantize_learned_backward";
  if (a.map.count <= 0) return;
  const auto* x = static_cast<const T*>(a.input);
  const auto* g = static_cast<const T*>(gradient);
  auto* y = static_cast<T*>(output);
  if (run_learned_groups(kName, a, x, g, y, gradients, stream)) return;
  const DeviceMap map(a);
  Partials partials;
  with_flag(gradients.zero_point != nullptr, [&](auto zero_point) {
    constexpr bool kZeroPoint = zero_point.value;
    if (a.numel == 0) return;
    if (constexpr int V = kVectorSize<T>; goes_by_column_vectors(a.numel, a.map, V) &&
                                          is_aligned(x, 16) && is_aligned(g, 16) &&
                                          is_aligned(y, 16)) {
      const ColumnVectors columns(a.numel, a.map, V);
      partials = {divide_up(columns.rows, kSummedRows), 1};
      const dim3 grid(static_cast<unsigned>(divide_up(columns.vectors, kWarp)),
                      static_cast<unsigned>(std::min<int64_t>(partials.outer, 65535)));
      launch(kName, learned_column_vectors_kernel<T, V, kZeroPoint>, grid, kQuantizeThreads, stream,
             x, g, y, columns, map, partial, partials.outer * a.map.count);
      return;
    }
    if (goes_by_columns(a.numel, a.map)) {
      const Columns columns(a.numel, a.map);
      partials = {columns.parts, a.map.inner};
      launch(kName, learned_columns_kernel<T, kZeroPoint>, columns.grid, columns.block, stream, x,
             g, y, columns, map, partial);
      return;
    }
    with_segment_shape<T>(a.map, has_vectors<T>(a.map, {x, g, y}), [&](auto vector, auto lanes) {
      constexpr int V = vector.value, kLanes = lanes.value;
      const Segments segments(a.numel, a.map, V, kLanes);
      partials = a.map.count == 1
                     ? Partials{1, segments.parts}
                     : Partials{segments.count / segments.per_run.divisor() / a.map.count,
                                segments.per_run.divisor()};
      const unsigned blocks =
          grid_size(divide_up(segments.count * kLanes, kQuantizeThreads), kQuantizeBlocks);
      launch(kName, learned_backward_kernel<T, V, kLanes, kZeroPoint>, blocks, kQuantizeThreads,
             stream, x, g, y, a.numel, segments, map, partial);
    });
  });
  const int64_t terms = partials.outer * partials.inner;
  const Divider inner(partials.inner);
  const int64_t clipped = terms * a.map.count;
  const auto add = [&](auto* kernel, int group) {
    const int threads = std::max(group, kQuantizeThreads);
    launch(kName, kernel, grid_size(divide_up(a.map.count, threads / group), 8), threads, stream,
           static_cast<const double*>(partial), partials.outer, a.map.count, inner, clipped,
           a.scale, gradients);
  };
  if (terms <= 1024) return add(add_partials_kernel<kWarp>, kWarp);
  add(add_partials_kernel<1024>, 1024);
}

}  // namespace

void fake_quantize(const QuantizeArguments& a, void* output, void* stream) {
  with_element_type(a.input_type, [&]<typename T>(T*) {
    run_elementwise<FakeQuantize<T>>(a, nullptr, output, stream);
  });
}

void fake_quantize_backward(const QuantizeArguments& a, const void* gradient, void* output,
                            void* stream) {
  with_element_type(a.input_type, [&]<typename T>(T*) {
    run_elementwise<FakeQuantizeBackward<T>>(a, gradient, output, stream);
  });
}

void fake_quantize_dynamic(const QuantizeArguments& a, void* output, float* scale, void* stream) {
  with_element_type(a.input_type,
                    [&]<typename T>(T*) { run_dynamic<T>(a, output, scale, stream); });
}

int64_t learned_backward_scratch(const QuantizeArguments& a) {
  if (a.numel == 0 || a.map.count == 0) return 0;
  if (goes_by_columns(a.numel, a.map)) {
    const Columns columns(a.numel, a.map);
    // By vectors, where operands allow it, the parts are others.
    return 2 * std::max(columns.parts, divide_up(columns.rows, kSummedRows)) * columns.columns;
  }
  // Whichever way it goes, a segment holds a tile; unaligned operands have the most.
  int64_t segments = 0;
  with_element_type(a.input_type, [&]<typename T>(T*) {
    for (const bool vectors : {false, has_vectors<T>(a.map, {})}) {
      with_segment_shape<T>(a.map, vectors, [&](auto vector, auto lanes) {
        segments = std::max(segments, Segments(a.numel, a.map, vector.value, lanes.value).count);
      });
    }
  });
  return 2 * segments;
}

void fake_quantize_learned_backward(const QuantizeArguments& a, const void* gradient, void* output,
                                    const LearnedGradients& gradients, double* scratch,
                                    void* stream) {
  with_element_type(a.input_type, [&]<typename T>(T*) {
    run_learned_backward<T>(a, gradient, output, gradients, scratch, stream);
  });
}

}  // namespace vernier::cuda
