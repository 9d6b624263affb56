// A quantizer: a scheme, the scale it has learned or been given, and fake-quantization with it.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>
#include <vernier/calibration/calibrators.h>
#include <vernier/calibration/observer.h>
#include <vernier/kernels/code_tensor.h>
#include <vernier/kernels/linear_training.h>
#include <vernier/kernels/scheme.h>

#include <memory>
#include <optional>
#include <string>

namespace vernier {

/// What becomes of a range once calibration has set it.
enum class RangePolicy {
  frozen,          ///< stays
  moving_average,  ///< goes on following the extremes of every batch, averaged over batches, in
                   ///< training mode (Jacob 2018, arXiv 1712.05877, section 3.1)
  following,       ///< the absolute maximum of the tensor itself, anew in every forward: a weight's
                   ///< scale while the weight is trained. Needs no calibration
  learned          ///< a parameter that the optimizer trains (LSQ, Esser 2020, arXiv 1902.08153;
                   ///< zero points as in LSQ+, Bhalgat 2020, arXiv 2004.09576)
};

/// frozen, moving_average, following or learned.
std::string to_string(RangePolicy policy);
/// Throws Error for another name.
RangePolicy range_policy_from_string(const std::string& name);

/// How one tensor of a layer is quantized and how its range is found.
struct QuantizerSettings {
  Scheme scheme;
  Calibrator calibrator;
  RangePolicy policy = RangePolicy::frozen;
  double averaging = 0.01;  ///< moving_average only: the newest batch's share, in (0, 1]

  /// Throws Error when a field is outside its range or the fields contradict each other: learned
  /// scales are of integer schemes, following ones symmetric and found by min_max, and a dynamic
  /// scheme has no range to keep.
  void check() const;
  bool operator==(const QuantizerSettings&) const = default;
};

/// The same settings with one scale for the whole tensor in place of one a token.
QuantizerSettings for_whole_tensor(QuantizerSettings settings);

/// What a quantizer quantizes: LSQ's gradient scale counts the elements of a weight, but of an
/// activation those of one sample, index of the first axis (Esser 2020, section 2.2).
enum class Operand { activation, weight };

/// Quantizes one tensor of a layer: its input, its weight or its output. The scale is absent until
/// calibration sets it (dynamic and following schemes need none).
///
/// Buffers: `scale` float32 and, for asymmetric schemes, `zero_point` int32, in number as the
/// granularity says (kernels/quantize.h); `average` float32 [2, scales], lower and upper bounds, of
/// moving averages. With policy learned the scale is the parameter `learned_scale`, the zero point
/// the float32 parameter `learned_zero_point`, and the buffers are empty. The parameters are there,
/// of no element, before calibration, and stay the same tensors, so that an optimizer can be made
/// at any time after the policy was set. `pre_scale` float32 [channels] multiplies the values
/// before everything else, or is empty. All follow the module's device and keep their dtype.
class QuantizerImpl : public torch::nn::Cloneable<QuantizerImpl> {
 public:
  /// `axis` is that of per_channel scales.
  explicit QuantizerImpl(const QuantizerSettings& settings = {}, int64_t axis = 0,
                         Operand operand = Operand::activation);

  /// Makes parameters, buffers and observer, empty; for the constructor and clone(), whose copy has
  /// settings and scale but not what was observed.
  void reset() override;

  using torch::nn::Module::to;
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  /// An uncalibrated quantizer leaves no trace in archives, so that those of float models
  /// interchange with torch::nn's.
  bool is_serializable() const override {
    return settings_.scheme.dynamic || scale().numel() > 0 || pre_scale_.numel() > 0;
  }
  /// Archives hold scheme and policy with the scale. Loading takes them over, whatever they were,
  /// and leaves the calibrator. Throws Error when they contradict each other.
  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

  const Scheme& scheme() const { return settings_.scheme; }
  const QuantizerSettings& settings() const { return settings_; }
  int64_t axis() const { return axis_; }
  Operand operand() const { return operand_; }
  /// Changes the settings and forgets the scale; `pre_scale` stays.
  void set_settings(const QuantizerSettings& settings);

  /// Changes the policy and keeps the scale: from learned to frozen the parameters become buffers,
  /// and the other way round. To or from learned an optimizer has to be told.
  void set_policy(RangePolicy policy);

  /// Whether it can quantize: it has a scale or needs none.
  bool calibrated() const { return finds() || scale().numel() > 0; }
  /// Empty where not calibrated or dynamic; of the last tensor where it follows tensors. Where it
  /// is learned, the parameter.
  const torch::Tensor& scale() const { return learns() ? learned_scale_ : scale_; }
  /// int32, of a learned one what is used; absent for symmetric schemes.
  std::optional<torch::Tensor> zero_point() const;
  /// Throws Error when a learned scale has become zero, negative, NaN or infinite, or a zero point
  /// NaN or infinite. Makes the host wait for the GPU; forward() asks on the CPU only.
  void check_learned() const;

  /// float32 [channels] along the last axis, or empty: what values are multiplied by, in float32,
  /// before they are observed or quantized.
  const torch::Tensor& pre_scale() const { return pre_scale_; }
  /// For layers, whose set_pre_scale() also makes their full precision follow; empty takes it off.
  /// Throws Error unless it is float32 of one dimension, finite and positive.
  void set_pre_scale(const torch::Tensor& factors);
  /// The values times `pre_scale`, float32; the values themselves where there is none.
  torch::Tensor pre_scaled(const torch::Tensor& values) const;

  /// Sets the scale from one range (per_tensor) or one per channel, by the scheme.
  /// Throws Error where a range is not finite.
  void set_ranges(const std::vector<Range>& ranges, torch::Device device);
  /// Sets scale and zero point as they are, e.g. from a checkpoint. Throws Error when a scale is
  /// not finite and positive, or a zero point is missing or outside the codes.
  void set_scale(const torch::Tensor& scale, const std::optional<torch::Tensor>& zero_point);

  /// Chooses ranges for a whole tensor (per_tensor), each index of the axis (per_channel) or each
  /// group of the last axis (per_group) with the calibrator; for weights. Throws Error when a value
  /// is NaN or infinite.
  void calibrate(const torch::Tensor& values);
  /// Chooses the range of a site from its statistics; for activations.
  void calibrate(const SiteStatistics& statistics);

  /// Adds a tensor to the statistics from which calibrate() chooses (Observer::observe).
  void observe(const torch::Tensor& values, bool last_axis_is_channels = true) {
    observer_->observe(pre_scaled(values), last_axis_is_channels);
  }
  Observer& observer() { return *observer_; }

  /// Quantize-dequantize with straight-through gradients, and with those of scale and zero point
  /// where they are learned. In training mode moving averages first take the tensor in, without
  /// making the host wait. Not for several threads at once where the policy changes the scale.
  /// Throws Error when not calibrated, and on the CPU as check_learned().
  torch::Tensor forward(const torch::Tensor& values);

  /// What forward() would quantize these values with, for operations that quantize and compute at
  /// once; takes moving averages on and checks as forward() does. Dynamic and following scales are
  /// absent: found() takes them back. Expects pre_scaled() values.
  TrainedOperand operand(const torch::Tensor& values);
  /// Keeps the scale that an operation found in place of forward().
  void found(const torch::Tensor& scale);

  struct Codes {
    torch::Tensor codes;  ///< int8, or FP8 by the scheme, like the values
    torch::Tensor scale;  ///< the scale they were made with; per token where dynamic
  };
  /// Codes by the kernels; where the scale follows tensors, it follows this one. Throws Error when
  /// not calibrated.
  Codes codes(const torch::Tensor& values) const;
  /// Real values of codes made with a scale that is not dynamic.
  torch::Tensor dequantize(const torch::Tensor& codes, torch::Dtype dtype) const;
  /// What such codes stand for, for operations on codes.
  CodeScale code_scale() const { return {scale().detach(), zero_point(), settings_.scheme, axis_}; }

 private:
  torch::Tensor fake_quantized(const torch::Tensor& values);
  bool learns() const { return settings_.policy == RangePolicy::learned; }
  // Whether each tensor brings its own scale.
  bool finds() const {
    return settings_.scheme.dynamic || settings_.policy == RangePolicy::following;
  }
  void check_calibrated() const;
  void register_learned();
  void clear();
  void update_average(const torch::Tensor& values);
  double gradient_scale(const torch::Tensor& values) const;
  void store(const torch::Tensor& scale, const std::optional<torch::Tensor>& zero_point);

  QuantizerSettings settings_;
  int64_t axis_;
  Operand operand_;
  torch::Tensor scale_;
  torch::Tensor zero_point_;
  torch::Tensor average_;
  torch::Tensor pre_scale_;
  torch::Tensor learned_scale_;
  torch::Tensor learned_zero_point_;
  std::shared_ptr<Observer> observer_ = std::make_shared<Observer>();
};

TORCH_MODULE(Quantizer);

}  // namespace vernier
