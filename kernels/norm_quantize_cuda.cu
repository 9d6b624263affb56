#include <vernier/kernels/math_functions.h>
#include <vernier/kernels/norm_quantize_device.h>
#include <vernier/kernels/row_codes_cuda.h>

#include <limits>

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
  Chunk weight, bias;
  if (a.weight) load_parameter<T, kWhole>(a, a.weight, column, weight);
  if (!a.centered && a.weight) {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) x[j] = __fmul_rn(x[j], weight[j]);
  }
#pragma unroll
  for (int j = 0; j < kChunk; ++j) x[j] = __fmul_rn(x[j], factor);
  if (a.bias) {
    load_parameter<T, kWhole>(a, a.bias, column, bias);
    if (a.weight) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) x[j] = __fmaf_rn(x[j], weight[j], bias[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) x[j] = __fadd_rn(x[j], bias[j]);
    }
  } else if (a.centered && a.weight) {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) x[j] = __fmul_rn(x[j], weight[j]);
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

/// Threads of a multiprocessor, whose registers have to suffice for as many.
constexpr int kGeneralThreads = 512;
constexpr int kPlainThreads = 1024;

/// What is known of plain rows when the kernel is compiled, so that no hot code steps around what
/// others use.
enum Form : int { kCentered = 1, kResidual = 2 };

/// Half-precision input, a weight, a bias exactly where centered; no output, no pre_scale,
/// row-major codes.
template <typename T>
bool is_plain(const NormQuantizeArguments& a) {
  return !std::is_same_v<T, float> && a.weight && (a.bias != nullptr) == a.centered &&
         !a.codes.output && !a.codes.pre_scale && !a.codes.col32;
}

// A plain row for each group of kGroup threads: kChunks chunks a thread, of which the last one may
// be behind the end of the row. Blocks that come and go keep more loads under way than blocks that
// stay and fetch ahead.
template <typename T, typename W, int kGroup, int kChunks, int kForm>
__global__ void __launch_bounds__(Group<kGroup>::kBlock, kPlainThreads / Group<kGroup>::kBlock)
    plain_norm_kernel(const __grid_constant__ NormQuantizeArguments a, float inverse_columns) {
  using RowGroup = Group<kGroup>;
  constexpr bool kIsCentered = (kForm & kCentered) != 0;
  __shared__ typename RowGroup::Memory memory;
  RowGroup group(memory);
  const RowCodes& r = a.codes;
  const int64_t row = int64_t{blockIdx.x} * RowGroup::kRows + RowGroup::index();
  if (row >= r.rows) return;  // a group of one warp, which meets no others

  constexpr int kStep = kGroup * kChunk;
  const int first_column = RowGroup::thread() * kChunk;
  const int64_t first = row * r.columns + first_column;
  const bool has_last = first_column + (kChunks - 1) * kStep < r.columns;
  const auto has = [&](int u) { return u + 1 < kChunks || has_last; };
  const auto load = [&](const void* source, uint4(&words)[kChunks]) {
#pragma unroll
    for (int u = 0; u < kChunks; ++u)
      words[u] = has(u) ? __ldcs(reinterpret_cast<const uint4*>(static_cast<const T*>(source) +
                                                                first + u * kStep))
                        : uint4{};
  };
  Chunk x[kChunks];
  {
    uint4 words[kChunks], added[kChunks];
    load(a.input, words);
    if constexpr (kForm & kResidual) load(a.residual, added);
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      unpack_words<T>(words[u], x[u]);
      if constexpr (kForm & kResidual) {
        Chunk other;
        unpack_words<T>(added[u], other);
        if (has(u)) add_residual<T, true>(a, first + u * kStep, kChunk, other, x[u]);
      }
    }
  }
  const auto parameter = [&](const void* source, int u, Chunk& values) {
    load_chunk<true>(static_cast<const W*>(source) + first_column + u * kStep, kChunk, values);
  };

  // What is quantized is x * factor.
  float factor;
  uint32_t bits;  // of the largest magnitude, NaN above all
  if constexpr (kIsCentered) {
    PartialSums sums = {};
#pragma unroll
    for (int u = 0; u < kChunks; ++u) add_chunk(x[u], sums);
    const float mean = __fmul_rn(group.sum(sums), inverse_columns);
    PartialSums squares = {};
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (!has(u)) continue;
#pragma unroll
      for (int j = 0; j < kChunk; ++j) x[u][j] = __fsub_rn(x[u][j], mean);
      add_squares(x[u], squares);
    }
    const float root = reciprocal_root(group.sum(squares), inverse_columns, a.epsilon);
    float amax = 0.0f;
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (!has(u)) continue;
      Chunk weight, bias;
      parameter(a.weight, u, weight);
      parameter(a.bias, u, bias);
#pragma unroll
      for (int j = 0; j < kChunk; ++j)
        x[u][j] = __fmaf_rn(__fmul_rn(x[u][j], root), weight[j], bias[j]);
      add_magnitudes(x[u], amax);
    }
    factor = 1.0f;
    bits = __float_as_uint(amax);
    if (!r.scale) bits = group.max(bits);
  } else {
    // The product with a positive number keeps the order, so that the maximum need not wait for it.
    PartialSums squares = {};
    float amax = 0.0f;
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (!has(u)) continue;
      Chunk weight;
      parameter(a.weight, u, weight);
      add_squares(x[u], squares);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) x[u][j] = __fmul_rn(x[u][j], weight[j]);
      add_magnitudes(x[u], amax);
    }
    bits = __float_as_uint(amax);
    factor = reciprocal_root(group.sum_and_max(squares, bits), inverse_columns, a.epsilon);
    bits = __float_as_uint(__fmul_rn(__uint_as_float(bits), factor));
  }

  const auto quantization = [&] {
    const bool first_thread = RowGroup::thread() == 0;
    if (__builtin_expect(!r.scale && (bits & ~kSignBit) < kInfinityBits, true))
      return row_codes(r, row, bits, first_thread, factor);
    bits = 0;
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) x[u][j] = __fmul_rn(x[u][j], factor);
      bits = max(bits, finite_amax_bits(x[u]));
    }
    const ChunkCodes codes =
        r.scale ? static_codes(r) : row_codes(r, row, group.max(bits), first_thread);
#pragma unroll
    for (int u = 0; u < kChunks; ++u) codes.clamp(x[u]);
    return codes;
  };
  const ChunkCodes codes = quantization();
  int8_t* const target = r.codes + first;
  bool unsure = false;
#pragma unroll
  for (int u = 0; u < kChunks; ++u)
    if (has(u)) *reinterpret_cast<uint2*>(target + u * kStep) = codes.likely(x[u], unsure);
  // One detour a row, so that the code above has no gaps.
  if (unsure) {
#pragma unroll
    for (int u = 0; u < kChunks; ++u)
      if (has(u)) *reinterpret_cast<uint2*>(target + u * kStep) = codes.divided(x[u]);
  }
}

// A row of whole chunks, at most kChunks for each of kGroup threads, with all that the arguments
// allow.
template <typename T, int kGroup, int kChunks>
__global__ void __launch_bounds__(Group<kGroup>::kBlock, kGeneralThreads / Group<kGroup>::kBlock)
    norm_kernel(const __grid_constant__ NormQuantizeArguments a, float inverse_columns) {
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
  const bool has_residual = residual != nullptr;
  const int chunks = static_cast<int>(chunks_of(r));
  // Of the thread's chunks: number, and first column.
  constexpr int kStep = kGroup * kChunk;
  const int first_column = RowGroup::thread() * kChunk;
  const auto left = [&](int u) { return static_cast<int>(r.columns) - first_column - u * kStep; };
  const auto has = [&](int u) { return RowGroup::thread() + u * kGroup < chunks; };
  const auto fetch = [&](int64_t row) {
    const auto fetch_from = [&](const RowPrefetch& next, const T* source) {
      source += row * r.columns + first_column;
      asm volatile("" : "+l"(source));  // one address, and no register for it before its time
#pragma unroll
      for (int u = 0; u < kChunks; ++u)
        if (has(u)) next.start(u, source + u * kStep);
    };
    fetch_from(next_input, input);
    if (has_residual) fetch_from(next_residual, residual);
  };

  const int64_t stride = int64_t{gridDim.x} * RowGroup::kRows;
  int64_t row = int64_t{blockIdx.x} * RowGroup::kRows + RowGroup::index();
  if (row < r.rows) fetch(row);
  for (; row < r.rows; row += stride) {
    const int64_t first = row * r.columns + first_column;
    Chunk x[kChunks];
    RowPrefetch::wait();
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (has(u)) {
        next_input.read(u, x[u]);
      } else {
        clear_behind(0, x[u]);
      }
    }
    if (has_residual) {
#pragma unroll
      for (int u = 0; u < kChunks; ++u) {
        if (!has(u)) continue;
        Chunk other;
        next_residual.read(u, other);
        add_residual<T, true>(a, first + u * kStep, left(u), other, x[u]);
      }
    }
    if (row + stride < r.rows) fetch(row + stride);

    if (a.centered) {
      PartialSums sums = {};
#pragma unroll
      for (int u = 0; u < kChunks; ++u) add_chunk(x[u], sums);  // zeros do not change a sum
      const float mean = __fmul_rn(group.sum(sums), inverse_columns);
#pragma unroll
      for (int u = 0; u < kChunks; ++u) {
        if (!has(u)) continue;
#pragma unroll
        for (int j = 0; j < kChunk; ++j) x[u][j] = __fsub_rn(x[u][j], mean);
      }
    }
    PartialSums sums = {};
#pragma unroll
    for (int u = 0; u < kChunks; ++u) add_squares(x[u], sums);
    const float factor = reciprocal_root(group.sum(sums), inverse_columns, a.epsilon);

#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (has(u)) normalize<T, true>(a, factor, first + u * kStep, first_column + u * kStep, x[u]);
    }

    const auto quantization = [&] {
      bool limited = true;
      uint32_t bits = 0;
      if (!r.scale) {
        float amax = 0.0f;
#pragma unroll
        for (int u = 0; u < kChunks; ++u) add_magnitudes(x[u], amax);
        bits = group.max(__float_as_uint(amax));
        limited = bits >= kInfinityBits;
        if (__builtin_expect(limited, false)) {
          bits = 0;
#pragma unroll
          for (int u = 0; u < kChunks; ++u) bits = max(bits, finite_amax_bits(x[u]));
          bits = group.max(bits);
        }
      }
      const ChunkCodes codes =
          r.scale ? static_codes(r) : row_codes(r, row, bits, RowGroup::thread() == 0);
      if (limited) {
#pragma unroll
        for (int u = 0; u < kChunks; ++u) codes.clamp(x[u]);
      }
      return codes;
    };
    const ChunkCodes codes = quantization();
    const int code_chunks = static_cast<int>(code_chunks_of(r));
    int8_t* target = r.codes + r.code_offset(row, first_column);
    const int64_t target_step = r.col32 ? kStep * r.rows : kStep;
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (RowGroup::thread() + u * kGroup < code_chunks)
        store_codes<true>(r, target, left(u), has(u) ? codes(x[u]) : uint2{0, 0});
      target += target_step;
    }
  }
}

// A row of any length, read again for each pass: mostly from the second-level cache.
template <typename T, int kGroup, bool kWhole>
__global__ void __launch_bounds__(Group<kGroup>::kBlock)
    long_norm_kernel(const __grid_constant__ NormQuantizeArguments a, float inverse_columns) {
  using RowGroup = Group<kGroup>;
  __shared__ typename RowGroup::Memory memory;
  RowGroup group(memory);
  const RowCodes& r = a.codes;
  const int64_t chunks = chunks_of(r);
  const int thread = RowGroup::thread();
  const int64_t stride = int64_t{gridDim.x} * RowGroup::kRows;
  for (int64_t row = int64_t{blockIdx.x} * RowGroup::kRows + RowGroup::index(); row < r.rows;
       row += stride) {
    const int64_t first = row * r.columns;
    // The first pass adds the residual; the others read the sum, each thread what it wrote itself.
    const T* source = static_cast<const T*>(a.input) + first;
    if (a.residual) {
      for (int64_t v = thread; v < chunks; v += kGroup) {
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
#pragma unroll 1
      for (int64_t v = thread; v < chunks; v += kGroup) {
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
      PartialSums sums = {};
      for_each_chunk(0.0f, [&](int64_t, const Chunk& x) { add_chunk(x, sums); });
      mean = __fmul_rn(group.sum(sums), inverse_columns);
    }
    PartialSums sums = {};
    for_each_chunk(mean, [&](int64_t, const Chunk& x) { add_squares(x, sums); });
    const float factor = reciprocal_root(group.sum(sums), inverse_columns, a.epsilon);

    uint32_t amax = 0;
    if (!r.scale) {
      for_each_chunk(mean, [&](int64_t column, Chunk& x) {
        normalize<T, kWhole>(a, factor, first + column, column, x);
        amax = max(amax, finite_amax_bits(x));
      });
      amax = group.max(amax);
    }
    const ChunkCodes codes = r.scale ? static_codes(r) : row_codes(r, row, amax, thread == 0);
    for_each_chunk(mean, [&](int64_t column, Chunk& x) {
      normalize<T, kWhole>(a, factor, first + column, column, x);
      codes.clamp(x);
      store_codes<kWhole>(r, r.codes + r.code_offset(row, column), r.columns - column, codes(x));
    });
    for (int64_t v = chunks + thread; v < code_chunks_of(r); v += kGroup)
      store_codes<kWhole>(r, r.codes + r.code_offset(row, v * kChunk), 0, uint2{0, 0});
  }
}

// ---- Launches -----------------------------------------------------------------------------------

template <typename T, int kGroup>
void start_norm(const NormQuantizeArguments& a, void* stream) {
  using RowGroup = Group<kGroup>;
  constexpr int kChunks = 4;
  const int memory = Prefetch<T, RowGroup::kBlock, kChunks>::kBytes * (a.residual ? 2 : 1);
  const unsigned blocks =
      grid_size(divide_up(a.codes.rows, RowGroup::kRows), kGeneralThreads / RowGroup::kBlock);
  launch_with_memory("norm_quantize", norm_kernel<T, kGroup, kChunks>, blocks, RowGroup::kBlock,
                     memory, stream, a, a.inverse_columns());
}

template <typename T, int kGroup, int kChunks>
void start_plain_norm(const NormQuantizeArguments& a, void* stream) {
  using RowGroup = Group<kGroup>;
  const auto start = [&](auto centered, auto residual, auto own_type) {
    constexpr int kForm = (centered.value ? kCentered : 0) + (residual.value ? kResidual : 0);
    using W = std::conditional_t<own_type.value, T, float>;
    launch("norm_quantize", plain_norm_kernel<T, W, kGroup, kChunks, kForm>,
           static_cast<unsigned>(divide_up(a.codes.rows, RowGroup::kRows)), RowGroup::kBlock,
           stream, a, a.inverse_columns());
  };
  with_flag(a.centered, [&](auto centered) {
    with_flag(a.residual != nullptr, [&](auto residual) {
      with_flag(a.weight_type == a.codes.type,
                [&](auto own_type) { start(centered, residual, own_type); });
    });
  });
}

template <typename T, int kGroup>
void run_norm(const NormQuantizeArguments& a, void* stream) {
  const int64_t chunks = code_chunks_of(a.codes);
  const bool whole = has_whole_chunks(a.codes) && is_aligned(a.input, 16) &&
                     is_aligned(a.residual, 16) && is_aligned(a.sum, 16) &&
                     is_aligned(a.weight, 16) && is_aligned(a.bias, 16);
  if (whole && chunks <= kGroup * 4) {
    if constexpr (!std::is_same_v<T, float>) {
      // Rows of more than half of the chunks of their lanes, as all are above the fewest lanes.
      // Float32 weights of short rows are faster where blocks stay.
      const bool plain = is_plain<T>(a) && a.codes.rows <= std::numeric_limits<int32_t>::max() &&
                         (kGroup > kWarp || a.weight_type == a.codes.type);
      if (plain && chunks > kGroup * 3) return start_plain_norm<T, kGroup, 4>(a, stream);
      if (plain && chunks > kGroup * 2) return start_plain_norm<T, kGroup, 3>(a, stream);
    }
    return start_norm<T, kGroup>(a, stream);
  }
  const auto start = [&](auto flag) {
    using RowGroup = Group<kGroup>;
    launch("norm_quantize", long_norm_kernel<T, kGroup, flag.value>,
           grid_size(divide_up(a.codes.rows, RowGroup::kRows), 2048 / RowGroup::kBlock),
           RowGroup::kBlock, stream, a, a.inverse_columns());
  };
  if constexpr (kGroup == kMostNormLanes) {
    if (whole) return start(std::true_type{});
  }
  start(std::false_type{});
}

}  // namespace

void norm_quantize(const NormQuantizeArguments& a, void* stream) {
  if (a.codes.rows <= 0) return;
  with_element_type(a.codes.type, [&]<typename T>(T*) {
    // A thread a lane, whose partial sums it keeps.
    switch (norm_lanes(a.codes.columns)) {
      case 32:
        return run_norm<T, 32>(a, stream);
      case 64:
        return run_norm<T, 64>(a, stream);
      case 128:
        return run_norm<T, 128>(a, stream);
      case 256:
        return run_norm<T, 256>(a, stream);
      default:
        static_assert(kMostNormLanes == 512);
        return run_norm<T, 512>(a, stream);
    }
  });
}

}  // namespace vernier::cuda
