// Models that read tokens: what every family in this folder is, and how one is loaded.
#pragma once

#include <torch/nn/module.h>
#include <torch/types.h>
#include <vernier/export/checkpoint.h>
#include <vernier/smoothquant/groups.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

namespace vernier {

/// Sequences laid end to end, without padding: what a model computes is only ever what the data
/// holds.
struct TokenBatch {
  torch::Tensor tokens;          ///< int64 [total]
  std::vector<int64_t> lengths;  ///< of each sequence, at least 1; they sum to total

  int64_t size() const { return static_cast<int64_t>(lengths.size()); }
  int64_t longest() const;
  bool equal_lengths() const;
};

/// A family's module tree. Layers are named as in the Hugging Face checkpoint.
class TextModel : public torch::nn::Module {
 public:
  /// Hidden states after the last layer, [total, hidden] in the order of batch.tokens.
  virtual torch::Tensor forward(const TokenBatch& batch) = 0;
  virtual int64_t vocabulary() const = 0;
  /// The longest sequence it takes.
  virtual int64_t max_length() const = 0;
  /// What of the configuration changes the result but shows in no parameter, in one form whatever
  /// the configuration's own: part of the fingerprint.
  virtual std::string settings() const = 0;

  /// A parameter's value as a Hugging Face folder lays it out, under the same name, and back: the
  /// same tensor unless the family says otherwise. Of a linear's weight or bias, or anything else
  /// in its shape.
  virtual torch::Tensor to_stored(const std::string& /*name*/, const torch::Tensor& value) const {
    return value;
  }
  virtual torch::Tensor from_stored(const std::string& /*name*/, const torch::Tensor& value) const {
    return value;
  }

  /// Where per-channel factors can go: every quantized layer is a reader in one group at most.
  /// Valid while the model lives.
  virtual std::vector<SmoothingGroup> smoothing_groups() = 0;

  CheckpointInfo info;  ///< architecture, configuration, fingerprint
};

/// Mean of each sequence's hidden states: [sequences, hidden], float32.
torch::Tensor mean_pooling(const torch::Tensor& hidden, const TokenBatch& batch);

/// Loads a Hugging Face folder (config.json, safetensors; in full precision, float32) or a vernier
/// checkpoint (in mode integer). Throws Error when files are missing or damaged, the architecture
/// is not known (names the known ones), a configuration field is not implemented or contradicts the
/// tensors' shapes (before memory is taken for them), tensors are missing, left over, of the wrong
/// shape, or hold NaN or Inf.
std::shared_ptr<TextModel> load_text_model(const std::filesystem::path& path);

/// Hash of the settings and of names, shapes and bytes of all parameters: the same model has the
/// same fingerprint wherever it is loaded.
std::string fingerprint_of(const TextModel& model);

}  // namespace vernier
