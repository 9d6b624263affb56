// The face that all quantized layers share: two quantizers and a mode. Every algorithm sees only
// this.
#pragma once

#include <vernier/qat/quantizer.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace vernier {

/// What a layer's forward does.
enum class Mode {
  full,        ///< full precision, exactly torch::nn's layer
  observe,     ///< full precision, while the input quantizer gathers statistics
  fake_quant,  ///< quantize-dequantize of input and weight with straight-through gradients
  integer      ///< codes through the real kernels: int8, or FP8 where the schemes say so
};

std::string to_string(Mode mode);
/// float (also full), observe, fake_quant or integer. Throws Error for another name.
Mode mode_from_string(const std::string& name);

class QuantizedLayer {
 public:
  virtual ~QuantizedLayer() = default;

  Quantizer input_quantizer{nullptr};
  Quantizer weight_quantizer{nullptr};

  Mode mode() const { return mode_; }
  /// Layers that a recipe leaves in full precision are not `quantized` and stay in mode full.
  bool quantized() const { return quantized_; }
  void set_quantized(bool quantized);

  /// fake_quant and integer need calibrated quantizers; integer makes the weight's codes anew.
  /// Throws Error where they are missing or K could overflow the accumulators.
  void set_mode(Mode mode);

  /// Called after every forward with the layer's input and output. Must be safe to call from as
  /// many threads as the model runs on.
  using Probe = std::function<void(const torch::Tensor& input, const torch::Tensor& output)>;
  void set_probe(Probe probe) { probe_ = std::move(probe); }

  /// Full-precision weight [out, in].
  virtual torch::Tensor& float_weight() = 0;
  /// Bias [out]; undefined where there is none.
  virtual const torch::Tensor& float_bias() const = 0;
  /// Codes [out, in], int8, float8_e4m3fn or float8_e5m2; undefined before integer mode.
  const torch::Tensor& weight_codes() const { return weight_codes_; }
  /// Takes codes from a checkpoint; the float weight becomes their real values.
  void load_weight_codes(const torch::Tensor& codes);

  /// Whether both quantizers make FP8 codes. Such layers have no integer accumulators.
  bool is_fp8() const { return weight_quantizer->scheme().is_fp8(); }
  /// Accumulators of codes int8 [rows, in], zero point taken into account: int32 [rows, out], by
  /// the kernels. Throws Error for FP8 layers.
  torch::Tensor accumulators(const torch::Tensor& codes) const;
  /// The integer forward, whatever the mode; the weight's codes must be there.
  virtual torch::Tensor integer_forward(const torch::Tensor& input) const = 0;

 protected:
  void after_forward(const torch::Tensor& input, const torch::Tensor& output) const {
    if (probe_) probe_(input, output);
  }
  const torch::Tensor& weight_sum() const { return weight_sum_; }
  /// To be called on a copy: gives it codes of its own, on `device` where there is one, and takes
  /// the probe off.
  void end_copy(const std::optional<torch::Device>& device);

 private:
  void prepare_integer();
  void set_weight_codes(const torch::Tensor& codes);

  Mode mode_ = Mode::full;
  bool quantized_ = true;
  Probe probe_;
  torch::Tensor weight_codes_;  // [out, in]
  torch::Tensor weight_sum_;    // int32 [out]: sums of int8 codes, for asymmetric inputs
};

struct NamedLayer {
  std::string name;
  std::shared_ptr<QuantizedLayer> layer;
};

/// All quantized layers of a module tree under their names, in the tree's order.
std::vector<NamedLayer> quantized_layers(const torch::nn::Module& model);

/// Sets the mode of every layer that a recipe quantizes. Throws Error naming the layer.
void set_mode(const torch::nn::Module& model, Mode mode);

/// Sets a mode and gives back the ones before.
class ModeGuard {
 public:
  ModeGuard(const torch::nn::Module& model, Mode mode);
  ~ModeGuard();
  ModeGuard(const ModeGuard&) = delete;
  ModeGuard& operator=(const ModeGuard&) = delete;

 private:
  void restore();

  std::vector<std::pair<std::shared_ptr<QuantizedLayer>, Mode>> before_;
};

}  // namespace vernier
