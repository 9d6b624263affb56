// The one object that a training loop calls: when to calibrate, when to quantize, when to freeze.
#pragma once

#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>
#include <vernier/qat/layer.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace vernier {

/// The schedule, in steps of the optimizer from the start of the session.
struct SessionSettings {
  int64_t calibration_batches = 8;  ///< steps in full precision while observers gather; then every
                                    ///< range is set and fake-quantization begins. 0: the model has
                                    ///< its ranges
  int64_t freeze_observers_at = -1;   ///< from this step on moving averages stay; -1: never
  int64_t freeze_batch_norm_at = -1;  ///< from this step on batch norms use their running
                                      ///< statistics and leave them as they are (Krishnamoorthi
                                      ///< 2018, arXiv 1806.08342, section 3.2.2); -1: never
  int64_t check_every = 0;  ///< steps between looks at the loss and the learned scales, each of
                            ///< which makes the host wait for the GPU; 0: 1 on the CPU, 50 on a GPU
  bool keep_twin = false;   ///< keep the full-precision model as it is at the start, to learn from

  bool operator==(const SessionSettings&) const = default;
};

/// Runs the schedule of quantization-aware training over a model that was prepared (prepare.h).
///
///     vernier::prepare(*model, vernier::load_recipe("qat-w8a8"));
///     torch::optim::AdamW optimizer(model->parameters(), 1e-4);
///     vernier::TrainingSession session(*model);
///     for (auto& batch : *loader) {
///       optimizer.zero_grad();
///       auto loss = loss_of(model->forward(batch.data), batch.target);
///       loss.backward();
///       optimizer.step();
///       session.step(loss);
///     }
///     model->eval();
///     vernier::convert(*model);
///
/// The model must outlive the session. One thread at a time.
class TrainingSession {
 public:
  /// Puts the model into mode observe, or fake_quant where calibration_batches is 0. Throws Error
  /// when the model has no quantized layer, a layer has no scale though nothing is to be
  /// calibrated, a setting is out of range, or the twin is wanted of a model that cannot be cloned.
  explicit TrainingSession(torch::nn::Module& model, const SessionSettings& settings = {});
  ~TrainingSession();
  TrainingSession(const TrainingSession&) = delete;
  TrainingSession& operator=(const TrainingSession&) = delete;

  /// To be called after every step of the optimizer; `loss` is the step's. Throws Error
  ///   when the loss is NaN or infinite: names the first layer whose output was;
  ///   when a layer is given NaN, which its quantizer would hide behind a code: names it;
  ///   when a learned scale has become zero, negative or NaN: names the layer;
  ///   at the end of calibration, when a layer was never reached or saw NaN: names it.
  /// What the loss and the scales were before check_every let it look is not found out.
  void step(const torch::Tensor& loss = {});

  /// Steps done.
  int64_t steps() const { return steps_; }
  /// Whether the model still runs in full precision and is observed.
  bool calibrating() const { return steps_ < settings_.calibration_batches; }
  const SessionSettings& settings() const { return settings_; }

  /// model.train(), after which frozen batch norms still use their running statistics. After
  /// model.train() itself they do so from the next step() on.
  void train();

  /// The twin, in full precision, in evaluation mode and without gradients; for
  /// distillation_loss(). Throws Error when none is kept or it is of another class.
  template <typename Model>
  Model& twin() {
    auto* model = dynamic_cast<Model*>(&twin_module());
    check_twin_type(model != nullptr);
    return *model;
  }

  /// Writes all that the training depends on: parameters and buffers of the model and the twin,
  /// scales, zero points, averages and observers, policies, the schedule and where it is, the
  /// default random generators (CPU and the model's device) and, where given, the optimizer. What
  /// resumes from it goes on as if it had not been stopped, bit for bit, if the batches do. The
  /// file appears whole or not at all. `more` adds what the caller wants to find again.
  void save(const std::filesystem::path& path, const torch::optim::Optimizer* optimizer = nullptr,
            const std::function<void(torch::serialize::OutputArchive&)>& more = nullptr) const;
  /// Takes it back, schedule included, into a model that was made and prepared in the same way.
  /// Throws Error when the file is missing or damaged, is of another architecture or recipe (says
  /// where they differ), or holds an optimizer or a twin and this has none, or the reverse; the
  /// model is then as it was, unless the file is damaged. `more` reads what save()'s added, before
  /// anything is changed, and may throw.
  void load(const std::filesystem::path& path, torch::optim::Optimizer* optimizer = nullptr,
            const std::function<void(torch::serialize::InputArchive&)>& more = nullptr);

 private:
  void begin();
  void start_fake_quant();
  void freeze_observers();
  void set_batch_norm_frozen(bool frozen);
  bool frozen(int64_t at) const { return at >= 0 && steps_ >= at; }
  bool checks_after(int64_t steps) const { return steps % check_every_ == 0; }
  void watch();
  void unwatch();
  void check(const torch::Tensor& loss);
  void write(torch::serialize::OutputArchive& archive,
             const torch::optim::Optimizer* optimizer) const;
  void read(torch::serialize::InputArchive& archive, torch::optim::Optimizer* optimizer,
            const std::function<void(torch::serialize::InputArchive&)>& more);
  torch::nn::Module& twin_module();
  static void check_twin_type(bool fits);

  struct Watched {
    std::string layer;
    torch::Tensor inputs, outputs;  // sums, which NaN and infinities survive; on the device
  };
  struct BatchNorm {
    std::shared_ptr<torch::nn::Module> module;
    std::optional<double> momentum;
  };

  torch::nn::Module& model_;
  SessionSettings settings_;
  std::vector<NamedLayer> layers_;
  std::shared_ptr<torch::nn::Module> twin_;
  std::vector<std::pair<std::shared_ptr<QuantizerImpl>, QuantizerSettings>> initial_settings_;
  std::vector<BatchNorm> batch_norms_;
  std::vector<std::string> architecture_;  // a line for every tensor and layer
  std::vector<std::string> recipe_;        // a line for every quantizer
  int64_t steps_ = 0;
  int64_t check_every_ = 1;
  std::mutex watched_mutex_;
  std::vector<Watched> watched_;  // outputs since the last step, in the order they came
};

/// Cross entropy of the student's distribution under the teacher's, both softened by a temperature,
/// less the teacher's entropy, times the temperature squared (Hinton 2015, arXiv 1503.02531): the
/// mean over rows of KL(teacher || student). Logits [..., classes] of equal shapes; no gradient
/// goes to the teacher.
torch::Tensor distillation_loss(const torch::Tensor& student, const torch::Tensor& teacher,
                                double temperature = 1.0);

/// The learned scales and zero points of a model, for a parameter group of their own: they want a
/// smaller learning rate than the weights, and no weight decay.
std::vector<torch::Tensor> learned_ranges(const torch::nn::Module& model);
/// All other parameters.
std::vector<torch::Tensor> parameters_without_ranges(const torch::nn::Module& model);

}  // namespace vernier
