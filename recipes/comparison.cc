#include <torch/cuda.h>
#include <vernier/export/metrics.h>
#include <vernier/kernels/error.h>
#include <vernier/recipes/comparison.h>
#include <vernier/recipes/language_model.h>

#include <chrono>
#include <cmath>

namespace vernier {
namespace {

using torch::Tensor;

Tensor embeddings_of(TextModel& model, const TokenBatch& batch) {
  return mean_pooling(model.forward(batch), batch);
}

// Cosine similarity of rows 2i and 2i + 1, in float64.
std::vector<double> pair_cosines(const Tensor& embeddings) {
  const Tensor pairs = embeddings.to(torch::kDouble).view({-1, 2, embeddings.size(1)});
  const Tensor cosines =
      at::cosine_similarity(pairs.select(1, 0), pairs.select(1, 1), 1, 1e-12).contiguous();
  const double* values = cosines.const_data_ptr<double>();
  return {values, values + cosines.numel()};
}

// f's result in one mode, and the time it took added to `milliseconds`.
template <typename F>
auto timed(TextModel& model, Mode mode, double& milliseconds, const F& f) {
  const ModeGuard guard(model, mode);
  const auto start = std::chrono::steady_clock::now();
  auto result = f();
  if (const torch::Device device = model.parameters().front().device(); device.is_cuda())
    torch::cuda::synchronize(device.index());
  milliseconds +=
      std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  return result;
}

// The embeddings of all samples in one mode, and the time they took.
struct Run {
  Tensor embeddings;
  double milliseconds = 0;

  void add(TextModel& model, Mode mode, const TokenBatch& batch,
           const std::vector<int64_t>& samples, int64_t total) {
    const Tensor result =
        timed(model, mode, milliseconds, [&] { return embeddings_of(model, batch); });
    if (!embeddings.defined()) embeddings = torch::zeros({total, result.size(1)});
    embeddings.index_copy_(0, torch::tensor(samples, torch::kLong), result.cpu());
  }
};

ModeResult result_of(const Run& run, const Run* reference, const TokenDataset& data,
                     const std::optional<std::vector<double>>& scores) {
  ModeResult result;
  result.ms_per_sample = run.milliseconds / static_cast<double>(data.size());
  if (scores) result.spearman = similarity_spearman(run.embeddings, *scores);
  if (reference) {
    result.sqnr_db = embedding_sqnr(run.embeddings, reference->embeddings);
    if (data.pairs()) result.cosine_error = cosine_error(run.embeddings, reference->embeddings);
  }
  return result;
}

Comparison compare_embeddings(TextModel* reference, TextModel& quantized, const TokenDataset& data,
                              int64_t batch_size, const std::function<void(int64_t)>& progress) {
  Comparison result;
  std::optional<std::vector<double>> scores;
  if (data.pairs()) scores = data.scores();

  Validator validator(quantized);
  Run full, fake_quant, integer;
  // Once without the clock: libraries and memory pools are made ready by the first call.
  bool warm = false;
  int64_t done = 0;
  for_each_batch(quantized, data, batch_size,
                 [&](const TokenBatch& batch, const std::vector<int64_t>& samples) {
                   for (int round = warm ? 1 : 0; round < 2; ++round) {
                     if (!warm && round == 1)
                       full.milliseconds = fake_quant.milliseconds = integer.milliseconds = 0;
                     if (reference) full.add(*reference, Mode::full, batch, samples, data.size());
                     fake_quant.add(quantized, Mode::fake_quant, batch, samples, data.size());
                     integer.add(quantized, Mode::integer, batch, samples, data.size());
                   }
                   warm = true;
                   validator.add([&] { return embeddings_of(quantized, batch); });
                   done += batch.size();
                   if (progress) progress(done);
                 });
  if (reference) {
    VERNIER_CHECK(full.embeddings.size(1) == integer.embeddings.size(1),
                  "the models' hidden sizes differ: ", full.embeddings.size(1), " and ",
                  integer.embeddings.size(1));
    result.full = result_of(full, nullptr, data, scores);
  }
  const Run* exact = reference ? &full : nullptr;
  result.fake_quant = result_of(fake_quant, exact, data, scores);
  result.integer = result_of(integer, exact, data, scores);
  result.validation = validator.report();
  return result;
}

// ---- Causal language models ---------------------------------------------------------------------

// What the batches so far gave in one mode.
struct CausalRun {
  Tensor hidden;  // of the present batch
  TokenSum loss, divergence;
  double signal = 0, noise = 0;  // of the hidden states against the float model's
  double milliseconds = 0;

  void add(CausalLanguageModel& model, Mode mode, const TokenBatch& batch) {
    loss += timed(model, mode, milliseconds, [&] {
      hidden = model.forward(batch, nullptr);
      return batch.longest() > 1 ? next_token_loss(model, hidden, batch) : TokenSum{};
    });
  }

  void hold_against(CausalLanguageModel& reference, const Tensor& exact, CausalLanguageModel& model,
                    Mode mode) {
    const ModeGuard guard(model, mode);
    divergence += logits_divergence(model, hidden, reference, exact);
    const Tensor wanted = exact.to(torch::kDouble);
    signal += wanted.square().sum().item<double>();
    noise += (hidden.to(torch::kDouble) - wanted).square().sum().item<double>();
  }

  ModeResult result(const TokenDataset& data) const {
    ModeResult mode;
    mode.ms_per_sample = milliseconds / static_cast<double>(data.size());
    mode.perplexity = std::exp(loss.mean());
    if (divergence.tokens > 0) {
      mode.kl = divergence.mean();
      mode.sqnr_db = vernier::sqnr_db(signal, noise);
    }
    return mode;
  }
};

Comparison compare_predictions(CausalLanguageModel* reference, CausalLanguageModel& quantized,
                               const TokenDataset& data, int64_t batch_size,
                               const std::function<void(int64_t)>& progress) {
  Validator validator(quantized);
  CausalRun full, fake_quant, integer;
  bool warm = false;
  int64_t done = 0;
  const bool head = !quantized.output_layer().empty();
  for_each_batch(quantized, data, batch_size,
                 [&](const TokenBatch& batch, const std::vector<int64_t>&) {
                   if (!warm) {  // once without the clock, as above
                     CausalRun unused;
                     if (reference) unused.add(*reference, Mode::full, batch);
                     for (const Mode mode : {Mode::fake_quant, Mode::integer})
                       unused.add(quantized, mode, batch);
                     warm = true;
                   }
                   fake_quant.add(quantized, Mode::fake_quant, batch);
                   integer.add(quantized, Mode::integer, batch);
                   if (reference) {
                     full.add(*reference, Mode::full, batch);
                     const ModeGuard exact(*reference, Mode::full);
                     fake_quant.hold_against(*reference, full.hidden, quantized, Mode::fake_quant);
                     integer.hold_against(*reference, full.hidden, quantized, Mode::integer);
                   }
                   validator.add([&] {
                     const Tensor hidden = quantized.forward(batch, nullptr);
                     return head ? quantized.logits(hidden) : hidden;
                   });
                   done += batch.size();
                   if (progress) progress(done);
                 });
  VERNIER_CHECK(integer.loss.tokens > 0, data.name(),
                " holds no token to score: samples need two or more");
  Comparison result;
  if (reference) result.full = full.result(data);
  result.fake_quant = fake_quant.result(data);
  result.integer = integer.result(data);
  result.validation = validator.report();
  return result;
}

}  // namespace

Tensor embed(TextModel& model, const TokenDataset& data, int64_t batch_size,
             const std::function<void(int64_t)>& progress) {
  const torch::NoGradGuard no_grad;
  Tensor embeddings;
  int64_t done = 0;
  for_each_batch(model, data, batch_size,
                 [&](const TokenBatch& batch, const std::vector<int64_t>& samples) {
                   const Tensor result = embeddings_of(model, batch).cpu();
                   if (!embeddings.defined())
                     embeddings = torch::zeros({data.size(), result.size(1)});
                   embeddings.index_copy_(0, torch::tensor(samples, torch::kLong), result);
                   done += batch.size();
                   if (progress) progress(done);
                 });
  return embeddings;
}

double similarity_spearman(const Tensor& embeddings, const std::vector<double>& scores) {
  return 100 * spearman(pair_cosines(embeddings), scores);
}

double cosine_error(const Tensor& embeddings, const Tensor& reference) {
  return mean_absolute_error(pair_cosines(embeddings), pair_cosines(reference));
}

double embedding_sqnr(const Tensor& embeddings, const Tensor& reference) {
  const Tensor exact = reference.to(torch::kDouble);
  const Tensor noise = embeddings.to(torch::kDouble) - exact;
  return sqnr_db(exact.square().sum().item<double>(), noise.square().sum().item<double>());
}

bool Comparison::passed(double output_tolerance) const {
  if (!validation.passed(output_tolerance)) return false;
  if (!integer.perplexity) return true;
  // Written so that NaN does not pass.
  return std::abs(*integer.perplexity - *fake_quant.perplexity) <=
         kPerplexityTolerance * *fake_quant.perplexity;
}

Comparison compare(TextModel* reference, TextModel& quantized, const TokenDataset& data,
                   int64_t batch_size, const std::function<void(int64_t)>& progress) {
  const torch::NoGradGuard no_grad;
  auto* predicting = dynamic_cast<CausalLanguageModel*>(&quantized);
  Comparison result =
      predicting ? compare_predictions(reference ? &causal(*reference, "the comparison") : nullptr,
                                       *predicting, data, batch_size, progress)
                 : compare_embeddings(reference, quantized, data, batch_size, progress);
  result.samples = data.size();
  return result;
}

}  // namespace vernier
