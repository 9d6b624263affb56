#include <torch/nn/functional/linear.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/quantize.h>
#include <vernier/recipes/models/causal_lm.h>
#include <nlohmann/json.hpp>

namespace vernier {

using torch::Tensor;

namespace {

const Scheme kCacheScheme = {.granularity = Granularity::per_token, .dynamic = true};

}  // namespace

std::string to_string(CacheFormat format) { return format == CacheFormat::int8 ? "int8" : "full"; }

CacheFormat cache_format_from_string(const std::string& name) {
  for (const CacheFormat format : {CacheFormat::full, CacheFormat::int8})
    if (name == to_string(format)) return format;
  throw Error(concat("unknown format '", name, "' of a key and value cache: use full or int8"));
}

KeyValueCache::KeyValueCache(int64_t layers, int64_t sequences, int64_t heads, int64_t capacity,
                             int64_t head_size, const torch::TensorOptions& options,
                             CacheFormat format)
    : sequences_(sequences), capacity_(capacity), format_(format) {
  VERNIER_CHECK(sequences >= 1 && capacity >= 1, "a cache needs at least one sequence and one ",
                "token, not ", sequences, " and ", capacity);
  const bool codes = format == CacheFormat::int8;
  for (int64_t i = 0; i < layers; ++i) {
    for (auto* kept : {&keys_, &values_}) {
      kept->push_back({torch::empty({sequences, heads, capacity, head_size},
                                    codes ? options.dtype(torch::kChar) : options),
                       {}});
      if (codes)
        kept->back().scale =
            torch::empty({sequences, heads, capacity}, options.dtype(torch::kFloat));
    }
  }
}

int64_t KeyValueCache::bytes() const {
  int64_t bytes = 0;
  for (const auto* all : {&keys_, &values_})
    for (const Kept& kept : *all)
      bytes += static_cast<int64_t>(kept.rows.nbytes() +
                                    (kept.scale.defined() ? kept.scale.nbytes() : 0));
  return bytes;
}

Tensor KeyValueCache::add(const Kept& kept, const Tensor& added) const {
  const int64_t tokens = added.dim() == 4 ? added.size(2) : 0, total = length_ + tokens;
  VERNIER_CHECK(added.dim() == 4 && added.size(0) == kept.rows.size(0) &&
                    added.size(1) == kept.rows.size(1) && added.size(3) == kept.rows.size(3),
                "keys or values of shape ", added.sizes(), " do not fit a cache of ",
                kept.rows.sizes());
  VERNIER_CHECK(total <= capacity_, "the cache has room for ", capacity_, " tokens, not for ",
                total);
  if (format_ == CacheFormat::full) {
    kept.rows.narrow(2, length_, tokens).copy_(added);
    return kept.rows.narrow(2, 0, total);
  }
  const auto [codes, scale] = quantize_per_token(added, kCacheScheme);
  kept.rows.narrow(2, length_, tokens).copy_(codes);
  kept.scale.narrow(2, length_, tokens).copy_(scale);
  return dequantize(kept.rows.narrow(2, 0, total), kept.scale.narrow(2, 0, total).contiguous(),
                    std::nullopt, kCacheScheme, 0, added.scalar_type());
}

std::pair<Tensor, Tensor> KeyValueCache::append(int64_t layer, const Tensor& keys,
                                                const Tensor& values) {
  const torch::NoGradGuard no_grad;
  VERNIER_CHECK(keys.sizes() == values.sizes(), "keys of shape ", keys.sizes(),
                " and values of shape ", values.sizes(), " are not of the same tokens");
  return {add(keys_.at(layer), keys), add(values_.at(layer), values)};
}

void KeyValueCache::truncate(int64_t length) {
  VERNIER_CHECK(length >= 0 && length <= length_, "the cache holds ", length_, " tokens, not ",
                length);
  length_ = length;
}

void CausalLanguageModel::make_output(const torch::nn::Embedding& embedding,
                                      const std::string& linear_name) {
  embedding_ = embedding;
  output_name_ = linear_name;
  if (linear_name.empty()) return;
  output_ = register_module(
      linear_name,
      nn::Linear(torch::nn::LinearOptions(embedding->options.embedding_dim(), sizes_.vocabulary)
                     .bias(false)));
}

Tensor CausalLanguageModel::logits(const Tensor& hidden) {
  if (output_) return output_->forward(hidden);
  return torch::nn::functional::linear(hidden, embedding_->weight);
}

std::shared_ptr<KeyValueCache> CausalLanguageModel::make_cache(int64_t sequences, int64_t capacity,
                                                               CacheFormat format) const {
  VERNIER_CHECK(capacity <= sizes_.positions, "a cache of ", capacity,
                " tokens is longer than the model's ", sizes_.positions, " positions");
  return std::make_shared<KeyValueCache>(sizes_.layers, sequences, sizes_.key_heads, capacity,
                                         sizes_.head_size, embedding_->weight.options(), format);
}

int64_t CausalLanguageModel::start_token() const {
  const auto config = nlohmann::json::parse(info.config, nullptr, /*allow_exceptions=*/false);
  for (const char* field : {"bos_token_id", "eos_token_id"}) {
    const auto found = config.is_object() ? config.find(field) : config.end();
    if (found == config.end()) continue;
    const nlohmann::json& id = found->is_array() && !found->empty() ? found->front() : *found;
    if (id.is_number_integer() && id >= 0 && id < vocabulary()) return id.get<int64_t>();
  }
  return 0;
}

CausalLanguageModel& causal(TextModel& model, const std::string& what) {
  auto* found = dynamic_cast<CausalLanguageModel*>(&model);
  VERNIER_CHECK(found, what, " needs a causal language model, and ", model.info.architecture,
                " is none");
  return *found;
}

}  // namespace vernier
