#include <torch/utils.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/rotary.h>
#include <vernier/recipes/models/blocks.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>
#include <numeric>

namespace vernier {

using torch::Tensor;

namespace {

// Numbers of the host on a device, without making the host wait.
Tensor on_device(const std::vector<int64_t>& values, torch::Device device) {
  const Tensor host = torch::tensor(values, torch::kLong);
  if (!device.is_cuda()) return host.to(device);
  return host.pin_memory().to(device, /*non_blocking=*/true);
}

}  // namespace

// ---- Configurations -----------------------------------------------------------------------------

void require_plain_decoder(const ConfigReader& config) {
  for (const char* field : {"is_encoder_decoder", "add_cross_attention"})
    config.require(field, false);
  VERNIER_CHECK(!config.has("quantization_config"),
                "quantization_config: the checkpoint is quantized already; give the one that it "
                "was made from");
  // Other families' fields that would change the function, were they meant.
  for (const char* field : {"clip_qkv", "attn_logit_softcapping", "final_logit_softcapping"})
    VERNIER_CHECK(!config.has(field), field, " is not implemented");
  for (const char* field : {"embedding_multiplier", "attention_multiplier", "residual_multiplier",
                            "logits_scaling", "logit_scale"})
    config.require(field, 1);
}

// ---- Sequences ----------------------------------------------------------------------------------

Sequences::Sequences(const TokenBatch& batch, int64_t positions, KeyValueCache* used_cache)
    : count(batch.size()),
      longest(batch.longest()),
      past(used_cache ? used_cache->length() : 0),
      equal(batch.equal_lengths()),
      cache(used_cache) {
  VERNIER_CHECK(past + longest <= positions, "a sequence of ", past + longest,
                " tokens is longer than the model's ", positions, " positions");
  if (cache) {
    VERNIER_CHECK(equal && count == cache->sequences(), "a cache of ", cache->sequences(),
                  " sequences takes as many, of equal lengths");
    VERNIER_CHECK(past + longest <= cache->capacity(), "the cache has room for ", cache->capacity(),
                  " tokens, not for ", past + longest);
  }
  if (equal) return;
  std::vector<int64_t> positions_of, places;
  for (int64_t s = 0; s < count; ++s)
    for (int64_t i = 0; i < batch.lengths[s]; ++i) {
      positions_of.push_back(i);
      places.push_back(s * longest + i);
    }
  position = on_device(positions_of, batch.tokens.device());
  place = on_device(places, batch.tokens.device());
}

Tensor Sequences::rows_of(const Tensor& table) const {
  return equal ? table.narrow(0, past, longest) : table.index_select(0, position);
}

Tensor Sequences::add_rows(const Tensor& x, const Tensor& table) const {
  const Tensor rows = rows_of(table);
  return equal ? (x.view({count, longest, -1}) + rows).view_as(x) : x + rows;
}

// ---- Embeddings ---------------------------------------------------------------------------------

torch::nn::Embedding embedding(int64_t rows, int64_t size) {
  torch::nn::EmbeddingOptions options(rows, size);
  if (const auto& uninitialized = nn::Uninitialized::options())
    options._weight(torch::empty({rows, size}, *uninitialized));
  return torch::nn::Embedding(options);
}

// ---- Norms --------------------------------------------------------------------------------------

RMSNormImpl::RMSNormImpl(int64_t size, double norm_epsilon) : epsilon(norm_epsilon) {
  weight = register_parameter("weight", torch::ones({size}));
}

Norm norm_of(const torch::nn::LayerNorm& layer_norm) {
  return {layer_norm->weight, layer_norm->bias, layer_norm->options.eps(), /*centered=*/true};
}

// ---- Rotary embeddings --------------------------------------------------------------------------

nlohmann::json RotarySettings::json() const {
  nlohmann::json result = {{"theta", theta}, {"size", size}};
  if (scaling.kind != RotaryScaling::Kind::none) result["factor"] = scaling.factor;
  if (scaling.kind == RotaryScaling::Kind::llama3)
    result["llama3"] = {scaling.low_frequency, scaling.high_frequency, scaling.original_positions};
  return result;
}

RotarySettings read_rotary(const ConfigReader& config, int64_t head_size, const char* theta_field,
                           const char* factor_field, double default_factor) {
  const bool is_new = config.has("rope_parameters");
  const char* field = is_new ? "rope_parameters" : "rope_scaling";
  VERNIER_CHECK(!is_new || !config.has("rope_scaling"),
                "there are both rope_parameters and rope_scaling: leave one of them out");
  const nlohmann::json json = config.object(field);
  const ConfigReader parameters(json);
  RotarySettings result;
  RotaryScaling& scaling = result.scaling;
  try {
    result.theta = parameters.number("rope_theta", config.number(theta_field, result.theta));
    const double factor =
        parameters.number("partial_rotary_factor", config.number(factor_field, default_factor));
    VERNIER_CHECK(factor <= 1, factor_field, " must be at most 1, not ", factor);
    result.size = static_cast<int64_t>(static_cast<double>(head_size) * factor);
    VERNIER_CHECK(result.size % 2 == 0 && result.size > 0, factor_field, " ", factor, " rotates ",
                  result.size, " of a head's ", head_size, " dimensions: an even number is needed");
    const char* kind = parameters.has("rope_type") ? "rope_type" : "type";
    const std::string name = parameters.one_of(kind, {"default", "linear", "llama3"}, "default");
    std::vector<std::string> known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"};
    if (name != "default") {
      VERNIER_CHECK(parameters.has("factor"), "the field 'factor' is missing");
      scaling.kind = name == "linear" ? RotaryScaling::Kind::linear : RotaryScaling::Kind::llama3;
      scaling.factor = parameters.number("factor", 1);
      known.push_back("factor");
    }
    if (name == "llama3") {
      for (const char* needed : {"low_freq_factor", "high_freq_factor"})
        VERNIER_CHECK(parameters.has(needed), "the field '", needed, "' is missing");
      scaling.low_frequency = parameters.number("low_freq_factor", 1);
      scaling.high_frequency = parameters.number("high_freq_factor", 4);
      VERNIER_CHECK(scaling.high_frequency > scaling.low_frequency,
                    "high_freq_factor must be greater than low_freq_factor");
      // A field of its own goes before, and the positions stand in for it, as in transformers.
      const char* original = "original_max_position_embeddings";
      scaling.original_positions =
          config.has(original) ? config.size(original)
                               : parameters.size(original, config.size("max_position_embeddings"));
      known.push_back("low_freq_factor");
      known.push_back("high_freq_factor");
    }
    known.push_back("original_max_position_embeddings");  // says nothing in the other kinds
    for (const auto& [key, value] : json.items())
      VERNIER_CHECK(std::find(known.begin(), known.end(), key) != known.end() || value.is_null(),
                    "the field '", key, "' is not implemented for ", kind, " \"", name, "\"");
  } catch (const Error& error) {
    throw Error(concat(json.empty() ? "" : concat(field, ": "), error.what()));
  }
  return result;
}

namespace {

// In float32 step by step as transformers computes them: angles of late positions would show any
// other rounding.
Tensor frequencies(const RotarySettings& settings) {
  const RotaryScaling& scaling = settings.scaling;
  const Tensor exponents =
      torch::arange(0, settings.size, 2, torch::kFloat) / static_cast<double>(settings.size);
  const Tensor inverse = 1.0 / torch::pow(settings.theta, exponents);
  if (scaling.kind == RotaryScaling::Kind::none) return inverse;
  const Tensor stretched = inverse / scaling.factor;
  if (scaling.kind == RotaryScaling::Kind::linear) return stretched;
  const auto original = static_cast<double>(scaling.original_positions);
  const Tensor wavelength = 2 * std::numbers::pi / inverse;
  const Tensor kept = ((original / wavelength - scaling.low_frequency) /
                       (scaling.high_frequency - scaling.low_frequency))
                          .clamp(0, 1);
  return (1 - kept) * stretched + kept * inverse;
}

}  // namespace

Rotary::Angles Rotary::tables(torch::Device device, int64_t positions) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = std::find_if(tables_.begin(), tables_.end(), [&](const Angles& table) {
    return table.cosine.device() == device;
  });
  if (found != tables_.end() && found->cosine.size(0) >= positions) return *found;
  const c10::InferenceMode no_inference(false);  // training may use them as well
  const torch::NoGradGuard no_grad;
  const int64_t rows =
      std::min(positions_, std::max<int64_t>(512, std::bit_ceil(static_cast<uint64_t>(positions))));
  const Tensor angles = torch::arange(rows, torch::kFloat).unsqueeze(1) * frequencies(settings_);
  const Angles made = {angles.cos().to(device), angles.sin().to(device)};
  if (found == tables_.end())
    tables_.push_back(made);
  else
    *found = made;
  return made;
}

Rotary::Angles Rotary::angles(const Sequences& sequences, torch::Device device) {
  const Angles table = tables(device, sequences.past + sequences.longest);
  return {sequences.rows_of(table.cosine), sequences.rows_of(table.sine)};
}

Tensor Rotary::rotate(const Tensor& x, const Angles& angles) {
  if (x.scalar_type() != torch::kDouble) return rotary_embedding(x, angles.cosine, angles.sine);
  // What the kernel does not have.
  const int64_t half = angles.cosine.size(1), copies = x.size(0) / angles.cosine.size(0);
  const auto of_heads = [&](const Tensor& table) { return table.repeat({copies, 1}).unsqueeze(1); };
  const Tensor cosine = of_heads(angles.cosine), sine = of_heads(angles.sine);
  const Tensor first = x.narrow(2, 0, half), second = x.narrow(2, half, half);
  return torch::cat({first * cosine - second * sine, second * cosine + first * sine,
                     x.narrow(2, 2 * half, x.size(2) - 2 * half)},
                    2);
}

// ---- Attention ----------------------------------------------------------------------------------

std::vector<int64_t> Heads::source() const {
  std::vector<int64_t> channels(queries * size);
  for (int64_t i = 0; i < queries * size; ++i)
    channels[i] = i / size / (queries / keys) * size + i % size;
  return channels;
}

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const Heads& heads,
                 const Sequences& sequences, bool causal, int64_t layer) {
  const int64_t count = sequences.count, longest = sequences.longest;
  // Sequences of several lengths are laid out in rows of the longest.
  const auto by_head = [&](const Tensor& x) {
    const Tensor rows = sequences.equal ? x
                                        : x.new_zeros({count * longest, x.size(1), x.size(2)})
                                              .index_copy_(0, sequences.place, x);
    return rows.view({count, longest, x.size(1), x.size(2)}).transpose(1, 2);
  };
  Tensor q = by_head(query), k = by_head(key), v = by_head(value);
  if (sequences.cache) std::tie(k, v) = sequences.cache->append(layer, k, v);
  const int64_t all = k.size(2), shared = heads.queries / heads.keys;

  Tensor mixed;
  if (causal && longest == 1) {
    // The last token sees all: heads that share keys are as good as several queries of one head.
    mixed = torch::scaled_dot_product_attention(q.reshape({count, heads.keys, shared, heads.size}),
                                                k, v)
                .reshape({count, heads.queries, 1, heads.size});
  } else {
    // What lies in the gaps comes after all tokens of a sequence, so that a causal mask hides it.
    std::optional<Tensor> mask;
    if (!causal && !sequences.equal)
      mask = torch::zeros({count * longest}, q.options().dtype(torch::kBool))
                 .index_fill_(0, sequences.place, true)
                 .view({count, 1, 1, longest});
    else if (causal && sequences.past > 0)
      mask = torch::ones({longest, all}, q.options().dtype(torch::kBool)).tril(sequences.past);
    // Kernels of half precision without a mask take shared keys as they are; the others would give
    // way to the slow path.
    const bool native = q.is_cuda() && q.scalar_type() != torch::kFloat && !mask;
    if (shared > 1 && !native) {
      const auto repeat = [&](const Tensor& x) {
        return x.unsqueeze(2)
            .expand({count, heads.keys, shared, all, heads.size})
            .reshape({count, heads.queries, all, heads.size});
      };
      k = repeat(k);
      v = repeat(v);
    }
    mixed = torch::scaled_dot_product_attention(q, k, v, mask, /*dropout_p=*/0.0, causal && !mask,
                                                /*scale=*/std::nullopt, shared > 1 && native);
  }
  const Tensor rows = mixed.transpose(1, 2).reshape({count * longest, heads.queries * heads.size});
  return sequences.equal ? rows : rows.index_select(0, sequences.place);
}

Heads read_heads(const ConfigReader& config, int64_t hidden, const char* hidden_field,
                 const char* heads_field) {
  const int64_t heads = config.size(heads_field);
  VERNIER_CHECK(hidden % heads == 0, hidden_field, " ", hidden, " is not a multiple of ",
                heads_field, " ", heads);
  return {heads, heads, hidden / heads};
}

// ---- Linears, norms and activations -------------------------------------------------------------

nn::Linear make_linear(int64_t in, int64_t out, bool bias) {
  return nn::Linear(torch::nn::LinearOptions(in, out).bias(bias));
}

torch::nn::LayerNorm make_layer_norm(int64_t size, double epsilon) {
  return torch::nn::LayerNorm(torch::nn::LayerNormOptions({size}).eps(epsilon));
}

Activation read_activation(const ConfigReader& config, const char* field, const char* otherwise) {
  const std::string name = config.one_of(
      field, {"relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "silu", "swish"},
      otherwise);
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  return name == "silu" || name == "swish" ? Activation::silu : Activation::gelu_tanh;
}

PlainMlp::PlainMlp(int64_t hidden, int64_t intermediate, Activation between, const char* first_name,
                   const char* second_name)
    : activation(between) {
  first = register_module(first_name, make_linear(hidden, intermediate));
  second = register_module(second_name, make_linear(intermediate, hidden));
  input = LinearGroup({first});
  output = LinearGroup({second});
}

// ---- Smoothing groups ---------------------------------------------------------------------------

SmoothingGroup norm_group(const std::string& name, const std::shared_ptr<torch::nn::Module>& norm,
                          const std::vector<std::string>& readers) {
  return {readers.front(), Producer{name, [norm] { return norm->parameters(); }}, readers, {}};
}

SmoothingGroup linear_group(const std::string& name, const nn::Linear& linear,
                            const std::string& reader, std::vector<int64_t> source, int64_t first,
                            int64_t channels) {
  const auto tensors = [linear, first, channels] {
    std::vector<Tensor> rows;
    for (const Tensor& tensor : {linear->weight, linear->bias})
      if (tensor.defined())
        rows.push_back(tensor.detach().narrow(0, first, channels < 0 ? tensor.size(0) : channels));
    return rows;
  };
  return {reader, Producer{name, tensors}, {reader}, std::move(source)};
}

SmoothingGroup activation_group(const std::string& name, const nn::Linear& linear,
                                Activation activation, const std::string& reader) {
  return activation == Activation::relu ? linear_group(name, linear, reader) : free_group({reader});
}

SmoothingGroup free_group(const std::vector<std::string>& readers) {
  return {readers.front(), std::nullopt, readers, {}};
}

}  // namespace vernier
