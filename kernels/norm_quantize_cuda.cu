#include <vernier/kernels/math_functions.h>
#include <vernier/kernels/norm_quantize_device.h>
#include <vernier/kernels/row_codes_cuda.h>

namespace vernier::cuda {
namespace {

static_assert(kChunk == kNormChunk);

/// One parameter of the normalization, float32 or the input's type.
template <typename T, bool kWhole>
__device__ void load_parameter(const NormQuantizeArguments& a, const void* parameter,
                               int64_t column, Chunk& x) {
  const int64_t left = a.codes.columns - column;
  if (a.weight_type == ElementType::f32) {
    load_chunk<kWhole>(static_cast<const float*>(parameter) + column, left, x);
  } else {
    load_chunk<kWhole>(static_cast<const T*>(parameter) + column, left, x);
  }
}

/// A chunk of a row's deviations from the mean becomes what is quantized. `element` is the index of
/// its first one.
template <typename T, bool kWhole>
__device__ void normalize(const NormQuantizeArguments& a, float factor, int64_t element,
                          int64_t column, Chunk& x) {
#pragma unroll
  for (int j = 0; j < kChunk; ++j) x[j] = __fmul_rn(x[j], factor);
  if (a.weight) {
    Chunk weight;
    load_parameter<T, kWhole>(a, a.weight, column, weight);
    if (a.bias) {
      Chunk bias;
      load_parameter<T, kWhole>(a, a.bias, column, bias);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) x[j] = __fmaf_rn(x[j], weight[j], bias[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) x[j] = __fmul_rn(x[j], weight[j]);
    }
  } else if (a.bias) {
    Chunk bias;
    load_parameter<T, kWhole>(a, a.bias, column, bias);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) x[j] = __fadd_rn(x[j], bias[j]);
  }
  finish_values<T, kWhole>(a.codes, element, column, x);
  if constexpr (!kWhole) clear_behind(a.codes.columns - column, x);
}

/// x + residual rounded to the input's type, which is also stored.
template <typename T, bool kWhole>
__device__ void add_residual(const NormQuantizeArguments& a, int64_t element, int64_t left,
                             const Chunk& residual, Chunk& x) {
#pragma unroll
  for (int j = 0; j < kChunk; ++j) x[j] = __fadd_rn(x[j], residual[j]);
  round_and_store_chunk<kWhole>(static_cast<T*>(a.sum) + element, left, x);
}

__device__ inline float reciprocal_root(float sum_of_squares, float inverse_columns,
                                        float epsilon) {
  const float mean_square = __fmul_rn(sum_of_squares, inverse_columns);
  float result = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean_square, epsilon)));
  asm volatile("" : "+f"(result));  // else the compiler divides anew where each chunk needs it
  return result;
}

// A row of up to kGroup * kChunks chunks.
template <typename T, int kGroup, int kChunks, bool kWhole>
__global__ void __launch_bounds__(resident_threads(kChunks))
    norm_kernel(const __grid_constant__ NormQuantizeArguments a, float inverse_columns) {
  static_assert(kNormLanes % kGroup == 0);
  constexpr int kLanes = kNormLanes / kGroup;  // partial sums of a thread
  using RowGroup = Group<kGroup>;
  __shared__ typename RowGroup::Memory memory;
  extern __shared__ __align__(16) unsigned char fetched[];
  RowGroup group(memory);
  using RowPrefetch = Prefetch<T, RowGroup::kBlock, kChunks>;
  RowPrefetch next_input(fetched);
  RowPrefetch next_residual(fetched + RowPrefetch::kBytes);

  const RowCodes& r = a.codes;
  const T* const input = static_cast<const T*>(a.input);
  const T* const residual = static_cast<const T*>(a.residual);
  const int chunks = static_cast<int>(chunks_of(r));
  const int code_chunks = static_cast<int>(code_chunks_of(r));
  // Of the thread's chunks: number, and first column.
  constexpr int kStep = kGroup * kChunk;
  const int first_column = RowGroup::thread() * kChunk;
  const auto left = [&](int u) { return static_cast<int>(r.columns) - first_column - u * kStep; };
  const auto has = [&](int u) { return RowGroup::thread() + u * kGroup < chunks; };
  const auto fetch = [&](int64_t row) {
    if constexpr (kWhole) {
      const int64_t first = row * r.columns + first_column;
#pragma unroll
      for (int u = 0; u < kChunks; ++u)
        if (has(u)) next_input.start(u, input + first + u * kStep);
      if (residual) {
#pragma unroll
        for (int u = 0; u < kChunks; ++u)
          if (has(u)) next_residual.start(u, residual + first + u * kStep);
      }
    }
  };

  const int64_t stride = int64_t{gridDim.x} * RowGroup::kRows;
  int64_t row = int64_t{blockIdx.x} * RowGroup::kRows + RowGroup::index();
  if (row < r.rows) fetch(row);
  for (; row < r.rows; row += stride) {
    const int64_t first = row * r.columns + first_column;
    Chunk x[kChunks];
    if constexpr (kWhole) RowPrefetch::wait();
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if constexpr (kWhole) {
        if (has(u)) {
          next_input.read(u, x[u]);
        } else {
          clear_behind(0, x[u]);
        }
      } else {
        load_chunk<false>(input + first + u * kStep, left(u), x[u]);
      }
    }
    if (residual) {
#pragma unroll
      for (int u = 0; u < kChunks; ++u) {
        if (!has(u)) continue;
        Chunk other;
        if constexpr (kWhole) {
          next_residual.read(u, other);
        } else {
          load_chunk<false>(residual + first + u * kStep, left(u), other);
        }
        add_residual<T, kWhole>(a, first + u * kStep, left(u), other, x[u]);
      }
    }
    if (row + stride < r.rows) fetch(row + stride);

    if (a.centered) {
      float lanes[kLanes] = {};
#pragma unroll
      for (int u = 0; u < kChunks; ++u)
        if (has(u)) add_chunk(x[u], lanes[u % kLanes]);
      const float mean = __fmul_rn(group.sum(lanes), inverse_columns);
#pragma unroll
      for (int u = 0; u < kChunks; ++u) {
#pragma unroll
        for (int j = 0; j < kChunk; ++j) x[u][j] = __fsub_rn(x[u][j], mean);
        if constexpr (!kWhole) clear_behind(left(u), x[u]);
      }
    }
    float lanes[kLanes] = {};
#pragma unroll
    for (int u = 0; u < kChunks; ++u)
      if (has(u)) add_squares(x[u], lanes[u % kLanes]);
    const float factor = reciprocal_root(group.sum(lanes), inverse_columns, a.epsilon);

#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (has(u))
        normalize<T, kWhole>(a, factor, first + u * kStep, first_column + u * kStep, x[u]);
    }

    const ChunkCodes codes =
        r.scale ? static_codes(r)
                : row_codes(r, row, group_amax(group, x, has), RowGroup::thread() == 0);
    int8_t* target = r.codes + r.code_offset(row, first_column);
    const int64_t target_step = r.col32 ? kStep * r.rows : kStep;
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (RowGroup::thread() + u * kGroup < code_chunks)
        store_codes<kWhole>(r, target, left(u), has(u) ? codes(x[u]) : uint2{0, 0});
      target += target_step;
    }
  }
}

// A row of any length, read again for each pass: mostly from the second-level cache.
template <typename T, bool kWhole>
__global__ void __launch_bounds__(kNormLanes)
    long_norm_kernel(const __grid_constant__ NormQuantizeArguments a, float inverse_columns) {
  using RowGroup = Group<kNormLanes>;
  __shared__ typename RowGroup::Memory memory;
  RowGroup group(memory);
  const RowCodes& r = a.codes;
  const int64_t chunks = chunks_of(r);
  for (int64_t row = blockIdx.x; row < r.rows; row += gridDim.x) {
    const int64_t first = row * r.columns;
    // The first pass adds the residual; the others read the sum, each thread what it wrote itself.
    const T* source = static_cast<const T*>(a.input) + first;
    if (a.residual) {
      for (int64_t v = threadIdx.x; v < chunks; v += kNormLanes) {
        const int64_t column = v * kChunk, left = r.columns - column;
        Chunk x, other;
        load_chunk<kWhole>(source + column, left, x);
        load_chunk<kWhole>(static_cast<const T*>(a.residual) + first + column, left, other);
        add_residual<T, kWhole>(a, first + column, left, other, x);
      }
      source = static_cast<const T*>(a.sum) + first;
    }
    // Calls f(column, x) with the deviations from `mean`.
    const auto for_each_chunk = [&](float mean, const auto& f) {
#pragma unroll 2
      for (int64_t v = threadIdx.x; v < chunks; v += kNormLanes) {
        const int64_t column = v * kChunk;
        Chunk x;
        load_chunk<kWhole>(source + column, r.columns - column, x);
        if (a.centered) {
#pragma unroll
          for (int j = 0; j < kChunk; ++j) x[j] = __fsub_rn(x[j], mean);
          if constexpr (!kWhole) clear_behind(r.columns - column, x);
        }
        f(column, x);
      }
    };
    float mean = 0.0f;
    if (a.centered) {
      float lanes[1] = {};
      for_each_chunk(0.0f, [&](int64_t, const Chunk& x) { add_chunk(x, lanes[0]); });
      mean = __fmul_rn(group.sum(lanes), inverse_columns);
    }
    float lanes[1] = {};
    for_each_chunk(mean, [&](int64_t, const Chunk& x) { add_squares(x, lanes[0]); });
    const float factor = reciprocal_root(group.sum(lanes), inverse_columns, a.epsilon);

    uint32_t amax = 0;
    if (!r.scale) {
      for_each_chunk(mean, [&](int64_t column, Chunk& x) {
        normalize<T, kWhole>(a, factor, first + column, column, x);
        amax = max(amax, finite_amax_bits(x));
      });
      amax = group.max(amax);
    }
    const ChunkCodes codes = r.scale ? static_codes(r) : row_codes(r, row, amax, threadIdx.x == 0);
    for_each_chunk(mean, [&](int64_t column, Chunk& x) {
      normalize<T, kWhole>(a, factor, first + column, column, x);
      store_codes<kWhole>(r, r.codes + r.code_offset(row, column), r.columns - column, codes(x));
    });
    for (int64_t v = chunks + threadIdx.x; v < code_chunks_of(r); v += kNormLanes)
      store_codes<kWhole>(r, r.codes + r.code_offset(row, v * kChunk), 0, uint2{0, 0});
  }
}

// ---- Launches -----------------------------------------------------------------------------------

template <typename T, int kGroup, int kChunks, bool kWhole>
void start_norm(const NormQuantizeArguments& a, void* stream) {
  using RowGroup = Group<kGroup>;
  const int memory =
      kWhole ? Prefetch<T, RowGroup::kBlock, kChunks>::kBytes * (a.residual ? 2 : 1) : 0;
  const unsigned blocks = grid_size(divide_up(a.codes.rows, RowGroup::kRows),
                                    resident_threads(kChunks) / RowGroup::kBlock);
  launch_with_memory("norm_quantize", norm_kernel<T, kGroup, kChunks, kWhole>, blocks,
                     RowGroup::kBlock, memory, stream, a, a.inverse_columns());
}

template <typename T>
void run_norm(const NormQuantizeArguments& a, void* stream) {
  const int64_t chunks = code_chunks_of(a.codes);
  const bool whole = has_whole_chunks(a.codes) && is_aligned(a.input, 16) &&
                     is_aligned(a.residual, 16) && is_aligned(a.sum, 16) &&
                     is_aligned(a.weight, 16) && is_aligned(a.bias, 16);
  if (!whole && chunks <= 32 * 4) return start_norm<T, 32, 4, false>(a, stream);
  if (whole && chunks <= 256 * 8) {
    if (chunks <= 32 * 4) return start_norm<T, 32, 4, true>(a, stream);
    if (chunks <= 64 * 4) return start_norm<T, 64, 4, true>(a, stream);
    if (chunks <= 128 * 4) return start_norm<T, 128, 4, true>(a, stream);
    if (chunks <= 256 * 4) return start_norm<T, 256, 4, true>(a, stream);
    return start_norm<T, 256, 8, true>(a, stream);
  }
  with_flag(whole, [&](auto flag) {
    launch("norm_quantize", long_norm_kernel<T, flag.value>, grid_size(a.codes.rows, 8), kNormLanes,
           stream, a, a.inverse_columns());
  });
}

}  // namespace

void norm_quantize(const NormQuantizeArguments& a, void* stream) {
  if (a.codes.rows <= 0) return;
  with_element_type(a.codes.type, [&]<typename T>(T*) { run_norm<T>(a, stream); });
}

}  // namespace vernier::cuda
