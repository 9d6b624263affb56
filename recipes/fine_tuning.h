// Quantization-aware fine-tuning of a whole model: it learns to answer as its float original does.
#pragma once

#include <vernier/qat/session.h>
#include <vernier/recipes/fine_tuning_settings.h>
#include <vernier/recipes/models/causal_lm.h>
#include <vernier/recipes/token_dataset.h>

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace vernier {

/// Where a run of fine-tuning is.
struct FineTuningProgress {
  int64_t step = 0, steps = 0;   ///< done, and in all
  double loss = 0;               ///< mean of the steps since the last report
  double tokens_per_second = 0;  ///< of the same steps
  bool captured = false;         ///< steps are launched from a recording
};

/// Trains a model, quantized, to have the outputs of a reference, mostly itself in full precision:
/// the loss is the mean over all tokens of KL(reference || model) of the next token's distribution
/// (Hinton 2015, arXiv 1503.02531) and, of encoders, the error of the last hidden states. Labels
/// are not needed, so that any token sequences are data, those that the model makes up above all
/// (Liu et al. 2023, LLM-QAT, arXiv 2305.17888).
///
/// The order of the data is drawn from the seed: every sequence once before one comes again. The
/// reference's last hidden states are computed once for all sequences where memory allows, and
/// logits are made and compared a part of the rows at a time. On a GPU whole steps are recorded and
/// launched at once (CapturedStep) where sequences are equally long and no range is averaged over
/// batches. Equal runs on one machine give equal bits.
class FineTuner {
 public:
  /// `model`: a recipe was applied to it and its layers are calibrated; `reference` is in full
  /// precision, on the same device. Both must outlive this, as must `data` nothing. Throws Error
  /// when the models do not fit each other, the data does not fit them, or a setting is out of
  /// range.
  FineTuner(TextModel& model, TextModel& reference, const TokenDataset& data,
            const FineTuningSettings& settings);
  ~FineTuner();
  FineTuner(const FineTuner&) = delete;
  FineTuner& operator=(const FineTuner&) = delete;

  /// Trains until all steps are done, or `report`, called as the settings say and after the last
  /// step, returns false. The model is then in evaluation mode. Throws Error when the loss or a
  /// range is no longer finite.
  void run(const std::function<bool(const FineTuningProgress&)>& report = nullptr);

  /// Steps done.
  int64_t steps() const { return step_; }
  const FineTuningSettings& settings() const { return settings_; }
  /// Why steps could not be recorded though they were to be; "" otherwise.
  const std::string& capture_refusal() const { return refusal_; }

  /// Writes all that the rest of the training depends on (TrainingSession::save), during a report
  /// or after run().
  void save(const std::filesystem::path& path) const;
  /// Takes it back; run() goes on as if it had not been stopped, bit for bit. Throws Error when the
  /// file is missing, damaged, or of another model, recipe, data or settings (says which), and
  /// leaves all as it was then, unless the file is damaged.
  void load(const std::filesystem::path& path);

 private:
  struct Batch {
    TokenBatch tokens;
    torch::Tensor reference;  // its hidden states
  };

  void read_data(const TokenDataset& data);
  void make_schedule();
  void remember_reference();
  bool can_be_captured() const;
  int64_t sequences_a_step() const { return settings_.batch_size * settings_.accumulate; }
  torch::Tensor reference_hidden(const TokenBatch& batch);
  torch::Tensor rows_of(const std::vector<int64_t>& sequences) const;
  Batch batch(int64_t part);
  void train_step();
  void learn_from(const Batch& batch, double rows);
  void add_logits_gradient(const torch::Tensor& hidden, const torch::Tensor& reference, double rows,
                           torch::Tensor& gradient);
  FineTuningProgress look(double seconds, int64_t steps);
  void refresh_following() const;
  std::map<std::string, std::string> identity() const;

  TextModel& model_;
  TextModel& reference_;
  CausalLanguageModel *causal_, *causal_reference_;  // null: encoders
  FineTuningSettings settings_;
  torch::Device device_;
  std::string data_fingerprint_;

  std::vector<int64_t> lengths_, first_;  // of the sequences that are used, one behind the other
  std::vector<int64_t> order_;            // which of them, in the order of training
  bool equal_ = true;                     // whether they are equally long
  double rows_a_step_ = 0;                // if so
  torch::Tensor tokens_;                  // int64 [all tokens]
  torch::Tensor known_;                   // the reference's hidden states of all, or undefined
  double mean_square_ = 1;                // of the reference's hidden states

  std::unique_ptr<TrainingSession> session_;
  std::unique_ptr<FusedAdamW> optimizer_;
  torch::Tensor device_order_, within_, rates_, range_rates_;  // read by steps on the device
  torch::Tensor device_step_;                                  // int64 [1]
  torch::Tensor loss_sum_;                                     // float64 [], since the last report
  int64_t step_ = 0;
  std::string refusal_;
};

}  // namespace vernier
