// What Hopper (sm_90) adds, as functions: barriers that count bytes, the copy engine for tiles
// (TMA), clusters of blocks that reach each other's shared memory, warpgroup matrix products. Thin
// wrappers of PTX instructions (PTX ISA 9.0, chapters of the same names); internal, for .cu files.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace vernier::cuda::hopper {

constexpr int kWarpgroup = 128;

/// An address in the block's shared memory. The loops around the tensor cores calculate with these,
/// of 32 bits and equal in a warp, so that the compiler keeps them in uniform registers: a pointer
/// would take a dozen instructions for each product.
using SharedAddress = uint32_t;

__device__ inline SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}
/// The value, known to the compiler as equal in all threads of a warp. To be called by whole warps.
__device__ inline int warp_uniform(int value) { return __shfl_sync(0xffffffff, value, 0); }

// ---- Barriers (mbarrier) ------------------------------------------------------------------------

__device__ inline void barrier_init(SharedAddress barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
/// Makes initialized barriers visible to the cluster and the copy engine.
__device__ inline void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
/// One arrival that also announces `bytes` of copies to wait for.
__device__ inline void barrier_arrive_expecting(SharedAddress barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
/// The address in block `rank` of the cluster of what stands at `address` here.
__device__ inline SharedAddress address_in_block(SharedAddress address, uint32_t rank) {
  SharedAddress there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
/// One arrival at a barrier of any block of the cluster. It orders no writes of this thread for
/// other blocks, which would cost a fence of the whole GPU.
__device__ inline void barrier_arrive_cluster(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/// Waits until the phase of this parity is complete.
__device__ inline void barrier_wait(SharedAddress barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
/// A barrier of the hardware's sixteen, among `threads` threads of the block.
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- Tiles of global memory to shared memory (TMA) ----------------------------------------------

__device__ inline void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}
/// Enqueues the copy of the map's box at (column, row); `barrier` counts its bytes.
__device__ inline void load_tile(const CUtensorMap* map, SharedAddress target,
                                 SharedAddress barrier, int32_t column, int32_t row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(target),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
/// The same into every block of the cluster whose bit is set, at the same place, for the barrier of
/// the same place.
__device__ inline void load_tile_multicast(const CUtensorMap* map, SharedAddress target,
                                           SharedAddress barrier, int32_t column, int32_t row,
                                           uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}

// ---- Clusters -----------------------------------------------------------------------------------

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
/// Waits for all threads of the cluster. It orders no memory accesses but those to mbarriers and
/// what they announce: releasing writes to the cluster would cost a fence of the whole GPU.
__device__ inline void cluster_sync_relaxed() {
  asm volatile(
      "barrier.cluster.arrive.relaxed;\n"
      "barrier.cluster.wait;" ::
          : "memory");
}

// ---- Warpgroups ---------------------------------------------------------------------------------

template <int kRegisters>
__device__ void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// The part of an operand's descriptor that depends on where it stands; bytes / 16 more for an
/// operand that many bytes further.
__device__ inline uint32_t operand_place(SharedAddress tile) { return (tile & 0x3ffff) >> 4; }
/// Describes an operand tile of rows of 128 bytes with the 128-byte swizzle, 1024-byte aligned, as
/// load_tile leaves it: 8 rows (1024 bytes) from one group of rows to the next.
__device__ inline uint64_t operand_descriptor(uint32_t place) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kGroupStride = uint64_t{1024 >> 4} << 32;
  constexpr uint32_t kLeadingUnused = 1 << 16;
  return kSwizzle128 | kGroupStride | (kLeadingUnused + place);
}

/// Stores four matrices of 8 rows of 16 bytes: lane i's address is that of row i % 8 of matrix
/// i / 8, and of each matrix it holds the 4 bytes i % 4 of row i / 4.
__device__ inline void store_matrices(SharedAddress row, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// ---- Launches that overlap ----------------------------------------------------------------------

/// Waits until the kernels before this one in the stream are done and their writes are seen.
__device__ inline void wait_for_earlier_kernels() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
/// Lets the next kernel of the stream start where it was launched to overlap.
__device__ inline void allow_later_kernels() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace vernier::cuda::hopper
