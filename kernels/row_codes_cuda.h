// What the kernels that end in codes of whole rows share: rows fetched ahead of their use, groups
// of threads that take a row each, packed codes; internal, for .cu files only.
//
// A row is cut into chunks of 8 columns. Chunk v belongs to thread v % group of the group that
// takes the row, which keeps its real values from the loads to the codes. Hot code is short and
// free of what is rare: more of it than the instruction cache holds costs several times as much.
#pragma once

#include <vernier/kernels/launch.h>
#include <vernier/kernels/norm_quantize_device.h>
#include <vernier/kernels/row_codes.h>

namespace vernier::cuda {

inline constexpr int kChunk = 8;

/// A chunk of real values.
using Chunk = float[kChunk];

// ---- Loads and stores ---------------------------------------------------------------------------

/// Elements of type T in a 32-bit word, lowest first: one instruction each, against two for the
/// upper half by way of the element.
template <typename T>
inline constexpr int kWordSize = 4 / sizeof(T);

__device__ inline void unpack(const float*, uint32_t word, float* x) {
  x[0] = __uint_as_float(word);
}
__device__ inline void unpack(const __nv_bfloat16*, uint32_t word, float* x) {
  x[0] = __uint_as_float(word << 16);
  x[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ inline void unpack(const __half*, uint32_t word, float* x) {
  const __half2 pair = *reinterpret_cast<const __half2*>(&word);
  x[0] = __low2float(pair);
  x[1] = __high2float(pair);
}

__device__ inline uint32_t pack(const float*, const float* x) { return __float_as_uint(x[0]); }
__device__ inline uint32_t pack(const __nv_bfloat16*, const float* x) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t pack(const __half*, const float* x) {
  const __half2 pair = __floats2half2_rn(x[0], x[1]);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

/// By value: of a reference to memory each word would be a load of its own.
template <typename T>
__device__ void unpack_words(uint4 words, float* x) {
  constexpr const T* kType = nullptr;
  unpack(kType, words.x, x);
  unpack(kType, words.y, x + kWordSize<T>);
  unpack(kType, words.z, x + 2 * kWordSize<T>);
  unpack(kType, words.w, x + 3 * kWordSize<T>);
}
template <typename T>
__device__ uint4 pack_words(const float* x) {
  constexpr const T* kType = nullptr;
  return {pack(kType, x), pack(kType, x + kWordSize<T>), pack(kType, x + 2 * kWordSize<T>),
          pack(kType, x + 3 * kWordSize<T>)};
}

/// The chunk at `source`, of which `left` elements are inside the row; zeros behind them. kWhole:
/// all are, and `source` is a multiple of 16 bytes.
template <bool kWhole, typename T>
__device__ void load_chunk(const T* source, int64_t left, Chunk& x) {
  if constexpr (kWhole) {
#pragma unroll
    for (int begin = 0; begin < kChunk; begin += kVectorSize<T>)
      unpack_words<T>(*reinterpret_cast<const uint4*>(source + begin), x + begin);
  } else {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) x[j] = j < left ? to_float(source[j]) : 0.0f;
  }
}

/// Stores the chunk rounded to T, and leaves it so.
template <bool kWhole, typename T>
__device__ void round_and_store_chunk(T* target, int64_t left, Chunk& x) {
  if constexpr (kWhole) {
#pragma unroll
    for (int begin = 0; begin < kChunk; begin += kVectorSize<T>) {
      const uint4 words = pack_words<T>(x + begin);
      *reinterpret_cast<uint4*>(target + begin) = words;
      unpack_words<T>(words, x + begin);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const T rounded = from_float<T>(x[j]);
      if (j < left) target[j] = rounded;
      x[j] = to_float(rounded);
    }
  }
}

/// Shared memory through which a thread fetches its own chunks of the next row while it works on
/// this one. No other thread reads them, so that waiting needs no barrier.
template <typename T, int kBlock, int kChunks>
class Prefetch {
 public:
  static constexpr int kVectors = kChunk / kVectorSize<T>;  // 16-byte vectors of a chunk
  static constexpr int kBytes = kBlock * kChunks * kChunk * static_cast<int>(sizeof(T));

  __device__ explicit Prefetch(void* block_memory)
      : address_(static_cast<uint32_t>(__cvta_generic_to_shared(block_memory)) + threadIdx.x * 16) {
    asm volatile("" : "+r"(address_));  // else the compiler finds it anew for each access
  }

  /// Starts to fetch a chunk into place u.
  __device__ void start(int u, const T* chunk) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const T* source = chunk + i * kVectorSize<T>;
      // Where the threads of a warp leave gaps between their 16 bytes, the first-level cache keeps
      // the other half of each sector.
      if constexpr (kVectors == 1) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place(u, i)), "l"(source)
                     : "memory");
      } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(place(u, i)), "l"(source)
                     : "memory");
      }
    }
  }
  /// Everything that this thread started has arrived.
  __device__ static void wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

  /// Puts values of this thread in place of fetched ones.
  __device__ void write(int u, const Chunk& x) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint4 words = pack_words<T>(x + i * kVectorSize<T>);
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(place(u, i)), "r"(words.x),
                   "r"(words.y), "r"(words.z), "r"(words.w)
                   : "memory");
    }
  }

  __device__ void read(int u, Chunk& x) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      uint4 words;
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                   : "r"(place(u, i))
                   : "memory");
      unpack_words<T>(words, x + i * kVectorSize<T>);
    }
  }

 private:
  __device__ uint32_t place(int u, int i) const {
    return address_ + (u * kVectors + i) * kBlock * 16;
  }

  uint32_t address_;
};

/// Zeros behind the `left` elements of a chunk that are inside the row.
__device__ inline void clear_behind(int64_t left, Chunk& x) {
#pragma unroll
  for (int j = 0; j < kChunk; ++j)
    if (j >= left) x[j] = 0.0f;
}

/// The partial sums of a thread: as many independent additions in a row as hide their latency.
using PartialSums = float[kNormWays];

__device__ inline void add_chunk(const Chunk& x, PartialSums& sums) {
#pragma unroll
  for (int j = 0; j < kChunk; ++j) sums[j % kNormWays] = __fadd_rn(sums[j % kNormWays], x[j]);
}

__device__ inline void add_squares(const Chunk& x, PartialSums& sums) {
#pragma unroll
  for (int j = 0; j < kChunk; ++j) sums[j % kNormWays] = __fmaf_rn(x[j], x[j], sums[j % kNormWays]);
}

/// Stores a chunk of the real values where the operation wants them and makes of it what is
/// quantized. `element` is the index of its first one.
template <typename T, bool kWhole>
__device__ void finish_values(const RowCodes& r, int64_t element, int64_t column, Chunk& x) {
  if (r.output) {
    Chunk y;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) y[j] = x[j];
    round_and_store_chunk<kWhole>(static_cast<T*>(r.output) + element, r.columns - column, y);
  }
  if (r.pre_scale) {
    Chunk factors;
    load_chunk<kWhole>(r.pre_scale + column, r.columns - column, factors);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) x[j] = __fmul_rn(x[j], factors[j]);
  }
}

// ---- Groups of threads --------------------------------------------------------------------------

/// kGroup consecutive threads that take a row together: a warp of a block of several, or the whole
/// block. All threads of a group have to call its members, the same number of times.
template <int kGroup>
class Group {
 public:
  static constexpr int kBlock = kGroup == kWarp ? 4 * kWarp : kGroup;  ///< threads of a block
  static constexpr int kRows = kBlock / kGroup;                        ///< groups of a block
  static constexpr int kWarps = kGroup / kWarp;

  /// Where the warps of a group meet: written and read in turns, so that one barrier separates a
  /// value from its readers and the next value from the readers of this one.
  struct Memory {
    uint2 values[2][kWarps];
  };

  __device__ explicit Group(Memory& memory) : memory_(memory) {}

  __device__ static int thread() { return threadIdx.x % kGroup; }
  __device__ static int index() { return threadIdx.x / kGroup; }

  /// The largest of all threads' values.
  __device__ uint32_t max(uint32_t value) {
    value = __reduce_max_sync(kFullWarp, value);
    if constexpr (kGroup > kWarp) value = __reduce_max_sync(kFullWarp, exchange({value, 0}).x);
    return value;
  }

  /// The sum of all threads' partial sums in the order of norm_quantize_device.h.
  __device__ float sum(const PartialSums& sums) {
    float value = sum_of_warp(sums);
    if constexpr (kGroup > kWarp)
      value = sum_of_warps(__uint_as_float(exchange({__float_as_uint(value), 0}).x));
    return value;
  }

  /// Both at once; `value` becomes the largest.
  __device__ float sum_and_max(const PartialSums& sums, uint32_t& value) {
    float total = sum_of_warp(sums);
    value = __reduce_max_sync(kFullWarp, value);
    if constexpr (kGroup > kWarp) {
      const uint2 both = exchange({__float_as_uint(total), value});
      total = sum_of_warps(__uint_as_float(both.x));
      value = __reduce_max_sync(kFullWarp, both.y);
    }
    return total;
  }

 private:
  __device__ static float sum_of_warp(const PartialSums& sums) {
    static_assert(kNormWays == 4);
    float value = __fadd_rn(__fadd_rn(sums[0], sums[2]), __fadd_rn(sums[1], sums[3]));
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      value = __fadd_rn(value, __shfl_xor_sync(kFullWarp, value, offset));
    return value;
  }

  /// The sum of what exchange() gave.
  __device__ static float sum_of_warps(float value) {
#pragma unroll
    for (int offset = kWarps / 2; offset > 0; offset /= 2)
      value = __fadd_rn(value, __shfl_xor_sync(kFullWarp, value, offset));
    return value;
  }

  /// The values of warp number thread % kWarps: every warp gets all of them, which saves the way
  /// back.
  __device__ uint2 exchange(uint2 value) {
    turn_ ^= 1;
    uint2* const meeting = memory_.values[turn_];
    if (threadIdx.x % kWarp == 0) meeting[thread() / kWarp] = value;
    __syncthreads();
    return meeting[threadIdx.x % kWarps];
  }

  Memory& memory_;
  int turn_ = 0;
};

/// The bits of the largest magnitude of a chunk, NaN and infinities left out.
__device__ inline uint32_t finite_amax_bits(const Chunk& x) {
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < kChunk; ++j) bits = max(bits, finite_magnitude_bits(x[j]));
  return bits;
}

/// The larger of two magnitudes; NaN if one is.
__device__ inline float larger_magnitude(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(fabsf(a)), "f"(fabsf(b)));
  return result;
}

__device__ inline void add_magnitudes(const Chunk& x, float& amax) {
#pragma unroll
  for (int j = 0; j < kChunk; ++j) amax = larger_magnitude(amax, x[j]);
}

// ---- Codes --------------------------------------------------------------------------------------

/// round_half_even(x / scale) limited to [low, high] by division; one copy, since it is cold.
__device__ __noinline__ inline float divided_code(float x, float scale, float low, float high) {
  return fminf(fmaxf(rintf(__fdiv_rn(x, scale)), low), high);
}

/// The numeric contract's codes of many values and one scale, eight at a time.
///
/// x / scale lies between its products with two numbers a little below and above 1 / scale, and so
/// does its rounding to float32: below and above by 2^-21 relatively, against 2^-23 of the
/// hardware's reciprocal and 2^-24 each of their own rounding and that of the quotient. Adding 1.5
/// * 2^23 and the zero point to the product in one operation rounds it to an integer, in the low
/// bits of the sum. Where both integers agree, they are the code; where they do not, which is rare
/// and so in all ties, one divides.
///
/// A factor that all values have still to be multiplied by goes into the two numbers, at 2^-24 for
/// it and 2^-24 for the rounding of the product that it stands for.
class ChunkCodes {
 public:
  /// `scale` is positive; scales whose reciprocal is not a normal number, and NaN, divide always.
  /// The codes are those of x * factor.
  __device__ ChunkCodes(float scale, int32_t zero_point, int32_t qmin, int32_t qmax,
                        float factor = 1.0f)
      : scale_(scale),
        factor_(factor),
        low_(static_cast<float>(qmin - zero_point)),
        high_(static_cast<float>(qmax - zero_point)),
        shift_(0x1.8p23f + static_cast<float>(zero_point)) {
    float reciprocal;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(scale));
    reciprocal = __fmul_rn(reciprocal, factor);
    below_ = __fmul_rn(reciprocal, 1.0f - 0x1p-21f);
    above_ = __fmul_rn(reciprocal, 1.0f + 0x1p-21f);
    const uint32_t bits = __float_as_uint(scale);
    // Products with the reciprocal of a power of two are quotients; and half-precision values over
    // such a scale often lie in the very middle between integers, where an even zero point leaves
    // the choice as it is.
    if ((bits & 0x007fffffu) == 0 && zero_point % 2 == 0 && factor == 1.0f)
      below_ = above_ = __uint_as_float(0x7f000000u - bits);
    if (!(scale > 0x1p-120f && scale < 0x1p120f && reciprocal > 0x1p-121f && reciprocal < 0x1p121f))
      below_ = above_ = __uint_as_float(0x7fffffffu);
  }

  /// Limits x, whose factor is 1, to where the codes are; NaN becomes the lowest. Values at a bound
  /// have its code, since the bound's quotient is within two roundings of an integer.
  __device__ void clamp(Chunk& x) const {
    const float low = __fmul_rn(low_, scale_), high = __fmul_rn(high_, scale_);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) x[j] = fminf(fmaxf(x[j], low), high);
  }

  /// Codes, four a word, of values inside the range of the codes (clamp()). `unsure` becomes true
  /// where they may be wrong and divided() is to tell.
  __device__ uint2 likely(const Chunk& x, bool& unsure) const {
    float sums[kChunk];
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      sums[j] = __fmaf_rn(x[j], above_, shift_);
      unsure |= __fmaf_rn(x[j], below_, shift_) != sums[j];  // true for NaN
    }
    return low_bytes(sums);
  }

  /// The same of any values, always right.
  __device__ uint2 divided(const Chunk& x) const {
    float sums[kChunk];
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      sums[j] = __fadd_rn(divided_code(__fmul_rn(x[j], factor_), scale_, low_, high_), shift_);
    return low_bytes(sums);
  }

  /// The same.
  __device__ uint2 operator()(const Chunk& x) const {
    bool unsure = false;
    uint2 words = likely(x, unsure);
    if (unsure) words = divided(x);
    return words;
  }

 private:
  __device__ static uint2 low_bytes(const Chunk& x) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      pairs[i] = __byte_perm(__float_as_uint(x[2 * i]), __float_as_uint(x[2 * i + 1]), 0x0040);
    return {__byte_perm(pairs[0], pairs[1], 0x5410), __byte_perm(pairs[2], pairs[3], 0x5410)};
  }

  float scale_, factor_, low_, high_;
  float below_, above_, shift_;
};

/// The static quantization of a tensor. Its values need clamp().
__device__ inline ChunkCodes static_codes(const RowCodes& r) {
  return ChunkCodes(__ldg(r.scale), r.zero_point ? __ldg(r.zero_point) : 0, r.qmin, r.qmax);
}

/// The dynamic quantization of a row whose absolute maximum over finite values has these bits;
/// `first` for one thread of those that share the row, which stores the scale. Finite values need
/// no clamp(). The codes are those of x * factor, as is the maximum.
__device__ inline ChunkCodes row_codes(const RowCodes& r, int64_t row, uint32_t amax_bits,
                                       bool first, float factor = 1.0f) {
  const float scale = scale_from_amax(__uint_as_float(amax_bits), r.qmax);
  if (first) r.row_scale[row] = scale;
  return ChunkCodes(scale, 0, r.qmin, r.qmax, factor);
}

/// Chunks of a row.
__host__ __device__ inline int64_t chunks_of(const RowCodes& r) {
  return (r.columns + kChunk - 1) / kChunk;
}

/// Chunks of a row that get codes: in COL32 also those behind the last column.
__host__ __device__ inline int64_t code_chunks_of(const RowCodes& r) {
  return (r.code_columns() + kChunk - 1) / kChunk;
}

/// Stores the codes of a chunk of which `left` elements are inside the row.
template <bool kWhole>
__device__ void store_codes(const RowCodes& r, int8_t* target, int64_t left, uint2 words) {
  if (kWhole || r.col32) {
    if (left < kChunk) {  // the end of a COL32 block
      const uint64_t all = uint64_t{words.y} << 32 | words.x;
      const uint64_t kept = left > 0 ? all & ~uint64_t{0} >> (64 - 8 * left) : 0;
      words = {static_cast<uint32_t>(kept), static_cast<uint32_t>(kept >> 32)};
    }
    *reinterpret_cast<uint2*>(target) = words;
  } else {
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      if (j < left) target[j] = static_cast<int8_t>((j < 4 ? words.x : words.y) >> (8 * (j % 4)));
  }
}

/// Whether the vectors of whole chunks can be used for codes and output.
inline bool has_whole_chunks(const RowCodes& r) {
  return r.columns % kChunk == 0 && is_aligned(r.output, 16) && is_aligned(r.pre_scale, 16);
}

}  // namespace vernier::cuda
