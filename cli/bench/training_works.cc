// Training steps (forward, backward, gradients dropped) of quantized layers beside plain ones, as a
// training loop runs them: launched one by one, the host's share in the time.
#include <torch/torch.h>
#include <vernier/cli/bench/check.h>
#include <vernier/cli/bench/work.h>
#include <vernier/kernels/error.h>
#include <vernier/qat/linear.h>

#include <cmath>
#include <memory>

namespace vernier::bench {
namespace {

using torch::Tensor;

constexpr int64_t kQmax = 127;

// ---- Linear layers ------------------------------------------------------------------------------

// A linear layer without bias and the scales of its operands.
struct Layer {
  torch::nn::Linear plain;
  Tensor input_scale;   // float32 [1]
  Tensor weight_scale;  // float32 [out]

  Layer(int64_t out, int64_t in, torch::Device device)
      : plain(torch::nn::LinearOptions(in, out).bias(false)) {
    plain->to(device, torch::kBFloat16);
    // Normal, as those of trained layers nearly are: the scales clip the one or other of each row.
    const torch::NoGradGuard no_grad;
    plain->weight.normal_(0, 1 / std::sqrt(static_cast<double>(in)));
    weight_scale = plain->weight.detach().abs().amax(1).to(torch::kFloat).mul_(0.9 / kQmax);
  }

  // Clips what is beyond nine tenths of the largest.
  void calibrate(const Tensor& input) {
    input_scale = input.detach().abs().max().to(torch::kFloat).reshape({1}).mul_(0.9 / kQmax);
  }
};

using Layers = std::vector<Layer>;
using SharedLayers = std::shared_ptr<Layers>;
// y = x * weight^T of the layer with this index, somehow quantized.
using LinearFunction = std::function<Tensor(const Tensor& x, size_t layer)>;

LinearFunction plain_layers(const SharedLayers& layers) {
  return [layers](const Tensor& x, size_t i) { return (*layers)[i].plain->forward(x); };
}

// Ours, on the same weights: eight bits, one scale of the input, one a channel of the weight.
struct QuantizedLayers {
  std::vector<nn::Linear> layers;
  Tensors learned;  // scales

  // `inputs` and `weights` say where scales come from.
  QuantizedLayers(const Layers& plain, RangePolicy inputs, RangePolicy weights,
                  TrainedProduct product) {
    for (const Layer& layer : plain) {
      nn::Linear quantized(*layer.plain);
      quantized->trained_product = product;
      const auto set = [&](QuantizerImpl& quantizer, RangePolicy policy, const Tensor& scale) {
        QuantizerSettings settings = quantizer.settings();
        settings.policy = policy;
        quantizer.set_settings(settings);
        if (policy != RangePolicy::following) quantizer.set_scale(scale, std::nullopt);
        if (policy == RangePolicy::learned) learned.push_back(quantizer.scale());
      };
      set(*quantized->input_quantizer, inputs, layer.input_scale);
      set(*quantized->weight_quantizer, weights, layer.weight_scale);
      quantized->set_mode(Mode::fake_quant);
      layers.push_back(quantized);
    }
  }
};

using SharedQuantized = std::shared_ptr<QuantizedLayers>;

LinearFunction quantized_layers(const SharedQuantized& ours) {
  return [ours](const Tensor& x, size_t i) { return ours->layers[i]->forward(x); };
}

// The operations that a layer of ours stands for, one after the other.
LinearFunction composed_layers(const SharedQuantized& ours) {
  return [ours](const Tensor& x, size_t i) {
    nn::LinearImpl& layer = *ours->layers[i];
    return torch::linear(layer.input_quantizer->forward(x),
                         layer.weight_quantizer->forward(layer.weight));
  };
}

// Torch's own operators.
LinearFunction torch_layers(const SharedLayers& layers) {
  auto zeros = std::make_shared<Tensors>();
  for (const Layer& layer : *layers)
    zeros->push_back(torch::zeros_like(layer.weight_scale, torch::kInt));
  return [=](const Tensor& x, size_t i) {
    const Layer& layer = (*layers)[i];
    return torch::linear(
        torch::fake_quantize_per_tensor_affine(x, layer.input_scale, (*zeros)[i].slice(0, 0, 1),
                                               -kQmax, kQmax),
        torch::fake_quantize_per_channel_affine(layer.plain->weight, layer.weight_scale,
                                                (*zeros)[i], 0, -kQmax, kQmax));
  };
}

// ---- Steps --------------------------------------------------------------------------------------

using Forward = std::function<Tensor(const Tensor& x, const LinearFunction& linear)>;

// What all implementations of a case share.
struct Training {
  SharedLayers layers;
  Tensor x, gradient;  // of input and output
  Tensors others;      // parameters beside the layers' weights
  Forward forward;
};

// Forward, backward, and all gradients taken away: {output, gradients of input, weights, others and
// learned scales}.
Run step_of(const std::shared_ptr<const Training>& t, const LinearFunction& linear,
            const Tensors& learned = {}) {
  Tensors leaves = {t->x};
  for (const Layer& layer : *t->layers) leaves.push_back(layer.plain->weight);
  leaves.insert(leaves.end(), t->others.begin(), t->others.end());
  leaves.insert(leaves.end(), learned.begin(), learned.end());
  return [=](int64_t) mutable {
    const at::AutoGradMode with_gradients(true);
    Tensors results = {t->forward(t->x, linear)};
    results[0].backward(t->gradient);
    for (Tensor& leaf : leaves) {
      results.push_back(std::move(leaf.mutable_grad()));
      leaf.mutable_grad().reset();
    }
    return results;
  };
}

// Each result is as near to the composition's as `distance`, relative to its length; the last
// `but_last` are not compared.
std::function<std::string(const Tensors&)> check_against(const Run& composition, double distance,
                                                         size_t but_last = 0) {
  return [=](const Tensors& results) -> std::string {
    const Tensors expected = composition(0);
    for (size_t i = 0; i + but_last < expected.size(); ++i) {
      const Tensor e = expected[i].detach(), y = results.at(i).detach();
      if (!y.sizes().equals(e.sizes()))
        return concat("result ", i, " is ", y.sizes(), ", not ", e.sizes());
      const double apart = (y - e).to(torch::kFloat).norm().item<double>();
      const double length = e.to(torch::kFloat).norm().item<double>();
      if (!(apart <= distance * length))
        return concat("result ", i, " (0: the output, then gradients) is ", apart / length,
                      " of its length away from the composition's");
    }
    return "";
  };
}

// The plain layers, ours in several ways, and torch's operators.
Case case_of(const std::shared_ptr<const Training>& t, double operations) {
  Case c;
  c.operations = operations;
  c.launched = true;
  const auto add = [&](const std::string& name, RangePolicy inputs, RangePolicy weights,
                       TrainedProduct product) {
    const auto ours = std::make_shared<QuantizedLayers>(*t->layers, inputs, weights, product);
    // Codes are multiplied exactly, and without rounding to bfloat16 first; what is left of a
    // scale's gradient, a small difference of large sums, can then be quite another.
    const bool codes = product == TrainedProduct::codes;
    c.implementations.push_back(
        {name,
         step_of(t, quantized_layers(ours), ours->learned),
         check_against(step_of(t, composed_layers(ours), ours->learned), codes ? 0.05 : 0.01,
                       codes ? ours->learned.size() : 0),
         {}});
  };
  constexpr RangePolicy kFrozen = RangePolicy::frozen, kLearned = RangePolicy::learned,
                        kFollowing = RangePolicy::following;
  const Run composition = step_of(t, composed_layers(std::make_shared<QuantizedLayers>(
                                         *t->layers, kFrozen, kFrozen, TrainedProduct::real)));
  c.implementations.push_back({"plain bf16",
                               step_of(t, plain_layers(t->layers)),
                               // Eight bits are near enough to none to see the same function.
                               check_against(composition, 0.5),
                               {}});
  add(kVernier, kFrozen, kFrozen, TrainedProduct::real);
  add("vernier, learned scales", kLearned, kLearned, TrainedProduct::real);
  add("vernier, following weights", kFrozen, kFollowing, TrainedProduct::real);
  add("vernier, int8 forward", kFrozen, kFrozen, TrainedProduct::codes);
  add("vernier, int8 forward, learned", kLearned, kLearned, TrainedProduct::codes);
  add("vernier, int8 forward, following", kFrozen, kFollowing, TrainedProduct::codes);
  c.implementations.push_back(
      {"vernier, one by one", composition, check_against(composition, 0.01), {}});
  c.add("torch fake_quantize", [&] {
    return Implementation{
        "", step_of(t, torch_layers(t->layers)), check_against(composition, 0.05), {}};
  });
  return c;
}

Tensor random_leaf(at::IntArrayRef sizes, const Place& place) {
  return torch::randn(sizes, torch::dtype(torch::kBFloat16).device(place.device))
      .set_requires_grad(true);
}

Case prepare_qat_linear(const Place& place, Shape shape) {
  auto t = std::make_shared<Training>();
  auto layers = std::make_shared<Layers>();
  layers->emplace_back(shape.n, shape.k, place.device);
  t->x = random_leaf({shape.m, shape.k}, place);
  layers->front().calibrate(t->x);
  t->layers = layers;
  t->gradient = random_leaf({shape.m, shape.n}, place).detach();
  t->forward = [](const Tensor& x, const LinearFunction& linear) { return linear(x, 0); };
  return case_of(t, 6.0 * static_cast<double>(shape.m) * static_cast<double>(shape.k) *
                        static_cast<double>(shape.n));
}

// ---- A transformer block ------------------------------------------------------------------------

// Rotary position embedding of [batch, heads, tokens, size].
Tensor rotate(const Tensor& x, const Tensor& cosine, const Tensor& sine) {
  const std::vector<Tensor> halves = x.chunk(2, -1);
  return x * cosine + torch::cat({-halves[1], halves[0]}, -1) * sine;
}

// A block of Llama's kind (Touvron 2023, arXiv 2302.13971; grouped queries as in Llama 3): tokens
// [M, K] in up to four sequences, heads of 64, a key for every four queries, gated MLP of N.
Case prepare_qat_block(const Place& place, Shape shape) {
  constexpr int64_t kHead = 64, kQueriesPerKey = 4;
  enum { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown };
  VERNIER_CHECK(shape.k % (kHead * kQueriesPerKey) == 0,
                "qat_block takes --shape MxKxN where K is ", "a multiple of ",
                kHead * kQueriesPerKey, ", not ", shape.k);
  const int64_t batch = shape.m % 4 == 0 ? 4 : 1, tokens = shape.m / batch;
  const int64_t heads = shape.k / kHead, keys = heads / kQueriesPerKey;
  auto t = std::make_shared<Training>();
  auto layers = std::make_shared<Layers>();
  const auto layer = [&](int64_t out, int64_t in) { layers->emplace_back(out, in, place.device); };
  layer(shape.k, shape.k);
  layer(keys * kHead, shape.k);
  layer(keys * kHead, shape.k);
  layer(shape.k, shape.k);
  layer(shape.n, shape.k);
  layer(shape.n, shape.k);
  layer(shape.k, shape.n);
  double parameters = 0;
  for (const Layer& l : *layers) parameters += static_cast<double>(l.plain->weight.numel());

  t->x = random_leaf({batch, tokens, shape.k}, place);
  t->gradient = random_leaf(t->x.sizes(), place).detach();
  const auto norm_weight = [&] {
    return torch::ones({shape.k}, t->x.options()).set_requires_grad(true);
  };
  const Tensor attention_norm = norm_weight(), mlp_norm = norm_weight();
  t->others = {attention_norm, mlp_norm};
  const auto options = torch::dtype(torch::kFloat).device(place.device);
  const Tensor rates = torch::pow(500000.0, torch::arange(0, kHead, 2, options) / -kHead);
  const Tensor angles = torch::outer(torch::arange(tokens, options), rates).repeat({1, 2});
  const Tensor cosine = angles.cos().to(torch::kBFloat16), sine = angles.sin().to(torch::kBFloat16);
  t->forward = [=](const Tensor& x, const LinearFunction& linear) {
    const auto normed = [&](const Tensor& v, const Tensor& weight) {
      return torch::rms_norm(v, {shape.k}, weight, 1e-5);
    };
    const auto heads_of = [&](const Tensor& v, int64_t count) {
      return v.view({batch, tokens, count, kHead}).transpose(1, 2);
    };
    const Tensor h = normed(x, attention_norm);
    const Tensor q = rotate(heads_of(linear(h, kQuery), heads), cosine, sine);
    const Tensor k = rotate(heads_of(linear(h, kKey), keys), cosine, sine);
    const Tensor v = heads_of(linear(h, kValue), keys);
    const Tensor attended = torch::scaled_dot_product_attention(
        q, k, v, /*attn_mask=*/{}, /*dropout_p=*/0.0, /*is_causal=*/true, /*scale=*/{},
        /*enable_gqa=*/true);
    const Tensor joined = attended.transpose(1, 2).reshape({batch, tokens, shape.k});
    const Tensor between = x + linear(joined, kOutput);
    const Tensor g = normed(between, mlp_norm);
    return between + linear(torch::silu(linear(g, kGate)) * linear(g, kUp), kDown);
  };
  {
    const LinearFunction calibrating = [layers](const Tensor& x, size_t i) {
      (*layers)[i].calibrate(x);
      return (*layers)[i].plain->forward(x);
    };
    const torch::NoGradGuard no_grad;
    t->forward(t->x, calibrating);
  }
  t->layers = layers;
  return case_of(t, 6.0 * static_cast<double>(shape.m) * parameters);
}

}  // namespace

std::vector<Work> training_works() {
  const std::vector<Shape> layers = {{8192, 4096, 14336}, {8192, 4096, 4096}, {2048, 2048, 2048}};
  const std::vector<Shape> block = {{8192, 2048, 8192}};
  return {
      {"qat_linear",
       "",
       "plain bf16",
       layers,
       {layers.back()},
       {{24, 64, 40}},
       false,
       prepare_qat_linear},
      {"qat_block", "", "plain bf16", block, block, {{32, 256, 512}}, false, prepare_qat_block},
  };
}

}  // namespace vernier::bench
