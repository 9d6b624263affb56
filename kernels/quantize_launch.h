// What quantize_cuda.cu and fake_quantize_cuda.cu share: tensors cut into runs that share a scale,
// operations on vectors of elements, and rows that find their own scale; internal, for .cu files
// only.
#pragma once

#include <vernier/kernels/packed.h>
#include <vernier/kernels/scale_division.h>

namespace vernier::cuda {

inline constexpr int kQuantizeThreads = 256;
inline constexpr int kQuantizeWarps = kQuantizeThreads / kWarp;

/// Blocks per multiprocessor of the kernels below: enough to fill the GPU many times over, so that
/// they need not end together.
inline constexpr int kQuantizeBlocks = 64;

// ---- Operations ---------------------------------------------------------------------------------

/// A scale ready to divide by, and the codes' range less the zero point.
struct CodeGrid {
  ScaleDivision division;
  float low;
  float high;
  int32_t zero_point;

  CodeGrid() = default;
  __device__ CodeGrid(float scale, int32_t zero, int32_t qmin, int32_t qmax)
      : division(scale),
        low(static_cast<float>(qmin - zero)),
        high(static_cast<float>(qmax - zero)),
        zero_point(zero) {}

  /// Operations take one grid for all elements of a vector, or as many as that.
  __device__ const CodeGrid& operator[](int) const { return *this; }
};

/// Codes less the zero point.
template <int V, typename Grids>
__device__ Vector<float, V> centred_codes(const Vector<float, V>& x, const Grids& grids) {
  Vector<float, V> code;
  bool sure = true;
#pragma unroll
  for (int j = 0; j < V; ++j)
    code[j] = grids[j].division.likely_code(x[j], grids[j].low, grids[j].high, sure);
  if (!sure) [[unlikely]] {
#pragma unroll
    for (int j = 0; j < V; ++j)
      code[j] = grids[j].division.divided_code(x[j], grids[j].low, grids[j].high);
  }
  return code;
}

/// x / scale of a vector as codes, unclamped and less the zero point, and what their rounding left.
template <int V>
struct Rounded {
  Vector<float, V> code;
  Vector<float, V> remainder;

  template <typename Grids>
  __device__ Rounded(const Vector<float, V>& x, const Grids& grids) {
    bool sure = true;
#pragma unroll
    for (int j = 0; j < V; ++j) code[j] = grids[j].division.likely(x[j], remainder[j], sure);
    if (!sure) [[unlikely]] {
#pragma unroll
      for (int j = 0; j < V; ++j) code[j] = grids[j].division.divided(x[j], remainder[j]);
    }
  }
};

/// Codes less the zero point as bytes.
template <int V, typename Grids>
__device__ Pack<int8_t, V> pack_codes(const Vector<float, V>& code, const Grids& grids) {
  // The lowest byte of 1.5 * 2^23 + code is the code as int8.
  uint32_t bytes[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const float to_byte = 12582912.0f + static_cast<float>(grids[j].zero_point);
    bytes[j] = __float_as_uint(code[j] + to_byte);
  }
  Pack<int8_t, V> y;
  if constexpr (V % 4 == 0) {
#pragma unroll
    for (int w = 0; w < V / 4; ++w) {
      const uint32_t low = __byte_perm(bytes[4 * w], bytes[4 * w + 1], 0x0040);
      const uint32_t high = __byte_perm(bytes[4 * w + 2], bytes[4 * w + 3], 0x0040);
      y.words[w] = __byte_perm(low, high, 0x5410);
    }
  } else {
    static_assert(V == 1);
    y.words[0] = static_cast<uint8_t>(bytes[0]);
  }
  return y;
}

/// The gradients of the elements j for which passes(j), zero for the others.
template <typename T, int V, typename Passes>
__device__ Pack<T, V> passed_gradient(const Pack<T, V>& gradient, const Passes& passes) {
  using Word = typename Pack<T, V>::Word;
  constexpr int kPerWord = V / Pack<T, V>::kWords;
  constexpr int kBits = 8 * sizeof(T);
  Pack<T, V> passed;
#pragma unroll
  for (int w = 0; w < Pack<T, V>::kWords; ++w) {
    uint32_t mask = 0;
#pragma unroll
    for (int j = 0; j < kPerWord; ++j)
      mask |= passes(w * kPerWord + j) ? ~uint32_t{0} >> (32 - kBits) << (kBits * j) : 0;
    passed.words[w] = gradient.words[w] & static_cast<Word>(mask);
  }
  return passed;
}

/// Operations: output = operation(x, gradient, grid), or operation.element(...) for one element
/// whose scale is used once. Those without a gradient are passed x twice.
template <typename T>
struct Quantize {
  using Input = T;
  using Output = int8_t;
  static constexpr bool kUsesGradient = false;
  static constexpr const char* kName = "quantize";

  template <int V, typename Grids>
  __device__ Pack<int8_t, V> operator()(const Pack<T, V>& x, const Pack<T, V>&,
                                        const Grids& grids) const {
    return pack_codes(centred_codes(to_floats(x), grids), grids);
  }

  __device__ int8_t element(T x, T, float scale, int32_t zero, int32_t qmin, int32_t qmax) const {
    return static_cast<int8_t>(quantize_value(to_float(x), scale, zero, qmin, qmax));
  }
};

template <typename T>
struct FakeQuantize {
  using Input = T;
  using Output = T;
  static constexpr bool kUsesGradient = false;
  static constexpr const char* kName = "fake_quantize";

  template <int V, typename Grids>
  __device__ Pack<T, V> operator()(const Pack<T, V>& x, const Pack<T, V>&,
                                   const Grids& grids) const {
    Vector<float, V> y = centred_codes(to_floats(x), grids);
#pragma unroll
    for (int j = 0; j < V; ++j) y[j] = __fmul_rn(y[j], grids[j].division.scale());
    return from_floats<T>(y);
  }

  __device__ T element(T x, T, float scale, int32_t zero, int32_t qmin, int32_t qmax) const {
    const int32_t code = quantize_value(to_float(x), scale, zero, qmin, qmax);
    return from_float<T>(dequantize_value(code, scale, zero));
  }
};

// ---- Elements and their scales ------------------------------------------------------------------

/// A ScaleMap with its scales, on the device.
struct DeviceMap {
  const float* scale;
  const int32_t* zero_point;  // null: all zero
  Divider inner;
  Divider count;
  int32_t qmin;
  int32_t qmax;

  explicit DeviceMap(const QuantizeArguments& a)
      : scale(a.scale),
        zero_point(a.zero_point),
        inner(a.map.inner),
        count(a.map.count),
        qmin(a.qmin),
        qmax(a.qmax) {}

  __device__ float scale_at(int64_t index) const { return __ldg(scale + index); }
  __device__ int32_t zero_point_at(int64_t index) const {
    return zero_point ? __ldg(zero_point + index) : 0;
  }
  __device__ CodeGrid at(int64_t index) const {
    return {scale_at(index), zero_point_at(index), qmin, qmax};
  }
  /// The index of the scale of a run, where runs are counted through the tensor.
  __device__ int64_t index_of_run(int64_t run) const {
    return run - count.divide(run) * count.divisor();
  }
};

/// A tensor of runs that share a scale, cut into tiles of one run each: what kLanes threads take at
/// a time, kUnroll vectors each. Positions are in vectors.
struct Tiles {
  int64_t count;
  int64_t run_vectors;
  int64_t tile_vectors;  // equal parts of a run, the last may be shorter
  Divider per_run;

  /// A tensor of one scale is one run of whole vectors; what is left behind them is for the caller.
  Tiles(int64_t numel, const ScaleMap& map, int vector_size, int lanes)
      : run_vectors((map.count == 1 ? numel : map.inner) / vector_size),
        per_run(std::max<int64_t>(divide_up(run_vectors, int64_t{lanes} * kUnroll), 1)) {
    tile_vectors = divide_up(run_vectors, per_run.divisor());
    count = run_vectors > 0 ? numel / vector_size / run_vectors * per_run.divisor() : 0;
  }
};

/// One tile: `vectors` of them from `first` on, in run number `run`.
struct Tile {
  int64_t run;
  int64_t first;
  int vectors;

  __device__ Tile(int64_t tile, const Tiles& tiles) {
    run = tiles.per_run.divide(tile);
    const int64_t begin = (tile - run * tiles.per_run.divisor()) * tiles.tile_vectors;
    first = run * tiles.run_vectors + begin;
    vectors = static_cast<int>(min(tiles.tile_vectors, tiles.run_vectors - begin));
  }
};

/// The scale is looked up and made ready once a tile, for kUnroll vectors. Elements behind the last
/// whole vector, where all share one scale, are the first block's.
template <typename Operation, int V>
__global__ void __launch_bounds__(kQuantizeThreads, sizeof(typename Operation::Output) == 1 ? 5 : 4)
    tile_kernel(const typename Operation::Input* input, const typename Operation::Input* gradient,
                typename Operation::Output* output, int64_t numel, Tiles tiles, DeviceMap map) {
  using Input = typename Operation::Input;
  const Operation operation;
  const int lane = threadIdx.x % kWarp;
  for (int64_t t = int64_t{blockIdx.x} * kQuantizeWarps + threadIdx.x / kWarp; t < tiles.count;
       t += int64_t{gridDim.x} * kQuantizeWarps) {
    const Tile tile(t, tiles);
    Pack<Input, V> x[kUnroll];
    Pack<Input, V> g[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (lane + u * kWarp >= tile.vectors) break;
      const int64_t v = tile.first + lane + u * kWarp;
      x[u] = load_pack<V>(input + v * V);
      if constexpr (Operation::kUsesGradient) g[u] = load_pack<V>(gradient + v * V);
    }
    const CodeGrid grid = map.at(map.index_of_run(tile.run));
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (lane + u * kWarp >= tile.vectors) break;
      const int64_t v = tile.first + lane + u * kWarp;
      store_pack(output + v * V, operation(x[u], Operation::kUsesGradient ? g[u] : x[u], grid));
    }
  }

  if (const int64_t i = numel / V * V + threadIdx.x; blockIdx.x == 0 && i < numel) {
    const Input g = Operation::kUsesGradient ? gradient[i] : input[i];
    output[i] =
        operation.element(input[i], g, map.scale_at(0), map.zero_point_at(0), map.qmin, map.qmax);
  }
}

// Where an element stands in the map: the index of its scale and its place in the run that shares
// it.
struct Place {
  int64_t index;
  int64_t offset;

  __device__ Place(int64_t element, const DeviceMap& map) {
    const int64_t run = map.inner.divide(element);
    offset = element - run * map.inner.divisor();
    index = map.index_of_run(run);
  }

  /// Moves to the next element.
  __device__ void advance(const DeviceMap& map) {
    if (++offset < map.inner.divisor()) return;
    offset = 0;
    if (++index == map.count.divisor()) index = 0;
  }
};

/// Runs too short for tiles. kWhole: vectors do not straddle scales; else each element may be the
/// first of the next scale.
template <typename Operation, int V, bool kWhole>
__global__ void __launch_bounds__(kQuantizeThreads)
    short_run_kernel(const typename Operation::Input* input,
                     const typename Operation::Input* gradient, typename Operation::Output* output,
                     int64_t numel, DeviceMap map) {
  using Input = typename Operation::Input;
  using Output = typename Operation::Output;
  const Operation operation;
  const auto element = [&](Input x, Input g, int64_t index) {
    return operation.element(x, g, map.scale_at(index), map.zero_point_at(index), map.qmin,
                             map.qmax);
  };
  const int64_t vectors = numel / V;
  constexpr int64_t kTile = kQuantizeThreads * kUnroll;
  for (int64_t base = blockIdx.x * kTile; base < vectors; base += gridDim.x * kTile) {
    Pack<Input, V> x[kUnroll];
    Pack<Input, V> g[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t v = base + u * kQuantizeThreads + threadIdx.x;
      if (v >= vectors) break;
      x[u] = load_pack<V>(input + v * V);
      if constexpr (Operation::kUsesGradient) g[u] = load_pack<V>(gradient + v * V);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t v = base + u * kQuantizeThreads + threadIdx.x;
      if (v >= vectors) break;
      const Pack<Input, V>& gradients = Operation::kUsesGradient ? g[u] : x[u];
      Place place(v * V, map);
      if constexpr (kWhole) {
        store_pack(output + v * V, operation(x[u], gradients, map.at(place.index)));
      } else {
        const Vector<Input, V> elements = unpack(x[u]);
        const Vector<Input, V> their_gradients = unpack(gradients);
        Vector<Output, V> y;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          y[j] = element(elements[j], their_gradients[j], place.index);
          if (j + 1 < V) place.advance(map);
        }
        store_pack(output + v * V, pack(y));
      }
    }
  }

  // What is left behind the last whole vector.
  if (const int64_t i = vectors * V + threadIdx.x; blockIdx.x == 0 && i < numel)
    output[i] =
        element(input[i], Operation::kUsesGradient ? gradient[i] : input[i], Place(i, map).index);
}

/// The grids of V neighbouring columns, where each column has its own scale. Without zero points
/// they share their range.
template <int V, bool kZeroPoint>
class ColumnGrids {
 public:
  __device__ ColumnGrids(const DeviceMap& map, int64_t first) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int32_t zero_point = kZeroPoint ? map.zero_point_at(first + j) : 0;
      grids_[j] = CodeGrid(map.scale_at(first + j), zero_point, map.qmin, map.qmax);
    }
  }

  __device__ CodeGrid operator[](int j) const {
    CodeGrid grid = grids_[kZeroPoint ? j : 0];
    grid.division = grids_[j].division;
    return grid;
  }

 private:
  CodeGrid grids_[V];
};

/// How blocks share a matrix whose columns have a scale each: a warp takes kWarp vectors of a row,
/// the warps of a block the same of other rows, and blocks with the same y the same rows.
struct ColumnVectors {
  int64_t vectors;  // of a row
  int64_t rows;

  ColumnVectors(int64_t numel, const ScaleMap& map, int vector_size)
      : vectors(map.count / vector_size), rows(numel / map.count) {}

  /// Many rows for each warp, as making the scales ready costs as much as some.
  dim3 grid(int blocks_per_multiprocessor) const {
    const int64_t x = divide_up(vectors, kWarp);
    const int64_t wanted = divide_up(int64_t{multiprocessors()} * blocks_per_multiprocessor, x);
    const int64_t most = divide_up(rows, int64_t{kQuantizeWarps} * 2 * kUnroll);
    return dim3(static_cast<unsigned>(x),
                static_cast<unsigned>(std::min<int64_t>({wanted, most, 65535})));
  }

  __device__ int64_t vector() const { return int64_t{blockIdx.x} * kWarp + threadIdx.x % kWarp; }
  __device__ int64_t first_row() const {
    return int64_t{blockIdx.y} * kQuantizeWarps + threadIdx.x / kWarp;
  }
  __device__ int64_t row_step() const { return int64_t{gridDim.y} * kQuantizeWarps; }
};

/// Whether columns have a scale each, and so many vectors and rows that ColumnVectors serves.
inline bool goes_by_column_vectors(int64_t numel, const ScaleMap& map, int vector_size) {
  return map.inner == 1 && map.count % vector_size == 0 && map.count / vector_size >= kWarp / 2 &&
         numel >= 16 * map.count;
}

template <typename Operation, int V, bool kZeroPoint>
__global__ void __launch_bounds__(kQuantizeThreads, kZeroPoint || Operation::kUsesGradient ? 2 : 3)
    column_kernel(const typename Operation::Input* input, const typename Operation::Input* gradient,
                  typename Operation::Output* output, ColumnVectors columns, DeviceMap map) {
  using Input = typename Operation::Input;
  const Operation operation;
  const int64_t vector = columns.vector();
  if (vector >= columns.vectors) return;
  const ColumnGrids<V, kZeroPoint> grids(map, vector * V);
  const int64_t step = columns.row_step();
  for (int64_t first = columns.first_row(); first < columns.rows; first += step * kUnroll) {
    Pack<Input, V> x[kUnroll];
    Pack<Input, V> g[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t row = first + u * step;
      if (row >= columns.rows) break;
      const int64_t i = (row * columns.vectors + vector) * V;
      x[u] = load_pack<V>(input + i);
      if constexpr (Operation::kUsesGradient) g[u] = load_pack<V>(gradient + i);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t row = first + u * step;
      if (row >= columns.rows) break;
      store_pack(output + (row * columns.vectors + vector) * V,
                 operation(x[u], Operation::kUsesGradient ? g[u] : x[u], grids));
    }
  }
}

/// Vectors counted below 2^31, for which the division by the length of runs is cheap.
struct VectorRuns {
  uint32_t vectors;
  Divider32 run_vectors;
  Divider32 count;
  bool repeats;  // the scales' indices start anew in the tensor

  VectorRuns(int64_t numel, const ScaleMap& map, int vector_size)
      : vectors(static_cast<uint32_t>(numel / vector_size)),
        run_vectors(map.inner / vector_size),
        count(map.count),
        repeats(numel > map.inner * map.count) {}

  __device__ uint32_t index(uint32_t vector) const {
    const uint32_t run = run_vectors.divide(vector);
    return repeats ? count.remainder(run) : run;
  }
};

/// Runs of a few whole vectors, as groups are. Scales are on their way along with the elements.
template <typename Operation, int V>
__global__ void __launch_bounds__(kQuantizeThreads, Operation::kUsesGradient ? 3 : 4)
    vector_run_kernel(const typename Operation::Input* input,
                      const typename Operation::Input* gradient, typename Operation::Output* output,
                      VectorRuns runs, DeviceMap map) {
  using Input = typename Operation::Input;
  const Operation operation;
  constexpr uint32_t kTile = kQuantizeThreads * kUnroll;
  for (uint32_t base = blockIdx.x * kTile; base < runs.vectors; base += gridDim.x * kTile) {
    Pack<Input, V> x[kUnroll];
    Pack<Input, V> g[kUnroll];
    float scale[kUnroll];
    int32_t zero_point[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t v = base + u * kQuantizeThreads + threadIdx.x;
      if (v >= runs.vectors) break;
      x[u] = load_pack<V>(input + int64_t{v} * V);
      if constexpr (Operation::kUsesGradient) g[u] = load_pack<V>(gradient + int64_t{v} * V);
      const uint32_t index = runs.index(v);
      scale[u] = map.scale_at(index);
      zero_point[u] = map.zero_point_at(index);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t v = base + u * kQuantizeThreads + threadIdx.x;
      if (v >= runs.vectors) break;
      const CodeGrid grid(scale[u], zero_point[u], map.qmin, map.qmax);
      store_pack(output + int64_t{v} * V,
                 operation(x[u], Operation::kUsesGradient ? g[u] : x[u], grid));
    }
  }
}

/// Vectors in which the larger of the two types fills 16 bytes.
template <typename Operation>
inline constexpr int kOperationVector = 16 / std::max(sizeof(typename Operation::Input),
                                                      sizeof(typename Operation::Output));

/// Runs an operation over all elements. `gradient` is null for those without.
template <typename Operation>
void run_elementwise(const QuantizeArguments& a, const void* gradient, void* output, void* stream) {
  using Input = typename Operation::Input;
  using Output = typename Operation::Output;
  if (a.numel <= 0) return;
  constexpr int kVector = kOperationVector<Operation>;
  const auto* x = static_cast<const Input*>(a.input);
  const auto* g = static_cast<const Input*>(gradient);
  auto* y = static_cast<Output*>(output);
  const DeviceMap map(a);
  const bool aligned = is_aligned(x, sizeof(Input) * kVector) &&
                       is_aligned(y, sizeof(Output) * kVector) &&
                       (!g || is_aligned(g, sizeof(Input) * kVector));
  const bool whole = a.map.count == 1 || a.map.inner % kVector == 0;
  if (aligned && goes_by_column_vectors(a.numel, a.map, kVector)) {
    const ColumnVectors columns(a.numel, a.map, kVector);
    with_flag(a.zero_point != nullptr, [&](auto zero_point) {
      launch(Operation::kName, column_kernel<Operation, kVector, zero_point.value>, columns.grid(8),
             kQuantizeThreads, stream, x, g, y, columns, map);
    });
    return;
  }
  with_flag(aligned && whole, [&](auto vectorized) {
    constexpr int V = vectorized.value ? kVector : 1;
    const auto start_short = [&]<int W, bool kWhole>() {
      const unsigned blocks =
          grid_size(divide_up(a.numel, kQuantizeThreads * kUnroll * W), kQuantizeBlocks);
      launch(Operation::kName, short_run_kernel<Operation, W, kWhole>, blocks, kQuantizeThreads,
             stream, x, g, y, a.numel, map);
    };
    if (!vectorized.value && aligned) return start_short.template operator()<kVector, false>();
    if (a.map.count > 1 && a.map.inner / V < kWarp) {
      // Room above the last vector for the stride of the grid.
      constexpr int64_t kMostVectors = int64_t{1} << 30;
      if constexpr (V > 1) {
        if (a.numel / V <= kMostVectors && a.map.count <= kMostVectors) {
          const VectorRuns runs(a.numel, a.map, V);
          const unsigned blocks =
              grid_size(divide_up(runs.vectors, kQuantizeThreads * kUnroll), kQuantizeBlocks);
          launch(Operation::kName, vector_run_kernel<Operation, V>, blocks, kQuantizeThreads,
                 stream, x, g, y, runs, map);
          return;
        }
      }
      return start_short.template operator()<1, true>();
    }
    const Tiles tiles(a.numel, a.map, V, kWarp);
    const unsigned blocks = grid_size(divide_up(tiles.count, kQuantizeWarps), kQuantizeBlocks);
    launch(Operation::kName, tile_kernel<Operation, V>, blocks, kQuantizeThreads, stream, x, g, y,
           a.numel, tiles, map);
  });
}

// ---- Maxima -------------------------------------------------------------------------------------

/// The largest magnitude of many elements, gathered as bits, which order magnitudes as integers; of
/// 16-bit types two at a time. NaN and infinities, which enter no statistic, are noticed at the end
/// only: all_finite() says whether float_bits() holds.
template <typename T>
class LargestMagnitude {
 public:
  template <int V>
  __device__ void include(const Pack<T, V>& x) {
#pragma unroll
    for (int w = 0; w < Pack<T, V>::kWords; ++w) include_word(x.words[w]);
  }

  /// One float, or up to two 16-bit elements.
  __device__ void include_word(uint32_t word) {
    if constexpr (sizeof(T) == 4) {
      bits_ = max(bits_, word & 0x7fffffffu);
    } else {
      bits_ = __vmaxu2(bits_, word & 0x7fff7fffu);
    }
  }

  __device__ bool all_finite() const { return largest() < kInfinity; }

  /// The bits of the largest magnitude as a float.
  __device__ uint32_t float_bits() const { return as_float_bits(largest()); }

  /// The same of one place in the words.
  __device__ uint32_t float_bits_of(int place) const {
    return as_float_bits(sizeof(T) == 4 ? bits_ : bits_ >> (16 * place) & 0xffffu);
  }

 private:
  static constexpr uint32_t kInfinity = kIsBfloat16<T> ? 0x7f80u
                                        : kIsHalf<T>   ? 0x7c00u
                                                       : kInfinityBits;

  __device__ static uint32_t as_float_bits(uint32_t bits) {
    if constexpr (kIsBfloat16<T>) {
      return bits << 16;
    } else if constexpr (kIsHalf<T>) {
      return __float_as_uint(__half2float(__ushort_as_half(bits)));
    } else {
      return bits;
    }
  }

  __device__ uint32_t largest() const {
    return sizeof(T) == 4 ? bits_ : max(bits_ & 0xffffu, bits_ >> 16);
  }

  uint32_t bits_ = 0;
};

/// The bits of the largest finite magnitude among the vectors that for_each(f) calls f with. The
/// vectors are gone through again only where one of them holds a NaN or an infinity.
template <typename T, typename ForEach>
__device__ uint32_t finite_amax_bits(const ForEach& for_each) {
  LargestMagnitude<T> largest;
  for_each([&](const auto& vector) { largest.include(vector); });
  if (largest.all_finite()) [[likely]]
    return largest.float_bits();
  uint32_t bits = 0;
  for_each([&]<int V>(const Pack<T, V>& vector) {
    const Vector<float, V> x = to_floats(vector);
#pragma unroll
    for (int j = 0; j < V; ++j) bits = max(bits, finite_magnitude_bits(x[j]));
  });
  return bits;
}

/// The largest `value` among kLanes consecutive threads, a power of two: part of a warp, a warp or
/// a block. Every thread of the warp, or of the block, has to call.
template <int kLanes>
__device__ uint32_t lanes_max(uint32_t value) {
  if constexpr (kLanes < kWarp) {
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2)
      value = max(value, __shfl_xor_sync(kFullWarp, value, distance));
    return value;
  } else {
    return group_max<kLanes>(value);
  }
}

// ---- Rows that find their own scale -------------------------------------------------------------

/// Scales without anything written by them.
template <typename T>
struct ScaleOnly {
  using Input = T;
  using Output = int8_t;
  static constexpr const char* kName = "per_token_scale";
};

/// kGroup consecutive threads take a row each, find its scale and write operation(row). A thread
/// keeps kHeld vectors of the row in registers between the two; the rest is read again.
template <typename Operation, int V, int kGroup, int kHeld>
__global__ void __launch_bounds__(kGroup > kQuantizeThreads ? kGroup : kQuantizeThreads,
                                  kGroup <= kQuantizeThreads && V > 1 ? 4 : 1)
    row_kernel(const typename Operation::Input* input, int64_t rows, int64_t columns, int32_t qmin,
               int32_t qmax, typename Operation::Output* output, float* scale) {
  using T = typename Operation::Input;
  constexpr int kRows = std::max(kGroup, kQuantizeThreads) / kGroup;
  const int thread = threadIdx.x % kGroup;
  // Every thread makes the same rounds, as the exchange in lanes_max wants.
  for (int64_t first = int64_t{blockIdx.x} * kRows; first < rows;
       first += int64_t{gridDim.x} * kRows) {
    const int64_t row = first + threadIdx.x / kGroup;
    const int64_t vectors = row < rows ? columns / V : 0;
    const T* x = input + row * columns;
    Pack<T, V> held[kHeld];
#pragma unroll
    for (int u = 0; u < kHeld; ++u)
      if (thread + u * kGroup < vectors) held[u] = load_pack<V>(x + (thread + u * kGroup) * V);
    // Rows that fit the threads' registers, all but the longest, have no rest.
    constexpr int64_t kRest = int64_t{kHeld} * kGroup;
    const uint32_t amax = lanes_max<kGroup>(finite_amax_bits<T>([&](const auto& include) {
#pragma unroll
      for (int u = 0; u < kHeld; ++u)
        if (thread + u * kGroup < vectors) include(held[u]);
#pragma unroll 4
      for (int64_t v = kRest + thread; v < vectors; v += kGroup) include(load_pack<V>(x + v * V));
    }));
    const float row_scale = scale_from_amax(__uint_as_float(amax), qmax);
    if (thread == 0 && row < rows) scale[row] = row_scale;
    if constexpr (!std::is_same_v<Operation, ScaleOnly<T>>) {
      const Operation operation;
      const CodeGrid grid(row_scale, 0, qmin, qmax);
      auto* y = output + row * columns;
#pragma unroll
      for (int u = 0; u < kHeld; ++u) {
        if (thread + u * kGroup < vectors)
          store_pack(y + (thread + u * kGroup) * V, operation(held[u], held[u], grid));
      }
      for (int64_t v = kRest + thread; v < vectors; v += kGroup) {
        const Pack<T, V> vector = load_pack<V>(x + v * V);
        store_pack(y + v * V, operation(vector, vector, grid));
      }
    }
  }
}

/// Rows of kLanes vectors each, as groups are: kLanes threads of a warp take a row, and kUnroll
/// rows at a time.
template <typename Operation, int V, int kLanes>
__global__ void __launch_bounds__(kQuantizeThreads, 4)
    short_row_kernel(const typename Operation::Input* input, int64_t vectors, int32_t qmin,
                     int32_t qmax, typename Operation::Output* output, float* scale) {
  using T = typename Operation::Input;
  constexpr int64_t kTile = kQuantizeThreads * kUnroll;
  // Every thread makes the same rounds, as the exchange in lanes_max wants.
  for (int64_t base = blockIdx.x * kTile; base < vectors; base += gridDim.x * kTile) {
    Pack<T, V> x[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t v = base + u * kQuantizeThreads + threadIdx.x;
      x[u] = {};
      if (v < vectors) x[u] = load_pack<V>(input + v * V);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t v = base + u * kQuantizeThreads + threadIdx.x;
      const uint32_t amax =
          lanes_max<kLanes>(finite_amax_bits<T>([&](const auto& include) { include(x[u]); }));
      if (v >= vectors) continue;
      const float row_scale = scale_from_amax(__uint_as_float(amax), qmax);
      if (threadIdx.x % kLanes == 0) scale[v / kLanes] = row_scale;
      if constexpr (!std::is_same_v<Operation, ScaleOnly<T>>) {
        const Operation operation;
        store_pack(output + v * V, operation(x[u], x[u], CodeGrid(row_scale, 0, qmin, qmax)));
      }
    }
  }
}

/// Threads of a multiprocessor that held_row_kernel leaves room for: more would have too few
/// registers to hold their rows.
inline constexpr int kHeldRowThreads = 1024;

/// Threads of a block that takes rows in groups of so many.
__host__ __device__ constexpr int held_row_block(int group) {
  return group > kWarp ? group : 2 * kWarp;
}

/// Rows of at most kGroup * kHeld vectors, which their threads hold in registers: all loads of a
/// row are under way at once, and each block takes its rows and ends. Between a row's loads and its
/// stores stand the maximum of the group and a division; the other blocks of the multiprocessor
/// keep memory busy meanwhile.
template <typename Operation, int V, int kGroup, int kHeld>
__global__ void __launch_bounds__(held_row_block(kGroup), kHeldRowThreads / held_row_block(kGroup))
    held_row_kernel(const typename Operation::Input* input, int64_t rows, int64_t columns,
                    int32_t qmin, int32_t qmax, typename Operation::Output* output, float* scale) {
  using T = typename Operation::Input;
  const int thread = threadIdx.x % kGroup;
  const int64_t row =
      int64_t{blockIdx.x} * (held_row_block(kGroup) / kGroup) + threadIdx.x / kGroup;
  const int vectors = row < rows ? static_cast<int>(columns) / V : 0;
  const int64_t first = row * columns + thread * V;
  Pack<T, V> held[kHeld];
#pragma unroll
  for (int u = 0; u < kHeld; ++u) {
    held[u] = {};
    if (thread + u * kGroup < vectors) held[u] = load_pack<V>(input + first + u * kGroup * V);
  }
  LargestMagnitude<T> largest;
#pragma unroll
  for (int u = 0; u < kHeld; ++u) largest.include(held[u]);
  uint32_t bits = largest.float_bits();
  if (!largest.all_finite()) [[unlikely]] {
    // Rare, and so in a loop that reads again: short code for all others.
    bits = 0;
#pragma unroll 1
    for (int v = 0; thread + v < vectors; v += kGroup) {
      const Vector<float, V> x = to_floats(load_pack<V>(input + first + v * V));
#pragma unroll
      for (int j = 0; j < V; ++j) bits = max(bits, finite_magnitude_bits(x[j]));
    }
  }
  const uint32_t amax = group_max<kGroup>(bits);
  const float row_scale = scale_from_amax(__uint_as_float(amax), qmax);
  if (thread == 0 && row < rows) scale[row] = row_scale;
  if constexpr (!std::is_same_v<Operation, ScaleOnly<T>>) {
    const Operation operation;
    const CodeGrid grid(row_scale, 0, qmin, qmax);
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      if (thread + u * kGroup < vectors)
        store_pack(output + first + u * kGroup * V, operation(held[u], held[u], grid));
    }
  }
}

/// Rows too few and too long for a block each: gridDim.x blocks share a row and leave the bits of
/// its maximum in `scale`, which starts as zeros.
template <typename T, int V>
__global__ void __launch_bounds__(kQuantizeThreads)
    row_amax_kernel(const T* input, int64_t rows, int64_t columns, float* scale) {
  const int64_t vectors = columns / V;
  constexpr int64_t kTile = kQuantizeThreads * kUnroll;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const T* x = input + row * columns;
    uint32_t amax = finite_amax_bits<T>([&](const auto& include) {
      for (int64_t base = blockIdx.x * kTile; base < vectors; base += gridDim.x * kTile) {
        Pack<T, V> held[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t v = base + u * kQuantizeThreads + threadIdx.x;
          if (v < vectors) held[u] = load_pack<V>(x + v * V);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
          if (base + u * kQuantizeThreads + threadIdx.x < vectors) include(held[u]);
      }
      if (const int64_t i = vectors * V + threadIdx.x; blockIdx.x == 0 && i < columns)
        include(load_pack<1>(x + i));
    });
    amax = group_max<kQuantizeThreads>(amax);
    if (threadIdx.x == 0) atomicMax(reinterpret_cast<uint32_t*>(scale + row), amax);
  }
}

/// Maxima to scales, in place. A template, so that it may stand in a header.
template <typename = void>
__global__ void __launch_bounds__(kQuantizeThreads)
    scale_from_amax_kernel(float* scale, int64_t count, int32_t qmax) {
  for (int64_t i = int64_t{blockIdx.x} * kQuantizeThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kQuantizeThreads)
    scale[i] = scale_from_amax(scale[i], qmax);
}

inline void scales_from_amax(const char* name, float* scale, int64_t count, int32_t qmax,
                             void* stream) {
  launch(name, scale_from_amax_kernel<>, grid_size(divide_up(count, kQuantizeThreads), 8),
         kQuantizeThreads, stream, scale, count, qmax);
}

/// Columns from which a row is worth several blocks, where there are fewer rows than
/// multiprocessors.
inline constexpr int64_t kLongRow = 32768;

template <typename T>
void split_row_scales(const char* name, const T* input, int64_t rows, int64_t columns, int32_t qmax,
                      float* scale, void* stream) {
  check(cudaMemsetAsync(scale, 0, rows * sizeof(float), as_stream(stream)), name);
  constexpr int kVector = kVectorSize<T>;
  const bool vectors = (rows == 1 || columns % kVector == 0) && is_aligned(input, 16);
  const int64_t tiles = divide_up(columns, kQuantizeThreads * kUnroll * (vectors ? kVector : 1));
  const int64_t blocks = std::min(tiles, divide_up(int64_t{multiprocessors()} * 16, rows));
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(rows));
  launch(name, vectors ? row_amax_kernel<T, kVector> : row_amax_kernel<T, 1>, grid,
         kQuantizeThreads, stream, input, rows, columns, scale);
  scales_from_amax(name, scale, rows, qmax, stream);
}

/// Symmetric scales of rows from their own maxima, and what Operation makes of the rows with them:
/// Quantize, FakeQuantize or ScaleOnly (output null).
template <typename Operation>
void run_rows(const char* name, const void* input_pointer, ElementType type, int64_t rows,
              int64_t columns, int32_t qmin, int32_t qmax, typename Operation::Output* output,
              float* scale, void* stream) {
  using T = typename Operation::Input;
  constexpr bool kWrites = !std::is_same_v<Operation, ScaleOnly<T>>;
  if (rows <= 0) return;
  const auto* input = static_cast<const T*>(input_pointer);
  if (columns >= kLongRow && rows < multiprocessors()) {
    split_row_scales(name, input, rows, columns, qmax, scale, stream);
    if constexpr (kWrites) {
      const QuantizeArguments arguments{
          input, type, rows * columns, scale, nullptr, {columns, rows}, qmin, qmax};
      run_elementwise<Operation>(arguments, nullptr, output, stream);
    }
    return;
  }

  constexpr int kVector = kVectorSize<T>;
  const bool whole_vectors = columns % kVector == 0 && is_aligned(input, 16) &&
                             is_aligned(output, sizeof(*output) * kVector);
  with_flag(whole_vectors, [&](auto vectorized) {
    constexpr int V = vectorized.value ? kVector : 1;
    constexpr int kHeld = V == 1 ? 16 : 4;
    const auto start = [&](auto* kernel, int group) {
      const int threads = std::max(group, kQuantizeThreads);
      const unsigned blocks = grid_size(divide_up(rows, threads / group), kQuantizeBlocks);
      launch(name, kernel, blocks, threads, stream, input, rows, columns, qmin, qmax, output,
             scale);
    };
    const auto start_short = [&](auto* kernel, int lanes) {
      const int64_t vectors = rows * lanes;
      const unsigned blocks =
          grid_size(divide_up(vectors, kQuantizeThreads * kUnroll), kQuantizeBlocks);
      launch(name, kernel, blocks, kQuantizeThreads, stream, input, vectors, qmin, qmax, output,
             scale);
    };
    const auto start_held = [&](auto* kernel, int group) {
      const int threads = held_row_block(group);
      const auto blocks = static_cast<unsigned>(divide_up(rows, threads / group));
      launch(name, kernel, blocks, threads, stream, input, rows, columns, qmin, qmax, output,
             scale);
    };
    // The smallest group that holds the row in registers.
    const int64_t vectors = columns / V;
    if constexpr (V > 1) {
      if (vectors == 4) return start_short(short_row_kernel<Operation, V, 4>, 4);
      if (vectors == 8) return start_short(short_row_kernel<Operation, V, 8>, 8);
      if (vectors == 16) return start_short(short_row_kernel<Operation, V, 16>, 16);
      if (vectors == 32) return start_short(short_row_kernel<Operation, V, 32>, 32);
      if (vectors <= 8) return start(row_kernel<Operation, V, 8, 1>, 8);
      if (vectors <= 16) return start(row_kernel<Operation, V, 16, 1>, 16);
      if (vectors <= 32 * 4) return start_held(held_row_kernel<Operation, V, 32, 4>, 32);
      if (vectors <= 32 * 8) return start_held(held_row_kernel<Operation, V, 32, 8>, 32);
      if (vectors <= 64 * 8) return start_held(held_row_kernel<Operation, V, 64, 8>, 64);
      if (vectors <= 128 * 8) return start_held(held_row_kernel<Operation, V, 128, 8>, 128);
      if (vectors <= 256 * 8) return start_held(held_row_kernel<Operation, V, 256, 8>, 256);
      if (vectors <= 512 * 8) return start_held(held_row_kernel<Operation, V, 512, 8>, 512);
    } else {
      if (vectors <= kWarp * kHeld) return start(row_kernel<Operation, V, kWarp, kHeld>, kWarp);
      if (vectors <= 256 * kHeld) return start(row_kernel<Operation, V, 256, kHeld>, 256);
      if (vectors <= 512 * kHeld) return start(row_kernel<Operation, V, 512, kHeld>, 512);
    }
    start(row_kernel<Operation, V, 1024, kHeld>, 1024);
  });
}

}  // namespace vernier::cuda
