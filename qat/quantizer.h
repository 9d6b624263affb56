// A quantizer: a scheme, the scale it has learned or been given, and fake-quantization with it.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>
#include <vernier/calibration/calibrators.h>
#include <vernier/calibration/observer.h>
#include <vernier/kernels/scheme.h>

#include <memory>
#include <optional>

namespace vernier {

/// How one tensor of a layer is quantized and how its range is found.
struct QuantizerSettings {
  Scheme scheme;
  Calibrator calibrator;

  bool operator==(const QuantizerSettings&) const = default;
};

/// Quantizes one tensor of a layer: its input, or its weight. The scale is absent until calibration
/// sets it (dynamic schemes have none). Buffers: `scale` float32 and, for asymmetric schemes,
/// `zero_point` int32, in number as the granularity says (kernels/quantize.h); they follow the
/// module's device but keep their dtype.
class QuantizerImpl : public torch::nn::Cloneable<QuantizerImpl> {
 public:
  explicit QuantizerImpl(const QuantizerSettings& settings = {}, int64_t axis = 0);

  /// Makes buffers and observer, empty; for the constructor and clone(), whose copy has settings
  /// and scale but not what was observed.
  void reset() override;

  using torch::nn::Module::to;
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  /// An uncalibrated quantizer leaves no trace in archives, so that those of float models
  /// interchange with torch::nn's.
  bool is_serializable() const override { return calibrated(); }
  /// Archives hold the scheme with the scale. Loading takes both over, whatever the scheme was, and
  /// leaves the calibrator. Throws Error when they contradict each other.
  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

  const Scheme& scheme() const { return settings_.scheme; }
  const QuantizerSettings& settings() const { return settings_; }
  /// Changes the settings and forgets the scale.
  void set_settings(const QuantizerSettings& settings);

  /// Whether it can quantize: it has a scale or needs none.
  bool calibrated() const { return settings_.scheme.dynamic || scale_.numel() > 0; }
  /// Empty where not calibrated or dynamic.
  const torch::Tensor& scale() const { return scale_; }
  /// Absent for symmetric schemes.
  std::optional<torch::Tensor> zero_point() const;

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

  /// Adds a tensor to the statistics.
  void observe(const torch::Tensor& values) { observer_->observe(values); }
  Observer& observer() { return *observer_; }

  /// Quantize-dequantize with straight-through gradients. Throws Error when not calibrated.
  torch::Tensor forward(const torch::Tensor& values);

  struct Codes {
    torch::Tensor codes;  ///< int8, or FP8 by the scheme, like the values
    torch::Tensor scale;  ///< the scale they were made with; per token where dynamic
  };
  /// Codes by the kernels. Throws Error when not calibrated.
  Codes codes(const torch::Tensor& values) const;

 private:
  void check_calibrated() const;

  QuantizerSettings settings_;
  int64_t axis_;
  torch::Tensor scale_;
  torch::Tensor zero_point_;
  std::shared_ptr<Observer> observer_ = std::make_shared<Observer>();
};

TORCH_MODULE(Quantizer);

}  // namespace vernier
