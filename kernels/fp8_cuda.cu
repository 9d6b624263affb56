#include <vernier/kernels/fp8_device.h>
#include <vernier/kernels/fp8_division.h>
#include <vernier/kernels/quantize_device.h>

namespace vernier::cuda {
namespace {

constexpr int kThreads = 256;

// ---- Element by element -------------------------------------------------------------------------

// The operations, made for one scale: outputs = operation(inputs, gradients) of a vector. Those
// without a gradient are passed the inputs twice.
template <typename T, NumberFormat kFormat>
struct Quantize {
  using Input = T;
  using Output = uint8_t;
  static constexpr bool kUsesGradient = false;
  static constexpr const char* kName = "quantize_fp8";

  Fp8Division<kFormat> division;

  __device__ explicit Quantize(float scale) : division(scale) {}

  template <int V>
  __device__ Fp8Codes<V> operator()(const Vector<T, V>& x, const Vector<T, V>&) const {
    return division.codes(x);
  }
};

template <typename T, NumberFormat kFormat, int V>
__device__ Vector<T, V> scaled_values(const Fp8Codes<V>& codes, float scale) {
  const Vector<float, V> values = fp8_to_float<kFormat, V>(codes);
  Vector<T, V> out;
#pragma unroll
  for (int j = 0; j < V; ++j) out[j] = from_float<T>(__fmul_rn(values[j], scale));
  return out;
}

template <typename T, NumberFormat kFormat>
struct Dequantize {
  using Input = uint8_t;
  using Output = T;
  static constexpr bool kUsesGradient = false;
  static constexpr const char* kName = "dequantize_fp8";

  float scale;

  __device__ explicit Dequantize(float s) : scale(s) {}

  template <int V>
  __device__ Vector<T, V> operator()(const Vector<uint8_t, V>& codes,
                                     const Vector<uint8_t, V>&) const {
    Fp8Codes<V> pairs;
    memcpy(&pairs, &codes, sizeof pairs);
    return scaled_values<T, kFormat, V>(pairs, scale);
  }
};

template <typename T, NumberFormat kFormat>
struct FakeQuantize {
  using Input = T;
  using Output = T;
  static constexpr bool kUsesGradient = false;
  static constexpr const char* kName = "fake_quantize_fp8";

  Fp8Division<kFormat> division;

  __device__ explicit FakeQuantize(float scale) : division(scale) {}

  template <int V>
  __device__ Vector<T, V> operator()(const Vector<T, V>& x, const Vector<T, V>&) const {
    return scaled_values<T, kFormat, V>(division.codes(x), division.scale());
  }
};

template <typename T, NumberFormat kFormat>
struct FakeQuantizeBackward {
  using Input = T;
  using Output = T;
  static constexpr bool kUsesGradient = true;
  static constexpr const char* kName = "fake_quantize_fp8_backward";

  float scale;
  float reciprocal;

  __device__ explicit FakeQuantizeBackward(float s)
      : scale(s), reciprocal(reciprocal_of_scale(s)) {}

  // The product is the quotient but for 3 * 2^-24 of it; what is nearer to the limit, and NaN,
  // divides.
  __device__ bool passes(float x) const {
    constexpr float kLimit = Fp8<kFormat>::kLastUnclipped;
    const float product = fabsf(__fmul_rn(x, reciprocal));
    if (product < kLimit * (1 - 0x1p-20f)) return true;
    if (product > kLimit * (1 + 0x1p-20f)) return false;
    return Fp8<kFormat>::passes_gradient(__fdiv_rn(x, scale));
  }

  template <int V>
  __device__ Vector<T, V> operator()(const Vector<T, V>& x, const Vector<T, V>& gradient) const {
    Vector<T, V> out;
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = passes(to_float(x[j])) ? gradient[j] : from_float<T>(0.0f);
    return out;
  }
};

struct DeviceMap {
  const float* scale;
  Divider inner;
  Divider count;

  __device__ float at(int64_t element) const {
    const int64_t run = inner.divide(element);
    return __ldg(scale + (run - count.divide(run) * count.divisor()));
  }
};

// Vectors in which the larger of the two types fills 16 bytes.
template <typename Operation>
constexpr int kOperationVector = 16 / std::max(sizeof(typename Operation::Input),
                                               sizeof(typename Operation::Output));

// kOneScale: one for the whole tensor. Else vectors do not straddle scales.
template <typename Operation, int V, bool kOneScale>
__global__ void __launch_bounds__(kThreads)
    elementwise_kernel(const typename Operation::Input* input,
                       const typename Operation::Input* gradient,
                       typename Operation::Output* output, int64_t numel, DeviceMap map) {
  using Input = typename Operation::Input;
  using Output = typename Operation::Output;
  const Operation whole(kOneScale ? __ldg(map.scale) : 1.0f);
  const auto scale_of = [&](int64_t v) { return kOneScale ? 1.0f : map.at(v); };
  const auto apply = [&]<int N>(const Vector<Input, N>& x, const Vector<Input, N>& g, float scale,
                                int64_t v) {
    const auto y = kOneScale ? whole(x, g) : Operation(scale)(x, g);
    static_assert(sizeof y == sizeof(Output) * N);
    *reinterpret_cast<std::remove_const_t<decltype(y)>*>(output + v) = y;
  };

  const int64_t vectors = numel / V;
  constexpr int64_t kTile = kThreads * kUnroll;
  for (int64_t base = blockIdx.x * kTile; base < vectors; base += gridDim.x * kTile) {
    const int64_t first = base + threadIdx.x;
    Vector<Input, V> x[kUnroll];
    Vector<Input, V> g[kUnroll];
    float scale[kUnroll];
    if (base + kTile <= vectors) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        x[u] = load_vector<V>(input + (first + u * kThreads) * V);
        if constexpr (Operation::kUsesGradient)
          g[u] = load_vector<V>(gradient + (first + u * kThreads) * V);
        scale[u] = scale_of((first + u * kThreads) * V);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        apply(x[u], Operation::kUsesGradient ? g[u] : x[u], scale[u], (first + u * kThreads) * V);
    } else {
      for (int64_t v = first; v < vectors; v += kThreads) {
        x[0] = load_vector<V>(input + v * V);
        if constexpr (Operation::kUsesGradient) g[0] = load_vector<V>(gradient + v * V);
        apply(x[0], Operation::kUsesGradient ? g[0] : x[0], scale_of(v * V), v * V);
      }
    }
  }

  // What is left behind the last whole vector.
  if (const int64_t i = vectors * V + threadIdx.x; blockIdx.x == 0 && i < numel)
    apply(load_vector<1>(input + i),
          load_vector<1>(Operation::kUsesGradient ? gradient + i : input + i), scale_of(i), i);
}

template <typename Operation>
void run_elementwise(const Fp8Arguments& a, const void* gradient, void* output, void* stream) {
  using Input = typename Operation::Input;
  using Output = typename Operation::Output;
  if (a.numel <= 0) return;
  constexpr int V = kOperationVector<Operation>;
  const auto* x = static_cast<const Input*>(a.input);
  const auto* g = static_cast<const Input*>(gradient);
  auto* y = static_cast<Output*>(output);
  const DeviceMap map{a.scale, Divider(a.map.inner), Divider(a.map.count)};
  const bool vectors = is_aligned(x, sizeof(Input) * V) && is_aligned(y, sizeof(Output) * V) &&
                       (!g || is_aligned(g, sizeof(Input) * V)) &&
                       (a.map.count == 1 || a.map.inner % V == 0);
  const auto start = [&](auto* kernel, int vector_size) {
    // Enough blocks to fill the GPU a few times over, so that they need not end together.
    const unsigned blocks = grid_size(divide_up(a.numel, kThreads * kUnroll * vector_size), 32);
    launch(Operation::kName, kernel, blocks, kThreads, stream, x, g, y, a.numel, map);
  };
  if (!vectors) return start(elementwise_kernel<Operation, 1, false>, 1);
  if (a.map.count == 1) return start(elementwise_kernel<Operation, V, true>, V);
  start(elementwise_kernel<Operation, V, false>, V);
}

template <template <typename, NumberFormat> typename Operation>
void run(const Fp8Arguments& a, const void* gradient, void* output, void* stream) {
  with_fp8_format(a.format, [&](auto format) {
    with_element_type(a.type, [&]<typename T>(T*) {
      run_elementwise<Operation<T, format.value>>(a, gradient, output, stream);
    });
  });
}

// ---- Row by row ---------------------------------------------------------------------------------

/// The bits of the largest finite magnitude in a vector.
template <typename T, int V>
__device__ uint32_t finite_amax_bits(const Vector<T, V>& x) {
  if constexpr (sizeof(T) == 2 && V % 2 == 0) {
    // Two magnitudes an instruction; they order as integers.
    constexpr uint32_t kInfinity = std::is_same_v<T, __half> ? 0x7c00u : 0x7f80u;
    const auto* words = reinterpret_cast<const uint32_t*>(&x);
    uint32_t pair = 0;
#pragma unroll
    for (int j = 0; j < V / 2; ++j) pair = __vmaxu2(pair, words[j] & 0x7fff7fffu);
    const uint32_t amax = max(pair & 0xffffu, pair >> 16);
    if (amax < kInfinity) {
      const auto bits = static_cast<unsigned short>(amax);
      if constexpr (std::is_same_v<T, __half>) {
        return __float_as_uint(__half2float(__ushort_as_half(bits)));
      } else {
        return __float_as_uint(__bfloat162float(__ushort_as_bfloat16(bits)));
      }
    }
  }
  uint32_t amax = 0;
#pragma unroll
  for (int j = 0; j < V; ++j) amax = max(amax, finite_magnitude_bits(to_float(x[j])));
  return amax;
}

// Vectors of a row that a thread keeps in registers between the maximum and the codes; the rest is
// read again.
template <int V>
constexpr int kHeld = V == 1 ? 16 : 4;

// kGroup consecutive threads, a warp or a block, take a row each.
template <typename T, NumberFormat kFormat, int V, int kGroup>
__global__ void __launch_bounds__(kGroup > kThreads ? kGroup : kThreads)
    row_kernel(const T* input, int64_t rows, int64_t columns, uint8_t* codes, float* scale) {
  constexpr int kRows = std::max(kGroup, kThreads) / kGroup;
  const int thread = threadIdx.x % kGroup;
  const int64_t vectors = columns / V;
  // With a block a row every thread makes the same rounds, as the barrier in group_max wants.
  for (int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kGroup; row < rows;
       row += int64_t{gridDim.x} * kRows) {
    const T* x = input + row * columns;
    Vector<T, V> held[kHeld<V>];
#pragma unroll
    for (int u = 0; u < kHeld<V>; ++u)
      if (const int64_t v = thread + u * kGroup; v < vectors) held[u] = load_vector<V>(x + v * V);
    uint32_t amax = 0;
#pragma unroll
    for (int u = 0; u < kHeld<V>; ++u)
      if (thread + u * kGroup < vectors) amax = max(amax, finite_amax_bits(held[u]));
    constexpr int64_t kRest = kHeld<V> * kGroup;
#pragma unroll 4
    for (int64_t v = kRest + thread; v < vectors; v += kGroup)
      amax = max(amax, finite_amax_bits(load_vector<V>(x + v * V)));

    const float row_scale = scale_from_amax(__uint_as_float(group_max<kGroup>(amax)),
                                            static_cast<int32_t>(Fp8<kFormat>::kMax));
    if (thread == 0) scale[row] = row_scale;
    const Fp8Division<kFormat> division(row_scale);
    const auto write = [&](int64_t v, const Vector<T, V>& vector) {
      *reinterpret_cast<Fp8Codes<V>*>(codes + row * columns + v * V) = division.codes(vector);
    };
#pragma unroll
    for (int u = 0; u < kHeld<V>; ++u)
      if (const int64_t v = thread + u * kGroup; v < vectors) write(v, held[u]);
    for (int64_t v = kRest + thread; v < vectors; v += kGroup) write(v, load_vector<V>(x + v * V));
  }
}

// Columns from which a row is worth several blocks, where there are fewer rows than
// multiprocessors.
constexpr int64_t kLongRow = 32768;

template <typename T, NumberFormat kFormat>
void run_rows(const T* input, ElementType type, int64_t rows, int64_t columns, uint8_t* codes,
              float* scale, void* stream) {
  if (rows <= 0) return;
  if (columns >= kLongRow && rows < multiprocessors()) {
    per_token_scale(input, type, rows, columns, static_cast<int32_t>(Fp8<kFormat>::kMax), scale,
                    stream);
    return quantize_fp8({kFormat, input, type, rows * columns, scale, {columns, rows}}, codes,
                        stream);
  }
  constexpr int kVector = kVectorSize<T>;
  const bool whole_vectors =
      columns % kVector == 0 && is_aligned(input, 16) && is_aligned(codes, kVector);
  with_flag(whole_vectors, [&](auto vectorized) {
    constexpr int V = vectorized.value ? kVector : 1;
    const auto start = [&](auto* kernel, int group) {
      const int threads = std::max(group, kThreads);
      const unsigned blocks = grid_size(divide_up(rows, threads / group), 64);
      launch("quantize_fp8_per_token", kernel, blocks, threads, stream, input, rows, columns, codes,
             scale);
    };
    // The smallest group that holds the row in registers.
    const int64_t loads = divide_up(columns, V * kHeld<V>);
    if (loads <= kWarp) return start(row_kernel<T, kFormat, V, kWarp>, kWarp);
    if (loads <= kThreads) return start(row_kernel<T, kFormat, V, kThreads>, kThreads);
    start(row_kernel<T, kFormat, V, 1024>, 1024);
  });
}

// ---- Epilogue -----------------------------------------------------------------------------------

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    epilogue_kernel(const Fp8EpilogueArguments a, Divider vectors_per_row) {
  const int64_t per_row = vectors_per_row.divisor();
  for (int64_t v = int64_t{blockIdx.x} * kThreads + threadIdx.x; v < a.rows * per_row;
       v += int64_t{gridDim.x} * kThreads) {
    const int64_t row = vectors_per_row.divide(v);
    const int64_t column = (v - row * per_row) * V;
    Vector<float, V> values = load_vector<V>(a.products + row * a.stride + column);
    if (a.weight_scale && a.weight_scale_per_column) {
      const auto scales = load_vector<V>(a.weight_scale + column);
#pragma unroll
      for (int j = 0; j < V; ++j) values[j] = __fmul_rn(values[j], scales[j]);
    } else if (a.weight_scale) {
      const float scale = *a.weight_scale;
#pragma unroll
      for (int j = 0; j < V; ++j) values[j] = __fmul_rn(values[j], scale);
    }
    if (a.input_scale) {
      const float scale = a.input_scale[a.input_scale_per_row ? row : 0];
#pragma unroll
      for (int j = 0; j < V; ++j) values[j] = __fmul_rn(values[j], scale);
    }
    if (a.bias) {
      const auto bias = load_vector<V>(a.bias + column);
#pragma unroll
      for (int j = 0; j < V; ++j) values[j] = __fadd_rn(values[j], bias[j]);
    }
    Vector<T, V> out;
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = from_float<T>(values[j]);
    store_vector(static_cast<T*>(a.output) + v * V, out);
  }
}

template <typename T, int V>
void run_epilogue(const Fp8EpilogueArguments& a, void* stream) {
  const Divider vectors_per_row(a.columns / V);
  const int64_t tiles = divide_up(a.rows * vectors_per_row.divisor(), kThreads);
  launch("fp8_epilogue", epilogue_kernel<T, V>, grid_size(tiles, 32), kThreads, stream, a,
         vectors_per_row);
}

}  // namespace

void quantize_fp8(const Fp8Arguments& a, uint8_t* codes, void* stream) {
  run<Quantize>(a, nullptr, codes, stream);
}

void dequantize_fp8(const Fp8Arguments& a, void* output, void* stream) {
  run<Dequantize>(a, nullptr, output, stream);
}

void fake_quantize_fp8(const Fp8Arguments& a, void* output, void* stream) {
  run<FakeQuantize>(a, nullptr, output, stream);
}

void fake_quantize_fp8_backward(const Fp8Arguments& a, const void* gradient, void* output,
                                void* stream) {
  run<FakeQuantizeBackward>(a, gradient, output, stream);
}

void quantize_fp8_per_token(NumberFormat format, const void* input, ElementType type, int64_t rows,
                            int64_t columns, uint8_t* codes, float* scale, void* stream) {
  with_fp8_format(format, [&](auto constant) {
    with_element_type(type, [&]<typename T>(T*) {
      run_rows<T, constant.value>(static_cast<const T*>(input), type, rows, columns, codes, scale,
                                  stream);
    });
  });
}

void fp8_epilogue(const Fp8EpilogueArguments& a, void* stream) {
  if (a.rows <= 0 || a.columns <= 0) return;
  constexpr int V = 4;
  const bool vectors = a.columns % V == 0 && a.stride % V == 0 && is_aligned(a.products, 16) &&
                       is_aligned(a.weight_scale, a.weight_scale_per_column ? 16 : 4) &&
                       is_aligned(a.bias, 16) && is_aligned(a.output, 16);
  with_element_type(a.output_type, [&]<typename T>(T*) {
    if (vectors) {
      run_epilogue<T, V>(a, stream);
    } else {
      run_epilogue<T, 1>(a, stream);
    }
  });
}

}  // namespace vernier::cuda
