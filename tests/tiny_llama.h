// A random Llama small enough that a test samples from it in milliseconds.
#pragma once

#include <vernier/recipes/models/causal_lm.h>
#include <vernier/recipes/models/llama.h>
#include <vernier/tests/tiny_bert.h>

namespace vernier::testing {

inline constexpr int64_t kLlamaPositions = 48;
inline constexpr int64_t kLlamaStart = 3;
/// q, k, v, o, gate, up, down.
inline constexpr int64_t kLlamaLinearsPerLayer = 7;
inline constexpr int64_t kLlamaLayers = 2;

/// Two layers, hidden size 32, grouped heads.
inline nlohmann::json tiny_llama_config(bool tied) {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"vocab_size", kVocabulary},
          {"hidden_size", 32},
          {"num_hidden_layers", kLlamaLayers},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"intermediate_size", 64},
          {"max_position_embeddings", kLlamaPositions},
          {"bos_token_id", kLlamaStart},
          {"hidden_act", "silu"},
          {"tie_word_embeddings", tied}};
}

/// Writes a Hugging Face folder of random weights.
inline void write_llama(const std::filesystem::path& folder, bool tied = false, uint64_t seed = 1) {
  const nlohmann::json config = tiny_llama_config(tied);
  auto generator = at::detail::createCPUGenerator(seed);
  NamedTensors tensors;
  for (const auto& item : llama_families().front().make(config)->named_parameters()) {
    const at::Tensor values = 0.3 * torch::randn(item.value().sizes(), generator);
    tensors.emplace_back(item.key(), item.value().dim() == 1 ? values + 1 : values);
  }
  write_bert(folder, config, tensors);
}

inline std::shared_ptr<TextModel> load_tiny_llama(const TemporaryFolder& folder, bool tied = false,
                                                  uint64_t seed = 1) {
  const auto path = folder / ("llama" + std::to_string(seed) + (tied ? "-tied" : ""));
  if (!std::filesystem::exists(path)) write_llama(path, tied, seed);
  return load_text_model(path);
}

/// Logits of every token of one sequence, without a cache, float32 [tokens, vocabulary].
inline at::Tensor all_logits(CausalLanguageModel& model, const std::vector<int64_t>& tokens) {
  const torch::NoGradGuard no_grad;
  const TokenBatch batch{torch::tensor(tokens, torch::kLong),
                         {static_cast<int64_t>(tokens.size())}};
  return model.logits(model.forward(batch, nullptr));
}

}  // namespace vernier::testing
