#include <vernier/kernels/launch.h>
#include <vernier/kernels/quantize_device.h>

namespace vernier::cuda {
namespace {

constexpr int kThreads = 256;

// ---- Element by element -------------------------------------------------------------------------

// A scale and zero point with the range of the codes.
struct CodeGrid {
  float scale;
  int32_t zero_point;
  int32_t qmin;
  int32_t qmax;
};

// The operations: output = operation(x, gradient, grid). Those without a gradient are passed x
// twice.
template <typename T>
struct Quantize {
  using Input = T;
  using Output = int8_t;
  static constexpr bool kUsesGradient = false;
  static constexpr const char* kName = "quantize";

  __device__ int8_t operator()(T x, T, const CodeGrid& g) const {
    return static_cast<int8_t>(quantize_value(to_float(x), g.scale, g.zero_point, g.qmin, g.qmax));
  }
};

template <typename T>
struct Dequantize {
  using Input = int8_t;
  using Output = T;
  static constexpr bool kUsesGradient = false;
  static constexpr const char* kName = "dequantize";

  __device__ T operator()(int8_t code, int8_t, const CodeGrid& g) const {
    return from_float<T>(dequantize_value(code, g.scale, g.zero_point));
  }
};

template <typename T>
struct FakeQuantize {
  using Input = T;
  using Output = T;
  static constexpr bool kUsesGradient = false;
  static constexpr const char* kName = "fake_quantize";

  __device__ T operator()(T x, T, const CodeGrid& g) const {
    const int32_t code = quantize_value(to_float(x), g.scale, g.zero_point, g.qmin, g.qmax);
    return from_float<T>(dequantize_value(code, g.scale, g.zero_point));
  }
};

template <typename T>
struct FakeQuantizeBackward {
  using Input = T;
  using Output = T;
  static constexpr bool kUsesGradient = true;
  static constexpr const char* kName = "fake_quantize_backward";

  __device__ T operator()(T x, T gradient, const CodeGrid& g) const {
    return passes_gradient(to_float(x), g.scale, g.zero_point, g.qmin, g.qmax)
               ? gradient
               : from_float<T>(0.0f);
  }
};

// How the elements of a vector find their scales.
enum class Lookup {
  one,         // one scale for the whole tensor, read once
  per_vector,  // vectors do not straddle scales
  walk         // each element may be the first of the next scale
};

struct DeviceMap {
  const float* scale;
  const int32_t* zero_point;  // null: all zero
  Divider inner;
  Divider count;
  int32_t qmin;
  int32_t qmax;

  __device__ CodeGrid at(int64_t index) const {
    return {__ldg(scale + index), zero_point ? __ldg(zero_point + index) : 0, qmin, qmax};
  }
};

// Where an element stands in the map: the index of its scale and its place in the run that shares
// it.
struct Place {
  int64_t index;
  int64_t offset;

  __device__ Place(int64_t element, const DeviceMap& map) {
    const int64_t run = map.inner.divide(element);
    offset = element - run * map.inner.divisor();
    index = run - map.count.divide(run) * map.count.divisor();
  }

  /// Moves to the next element; true where that changes the scale.
  __device__ bool advance(const DeviceMap& map) {
    if (++offset < map.inner.divisor()) return false;
    offset = 0;
    if (++index == map.count.divisor()) index = 0;
    return true;
  }
};

// Vectors in which the larger of the two types fills 16 bytes.
template <typename Operation>
constexpr int kOperationVector = 16 / std::max(sizeof(typename Operation::Input),
                                               sizeof(typename Operation::Output));

template <typename Operation, int V, Lookup kLookup>
__global__ void __launch_bounds__(kThreads)
    elementwise_kernel(const typename Operation::Input* input,
                       const typename Operation::Input* gradient,
                       typename Operation::Output* output, int64_t numel, DeviceMap map) {
  using Input = typename Operation::Input;
  using Output = typename Operation::Output;
  const Operation operation;
  CodeGrid grid = map.at(0);

  const int64_t vectors = numel / V;
  constexpr int64_t kTile = kThreads * kUnroll;
  for (int64_t base = blockIdx.x * kTile; base < vectors; base += gridDim.x * kTile) {
    Vector<Input, V> x[kUnroll];
    Vector<Input, V> g[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t v = base + u * kThreads + threadIdx.x;
      if (v >= vectors) break;
      x[u] = load_vector<V>(input + v * V);
      if constexpr (Operation::kUsesGradient) g[u] = load_vector<V>(gradient + v * V);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t v = base + u * kThreads + threadIdx.x;
      if (v >= vectors) break;
      const Vector<Input, V>& gradients = Operation::kUsesGradient ? g[u] : x[u];
      Vector<Output, V> y;
      if constexpr (kLookup == Lookup::walk) {
        Place place(v * V, map);
        grid = map.at(place.index);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          y[j] = operation(x[u][j], gradients[j], grid);
          if (j + 1 < V && place.advance(map)) grid = map.at(place.index);
        }
      } else {
        if constexpr (kLookup == Lookup::per_vector) grid = map.at(Place(v * V, map).index);
#pragma unroll
        for (int j = 0; j < V; ++j) y[j] = operation(x[u][j], gradients[j], grid);
      }
      store_vector(output + v * V, y);
    }
  }

  // What is left behind the last whole vector.
  if (const int64_t i = vectors * V + threadIdx.x; blockIdx.x == 0 && i < numel) {
    const Input g = Operation::kUsesGradient ? gradient[i] : input[i];
    output[i] = operation(input[i], g, map.at(Place(i, map).index));
  }
}

template <typename Operation>
void run_elementwise(const QuantizeArguments& a, const void* gradient, void* output, void* stream) {
  using Input = typename Operation::Input;
  using Output = typename Operation::Output;
  if (a.numel <= 0) return;
  constexpr int V = kOperationVector<Operation>;
  const auto* x = static_cast<const Input*>(a.input);
  const auto* g = static_cast<const Input*>(gradient);
  auto* y = static_cast<Output*>(output);
  const DeviceMap map{a.scale, a.zero_point, Divider(a.map.inner), Divider(a.map.count),
                      a.qmin,  a.qmax};
  const bool aligned = is_aligned(x, sizeof(Input) * V) && is_aligned(y, sizeof(Output) * V) &&
                       (!g || is_aligned(g, sizeof(Input) * V));
  const auto start = [&](auto* kernel, int vector_size) {
    // Enough blocks to fill the GPU a few times over, so that they need not end together.
    const unsigned blocks = grid_size(divide_up(a.numel, kThreads * kUnroll * vector_size), 32);
    launch(Operation::kName, kernel, blocks, kThreads, stream, x, g, y, a.numel, map);
  };
  if (!aligned) {
    if (a.map.count == 1) return start(elementwise_kernel<Operation, 1, Lookup::one>, 1);
    return start(elementwise_kernel<Operation, 1, Lookup::per_vector>, 1);
  }
  if (a.map.count == 1) return start(elementwise_kernel<Operation, V, Lookup::one>, V);
  if (a.map.inner % V == 0) return start(elementwise_kernel<Operation, V, Lookup::per_vector>, V);
  start(elementwise_kernel<Operation, V, Lookup::walk>, V);
}

// ---- Row by row ---------------------------------------------------------------------------------

// Vectors of a row that a thread keeps in registers between the maximum and the codes; the rest is
// read again.
template <int V>
constexpr int kHeld = V == 1 ? 16 : 4;

// kGroup consecutive threads, a warp or a block, take a row each. `codes` null: scales only.
template <typename T, int V, int kGroup, bool kWithCodes>
__global__ void __launch_bounds__(kGroup > kThreads ? kGroup : kThreads)
    row_kernel(const T* input, int64_t rows, int64_t columns, int32_t qmin, int32_t qmax,
               int8_t* codes, float* scale) {
  constexpr int kRows = std::max(kGroup, kThreads) / kGroup;
  const int thread = threadIdx.x % kGroup;
  const int64_t vectors = columns / V;
  // With a block a row every thread makes the same rounds, as the barrier in group_max wants.
  for (int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kGroup; row < rows;
       row += int64_t{gridDim.x} * kRows) {
    const T* x = input + row * columns;
    uint32_t amax = 0;
    const auto include = [&](const Vector<T, V>& vector) {
#pragma unroll
      for (int j = 0; j < V; ++j) amax = max(amax, finite_magnitude_bits(to_float(vector[j])));
    };
    Vector<T, V> held[kHeld<V>];
#pragma unroll
    for (int u = 0; u < kHeld<V>; ++u) {
      const int64_t v = thread + u * kGroup;
      if (v < vectors) held[u] = load_vector<V>(x + v * V);
    }
#pragma unroll
    for (int u = 0; u < kHeld<V>; ++u)
      if (thread + u * kGroup < vectors) include(held[u]);
    constexpr int64_t kRest = kHeld<V> * kGroup;
#pragma unroll 4
    for (int64_t v = kRest + thread; v < vectors; v += kGroup) include(load_vector<V>(x + v * V));

    const float row_scale = scale_from_amax(__uint_as_float(group_max<kGroup>(amax)), qmax);
    if (thread == 0) scale[row] = row_scale;
    if constexpr (kWithCodes) {
      int8_t* row_codes = codes + row * columns;
      const auto write = [&](int64_t v, const Vector<T, V>& vector) {
        Vector<int8_t, V> out;
#pragma unroll
        for (int j = 0; j < V; ++j)
          out[j] =
              static_cast<int8_t>(quantize_value(to_float(vector[j]), row_scale, 0, qmin, qmax));
        store_vector(row_codes + v * V, out);
      };
#pragma unroll
      for (int u = 0; u < kHeld<V>; ++u)
        if (thread + u * kGroup < vectors) write(thread + u * kGroup, held[u]);
      for (int64_t v = kRest + thread; v < vectors; v += kGroup)
        write(v, load_vector<V>(x + v * V));
    }
  }
}

// Rows too few and too long for a block each: gridDim.x blocks share a row and leave the bits of
// its maximum in `scale`, which starts as zeros.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    row_amax_kernel(const T* input, int64_t rows, int64_t columns, float* scale) {
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    uint32_t amax = 0;
    for_each_element<V>(input + row * columns, columns,
                        [&](T x) { amax = max(amax, finite_magnitude_bits(to_float(x))); });
    amax = group_max<kThreads>(amax);
    if (threadIdx.x == 0) atomicMax(reinterpret_cast<uint32_t*>(scale + row), amax);
  }
}

__global__ void __launch_bounds__(kThreads)
    scale_from_amax_kernel(float* scale, int64_t rows, int32_t qmax) {
  for (int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x; row < rows;
       row += int64_t{gridDim.x} * kThreads)
    scale[row] = scale_from_amax(scale[row], qmax);
}

// Columns from which a row is worth several blocks, where there are fewer rows than
// multiprocessors.
constexpr int64_t kLongRow = 32768;

template <typename T>
void split_row_scales(const T* input, int64_t rows, int64_t columns, int32_t qmax, float* scale,
                      void* stream) {
  check(cudaMemsetAsync(scale, 0, rows * sizeof(float), as_stream(stream)), "per_token_scale");
  constexpr int V = kVectorSize<T>;
  const bool vectors = columns % V == 0 && is_aligned(input, 16);
  const int64_t tiles = divide_up(columns, kThreads * kUnroll * (vectors ? V : 1));
  const int64_t blocks = std::min(tiles, divide_up(int64_t{multiprocessors()} * 16, rows));
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(rows));
  launch("per_token_scale", vectors ? row_amax_kernel<T, V> : row_amax_kernel<T, 1>, grid, kThreads,
         stream, input, rows, columns, scale);
  launch("per_token_scale", scale_from_amax_kernel, grid_size(divide_up(rows, kThreads), 8),
         kThreads, stream, scale, rows, qmax);
}

// `codes` null: scales only.
template <typename T>
void run_rows(const T* input, ElementType type, int64_t rows, int64_t columns, int32_t qmin,
              int32_t qmax, int8_t* codes, float* scale, void* stream) {
  if (rows <= 0) return;
  if (columns >= kLongRow && rows < multiprocessors()) {
    split_row_scales(input, rows, columns, qmax, scale, stream);
    if (!codes) return;
    const QuantizeArguments arguments{input, type, rows * columns, scale, nullptr, {columns, rows},
                                      qmin,  qmax};
    return quantize(arguments, codes, stream);
  }

  constexpr int kVector = kVectorSize<T>;
  const bool whole_vectors =
      columns % kVector == 0 && is_aligned(input, 16) && is_aligned(codes, kVector);
  with_flag(whole_vectors, [&](auto vectorized) {
    with_flag(codes != nullptr, [&](auto with_codes) {
      constexpr int V = vectorized.value ? kVector : 1;
      constexpr bool kWithCodes = with_codes.value;
      const auto start = [&](auto* kernel, int group) {
        const int threads = std::max(group, kThreads);
        const unsigned blocks = grid_size(divide_up(rows, threads / group), 64);
        launch(kWithCodes ? "quantize_per_token" : "per_token_scale", kernel, blocks, threads,
               stream, input, rows, columns, qmin, qmax, codes, scale);
      };
      // The smallest group that holds the row in registers.
      const int64_t loads = divide_up(columns, V * kHeld<V>);
      if (loads <= kWarp) return start(row_kernel<T, V, kWarp, kWithCodes>, kWarp);
      if (loads <= kThreads) return start(row_kernel<T, V, kThreads, kWithCodes>, kThreads);
      start(row_kernel<T, V, 1024, kWithCodes>, 1024);
    });
  });
}

}  // namespace

void quantize(const QuantizeArguments& a, int8_t* codes, void* stream) {
  with_element_type(a.input_type, [&]<typename T>(T*) {
    run_elementwise<Quantize<T>>(a, nullptr, codes, stream);
  });
}

void dequantize(const QuantizeArguments& a, void* output, void* stream) {
  with_element_type(a.input_type, [&]<typename T>(T*) {
    run_elementwise<Dequantize<T>>(a, nullptr, output, stream);
  });
}

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

void per_token_scale(const void* input, ElementType type, int64_t rows, int64_t columns,
                     int32_t qmax, float* scale, void* stream) {
  with_element_type(type, [&]<typename T>(T*) {
    run_rows(static_cast<const T*>(input), type, rows, columns, 0, qmax, nullptr, scale, stream);
  });
}

void quantize_per_token(const void* input, ElementType type, int64_t rows, int64_t columns,
                        int32_t qmin, int32_t qmax, int8_t* codes, float* scale, void* stream) {
  with_element_type(type, [&]<typename T>(T*) {
    run_rows(static_cast<const T*>(input), type, rows, columns, qmin, qmax, codes, scale, stream);
  });
}

}  // namespace vernier::cuda
