// A small transformer-like model with every kind of smoothing group, and outliers to plant in it.
#pragma once

#include <torch/torch.h>
#include <vernier/qat/linear.h>
#include <vernier/smoothquant/search.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace vernier::testing {

/// Tokens [rows] to logits: a norm read by q, k, v; v of two heads read four times by o; a pair
/// through ReLU; and a pair through GELU, where no factor can be folded.
struct Toy : torch::nn::Module {
  static constexpr int64_t kWidth = 16, kHead = 4, kVocabulary = 24;

  explicit Toy(uint64_t seed = 3) {
    torch::manual_seed(seed);
    embedding = register_module("embedding", torch::nn::Embedding(kVocabulary, kWidth));
    norm = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({kWidth})));
    q = register_module("q", nn::Linear(kWidth, kWidth));
    v = register_module("v", nn::Linear(kWidth, 2 * kHead));
    o = register_module("o", nn::Linear(kWidth, kWidth));
    up = register_module("up", nn::Linear(kWidth, 32));
    down = register_module("down", nn::Linear(32, kWidth));
    gelu = register_module("gelu", nn::Linear(kWidth, kWidth));
    last = register_module("last", nn::Linear(kWidth, kWidth));
    head = register_module("head", torch::nn::Linear(kWidth, kVocabulary));
    const torch::NoGradGuard no_grad;
    head->weight *= 4;
    eval();
  }

  torch::Tensor forward(const torch::Tensor& tokens) {
    torch::Tensor x = embedding(tokens);
    const torch::Tensor normed = norm(x);
    const torch::Tensor gate = torch::sigmoid(q(normed));
    // Heads 0 and 1 read the first value head, 2 and 3 the second, each weighed by a number.
    const torch::Tensor values = v(normed).view({-1, 2, 1, kHead}).expand({-1, 2, 2, kHead});
    const torch::Tensor mixed =
        values.reshape({-1, 4, kHead}) * gate.view({-1, 4, kHead}).mean(2, true);
    x = x + o(mixed.reshape({-1, kWidth}));
    x = x + down(torch::relu(up(x)));
    return x + last(torch::gelu(gelu(x)));
  }
  torch::Tensor logits(const torch::Tensor& hidden) { return head(hidden); }

  std::vector<SmoothingGroup> groups() {
    const auto of = [](const char* name, const auto& module) {
      return Producer{name, [module] {
                        return std::vector<torch::Tensor>{module->weight, module->bias};
                      }};
    };
    std::vector<int64_t> source;
    for (int64_t head_index = 0; head_index < 4; ++head_index)
      for (int64_t i = 0; i < kHead; ++i) source.push_back(head_index / 2 * kHead + i);
    return {{"q", of("norm", norm.ptr()), {"q", "v"}, {}},
            {"o", of("v", v.ptr()), {"o"}, source},
            {"down", of("up", up.ptr()), {"down"}, {}},
            {"last", std::nullopt, {"last"}, {}}};
  }

  /// The same function with activations that quantize badly.
  void plant_outliers() {
    const torch::NoGradGuard no_grad;
    for (torch::Tensor& tensor : std::vector<torch::Tensor>{norm->weight, norm->bias})
      tensor[3] *= 60;
    q->weight.select(1, 3) /= 60;
    v->weight.select(1, 3) /= 60;
    up->weight[7] *= 80;
    up->bias[7] *= 80;
    down->weight.select(1, 7) /= 80;
    v->weight[2] *= 40;
    v->bias[2] *= 40;
    for (const int64_t column : {2, 6}) o->weight.select(1, column) /= 40;
  }

  torch::nn::Embedding embedding{nullptr};
  torch::nn::LayerNorm norm{nullptr};
  nn::Linear q{nullptr}, v{nullptr}, o{nullptr}, up{nullptr}, down{nullptr}, gelu{nullptr},
      last{nullptr};
  torch::nn::Linear head{nullptr};
};

/// Settings of all layers: 8 bits, static asymmetric or per token.
inline void set_settings(Toy& toy, bool dynamic, bool symmetric = false) {
  QuantizerSettings inputs;
  inputs.scheme = symmetric ? symmetric_scheme(8) : asymmetric_scheme(8);
  if (dynamic) {
    inputs.scheme = symmetric_scheme(8, Granularity::per_token);
    inputs.scheme.dynamic = true;
  }
  for (const NamedLayer& item : quantized_layers(toy))
    item.layer->input_quantizer->set_settings(inputs);
}

}  // namespace vernier::testing
