// Which of the INT8 kernels for compute capability 9.0 computes a product, and why; no CUDA in
// here, so that it is testable anywhere; internal.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <mutex>
#include <optional>
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
  /// Whether a tile's results are written while the next one's products are made.
  bool hides_epilogue;
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
/// system's, whichever is more, and the epilogues that nothing hides. Its constants fit
/// times measured on an H200.
GemmChoice choose_configuration(int64_t m, int64_t n, int64_t k, int multiprocessors);

/// The configurations that were fastest when they were timed, by shape: in memory and, so that
/// later processes have them, in a file of lines "m n k NAME". Safe to use from several threads.
class GemmTuningCache {
 public:
  /// Reads `file` where there is one; lines that do not parse or name no configuration are skipped,
  /// and so is everything behind kMostShapes lines. An empty path keeps to memory.
  explicit GemmTuningCache(std::filesystem::path file);

  std::optional<int> find(int64_t m, int64_t n, int64_t k) const;
  /// Also writes the file anew, beside and renamed; a file that cannot be written is let be,
  /// because a product that has its result must not fail for it.
  void store(int64_t m, int64_t n, int64_t k, int configuration);

  static constexpr size_t kMostShapes = 65536;

 private:
  using Shape = std::array<int64_t, 3>;

  void write() const;

  std::filesystem::path file_;
  mutable std::mutex mutex_;
  std::map<Shape, int> fastest_;
};

/// Where the cache of a GPU model stands, by the environment (int8_gemm.h); empty where it names no
/// folder.
std::filesystem::path gemm_tuning_file(const std::string& gpu);

}  // namespace vernier
