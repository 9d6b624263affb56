#include <torch/cuda.h>
#include <vernier/export/metrics.h>
#include <vernier/kernels/error.h>
#include <vernier/recipes/comparison.h>

#include <algorithm>
#include <chrono>
#include <map>

namespace vernier {
namespace {

using torch::Tensor;

// Samples are sorted by length within blocks of this many, so that batches need no padding and
// memory stays bounded.
constexpr int64_t kBlockSamples = 8192;

// Calls f(batch, rows) for all samples in batches of equal length; rows are the samples' places in
// the data.
template <typename F>
void for_each_batch(const TextModel& model, const TokenDataset& data, int64_t batch_size,
                    torch::Device device, const F& f) {
  VERNIER_CHECK(batch_size >= 1, "the batch size must be at least 1, not ", batch_size);
  for (int64_t first = 0; first < data.size(); first += kBlockSamples) {
    const auto sequences = data.read(first, std::min(kBlockSamples, data.size() - first),
                                     model.vocabulary(), model.max_length());
    for (const auto& indices : batches_by_length(sequences, batch_size)) {
      std::vector<std::vector<int64_t>> members;
      std::vector<int64_t> rows;
      for (const int64_t i : indices) {
        members.push_back(sequences[i]);
        rows.push_back(first + i);
      }
      f(make_batch(members, device), torch::tensor(rows, torch::kLong));
    }
  }
}

torch::Device device_of(const TextModel& model) { return model.parameters().front().device(); }

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

// The embeddings of all samples in one mode, and the time they took.
struct Run {
  Tensor embeddings;
  double milliseconds = 0;

  void add(TextModel& model, Mode mode, const TokenBatch& batch, const Tensor& rows,
           int64_t total) {
    const ModeGuard guard(model, mode);
    const auto start = std::chrono::steady_clock::now();
    const Tensor result = embeddings_of(model, batch);
    if (result.is_cuda()) torch::cuda::synchronize();
    milliseconds +=
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    if (!embeddings.defined()) embeddings = torch::zeros({total, result.size(1)});
    embeddings.index_copy_(0, rows, result.cpu());
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

}  // namespace

Tensor embed(TextModel& model, const TokenDataset& data, int64_t batch_size,
             const std::function<void(int64_t)>& progress) {
  const torch::NoGradGuard no_grad;
  Tensor embeddings;
  int64_t done = 0;
  for_each_batch(model, data, batch_size, device_of(model),
                 [&](const TokenBatch& batch, const Tensor& rows) {
                   const Tensor result = embeddings_of(model, batch).cpu();
                   if (!embeddings.defined())
                     embeddings = torch::zeros({data.size(), result.size(1)});
                   embeddings.index_copy_(0, rows, result);
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

Comparison compare(TextModel* reference, TextModel& quantized, const TokenDataset& data,
                   int64_t batch_size, const std::function<void(int64_t)>& progress) {
  const torch::NoGradGuard no_grad;
  Comparison result;
  result.samples = data.size();
  std::optional<std::vector<double>> scores;
  if (data.pairs()) scores = data.scores();

  Validator validator(quantized);
  Run full, fake_quant, integer;
  // Once without the clock: libraries and memory pools are made ready by the first call.
  bool warm = false;
  int64_t done = 0;
  for_each_batch(quantized, data, batch_size, device_of(quantized),
                 [&](const TokenBatch& batch, const Tensor& rows) {
                   for (int round = warm ? 1 : 0; round < 2; ++round) {
                     if (!warm && round == 1)
                       full.milliseconds = fake_quant.milliseconds = integer.milliseconds = 0;
                     if (reference) full.add(*reference, Mode::full, batch, rows, data.size());
                     fake_quant.add(quantized, Mode::fake_quant, batch, rows, data.size());
                     integer.add(quantized, Mode::integer, batch, rows, data.size());
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

}  // namespace vernier
