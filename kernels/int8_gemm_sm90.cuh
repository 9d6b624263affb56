// The kernel behind int8_gemm_sm90.h, as a template over the output type; int8_gemm_sm90_TYPE.cu
// instantiate it, a type a file, so that they compile side by side.
//
// One warp has the copies, one or two warpgroups the products. Operand tiles of 128 codes of K go
// through a ring of shared memory stages. Each block walks over output tiles. Two warpgroups take
// tiles in turn, so that while one writes its results the other has the tensor cores; or, where
// there is one round of tiles and nothing to hide behind, each owns half the rows of a tile. The
// blocks of a cluster share an operand's tile: each loads a part of it for all. Large products
// share the weight between tiles below each other; products of few rows, which want many narrow
// tiles to keep the memory busy, share the codes between tiles beside each other.
#pragma once

#include <vernier/kernels/hopper.h>
#include <vernier/kernels/int8_gemm_choice.h>
#include <vernier/kernels/int8_gemm_sm90.h>
#include <vernier/kernels/launch.h>
#include <vernier/kernels/scale_division.h>
#include <vernier/kernels/wgmma_s8.h>

#include <atomic>

namespace vernier::cuda::sm90 {

// ---- Host side: tensor maps ---------------------------------------------------------------------

/// Describes an operand, row-major int8 [rows, k], to the copy engine: boxes of box_rows rows of
/// kTileK codes, laid out with the 128-byte swizzle.
CUtensorMap tensor_map(const int8_t* operand, int64_t rows, int64_t k, int box_rows);

/// Sets a kernel's shared memory once a device.
void allow_shared_memory(const void* kernel, int bytes, std::atomic<uint64_t>& devices);

constexpr int kTileK = 128;  // codes of K in a stage: a row of 128 bytes

/// In what order the clusters' tiles are taken: bands of kBand rows, column by column, so that what
/// runs at one time shares operands in the L2 cache.
struct TileOrder {
  int rows;
  int columns;
  static constexpr int kBand = 8;

  __device__ int2 at(int tile) const {
    const int per_band = kBand * columns;
    const int band = tile / per_band;
    const int height = min(kBand, rows - band * kBand);
    const int inside = tile - band * per_band;
    return {band * kBand + inside % height, inside / height};
  }
};

/// What is loaded of the codes' tiles. Where one tile has all rows, no more than these are, which
/// takes the copy engine far less time than to fill in zeros; the products of the other rows are of
/// whatever stands in shared memory, and nobody reads them.
struct LoadedRows {
  int box;      ///< by one block at a time
  int loaders;  ///< blocks of a cluster that load some, if they share the tile
  int loaded;   ///< into the shared memory of a block

  LoadedRows(int64_t rows, int tile_rows, int share) {
    const int needed = static_cast<int>(std::min<int64_t>(tile_rows, divide_up(rows, 8) * 8));
    box = std::min(share, needed);
    loaders = static_cast<int>(divide_up(needed, share));
    loaded = box * loaders;
  }
};

// ---- Device side: epilogue ----------------------------------------------------------------------

constexpr int kMostSharedMemory = 232448;

/// What two neighbouring columns contribute to the epilogue.
struct ColumnPair {
  float scale[2] = {};
  float bias[2] = {};
  int32_t correction[2] = {};  // the input's zero point times the sums of the weight's codes
};

__device__ inline ColumnPair load_columns(const EpilogueArguments& a, int64_t column) {
  ColumnPair pair;
  const int32_t zero_point = a.input_zero_point ? __ldg(a.input_zero_point) : 0;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (column + j >= a.columns) break;
    pair.scale[j] = __ldg(a.weight_scale + (a.weight_scale_per_column ? column + j : 0));
    if (a.bias) pair.bias[j] = __ldg(a.bias + column + j);
    if (a.input_zero_point) pair.correction[j] = zero_point * __ldg(a.weight_sum + column + j);
  }
  return pair;
}

/// The activation of N values: one switch for all of them.
template <int N>
__device__ void apply(Activation activation, float (&y)[N]) {
  const auto each = [&](const auto& f) {
#pragma unroll
    for (int j = 0; j < N; ++j) y[j] = f(y[j]);
  };
  switch (activation) {
    case Activation::relu:
      return each([](float x) { return relu(x); });
    case Activation::gelu:
      return each([](float x) { return gelu(x); });
    case Activation::gelu_tanh:
      return each([](float x) { return gelu_tanh(x); });
    case Activation::silu:
      return each([](float x) { return silu(x); });
    case Activation::none:
      break;
  }
}

/// Codes of four values by division, a byte each. A call, because it is rare and would be unrolled
/// with the loop over the accumulators.
inline __device__ __noinline__ uint32_t divided_codes(float4 y, ScaleBracket bracket) {
  const float values[4] = {y.x, y.y, y.z, y.w};
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) codes |= (bracket.divided(values[i]) & 0xff) << (8 * i);
  return codes;
}

/// Values to the codes of the output's scale.
class Requantizer {
 public:
  // The shuffle changes nothing, but hides that the scale is the same everywhere: instructions take
  // only one uniform register or constant, and each product would move it to a register anew.
  __device__ Requantizer(const EpilogueArguments& a, float scale, int32_t zero_point)
      : bracket_(__shfl_sync(kFullWarp, scale, threadIdx.x % kWarp), zero_point, a.qmin, a.qmax) {}

  /// The pairs of values one after the other become the low two bytes of `pairs`.
  __device__ void operator()(const float (&y)[2][4], uint32_t (&pairs)[4]) const {
    uint32_t doubt = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* const pair = y[i / 2] + i % 2 * 2;
      pairs[i] =
          __byte_perm(bracket_.likely(pair[0], doubt), bracket_.likely(pair[1], doubt), 0x0040);
    }
    if (doubt) [[unlikely]] {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t codes = divided_codes({y[i][0], y[i][1], y[i][2], y[i][3]}, bracket_);
        pairs[2 * i] = codes;
        pairs[2 * i + 1] = codes >> 16;
      }
    }
  }

 private:
  ScaleBracket bracket_;
};

struct NoRequantizer {
  __device__ NoRequantizer(const EpilogueArguments&, float, int32_t) {}
};

template <typename Out>
__device__ uint32_t packed(float low, float high) {
  if constexpr (std::is_same_v<Out, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

/// A warpgroup's kBlocks blocks of 64 x kColumns accumulators, as wgmma leaves them: thread t holds
/// rows t / 32 * 16 + t % 32 / 4 and that + 8 of a block, of every 8 columns the pair t % 4. Each
/// warp finishes its 16 rows by slabs of up to 128 bytes a row, which it turns in shared memory so
/// as to write whole lines. With two warps on a scheduler it is the length of dependent
/// instructions that costs: the common case (no zero point, no activation) has a body of its own,
/// without branches.
template <typename Out, int kColumns, int kBlocks>
class TileWriter {
 public:
  using Accumulators = int32_t[kBlocks][kColumns / 2];
  static constexpr int kSlabColumns = std::min<int>(kColumns, 128 / sizeof(Out));
  static constexpr int kSlabs = kColumns / kSlabColumns;
  static constexpr int kGroups = kSlabColumns / 8;  // of 8 columns, in a slab
  static constexpr int kPairs = kColumns / 2;
  static constexpr int kStagingBytes = 16 * 128;  // of a warp
  static constexpr int kMemory =
      4 * kStagingBytes + kPairs * (sizeof(float4) + sizeof(int2));  // of a warpgroup

  /// `memory`: kMemory bytes of this warpgroup, 128-byte aligned.
  __device__ TileWriter(const EpilogueArguments& arguments, uint8_t* memory, int named_barrier)
      : a_(arguments),
        barrier_(named_barrier),
        thread_(threadIdx.x % hopper::kWarpgroup),
        lane_(thread_ % kWarp),
        staging_(memory + thread_ / kWarp * kStagingBytes),
        matrix_row_(hopper::shared_address(staging_ + chunk_offset(lane_ % 16, lane_ / 16))),
        scales_and_biases_(reinterpret_cast<float4*>(memory + 4 * kStagingBytes)),
        corrections_(reinterpret_cast<int2*>(scales_and_biases_ + kPairs)),
        whole_chunks_(a_.columns % kChunk == 0 &&
                      (reinterpret_cast<uint64_t>(a_.output) & 15) == 0),
        simple_(!kUsesTerms || (a_.activation == Activation::none && !a_.input_zero_point)) {
    // Only loaded: what is made of them waits for write(), lest the first product wait here.
    if constexpr (kMakesCodes) {
      output_scale_ = __ldg(a_.output_scale);
      if (a_.output_zero_point) output_zero_point_ = __ldg(a_.output_zero_point);
    }
  }

  /// Starts the loads for the tile that write() will be called for.
  __device__ void prepare(int64_t first_row, int64_t first_column) {
    first_row_ = first_row + thread_ / kWarp * 16;
    first_column_ = first_column;
    if constexpr (kUsesTerms) {
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i) {
        const int64_t row = first_row_ + i / 2 * 64 + i % 2 * 8 + lane_ / 4;
        row_scales_[i] =
            row < a_.rows ? __ldg(a_.input_scale + (a_.input_scale_per_row ? row : 0)) : 0.0f;
      }
      if (thread_ < kPairs) columns_ = load_columns(a_, first_column + thread_ * 2);
    }
  }

  __device__ void write(const Accumulators& d) {
    if constexpr (kUsesTerms) {
      // Between the barriers all have read the last tile's table.
      hopper::named_barrier(barrier_, hopper::kWarpgroup);
      if (thread_ < kPairs) {
        scales_and_biases_[thread_] = {columns_.scale[0], columns_.scale[1], columns_.bias[0],
                                       columns_.bias[1]};
        corrections_[thread_] = {columns_.correction[0], columns_.correction[1]};
      }
      hopper::named_barrier(barrier_, hopper::kWarpgroup);
    }
    if (simple_) {
      write_slabs<true>(d);
    } else {
      write_slabs<false>(d);
    }
  }

 private:
  static constexpr bool kUsesTerms = !std::is_same_v<Out, int32_t>;
  static constexpr bool kMakesCodes = std::is_same_v<Out, int8_t>;
  using Finisher = std::conditional_t<kMakesCodes, Requantizer, NoRequantizer>;
  static constexpr int kChunk = 16 / sizeof(Out);  // columns that a thread writes at once

  template <bool kSimple>
  __device__ void write_slabs(const Accumulators& d) const {
    const Finisher finisher(a_, output_scale_, output_zero_point_);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        fill<kSimple>(d[block], block, slab, finisher);
        __syncwarp();
        const int64_t row = first_row_ + block * 64;
        const int64_t column = first_column_ + slab * kSlabColumns;
        if (whole_chunks_) {
          copy_chunks(row, column);
        } else {
          copy_elements(row, column);
        }
        __syncwarp();
      }
    }
  }

  /// Where 16-byte chunk `chunk` of a row stands: spread so that what a warp writes at once and
  /// what it reads at once each take all banks.
  __device__ static int chunk_offset(int row, int chunk) {
    return (row * 128 + ((row & 7) << 4)) ^ (chunk << 4);
  }

  /// What belongs to the columns of one group that are this thread's.
  template <bool kSimple>
  struct Terms {
    float4 scales_and_biases;
    int2 correction;

    __device__ void load(const TileWriter& writer, int group) {
      const int pair = group * 4 + writer.lane_ % 4;
      scales_and_biases = writer.scales_and_biases_[pair];
      if constexpr (!kSimple) correction = writer.corrections_[pair];
    }
  };

  /// This thread's values in one group: two of its first row, two of its second.
  template <bool kSimple>
  __device__ void values(const int32_t (&d)[kColumns / 2], int block, int group,
                         const Terms<kSimple>& terms, float (&y)[4]) const {
    const float4 f = terms.scales_and_biases;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int32_t left = d[group * 4 + half * 2], right = d[group * 4 + half * 2 + 1];
      if constexpr (!kSimple) {
        left -= terms.correction.x;
        right -= terms.correction.y;
      }
      const float row_scale = row_scales_[block * 2 + half];
      y[half * 2] = epilogue_value(left, row_scale, f.x, f.z);
      y[half * 2 + 1] = epilogue_value(right, row_scale, f.y, f.w);
    }
    if constexpr (!kSimple) apply(a_.activation, y);
  }

  /// All loads of a batch of groups stand before its first store, which the compiler could not
  /// move them across.
  template <bool kSimple>
  __device__ void fill(const int32_t (&d)[kColumns / 2], int block, int slab,
                       const Finisher& finisher) const {
    constexpr int kBatch = std::min(kGroups, 8), kTogether = sizeof(Out) == 4 ? 1 : 2;
#pragma unroll
    for (int batch = 0; batch < kGroups; batch += kBatch) {
      Terms<kSimple> terms[kBatch];
      if constexpr (kUsesTerms) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) terms[i].load(*this, slab * kGroups + batch + i);
      }
#pragma unroll
      for (int i = 0; i < kBatch; i += kTogether) {
        if constexpr (kMakesCodes) {
          store_codes<kSimple>(d, block, slab, batch + i, {terms[i], terms[i + 1]}, finisher);
        } else if constexpr (sizeof(Out) == 2) {
          store_halves<kSimple>(d, block, slab, batch + i, {terms[i], terms[i + 1]});
        } else {
          store_words<kSimple>(d, block, slab, batch + i, terms[i]);
        }
      }
    }
  }

  /// Codes of two groups of columns into the slab.
  template <bool kSimple>
  __device__ void store_codes(const int32_t (&d)[kColumns / 2], int block, int slab, int group,
                              const Terms<kSimple> (&terms)[2],
                              const Requantizer& requantizer) const {
    float y[2][4];
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      values<kSimple>(d, block, slab * kGroups + group + i, terms[i], y[i]);
    requantizer(y, pairs);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = (group + i / 2) * 8 + lane_ % 4 * 2;
      uint8_t* const target = staging_ + chunk_offset(lane_ / 4, column / 16) + column % 16;
      *reinterpret_cast<uint16_t*>(target + i % 2 * 8 * 128) = static_cast<uint16_t>(pairs[i]);
    }
  }

  /// Values of two groups of columns, two bytes each, into the slab.
  template <bool kSimple>
  __device__ void store_halves(const int32_t (&d)[kColumns / 2], int block, int slab, int group,
                               const Terms<kSimple> (&terms)[2]) const {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float y[4];
      values<kSimple>(d, block, slab * kGroups + group + i, terms[i], y);
      words[2 * i] = packed<Out>(y[0], y[1]);
      words[2 * i + 1] = packed<Out>(y[2], y[3]);
    }
    hopper::store_matrices(matrix_row_ ^ (group << 4), words);
  }

  /// Values or accumulators of one group of columns, four bytes each, into the slab.
  template <bool kSimple>
  __device__ void store_words(const int32_t (&d)[kColumns / 2], int block, int slab, int group,
                              const Terms<kSimple>& terms) const {
    const int quad = lane_ % 4, row = lane_ / 4, first = (slab * kGroups + group) * 4;
    uint8_t* const target = staging_ + chunk_offset(row, group * 2 + quad / 2) + quad % 2 * 8;
    if constexpr (kUsesTerms) {
      float y[4];
      values<kSimple>(d, block, slab * kGroups + group, terms, y);
      *reinterpret_cast<float2*>(target) = {y[0], y[1]};
      *reinterpret_cast<float2*>(target + 8 * 128) = {y[2], y[3]};
    } else {
      *reinterpret_cast<int2*>(target) = {d[first], d[first + 1]};
      *reinterpret_cast<int2*>(target + 8 * 128) = {d[first + 2], d[first + 3]};
    }
  }

  /// The slab to the output, 16 bytes a thread; a chunk lies in the output or outside as a whole.
  __device__ void copy_chunks(int64_t row, int64_t column) const {
    constexpr int kChunks = kSlabColumns / kChunk;       // of a row
    constexpr int kRows = std::max(1, kWarp / kChunks);  // that a warp writes at once
    constexpr int kTimes = std::max(1, 16 / kRows);
    const int chunk = lane_ % kChunks, first = lane_ / kChunks;
    const int64_t out_column = column + chunk * kChunk;
    const int64_t rows = a_.rows - row - first;
    const bool inside = out_column < a_.columns && first < 16;
    uint8_t* target =
        static_cast<uint8_t*>(a_.output) + ((row + first) * a_.columns + out_column) * sizeof(Out);
    const int64_t step = kRows * a_.columns * static_cast<int64_t>(sizeof(Out));
    uint4 chunks[kTimes];
#pragma unroll
    for (int i = 0; i < kTimes; ++i)
      if (first < 16)
        chunks[i] =
            *reinterpret_cast<const uint4*>(staging_ + chunk_offset(first + i * kRows, chunk));
#pragma unroll
    for (int i = 0; i < kTimes; ++i) {
      if (inside && i * kRows < rows) *reinterpret_cast<uint4*>(target) = chunks[i];
      target += step;
    }
  }

  /// The same for outputs whose rows are no whole chunks.
  __device__ void copy_elements(int64_t first_row, int64_t column) const {
    Out* const output = static_cast<Out*>(a_.output);
#pragma unroll 1
    for (int i = lane_; i < 16 * kSlabColumns; i += kWarp) {
      const int row = i / kSlabColumns, inside = i % kSlabColumns;
      const int byte = inside * static_cast<int>(sizeof(Out));
      if (first_row + row < a_.rows && column + inside < a_.columns)
        output[(first_row + row) * a_.columns + column + inside] =
            *reinterpret_cast<const Out*>(staging_ + chunk_offset(row, byte / 16) + byte % 16);
    }
  }

  const EpilogueArguments& a_;
  int barrier_;
  int thread_;
  int lane_;
  uint8_t* staging_;
  hopper::SharedAddress matrix_row_;  // this lane's for store_matrices, in the slab's first chunks
  float4* scales_and_biases_;         // of every pair of columns
  int2* corrections_;
  bool whole_chunks_;
  bool simple_;
  float output_scale_ = 0;
  int32_t output_zero_point_ = 0;
  int64_t first_row_ = 0;
  int64_t first_column_ = 0;
  float row_scales_[2 * kBlocks] = {};
  ColumnPair columns_;
};

// ---- Device side: the ring of stages ------------------------------------------------------------

/// Stages of operand tiles with their barriers, and where this thread stands in them.
template <int kTileM, int kTileN, int kStages>
struct Ring {
  static constexpr int kBytesA = kTileM * kTileK;
  static constexpr int kBytesB = kTileN * kTileK;
  static constexpr int kStageBytes = kBytesA + kBytesB;

  static constexpr int kBarrierBytes = 2 * kStages * 8;

  hopper::SharedAddress stages;    // 1024-byte aligned
  hopper::SharedAddress barriers;  // kBarrierBytes
  int stage = 0;
  uint32_t parity = 0;

  /// The stage's A; its B stands behind it.
  __device__ hopper::SharedAddress a() const { return stages + stage * kStageBytes; }
  /// The copies of a stage have arrived.
  __device__ hopper::SharedAddress full(int of_stage) const { return barriers + of_stage * 8; }
  /// The readers of a stage are done.
  __device__ hopper::SharedAddress empty(int of_stage) const {
    return full(of_stage) + kStages * 8;
  }
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ void skip(int count) {
    const int end = stage + count;
    parity ^= end / kStages & 1;
    stage = end % kStages;
  }
};

/// A warpgroup's products of `blocks` >= 1 stages, summed from zero: 64 kRowBlocks rows of each
/// stage's A, `offset_a` bytes into it, with all of its B. One stage's products are enqueued before
/// the last one's are waited for. release(stage) is called when a stage has been read,
/// all_enqueued() when the last products were enqueued.
///
/// What stands between two stages' products has to be done before the tensor cores, which have
/// those of one stage in store, run out of them: it is kept short.
template <int kRowBlocks, int kPairs, typename R, typename Release, typename AllEnqueued>
__device__ void multiply_blocks(R& ring, int32_t (&d)[kRowBlocks][kPairs], int offset_a, int blocks,
                                const Release& release, const AllEnqueued& all_enqueued) {
  const uint32_t first = hopper::operand_place(ring.stages);
  const auto enqueue = [&](bool from_zero) {
    hopper::barrier_wait(ring.full(ring.stage), ring.parity);
    const uint32_t a = first + ring.stage * (R::kStageBytes / 16) + offset_a / 16;
    const uint32_t b = first + ring.stage * (R::kStageBytes / 16) + R::kBytesA / 16;
    hopper::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kTileK; k += 32) {
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i)
        hopper::wgmma_s8(d[i], hopper::operand_descriptor(a + (i * 64 * kTileK + k) / 16),
                         hopper::operand_descriptor(b + k / 16), !from_zero || k > 0);
    }
    hopper::wgmma_commit();
  };
  enqueue(true);
  int previous = ring.stage;
  ring.advance();
#pragma unroll 1
  for (int block = 1; block < blocks; ++block) {
    enqueue(false);
    hopper::wgmma_wait<1>();
    release(previous);
    previous = ring.stage;
    ring.advance();
  }
  all_enqueued();
  hopper::wgmma_wait<0>();
  release(previous);
}

// ---- The kernel ---------------------------------------------------------------------------------

/// What two consumer warpgroups do with tiles.
enum class Turns {
  halves,    ///< both work on one tile, each on 64 of its rows
  alternate  ///< each works on tiles of its own: one writes while the other multiplies
};

template <typename Writer, int kConsumers, int kTileM, int kTileN, int kStages>
struct KernelShape {
  static constexpr int kThreads = (kConsumers + 1) * hopper::kWarpgroup;
  using StageRing = Ring<kTileM, kTileN, kStages>;
  static constexpr int kWriterOffset = kStages * StageRing::kStageBytes;
  static constexpr int kBarrierOffset = kWriterOffset + kConsumers * Writer::kMemory;
  static constexpr int kSharedMemory = kBarrierOffset + StageRing::kBarrierBytes + 1024;  // aligned
  static_assert(kSharedMemory <= kMostSharedMemory);
};

/// The tile of a block, the ring's depth, how many blocks stand below and beside each other in a
/// cluster, one of the two 1, and how the warpgroups share the work.
template <int kM, int kN, int kDepth, int kBelow, int kBeside, Turns kWhose = Turns::halves>
struct Tiling {
  static constexpr Turns kTurns = kWhose;
  static constexpr int kConsumers = kTurns == Turns::alternate ? 2 : kM / 64;   // warpgroups
  static constexpr int kReaders = kTurns == Turns::alternate ? 1 : kConsumers;  // of a stage
  static constexpr int kRowBlocks = kM / 64 / kReaders;  // of 64 rows, a warpgroup's
  static constexpr int kTileM = kM, kTileN = kN, kStages = kDepth;
  static constexpr int kClusterM = kBelow, kClusterN = kBeside, kCluster = kBelow * kBeside;
  static_assert(kBelow == 1 || kBeside == 1);
  static constexpr int kShareA = kM / kBeside, kShareB = kN / kBelow;  // rows that a block loads
  template <typename Out>
  using Writer = TileWriter<Out, kN, kRowBlocks>;
  template <typename Out>
  using Shape = KernelShape<Writer<Out>, kConsumers, kM, kN, kDepth>;
};

// Named barriers, one a warpgroup; 0 is __syncthreads.
constexpr int kFirstWriterBarrier = 1;
constexpr int kFirstTurnBarrier = 3;

template <typename Out, typename T>
__global__ void __launch_bounds__(T::template Shape<Out>::kThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap map_a,
                const __grid_constant__ CUtensorMap map_b,
                const __grid_constant__ EpilogueArguments epilogue, int k_blocks, TileOrder order,
                LoadedRows rows) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Writer = typename T::template Writer<Out>;
  using Shape = typename T::template Shape<Out>;
  using StageRing = typename Shape::StageRing;
  extern __shared__ uint8_t raw[];
  uint8_t* const memory = raw + (1024 - hopper::shared_address(raw) % 1024) % 1024;
  StageRing ring{hopper::shared_address(memory),
                 hopper::shared_address(memory) + Shape::kBarrierOffset};

  const int warpgroup = hopper::warp_uniform(threadIdx.x / hopper::kWarpgroup);
  const int rank = T::kCluster > 1 ? static_cast<int>(hopper::cluster_rank()) : 0;
  if (threadIdx.x == 0) {
    hopper::prefetch_map(&map_a);
    hopper::prefetch_map(&map_b);
    for (int i = 0; i < T::kStages; ++i) {
      hopper::barrier_init(ring.full(i), 1);
      hopper::barrier_init(ring.empty(i), T::kReaders * 4 * T::kCluster);
    }
    hopper::barrier_init_fence();
  }
  __syncthreads();
  if constexpr (T::kCluster > 1) hopper::cluster_sync_relaxed();
  hopper::allow_later_kernels();
  hopper::wait_for_earlier_kernels();

  const int tiles = order.rows * order.columns;
  const int first_tile = blockIdx.x / T::kCluster, step = gridDim.x / T::kCluster;
  // Of this block in the matrix of blocks' tiles.
  const auto tile_row = [&](int2 place) {
    return place.x * T::kClusterM + (T::kClusterM > 1 ? rank : 0);
  };
  const auto tile_column = [&](int2 place) {
    return place.y * T::kClusterN + (T::kClusterN > 1 ? rank : 0);
  };
  if (warpgroup == T::kConsumers) {
    if constexpr (T::kConsumers == 2) hopper::give_registers_back<40>();
    if (threadIdx.x == T::kConsumers * hopper::kWarpgroup) {
      const auto load = [&](const CUtensorMap& map, hopper::SharedAddress tile,
                            hopper::SharedAddress full, int k, int row, int share, bool shared) {
        if (shared) {
          hopper::load_tile_multicast(&map, tile + rank * share * kTileK, full, k,
                                      row + rank * share, (1 << T::kCluster) - 1);
        } else {
          hopper::load_tile(&map, tile, full, k, row);
        }
      };
      const int bytes = rows.loaded * kTileK + StageRing::kBytesB;
      for (int tile = first_tile; tile < tiles; tile += step) {
        const int2 place = order.at(tile);
        const int row = tile_row(place) * T::kTileM, column = tile_column(place) * T::kTileN;
        for (int block = 0; block < k_blocks; ++block) {
          hopper::barrier_wait(ring.empty(ring.stage), ring.parity ^ 1);
          const hopper::SharedAddress full = ring.full(ring.stage);
          hopper::barrier_arrive_expecting(full, bytes);
          if (T::kClusterN == 1 || rank < rows.loaders)
            load(map_a, ring.a(), full, block * kTileK, row, T::kShareA, T::kClusterN > 1);
          load(map_b, ring.a() + StageRing::kBytesA, full, block * kTileK, column, T::kShareB,
               T::kClusterM > 1);
          ring.advance();
        }
      }
    }
    __syncwarp();
  } else {
    if constexpr (T::kConsumers == 2) hopper::take_registers<232>();
    constexpr int kHalf = 64;
    Writer writer(epilogue, memory + Shape::kWriterOffset + warpgroup * Writer::kMemory,
                  kFirstWriterBarrier + warpgroup);
    const int lane = threadIdx.x % kWarp;
    // Lane i tells block i of the cluster.
    const hopper::SharedAddress readers_done = hopper::address_in_block(
        ring.empty(0), static_cast<uint32_t>(std::min(lane, T::kCluster - 1)));
    const auto release = [&](int stage) {
      if (lane < T::kCluster) hopper::barrier_arrive_cluster(readers_done + stage * 8);
    };
    typename Writer::Accumulators d;
    const auto prepare = [&](int tile, int offset) {
      const int2 place = order.at(tile);
      writer.prepare(int64_t{tile_row(place)} * T::kTileM + offset,
                     int64_t{tile_column(place)} * T::kTileN);
    };
    if constexpr (T::kTurns == Turns::alternate) {
      // A warpgroup's turn comes when the other has taken the last stage of its tile. Waiting for
      // the stage itself would not do: its barrier knows a phase from the next, but not from the
      // one after.
      const int other = 1 - warpgroup;
      if (warpgroup == 1) ring.skip(k_blocks);
      for (int tile = first_tile + warpgroup * step; tile < tiles; tile += 2 * step) {
        prepare(tile, 0);
        if (tile != first_tile)
          hopper::named_barrier(kFirstTurnBarrier + warpgroup, 2 * hopper::kWarpgroup);
        multiply_blocks(ring, d, 0, k_blocks, release, [&] {
          if (tile + step < tiles)
            hopper::named_barrier_arrive(kFirstTurnBarrier + other, 2 * hopper::kWarpgroup);
        });
        ring.skip(k_blocks);
        writer.write(d);
      }
    } else {
      for (int tile = first_tile; tile < tiles; tile += step) {
        prepare(tile, warpgroup * kHalf);
        multiply_blocks(ring, d, warpgroup * kHalf * kTileK, k_blocks, release, [] {});
        writer.write(d);
      }
    }
  }
  // No block ends while another may still write into its shared memory.
  if constexpr (T::kCluster > 1) hopper::cluster_sync_relaxed();
#endif
}

// ---- Host side: launches ------------------------------------------------------------------------

struct Operands {
  const int8_t* codes;
  const int8_t* weight;
  int64_t k;
};

template <typename... Parameters, typename... Arguments>
void launch_cluster(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, int cluster,
                    int shared_memory, void* stream, Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_memory;
  config.stream = as_stream(stream);
  config.attrs = attributes;
  config.numAttrs = 2;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "int8_gemm");
}

template <typename Out, typename T>
void run_tiling(const Operands& o, const EpilogueArguments& e, void* stream) {
  using Shape = typename T::template Shape<Out>;
  auto* const kernel = gemm_kernel<Out, T>;
  static std::atomic<uint64_t> devices{0};
  allow_shared_memory(reinterpret_cast<const void*>(kernel), Shape::kSharedMemory, devices);
  const LoadedRows rows(e.rows, T::kTileM, T::kShareA);
  const CUtensorMap map_a = tensor_map(o.codes, e.rows, o.k, rows.box);
  const CUtensorMap map_b = tensor_map(o.weight, e.columns, o.k, T::kShareB);
  const TileOrder order{static_cast<int>(divide_up(e.rows, T::kTileM * T::kClusterM)),
                        static_cast<int>(divide_up(e.columns, T::kTileN * T::kClusterN))};
  const int64_t tiles = int64_t{order.rows} * order.columns;
  const int64_t clusters = std::min<int64_t>(tiles, multiprocessors() / T::kCluster);
  launch_cluster(kernel, static_cast<unsigned>(clusters * T::kCluster), Shape::kThreads,
                 T::kCluster, Shape::kSharedMemory, stream, map_a, map_b, e,
                 static_cast<int>(divide_up(o.k, kTileK)), order, rows);
}

/// Runs configuration `index` of gemm_configurations() for one output type.
template <typename Out>
void run(int index, const Operands& o, const EpilogueArguments& e, void* stream) {
  const auto run_with = [&]<typename T>(T*) { run_tiling<Out, T>(o, e, stream); };
  // In the order of gemm_configurations().
  switch (index) {
    case 0:
      return run_with(static_cast<Tiling<128, 128, 6, 2, 1, Turns::alternate>*>(nullptr));
    case 1:
      return run_with(static_cast<Tiling<128, 64, 8, 1, 2>*>(nullptr));
    case 2:
      return run_with(static_cast<Tiling<64, 64, 12, 1, 2>*>(nullptr));
    case 3:
      return run_with(static_cast<Tiling<64, 32, 16, 1, 2>*>(nullptr));
    default:
      throw Error(concat("int8_gemm: there is no configuration ", index));
  }
}

extern template void run<int32_t>(int, const Operands&, const EpilogueArguments&, void*);
extern template void run<float>(int, const Operands&, const EpilogueArguments&, void*);
extern template void run<__half>(int, const Operands&, const EpilogueArguments&, void*);
extern template void run<__nv_bfloat16>(int, const Operands&, const EpilogueArguments&, void*);
extern template void run<int8_t>(int, const Operands&, const EpilogueArguments&, void*);

}  // namespace vernier::cuda::sm90
