#include <torch/nn/functional/activation.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/normalization.h>
#include <vernier/kernels/error.h>
#include <vernier/qat/linear.h>
#include <vernier/recipes/models/bert.h>
#include <vernier/recipes/models/blocks.h>
#include <nlohmann/json.hpp>

#include <string>
#include <vector>

namespace vernier {
namespace {

using torch::Tensor;

struct BertConfig {
  int64_t vocabulary, hidden, layers, intermediate, positions, types;
  Heads heads;
  double epsilon;
  Activation activation;
};

BertConfig read_config(const nlohmann::json& json) {
  const ConfigReader config(json);
  config.require("position_embedding_type", "absolute");
  config.require("is_decoder", false);
  config.require("add_cross_attention", false);
  BertConfig result;
  result.vocabulary = config.size("vocab_size");
  result.hidden = config.size("hidden_size");
  result.layers = config.size("num_hidden_layers");
  result.heads = read_heads(config, result.hidden, "hidden_size", "num_attention_heads");
  result.intermediate = config.size("intermediate_size");
  result.positions = config.size("max_position_embeddings");
  result.types = config.size("type_vocab_size", 2);
  result.epsilon = config.number("layer_norm_eps", 1e-12);
  result.activation = read_activation(config, "hidden_act", "gelu");
  return result;
}

// Names of submodules follow the checkpoint, which nests one-member modules: "self", "dense",
// "LayerNorm".
struct Embeddings : torch::nn::Module {
  explicit Embeddings(const BertConfig& c) {
    words = register_module("word_embeddings", embedding(c.vocabulary, c.hidden));
    positions = register_module("position_embeddings", embedding(c.positions, c.hidden));
    types = register_module("token_type_embeddings", embedding(c.types, c.hidden));
    norm = register_module("LayerNorm", make_layer_norm(c.hidden, c.epsilon));
  }

  Tensor forward(const Tensor& tokens, const Sequences& sequences) {
    return norm(sequences.add_rows(words(tokens) + types->weight[0], positions->weight));
  }

  torch::nn::Embedding words{nullptr}, positions{nullptr}, types{nullptr};
  torch::nn::LayerNorm norm{nullptr};
};

struct SelfAttention : torch::nn::Module {
  explicit SelfAttention(const BertConfig& c) : heads(c.heads) {
    query = register_module("query", nn::Linear(c.hidden, c.hidden));
    key = register_module("key", nn::Linear(c.hidden, c.hidden));
    value = register_module("value", nn::Linear(c.hidden, c.hidden));
  }

  Tensor forward(const Tensor& x, const Sequences& sequences) {
    const auto by_head = [&](const Tensor& projected) {
      return projected.view({x.size(0), -1, heads.size});
    };
    return attention(by_head(query(x)), by_head(key(x)), by_head(value(x)), heads, sequences,
                     /*causal=*/false);
  }

  Heads heads;
  nn::Linear query{nullptr}, key{nullptr}, value{nullptr};
};

// A linear whose result is added to a residual and normalized.
struct ResidualOutput : torch::nn::Module {
  ResidualOutput(const BertConfig& c, int64_t in) {
    dense = register_module("dense", nn::Linear(in, c.hidden));
    norm = register_module("LayerNorm", make_layer_norm(c.hidden, c.epsilon));
  }

  Tensor forward(const Tensor& x, const Tensor& residual) { return norm(dense(x) + residual); }

  nn::Linear dense{nullptr};
  torch::nn::LayerNorm norm{nullptr};
};

struct Attention : torch::nn::Module {
  explicit Attention(const BertConfig& c) {
    self = register_module("self", std::make_shared<SelfAttention>(c));
    output = register_module("output", std::make_shared<ResidualOutput>(c, c.hidden));
  }

  Tensor forward(const Tensor& x, const Sequences& sequences) {
    return output->forward(self->forward(x, sequences), x);
  }

  std::shared_ptr<SelfAttention> self;
  std::shared_ptr<ResidualOutput> output;
};

struct Intermediate : torch::nn::Module {
  explicit Intermediate(const BertConfig& c) : activation(c.activation) {
    dense = register_module("dense", nn::Linear(c.hidden, c.intermediate));
  }

  Tensor forward(const Tensor& x) { return activated(dense(x), activation); }

  Activation activation;
  nn::Linear dense{nullptr};
};

struct Layer : torch::nn::Module {
  explicit Layer(const BertConfig& c) {
    attention = register_module("attention", std::make_shared<Attention>(c));
    intermediate = register_module("intermediate", std::make_shared<Intermediate>(c));
    output = register_module("output", std::make_shared<ResidualOutput>(c, c.intermediate));
  }

  Tensor forward(const Tensor& x, const Sequences& sequences) {
    const Tensor attended = attention->forward(x, sequences);
    return output->forward(intermediate->forward(attended), attended);
  }

  std::shared_ptr<Attention> attention;
  std::shared_ptr<Intermediate> intermediate;
  std::shared_ptr<ResidualOutput> output;
};

struct Encoder : torch::nn::Module {
  explicit Encoder(const BertConfig& c) {
    layers = register_module("layer", torch::nn::ModuleList());
    for (int64_t i = 0; i < c.layers; ++i) layers->push_back(std::make_shared<Layer>(c));
  }

  Tensor forward(Tensor x, const Sequences& sequences) {
    for (const auto& layer : *layers) x = layer->as<Layer>()->forward(x, sequences);
    return x;
  }

  torch::nn::ModuleList layers;
};

class Bert : public TextModel {
 public:
  explicit Bert(const BertConfig& config) : config_(config) {
    embeddings_ = register_module("embeddings", std::make_shared<Embeddings>(config));
    encoder_ = register_module("encoder", std::make_shared<Encoder>(config));
  }

  Tensor forward(const TokenBatch& batch) override {
    const Sequences sequences(batch, config_.positions);
    return encoder_->forward(embeddings_->forward(batch.tokens, sequences), sequences);
  }
  std::string settings() const override {
    return nlohmann::json{{"num_attention_heads", config_.heads.queries},
                          {"layer_norm_eps", config_.epsilon},
                          {"hidden_act", to_string(config_.activation)}}
        .dump();
  }
  // The norms come after the residuals, so that the next residual reads them as well: no factor can
  // be folded into them.
  std::vector<SmoothingGroup> smoothing_groups() override {
    std::vector<SmoothingGroup> groups;
    for (int64_t i = 0; i < config_.layers; ++i) {
      const std::string name = concat("encoder.layer.", i), self = name + ".attention.self.";
      const auto* layer = encoder_->layers[i]->as<Layer>();
      groups.push_back(free_group({self + "query", self + "key", self + "value"}));
      groups.push_back(linear_group(self + "value", layer->attention->self->value,
                                    name + ".attention.output.dense"));
      groups.push_back(free_group({name + ".intermediate.dense"}));
      groups.push_back(activation_group(name + ".intermediate.dense", layer->intermediate->dense,
                                        config_.activation, name + ".output.dense"));
    }
    return groups;
  }
  int64_t vocabulary() const override { return config_.vocabulary; }
  int64_t max_length() const override { return config_.positions; }

 private:
  BertConfig config_;
  std::shared_ptr<Embeddings> embeddings_;
  std::shared_ptr<Encoder> encoder_;
};

void check(const nlohmann::json& json, const TensorShapes& shapes) {
  const BertConfig config = read_config(json);
  const ShapeCheck check(shapes);
  const Dimension vocabulary{"vocab_size", config.vocabulary}, hidden{"hidden_size", config.hidden},
      positions{"max_position_embeddings", config.positions},
      types{"type_vocab_size", config.types},
      intermediate{"intermediate_size", config.intermediate};
  check.tensor("embeddings.word_embeddings.weight", {vocabulary, hidden});
  check.tensor("embeddings.position_embeddings.weight", {positions, hidden});
  check.tensor("embeddings.token_type_embeddings.weight", {types, hidden});
  check.norm("embeddings.LayerNorm", hidden);
  check.layers("encoder.layer", {"num_hidden_layers", config.layers});
  for (int64_t i = 0; i < config.layers; ++i) {
    const std::string layer = concat("encoder.layer.", i);
    for (const char* name : {".attention.self.query", ".attention.self.key",
                             ".attention.self.value", ".attention.output.dense"})
      check.linear(layer + name, hidden, hidden);
    check.norm(layer + ".attention.output.LayerNorm", hidden);
    check.linear(layer + ".intermediate.dense", intermediate, hidden);
    check.linear(layer + ".output.dense", hidden, intermediate);
    check.norm(layer + ".output.LayerNorm", hidden);
  }
}

}  // namespace

std::shared_ptr<TextModel> make_bert(const nlohmann::json& config) {
  return std::make_shared<Bert>(read_config(config));
}

Family bert_family() {
  Family family;
  family.architecture = "BertModel";
  family.make = make_bert;
  family.check = check;
  family.parameter_name = [](const std::string& stored) {
    return stored.starts_with("bert.") ? stored.substr(5) : stored;  // what heads put before
  };
  family.unused = [](const std::string& name) {
    return name.starts_with("pooler.") || name == "embeddings.position_ids" ||
           name.starts_with("cls.") || name.starts_with("classifier.");
  };
  return family;
}

}  // namespace vernier
