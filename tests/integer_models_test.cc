// Whole language models in mode integer: fused as layer by layer, bit for bit, and as
// fake-quantization says.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/export/validate.h>
#include <vernier/kernels/error.h>
#include <vernier/recipes/models/causal_lm.h>
#include <vernier/recipes/models/family.h>
#include <vernier/recipes/models/gpt2.h>
#include <vernier/recipes/models/gpt_neox.h>
#include <vernier/recipes/models/llama.h>
#include <vernier/recipes/models/opt.h>
#include <nlohmann/json.hpp>

#include <memory>
#include <string>

namespace vernier {
namespace {

using torch::Tensor;

const Scheme kPerToken = {.granularity = Granularity::per_token, .dynamic = true};

struct Made {
  std::string name;
  std::shared_ptr<CausalLanguageModel> model;
};

Made make(const Family& family, const nlohmann::json& more) {
  nlohmann::json config = {
      {"hidden_size", 64}, {"num_hidden_layers", 2},        {"num_attention_heads", 4},
      {"vocab_size", 50},  {"max_position_embeddings", 32}, {"tie_word_embeddings", true}};
  config.update(more);
  return {concat(family.architecture, " ", more.dump()),
          std::dynamic_pointer_cast<CausalLanguageModel>(family.make(config))};
}

std::vector<Made> models() {
  torch::manual_seed(5);
  std::vector<Made> all;
  const nlohmann::json gated = {{"intermediate_size", 96}, {"num_key_value_heads", 2}};
  for (const Family& family : llama_families()) all.push_back(make(family, gated));
  for (const bool norm_first : {true, false})
    all.push_back(make(opt_family(), {{"ffn_dim", 96}, {"do_layer_norm_before", norm_first}}));
  for (const bool parallel : {true, false})
    all.push_back(make(
        gpt_neox_family(),
        {{"intermediate_size", 96}, {"rotary_pct", 0.25}, {"use_parallel_residual", parallel}}));
  all.push_back(
      make(gpt2_family(), {{"n_embd", 64}, {"n_layer", 2}, {"n_head", 4}, {"n_positions", 32}}));
  for (const Made& made : all) {
    made.model->eval();
    // Larger than models begin with, so that attention is not uniform.
    const torch::NoGradGuard no_grad;
    for (Tensor& parameter : made.model->parameters())
      if (parameter.dim() > 1) parameter.normal_(0, 0.15);
  }
  return all;
}

TokenBatch random_batch() { return {torch::randint(50, {3 * 17}), {17, 17, 17}}; }

void quantize(TextModel& model, const Scheme& activations) {
  for (const NamedLayer& item : quantized_layers(model))
    item.layer->input_quantizer->set_settings({activations, {}});
  {
    const ModeGuard observing(model, Mode::observe);
    model.forward(random_batch());
  }
  calibrate_from_observers(model);
}

void watch(const TextModel& model, int* calls) {
  for (const NamedLayer& item : quantized_layers(model))
    item.layer->set_probe(calls ? QuantizedLayer::Probe([calls](const std::vector<Tensor>&,
                                                                const Tensor&) { ++*calls; })
                                : nullptr);
}

TEST(IntegerModels, FusedAsLayerByLayer) {
  const torch::NoGradGuard no_grad;
  for (const Scheme& activations : {symmetric_scheme(8), asymmetric_scheme(8), kPerToken}) {
    for (const Made& made : models()) {
      for (const torch::Dtype dtype : {torch::kFloat, torch::kBFloat16}) {
        SCOPED_TRACE(concat(made.name, " ", to_string(activations), " ", dtype));
        if (dtype == torch::kFloat) quantize(*made.model, activations);
        made.model->to(dtype);
        set_mode(*made.model, Mode::full);
        set_mode(*made.model, Mode::integer);
        const TokenBatch batch = random_batch();
        const Tensor fused = made.model->forward(batch);
        EXPECT_EQ(fused.scalar_type(), dtype);
        int calls = 0;
        watch(*made.model, &calls);
        const Tensor single = made.model->forward(batch);
        watch(*made.model, nullptr);
        EXPECT_EQ(calls, static_cast<int>(quantized_layers(*made.model).size()));
        EXPECT_TRUE(torch::equal(fused, single));
        // Once the probes are gone again.
        EXPECT_TRUE(torch::equal(fused, made.model->forward(batch)));
      }
    }
  }
}

TEST(IntegerModels, AsFakeQuantizationSays) {
  const torch::NoGradGuard no_grad;
  for (const Scheme& activations : {symmetric_scheme(8), kPerToken}) {
    for (const Made& made : models()) {
      SCOPED_TRACE(concat(made.name, " ", to_string(activations)));
      quantize(*made.model, activations);
      Validator validator(*made.model);
      const TokenBatch batch = random_batch();
      validator.add([&] { return made.model->forward(batch); });
      EXPECT_TRUE(validator.report().passed(0.02))
          << validator.report().relative_output_error() << " "
          << validator.report().total(&LayerValidation::code_mismatches) << " "
          << validator.report().total(&LayerValidation::outside_bound);
    }
  }
}

// A cache makes no difference to what the fused layers compute.
TEST(IntegerModels, WithCacheAsWithout) {
  const torch::NoGradGuard no_grad;
  for (const Made& made : models()) {
    SCOPED_TRACE(made.name);
    quantize(*made.model, kPerToken);
    set_mode(*made.model, Mode::integer);
    const TokenBatch batch = random_batch();
    const Tensor whole = made.model->forward(batch).view({3, 17, -1});
    const auto cache = made.model->make_cache(3, 17);
    const auto read = [&](int64_t first, int64_t count) {
      const TokenBatch part{batch.tokens.view({3, 17}).narrow(1, first, count).reshape(-1),
                            {count, count, count}};
      return made.model->forward(part, cache.get()).view({3, count, -1});
    };
    const Tensor pieces = torch::cat({read(0, 9), read(9, 7), read(16, 1)}, 1);
    // Sums of attention in another order move a code now and then.
    EXPECT_LT(((pieces - whole).norm() / whole.norm()).item<double>(), 0.02);
  }
}

}  // namespace
}  // namespace vernier
