#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/normalization.h>
#include <vernier/recipes/models/blocks.h>
#include <vernier/recipes/models/opt.h>

namespace vernier {
namespace {

using torch::Tensor;

constexpr int64_t kUnusedPositions = 2;  // rows of the positions' table before the first

struct OptConfig {
  int64_t vocabulary, hidden, embedded, layers, intermediate, positions;
  Heads heads;
  Activation activation;
  bool bias, norm_first, final_norm, tied;
};

OptConfig read_config(const nlohmann::json& json) {
  const ConfigReader config(json);
  require_plain_decoder(config);
  config.require("layer_norm_elementwise_affine", true);
  OptConfig result{};
  result.vocabulary = config.size("vocab_size");
  result.hidden = config.size("hidden_size");
  result.embedded = config.size("word_embed_proj_dim", result.hidden);
  result.layers = config.size("num_hidden_layers");
  result.intermediate = config.size("ffn_dim");
  result.positions = config.size("max_position_embeddings");
  result.heads = read_heads(config, result.hidden, "hidden_size", "num_attention_heads");
  result.activation = read_activation(config, "activation_function", "relu");
  result.bias = config.flag("enable_bias", true);
  result.norm_first = config.flag("do_layer_norm_before", true);
  result.final_norm = result.norm_first && !config.flag("_remove_final_layer_norm", false);
  result.tied = config.flag("tie_word_embeddings", true);
  return result;
}

struct SelfAttention : torch::nn::Module {
  explicit SelfAttention(const OptConfig& c) : heads(c.heads) {
    q_proj = register_module("q_proj", make_linear(c.hidden, c.hidden, c.bias));
    k_proj = register_module("k_proj", make_linear(c.hidden, c.hidden, c.bias));
    v_proj = register_module("v_proj", make_linear(c.hidden, c.hidden, c.bias));
    out_proj = register_module("out_proj", make_linear(c.hidden, c.hidden, c.bias));
    inputs = LinearGroup({q_proj, k_proj, v_proj});
    output = LinearGroup({out_proj});
  }

  // Of what `inputs` gives.
  Tensor forward(const std::vector<Tensor>& projected, const Sequences& sequences, int64_t layer) {
    const auto by_head = [&](const Tensor& x) { return x.view({x.size(0), -1, heads.size}); };
    return output.forward(attention(by_head(projected[0]), by_head(projected[1]),
                                    by_head(projected[2]), heads, sequences, /*causal=*/true,
                                    layer))[0];
  }

  Heads heads;
  nn::Linear q_proj{nullptr}, k_proj{nullptr}, v_proj{nullptr}, out_proj{nullptr};
  LinearGroup inputs, output;
};

struct Layer : torch::nn::Module {
  explicit Layer(const OptConfig& c) : norm_first(c.norm_first), activation(c.activation) {
    self_attn = register_module("self_attn", std::make_shared<SelfAttention>(c));
    self_attn_layer_norm = register_module("self_attn_layer_norm", make_layer_norm(c.hidden));
    fc1 = register_module("fc1", make_linear(c.hidden, c.intermediate, c.bias));
    fc2 = register_module("fc2", make_linear(c.intermediate, c.hidden, c.bias));
    final_layer_norm = register_module("final_layer_norm", make_layer_norm(c.hidden));
    input = LinearGroup({fc1});
    output = LinearGroup({fc2});
  }

  Stream forward(const Stream& before, const Sequences& sequences, int64_t layer) {
    const auto attend = [&](const std::vector<Tensor>& projected) {
      return self_attn->forward(projected, sequences, layer);
    };
    const auto feed = [&](const std::vector<Tensor>& fed) {
      return output.of_activation(fed[0], activation)[0];
    };
    if (norm_first) {
      const auto [x, projected] =
          self_attn->inputs.of_norm(norm_of(self_attn_layer_norm), before.x, before.added);
      const auto [between, fed] = input.of_norm(norm_of(final_layer_norm), x, attend(projected));
      return {between, feed(fed)};
    }
    const Tensor x = before.sum();
    const Tensor attended = self_attn_layer_norm(x + attend(self_attn->inputs.forward(x)));
    return {final_layer_norm(attended + feed(input.forward(attended))), {}};
  }

  bool norm_first;
  Activation activation;
  std::shared_ptr<SelfAttention> self_attn;
  torch::nn::LayerNorm self_attn_layer_norm{nullptr}, final_layer_norm{nullptr};
  nn::Linear fc1{nullptr}, fc2{nullptr};
  LinearGroup input, output;
};

// "model.decoder" in the names of parameters.
struct Decoder : torch::nn::Module {
  explicit Decoder(const OptConfig& c) {
    embed_tokens = register_module("embed_tokens", embedding(c.vocabulary, c.embedded));
    embed_positions =
        register_module("embed_positions", embedding(c.positions + kUnusedPositions, c.hidden));
    if (c.embedded != c.hidden) {
      project_in = register_module("project_in", make_linear(c.embedded, c.hidden, /*bias=*/false));
      project_out =
          register_module("project_out", make_linear(c.hidden, c.embedded, /*bias=*/false));
    }
    layers = register_module("layers", torch::nn::ModuleList());
    for (int64_t i = 0; i < c.layers; ++i) layers->push_back(std::make_shared<Layer>(c));
    if (c.final_norm)
      final_layer_norm = register_module("final_layer_norm", make_layer_norm(c.hidden));
  }

  Tensor forward(const Tensor& tokens, const Sequences& sequences) {
    Tensor x = embed_tokens(tokens);
    if (project_in) x = project_in(x);
    const Tensor& table = embed_positions->weight;
    x = sequences.add_rows(x, table.narrow(0, kUnusedPositions, table.size(0) - kUnusedPositions));
    Stream stream = {x, {}};
    for (size_t i = 0; i < layers->size(); ++i)
      stream = layers[i]->as<Layer>()->forward(stream, sequences, static_cast<int64_t>(i));
    x = stream.sum();
    if (final_layer_norm) x = final_layer_norm(x);
    return project_out ? project_out(x) : x;
  }

  torch::nn::Embedding embed_tokens{nullptr}, embed_positions{nullptr};
  nn::Linear project_in{nullptr}, project_out{nullptr};
  torch::nn::ModuleList layers;
  torch::nn::LayerNorm final_layer_norm{nullptr};
};

struct Model : torch::nn::Module {
  explicit Model(const OptConfig& c) {
    decoder = register_module("decoder", std::make_shared<Decoder>(c));
  }
  std::shared_ptr<Decoder> decoder;
};

class Opt : public CausalLanguageModel {
 public:
  explicit Opt(const OptConfig& c)
      : CausalLanguageModel({c.vocabulary, c.positions, c.layers, c.heads.keys, c.heads.size}),
        config_(c) {
    model_ = register_module("model", std::make_shared<Model>(c));
    make_output(model_->decoder->embed_tokens, c.tied ? "" : "lm_head");
  }

  using CausalLanguageModel::forward;
  Tensor forward(const TokenBatch& batch, KeyValueCache* cache) override {
    const Sequences sequences(batch, config_.positions, cache);
    const Tensor hidden = model_->decoder->forward(batch.tokens, sequences);
    if (cache) cache->advance(sequences.longest);
    return hidden;
  }

  std::string settings() const override {
    return nlohmann::json{{"num_attention_heads", config_.heads.queries},
                          {"activation_function", to_string(config_.activation)},
                          {"do_layer_norm_before", config_.norm_first}}
        .dump();
  }

  std::vector<SmoothingGroup> smoothing_groups() override {
    std::vector<SmoothingGroup> groups;
    // A norm after the residual is read by the next residual as well.
    const auto after_norm = [&](const std::string& name, const torch::nn::LayerNorm& norm,
                                const std::vector<std::string>& readers) {
      groups.push_back(config_.norm_first ? norm_group(name, norm.ptr(), readers)
                                          : free_group(readers));
    };
    for (int64_t i = 0; i < config_.layers; ++i) {
      const std::string name = concat("model.decoder.layers.", i, "."),
                        attention_name = name + "self_attn.";
      const auto* layer = model_->decoder->layers[i]->as<Layer>();
      after_norm(name + "self_attn_layer_norm", layer->self_attn_layer_norm,
                 {attention_name + "q_proj", attention_name + "k_proj", attention_name + "v_proj"});
      groups.push_back(linear_group(attention_name + "v_proj", layer->self_attn->v_proj,
                                    attention_name + "out_proj"));
      after_norm(name + "final_layer_norm", layer->final_layer_norm, {name + "fc1"});
      groups.push_back(
          activation_group(name + "fc1", layer->fc1, config_.activation, name + "fc2"));
    }
    return groups;
  }

 private:
  OptConfig config_;
  std::shared_ptr<Model> model_;
};

void check(const nlohmann::json& json, const TensorShapes& shapes) {
  const OptConfig c = read_config(json);
  const ShapeCheck check(shapes);
  const Dimension vocabulary{"vocab_size", c.vocabulary}, hidden{"hidden_size", c.hidden},
      embedded{"word_embed_proj_dim", c.embedded}, intermediate{"ffn_dim", c.intermediate};
  const std::string decoder = "model.decoder.";
  check.tensor(decoder + "embed_tokens.weight", {vocabulary, embedded});
  check.tensor(decoder + "embed_positions.weight",
               {{"max_position_embeddings + 2", c.positions + kUnusedPositions}, hidden});
  if (c.embedded != c.hidden) {
    check.tensor(decoder + "project_in.weight", {hidden, embedded});
    check.tensor(decoder + "project_out.weight", {embedded, hidden});
  }
  check.layers(decoder + "layers", {"num_hidden_layers", c.layers});
  for (int64_t i = 0; i < c.layers; ++i) {
    const std::string layer = concat(decoder, "layers.", i, ".");
    for (const char* name : {"q_proj", "k_proj", "v_proj", "out_proj"})
      check.linear(layer + "self_attn." + name, hidden, hidden, c.bias);
    check.norm(layer + "self_attn_layer_norm", hidden);
    check.linear(layer + "fc1", intermediate, hidden, c.bias);
    check.linear(layer + "fc2", hidden, intermediate, c.bias);
    check.norm(layer + "final_layer_norm", hidden);
  }
  if (c.final_norm) check.norm(decoder + "final_layer_norm", hidden);
  if (!c.tied) check.tensor("lm_head.weight", {vocabulary, embedded});
}

}  // namespace

Family opt_family() {
  Family family;
  family.architecture = "OPTForCausalLM";
  family.make = [](const nlohmann::json& json) { return std::make_shared<Opt>(read_config(json)); };
  family.check = check;
  family.output = "lm_head.weight";
  family.embedding = "model.decoder.embed_tokens.weight";
  return family;
}

}  // namespace vernier
