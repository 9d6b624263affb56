// Caches of keys and values in eight bits: what they keep, and what a model computes with them.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/kernels/error.h>
#include <vernier/recipes/models/causal_lm.h>
#include <vernier/recipes/models/family.h>
#include <vernier/recipes/models/llama.h>
#include <vernier/tests/expect_error.h>
#include <nlohmann/json.hpp>

#include <memory>

namespace vernier {
namespace {

using testing::message_of;
using torch::Tensor;

constexpr int64_t kSequences = 2, kHeads = 3, kCapacity = 12, kSize = 16;

KeyValueCache make_cache(CacheFormat format, torch::Dtype dtype = torch::kFloat) {
  return KeyValueCache(/*layers=*/2, kSequences, kHeads, kCapacity, kSize, torch::dtype(dtype),
                       format);
}

Tensor random_rows(int64_t tokens, torch::Dtype dtype = torch::kFloat) {
  return torch::randn({kSequences, kHeads, tokens, kSize}).to(dtype);
}

TEST(KeyValueCache, EightBitsKeepRowsToHalfAStep) {
  torch::manual_seed(1);
  for (const torch::Dtype dtype : {torch::kFloat, torch::kBFloat16}) {
    KeyValueCache cache = make_cache(CacheFormat::int8, dtype);
    const Tensor keys = random_rows(5, dtype), values = random_rows(5, dtype) * 100;
    const auto [k, v] = cache.append(1, keys, values);
    for (const auto& [kept, given] : {std::pair(k, keys), std::pair(v, values)}) {
      EXPECT_EQ(kept.scalar_type(), dtype);
      const Tensor wide = given.to(torch::kFloat);
      const Tensor step = wide.abs().amax(-1, /*keepdim=*/true) / 127;
      // And the dtype's own rounding.
      const Tensor bound = step * 0.5001 + wide.abs() * (dtype == torch::kFloat ? 1e-6 : 0.004);
      EXPECT_TRUE(((kept.to(torch::kFloat) - wide).abs() <= bound).all().item<bool>());
    }
  }
}

TEST(KeyValueCache, PiecesAreAsGoodAsAll) {
  torch::manual_seed(2);
  for (const CacheFormat format : {CacheFormat::full, CacheFormat::int8}) {
    KeyValueCache whole = make_cache(format), pieces = make_cache(format);
    const Tensor keys = random_rows(9), values = random_rows(9);
    const auto expected = whole.append(0, keys, values);
    pieces.append(0, keys.narrow(2, 0, 6), values.narrow(2, 0, 6));
    pieces.advance(6);
    pieces.truncate(4);
    const auto found = pieces.append(0, keys.narrow(2, 4, 5), values.narrow(2, 4, 5));
    EXPECT_TRUE(torch::equal(expected.first, found.first));
    EXPECT_TRUE(torch::equal(expected.second, found.second));
  }
}

TEST(KeyValueCache, MemoryNamesAndErrors) {
  EXPECT_EQ(make_cache(CacheFormat::full, torch::kHalf).bytes(),
            2 * 2 * kSequences * kHeads * kCapacity * kSize * 2);
  EXPECT_EQ(make_cache(CacheFormat::int8, torch::kHalf).bytes(),
            2 * 2 * kSequences * kHeads * kCapacity * (kSize + 4));
  for (const CacheFormat format : {CacheFormat::full, CacheFormat::int8}) {
    EXPECT_EQ(cache_format_from_string(to_string(format)), format);
    KeyValueCache cache = make_cache(format);
    EXPECT_CONTAINS(message_of([&] { cache.append(0, random_rows(13), random_rows(13)); }),
                    "room for 12 tokens, not for 13");
    EXPECT_CONTAINS(message_of([&] { cache.append(0, random_rows(3), random_rows(2)); }),
                    "not of the same tokens");
    const Tensor other = torch::randn({kSequences, kHeads, 3, kSize + 1});
    EXPECT_CONTAINS(message_of([&] { cache.append(0, other, other); }), "do not fit a cache");
  }
  EXPECT_CONTAINS(message_of([] { cache_format_from_string("int4"); }), "use full or int8");
}

TEST(KeyValueCache, ModelsComputeNearlyTheSame) {
  torch::manual_seed(3);
  const nlohmann::json config = {{"hidden_size", 64},
                                 {"intermediate_size", 96},
                                 {"num_hidden_layers", 2},
                                 {"num_attention_heads", 4},
                                 {"num_key_value_heads", 2},
                                 {"vocab_size", 50},
                                 {"max_position_embeddings", 64},
                                 {"tie_word_embeddings", true}};
  const auto model =
      std::dynamic_pointer_cast<CausalLanguageModel>(llama_families().front().make(config));
  model->eval();
  const torch::NoGradGuard no_grad;
  const TokenBatch all{torch::randint(50, {2 * 20}), {20, 20}};
  const Tensor exact = model->forward(all);
  const auto in_pieces = [&](CacheFormat format) {
    const auto cache = model->make_cache(2, 20, format);
    std::vector<Tensor> hidden;
    for (const auto& [first, count] : {std::pair(0, 13), std::pair(13, 6), std::pair(19, 1)}) {
      const TokenBatch part{all.tokens.view({2, 20}).narrow(1, first, count).reshape(-1),
                            {count, count}};
      hidden.push_back(model->forward(part, cache.get()).view({2, count, -1}));
    }
    return torch::cat(hidden, 1).view_as(exact);
  };
  const auto apart = [&](const Tensor& hidden) {
    return ((hidden - exact).norm() / exact.norm()).item<double>();
  };
  EXPECT_LT(apart(in_pieces(CacheFormat::full)), 1e-5);
  // Eight bits: half a step of 1 / 127 each, of which attention averages most away.
  const double rounded = apart(in_pieces(CacheFormat::int8));
  EXPECT_LT(rounded, 0.01);
  EXPECT_GT(rounded, 1e-5);
}

}  // namespace
}  // namespace vernier
