// The kernel behind int8_gemm_sm90.h, as a template over the output type; int8_gemm_sm90_TYPE.cu
// instantiate it, a type a file, so that they compile side by side.
//
// One warp has the copies, one or two warpgroups the products. Operand tiles of 128 codes of K go
// through a ring of shared memory stages. Each block walks over output tiles; of two warpgroups one
// owns the upper and one the lower half of a tile, and the second starts two stages behind the
// first, so that while one writes its results the other has the tensor cores. The blocks of a
// cluster stand side by side and share an operand's tile: each loads a part of it for all. Large
// products share the weight between tiles below each other; products of few rows, which want many
// narrow tiles to keep the memory busy, share the codes between tiles beside each other.
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
inline __device__ __noinline__ uint32_t divided_codes(float4 y, ScaleDivision division, float low,
                                                      float high) {
  const float values[4] = {y.x, y.y, y.z, y.w};
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    codes |= (ScaleDivision::integer_bits(division.divided_code(values[i], low, high)) & 0xff)
             << (8 * i);
  return codes;
}

/// Four values to the codes of the output's scale, a byte each.
class Requantizer {
 public:
  __device__ explicit Requantizer(const EpilogueArguments& a) : division_(__ldg(a.output_scale)) {
    const int32_t zero_point = a.output_zero_point ? __ldg(a.output_zero_point) : 0;
    low_ = static_cast<float>(a.qmin - zero_point);
    high_ = static_cast<float>(a.qmax - zero_point);
    zero_points_ = (zero_point & 0xff) * 0x01010101u;
  }

  __device__ uint32_t operator()(const float (&y)[4]) const {
    uint32_t bytes[4];
    bool sure = true;
#pragma unroll
    for (int i = 0; i < 4; ++i) bytes[i] = division_.likely_bits(y[i], low_, high_, sure);
    uint32_t codes = __byte_perm(__byte_perm(bytes[0], bytes[1], 0x0040),
                                 __byte_perm(bytes[2], bytes[3], 0x0040), 0x5410);
    if (!sure) [[unlikely]]
      codes = divided_codes({y[0], y[1], y[2], y[3]}, division_, low_, high_);
    return __vadd4(codes, zero_points_);
  }

 private:
  ScaleDivision division_;
  float low_, high_;
  uint32_t zero_points_;  // in every byte
};

struct NoRequantizer {
  __device__ explicit NoRequantizer(const EpilogueArguments&) {}
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

/// A warpgroup's 64 x kColumns accumulators, as wgmma leaves them: thread t holds rows t / 32 * 16
/// + t % 32 / 4 and that + 8, of every 8 columns the pair t % 4. Each warp finishes its 16 rows by
/// slabs of up to 128 bytes a row, which it turns in shared memory so as to write whole lines. With
/// two warps on a scheduler it is the length of dependent instructions that costs: the common case
/// (no zero point, no activation) has a body of its own, without branches.
template <typename Out, int kColumns>
class TileWriter {
 public:
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
        requantizer_(a_),
        barrier_(named_barrier),
        thread_(threadIdx.x % hopper::kWarpgroup),
        lane_(thread_ % kWarp),
        staging_(memory + thread_ / kWarp * kStagingBytes),
        scales_and_biases_(reinterpret_cast<float4*>(memory + 4 * kStagingBytes)),
        corrections_(reinterpret_cast<int2*>(scales_and_biases_ + kPairs)),
        whole_chunks_(a_.columns % kChunk == 0 &&
                      (reinterpret_cast<uint64_t>(a_.output) & 15) == 0),
        simple_(!kUsesTerms || (a_.activation == Activation::none && !a_.input_zero_point)) {}

  /// Starts the loads for the tile that write() will be called for.
  __device__ void prepare(int64_t first_row, int64_t first_column) {
    first_row_ = first_row + thread_ / kWarp * 16;
    first_column_ = first_column;
    if constexpr (kUsesTerms) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first_row_ + half * 8 + lane_ / 4;
        row_scales_[half] =
            row < a_.rows ? __ldg(a_.input_scale + (a_.input_scale_per_row ? row : 0)) : 0.0f;
      }
      if (thread_ < kPairs) columns_ = load_columns(a_, first_column + thread_ * 2);
    }
  }

  __device__ void write(const int32_t (&d)[kColumns / 2]) {
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
  static constexpr int kChunk = 16 / sizeof(Out);  // columns that a thread writes at once

  template <bool kSimple>
  __device__ void write_slabs(const int32_t (&d)[kColumns / 2]) const {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      fill<kSimple>(d, slab);
      __syncwarp();
      const int64_t column = first_column_ + slab * kSlabColumns;
      if (whole_chunks_) {
        copy_chunks(column);
      } else {
        copy_elements(column);
      }
      __syncwarp();
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
  __device__ void values(const int32_t (&d)[kColumns / 2], int group, const Terms<kSimple>& terms,
                         float (&y)[4]) const {
    const float4 f = terms.scales_and_biases;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int32_t left = d[group * 4 + half * 2], right = d[group * 4 + half * 2 + 1];
      if constexpr (!kSimple) {
        left -= terms.correction.x;
        right -= terms.correction.y;
      }
      y[half * 2] = epilogue_value(left, row_scales_[half], f.x, f.z);
      y[half * 2 + 1] = epilogue_value(right, row_scales_[half], f.y, f.w);
    }
    if constexpr (!kSimple) apply(a_.activation, y);
  }

  /// All loads of a batch of groups stand before its first store, which the compiler could not
  /// move them across.
  template <bool kSimple>
  __device__ void fill(const int32_t (&d)[kColumns / 2], int slab) const {
    constexpr int kBatch = std::min(kGroups, 8);
#pragma unroll
    for (int batch = 0; batch < kGroups; batch += kBatch) {
      Terms<kSimple> terms[kBatch];
      if constexpr (kUsesTerms) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) terms[i].load(*this, slab * kGroups + batch + i);
      }
      if constexpr (std::is_same_v<Out, int8_t>) {
#pragma unroll
        for (int i = 0; i < kBatch; i += 2)
          store_codes<kSimple>(d, slab, batch + i, terms[i], terms[i + 1]);
      } else {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) store_group<kSimple>(d, slab, batch + i, terms[i]);
      }
    }
  }

  /// Codes of two groups of columns into the slab.
  template <bool kSimple>
  __device__ void store_codes(const int32_t (&d)[kColumns / 2], int slab, int group,
                              const Terms<kSimple>& left, const Terms<kSimple>& right) const {
    const int quad = lane_ % 4;
    float y[2][4];
    values<kSimple>(d, slab * kGroups + group, left, y[0]);
    values<kSimple>(d, slab * kGroups + group + 1, right, y[1]);
    uint8_t* const target =
        staging_ + chunk_offset(lane_ / 4, group / 2) + quad % 2 * 8 + quad / 2 * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // This thread's two columns of two groups, for four columns of one group.
      const uint32_t own =
          requantizer_({y[0][half * 2], y[0][half * 2 + 1], y[1][half * 2], y[1][half * 2 + 1]});
      const uint32_t other = __shfl_xor_sync(kFullWarp, own, 1);
      *reinterpret_cast<uint32_t*>(target + half * 8 * 128) =
          __byte_perm(own, other, quad % 2 == 0 ? 0x5410 : 0x3276);
    }
  }

  /// Values or accumulators of one group of columns into the slab.
  template <bool kSimple>
  __device__ void store_group(const int32_t (&d)[kColumns / 2], int slab, int group,
                              const Terms<kSimple>& terms) const {
    const int quad = lane_ % 4, row = lane_ / 4, first = (slab * kGroups + group) * 4;
    if constexpr (sizeof(Out) == 4) {
      uint8_t* const target = staging_ + chunk_offset(row, group * 2 + quad / 2) + quad % 2 * 8;
      if constexpr (kUsesTerms) {
        float y[4];
        values<kSimple>(d, slab * kGroups + group, terms, y);
        *reinterpret_cast<float2*>(target) = {y[0], y[1]};
        *reinterpret_cast<float2*>(target + 8 * 128) = {y[2], y[3]};
      } else {
        *reinterpret_cast<int2*>(target) = {d[first], d[first + 1]};
        *reinterpret_cast<int2*>(target + 8 * 128) = {d[first + 2], d[first + 3]};
      }
    } else {
      uint8_t* const target = staging_ + chunk_offset(row, group) + quad * 4;
      float y[4];
      values<kSimple>(d, slab * kGroups + group, terms, y);
      *reinterpret_cast<uint32_t*>(target) = packed<Out>(y[0], y[1]);
      *reinterpret_cast<uint32_t*>(target + 8 * 128) = packed<Out>(y[2], y[3]);
    }
  }

  /// The slab to the output, 16 bytes a thread; a chunk lies in the output or outside as a whole.
  __device__ void copy_chunks(int64_t column) const {
    constexpr int kChunks = kSlabColumns / kChunk;       // of a row
    constexpr int kRows = std::max(1, kWarp / kChunks);  // that a warp writes at once
    constexpr int kTimes = std::max(1, 16 / kRows);
    const int chunk = lane_ % kChunks, first = lane_ / kChunks;
    const int64_t out_column = column + chunk * kChunk;
    const int64_t rows = a_.rows - first_row_ - first;
    const bool inside = out_column < a_.columns && first < 16;
    uint8_t* target = static_cast<uint8_t*>(a_.output) +
                      ((first_row_ + first) * a_.columns + out_column) * sizeof(Out);
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
  __device__ void copy_elements(int64_t column) const {
    Out* const output = static_cast<Out*>(a_.output);
#pragma unroll 1
    for (int i = lane_; i < 16 * kSlabColumns; i += kWarp) {
      const int row = i / kSlabColumns, inside = i % kSlabColumns;
      const int byte = inside * static_cast<int>(sizeof(Out));
      if (first_row_ + row < a_.rows && column + inside < a_.columns)
        output[(first_row_ + row) * a_.columns + column + inside] =
            *reinterpret_cast<const Out*>(staging_ + chunk_offset(row, byte / 16) + byte % 16);
    }
  }

  const EpilogueArguments& a_;
  [[no_unique_address]] std::conditional_t<std::is_same_v<Out, int8_t>, Requantizer, NoRequantizer>
      requantizer_;
  int barrier_;
  int thread_;
  int lane_;
  uint8_t* staging_;
  float4* scales_and_biases_;  // of every pair of columns
  int2* corrections_;
  bool whole_chunks_;
  bool simple_;
  int64_t first_row_ = 0;
  int64_t first_column_ = 0;
  float row_scales_[2] = {};
  ColumnPair columns_;
};

// ---- Device side: the ring of stages ------------------------------------------------------------

/// Stages of operand tiles with their barriers, and where this thread stands in them.
template <int kTileM, int kTileN, int kStages>
struct Ring {
  static constexpr int kBytesA = kTileM * kTileK;
  static constexpr int kBytesB = kTileN * kTileK;
  static constexpr int kStageBytes = kBytesA + kBytesB;

  uint8_t* stages;  // 1024-byte aligned
  uint64_t* full;   // the stage's copies have arrived
  uint64_t* empty;  // its readers are done
  int stage = 0;
  uint32_t parity = 0;

  __device__ uint8_t* a() const { return stages + stage * kStageBytes; }
  __device__ uint8_t* b() const { return a() + kBytesA; }
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// A warpgroup's products of `blocks` >= 1 stages, summed from zero: rows from `offset_a` on of
/// each stage's A with all of its B. One stage's products are enqueued before the last one's are
/// waited for; release(stage) is called when a stage has been read, enqueued(block) when one was
/// enqueued.
template <int kTileN, typename R, typename Release, typename Enqueued>
__device__ void multiply_blocks(R& ring, int32_t (&d)[kTileN / 2], int offset_a, int blocks,
                                const Release& release, const Enqueued& enqueued) {
  int previous = -1;
  for (int block = 0; block < blocks; ++block) {
    hopper::barrier_wait(ring.full + ring.stage, ring.parity);
    const uint64_t a = hopper::operand_descriptor(ring.a() + offset_a);
    const uint64_t b = hopper::operand_descriptor(ring.b());
    hopper::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kTileK; k += 32)
      hopper::wgmma_s8(d, hopper::advanced(a, k), hopper::advanced(b, k), block > 0 || k > 0);
    hopper::wgmma_commit();
    enqueued(block);
    if (previous >= 0) {
      hopper::wgmma_wait<1>();
      release(previous);
    }
    previous = ring.stage;
    ring.advance();
  }
  hopper::wgmma_wait<0>();
  release(previous);
}

// ---- The kernel ---------------------------------------------------------------------------------

template <typename Writer, int kTileM, int kTileN, int kStages>
struct KernelShape {
  static constexpr int kConsumers = kTileM / 64;  // warpgroups
  static constexpr int kThreads = (kConsumers + 1) * hopper::kWarpgroup;
  using StageRing = Ring<kTileM, kTileN, kStages>;
  static constexpr int kWriterOffset = kStages * StageRing::kStageBytes;
  static constexpr int kBarrierOffset = kWriterOffset + kConsumers * Writer::kMemory;
  static constexpr int kSharedMemory = kBarrierOffset + 2 * kStages * 8 + 1024;  // and alignment
  static_assert(kSharedMemory <= kMostSharedMemory);
};

/// The tile of a block, the ring's depth, and how many blocks stand below and beside each other in
/// a cluster, one of the two 1.
template <int kM, int kN, int kDepth, int kBelow, int kBeside>
struct Tiling {
  static constexpr int kTileM = kM, kTileN = kN, kStages = kDepth;
  static constexpr int kClusterM = kBelow, kClusterN = kBeside, kCluster = kBelow * kBeside;
  static_assert(kBelow == 1 || kBeside == 1);
  static constexpr int kShareA = kM / kBeside, kShareB = kN / kBelow;  // rows that a block loads
  template <typename Writer>
  using Shape = KernelShape<Writer, kM, kN, kDepth>;
};

constexpr int kStaggerBarrier = 1;      // named barriers: 0 is __syncthreads
constexpr int kFirstWriterBarrier = 2;  // one a warpgroup
constexpr int kStaggerStages = 2;

template <typename Out, typename T>
__global__ void __launch_bounds__(T::template Shape<TileWriter<Out, T::kTileN>>::kThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap map_a,
                const __grid_constant__ CUtensorMap map_b,
                const __grid_constant__ EpilogueArguments epilogue, int k_blocks, TileOrder order) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Writer = TileWriter<Out, T::kTileN>;
  using Shape = typename T::template Shape<Writer>;
  using StageRing = typename Shape::StageRing;
  extern __shared__ uint8_t raw[];
  uint8_t* const memory = raw + (1024 - hopper::shared_address(raw) % 1024) % 1024;
  StageRing ring{memory, reinterpret_cast<uint64_t*>(memory + Shape::kBarrierOffset), nullptr};
  ring.empty = ring.full + T::kStages;

  const int warpgroup = threadIdx.x / hopper::kWarpgroup;
  const int rank = T::kCluster > 1 ? static_cast<int>(hopper::cluster_rank()) : 0;
  if (threadIdx.x == 0) {
    hopper::prefetch_map(&map_a);
    hopper::prefetch_map(&map_b);
    for (int i = 0; i < T::kStages; ++i) {
      hopper::barrier_init(ring.full + i, 1);
      hopper::barrier_init(ring.empty + i, Shape::kConsumers * 4 * T::kCluster);
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
  if (warpgroup == Shape::kConsumers) {
    if constexpr (Shape::kConsumers == 2) hopper::give_registers_back<40>();
    if (threadIdx.x == Shape::kConsumers * hopper::kWarpgroup) {
      const auto load = [&](const CUtensorMap& map, uint8_t* tile, uint64_t* full, int k, int row,
                            int share, bool shared) {
        if (shared) {
          hopper::load_tile_multicast(&map, tile + rank * share * kTileK, full, k,
                                      row + rank * share, (1 << T::kCluster) - 1);
        } else {
          hopper::load_tile(&map, tile, full, k, row);
        }
      };
      for (int tile = first_tile; tile < tiles; tile += step) {
        const int2 place = order.at(tile);
        const int row = tile_row(place) * T::kTileM, column = tile_column(place) * T::kTileN;
        for (int block = 0; block < k_blocks; ++block) {
          hopper::barrier_wait(ring.empty + ring.stage, ring.parity ^ 1);
          uint64_t* const full = ring.full + ring.stage;
          hopper::barrier_arrive_expecting(full, StageRing::kStageBytes);
          load(map_a, ring.a(), full, block * kTileK, row, T::kShareA, T::kClusterN > 1);
          load(map_b, ring.b(), full, block * kTileK, column, T::kShareB, T::kClusterM > 1);
          ring.advance();
        }
      }
    }
    __syncwarp();
  } else {
    if constexpr (Shape::kConsumers == 2) hopper::take_registers<232>();
    constexpr int kHalf = 64;
    Writer writer(epilogue, memory + Shape::kWriterOffset + warpgroup * Writer::kMemory,
                  kFirstWriterBarrier + warpgroup);
    const int lane = threadIdx.x % kWarp;
    const auto release = [&](int stage) {
      if (lane < T::kCluster) hopper::barrier_arrive_at(ring.empty + stage, lane);
    };
    // The second warpgroup's lag; both have at least one stage.
    const int stagger = min(kStaggerStages, k_blocks);
    if (Shape::kConsumers == 2 && warpgroup == 1)
      hopper::named_barrier(kStaggerBarrier, 2 * hopper::kWarpgroup);

    int32_t d[T::kTileN / 2];
    for (int tile = first_tile; tile < tiles; tile += step) {
      const int2 place = order.at(tile);
      writer.prepare(int64_t{tile_row(place)} * T::kTileM + warpgroup * kHalf,
                     int64_t{tile_column(place)} * T::kTileN);
      multiply_blocks<T::kTileN>(
          ring, d, warpgroup * kHalf * kTileK, k_blocks, release, [&](int block) {
            if (Shape::kConsumers == 2 && warpgroup == 0 && tile == first_tile &&
                block + 1 == stagger)
              hopper::named_barrier_arrive(kStaggerBarrier, 2 * hopper::kWarpgroup);
          });
      writer.write(d);
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
  using Shape = typename T::template Shape<TileWriter<Out, T::kTileN>>;
  auto* const kernel = gemm_kernel<Out, T>;
  static std::atomic<uint64_t> devices{0};
  allow_shared_memory(reinterpret_cast<const void*>(kernel), Shape::kSharedMemory, devices);
  const CUtensorMap map_a = tensor_map(o.codes, e.rows, o.k, T::kShareA);
  const CUtensorMap map_b = tensor_map(o.weight, e.columns, o.k, T::kShareB);
  const TileOrder order{static_cast<int>(divide_up(e.rows, T::kTileM * T::kClusterM)),
                        static_cast<int>(divide_up(e.columns, T::kTileN * T::kClusterN))};
  const int64_t tiles = int64_t{order.rows} * order.columns;
  const int64_t clusters = std::min<int64_t>(tiles, multiprocessors() / T::kCluster);
  launch_cluster(kernel, static_cast<unsigned>(clusters * T::kCluster), Shape::kThreads,
                 T::kCluster, Shape::kSharedMemory, stream, map_a, map_b, e,
                 static_cast<int>(divide_up(o.k, kTileK)), order);
}

/// Runs configuration `index` of gemm_configurations() for one output type.
template <typename Out>
void run(int index, const Operands& o, const EpilogueArguments& e, void* stream) {
  const auto run_with = [&]<typename T>(T*) { run_tiling<Out, T>(o, e, stream); };
  // In the order of gemm_configurations().
  switch (index) {
    case 0:
      return run_with(static_cast<Tiling<128, 256, 4, 2, 1>*>(nullptr));
    case 1:
      return run_with(static_cast<Tiling<128, 128, 6, 2, 1>*>(nullptr));
    case 2:
      return run_with(static_cast<Tiling<64, 64, 12, 1, 2>*>(nullptr));
    case 3:
      return run_with(static_cast<Tiling<64, 32, 16, 1, 4>*>(nullptr));
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
