// A quantized model beside the one it was made from: accuracy, fidelity, speed and the proof of its
// integers.
#pragma once

#include <vernier/export/validate.h>
#include <vernier/recipes/models/text_model.h>
#include <vernier/recipes/token_dataset.h>

#include <functional>
#include <optional>
#include <vector>

namespace vernier {

/// Sentence embeddings of all samples, mean-pooled, float32 [samples, hidden] on the CPU, in the
/// model's present mode.
torch::Tensor embed(TextModel& model, const TokenDataset& data, int64_t batch_size,
                    const std::function<void(int64_t done)>& progress = nullptr);

/// 100 x Spearman's rank correlation of the cosine similarities of pairs (rows 2i and 2i + 1) with
/// their scores.
double similarity_spearman(const torch::Tensor& embeddings, const std::vector<double>& scores);

/// Mean |difference| of the cosine similarities of pairs (rows 2i and 2i + 1) in two models.
double cosine_error(const torch::Tensor& embeddings, const torch::Tensor& reference);

/// Signal to quantization noise ratio of embeddings in dB.
double embedding_sqnr(const torch::Tensor& embeddings, const torch::Tensor& reference);

/// What one mode of a model gave.
struct ModeResult {
  std::optional<double> spearman;  ///< x 100; with scores only
  std::optional<double>
      cosine_error;  ///< mean |cosine - float model's cosine|; with pairs and a float model
  std::optional<double> perplexity;  ///< causal language models
  std::optional<double>
      kl;  ///< mean divergence of the next-token distributions from the float model's, in nats
  double sqnr_db = 0;  ///< of the embeddings, or hidden states, against the float model's
  double ms_per_sample = 0;
};

struct Comparison {
  int64_t samples = 0;
  std::optional<ModeResult> full;  ///< the float model, where there is one
  ModeResult fake_quant;
  ModeResult integer;
  ValidationReport validation;

  /// Whether the validation passed (ValidationReport::passed) and, of a causal language model, the
  /// perplexities of its two quantized modes are the same to kPerplexityTolerance.
  bool passed(double output_tolerance) const;
};

/// Largest relative difference of the perplexities of modes integer and fake_quant.
inline constexpr double kPerplexityTolerance = 1e-3;

/// Runs every sample through `quantized` in modes fake_quant and integer and through `reference`
/// (may be null) in full precision, batch by batch in turn, so that the times are of one and the
/// same minutes; then validates the batch (Validator). Embeddings are compared, and of a causal
/// language model the distributions of the next token. Modes are set back. Throws Error when a
/// layer is not calibrated or the models do not fit each other.
Comparison compare(TextModel* reference, TextModel& quantized, const TokenDataset& data,
                   int64_t batch_size, const std::function<void(int64_t done)>& progress = nullptr);

}  // namespace vernier
