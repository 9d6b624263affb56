// Causal families on tiny random models against the logits of transformers
// (tools/make_family_fixtures.py), and what all of them have in common.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/recipes/recipe.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/family_fixtures.h>
#include <vernier/tests/temporary_folder.h>
#include <nlohmann/json.hpp>

#include <functional>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace vernier {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using testing::Expected;
using testing::family_fixture;
using testing::kFamilies;
using testing::logits_of;
using testing::message_of;
using testing::read_bytes;
using testing::relative_error;
using testing::TemporaryFolder;
using testing::write_bytes;
using torch::Tensor;

class FamiliesTest : public ::testing::TestWithParam<const char*> {
 protected:
  torch::NoGradGuard no_grad_;
  Expected expected_{GetParam()};
  CausalLanguageModel& model_ = *expected_.model;
};

INSTANTIATE_TEST_SUITE_P(Fixtures, FamiliesTest, ::testing::ValuesIn(kFamilies),
                         [](const auto& case_info) {
                           std::string name = case_info.param;
                           std::erase(name, '-');
                           return name;
                         });

TEST_P(FamiliesTest, LogitsEqualThoseOfTransformers) {
  EXPECT_LT(relative_error(logits_of(model_, expected_.batch), expected_.logits), 1e-5);
  EXPECT_EQ(model_.vocabulary(), expected_.logits.size(1));
  EXPECT_EQ(model_.max_length(), 32);
  EXPECT_EQ(model_.start_token(), 1);
}

TEST_P(FamiliesTest, PackedSequencesAreEachByItself) {
  const Tensor packed = logits_of(model_, expected_.batch);
  int64_t first = 0;
  for (const int64_t length : expected_.batch.lengths) {
    EXPECT_LT(relative_error(logits_of(model_, expected_.part(first, length)),
                             packed.narrow(0, first, length)),
              1e-5);
    first += length;
  }
  // Two of one length, which go another way.
  const Tensor tokens = expected_.batch.tokens;
  const Tensor first_nine = tokens.narrow(0, 0, 9), last_nine = tokens.narrow(0, first - 9, 9);
  const Tensor both = logits_of(model_, {torch::cat({first_nine, last_nine}), {9, 9}});
  EXPECT_LT(
      relative_error(both, torch::cat({packed.narrow(0, 0, 9), packed.narrow(0, first - 9, 9)})),
      1e-5);
}

TEST_P(FamiliesTest, CachesChangeNothing) {
  // Two sequences of 12: the beginning at once, tokens one by one, the rest at once.
  const Tensor tokens = expected_.batch.tokens.narrow(0, 10, 24).view({2, 12});
  const auto part = [&](int64_t first, int64_t length) {
    return TokenBatch{tokens.narrow(1, first, length).reshape({-1}), {length, length}};
  };
  const Tensor whole = logits_of(model_, part(0, 12)).view({2, 12, -1});
  const auto cache = model_.make_cache(2, 12);
  const auto expect_next = [&](int64_t first, int64_t length) {
    EXPECT_EQ(cache->length(), first);
    const Tensor next = logits_of(model_, part(first, length), cache.get());
    EXPECT_LT(relative_error(next.view({2, length, -1}), whole.narrow(1, first, length)), 1e-5)
        << first;
  };
  expect_next(0, 5);
  for (int64_t i = 5; i < 8; ++i) expect_next(i, 1);
  expect_next(8, 4);
  cache->truncate(6);
  expect_next(6, 1);

  EXPECT_CONTAINS(message_of([&] { model_.forward(part(0, 6), cache.get()); }),
                  "the cache has room for 12 tokens, not for 13");
  EXPECT_CONTAINS(message_of([&] { model_.forward(expected_.part(0, 1), cache.get()); }),
                  "a cache of 2 sequences takes as many");
  EXPECT_CONTAINS(message_of([&] { model_.make_cache(1, 33); }), "the model's 32 positions");
  EXPECT_CONTAINS(message_of([&] { cache->truncate(8); }), "the cache holds 7 tokens, not 8");
}

TEST_P(FamiliesTest, SequencesStayWithinThePositions) {
  TokenBatch batch{torch::zeros({32}, torch::kLong), {32}};
  EXPECT_EQ(model_.forward(batch).size(0), 32);
  batch = {torch::zeros({34}, torch::kLong), {1, 33}};
  EXPECT_CONTAINS(message_of([&] { model_.forward(batch); }),
                  "a sequence of 33 tokens is longer than the model's 32 positions");
}

TEST_P(FamiliesTest, HalfPrecisionRuns) {
  const Tensor full = logits_of(model_, expected_.batch);
  for (const auto dtype : {torch::kBFloat16, torch::kHalf}) {
    model_.to(dtype);
    const Tensor half = logits_of(model_, expected_.batch);
    EXPECT_EQ(half.scalar_type(), dtype);
    const double error = ((half.to(torch::kFloat) - full).norm() / full.norm()).item<double>();
    EXPECT_LT(error, dtype == torch::kHalf ? 0.02 : 0.1);
    EXPECT_EQ(model_.make_cache(1, 4)->sequences(), 1);
    EXPECT_LT(relative_error(logits_of(model_, expected_.part(0, 9), model_.make_cache(1, 9).get()),
                             half.narrow(0, 0, 9)),
              0.05);
  }
}

TEST_P(FamiliesTest, EveryParameterGetsAGradient) {
  const torch::AutoGradMode with_gradients(true);
  logits_of(model_, expected_.batch).square().mean().backward();
  for (const auto& item : model_.named_parameters()) {
    if (!item.value().requires_grad()) continue;
    ASSERT_TRUE(item.value().grad().defined()) << item.key();
    EXPECT_TRUE(item.value().grad().isfinite().all().item<bool>()) << item.key();
  }
}

TEST_P(FamiliesTest, StoredFormsAreThoseOfTheFolder) {
  const SafetensorsFolder folder = SafetensorsFolder::open(family_fixture(GetParam()));
  const std::string prefix = "transformer.";  // which GPT-2's first folders lack
  for (const auto& item : model_.named_parameters()) {
    const std::string name =
        folder.contains(item.key()) ? item.key() : item.key().substr(prefix.size());
    const Tensor stored = model_.to_stored(item.key(), item.value());
    EXPECT_TRUE(torch::equal(stored, folder.tensor(name).to(torch::kFloat))) << name;
    EXPECT_TRUE(torch::equal(model_.from_stored(item.key(), stored), item.value())) << name;
  }
}

TEST_P(FamiliesTest, CheckpointsComputeTheSame) {
  const TemporaryFolder folder;
  apply_recipe(model_, load_recipe("w8a8-dynamic"));
  calibrate_layers(model_, {});
  save_checkpoint(model_, model_.info, folder / "model.h5");
  const auto loaded = load_text_model(folder / "model.h5");
  set_mode(model_, Mode::integer);
  EXPECT_TRUE(torch::equal(logits_of(causal(*loaded, "the test"), expected_.batch),
                           logits_of(model_, expected_.batch)));
}

TEST_P(FamiliesTest, SmoothingGroupsCoverTheLayers) {
  std::map<std::string, int64_t> widths;  // of the layers' inputs
  for (const auto& [name, layer] : quantized_layers(model_))
    if (name != model_.output_layer() && name.find(".project_") == std::string::npos)
      widths[name] = layer->float_weight().size(1);
  std::set<std::string> seen;
  for (const SmoothingGroup& group : model_.smoothing_groups()) {
    SCOPED_TRACE(group.name);
    ASSERT_FALSE(group.readers.empty());
    EXPECT_EQ(group.name, group.readers.front());
    for (const std::string& reader : group.readers) {
      EXPECT_TRUE(seen.insert(reader).second) << reader;
      ASSERT_TRUE(widths.count(reader)) << reader;
      EXPECT_EQ(widths[reader], widths[group.name]);
    }
    if (!group.producer) continue;
    const int64_t channels = group.producer->tensors().front().size(0);
    for (const Tensor& tensor : group.producer->tensors()) EXPECT_EQ(tensor.size(0), channels);
    if (group.source.empty()) {
      EXPECT_EQ(channels, widths[group.name]);
    } else {
      EXPECT_EQ(static_cast<int64_t>(group.source.size()), widths[group.name]);
      // Every channel is read, and as often as any other.
      std::map<int64_t, int64_t> uses;
      for (const int64_t channel : group.source) ++uses[channel];
      EXPECT_EQ(static_cast<int64_t>(uses.size()), channels);
      EXPECT_EQ(uses.rbegin()->first, channels - 1);
      for (const auto& [channel, count] : uses) EXPECT_EQ(count, widths[group.name] / channels);
    }
  }
  EXPECT_EQ(seen.size(), widths.size());
}

TEST_P(FamiliesTest, FactorsPassFromProducersToReaders) {
  torch::manual_seed(3);
  const Tensor before = logits_of(model_, expected_.batch);
  std::map<std::string, std::shared_ptr<QuantizedLayer>> layers;
  for (const auto& [name, layer] : quantized_layers(model_)) layers[name] = layer;
  int64_t folded = 0;
  for (const SmoothingGroup& group : model_.smoothing_groups()) {
    if (!group.producer) continue;
    const std::vector<Tensor> tensors = group.producer->tensors();
    const Tensor factors = torch::rand({tensors.front().size(0)}) * 3 + 0.5;
    for (Tensor tensor : tensors) tensor.div_(tensor.dim() == 2 ? factors.unsqueeze(1) : factors);
    const Tensor of_reader =
        group.source.empty() ? factors
                             : factors.index_select(0, torch::tensor(group.source, torch::kLong));
    for (const std::string& reader : group.readers)
      layers.at(reader)->float_weight().mul_(of_reader);
    ++folded;
  }
  EXPECT_GE(folded, 4);
  EXPECT_LT(relative_error(logits_of(model_, expected_.batch), before), 1e-5);
}

// ---- What is refused ----------------------------------------------------------------------------

class FamilyErrorsTest : public ::testing::Test {
 protected:
  /// Loads a copy of a fixture whose configuration and tensors were changed; the message, without
  /// the path.
  std::string refused(const std::string& name, const std::function<void(Json&)>& edit,
                      const std::function<void(std::map<std::string, Tensor>&)>& change = {}) {
    const fs::path copy = folder_ / "copy";
    fs::remove_all(copy);
    fs::create_directories(copy);
    Json config = Json::parse(read_bytes(family_fixture(name) / "config.json"));
    edit(config);
    write_bytes(copy / "config.json", config.dump());
    const SafetensorsFolder stored = SafetensorsFolder::open(family_fixture(name));
    std::map<std::string, Tensor> tensors;
    for (const std::string& tensor : stored.names()) tensors[tensor] = stored.tensor(tensor);
    if (change) change(tensors);
    write_safetensors(copy / "model.safetensors", {tensors.begin(), tensors.end()});
    const std::string message = message_of([&] { load_text_model(copy); });
    EXPECT_TRUE(message.empty() || testing::contains(message, copy.string())) << message;
    return message;
  }

  TemporaryFolder folder_;
};

std::function<void(Json&)> field(const std::string& name, const Json& value) {
  return [=](Json& config) { config[name] = value; };
}

const auto kAsItIs = [](Json&) {};

TEST_F(FamilyErrorsTest, FieldsThatAreNotImplementedAreNamed) {
  EXPECT_EQ(refused("llama3", kAsItIs), "");
  const auto rotary = [](const Json& value) { return field("rope_parameters", value); };
  const std::tuple<const char*, std::function<void(Json&)>, const char*> cases[] = {
      {"llama3", rotary({{"rope_type", "yarn"}, {"factor", 2.0}}),
       "rope_parameters: rope_type \"yarn\" is not implemented (default, linear, llama3)"},
      {"llama3", rotary({{"rope_type", "dynamic"}, {"factor", 2.0}}), "\"dynamic\" is not"},
      {"llama3", rotary({{"rope_type", "linear"}}), "'factor' is missing"},
      {"llama3", rotary({{"rope_type", "linear"}, {"factor", 0}}), "factor must be a positive"},
      {"llama3", rotary({{"rope_type", "llama3"}, {"factor", 8.0}}),
       "'low_freq_factor' is missing"},
      {"llama3", rotary({{"rope_type", "default"}, {"attention_factor", 2.0}}),
       "rope_parameters: the field 'attention_factor' is not implemented"},
      {"llama3", rotary({{"rope_theta", -1}}), "rope_theta must be a positive number"},
      {"llama3", rotary({{"partial_rotary_factor", 0.5}}), "partial_rotary_factor below 1"},
      {"llama3", rotary(7), "rope_parameters must be an object"},
      {"llama3", field("rope_scaling", {{"type", "linear"}}), "both rope_parameters and rope_"},
      {"llama-sharded", field("rope_scaling", {{"type", "su"}}),
       "rope_scaling: type \"su\" is not"},
      {"llama3", field("hidden_act", "quick_gelu"), "hidden_act \"quick_gelu\" is not implemented"},
      {"llama3", field("quantization_config", Json::object()), "quantization_config"},
      {"llama3", field("residual_multiplier", 0.2), "residual_multiplier 0.2 is not implemented"},
      {"llama3", field("clip_qkv", 8), "clip_qkv is not implemented"},
      {"llama3", field("is_encoder_decoder", true), "is_encoder_decoder true is not implemented"},
      {"llama3", field("attention_bias", "yes"), "attention_bias must be true or false"},
      {"llama3", field("num_key_value_heads", 3), "is not a multiple of num_key_value_heads 3"},
      {"llama3", field("head_dim", 11), "rotates 11 of a head's 11"},
      {"llama3", field("rms_norm_eps", 0), "rms_norm_eps must be a positive number"},
      {"mistral", field("sliding_window", 31), "sliding_window 31 is not implemented"},
      {"mistral", field("attention_bias", true), "attention_bias true is not implemented"},
      {"qwen2",
       [](Json& config) {
         config["use_sliding_window"] = true;
         config["sliding_window"] = 16;
       },
       "sliding_window 16 is not implemented"},
      {"qwen3", field("layer_types", {"full_attention", "sliding_attention"}),
       "layer_types \"sliding_attention\" is not implemented (full_attention)"},
      {"qwen2", field("attention_bias", false), "attention_bias false is not implemented"},
      {"opt", field("layer_norm_elementwise_affine", false), "layer_norm_elementwise_affine"},
      {"opt", field("num_attention_heads", 5), "is not a multiple of num_attention_heads 5"},
      {"gpt-neox", [](Json& config) { config["rope_parameters"]["partial_rotary_factor"] = 1.5; },
       "must be at most 1"},
      {"gpt2", field("scale_attn_by_inverse_layer_idx", true), "scale_attn_by_inverse_layer_idx"},
      {"gpt2", field("scale_attn_weights", false), "scale_attn_weights"},
      {"gpt2", field("add_cross_attention", true), "add_cross_attention"},
      {"gpt2", field("architectures", {"GPT3LMHeadModel"}), "supported are: BertModel, OPT"},
  };
  for (const auto& [name, edit, part] : cases) {
    SCOPED_TRACE(part);
    EXPECT_CONTAINS(refused(name, edit), part);
  }
  // Windows that hide nothing.
  EXPECT_EQ(refused("mistral", field("sliding_window", 32)), "");
  EXPECT_EQ(refused("qwen2", field("sliding_window", 16)), "");
}

TEST_F(FamilyErrorsTest, TensorsThatDoNotFitAreNamed) {
  using Tensors = std::map<std::string, Tensor>;
  const auto without = [](const char* name) { return [=](Tensors& all) { all.erase(name); }; };
  const auto with = [](const char* name, const Tensor& value) {
    return [=](Tensors& all) { all[name] = value; };
  };
  EXPECT_CONTAINS(refused("llama3", kAsItIs, without("model.layers.1.mlp.up_proj.bias")),
                  "tensor 'model.layers.1.mlp.up_proj.bias' is missing");
  EXPECT_CONTAINS(refused("llama3", kAsItIs, without("lm_head.weight")),
                  "tensor 'lm_head.weight' is missing");
  EXPECT_CONTAINS(refused("llama3", field("attention_bias", false)),
                  "self_attn.k_proj.bias' has no place in a LlamaForCausalLM");
  EXPECT_CONTAINS(refused("mistral", kAsItIs,
                          with("model.layers.0.mlp.down_proj.weight", torch::ones({40, 32}))),
                  "hidden_size is 32 but tensor 'model.layers.0.mlp.down_proj.weight' has shape "
                  "[40, 32]");
  EXPECT_CONTAINS(refused("gpt2", kAsItIs, with("h.1.mlp.c_fc.weight", torch::full({32, 40}, NAN))),
                  "tensor 'h.1.mlp.c_fc.weight' holds NaN or infinite values");
  // A tied output layer that is there all the same has to be what it is tied to.
  const Tensor embedding =
      SafetensorsFolder::open(family_fixture("qwen2")).tensor("model.embed_tokens.weight");
  EXPECT_EQ(refused("qwen2", kAsItIs, with("lm_head.weight", embedding.clone())), "");
  EXPECT_CONTAINS(refused("qwen2", kAsItIs, with("lm_head.weight", embedding * 2)),
                  "tensor 'lm_head.weight' differs from 'model.embed_tokens.weight'");
  // Frequencies and masks of old folders say nothing.
  EXPECT_EQ(refused("llama3", kAsItIs,
                    with("model.layers.0.self_attn.rotary_emb.inv_freq", torch::ones({6}))),
            "");
}

// Sizes for which a model would fill any memory, had it been built.
TEST_F(FamilyErrorsTest, SizesAreHeldAgainstTheTensors) {
  const std::pair<const char*, std::vector<const char*>> cases[] = {
      {"llama3",
       {"vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size",
        "num_attention_heads", "num_key_value_heads", "head_dim"}},
      {"opt", {"vocab_size", "hidden_size", "num_hidden_layers", "ffn_dim", "word_embed_proj_dim"}},
      {"gpt-neox", {"vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"}},
      {"gpt2", {"vocab_size", "n_embd", "n_layer", "n_inner", "n_positions"}}};
  for (const auto& [name, fields] : cases)
    for (const std::string key : fields) {
      SCOPED_TRACE(key);
      EXPECT_CONTAINS(refused(name, field(key, int64_t{1} << 31)), key);
    }
  EXPECT_CONTAINS(refused("opt", field("max_position_embeddings", 33)),
                  "max_position_embeddings + 2 is 35 but tensor");
  EXPECT_CONTAINS(refused("qwen2", field("vocab_size", 49)),
                  "vocab_size is 49 but tensor 'model.embed_tokens.weight' has shape [48, 32]");
}

TEST_F(FamilyErrorsTest, EncodersContinueNoText) {
  const auto bert = load_text_model(fs::path(VERNIER_SOURCE_DIR) / "tests/fixtures/bert-tiny");
  EXPECT_CONTAINS(message_of([&] { causal(*bert, "sampling"); }),
                  "sampling needs a causal language model, and BertModel is none");
  std::set<std::string> readers;
  for (const SmoothingGroup& group : bert->smoothing_groups())
    readers.insert(group.readers.begin(), group.readers.end());
  EXPECT_EQ(readers.size(), quantized_layers(*bert).size());
}

}  // namespace
}  // namespace vernier
