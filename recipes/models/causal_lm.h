// Models that continue text: what every causal family in this folder is, and the cache of what they
// have read.
#pragma once

#include <torch/nn/modules/embedding.h>
#include <vernier/qat/linear.h>
#include <vernier/recipes/models/text_model.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace vernier {

/// How a cache keeps keys and values.
enum class CacheFormat {
  full,  ///< as they are
  int8   ///< eight bits, a scale a token and head: a little more than half of bfloat16's memory
};

std::string to_string(CacheFormat format);
/// full or int8. Throws Error for another name.
CacheFormat cache_format_from_string(const std::string& name);

/// Keys and values of the tokens that sequences of one length have brought so far, so that further
/// tokens cost no more than themselves. CausalLanguageModel::make_cache() makes one.
class KeyValueCache {
 public:
  /// Room for `capacity` tokens of each sequence, as `options` say (dtype and device).
  KeyValueCache(int64_t layers, int64_t sequences, int64_t heads, int64_t capacity,
                int64_t head_size, const torch::TensorOptions& options,
                CacheFormat format = CacheFormat::full);

  int64_t sequences() const { return sequences_; }
  int64_t capacity() const { return capacity_; }
  /// Tokens that each sequence has brought.
  int64_t length() const { return length_; }
  CacheFormat format() const { return format_; }
  /// Memory that it takes, whatever its length().
  int64_t bytes() const;

  /// Puts keys and values of the next tokens, [sequences, heads, tokens, head_size] each, behind
  /// those of a layer and returns all of them, [sequences, heads, length() + tokens, head_size].
  /// Of a cache of codes all come back rounded, the new ones too: what is computed does not depend
  /// on how many tokens come at a time. length() stays: advance() follows once every layer has
  /// brought them. Throws Error when there is no room or a shape does not fit.
  std::pair<torch::Tensor, torch::Tensor> append(int64_t layer, const torch::Tensor& keys,
                                                 const torch::Tensor& values);
  void advance(int64_t tokens) { length_ += tokens; }

  /// Forgets all but the first `length` tokens. Throws Error when there are fewer.
  void truncate(int64_t length);

 private:
  struct Kept {
    torch::Tensor rows;   // [sequences, heads, capacity, head_size]: real values, or int8 codes
    torch::Tensor scale;  // float32 [sequences, heads, capacity]; of codes
  };
  torch::Tensor add(const Kept& kept, const torch::Tensor& added) const;

  int64_t sequences_, capacity_, length_ = 0;
  CacheFormat format_;
  std::vector<Kept> keys_, values_;  // one a layer
};

/// A model whose every token sees itself and those before it, with a distribution over the next.
class CausalLanguageModel : public TextModel {
 public:
  /// Hidden states after the last norm, [total, hidden]: what logits() takes.
  torch::Tensor forward(const TokenBatch& batch) override { return forward(batch, nullptr); }

  /// The same for tokens that follow what the cache holds, and adds them to it; null: no cache.
  /// With a cache the lengths are equal and as many as the cache has sequences, and no gradients
  /// are taken. Throws Error when a sequence is longer than max_length() or the cache is full.
  virtual torch::Tensor forward(const TokenBatch& batch, KeyValueCache* cache) = 0;

  /// Logits of the next token, [rows, vocabulary()], of hidden states [rows, hidden].
  torch::Tensor logits(const torch::Tensor& hidden);

  /// The quantized layer that makes the logits; "" where the embedding does (tied weights).
  const std::string& output_layer() const { return output_name_; }

  /// An empty cache in the model's dtype and on its device. Throws Error when the capacity is more
  /// than max_length().
  std::shared_ptr<KeyValueCache> make_cache(int64_t sequences, int64_t capacity,
                                            CacheFormat format = CacheFormat::full) const;

  /// The token that texts start with: bos_token_id of the configuration, else eos_token_id, else 0.
  int64_t start_token() const;

  int64_t vocabulary() const override { return sizes_.vocabulary; }
  int64_t max_length() const override { return sizes_.positions; }

 protected:
  struct Sizes {
    int64_t vocabulary, positions, layers;
    int64_t key_heads, head_size;  ///< of keys and values
  };
  explicit CausalLanguageModel(const Sizes& sizes) : sizes_(sizes) {}

  /// What makes the logits: the embedding's own table or, with a name, a linear registered under it
  /// that takes what the embedding gives.
  void make_output(const torch::nn::Embedding& embedding, const std::string& linear_name);

 private:
  Sizes sizes_;
  torch::nn::Embedding embedding_{nullptr};
  nn::Linear output_{nullptr};
  std::string output_name_;
};

/// The model as a causal one. Throws Error naming its architecture and `what` needs one ("sampling
/// from the model") when it is none.
CausalLanguageModel& causal(TextModel& model, const std::string& what);

}  // namespace vernier
