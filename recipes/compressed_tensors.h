// Quantized models as compressed-tensors folders: what vLLM and transformers load
// (docs/file-formats.md).
#pragma once

#include <vernier/recipes/models/text_model.h>

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace vernier {

/// What save_compressed_tensors() did.
struct CompressedTensorsReport {
  int64_t layers = 0;  ///< quantized
  /// Layers whose input got one range with that of others that read the same activation: runtimes
  /// compute those as one layer (q, k and v; gate and up) and keep one range for them.
  std::vector<std::string> joined;
};

/// Writes a calibrated model of linear layers as a compressed-tensors folder: W8A8 in format
/// `int-quantized`, FP8 (e4m3) in `float-quantized`, inputs static per tensor or dynamic per token.
/// Configuration, other tensors and files as model_folder() and write_model_folder() have them;
/// `dtype` is that of the tensors that are not quantized. Scales stay float32.
/// Throws Error, naming the layer, for what the format or those who load it have no place for:
/// other widths, e5m2, layers that are not linear or are stored transposed, inputs that another
/// layer has quantized, smoothing inside the input's quantizer, layers of one activation that are
/// quantized in different ways; and as those two.
CompressedTensorsReport save_compressed_tensors(TextModel& model,
                                                const std::filesystem::path& source,
                                                const std::filesystem::path& out,
                                                std::optional<torch::Dtype> dtype = std::nullopt);

}  // namespace vernier
