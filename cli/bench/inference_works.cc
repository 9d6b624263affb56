// Language models at work: the forward that reads a prompt, in bfloat16 and with integer products.
#include <torch/torch.h>
#include <vernier/cli/bench/work.h>
#include <vernier/kernels/error.h>
#include <vernier/recipes/models/causal_lm.h>
#include <vernier/recipes/models/family.h>
#include <vernier/recipes/models/llama.h>
#include <nlohmann/json.hpp>

#include <memory>

namespace vernier::bench {
namespace {

using torch::Tensor;

// The shape of Llama 3.2 1B, or on the CPU one that is small enough to wait for.
nlohmann::json llama_config(bool small) {
  nlohmann::json config = {{"hidden_size", 2048},
                           {"intermediate_size", 8192},
                           {"num_hidden_layers", 16},
                           {"num_attention_heads", 32},
                           {"num_key_value_heads", 8},
                           {"head_dim", 64},
                           {"vocab_size", 128256},
                           {"max_position_embeddings", 131072},
                           {"rms_norm_eps", 1e-5},
                           {"rope_theta", 500000.0},
                           {"rope_scaling",
                            {{"rope_type", "llama3"},
                             {"factor", 32.0},
                             {"low_freq_factor", 1.0},
                             {"high_freq_factor", 4.0},
                             {"original_max_position_embeddings", 8192}}},
                           {"tie_word_embeddings", true}};
  if (small)
    config.update({{"hidden_size", 128},
                   {"intermediate_size", 256},
                   {"num_hidden_layers", 2},
                   {"num_attention_heads", 4},
                   {"num_key_value_heads", 2},
                   {"head_dim", 32},
                   {"vocab_size", 512}});
  return config;
}

using SharedModel = std::shared_ptr<CausalLanguageModel>;

// In bfloat16 on the device, without parameters in the host's memory; those of `shared`, or drawn
// as models begin.
SharedModel make_model(const nlohmann::json& config, torch::Device device,
                       const SharedModel& shared = nullptr) {
  const nn::Uninitialized parameters(torch::dtype(torch::kBFloat16).device(device));
  const auto model =
      std::dynamic_pointer_cast<CausalLanguageModel>(llama_families().front().make(config));
  const torch::NoGradGuard no_grad;
  model->eval();
  model->to(device, torch::kBFloat16);
  for (auto& parameter : model->named_parameters()) {
    Tensor& value = parameter.value();
    if (shared) {
      value.set_data(shared->named_parameters()[parameter.key()]);
    } else if (value.dim() > 1) {
      value.normal_(0, 0.02);
    }
  }
  return model;
}

// Eight bits: weights a scale a channel, activations one scale each or a scale a token.
void quantize(CausalLanguageModel& model, const TokenBatch& sample, bool per_token) {
  const Scheme dynamic{.granularity = Granularity::per_token, .dynamic = true};
  const auto layers = quantized_layers(model);
  for (const auto& [name, layer] : layers) {
    layer->input_quantizer->set_settings({per_token ? dynamic : symmetric_scheme(8), {}});
    QuantizerImpl& weight = *layer->weight_quantizer;
    const Tensor largest = layer->float_weight().abs().amax(1).to(torch::kFloat);
    weight.set_scale(largest / static_cast<double>(weight.scheme().qmax()), std::nullopt);
  }
  if (!per_token) {
    set_mode(model, Mode::observe);
    model.forward(sample);
    for (const auto& [name, layer] : layers)
      layer->input_quantizer->calibrate(layer->input_quantizer->observer().statistics());
  }
  set_mode(model, Mode::integer);
}

// m prompts of k tokens each; the logits of every prompt's last token.
Case prepare_prefill(const Place& place, Shape shape) {
  const nlohmann::json config = llama_config(!place.cuda());
  VERNIER_CHECK(shape.k <= config["max_position_embeddings"].get<int64_t>() &&
                    shape.m * shape.k <= int64_t{1} << 22,
                "prefill takes --shape MxK of M prompts of K tokens, at most 131072 each and 2^22 "
                "in all, not ",
                shape.str());
  const SharedModel plain = make_model(config, place.device);
  TokenBatch batch;
  batch.tokens = torch::randint(plain->vocabulary(), {shape.m * shape.k},
                                torch::dtype(torch::kLong).device(place.device));
  batch.lengths.assign(static_cast<size_t>(shape.m), shape.k);
  TokenBatch sample;
  sample.lengths = {std::min<int64_t>(shape.k, 512)};
  sample.tokens = batch.tokens.narrow(0, 0, sample.lengths[0]);

  const auto prefill = [batch, shape](const SharedModel& model) {
    return [=](int64_t) -> Tensors {
      const torch::NoGradGuard no_grad;
      const Tensor hidden = model->forward(batch).view({shape.m, shape.k, -1});
      return {model->logits(hidden.select(1, shape.k - 1))};
    };
  };
  const Run expected = prefill(plain);
  Case c;
  c.launched = true;
  c.tokens = static_cast<double>(shape.m) * static_cast<double>(shape.k);
  double weights = 0;  // of the layers
  for (const auto& [name, layer] : quantized_layers(*plain))
    weights += static_cast<double>(layer->float_weight().numel());
  // Half of the pairs of tokens, twice: scores and mixing.
  const double attention = config["num_hidden_layers"].get<double>() *
                           config["num_attention_heads"].get<double>() *
                           config["head_dim"].get<double>() * static_cast<double>(shape.k);
  c.operations = 2 * c.tokens * (weights + attention);

  const auto finite = [](const Tensors& logits) {
    return logits[0].isfinite().all().item<bool>() ? "" : "the logits are not finite";
  };
  c.implementations.push_back({"bf16", expected, finite, {}});
  // Eight bits are near enough to none to see the same function.
  const auto near = [expected](const Tensors& logits) -> std::string {
    const Tensor exact = expected(0)[0].to(torch::kFloat);
    const double apart = (logits[0].to(torch::kFloat) - exact).norm().item<double>();
    const double length = exact.norm().item<double>();
    if (apart <= 0.2 * length) return "";
    return concat("the logits are ", apart / length, " of their length away from bf16's");
  };
  for (const bool per_token : {false, true}) {
    const SharedModel model = make_model(config, place.device, plain);
    const torch::NoGradGuard no_grad;
    quantize(*model, sample, per_token);
    c.implementations.push_back(
        {per_token ? "vernier, per token" : kVernier, prefill(model), near, {}});
  }
  return c;
}

}  // namespace

std::vector<Work> inference_works() {
  return {{"prefill", "", "bf16", {{8, 2048}}, {{4, 512}}, {{2, 32}}, false, prepare_prefill}};
}

}  // namespace vernier::bench
