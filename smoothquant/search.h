// The search for each group's alpha and clipping: proposed by the layers' own output error, decided
// by how far the quantized model moves from the float model. Labels play no part.
#pragma once

#include <torch/nn/module.h>
#include <torch/types.h>
#include <vernier/smoothquant/groups.h>
#include <nlohmann/json_fwd.hpp>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace vernier {

/// How strongly a group is smoothed and how much of its activations' range is kept.
struct SmoothingChoice {
  std::optional<double> alpha;  ///< none: factors of 1
  /// Shares of the smoothed activation's extremes below and above zero that the codes cover
  /// (Calibrator); both 1 where scales are dynamic.
  double keep_low = 1, keep_high = 1;

  bool operator==(const SmoothingChoice&) const = default;
};

/// Mean distance from the float model: KL divergence of the logits in nats a token, or, where there
/// are no logits, the squared error of the outputs as a share of their energy.
struct SmoothingLoss {
  double proposing = 0;  ///< on the samples that candidates are compared on
  double held_out = 0;   ///< on those that have to agree
};

/// One group in a result.
struct SmoothedGroup {
  std::string name;
  std::vector<std::string> readers;
  bool folded = true;  ///< false: the readers' inputs have a pre_scale
  SmoothingChoice choice;
  /// Squared error of the readers' outputs as a share of their energy, on sampled rows of their
  /// input: without smoothing, by the recipe's calibrator, and as chosen.
  double error_before = 0, error_after = 0;
};

/// What smoothing a model came to.
struct SmoothingResult {
  std::string method;  ///< alpha as it was asked for: "0.5", "auto", "auto-global"
  std::string metric;  ///< "kl" or "output"; "" where nothing was searched
  std::vector<SmoothedGroup> groups;
  SmoothingLoss before;  ///< quantized without smoothing
  SmoothingLoss after;
  /// Loss with one alpha for all groups, on the proposing samples.
  struct Point {
    double alpha;
    double loss;
  };
  std::vector<Point> curve;
  bool refined = false;  ///< whether factors went on from alpha's by gradient descent
  /// Forward passes over all samples that the search took; a step of gradient descent counts as
  /// three over its batch.
  double passes = 0;
};
void to_json(nlohmann::json& json, const SmoothingResult& result);
void from_json(const nlohmann::json& json, SmoothingResult& result);

/// A model and the samples that it is searched on.
struct SearchedModel {
  torch::nn::Module& module;  ///< quantized layers have their settings, and no factors yet
  int64_t proposing = 0;      ///< batches [0, proposing) compare candidates,
  int64_t deciding = 0;       ///< the `deciding` after them have to agree
  /// Output of a batch, [rows, width]: hidden states that `logits` takes, or embeddings.
  std::function<torch::Tensor(int64_t batch)> run;
  /// Logits [rows, vocabulary] of such rows, never quantized; none: outputs are compared as they
  /// are.
  std::function<torch::Tensor(const torch::Tensor& rows)> logits;
};

struct SearchOptions {
  bool per_group = true;  ///< false: one alpha and one clipping for all groups
  /// The search ends when it has taken so many passes a group, before refinement; or when a round
  /// over all groups changed nothing, or after so many rounds.
  double passes_per_group = 18;
  int64_t rounds = 3;
  int64_t sample_rows = 1024;  ///< of each group's input, for the layers' own error
  double least_gain = 1e-3;    ///< share of the loss below which a change is not worth having
  int64_t refine_steps = 100;  ///< of gradient descent on factors and clipping, at most; 0: none
  double refine_rate = 0.01;   ///< its learning rate, of logarithms
  /// What is taken from it is an average over steps, each counting this much less than the next; 0:
  /// the last step alone.
  double refine_average = 0.8;
  std::optional<torch::Dtype> storage;  ///< where the smoothed weights have to be finite
  /// For the float model's log-probabilities; beyond, they are computed anew each time.
  int64_t cache_bytes = int64_t{2} << 30;
  /// Called after every step with all that is needed to go on from there.
  std::function<void(const nlohmann::json& state)> save;
  /// Such a state, from a run over the same model, samples and options; null: from the start.
  const nlohmann::json* resume = nullptr;
  /// Called after every step with a line about it, and how much of the search is behind.
  std::function<void(const std::string& step, double share)> progress;
};

/// Chooses alpha and clipping of every group and leaves the factors folded into the model, layers
/// in mode full and the readers' calibrators set to what was chosen, so that calibrating the model
/// on the same samples quantizes it as the search did.
///
/// One alpha for all groups first, then one for the groups of the same name but for numbers, then
/// group by group until nothing changes. Candidates of a group are ranked by the squared error of
/// its layers' outputs, weights and activations quantized as the recipe says, on sampled rows of
/// the float model's activations; the loss of the best ones and of the nearest steps decides. A
/// change has to lower it on both halves of the samples; of candidates that do about equally well
/// the milder one is taken. Last, all factors and clippings at once go down the gradient of the
/// loss on the proposing samples (straight through the rounding, scales following the factors) for
/// as long as that lowers it on the held-out ones.
///
/// Needs memory for a copy of the smoothed weights, the sampled rows and the outputs of all
/// batches. Throws Error when a half has no batch, outputs are not finite, the state is of another
/// search, and as FoldedFactors.
SmoothingResult search_smoothing(const SearchedModel& model, std::vector<SmoothingGroup> groups,
                                 const SearchOptions& options);

/// The groups that matter: with a reader that is quantized; readers without a producer only if they
/// are.
std::vector<SmoothingGroup> quantized_groups(const torch::nn::Module& model,
                                             std::vector<SmoothingGroup> groups);

}  // namespace vernier
