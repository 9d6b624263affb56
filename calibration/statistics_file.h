// The statistics of a whole model and their HDF5 file (docs/file-formats.md).
#pragma once

#include <vernier/calibration/observer.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace vernier {

/// Samples [first, first + count) of one data file.
struct SampleRange {
  std::string data;  ///< the data file's fingerprint; "" where it is not known
  int64_t first = 0;
  int64_t count = 0;

  bool operator==(const SampleRange&) const = default;
};

/// What one or several calibration runs saw. Everything a calibrator needs; the data is not needed
/// again.
struct ModelStatistics {
  std::string fingerprint;   ///< of the float model: statistics of another one are refused
  std::string data;          ///< fingerprint of the data file; "" after merging different ones
  int64_t samples = 0;       ///< samples seen
  int64_t first_sample = 0;  ///< the first row of the data that belongs to this run
  int64_t planned = 0;       ///< samples the run was to see; samples < planned: it was interrupted
  std::map<std::string, SiteStatistics> sites;  ///< by layer: the values that enter it
  /// After merging what is not one range of one data file: all that was seen, in order, ranges that
  /// touch made one. Else empty.
  std::vector<SampleRange> merged{};

  /// What was seen: `merged`, or the one range that the fields above say.
  std::vector<SampleRange> ranges() const;

  /// Adds another run over the same model. Throws Error when fingerprints, layers or channels
  /// differ, either run is not complete, or both saw the same samples of the same data.
  void merge(const ModelStatistics& other);
};

/// Writes the file whole or not at all. Throws Error when it cannot be written.
void save_statistics(const ModelStatistics& statistics, const std::filesystem::path& path);

/// Throws Error when the file is missing, truncated, not a statistics file, of a newer version or
/// contradicts itself.
ModelStatistics load_statistics(const std::filesystem::path& path);

}  // namespace vernier
