// The native checkpoint: one HDF5 file with codes, scales, every other tensor and the configuration
// (docs/file-formats.md).
#pragma once

#include <torch/nn/module.h>
#include <vernier/calibration/hdf5.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace vernier {

/// Shapes of tensors by their names in the model.
using TensorShapes = std::map<std::string, std::vector<int64_t>>;

/// What a checkpoint says of its model besides the tensors.
struct CheckpointInfo {
  std::string architecture;  ///< names the family that rebuilds the module tree
  std::string config;        ///< the family's configuration, JSON
  std::string recipe;        ///< the recipe's name, for people
  std::string fingerprint;   ///< of the float model it was made from
};

/// Writes a calibrated model: int8 codes for the weights of quantized layers, all else as it is.
/// The file appears whole or not at all. Throws Error when a layer is not calibrated or the file
/// cannot be written.
void save_checkpoint(const torch::nn::Module& model, const CheckpointInfo& info,
                     const std::filesystem::path& path);

/// A checkpoint opened for reading.
class Checkpoint {
 public:
  /// Whether the file exists and says that it is one; false also for what cannot be read.
  static bool is_checkpoint(const std::filesystem::path& path);
  /// Throws Error when the file is missing, truncated, no checkpoint or of a newer version.
  static Checkpoint open(const std::filesystem::path& path);

  const CheckpointInfo& info() const { return info_; }
  const hdf5::File& file() const { return file_; }

  /// Shapes of all tensors of the model, those of a quantized layer's codes as its weight's. Throws
  /// Error when a layer has no codes, or a shape is more than the file can hold.
  TensorShapes tensor_shapes() const;

  /// Fills a freshly built model, on the CPU, and leaves its layers calibrated in mode integer.
  /// Throws Error when tensors are missing, left over, or of another shape or dtype, or a scale is
  /// no scale.
  void load_into(torch::nn::Module& model) const;

 private:
  Checkpoint(hdf5::File file, CheckpointInfo info)
      : file_(std::move(file)), info_(std::move(info)) {}

  hdf5::File file_;
  CheckpointInfo info_;
};

}  // namespace vernier
