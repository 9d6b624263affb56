#include <vernier/kernels/error.h>
#include <vernier/kernels/int8_gemm_choice.h>

#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <system_error>

namespace vernier {
namespace {

constexpr GemmConfiguration kConfigurations[] = {
    {"128x128_cluster2x1", 128, 128, 2, 1, true},
    {"128x64_cluster1x2", 128, 64, 1, 2, false},
    {"64x64_cluster1x2", 64, 64, 1, 2, false},
    {"64x32_cluster1x2", 64, 32, 1, 2, false},
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

GemmChoice estimate(int index, int64_t m, int64_t n, int64_t k, int multiprocessors) {
  const GemmConfiguration& c = kConfigurations[index];
  constexpr double kProducts = 4096;  // codes multiplied a cycle and multiprocessor
  constexpr double kBytes = 44;       // loaded a cycle and multiprocessor when all load
  constexpr double kBytesAlone = 60;  // and when few do
  constexpr double kStart = 5000;     // cycles: the launch, and until the pipeline is full
  constexpr double kEpilogue = 0.14;  // cycles an output of a tile
  GemmChoice choice;
  choice.index = index;
  const int cluster = c.cluster_m * c.cluster_n;
  choice.tiles = divide_up(m, int64_t{c.tile_m} * c.cluster_m) *
                 divide_up(n, int64_t{c.tile_n} * c.cluster_n) * cluster;
  const int64_t usable = std::max(multiprocessors / cluster * cluster, 1);
  choice.rounds = divide_up(choice.tiles, usable);
  const auto rounds = static_cast<double>(choice.rounds);
  const double depth = static_cast<double>(divide_up(k, 128) * 128);
  const double products = double{1} * c.tile_m * c.tile_n * depth / kProducts;
  const auto loaded_rows = static_cast<double>(std::min<int64_t>(c.tile_m, divide_up(m, 8) * 8));
  const double bytes = (loaded_rows / c.cluster_n + double{1} * c.tile_n / c.cluster_m) * depth;
  const double busy = static_cast<double>(std::min(choice.tiles, usable));
  const double loads = bytes / std::min(kBytesAlone, kBytes * multiprocessors / busy);
  const double epilogue = kEpilogue * c.tile_m * c.tile_n;
  choice.cycles =
      kStart + rounds * std::max(products, loads) + (c.hides_epilogue ? 1 : rounds) * epilogue;
  return choice;
}

}  // namespace

std::span<const GemmConfiguration> gemm_configurations() { return kConfigurations; }

std::string GemmChoice::reason() const {
  const GemmConfiguration& c = kConfigurations[index];
  return concat(tiles, " tiles of ", c.tile_m, "x", c.tile_n, ": ", rounds,
                rounds == 1 ? " round" : " rounds", ", about ", static_cast<int64_t>(cycles),
                " cycles");
}

GemmChoice choose_configuration(int64_t m, int64_t n, int64_t k, int multiprocessors) {
  GemmChoice best;
  for (int i = 0; i < static_cast<int>(std::size(kConfigurations)); ++i) {
    GemmChoice choice = estimate(i, m, n, k, multiprocessors);
    if (i == 0 || choice.cycles < best.cycles) best = choice;
  }
  return best;
}

GemmTuningCache::GemmTuningCache(std::filesystem::path file) : file_(std::move(file)) {
  if (file_.empty()) return;
  std::ifstream in(file_);
  std::string line;
  while (fastest_.size() < kMostShapes && std::getline(in, line)) {
    std::istringstream fields(line);
    Shape shape;
    std::string name;
    if (!(fields >> shape[0] >> shape[1] >> shape[2] >> name)) continue;
    const auto found = std::find_if(std::begin(kConfigurations), std::end(kConfigurations),
                                    [&](const GemmConfiguration& c) { return c.name == name; });
    if (found != std::end(kConfigurations))
      fastest_[shape] = static_cast<int>(found - std::begin(kConfigurations));
  }
}

std::optional<int> GemmTuningCache::find(int64_t m, int64_t n, int64_t k) const {
  const std::lock_guard lock(mutex_);
  const auto found = fastest_.find({m, n, k});
  return found == fastest_.end() ? std::nullopt : std::optional(found->second);
}

void GemmTuningCache::store(int64_t m, int64_t n, int64_t k, int configuration) {
  const std::lock_guard lock(mutex_);
  if (fastest_.size() >= kMostShapes) return;
  fastest_[{m, n, k}] = configuration;
  if (!file_.empty()) write();
}

void GemmTuningCache::write() const {
  std::error_code error;
  std::filesystem::create_directories(file_.parent_path(), error);
  const std::filesystem::path beside = file_.string() + "." + std::to_string(::getpid());
  std::ofstream out(beside);
  for (const auto& [shape, configuration] : fastest_)
    out << shape[0] << ' ' << shape[1] << ' ' << shape[2] << ' '
        << kConfigurations[configuration].name << '\n';
  out.close();
  if (out) std::filesystem::rename(beside, file_, error);
  if (!out || error) std::filesystem::remove(beside, error);
}

std::filesystem::path gemm_tuning_file(const std::string& gpu) {
  const auto variable = [](const char* name) -> std::filesystem::path {
    const char* const value = std::getenv(name);
    return value ? value : "";
  };
  std::filesystem::path folder = variable("VERNIER_CACHE_DIR");
  if (folder.empty() && !variable("XDG_CACHE_HOME").empty())
    folder = variable("XDG_CACHE_HOME") / "vernier";
  if (folder.empty() && !variable("HOME").empty()) folder = variable("HOME") / ".cache" / "vernier";
  if (folder.empty()) return {};
  std::string model;
  for (const char c : gpu) model += std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
  return folder / ("int8_gemm-" + model + "-" VERNIER_VERSION ".txt");
}

}  // namespace vernier
