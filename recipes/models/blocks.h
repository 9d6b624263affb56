// What families are built of: sequences, norms, rotary embeddings, attention, activations, and the
// smoothing groups of all that.
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/normalization.h>
#include <vernier/kernels/activation.h>
#include <vernier/qat/linear_group.h>
#include <vernier/recipes/models/causal_lm.h>
#include <vernier/recipes/models/config.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace vernier {

// ---- Configurations -----------------------------------------------------------------------------

/// Throws Error, naming the field, when a configuration asks for what no family here implements.
void require_plain_decoder(const ConfigReader& config);

// ---- Sequences ----------------------------------------------------------------------------------

/// Where the tokens of a batch stand, made once a forward and used by every layer.
struct Sequences {
  /// Of a batch that follows what a cache holds (may be null). Throws Error when a sequence becomes
  /// longer than `positions`, or the batch does not fit the cache.
  Sequences(const TokenBatch& batch, int64_t positions, KeyValueCache* used_cache = nullptr);

  /// Rows of a table [positions, width], one for each token: [total, width] or, where the lengths
  /// are equal, [longest, width] that all sequences share.
  torch::Tensor rows_of(const torch::Tensor& table) const;

  /// x [total, width] plus rows_of(table).
  torch::Tensor add_rows(const torch::Tensor& x, const torch::Tensor& table) const;

  int64_t count, longest, past;  ///< sequences, the longest one's new tokens, tokens in the cache
  bool equal;                    ///< whether the lengths are
  /// int64 [total], of lengths that are not equal: the position of each token in its sequence, and
  /// its row where sequences lie in rows of the longest.
  torch::Tensor position, place;
  KeyValueCache* cache;
};

// ---- Embeddings ---------------------------------------------------------------------------------

/// A table of embeddings; its parameter, too, is uninitialized where nn::Uninitialized says so.
torch::nn::Embedding embedding(int64_t rows, int64_t size);

// ---- Norms --------------------------------------------------------------------------------------

/// x / sqrt(mean(x^2) + epsilon) * weight over the last axis, computed in float32 (Zhang and
/// Sennrich 2019, arXiv 1910.07467).
class RMSNormImpl : public torch::nn::Module {
 public:
  RMSNormImpl(int64_t size, double norm_epsilon);
  torch::Tensor forward(const torch::Tensor& x) { return normalize(x, norm()); }
  /// The same for a group of layers that read it.
  Norm norm() const { return {weight, {}, epsilon, /*centered=*/false}; }

  torch::Tensor weight;
  double epsilon;
};
TORCH_MODULE(RMSNorm);

Norm norm_of(const torch::nn::LayerNorm& layer_norm);

/// A residual stream between two layers, and what the next norm is still to add to it: in mode
/// integer it does so in the same pass.
struct Stream {
  torch::Tensor x;
  torch::Tensor added;  ///< undefined: nothing

  torch::Tensor sum() const { return added.defined() ? x + added : x; }
};

// ---- Rotary embeddings --------------------------------------------------------------------------

/// How frequencies are stretched beyond the positions a model was first trained with.
struct RotaryScaling {
  enum class Kind { none, linear, llama3 } kind = Kind::none;
  double factor = 1;
  /// llama3: wavelengths up to original / high_frequency stay, from original / low_frequency they
  /// are stretched by the factor, between the two in part.
  double low_frequency = 1, high_frequency = 4;
  int64_t original_positions = 0;
};

struct RotarySettings {
  double theta = 10000;
  int64_t size = 0;  ///< of each head's leading dimensions that are rotated, even
  RotaryScaling scaling;

  nlohmann::json json() const;
};

/// Reads rope_theta and rope_scaling, or rope_parameters, which newer configurations have in their
/// place. `head_size` times partial_rotary_factor is rotated; `theta_field` and `factor_field` are
/// the family's older names. Throws Error for kinds that are not implemented.
RotarySettings read_rotary(const ConfigReader& config, int64_t head_size,
                           const char* theta_field = "rope_theta",
                           const char* factor_field = "partial_rotary_factor",
                           double default_factor = 1);

/// Rotates pairs of dimensions (i, i + size / 2) of queries and keys by angles that grow with the
/// position (Su et al. 2021, arXiv 2104.09864). Tables are made once a device; safe to call from
/// several threads.
class Rotary {
 public:
  Rotary(const RotarySettings& settings, int64_t positions)
      : settings_(settings), positions_(positions) {}

  /// Cosines and sines for the tokens of a batch, to be used with every layer: float32 [total, size
  /// / 2] or, where the lengths are equal, [longest, size / 2] that all sequences share.
  struct Angles {
    torch::Tensor cosine, sine;
  };
  Angles angles(const Sequences& sequences, torch::Device device);

  /// x [total, heads, head_size] with its first `size` dimensions rotated.
  static torch::Tensor rotate(const torch::Tensor& x, const Angles& angles);

 private:
  Angles tables(torch::Device device, int64_t positions);

  RotarySettings settings_;
  int64_t positions_;
  std::mutex mutex_;
  std::vector<Angles> tables_;
};

// ---- Attention ----------------------------------------------------------------------------------

/// Heads of queries, and of keys and values, each of which serves heads / kv_heads of the queries
/// (Ainslie et al. 2023, arXiv 2305.13245).
struct Heads {
  int64_t queries, keys, size;

  /// For smoothing: the channel of the values that each channel of the mixed result is made of.
  std::vector<int64_t> source() const;
};

/// Attention over packed sequences: query [total, heads.queries, heads.size], key and value [total,
/// heads.keys, heads.size] to [total, heads.queries * heads.size]. Every token sees all of its own
/// sequence or, `causal`, itself and those before it, the cache's too, to which `layer`'s keys and
/// values are added.
torch::Tensor attention(const torch::Tensor& query, const torch::Tensor& key,
                        const torch::Tensor& value, const Heads& heads, const Sequences& sequences,
                        bool causal, int64_t layer = 0);

/// Heads that keys and values have as many of as queries, by the fields of their number and of
/// `hidden`. Throws Error where the one is no multiple of the other.
Heads read_heads(const ConfigReader& config, int64_t hidden, const char* hidden_field,
                 const char* heads_field);

// ---- Linears, norms and activations -------------------------------------------------------------

nn::Linear make_linear(int64_t in, int64_t out, bool bias = true);
torch::nn::LayerNorm make_layer_norm(int64_t size, double epsilon = 1e-5);

/// The activation function that a configuration names. Throws Error, naming the field, for one that
/// is not implemented.
Activation read_activation(const ConfigReader& config, const char* field, const char* otherwise);

/// Two linears with an activation between them, under the names that a family gives them.
struct PlainMlp : torch::nn::Module {
  PlainMlp(int64_t hidden, int64_t intermediate, Activation activation, const char* first_name,
           const char* second_name);

  /// Of what `input` gives.
  torch::Tensor forward(const std::vector<torch::Tensor>& fed) {
    return output.of_activation(fed[0], activation)[0];
  }

  Activation activation;
  nn::Linear first{nullptr}, second{nullptr};
  LinearGroup input, output;
};

// ---- Smoothing groups ---------------------------------------------------------------------------

/// The group of a norm and the layers that read it.
SmoothingGroup norm_group(const std::string& name, const std::shared_ptr<torch::nn::Module>& norm,
                          const std::vector<std::string>& readers);

/// The group of a linear, rows [first, first + channels) of it or all (channels < 0), and the layer
/// that reads them.
SmoothingGroup linear_group(const std::string& name, const nn::Linear& linear,
                            const std::string& reader, std::vector<int64_t> source = {},
                            int64_t first = 0, int64_t channels = -1);

/// The group of a linear and the layer that reads it through an activation function: foldable where
/// that lets positive factors through.
SmoothingGroup activation_group(const std::string& name, const nn::Linear& linear,
                                Activation activation, const std::string& reader);

/// The group of layers whose activation no factor can be folded into.
SmoothingGroup free_group(const std::vector<std::string>& readers);

}  // namespace vernier
