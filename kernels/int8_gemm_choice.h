// Which of the INT8 kernels for compute capability 9.0 computes a product, and why; no CUDA in
// here, so that it is testable anywhere; internal.
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace vernier {

/// One way to compute a product: the tile of a block, and the blocks below and beside each other
/// that share operands.
struct GemmConfiguration {
  const char* name;
  int tile_m;
  int tile_n;
  int cluster_m;  ///< blocks that share each tile of the weight
  int cluster_n;  ///< blocks that share each tile of the codes
  int resident;   ///< blocks that a multiprocessor holds
};

/// All configurations, numbered by their place.
std::span<const GemmConfiguration> gemm_configurations();

struct GemmChoice {
  int index = 0;      ///< into gemm_configurations()
  double cycles = 0;  ///< estimated
  /// For people: the tile, blocks, rounds over the multiprocessors.
  std::string reason() const;
  int64_t tiles = 0;
  int64_t rounds = 0;
};

/// The configuration whose estimated time is least. The estimate: rounds of tiles over the
/// multiprocessors, each as long as its share of K takes at the tensor cores' rate or at the memory
/// system's, whichever is more, and a fixed cost a tile.
GemmChoice choose_configuration(int64_t m, int64_t n, int64_t k, int multiprocessors);

}  // namespace vernier
