#include <vernier/kernels/activation_quantize_device.h>
#include <vernier/kernels/row_codes_cuda.h>

namespace vernier::cuda {
namespace {

/// A chunk of the input, gated by one of `up` where there is one, becomes what is quantized.
/// `element` is the index of its first element in the result.
template <typename T, bool kWhole>
__device__ void activate_chunk(const ActivationQuantizeArguments& a, Activation activation,
                               const Chunk& up, int64_t element, int64_t column, Chunk& x) {
#pragma unroll
  for (int j = 0; j < kChunk; ++j) x[j] = activate(activation, x[j]);
  if (a.up) {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) x[j] = __fmul_rn(x[j], up[j]);
  }
  finish_values<T, kWhole>(a.codes, element, column, x);
  if constexpr (!kWhole) clear_behind(a.codes.columns - column, x);
}

// A row of up to kGroup * kChunks whole chunks.
template <typename T, Activation kActivation, int kGroup, int kChunks>
__global__ void __launch_bounds__(resident_threads(kChunks))
    activation_kernel(const __grid_constant__ ActivationQuantizeArguments a) {
  using RowGroup = Group<kGroup>;
  __shared__ typename RowGroup::Memory memory;
  extern __shared__ __align__(16) unsigned char fetched[];
  RowGroup group(memory);
  using RowPrefetch = Prefetch<T, RowGroup::kBlock, kChunks>;
  RowPrefetch next_input(fetched);
  RowPrefetch next_up(fetched + RowPrefetch::kBytes);

  const RowCodes& r = a.codes;
  const T* const input = static_cast<const T*>(a.input);
  const T* const up = static_cast<const T*>(a.up);
  const int chunks = static_cast<int>(chunks_of(r));
  const int code_chunks = static_cast<int>(code_chunks_of(r));
  constexpr int kStep = kGroup * kChunk;
  const int first_column = RowGroup::thread() * kChunk;
  const int left = static_cast<int>(r.columns) - first_column;
  const auto has = [&](int u) { return RowGroup::thread() + u * kGroup < chunks; };
  const auto fetch = [&](int u, int64_t first) {
    next_input.start(u, input + first + u * kStep);
    if (up) next_up.start(u, up + first + u * kStep);
  };

  const int64_t stride = int64_t{gridDim.x} * RowGroup::kRows;
  int64_t row = int64_t{blockIdx.x} * RowGroup::kRows + RowGroup::index();
  int64_t next = row * a.row_stride + first_column;  // where the thread fetches from
  if (row < r.rows) {
#pragma unroll
    for (int u = 0; u < kChunks; ++u)
      if (has(u)) fetch(u, next);
  }
  for (; row < r.rows; row += stride) {
    const int64_t first = row * r.columns + first_column;
    next += stride * a.row_stride;
    Chunk x[kChunks];
    RowPrefetch::wait();
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (!has(u)) continue;
      Chunk gates = {};
      next_input.read(u, x[u]);
      if (up) next_up.read(u, gates);
      if (row + stride < r.rows) fetch(u, next);
      activate_chunk<T, true>(a, kActivation, gates, first + u * kStep, first_column + u * kStep,
                              x[u]);
    }

    const ChunkCodes codes =
        r.scale ? static_codes(r)
                : row_codes(r, row, group_amax(group, x, has), RowGroup::thread() == 0);
    int8_t* target = r.codes + r.code_offset(row, first_column);
    const int64_t target_step = r.col32 ? kStep * r.rows : kStep;
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (RowGroup::thread() + u * kGroup < code_chunks)
        store_codes<true>(r, target, left - u * kStep, has(u) ? codes(x[u]) : uint2{0, 0});
      target += target_step;
    }
  }
}

constexpr int kLongThreads = 256;

// A row of any length and place, computed again for the codes where the scale needs a pass of its
// own.
template <typename T, bool kWhole>
__global__ void __launch_bounds__(kLongThreads)
    long_activation_kernel(const __grid_constant__ ActivationQuantizeArguments a) {
  using RowGroup = Group<kLongThreads>;
  __shared__ typename RowGroup::Memory memory;
  RowGroup group(memory);
  const RowCodes& r = a.codes;
  const int64_t chunks = chunks_of(r);
  for (int64_t row = blockIdx.x; row < r.rows; row += gridDim.x) {
    const T* const input = static_cast<const T*>(a.input) + row * a.row_stride;
    const T* const up = static_cast<const T*>(a.up) + (a.up ? row * a.row_stride : 0);
    // Calls f(column, x) with the values to quantize.
    const auto for_each_chunk = [&](const auto& f) {
      for (int64_t v = threadIdx.x; v < chunks; v += kLongThreads) {
        const int64_t column = v * kChunk;
        Chunk x, gates = {};
        load_chunk<kWhole>(input + column, r.columns - column, x);
        if (a.up) load_chunk<kWhole>(up + column, r.columns - column, gates);
        activate_chunk<T, kWhole>(a, a.activation, gates, row * r.columns + column, column, x);
        f(column, x);
      }
    };
    uint32_t amax = 0;
    if (!r.scale) {
      for_each_chunk([&](int64_t, const Chunk& x) { amax = max(amax, finite_amax_bits(x)); });
      amax = group.max(amax);
    }
    const ChunkCodes codes = r.scale ? static_codes(r) : row_codes(r, row, amax, threadIdx.x == 0);
    for_each_chunk([&](int64_t column, const Chunk& x) {
      store_codes<kWhole>(r, r.codes + r.code_offset(row, column), r.columns - column, codes(x));
    });
    for (int64_t v = chunks + threadIdx.x; v < code_chunks_of(r); v += kLongThreads)
      store_codes<kWhole>(r, r.codes + r.code_offset(row, v * kChunk), 0, uint2{0, 0});
  }
}

// ---- Launches -----------------------------------------------------------------------------------

constexpr const char* kName = "activation_quantize";

template <typename T, Activation kActivation, int kGroup, int kChunks>
void start_activation(const ActivationQuantizeArguments& a, void* stream) {
  using RowGroup = Group<kGroup>;
  const int memory = Prefetch<T, RowGroup::kBlock, kChunks>::kBytes * (a.up ? 2 : 1);
  const unsigned blocks = grid_size(divide_up(a.codes.rows, RowGroup::kRows),
                                    resident_threads(kChunks) / RowGroup::kBlock);
  launch_with_memory(kName, activation_kernel<T, kActivation, kGroup, kChunks>, blocks,
                     RowGroup::kBlock, memory, stream, a);
}

template <typename T>
void run_activation(const ActivationQuantizeArguments& a, void* stream) {
  const int64_t chunks = code_chunks_of(a.codes);
  const bool whole = has_whole_chunks(a.codes) && is_aligned(a.input, 16) && is_aligned(a.up, 16) &&
                     a.row_stride % kChunk == 0;
  // Twice the row has to fit into shared memory.
  constexpr int kMostChunks = 8192 / static_cast<int>(sizeof(T));
  if (whole && chunks <= kMostChunks) {
    return with_activation(a.activation, [&]<Activation kActivation>() {
      if (chunks <= 32 * 4) return start_activation<T, kActivation, 32, 4>(a, stream);
      if (chunks <= 128 * 4) return start_activation<T, kActivation, 128, 4>(a, stream);
      if (chunks <= 256 * 4) return start_activation<T, kActivation, 256, 4>(a, stream);
      if (chunks <= 256 * 8) return start_activation<T, kActivation, 256, 8>(a, stream);
      if constexpr (kMostChunks > 256 * 8) start_activation<T, kActivation, 512, 8>(a, stream);
    });
  }
  with_flag(whole, [&](auto flag) {
    launch(kName, long_activation_kernel<T, flag.value>, grid_size(a.codes.rows, 8), kLongThreads,
           stream, a);
  });
}

}  // namespace

void activation_quantize(const ActivationQuantizeArguments& a, void* stream) {
  if (a.codes.rows <= 0) return;
  with_element_type(a.codes.type, [&]<typename T>(T*) { run_activation<T>(a, stream); });
}

}  // namespace vernier::cuda
