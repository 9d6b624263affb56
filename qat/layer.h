// The face that all quantized layers share: what is quantized, by which quantizers, in which mode.
// Every algorithm sees only this.
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
  observe,     ///< full precision, while the activations' quantizers gather statistics
  fake_quant,  ///< quantize-dequantize of inputs, weight and output with straight-through gradients
  integer      ///< codes through the real kernels: int8, or FP8 where the schemes say so
};

std::string to_string(Mode mode);
/// float (also full), observe, fake_quant or integer. Throws Error for another name.
Mode mode_from_string(const std::string& name);

/// A quantizer and what it quantizes: "input", "other" (the second operand), "weight" or "output".
struct NamedQuantizer {
  std::string name;
  std::shared_ptr<QuantizerImpl> quantizer;
};

/// A layer y = compute(inputs, weight, bias) whose operands are quantized. A derived layer
/// (qat/drop_in.h is the way) says what compute() and integer_forward() are; the rest is shared.
class QuantizedLayer {
 public:
  virtual ~QuantizedLayer() = default;

  Quantizer input_quantizer{nullptr};   ///< null where there is no input to quantize
  Quantizer weight_quantizer{nullptr};  ///< null where there is no weight
  Quantizer output_quantizer{nullptr};  ///< null until quantize_output()

  /// The quantizers that the layer uses. Without that of an input that another layer has quantized
  /// (input_from()).
  virtual std::vector<NamedQuantizer> quantizers() const;
  /// The settings nearest to `wanted` that the layer's kernels take for a quantizer of
  /// quantizers(); what a recipe says for all layers goes through it.
  virtual QuantizerSettings fitting(const std::string& /*quantizer*/,
                                    const QuantizerSettings& wanted) const {
    return wanted;
  }
  /// The quantizer of an input; null where it is taken as it is.
  virtual QuantizerImpl* quantizer_of_input(size_t index) const;

  Mode mode() const { return mode_; }
  /// Layers that a recipe leaves in full precision are not `quantized` and stay in mode full.
  bool quantized() const { return quantized_; }
  void set_quantized(bool quantized);
  /// For errors; functions over a model set it to the name in the tree.
  const std::string& layer_name() const { return layer_name_; }
  void set_layer_name(const std::string& name) { layer_name_ = name; }

  /// fake_quant and integer need calibrated quantizers; integer makes the weight's codes anew.
  /// Throws Error where they are missing, the kernels lack the schemes or K could overflow the
  /// accumulators.
  void set_mode(Mode mode);

  /// Called after every forward with the layer's inputs and output. Must be safe to call from as
  /// many threads as the model runs on.
  using Probe =
      std::function<void(const std::vector<torch::Tensor>& inputs, const torch::Tensor& output)>;
  void set_probe(Probe probe) { probe_ = std::move(probe); }

  /// Computes in place of the forward, whatever the mode, until it is taken off (null): for
  /// algorithms that try quantizers other than the layer's. The probe is called as always; copies
  /// come without it.
  using StandIn = std::function<torch::Tensor(at::TensorList inputs)>;
  void set_stand_in(StandIn stand_in) { stand_in_ = std::move(stand_in); }
  /// Whether there is a probe or a stand-in, which want the layer's own forward.
  bool is_watched() const { return probe_ || stand_in_; }

  /// Full-precision weight, as it is quantized; undefined where there is none.
  virtual torch::Tensor float_weight() const { return {}; }
  /// Bias that goes with it; undefined where there is none.
  virtual torch::Tensor float_bias() const { return {}; }
  /// Codes in the weight's shape, int8, float8_e4m3fn or float8_e5m2; undefined before integer
  /// mode.
  const torch::Tensor& weight_codes() const { return weight_codes_; }
  /// Sums of int8 codes over all axes but the channels', int32, one a channel: for asymmetric
  /// inputs. Undefined where there are no such codes.
  const torch::Tensor& weight_sum() const { return weight_sum_; }
  /// Keeps the codes in `same`, a part of a tensor that several layers share and which holds them
  /// already.
  void keep_weight_codes_in(const torch::Tensor& same) { weight_codes_ = same; }
  /// Takes codes from a checkpoint; the float weight becomes their real values.
  virtual void load_weight_codes(const torch::Tensor& codes);

  /// The layer in full precision on operands of any one floating-point dtype: torch::nn's function.
  /// In float64 it computes exact sums of products of codes, which is how the integer kernels are
  /// proved.
  virtual torch::Tensor compute(at::TensorList inputs, const torch::Tensor& weight,
                                const torch::Tensor& bias) const = 0;
  /// The integer forward, whatever the mode, without gradients; the weight's codes must be there.
  /// Where emits_codes(), the output's codes.
  torch::Tensor integer_forward(at::TensorList inputs) const;

  /// Whether the quantizers make FP8 codes. Such layers have no integer accumulators.
  bool is_fp8() const;
  /// Whether int32 accumulators stand between codes and output.
  virtual bool has_accumulators() const { return !is_fp8(); }
  /// Accumulators of int8 codes in the inputs' shapes, zero points taken into account: int32 in the
  /// shape of compute()'s output, by the kernels. Throws Error where there are none.
  virtual torch::Tensor accumulators(at::TensorList codes) const;
  /// The number of products in one accumulator: from the weight, or, where there is none, from the
  /// inputs; 0 while those are not given.
  virtual int64_t accumulation_length(at::TensorList inputs = {}) const;
  /// How many channels (last axis) an input always has, where it is fixed.
  virtual std::optional<int64_t> input_channels() const { return std::nullopt; }

  /// Quantizes the output as well: in mode fake_quant once more after the layer, in mode integer
  /// inside the kernel. Static, per_tensor. Throws Error for other schemes, and for layers whose
  /// output is quantized in another way already.
  virtual void quantize_output(const QuantizerSettings& settings);
  /// Whether the integer forward returns codes in place of real values: chain() sets it.
  bool emits_codes() const { return emits_codes_; }
  void set_emits_codes(bool emits) { emits_codes_ = emits; }
  /// The name of the layer whose output quantizer has quantized the input already; "" where none
  /// has: chain() sets it.
  const std::string& input_from() const { return input_from_; }
  void set_input_from(const std::string& producer) { input_from_ = producer; }
  /// Multiplies the channels of the input by float32 factors [channels] before everything else, in
  /// every mode: what a producer cannot absorb of the factors that the weight has taken
  /// (smoothquant/folding.h). In fake_quant and integer mode the float32 products are quantized as
  /// they are; else they are rounded to the input's dtype. Scales are forgotten. An empty tensor
  /// takes them off. Throws Error, naming the layer, where it takes none or their number does not
  /// fit.
  virtual void set_pre_scale(const torch::Tensor& factors);
  /// Makes a batch norm that is folded into the layer use its running statistics in training mode
  /// too and leave them as they are, or no longer.
  virtual void set_batch_norm_frozen(bool) {}
  /// The codes of an input: as it is where they arrive from a chain, else made of it.
  QuantizerImpl::Codes input_codes(size_t index, const torch::Tensor& input) const;

 protected:
  /// By mode, on the quantized or the plain operands; calls the probe. What a layer's own forward()
  /// returns. Errors name the layer.
  torch::Tensor run(at::TensorList inputs);
  /// Throws Error where the inputs' shapes do not fit; asked in modes fake_quant and integer.
  virtual void check_inputs(at::TensorList) const {}
  /// integer_forward() of inputs that fit.
  virtual torch::Tensor integer_compute(at::TensorList inputs) const = 0;
  /// compute() on the operands as they are; modes full and observe.
  virtual torch::Tensor full_forward(at::TensorList inputs);
  /// compute() on quantize-dequantized operands.
  virtual torch::Tensor fake_quant_forward(at::TensorList inputs);
  /// The inputs quantize-dequantized, where they have quantizers.
  c10::SmallVector<torch::Tensor, 2> fake_quantized(at::TensorList inputs);
  /// Throws Error where the kernels cannot run the schemes, and makes the weight's codes.
  virtual void prepare_integer();
  /// The output of an integer forward from its real values, or from its codes: codes where they are
  /// to be emitted, else real values of dtype.
  torch::Tensor finish_codes(const torch::Tensor& codes, torch::Dtype dtype) const;
  torch::Tensor finish(const torch::Tensor& output) const;
  /// The dtype of real values that come out: an input's, or the weight's where that is codes.
  torch::Dtype output_dtype(const torch::Tensor& input) const;
  /// Throws Error unless the weight's codes are there, on the device.
  void check_weight_codes(const torch::Tensor& input) const;

  /// Called when the weight's codes are there, or have become others: for other forms of them.
  virtual void weight_codes_changed() {}
  /// To be called on a copy: gives it codes of its own, on `device` where there is one, and takes
  /// the probe off.
  void end_copy(const std::optional<torch::Device>& device);

 private:
  torch::Tensor run_in_mode(at::TensorList inputs);
  void set_weight_codes(const torch::Tensor& codes);
  bool chained(size_t index) const { return index == 0 && !input_from_.empty(); }

  Mode mode_ = Mode::full;
  bool quantized_ = true;
  std::string layer_name_;
  Probe probe_;
  StandIn stand_in_;
  torch::Tensor weight_codes_;
  torch::Tensor weight_sum_;
  bool emits_codes_ = false;
  std::string input_from_;
};

struct NamedLayer {
  std::string name;
  std::shared_ptr<QuantizedLayer> layer;
};

/// All quantized layers of a module tree under their names, in the tree's order.
std::vector<NamedLayer> quantized_layers(const torch::nn::Module& model);

/// Sets the mode of every layer that a recipe quantizes; in mode integer the ends of chains get
/// their scales. Throws Error naming the layer.
void set_mode(const torch::nn::Module& model, Mode mode);

/// The name under which statistics of one quantizer of a layer are kept: the layer's for "input",
/// "layer.other" or "layer.output" for others.
std::string site_name(const std::string& layer, const std::string& quantizer);

/// Chooses every range of a model: weights' from themselves, activations' from what their observers
/// saw since they were reset. Throws Error naming the layer when it was never reached, or saw NaN
/// or infinite values.
void calibrate_from_observers(const torch::nn::Module& model);

/// Makes `producer` hand `consumer` codes, with no real values in between: its output is quantized
/// as the consumer's input is, and the consumer takes it as it comes. Between the two may stand
/// what moves values unchanged (reshape, transpose, a pooling maximum) and, with symmetric codes,
/// ReLU; nothing else may read the producer's output but further consumers chained to it.
///
/// In mode fake_quant the producer's output is quantized once more. In mode integer the
/// requantizing kernel makes its codes from the float32 epilogue: those that fake_quant implies,
/// but where roundings of the product in fake_quant (export/validate.h bounds them; half precision
/// adds its own) carry a value over the edge between two codes, the neighbouring one. Throws Error
/// when a name is no quantized layer, or the consumer's input is not static and per_tensor.
void chain(const torch::nn::Module& model, const std::string& producer,
           const std::string& consumer);

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
