// Hugging Face folders that are written: the inverse of loading one.
#pragma once

#include <vernier/export/safetensors.h>
#include <vernier/recipes/models/text_model.h>
#include <nlohmann/json.hpp>

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace vernier {

/// float32, float16 or bfloat16.
std::string dtype_name(torch::Dtype dtype);
/// Throws Error for another name.
torch::Dtype dtype_from_name(const std::string& name);

/// A tensor of a folder and the parameter that it comes from.
struct StoredTensor {
  TensorToWrite tensor;
  std::string parameter;  ///< "" where the model has no use for it: copied
};

/// What a folder of a model holds, before it is written.
struct ModelFolder {
  nlohmann::ordered_json config;
  torch::Dtype dtype;  ///< of floating-point tensors
  std::vector<StoredTensor> tensors;
};

/// The folder of a model: the configuration and all tensors of the folder `source` that it was
/// loaded from, under their names, with the model's parameters in place of the old values. An empty
/// `source`: those of the model alone. `dtype` in place of the configuration's (of the first
/// floating-point tensor's, then float32, where it says none). Tensors are made when they are
/// written; the model has to live until then. Throws Error when the source lacks a tensor of the
/// model or has it in another shape; and while writing, naming the tensor, when a value overflows
/// the dtype.
ModelFolder model_folder(const TextModel& model, const std::filesystem::path& source,
                         std::optional<torch::Dtype> dtype = std::nullopt);

/// Writes a folder that appears whole or not at all: config.json, safetensors (sharded at 5 GB,
/// with an index) and what goes along with the source's weights: tokenizer and its vocabulary,
/// generation settings, chat templates, licences, sentence-transformers' modules. Never its weights
/// in any format. Throws Error when `out` exists and is not an empty folder.
void write_model_folder(const ModelFolder& folder, const std::filesystem::path& source,
                        const std::filesystem::path& out);

/// Writes the model in floating point, as transformers loads it: model_folder(), written.
void save_hugging_face(const TextModel& model, const std::filesystem::path& source,
                       const std::filesystem::path& out,
                       std::optional<torch::Dtype> dtype = std::nullopt);

}  // namespace vernier
