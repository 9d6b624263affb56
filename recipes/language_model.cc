#include <vernier/kernels/error.h>
#include <vernier/recipes/language_model.h>

#include <algorithm>
#include <cmath>

namespace vernier {
namespace {

using torch::Tensor;

constexpr int64_t kBatchTokens = 8192;
constexpr int64_t kChunkLogits = int64_t{1} << 24;  // 64 MiB of float32

// Calls f(first, count) for all rows, as many at a time as their logits may take memory.
template <typename F>
void for_each_chunk(int64_t rows, int64_t vocabulary, const F& f) {
  const int64_t chunk = std::max<int64_t>(1, kChunkLogits / vocabulary);
  for (int64_t first = 0; first < rows; first += chunk) f(first, std::min(chunk, rows - first));
}

Tensor log_probabilities(CausalLanguageModel& model, const Tensor& hidden) {
  return model.logits(hidden).to(torch::kFloat).log_softmax(-1);
}

Tensor zero_sum(const Tensor& hidden) {
  return torch::zeros({}, hidden.options().dtype(torch::kDouble));
}

double mean_of(const TokenSum& sum, const TokenDataset& data, const char* what) {
  VERNIER_CHECK(sum.tokens > 0, data.name(), " holds no token to score: samples need two or more");
  const double mean = sum.mean();
  VERNIER_CHECK(!std::isnan(mean), "the ", what, " on ", data.name(),
                " is not a number: the model's logits hold NaN or infinite values");
  return mean;
}

}  // namespace

TokenSum& TokenSum::operator+=(const TokenSum& other) {
  sum += other.sum;
  tokens += other.tokens;
  return *this;
}

TokenSum next_token_loss(CausalLanguageModel& model, const Tensor& hidden,
                         const TokenBatch& batch) {
  const torch::NoGradGuard no_grad;
  // Rows whose next token is in the same sequence: all but each sequence's last.
  std::vector<Tensor> rows;
  const Tensor all = torch::arange(batch.tokens.numel(), torch::kLong);
  int64_t first = 0;
  for (const int64_t length : batch.lengths) {
    rows.push_back(all.narrow(0, first, length - 1));
    first += length;
  }
  const Tensor scored = torch::cat(rows).to(hidden.device());
  const Tensor sum = zero_sum(hidden);
  for_each_chunk(scored.numel(), model.vocabulary(), [&](int64_t begin, int64_t count) {
    const Tensor row = scored.narrow(0, begin, count);
    const Tensor next = batch.tokens.index_select(0, row + 1).unsqueeze(1);
    const Tensor likelihood = log_probabilities(model, hidden.index_select(0, row)).gather(1, next);
    sum.sub_(likelihood.sum(torch::kDouble));
  });
  return {sum.item<double>(), scored.numel()};
}

TokenSum logits_divergence(CausalLanguageModel& model, const Tensor& hidden,
                           CausalLanguageModel& reference, const Tensor& reference_hidden) {
  const torch::NoGradGuard no_grad;
  VERNIER_CHECK(model.vocabulary() == reference.vocabulary(),
                "the models' vocabularies differ: ", model.vocabulary(), " and ",
                reference.vocabulary(), " tokens");
  const Tensor sum = zero_sum(hidden);
  for_each_chunk(hidden.size(0), model.vocabulary(), [&](int64_t begin, int64_t count) {
    const Tensor exact = log_probabilities(reference, reference_hidden.narrow(0, begin, count));
    const Tensor found = log_probabilities(model, hidden.narrow(0, begin, count));
    // A token that both rule out (log 0 - log 0) adds nothing.
    const Tensor divergence = at::where(exact.isneginf(), 0, exact.exp() * (exact - found));
    sum.add_(divergence.sum(-1).sum(torch::kDouble));
  });
  return {sum.item<double>(), hidden.size(0)};
}

double perplexity(CausalLanguageModel& model, const TokenDataset& data, int64_t batch_size,
                  const std::function<void(int64_t)>& progress) {
  const torch::NoGradGuard no_grad;
  TokenSum loss;
  int64_t done = 0;
  for_each_batch(model, data, batch_size,
                 [&](const TokenBatch& batch, const std::vector<int64_t>&) {
                   if (batch.longest() > 1)
                     loss += next_token_loss(model, model.forward(batch, nullptr), batch);
                   done += batch.size();
                   if (progress) progress(done);
                 });
  return std::exp(mean_of(loss, data, "perplexity"));
}

double logits_kl(CausalLanguageModel& model, CausalLanguageModel& reference,
                 const TokenDataset& data, int64_t batch_size,
                 const std::function<void(int64_t)>& progress) {
  const torch::NoGradGuard no_grad;
  TokenSum divergence;
  int64_t done = 0;
  for_each_batch(model, data, batch_size,
                 [&](const TokenBatch& batch, const std::vector<int64_t>&) {
                   divergence += logits_divergence(model, model.forward(batch, nullptr), reference,
                                                   reference.forward(batch, nullptr));
                   done += batch.size();
                   if (progress) progress(done);
                 });
  return mean_of(divergence, data, "divergence");
}

int64_t default_batch_size(const TokenDataset& data) {
  return std::max<int64_t>(1, kBatchTokens / data.longest_row());
}

}  // namespace vernier
