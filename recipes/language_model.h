// How well a causal language model predicts text, and how far its predictions are from another's.
#pragma once

#include <vernier/recipes/models/causal_lm.h>
#include <vernier/recipes/token_dataset.h>

#include <cstdint>
#include <functional>

namespace vernier {

/// A sum over tokens.
struct TokenSum {
  double sum = 0;
  int64_t tokens = 0;

  double mean() const { return sum / static_cast<double>(tokens); }
  TokenSum& operator+=(const TokenSum& other);
};

/// Negative log-likelihoods, in nats, of all tokens of a batch but each sequence's first, from its
/// hidden states (CausalLanguageModel::forward). Log-probabilities are float32 whatever the model's
/// dtype, and summed in float64; logits are made some rows at a time, so that memory does not grow
/// with the batch times the vocabulary.
TokenSum next_token_loss(CausalLanguageModel& model, const torch::Tensor& hidden,
                         const TokenBatch& batch);

/// Kullback-Leibler divergences, in nats, of the model's next-token distributions from the
/// reference's: sum of p (log p - log q), p the reference's, for every row of the hidden states of
/// both. Numbers and memory as next_token_loss().
TokenSum logits_divergence(CausalLanguageModel& model, const torch::Tensor& hidden,
                           CausalLanguageModel& reference, const torch::Tensor& reference_hidden);

/// exp of the mean negative log-likelihood of the data in the model's present mode. The first token
/// of each sample is not scored. `progress` is called with the number of samples so far. Throws
/// Error as TokenDataset::read, when no token can be scored, and when the result is NaN.
double perplexity(CausalLanguageModel& model, const TokenDataset& data, int64_t batch_size,
                  const std::function<void(int64_t samples)>& progress = nullptr);

/// Mean divergence (logits_divergence) of every token of the data, each model in its present mode.
/// Throws Error as perplexity(), and when the vocabularies differ.
double logits_kl(CausalLanguageModel& model, CausalLanguageModel& reference,
                 const TokenDataset& data, int64_t batch_size,
                 const std::function<void(int64_t samples)>& progress = nullptr);

/// A batch of about 8192 tokens, or fewer samples where they are few: what a run over a causal
/// model's data takes at a time unless it is told.
int64_t default_batch_size(const TokenDataset& data);

}  // namespace vernier
