#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/normalization.h>
#include <vernier/recipes/models/blocks.h>
#include <vernier/recipes/models/gpt2.h>

namespace vernier {
namespace {

using torch::Tensor;

struct Gpt2Config {
  int64_t vocabulary, hidden, layers, intermediate, positions;
  Heads heads;
  double epsilon;
  Activation activation;
  bool tied;
};

Gpt2Config read_config(const nlohmann::json& json) {
  const ConfigReader config(json);
  require_plain_decoder(config);
  config.require("scale_attn_weights", true);
  config.require("scale_attn_by_inverse_layer_idx", false);
  Gpt2Config result{};
  result.vocabulary = config.size("vocab_size");
  result.hidden = config.size("n_embd");
  result.layers = config.size("n_layer");
  result.intermediate = config.size("n_inner", 4 * result.hidden);
  result.positions = config.size("n_positions");
  result.heads = read_heads(config, result.hidden, "n_embd", "n_head");
  result.epsilon = config.number("layer_norm_epsilon", 1e-5);
  result.activation = read_activation(config, "activation_function", "gelu_new");
  result.tied = config.flag("tie_word_embeddings", true);
  return result;
}

struct SelfAttention : torch::nn::Module {
  explicit SelfAttention(const Gpt2Config& c) : heads(c.heads) {
    c_attn = register_module("c_attn", make_linear(c.hidden, 3 * c.hidden));
    c_proj = register_module("c_proj", make_linear(c.hidden, c.hidden));
    input = LinearGroup({c_attn});
    output = LinearGroup({c_proj});
  }

  // Of what `input` gives.
  Tensor forward(const std::vector<Tensor>& projected, const Sequences& sequences, int64_t layer) {
    const auto parts = projected[0].view({-1, 3, heads.queries, heads.size}).unbind(1);
    return output.forward(
        attention(parts[0], parts[1], parts[2], heads, sequences, /*causal=*/true, layer))[0];
  }

  Heads heads;
  nn::Linear c_attn{nullptr}, c_proj{nullptr};
  LinearGroup input, output;
};

struct Layer : torch::nn::Module {
  explicit Layer(const Gpt2Config& c) {
    ln_1 = register_module("ln_1", make_layer_norm(c.hidden, c.epsilon));
    attn = register_module("attn", std::make_shared<SelfAttention>(c));
    ln_2 = register_module("ln_2", make_layer_norm(c.hidden, c.epsilon));
    mlp = register_module("mlp", std::make_shared<PlainMlp>(c.hidden, c.intermediate, c.activation,
                                                            "c_fc", "c_proj"));
  }

  Stream forward(const Stream& before, const Sequences& sequences, int64_t layer) {
    const auto [x, projected] = attn->input.of_norm(norm_of(ln_1), before.x, before.added);
    const Tensor attended = attn->forward(projected, sequences, layer);
    const auto [between, fed] = mlp->input.of_norm(norm_of(ln_2), x, attended);
    return {between, mlp->forward(fed)};
  }

  torch::nn::LayerNorm ln_1{nullptr}, ln_2{nullptr};
  std::shared_ptr<SelfAttention> attn;
  std::shared_ptr<PlainMlp> mlp;
};

// "transformer" in the names of parameters.
struct Decoder : torch::nn::Module {
  explicit Decoder(const Gpt2Config& c) {
    wte = register_module("wte", embedding(c.vocabulary, c.hidden));
    wpe = register_module("wpe", embedding(c.positions, c.hidden));
    layers = register_module("h", torch::nn::ModuleList());
    for (int64_t i = 0; i < c.layers; ++i) layers->push_back(std::make_shared<Layer>(c));
    ln_f = register_module("ln_f", make_layer_norm(c.hidden, c.epsilon));
  }

  torch::nn::Embedding wte{nullptr}, wpe{nullptr};
  torch::nn::ModuleList layers;
  torch::nn::LayerNorm ln_f{nullptr};
};

// Whether a parameter is one of those that GPT-2 stores as [in, out].
bool is_transposed(const std::string& name) {
  return name.ends_with(".c_attn.weight") || name.ends_with(".c_proj.weight") ||
         name.ends_with(".c_fc.weight");
}

class Gpt2 : public CausalLanguageModel {
 public:
  explicit Gpt2(const Gpt2Config& c)
      : CausalLanguageModel({c.vocabulary, c.positions, c.layers, c.heads.keys, c.heads.size}),
        config_(c) {
    model_ = register_module("transformer", std::make_shared<Decoder>(c));
    make_output(model_->wte, c.tied ? "" : "lm_head");
  }

  using CausalLanguageModel::forward;
  Tensor forward(const TokenBatch& batch, KeyValueCache* cache) override {
    const Sequences sequences(batch, config_.positions, cache);
    Stream stream = {sequences.add_rows(model_->wte(batch.tokens), model_->wpe->weight), {}};
    for (int64_t i = 0; i < config_.layers; ++i)
      stream = model_->layers[i]->as<Layer>()->forward(stream, sequences, i);
    if (cache) cache->advance(sequences.longest);
    return model_->ln_f(stream.sum());
  }

  std::string settings() const override {
    return nlohmann::json{{"n_head", config_.heads.queries},
                          {"layer_norm_epsilon", config_.epsilon},
                          {"activation_function", to_string(config_.activation)}}
        .dump();
  }

  Tensor to_stored(const std::string& name, const Tensor& value) const override {
    return is_transposed(name) && value.dim() == 2 ? value.t().contiguous() : value;
  }
  Tensor from_stored(const std::string& name, const Tensor& value) const override {
    return to_stored(name, value);
  }

  std::vector<SmoothingGroup> smoothing_groups() override {
    std::vector<SmoothingGroup> groups;
    for (int64_t i = 0; i < config_.layers; ++i) {
      const std::string name = concat("transformer.h.", i, ".");
      const auto* layer = model_->layers[i]->as<Layer>();
      groups.push_back(norm_group(name + "ln_1", layer->ln_1.ptr(), {name + "attn.c_attn"}));
      groups.push_back(linear_group(name + "attn.c_attn", layer->attn->c_attn, name + "attn.c_proj",
                                    {}, 2 * config_.hidden, config_.hidden));
      groups.push_back(norm_group(name + "ln_2", layer->ln_2.ptr(), {name + "mlp.c_fc"}));
      groups.push_back(activation_group(name + "mlp.c_fc", layer->mlp->first, config_.activation,
                                        name + "mlp.c_proj"));
    }
    return groups;
  }

 private:
  Gpt2Config config_;
  std::shared_ptr<Decoder> model_;
};

void check(const nlohmann::json& json, const TensorShapes& shapes) {
  const Gpt2Config c = read_config(json);
  const ShapeCheck check(shapes);
  const Dimension vocabulary{"vocab_size", c.vocabulary}, hidden{"n_embd", c.hidden},
      fused{"3 x n_embd", 3 * c.hidden}, intermediate{"n_inner", c.intermediate};
  check.tensor("transformer.wte.weight", {vocabulary, hidden});
  check.tensor("transformer.wpe.weight", {{"n_positions", c.positions}, hidden});
  check.layers("transformer.h", {"n_layer", c.layers});
  for (int64_t i = 0; i < c.layers; ++i) {
    const std::string layer = concat("transformer.h.", i, ".");
    check.norm(layer + "ln_1", hidden);
    check.linear(layer + "attn.c_attn", fused, hidden);
    check.linear(layer + "attn.c_proj", hidden, hidden);
    check.norm(layer + "ln_2", hidden);
    check.linear(layer + "mlp.c_fc", intermediate, hidden);
    check.linear(layer + "mlp.c_proj", hidden, intermediate);
  }
  check.norm("transformer.ln_f", hidden);
  if (!c.tied) check.tensor("lm_head.weight", {vocabulary, hidden});
}

}  // namespace

Family gpt2_family() {
  Family family;
  family.architecture = "GPT2LMHeadModel";
  family.make = [](const nlohmann::json& json) {
    return std::make_shared<Gpt2>(read_config(json));
  };
  family.check = check;
  // The first folders were of the bare model.
  family.parameter_name = [](const std::string& stored) {
    return stored.starts_with("transformer.") || stored.starts_with("lm_head.")
               ? stored
               : "transformer." + stored;
  };
  // Causal masks, which older versions of transformers stored.
  family.unused = [](const std::string& name) {
    return name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias");
  };
  family.transposed = is_transposed;
  family.output = "lm_head.weight";
  family.embedding = "transformer.wte.weight";
  return family;
}

}  // namespace vernier
