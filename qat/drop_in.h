// What all drop-in layers share: parameters as torch::nn makes them, quantizers beside them, copies
// and archives.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/serialize/archive.h>
#include <vernier/qat/layer.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace vernier::nn {

/// Base of a drop-in for a layer `Plain` of torch::nn: the same options, parameter names and
/// initialization, the same result bit for bit in mode full.
///
/// A derived layer has constructors, one of them from Plain&, which end in reset() or take(); a
/// forward() that returns run(inputs); plain(), compute(), integer_compute(), pretty_print(); and
/// where they differ from a weight [out, ...] and one input, make_quantizers() and the virtual
/// functions of QuantizedLayer. Quantizers start as W8A8, both min/max; a recipe changes them
/// before calibration.
template <typename Derived, typename Plain, typename PlainOptions = decltype(Plain::options)>
class DropIn : public torch::nn::Cloneable<Derived>, public QuantizedLayer {
 public:
  explicit DropIn(const PlainOptions& plain_options) : options(plain_options) {}

  /// Makes parameters, as torch::nn draws them, and quantizers; for constructors and clone().
  void reset() override { take(*plain()); }

  /// A copy of its own with quantizers, scales, mode and codes, but without the probe and what the
  /// quantizers observed.
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override {
    auto copy = std::static_pointer_cast<Derived>(torch::nn::Cloneable<Derived>::clone(device));
    copy->train(this->is_training());  // reset() made it as new
    static_cast<DropIn&>(*copy).end_copy(device);
    return copy;
  }

  /// Archives hold what chain() set besides parameters and quantizers.
  void save(torch::serialize::OutputArchive& archive) const override {
    torch::nn::Module::save(archive);
    if (emits_codes()) archive.write("emits_codes", c10::IValue(true));
    if (!input_from().empty()) archive.write("input_from", c10::IValue(input_from()));
  }

  /// Reads the archive of this layer, after which the quantizers are as they were saved, or of the
  /// layer of torch::nn, which leaves them without scales, since those of the weights before do not
  /// belong to the new ones. A layer in mode fake_quant or integer stays in it if it can.
  void load(torch::serialize::InputArchive& archive) override {
    const Mode before = mode();
    set_mode(Mode::full);
    for (auto& parameter : this->named_parameters(/*recurse=*/false))
      archive.read(parameter.key(), parameter.value());
    c10::IValue value;
    set_emits_codes(archive.try_read("emits_codes", value));
    set_input_from(archive.try_read("input_from", value) ? value.toStringRef() : "");
    torch::serialize::InputArchive output;
    if (!output_quantizer && archive.try_read("output_quantizer", output)) quantize_output({});
    for (const auto& child : this->named_children()) {
      const auto quantizer = std::dynamic_pointer_cast<QuantizerImpl>(child.value());
      if (!quantizer) continue;
      torch::serialize::InputArchive saved;
      if (archive.try_read(child.key(), saved)) {
        quantizer->load(saved);
      } else {
        quantizer->set_settings(QuantizerSettings(quantizer->settings()));
        quantizer->set_pre_scale(quantizer->pre_scale().new_empty({0}));
      }
    }
    bool calibrated = true;
    for (const auto& item : quantizers()) calibrated = calibrated && item.quantizer->calibrated();
    if (calibrated || before == Mode::observe) set_mode(before);
  }

  torch::Tensor float_weight() const override { return weight; }
  torch::Tensor float_bias() const override { return bias; }

  PlainOptions options;
  torch::Tensor weight;  ///< as in torch::nn; undefined where that has none
  torch::Tensor bias;    ///< as in torch::nn; undefined where there is none

 protected:
  /// A new layer of torch::nn with the options, freshly drawn.
  virtual std::shared_ptr<Plain> plain() const = 0;

  /// The member that is the parameter of a name.
  virtual torch::Tensor& parameter(const std::string& name) {
    return name == "bias" ? bias : weight;
  }

  /// Registers the quantizers: by default of the input, per tensor, and of the weight, per channel
  /// of its first axis.
  virtual void make_quantizers() {
    register_input_quantizer("input_quantizer", input_quantizer);
    register_weight_quantizer(/*axis=*/0);
  }
  void register_input_quantizer(const std::string& name, Quantizer& quantizer) {
    quantizer = this->register_module(name, Quantizer(QuantizerSettings{}));
  }
  void register_weight_quantizer(int64_t axis) {
    QuantizerSettings per_channel;
    per_channel.scheme = symmetric_scheme(8, Granularity::per_channel);
    weight_quantizer =
        this->register_module("weight_quantizer", Quantizer(per_channel, axis, Operand::weight));
  }

  /// Makes the parameters of a layer of torch::nn, the very tensors, this layer's, and makes the
  /// quantizers on their device.
  void take(const Plain& source) {
    for (const auto& item : source.named_parameters(/*recurse=*/false)) {
      torch::Tensor& mine = parameter(item.key());
      mine = this->register_parameter(item.key(), item.value(), item.value().requires_grad());
    }
    make_quantizers();
    if (output_quantizer)
      output_quantizer =
          this->register_module("output_quantizer", Quantizer(output_quantizer->settings()));
    if (weight.defined() && !weight.is_cpu())
      for (const auto& child : this->children()) child->to(weight.device());
    this->train(source.is_training());
  }
};

}  // namespace vernier::nn
