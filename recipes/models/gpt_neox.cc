#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/normalization.h>
#include <vernier/recipes/models/blocks.h>
#include <vernier/recipes/models/gpt_neox.h>

namespace vernier {
namespace {

using torch::Tensor;

struct NeoxConfig {
  int64_t vocabulary, hidden, layers, intermediate, positions;
  Heads heads;
  double epsilon;
  Activation activation;
  RotarySettings rotary;
  bool attention_bias, parallel, tied;
};

NeoxConfig read_config(const nlohmann::json& json) {
  const ConfigReader config(json);
  require_plain_decoder(config);
  NeoxConfig result{};
  result.vocabulary = config.size("vocab_size");
  result.hidden = config.size("hidden_size");
  result.layers = config.size("num_hidden_layers");
  result.intermediate = config.size("intermediate_size");
  result.positions = config.size("max_position_embeddings");
  result.heads = read_heads(config, result.hidden, "hidden_size", "num_attention_heads");
  result.epsilon = config.number("layer_norm_eps", 1e-5);
  result.activation = read_activation(config, "hidden_act", "gelu");
  result.rotary = read_rotary(config, result.heads.size, "rotary_emb_base", "rotary_pct", 0.25);
  result.attention_bias = config.flag("attention_bias", true);
  result.parallel = config.flag("use_parallel_residual", true);
  result.tied = config.flag("tie_word_embeddings", false);
  return result;
}

struct SelfAttention : torch::nn::Module {
  explicit SelfAttention(const NeoxConfig& c) : heads(c.heads) {
    query_key_value =
        register_module("query_key_value", make_linear(c.hidden, 3 * c.hidden, c.attention_bias));
    dense = register_module("dense", make_linear(c.hidden, c.hidden, c.attention_bias));
    input = LinearGroup({query_key_value});
    output = LinearGroup({dense});
  }

  // Of what `input` gives.
  Tensor forward(const std::vector<Tensor>& projected, const Sequences& sequences,
                 const Rotary::Angles& angles, int64_t layer) {
    const auto parts = projected[0].view({-1, 3, heads.queries, heads.size}).unbind(1);
    return output.forward(attention(Rotary::rotate(parts[0], angles),
                                    Rotary::rotate(parts[1], angles), parts[2], heads, sequences,
                                    /*causal=*/true, layer))[0];
  }

  Heads heads;
  // Its rows are the queries' of all heads, the keys' and the values'.
  nn::Linear query_key_value{nullptr};
  nn::Linear dense{nullptr};
  LinearGroup input, output;
};

struct Layer : torch::nn::Module {
  explicit Layer(const NeoxConfig& c) : parallel(c.parallel) {
    attention = register_module("attention", std::make_shared<SelfAttention>(c));
    mlp = register_module("mlp", std::make_shared<PlainMlp>(c.hidden, c.intermediate, c.activation,
                                                            "dense_h_to_4h", "dense_4h_to_h"));
    input_layernorm = register_module("input_layernorm", make_layer_norm(c.hidden, c.epsilon));
    post_attention_layernorm =
        register_module("post_attention_layernorm", make_layer_norm(c.hidden, c.epsilon));
  }

  Stream forward(const Stream& before, const Sequences& sequences, const Rotary::Angles& angles,
                 int64_t layer) {
    const auto [x, projected] =
        attention->input.of_norm(norm_of(input_layernorm), before.x, before.added);
    const Tensor attended = attention->forward(projected, sequences, angles, layer);
    const Norm norm = norm_of(post_attention_layernorm);
    if (parallel) return {x + attended, mlp->forward(mlp->input.of_norm(norm, x).outputs)};
    const auto [between, fed] = mlp->input.of_norm(norm, x, attended);
    return {between, mlp->forward(fed)};
  }

  bool parallel;
  std::shared_ptr<SelfAttention> attention;
  std::shared_ptr<PlainMlp> mlp;
  torch::nn::LayerNorm input_layernorm{nullptr}, post_attention_layernorm{nullptr};
};

// "gpt_neox" in the names of parameters.
struct Decoder : torch::nn::Module {
  explicit Decoder(const NeoxConfig& c) {
    embed_in = register_module("embed_in", embedding(c.vocabulary, c.hidden));
    layers = register_module("layers", torch::nn::ModuleList());
    for (int64_t i = 0; i < c.layers; ++i) layers->push_back(std::make_shared<Layer>(c));
    final_layer_norm = register_module("final_layer_norm", make_layer_norm(c.hidden, c.epsilon));
  }

  torch::nn::Embedding embed_in{nullptr};
  torch::nn::ModuleList layers;
  torch::nn::LayerNorm final_layer_norm{nullptr};
};

class GptNeox : public CausalLanguageModel {
 public:
  explicit GptNeox(const NeoxConfig& c)
      : CausalLanguageModel({c.vocabulary, c.positions, c.layers, c.heads.keys, c.heads.size}),
        config_(c),
        rotary_(c.rotary, c.positions) {
    model_ = register_module("gpt_neox", std::make_shared<Decoder>(c));
    make_output(model_->embed_in, c.tied ? "" : "embed_out");
  }

  using CausalLanguageModel::forward;
  Tensor forward(const TokenBatch& batch, KeyValueCache* cache) override {
    const Sequences sequences(batch, config_.positions, cache);
    Stream stream = {model_->embed_in(batch.tokens), {}};
    const Rotary::Angles angles = rotary_.angles(sequences, stream.x.device());
    for (int64_t i = 0; i < config_.layers; ++i)
      stream = model_->layers[i]->as<Layer>()->forward(stream, sequences, angles, i);
    if (cache) cache->advance(sequences.longest);
    return model_->final_layer_norm(stream.sum());
  }

  std::string settings() const override {
    return nlohmann::json{{"num_attention_heads", config_.heads.queries},
                          {"layer_norm_eps", config_.epsilon},
                          {"hidden_act", to_string(config_.activation)},
                          {"use_parallel_residual", config_.parallel},
                          {"rotary", config_.rotary.json()}}
        .dump();
  }

  // Stored head by head, each its query's rows, its key's and its value's; here the values' rows
  // are one block, which smoothing divides and one view holds.
  Tensor to_stored(const std::string& name, const Tensor& value) const override {
    return reorder(name, value, 3, config_.heads.queries);
  }
  Tensor from_stored(const std::string& name, const Tensor& value) const override {
    return reorder(name, value, config_.heads.queries, 3);
  }

  std::vector<SmoothingGroup> smoothing_groups() override {
    std::vector<SmoothingGroup> groups;
    for (int64_t i = 0; i < config_.layers; ++i) {
      const std::string name = concat("gpt_neox.layers.", i, "."),
                        attention_name = name + "attention.", mlp_name = name + "mlp.";
      const auto* layer = model_->layers[i]->as<Layer>();
      groups.push_back(norm_group(name + "input_layernorm", layer->input_layernorm.ptr(),
                                  {attention_name + "query_key_value"}));
      groups.push_back(linear_group(attention_name + "query_key_value",
                                    layer->attention->query_key_value, attention_name + "dense", {},
                                    2 * config_.hidden, config_.hidden));
      groups.push_back(norm_group(name + "post_attention_layernorm",
                                  layer->post_attention_layernorm.ptr(),
                                  {mlp_name + "dense_h_to_4h"}));
      groups.push_back(activation_group(mlp_name + "dense_h_to_4h", layer->mlp->first,
                                        config_.activation, mlp_name + "dense_4h_to_h"));
    }
    return groups;
  }

 private:
  // Rows [outer, inner, head size] as [inner, outer, head size].
  Tensor reorder(const std::string& name, const Tensor& value, int64_t outer, int64_t inner) const {
    if (name.find(".query_key_value.") == std::string::npos || value.dim() == 0 ||
        value.size(0) != 3 * config_.hidden)
      return value;
    return value.unflatten(0, {outer, inner, config_.heads.size})
        .transpose(0, 1)
        .flatten(0, 2)
        .contiguous();
  }

  NeoxConfig config_;
  Rotary rotary_;
  std::shared_ptr<Decoder> model_;
};

void check(const nlohmann::json& json, const TensorShapes& shapes) {
  const NeoxConfig c = read_config(json);
  const ShapeCheck check(shapes);
  const Dimension vocabulary{"vocab_size", c.vocabulary}, hidden{"hidden_size", c.hidden},
      fused{"3 x hidden_size", 3 * c.hidden}, intermediate{"intermediate_size", c.intermediate};
  check.tensor("gpt_neox.embed_in.weight", {vocabulary, hidden});
  check.layers("gpt_neox.layers", {"num_hidden_layers", c.layers});
  for (int64_t i = 0; i < c.layers; ++i) {
    const std::string layer = concat("gpt_neox.layers.", i, ".");
    check.norm(layer + "input_layernorm", hidden);
    check.linear(layer + "attention.query_key_value", fused, hidden, c.attention_bias);
    check.linear(layer + "attention.dense", hidden, hidden, c.attention_bias);
    check.norm(layer + "post_attention_layernorm", hidden);
    check.linear(layer + "mlp.dense_h_to_4h", intermediate, hidden);
    check.linear(layer + "mlp.dense_4h_to_h", hidden, intermediate);
  }
  check.norm("gpt_neox.final_layer_norm", hidden);
  if (!c.tied) check.tensor("embed_out.weight", {vocabulary, hidden});
}

}  // namespace

Family gpt_neox_family() {
  Family family;
  family.architecture = "GPTNeoXForCausalLM";
  family.make = [](const nlohmann::json& json) {
    return std::make_shared<GptNeox>(read_config(json));
  };
  family.check = check;
  family.parameter_name = [](const std::string& stored) {
    return stored == "lm_head.weight" ? "embed_out.weight" : stored;  // as other families call it
  };
  // Causal masks and frequencies, which older versions of transformers stored.
  family.unused = [](const std::string& name) {
    return name.ends_with(".attention.bias") || name.ends_with(".attention.masked_bias") ||
           name.ends_with(".rotary_emb.inv_freq");
  };
  family.output = "embed_out.weight";
  family.embedding = "gpt_neox.embed_in.weight";
  return family;
}

}  // namespace vernier
