// What the kernels that end in codes of whole rows share: rows fetched ahead of their use, groups
// of threads that take a row each, packed codes; internal, for .cu files only.
//
// A row is cut into chunks of 8 columns. Chunk v belongs to thread v % group of the group that
// takes the row, which keeps its real values in registers from the loads to the codes.
#pragma once

#include <vernier/kernels/launch.h>
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
    asm volatile("" : "+l"(chunk));  // no register for the address before its time
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

__device__ inline void add_chunk(const Chunk& x, float& sum) {
#pragma unroll
  for (int j = 0; j < kChunk; ++j) sum = __fadd_rn(sum, x[j]);
}

__device__ inline void add_squares(const Chunk& x, float& sum) {
#pragma unroll
  for (int j = 0; j < kChunk; ++j) sum = __fmaf_rn(x[j], x[j], sum);
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

/// Threads of a multiprocessor, whose registers have to suffice for as many that keep `chunks`
/// chunks each.
constexpr int resident_threads(int chunks) { return chunks <= 4 ? 768 : 512; }

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
    uint32_t values[2][kGroup];
  };

  __device__ explicit Group(Memory& memory) : memory_(memory) {}

  __device__ static int thread() { return threadIdx.x % kGroup; }
  __device__ static int index() { return threadIdx.x / kGroup; }

  /// The largest of all threads' values.
  __device__ uint32_t max(uint32_t value) {
    value = __reduce_max_sync(kFullWarp, value);
    if constexpr (kGroup > kWarp) {
      uint32_t* const meeting = turn();
      if (threadIdx.x % kWarp == 0) meeting[thread() / kWarp] = value;
      __syncthreads();
      value = meeting[0];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) value = ::max(value, meeting[w]);
    }
    return value;
  }

  /// The sum of N = kPerThread * kGroup partial sums, number thread() + k * kGroup in lanes[k]: i
  /// takes in i + N / 2, then i + N / 4, to i + 1.
  template <int kPerThread>
  __device__ float sum(float (&lanes)[kPerThread]) {
#pragma unroll
    for (int half = kPerThread / 2; half > 0; half /= 2)
#pragma unroll
      for (int k = 0; k < half; ++k) lanes[k] = __fadd_rn(lanes[k], lanes[k + half]);
    float value = lanes[0];
    if constexpr (kGroup > kWarp) {
      uint32_t* const meeting = turn();
      meeting[thread()] = __float_as_uint(value);
      __syncthreads();
      // Every warp for itself, which saves the way back.
      float parts[kWarps];
#pragma unroll
      for (int w = 0; w < kWarps; ++w)
        parts[w] = __uint_as_float(meeting[w * kWarp + threadIdx.x % kWarp]);
#pragma unroll
      for (int half = kWarps / 2; half > 0; half /= 2)
#pragma unroll
        for (int w = 0; w < half; ++w) parts[w] = __fadd_rn(parts[w], parts[w + half]);
      value = parts[0];
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      value = __fadd_rn(value, __shfl_xor_sync(kFullWarp, value, offset));
    return value;
  }

 private:
  __device__ uint32_t* turn() {
    turn_ ^= 1;
    return memory_.values[turn_];
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

/// The bits of the largest magnitude of a row, NaN and infinities left out: of the chunks x[u] of
/// the group's threads for which has(u).
template <int kGroup, int kChunks, typename Has>
__device__ uint32_t group_amax(Group<kGroup>& group, Chunk (&x)[kChunks], const Has& has) {
  float amax = 0.0f;
#pragma unroll
  for (int u = 0; u < kChunks; ++u)
    if (has(u)) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) amax = fmaxf(amax, fabsf(x[u][j]));  // takes no NaN
    }
  uint32_t bits = group.max(__float_as_uint(amax));
  if (bits == kInfinityBits) {  // rare enough to go over it again
    bits = 0;
#pragma unroll
    for (int u = 0; u < kChunks; ++u)
      if (has(u)) bits = max(bits, finite_amax_bits(x[u]));
    bits = group.max(bits);
  }
  return bits;
}

// ---- Codes --------------------------------------------------------------------------------------

/// The numeric contract's codes of many values and one scale, eight at a time.
///
/// x / scale lies between its products with two numbers a little below and above 1 / scale, and so
/// does its rounding to float32: below and above by 2^-21 relatively, against 2^-23 of the
/// hardware's reciprocal and 2^-24 each of their own rounding and that of the quotient. Adding 1.5
/// * 2^23 to the product in one operation rounds it half to even to an integer, in the low bits of
/// the sum. Where both integers agree, they are the code; where they do not, which is rare, one
/// divides.
class ChunkCodes {
 public:
  /// `scale` is positive; scales whose reciprocal is not a normal number, and NaN, divide always.
  __device__ ChunkCodes(float scale, int32_t zero_point, int32_t qmin, int32_t qmax)
      : scale_(scale),
        low_(static_cast<float>(qmin - zero_point)),
        high_(static_cast<float>(qmax - zero_point)),
        zero_points_(static_cast<uint32_t>(zero_point & 0xff) * 0x01010101u) {
    float reciprocal;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(scale));
    below_ = __fmul_rn(reciprocal, 1.0f - 0x1p-21f);
    above_ = __fmul_rn(reciprocal, 1.0f + 0x1p-21f);
    const uint32_t bits = __float_as_uint(scale);
    // Products with the reciprocal of a power of two are quotients; and half-precision values over
    // such a scale often lie in the very middle between integers.
    if ((bits & 0x007fffffu) == 0) below_ = above_ = __uint_as_float(0x7f000000u - bits);
    if (!(scale > 0x1p-120f && scale < 0x1p120f)) below_ = above_ = __uint_as_float(0x7fffffffu);
  }

  /// Codes of x, four a word.
  __device__ uint2 operator()(const Chunk& x) const {
    float sums[kChunk];
    bool differ = false;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      sums[j] = __fmaf_rn(x[j], above_, kShift);
      differ |= __fmaf_rn(x[j], below_, kShift) != sums[j];  // true for NaN
    }
    if (differ) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j)
        sums[j] = __fadd_rn(fminf(fmaxf(rintf(__fdiv_rn(x[j], scale_)), low_), high_), kShift);
    }
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      sums[j] = fminf(fmaxf(sums[j], __fadd_rn(low_, kShift)), __fadd_rn(high_, kShift));
    uint2 words = {low_bytes(sums), low_bytes(sums + 4)};
    if (zero_points_ != 0) {
      words.x = __vadd4(words.x, zero_points_);
      words.y = __vadd4(words.y, zero_points_);
    }
    return words;
  }

 private:
  static constexpr float kShift = 0x1.8p23f;

  __device__ static uint32_t low_bytes(const float* x) {
    const uint32_t first = __byte_perm(__float_as_uint(x[0]), __float_as_uint(x[1]), 0x0040);
    const uint32_t second = __byte_perm(__float_as_uint(x[2]), __float_as_uint(x[3]), 0x0040);
    return __byte_perm(first, second, 0x5410);
  }

  float scale_, low_, high_;
  float below_, above_;
  uint32_t zero_points_;
};

/// The static quantization of a tensor.
__device__ inline ChunkCodes static_codes(const RowCodes& r) {
  return ChunkCodes(__ldg(r.scale), r.zero_point ? __ldg(r.zero_point) : 0, r.qmin, r.qmax);
}

/// The dynamic quantization of a row whose absolute maximum over finite values has these bits;
/// `first` for one thread of those that share the row, which stores the scale.
__device__ inline ChunkCodes row_codes(const RowCodes& r, int64_t row, uint32_t amax_bits,
                                       bool first) {
  const float scale = scale_from_amax(__uint_as_float(amax_bits), r.qmax);
  if (first) r.row_scale[row] = scale;
  return ChunkCodes(scale, 0, r.qmin, r.qmax);
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
