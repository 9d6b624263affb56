// What fine-tuning is told: how long, how fast, on what.
#pragma once

#include <vernier/qat/adamw.h>
#include <vernier/qat/linear.h>

#include <cstdint>
#include <map>
#include <string>

namespace vernier {

/// What products outside the loss are computed in. Weights, scales, moments, residuals, norms and
/// the loss are float32 whatever it is.
enum class TrainingPrecision {
  automatic,  ///< bf16 on a GPU, float32 on a CPU
  bf16,       ///< bfloat16 by autocast; products of the loss in TF32
  tf32,       ///< float32 with TensorFloat-32 products
  float32
};

/// auto, bf16, tf32 or float32.
std::string to_string(TrainingPrecision precision);
/// Throws Error for another name.
TrainingPrecision training_precision_from_string(const std::string& name);

/// Fine-tuning from start to end. A recipe says them under `training:` (docs/recipes.md).
struct FineTuningSettings {
  int64_t steps = 1200;      ///< of the optimizer
  int64_t batch_size = 16;   ///< sequences that run forward and backward at once
  int64_t accumulate = 1;    ///< such batches a step
  int64_t windows = 1024;    ///< sampled from the model where no data is given
  double rate = 3e-4;        ///< peak learning rate of the weights
  double range_rate = 5e-3;  ///< that of learned ranges: a share of themselves (FusedAdamW)
  int64_t warmup = 50;       ///< steps in which the rates rise to their peaks; then along a cosine
  double final_rate = 0.05;  ///< to this share of them
  double logits_weight = 1;  ///< of the KL divergence of the logits; of causal models
  double hidden_weight = 0;  ///< of the squared error of the last hidden states, relative to their
                             ///< mean square; encoders, which have no logits, take 1 for 0
  AdamWSettings adamw;
  TrainingPrecision precision = TrainingPrecision::automatic;
  TrainedProduct product = TrainedProduct::codes;  ///< of linear layers of integers: codes are
                                                   ///< what mode integer multiplies
  uint64_t seed = 0;                               ///< of the order of the data

  // How it is run; of no influence on the result.
  int64_t report_every = 50;  ///< steps between reports, at each of which the host waits
  bool capture = true;        ///< record steps as CUDA graphs where that is possible

  /// Throws Error naming a field that is out of range.
  void check() const;
  /// Fields of influence as text, for comparison.
  std::map<std::string, std::string> described() const;
};

}  // namespace vernier
