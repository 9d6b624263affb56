#include <vernier/kernels/error.h>
#include <vernier/recipes/fine_tuning_settings.h>

#include <array>
#include <cmath>

namespace vernier {
namespace {

constexpr std::array<const char*, 4> kPrecisions = {"auto", "bf16", "tf32", "float32"};

}  // namespace

std::string to_string(TrainingPrecision precision) {
  return kPrecisions[static_cast<size_t>(precision)];
}

TrainingPrecision training_precision_from_string(const std::string& name) {
  for (size_t i = 0; i < kPrecisions.size(); ++i)
    if (name == kPrecisions[i]) return static_cast<TrainingPrecision>(i);
  throw Error(concat("unknown precision '", name, "': use auto, bf16, tf32 or float32"));
}

void FineTuningSettings::check() const {
  const auto at_least = [](const char* what, double value, double least) {
    VERNIER_CHECK(std::isfinite(value) && value >= least, what, " must be at least ", least,
                  ", not ", value);
  };
  at_least("steps", static_cast<double>(steps), 1);
  at_least("batch_size", static_cast<double>(batch_size), 1);
  at_least("accumulate", static_cast<double>(accumulate), 1);
  at_least("windows", static_cast<double>(windows), 1);
  at_least("warmup", static_cast<double>(warmup), 0);
  at_least("report_every", static_cast<double>(report_every), 1);
  at_least("lr", rate, 0);
  at_least("scale_lr", range_rate, 0);
  at_least("logits_weight", logits_weight, 0);
  at_least("hidden_weight", hidden_weight, 0);
  at_least("weight_decay", adamw.weight_decay, 0);
  at_least("clip_norm", adamw.clip_norm, 0);
  VERNIER_CHECK(range_rate < 1, "scale_lr is the share by which scales move in a step: below 1, ",
                "not ", range_rate);
  VERNIER_CHECK(final_rate >= 0 && final_rate <= 1, "final_lr must be in [0, 1], not ", final_rate);
  for (const double beta : {adamw.beta1, adamw.beta2})
    VERNIER_CHECK(beta >= 0 && beta < 1, "betas must be in [0, 1), not ", beta);
}

std::map<std::string, std::string> FineTuningSettings::described() const {
  return {{"steps", concat(steps)},
          {"batch_size", concat(batch_size)},
          {"accumulate", concat(accumulate)},
          {"lr", concat(rate)},
          {"scale_lr", concat(range_rate)},
          {"warmup", concat(warmup)},
          {"final_lr", concat(final_rate)},
          {"logits_weight", concat(logits_weight)},
          {"hidden_weight", concat(hidden_weight)},
          {"betas", concat(adamw.beta1, ", ", adamw.beta2)},
          {"epsilon", concat(adamw.epsilon)},
          {"weight_decay", concat(adamw.weight_decay)},
          {"clip_norm", concat(adamw.clip_norm)},
          {"precision", to_string(precision)},
          {"product", product == TrainedProduct::codes ? "codes" : "real"},
          {"seed", concat(seed)}};
}

}  // namespace vernier
