#include <torch/cuda.h>
#include <vernier/kernels/error.h>
#include <vernier/recipes/generation.h>
#include <vernier/recipes/token_dataset.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>

namespace vernier {
namespace {

using torch::Tensor;
using Clock = std::chrono::steady_clock;

// Tokens between two looks at whether all texts have ended: each look waits for the device.
constexpr int64_t kStepsPerLook = 16;

double seconds_since(Clock::time_point start, torch::Device device) {
  if (device.is_cuda()) torch::cuda::synchronize(device.index());
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// splitmix64 (Steele et al. 2014): seeds of neighbouring texts have nothing in common.
uint64_t seed_of(uint64_t seed, int64_t text) {
  uint64_t z = seed + 0x9e3779b97f4a7c15u * (static_cast<uint64_t>(text) + 1);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Numbers in [0, 1), float64 [texts, steps]: a row for each text, from its own seed.
Tensor uniform_numbers(uint64_t seed, const std::vector<int64_t>& texts, int64_t steps,
                       torch::Device device) {
  Tensor numbers = torch::empty({static_cast<int64_t>(texts.size()), steps}, torch::kDouble);
  for (size_t i = 0; i < texts.size(); ++i) {
    auto generator = at::detail::createCPUGenerator(seed_of(seed, texts[i]));
    numbers[static_cast<int64_t>(i)].uniform_(0, 1, generator);
  }
  return numbers.to(device);
}

// A token for every row of logits, and whether the row is sound, both on the device.
struct Choice {
  Tensor token;   // int64 [rows]
  Tensor finite;  // bool [rows]
};

// By inversion of the cumulated probabilities, in float64: `uniform` [rows] says which token it is.
Choice choose(const Tensor& logits, const Sampling& sampling, const Tensor& uniform) {
  if (sampling.temperature == 0) {
    const auto [value, token] = logits.max(-1);
    return {token, value.isfinite()};
  }
  Tensor scores = logits.to(torch::kDouble).div_(sampling.temperature);
  Tensor order;  // token of each column, where columns are sorted
  const int64_t vocabulary = scores.size(1);
  if (sampling.top_k > 0 && sampling.top_k < vocabulary) {
    std::tie(scores, order) = scores.topk(sampling.top_k);
  } else if (sampling.top_p < 1) {
    std::tie(scores, order) = scores.sort(-1, /*descending=*/true);
  }
  const Tensor probability = scores.softmax(-1);
  const Tensor cumulated = probability.cumsum(-1);
  Tensor total = cumulated.narrow(1, cumulated.size(1) - 1, 1);
  if (sampling.top_p < 1) {
    const Tensor kept = (cumulated - probability).lt(sampling.top_p);
    total = cumulated.masked_fill(kept.logical_not(), 0).amax(-1, /*keepdim=*/true);
  }
  const Tensor column =
      at::searchsorted(cumulated, uniform.unsqueeze(1) * total, /*out_int32=*/false, /*right=*/true)
          .clamp_max(cumulated.size(1) - 1);
  const Tensor token = order.defined() ? order.gather(1, column) : column;
  return {token.squeeze(1), total.isfinite().squeeze(1)};
}

// How many windows are sampled at a time.
int64_t windows_at_a_time(CausalLanguageModel& model, const WindowOptions& options,
                          torch::Device device) {
  if (options.batch_size > 0) return std::min(options.batch_size, options.count);
  // A step of few windows is bound on a GPU by its launches, whatever the model's size.
  const int64_t most = device.is_cpu() ? 256 : 4096;
  const int64_t cache = model.make_cache(1, 1)->bytes() * options.length;
  const int64_t logits = model.vocabulary() * 6 * static_cast<int64_t>(sizeof(double));
  const int64_t budget = (device.is_cpu() ? int64_t{1} : int64_t{8}) << 30;
  return std::min({std::max<int64_t>(1, budget / (cache + logits)), most, options.count});
}

// Continues texts of one length together.
class Decoder {
 public:
  // Room for `length` tokens of each text.
  Decoder(CausalLanguageModel& model, int64_t texts, int64_t length, const Sampling& sampling,
          CacheFormat cache = CacheFormat::full)
      : model_(model), sampling_(sampling), cache_(model.make_cache(texts, length, cache)) {}

  // Reads the next tokens of every text, int64 [texts, count], and chooses the one after them.
  Tensor next(const Tensor& tokens, const Tensor& uniform) {
    const int64_t texts = tokens.size(0), count = tokens.size(1);
    const TokenBatch batch{tokens.reshape(-1), std::vector<int64_t>(texts, count)};
    const Tensor hidden = model_.forward(batch, cache_.get());
    const Tensor last = hidden.view({texts, count, -1}).select(1, count - 1);
    const Choice choice = choose(model_.logits(last), sampling_, uniform);
    finite_ = finite_.defined() ? finite_ & choice.finite : choice.finite;
    return choice.token;
  }

  // Waits for the device.
  void check_finite() const {
    VERNIER_CHECK(finite_.all().item<bool>(),
                  "the model's logits hold NaN or infinite values: no token can be chosen; check "
                  "its weights and scales");
  }

 private:
  CausalLanguageModel& model_;
  Sampling sampling_;
  std::shared_ptr<KeyValueCache> cache_;
  Tensor finite_;
};

torch::Device device_of(const TextModel& model) { return model.parameters().front().device(); }

std::vector<std::vector<int64_t>> rows_of(const Tensor& tokens) {
  const Tensor ids = tokens.cpu().contiguous();
  const int64_t* first = ids.const_data_ptr<int64_t>();
  std::vector<std::vector<int64_t>> rows;
  for (int64_t i = 0; i < ids.size(0); ++i)
    rows.emplace_back(first + i * ids.size(1), first + (i + 1) * ids.size(1));
  return rows;
}

void check_prompts(const std::vector<std::vector<int64_t>>& prompts, int64_t max_tokens,
                   const TextModel& model) {
  for (size_t i = 0; i < prompts.size(); ++i) {
    VERNIER_CHECK(!prompts[i].empty(), "prompt ", i, " is empty: give at least one token");
    for (const int64_t id : prompts[i])
      VERNIER_CHECK(id >= 0 && id < model.vocabulary(), "prompt ", i, " holds token id ", id,
                    " outside the model's vocabulary of ", model.vocabulary(),
                    ": use the model's own tokenizer");
    const auto length = static_cast<int64_t>(prompts[i].size());
    VERNIER_CHECK(length <= model.max_length() && max_tokens <= model.max_length() - length,
                  "prompt ", i, " has ", length, " tokens: with ", max_tokens,
                  " new ones that is more than the model's ", model.max_length(),
                  " positions: shorten it, or ask for fewer");
  }
}

}  // namespace

void Sampling::check() const {
  VERNIER_CHECK(temperature >= 0 && std::isfinite(temperature),
                "the temperature must be 0 (the likeliest token) or more, not ", temperature);
  VERNIER_CHECK(top_k >= 0, "top-k must be 0 (all tokens) or more, not ", top_k);
  VERNIER_CHECK(top_p > 0 && top_p <= 1, "top-p must be in (0, 1], not ", top_p);
}

Tensor sample_windows(CausalLanguageModel& model, const WindowOptions& options,
                      const std::function<void(int64_t)>& progress) {
  const torch::NoGradGuard no_grad;
  VERNIER_CHECK(options.count >= 1, "at least one window must be sampled, not ", options.count);
  VERNIER_CHECK(options.length >= 2 && options.length <= model.max_length(),
                "sampled windows must have 2 to ", model.max_length(),
                " tokens (the model's positions), not ", options.length);
  VERNIER_CHECK(options.batch_size >= 0, "the batch size must be 0 (chosen) or more, not ",
                options.batch_size);
  Sampling sampling;
  sampling.temperature = options.temperature;
  sampling.check();
  const torch::Device device = device_of(model);
  Tensor windows = torch::empty({options.count, options.length}, torch::kLong);
  const int64_t batch_size = windows_at_a_time(model, options, device);
  for (int64_t first = 0; first < options.count; first += batch_size) {
    const int64_t texts = std::min(batch_size, options.count - first);
    std::vector<int64_t> indices;
    for (int64_t i = first; i < first + texts; ++i) indices.push_back(i);
    const Tensor uniform =
        uniform_numbers(options.seed, indices, options.length, device).transpose(0, 1).contiguous();
    Decoder decoder(model, texts, options.length - 1, sampling);
    Tensor batch = torch::full({options.length, texts}, model.start_token(),
                               torch::TensorOptions(torch::kLong).device(device));
    for (int64_t step = 1; step < options.length; ++step) {
      batch[step].copy_(decoder.next(batch[step - 1].unsqueeze(1), uniform[step]));
      if (progress) progress(first * options.length + (step + 1) * texts);
    }
    decoder.check_finite();
    windows.narrow(0, first, texts).copy_(batch.transpose(0, 1));
  }
  return windows;
}

Generation generate(CausalLanguageModel& model, const std::vector<std::vector<int64_t>>& prompts,
                    const GenerationOptions& options,
                    const std::function<void(int64_t)>& progress) {
  const torch::NoGradGuard no_grad;
  VERNIER_CHECK(options.max_tokens >= 1, "at least one new token must be asked for, not ",
                options.max_tokens);
  VERNIER_CHECK(options.batch_size >= 1, "the batch size must be at least 1, not ",
                options.batch_size);
  options.sampling.check();
  check_prompts(prompts, options.max_tokens, model);
  const torch::Device device = device_of(model);
  const Tensor stop = torch::tensor(options.stop, torch::kLong).to(device);

  Generation result;
  result.tokens.resize(prompts.size());
  for (const auto& texts : batches_by_length(prompts, options.batch_size)) {
    const auto count = static_cast<int64_t>(texts.size());
    std::vector<std::vector<int64_t>> members;
    for (const int64_t i : texts) members.push_back(prompts[i]);
    const Tensor uniform = uniform_numbers(options.seed, texts, options.max_tokens, device);
    Decoder decoder(model, count, static_cast<int64_t>(members.front().size()) + options.max_tokens,
                    options.sampling, options.cache);

    auto start = Clock::now();
    std::vector<Tensor> chosen = {
        decoder.next(make_batch(members, device).tokens.view({count, -1}), uniform.select(1, 0))};
    result.prefill_seconds += seconds_since(start, device);

    start = Clock::now();
    Tensor ended = at::isin(chosen.back(), stop);
    for (int64_t step = 1; step < options.max_tokens; ++step) {
      if (!options.stop.empty() && step % kStepsPerLook == 0 && ended.all().item<bool>()) break;
      chosen.push_back(decoder.next(chosen.back().unsqueeze(1), uniform.select(1, step)));
      ended.logical_or_(at::isin(chosen.back(), stop));
      if (progress) progress(result.new_tokens + (step + 1) * count);
    }
    decoder.check_finite();
    result.decode_seconds += seconds_since(start, device);
    result.decoded_tokens += (static_cast<int64_t>(chosen.size()) - 1) * count;

    const auto rows = rows_of(torch::stack(chosen, 1));
    for (int64_t i = 0; i < count; ++i) {
      const auto end = std::find_first_of(rows[i].begin(), rows[i].end(), options.stop.begin(),
                                          options.stop.end());
      std::vector<int64_t>& tokens = result.tokens[texts[i]];
      tokens.assign(rows[i].begin(), end == rows[i].end() ? end : end + 1);
      result.new_tokens += static_cast<int64_t>(tokens.size());
      result.prompt_tokens += static_cast<int64_t>(members[i].size());
    }
  }
  return result;
}

std::vector<int64_t> stop_tokens(const TextModel& model) {
  const auto config = nlohmann::json::parse(model.info.config, nullptr, /*allow_exceptions=*/false);
  const auto found = config.is_object() ? config.find("eos_token_id") : config.end();
  if (found == config.end()) return {};
  if (found->is_number_integer()) return {found->get<int64_t>()};
  std::vector<int64_t> tokens;
  if (found->is_array())
    for (const auto& item : *found)
      if (item.is_number_integer()) tokens.push_back(item.get<int64_t>());
  return tokens;
}

}  // namespace vernier
