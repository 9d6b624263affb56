#include <torch/nn/modules/container/modulelist.h>
#include <vernier/recipes/models/blocks.h>
#include <vernier/recipes/models/llama.h>

namespace vernier {
namespace {

using torch::Tensor;

struct LlamaConfig {
  int64_t vocabulary, hidden, layers, intermediate, positions;
  Heads heads;
  double epsilon;
  Activation activation;
  RotarySettings rotary;
  bool query_bias, output_bias, mlp_bias;  // query_bias: that of keys and values, too
  bool head_norms;                         // RMSNorm over each head of queries and keys
  bool tied;
};

// What the members of the family have in common.
LlamaConfig read_common(const ConfigReader& config,
                        std::optional<int64_t> default_head_size = std::nullopt) {
  require_plain_decoder(config);
  LlamaConfig result{};
  result.vocabulary = config.size("vocab_size");
  result.hidden = config.size("hidden_size");
  result.layers = config.size("num_hidden_layers");
  result.intermediate = config.size("intermediate_size");
  result.positions = config.size("max_position_embeddings");
  Heads& heads = result.heads;
  heads.queries = config.size("num_attention_heads");
  heads.keys = config.size("num_key_value_heads", heads.queries);
  VERNIER_CHECK(heads.queries % heads.keys == 0, "num_attention_heads ", heads.queries,
                " is not a multiple of num_key_value_heads ", heads.keys);
  const bool says_size = config.has("head_dim") || default_head_size;
  VERNIER_CHECK(says_size || result.hidden % heads.queries == 0, "hidden_size ", result.hidden,
                " is not a multiple of num_attention_heads ", heads.queries);
  heads.size = config.size("head_dim", default_head_size.value_or(result.hidden / heads.queries));
  result.epsilon = config.number("rms_norm_eps", 1e-6);
  result.activation = read_activation(config, "hidden_act", "silu");
  result.rotary = read_rotary(config, heads.size);
  VERNIER_CHECK(result.rotary.size == heads.size,
                "partial_rotary_factor below 1 is not implemented for this architecture");
  result.tied = config.flag("tie_word_embeddings", false);
  return result;
}

// Attention to less than all tokens before would be another function once there are more.
void refuse_window(const ConfigReader& config, int64_t positions, bool uses_window = true) {
  const bool has_window = uses_window && config.has("sliding_window");
  const int64_t window = has_window ? config.size("sliding_window") : 0;
  VERNIER_CHECK(!has_window || window >= positions, "sliding_window ", window,
                " is not implemented: only windows of at least max_position_embeddings ", positions,
                ", or null");
  for (const std::string& type : config.names("layer_types"))
    VERNIER_CHECK(type == "full_attention" || (type == "sliding_attention" && has_window),
                  "layer_types \"", type, "\" is not implemented (full_attention)");
}

LlamaConfig read_llama(const nlohmann::json& json) {
  const ConfigReader config(json);
  LlamaConfig result = read_common(config);
  result.query_bias = result.output_bias = config.flag("attention_bias", false);
  result.mlp_bias = config.flag("mlp_bias", false);
  refuse_window(config, result.positions);
  return result;
}

LlamaConfig read_mistral(const nlohmann::json& json) {
  const ConfigReader config(json);
  LlamaConfig result = read_common(config);
  VERNIER_CHECK(config.has("num_key_value_heads"), "the configuration has no field ",
                "'num_key_value_heads'");
  for (const char* field : {"attention_bias", "mlp_bias"}) config.require(field, false);
  refuse_window(config, result.positions);
  return result;
}

// Qwen names a window that it uses only where another field says so.
LlamaConfig read_qwen(const ConfigReader& config, std::optional<int64_t> default_head_size) {
  LlamaConfig result = read_common(config, default_head_size);
  config.require("mlp_bias", false);
  refuse_window(config, result.positions, config.flag("use_sliding_window", false));
  return result;
}

LlamaConfig read_qwen2(const nlohmann::json& json) {
  const ConfigReader config(json);
  LlamaConfig result = read_qwen(config, std::nullopt);
  config.require("attention_bias", true);
  result.query_bias = true;
  return result;
}

LlamaConfig read_qwen3(const nlohmann::json& json) {
  const ConfigReader config(json);
  LlamaConfig result = read_qwen(config, /*default_head_size=*/128);
  result.query_bias = result.output_bias = config.flag("attention_bias", false);
  result.head_norms = true;
  return result;
}

struct SelfAttention : torch::nn::Module {
  explicit SelfAttention(const LlamaConfig& c) : heads(c.heads) {
    const int64_t queries = heads.queries * heads.size, keys = heads.keys * heads.size;
    q_proj = register_module("q_proj", make_linear(c.hidden, queries, c.query_bias));
    k_proj = register_module("k_proj", make_linear(c.hidden, keys, c.query_bias));
    v_proj = register_module("v_proj", make_linear(c.hidden, keys, c.query_bias));
    o_proj = register_module("o_proj", make_linear(queries, c.hidden, c.output_bias));
    inputs = LinearGroup({q_proj, k_proj, v_proj});
    output = LinearGroup({o_proj});
    if (!c.head_norms) return;
    q_norm = register_module("q_norm", RMSNorm(heads.size, c.epsilon));
    k_norm = register_module("k_norm", RMSNorm(heads.size, c.epsilon));
  }

  // Of what `inputs` gives.
  Tensor forward(const std::vector<Tensor>& projected, const Sequences& sequences,
                 const Rotary::Angles& angles, int64_t layer) {
    const auto by_head = [&](const Tensor& x) { return x.view({x.size(0), -1, heads.size}); };
    Tensor q = by_head(projected[0]), k = by_head(projected[1]);
    if (q_norm) {
      q = q_norm(q);
      k = k_norm(k);
    }
    q = Rotary::rotate(q, angles);
    k = Rotary::rotate(k, angles);
    return output.forward(attention(q, k, by_head(projected[2]), heads, sequences,
                                    /*causal=*/true, layer))[0];
  }

  Heads heads;
  nn::Linear q_proj{nullptr}, k_proj{nullptr}, v_proj{nullptr}, o_proj{nullptr};
  LinearGroup inputs, output;
  RMSNorm q_norm{nullptr}, k_norm{nullptr};
};

struct GatedMlp : torch::nn::Module {
  explicit GatedMlp(const LlamaConfig& c) : activation(c.activation) {
    gate_proj = register_module("gate_proj", make_linear(c.hidden, c.intermediate, c.mlp_bias));
    up_proj = register_module("up_proj", make_linear(c.hidden, c.intermediate, c.mlp_bias));
    down_proj = register_module("down_proj", make_linear(c.intermediate, c.hidden, c.mlp_bias));
    inputs = LinearGroup({gate_proj, up_proj});
    output = LinearGroup({down_proj});
  }

  // Of what `inputs` gives.
  Tensor forward(const std::vector<Tensor>& gate_and_up) {
    return output.of_gated(gate_and_up[0], gate_and_up[1], activation)[0];
  }

  Activation activation;
  nn::Linear gate_proj{nullptr}, up_proj{nullptr}, down_proj{nullptr};
  LinearGroup inputs, output;
};

struct Layer : torch::nn::Module {
  explicit Layer(const LlamaConfig& c) {
    self_attn = register_module("self_attn", std::make_shared<SelfAttention>(c));
    mlp = register_module("mlp", std::make_shared<GatedMlp>(c));
    input_layernorm = register_module("input_layernorm", RMSNorm(c.hidden, c.epsilon));
    post_attention_layernorm =
        register_module("post_attention_layernorm", RMSNorm(c.hidden, c.epsilon));
  }

  Stream forward(const Stream& before, const Sequences& sequences, const Rotary::Angles& angles,
                 int64_t layer) {
    const auto [x, projected] =
        self_attn->inputs.of_norm(input_layernorm->norm(), before.x, before.added);
    const Tensor attended = self_attn->forward(projected, sequences, angles, layer);
    const auto [between, gate_and_up] =
        mlp->inputs.of_norm(post_attention_layernorm->norm(), x, attended);
    return {between, mlp->forward(gate_and_up)};
  }

  std::shared_ptr<SelfAttention> self_attn;
  std::shared_ptr<GatedMlp> mlp;
  RMSNorm input_layernorm{nullptr}, post_attention_layernorm{nullptr};
};

// "model" in the names of parameters.
struct Decoder : torch::nn::Module {
  explicit Decoder(const LlamaConfig& c) {
    embed_tokens = register_module("embed_tokens", embedding(c.vocabulary, c.hidden));
    layers = register_module("layers", torch::nn::ModuleList());
    for (int64_t i = 0; i < c.layers; ++i) layers->push_back(std::make_shared<Layer>(c));
    norm = register_module("norm", RMSNorm(c.hidden, c.epsilon));
  }

  torch::nn::Embedding embed_tokens{nullptr};
  torch::nn::ModuleList layers;
  RMSNorm norm{nullptr};
};

class Llama : public CausalLanguageModel {
 public:
  explicit Llama(const LlamaConfig& c)
      : CausalLanguageModel({c.vocabulary, c.positions, c.layers, c.heads.keys, c.heads.size}),
        config_(c),
        rotary_(c.rotary, c.positions) {
    model_ = register_module("model", std::make_shared<Decoder>(c));
    make_output(model_->embed_tokens, c.tied ? "" : "lm_head");
  }

  using CausalLanguageModel::forward;
  Tensor forward(const TokenBatch& batch, KeyValueCache* cache) override {
    const Sequences sequences(batch, config_.positions, cache);
    Stream stream = {model_->embed_tokens(batch.tokens), {}};
    const Rotary::Angles angles = rotary_.angles(sequences, stream.x.device());
    for (int64_t i = 0; i < config_.layers; ++i)
      stream = model_->layers[i]->as<Layer>()->forward(stream, sequences, angles, i);
    if (cache) cache->advance(sequences.longest);
    return model_->norm(stream.sum());
  }

  std::string settings() const override {
    return nlohmann::json{{"num_attention_heads", config_.heads.queries},
                          {"num_key_value_heads", config_.heads.keys},
                          {"rms_norm_eps", config_.epsilon},
                          {"hidden_act", to_string(config_.activation)},
                          {"rotary", config_.rotary.json()}}
        .dump();
  }

  std::vector<SmoothingGroup> smoothing_groups() override {
    std::vector<SmoothingGroup> groups;
    for (int64_t i = 0; i < config_.layers; ++i) {
      const std::string name = concat("model.layers.", i), attention_name = name + ".self_attn.",
                        mlp_name = name + ".mlp.";
      const auto* layer = model_->layers[i]->as<Layer>();
      groups.push_back(norm_group(
          name + ".input_layernorm", layer->input_layernorm.ptr(),
          {attention_name + "q_proj", attention_name + "k_proj", attention_name + "v_proj"}));
      groups.push_back(linear_group(attention_name + "v_proj", layer->self_attn->v_proj,
                                    attention_name + "o_proj", config_.heads.source()));
      groups.push_back(norm_group(name + ".post_attention_layernorm",
                                  layer->post_attention_layernorm.ptr(),
                                  {mlp_name + "gate_proj", mlp_name + "up_proj"}));
      groups.push_back(
          linear_group(mlp_name + "up_proj", layer->mlp->up_proj, mlp_name + "down_proj"));
    }
    return groups;
  }

 private:
  LlamaConfig config_;
  Rotary rotary_;
  std::shared_ptr<Decoder> model_;
};

void check(const LlamaConfig& c, const TensorShapes& shapes) {
  const ShapeCheck check(shapes);
  const Dimension vocabulary{"vocab_size", c.vocabulary}, hidden{"hidden_size", c.hidden},
      intermediate{"intermediate_size", c.intermediate}, head{"head_dim", c.heads.size},
      queries{"num_attention_heads x head_dim", c.heads.queries * c.heads.size},
      keys{"num_key_value_heads x head_dim", c.heads.keys * c.heads.size};
  check.tensor("model.embed_tokens.weight", {vocabulary, hidden});
  check.layers("model.layers", {"num_hidden_layers", c.layers});
  for (int64_t i = 0; i < c.layers; ++i) {
    const std::string layer = concat("model.layers.", i, ".");
    check.norm(layer + "input_layernorm", hidden, /*bias=*/false);
    check.linear(layer + "self_attn.q_proj", queries, hidden, c.query_bias);
    check.linear(layer + "self_attn.k_proj", keys, hidden, c.query_bias);
    check.linear(layer + "self_attn.v_proj", keys, hidden, c.query_bias);
    check.linear(layer + "self_attn.o_proj", hidden, queries, c.output_bias);
    if (c.head_norms)
      for (const char* name : {"self_attn.q_norm", "self_attn.k_norm"})
        check.norm(layer + name, head, /*bias=*/false);
    check.norm(layer + "post_attention_layernorm", hidden, /*bias=*/false);
    check.linear(layer + "mlp.gate_proj", intermediate, hidden, c.mlp_bias);
    check.linear(layer + "mlp.up_proj", intermediate, hidden, c.mlp_bias);
    check.linear(layer + "mlp.down_proj", hidden, intermediate, c.mlp_bias);
  }
  check.norm("model.norm", hidden, /*bias=*/false);
  if (!c.tied) check.tensor("lm_head.weight", {vocabulary, hidden});
}

Family family(const char* architecture, LlamaConfig (*read)(const nlohmann::json&)) {
  Family result;
  result.architecture = architecture;
  result.make = [read](const nlohmann::json& json) { return std::make_shared<Llama>(read(json)); };
  result.check = [read](const nlohmann::json& json, const TensorShapes& shapes) {
    check(read(json), shapes);
  };
  // Frequencies, which older versions of transformers stored.
  result.unused = [](const std::string& name) { return name.ends_with(".rotary_emb.inv_freq"); };
  result.output = "lm_head.weight";
  result.embedding = "model.embed_tokens.weight";
  return result;
}

}  // namespace

std::vector<Family> llama_families() {
  return {family("LlamaForCausalLM", read_llama), family("MistralForCausalLM", read_mistral),
          family("Qwen2ForCausalLM", read_qwen2), family("Qwen3ForCausalLM", read_qwen3)};
}

}  // namespace vernier
