// A random BERT small enough that a test calibrates it in milliseconds, and token data for it.
#pragma once

#include <torch/torch.h>
#include <vernier/calibration/hdf5.h>
#include <vernier/export/safetensors.h>
#include <vernier/recipes/models/bert.h>
#include <vernier/tests/temporary_folder.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace vernier::testing {

// ---- Models -------------------------------------------------------------------------------------

inline constexpr int64_t kVocabulary = 50;
inline constexpr int64_t kPositions = 16;
/// query, key, value, two outputs and an intermediate.
inline constexpr int64_t kLinearsPerLayer = 6;

/// One layer, hidden size 16.
inline nlohmann::json tiny_config() {
  return {{"architectures", {"BertModel"}},
          {"vocab_size", kVocabulary},
          {"hidden_size", 16},
          {"num_hidden_layers", 1},
          {"num_attention_heads", 2},
          {"intermediate_size", 32},
          {"max_position_embeddings", kPositions},
          {"hidden_act", "gelu"}};
}

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

/// Random values for every parameter of a configuration, far enough from zero that all matter.
inline NamedTensors random_tensors(const nlohmann::json& config, uint64_t seed = 1) {
  auto generator = at::detail::createCPUGenerator(seed);
  NamedTensors tensors;
  for (const auto& item : make_bert(config)->named_parameters()) {
    const at::Tensor values = 0.3 * torch::randn(item.value().sizes(), generator);
    const bool gain = item.key().ends_with("LayerNorm.weight");
    tensors.emplace_back(item.key(), gain ? values + 1 : values);
  }
  return tensors;
}

/// The tensor of that name, to be replaced or changed.
inline at::Tensor& tensor_of(NamedTensors& tensors, const std::string& name) {
  const auto found = std::find_if(tensors.begin(), tensors.end(),
                                  [&](const auto& item) { return item.first == name; });
  if (found == tensors.end()) throw std::logic_error("no tensor " + name);
  return found->second;
}

/// Writes a Hugging Face folder.
inline void write_bert(const std::filesystem::path& folder, const nlohmann::json& config,
                       const NamedTensors& tensors) {
  std::filesystem::create_directories(folder);
  write_bytes(folder / "config.json", config.dump());
  write_safetensors(folder / "model.safetensors", tensors);
}

inline void write_bert(const std::filesystem::path& folder, uint64_t seed = 1) {
  write_bert(folder, tiny_config(), random_tensors(tiny_config(), seed));
}

// ---- Token data ---------------------------------------------------------------------------------

using Rows = std::vector<std::vector<int64_t>>;

/// Rows of `shortest` to `longest` random tokens.
inline Rows random_rows(int64_t count, uint64_t seed = 1, int64_t shortest = 1,
                        int64_t longest = kPositions, int64_t vocabulary = kVocabulary) {
  std::mt19937_64 random(seed);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
  Rows rows(count);
  for (auto& row : rows) {
    row.resize(shortest + below(longest - shortest + 1));
    for (int64_t& id : row) id = below(vocabulary);
  }
  return rows;
}

/// Adds input_ids and attention_mask, padded to the longest row, under a prefix: "", "a/" or "b/".
inline void add_tokens(hdf5::File& file, const Rows& rows, const std::string& prefix = "") {
  size_t width = 0;
  for (const auto& row : rows) width = std::max(width, row.size());
  std::vector<int32_t> ids;
  std::vector<int8_t> mask;
  for (const auto& row : rows) {
    ids.insert(ids.end(), row.begin(), row.end());
    mask.insert(mask.end(), row.size(), 1);
    ids.resize(ids.size() + width - row.size(), 0);
    mask.resize(ids.size(), 0);
  }
  const std::vector<int64_t> shape = {static_cast<int64_t>(rows.size()),
                                      static_cast<int64_t>(width)};
  file.write(prefix + "input_ids", ids, shape);
  file.write(prefix + "attention_mask", mask, shape);
}

/// An HDF5 file of what `fill` writes into it.
inline void write_hdf5(const std::filesystem::path& path,
                       const std::function<void(hdf5::File&)>& fill) {
  hdf5::File file = hdf5::File::create(path);
  fill(file);
  file.close();
}

inline void write_tokens(const std::filesystem::path& path, const Rows& rows) {
  write_hdf5(path, [&](hdf5::File& file) { add_tokens(file, rows); });
}

/// Pairs of random sequences with random scores.
inline void write_pairs(const std::filesystem::path& path, int64_t count, uint64_t seed = 1) {
  std::mt19937_64 random(seed);
  std::vector<float> scores(count);
  for (float& score : scores) score = static_cast<float>(random() % 1000) / 200;
  write_hdf5(path, [&](hdf5::File& file) {
    add_tokens(file, random_rows(count, 2 * seed), "a/");
    add_tokens(file, random_rows(count, 2 * seed + 1), "b/");
    file.write("score", scores, {count});
  });
}

}  // namespace vernier::testing
