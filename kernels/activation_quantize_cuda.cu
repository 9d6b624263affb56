#include <vernier/kernels/activation_quantize_device.h>
#include <vernier/kernels/row_codes_cuda.h>

namespace vernier::cuda {
namespace {

__device__ inline void activate_chunk(Activation activation, Chunk& x) {
#pragma unroll
  for (int j = 0; j < kChunk; ++j) x[j] = activate(activation, x[j]);
}

__device__ inline void multiply_chunk(const Chunk& factors, Chunk& x) {
#pragma unroll
  for (int j = 0; j < kChunk; ++j) x[j] = __fmul_rn(x[j], factors[j]);
}

/// Most threads of a multiprocessor, whose registers have to suffice for as many.
constexpr int kResidentThreads = 1024;

/// Chunks of a thread.
constexpr int kThreadChunks = 4;

// A row of up to kGroup * kThreadChunks whole chunks. The loops over chunks stay loops: their code
// is long enough, and many times of it would no longer come from the instruction cache in time.
// kPlain: no output, no pre_scale, row-major codes.
template <typename T, Activation kActivation, int kGroup, bool kDynamic, bool kPlain>
__global__ void __launch_bounds__(Group<kGroup>::kBlock, kResidentThreads / Group<kGroup>::kBlock)
    activation_kernel(const __grid_constant__ ActivationQuantizeArguments a) {
  using RowGroup = Group<kGroup>;
  __shared__ typename RowGroup::Memory memory;
  extern __shared__ __align__(16) unsigned char fetched[];
  RowGroup group(memory);
  // The values of a row whose scale is not known yet, then the next row's input.
  using RowValues = Prefetch<float, RowGroup::kBlock, kThreadChunks>;
  using RowPrefetch = Prefetch<T, RowGroup::kBlock, kThreadChunks>;
  constexpr int kValueBytes = kDynamic ? RowValues::kBytes : 0;
  RowValues values(fetched);
  RowPrefetch next_input(fetched + kValueBytes);
  RowPrefetch next_up(fetched + kValueBytes + RowPrefetch::kBytes);

  const RowCodes& r = a.codes;
  const T* const input = static_cast<const T*>(a.input);
  const T* const up = static_cast<const T*>(a.up);
  // Of the thread's chunks: how many, how many that get codes, columns from one to the next.
  const auto share = [](int64_t chunks) {
    return (static_cast<int>(chunks) - RowGroup::thread() + kGroup - 1) / kGroup;
  };
  const int chunks = share(chunks_of(r)), code_chunks = share(code_chunks_of(r));
  constexpr int kStep = kGroup * kChunk;
  const int first_column = RowGroup::thread() * kChunk;
  const int64_t target_step = !kPlain && r.col32 ? kStep * r.rows : kStep;
  const auto fetch = [&](int u, int64_t first) {
    next_input.start(u, input + first + u * kStep);
    if (up) next_up.start(u, up + first + u * kStep);
  };
  // Only of use without kDynamic.
  const ChunkCodes fixed = kDynamic ? ChunkCodes(1.0f, 0, r.qmin, r.qmax) : static_codes(r);

  const int64_t stride = int64_t{gridDim.x} * RowGroup::kRows;
  int64_t row = int64_t{blockIdx.x} * RowGroup::kRows + RowGroup::index();
  int64_t next = row * a.row_stride + first_column;  // where the thread fetches from
  if (row < r.rows) {
    for (int u = 0; u < chunks; ++u) fetch(u, next);
  }
  for (; row < r.rows; row += stride) {
    const int64_t first = row * r.columns + first_column;
    next += stride * a.row_stride;
    int8_t* const target = r.codes + (kPlain ? first : r.code_offset(row, first_column));
    const bool more = row + stride < r.rows;
    float amax = 0.0f;
    RowPrefetch::wait();
#pragma unroll 1
    for (int u = 0; u < chunks; ++u) {
      Chunk x;
      next_input.read(u, x);
      activate_chunk(kActivation, x);
      if (up) {
        Chunk gates;
        next_up.read(u, gates);
        multiply_chunk(gates, x);
      }
      if (more) fetch(u, next);
      if constexpr (!kPlain)
        finish_values<T, true>(r, first + u * kStep, first_column + u * kStep, x);
      if constexpr (kDynamic) {
        add_magnitudes(x, amax);
        values.write(u, x);
      } else {
        fixed.clamp(x);
        store_codes<true>(r, target + u * target_step, kChunk, fixed(x));
      }
    }
    if constexpr (kDynamic) {
      uint32_t bits = group.max(__float_as_uint(amax));
      const bool limited = bits >= kInfinityBits;
      if (limited) {  // rare enough to go over it again
        bits = 0;
#pragma unroll 1
        for (int u = 0; u < chunks; ++u) {
          Chunk x;
          values.read(u, x);
          bits = max(bits, finite_amax_bits(x));
        }
        bits = group.max(bits);
      }
      const ChunkCodes codes = row_codes(r, row, bits, RowGroup::thread() == 0);
#pragma unroll 1
      for (int u = 0; u < chunks; ++u) {
        Chunk x;
        values.read(u, x);
        if (limited) codes.clamp(x);
        store_codes<true>(r, target + u * target_step, kChunk, codes(x));
      }
    }
    if constexpr (!kPlain) {
      for (int u = chunks; u < code_chunks; ++u)
        store_codes<true>(r, target + u * target_step, 0, uint2{0, 0});
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
#pragma unroll 1
      for (int64_t v = threadIdx.x; v < chunks; v += kLongThreads) {
        const int64_t column = v * kChunk;
        Chunk x;
        load_chunk<kWhole>(input + column, r.columns - column, x);
        activate_chunk(a.activation, x);
        if (a.up) {
          Chunk gates;
          load_chunk<kWhole>(up + column, r.columns - column, gates);
          multiply_chunk(gates, x);
        }
        finish_values<T, kWhole>(r, row * r.columns + column, column, x);
        if constexpr (!kWhole) clear_behind(r.columns - column, x);
        f(column, x);
      }
    };
    uint32_t amax = 0;
    if (!r.scale) {
      for_each_chunk([&](int64_t, const Chunk& x) { amax = max(amax, finite_amax_bits(x)); });
      amax = group.max(amax);
    }
    const ChunkCodes codes = r.scale ? static_codes(r) : row_codes(r, row, amax, threadIdx.x == 0);
    for_each_chunk([&](int64_t column, Chunk& x) {
      codes.clamp(x);
      store_codes<kWhole>(r, r.codes + r.code_offset(row, column), r.columns - column, codes(x));
    });
    for (int64_t v = chunks + threadIdx.x; v < code_chunks_of(r); v += kLongThreads)
      store_codes<kWhole>(r, r.codes + r.code_offset(row, v * kChunk), 0, uint2{0, 0});
  }
}

// ---- Launches -----------------------------------------------------------------------------------

constexpr const char* kName = "activation_quantize";

template <typename T, Activation kActivation, int kGroup, bool kPlain>
void start_activation(const ActivationQuantizeArguments& a, void* stream) {
  using RowGroup = Group<kGroup>;
  with_flag(!a.codes.scale, [&](auto dynamic) {
    const int memory =
        Prefetch<T, RowGroup::kBlock, kThreadChunks>::kBytes * (a.up ? 2 : 1) +
        (dynamic.value ? Prefetch<float, RowGroup::kBlock, kThreadChunks>::kBytes : 0);
    constexpr int kSharedMemory = 220 * 1024;  // of a multiprocessor, with room for the static part
    const int resident = std::min(kResidentThreads / RowGroup::kBlock, kSharedMemory / memory);
    launch_with_memory(kName, activation_kernel<T, kActivation, kGroup, dynamic.value, kPlain>,
                       grid_size(divide_up(a.codes.rows, RowGroup::kRows), resident),
                       RowGroup::kBlock, memory, stream, a);
  });
}

template <typename T>
void run_activation(const ActivationQuantizeArguments& a, void* stream) {
  const int64_t chunks = code_chunks_of(a.codes);
  const bool whole = has_whole_chunks(a.codes) && is_aligned(a.input, 16) && is_aligned(a.up, 16) &&
                     a.row_stride % kChunk == 0;
  if (whole && chunks <= 512 * kThreadChunks) {
    return with_activation(a.activation, [&]<Activation kActivation>() {
      if constexpr (!std::is_same_v<T, float>) {
        if (!a.codes.output && !a.codes.pre_scale && !a.codes.col32) {
          const auto fits = [&](int group) { return chunks <= group * kThreadChunks; };
          if (fits(32)) return start_activation<T, kActivation, 32, true>(a, stream);
          if (fits(64)) return start_activation<T, kActivation, 64, true>(a, stream);
          if (fits(128)) return start_activation<T, kActivation, 128, true>(a, stream);
          if (fits(256)) return start_activation<T, kActivation, 256, true>(a, stream);
          return start_activation<T, kActivation, 512, true>(a, stream);
        }
      }
      if (chunks <= 128 * kThreadChunks)
        return start_activation<T, kActivation, 128, false>(a, stream);
      return start_activation<T, kActivation, 512, false>(a, stream);
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
