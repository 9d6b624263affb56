// Tiny random models of every causal family, and what transformers computes with them
// (tools/make_family_fixtures.py).
#pragma once

#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/export/safetensors.h>
#include <vernier/recipes/models/causal_lm.h>

#include <filesystem>
#include <memory>
#include <string>

namespace vernier::testing {

inline constexpr const char* kFamilies[] = {
    "llama3", "llama-sharded", "mistral",  "qwen2",           "qwen3",
    "opt",    "opt-post-norm", "gpt-neox", "gpt-neox-serial", "gpt2"};

inline std::filesystem::path family_fixture(const std::string& name) {
  return std::filesystem::path(VERNIER_SOURCE_DIR) / "tests/fixtures/families" / name;
}

/// A fixture's model and what transformers computed with it.
struct Expected {
  explicit Expected(const std::string& name)
      : model(
            std::dynamic_pointer_cast<CausalLanguageModel>(load_text_model(family_fixture(name)))) {
    const SafetensorsFile file =
        SafetensorsFile::open(family_fixture(name) / "expected.safetensors");
    logits = file.tensor("logits");
    batch.tokens = file.tensor("input_ids");
    const torch::Tensor lengths = file.tensor("lengths");
    batch.lengths.assign(lengths.const_data_ptr<int64_t>(),
                         lengths.const_data_ptr<int64_t>() + lengths.numel());
  }

  /// Tokens [first, first + length) as a batch of one sequence.
  TokenBatch part(int64_t first, int64_t length) const {
    return {batch.tokens.narrow(0, first, length), {length}};
  }

  std::shared_ptr<CausalLanguageModel> model;
  TokenBatch batch;
  torch::Tensor logits;
};

inline torch::Tensor logits_of(CausalLanguageModel& model, const TokenBatch& batch,
                               KeyValueCache* cache = nullptr) {
  return model.logits(model.forward(batch, cache));
}

/// The largest difference by the largest value.
inline double relative_error(const torch::Tensor& actual, const torch::Tensor& expected) {
  EXPECT_EQ(actual.sizes(), expected.sizes());
  return ((actual - expected).abs().max() / expected.abs().max()).item<double>();
}

}  // namespace vernier::testing
