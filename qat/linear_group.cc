#include <torch/nn/functional/activation.h>
#include <vernier/kernels/activation_quantize.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/int8_gemm.h>
#include <vernier/kernels/norm_quantize.h>
#include <vernier/qat/linear_group.h>

#include <array>
#include <mutex>
#include <optional>
#include <utility>

namespace vernier {

using torch::Tensor;

namespace {

// A tensor as it was: in the same memory, which this holds, and not written to since.
class Snapshot {
 public:
  explicit Snapshot(const Tensor& tensor)
      : held_(tensor.defined() ? tensor.detach() : tensor), version_(version_of(tensor)) {}

  bool shows(const Tensor& tensor) const {
    if (!tensor.defined() || !held_.defined()) return tensor.defined() == held_.defined();
    return held_.is_alias_of(tensor) && held_.storage_offset() == tensor.storage_offset() &&
           held_.sizes() == tensor.sizes() && version_ == version_of(tensor);
  }

 private:
  static int64_t version_of(const Tensor& tensor) {
    return tensor.defined() && !tensor.is_inference() ? tensor._version() : 0;
  }

  Tensor held_;
  int64_t version_;
};

// What a layer's part of the product is made of, beside its codes.
std::array<Tensor, 6> ingredients(const nn::LinearImpl& layer) {
  const QuantizerImpl& input = *layer.input_quantizer;
  return {input.scale(),     input.zero_point().value_or(Tensor()),
          input.pre_scale(), layer.weight_quantizer->scale(),
          layer.bias,        layer.weight_codes()};
}

bool runs_integers(const nn::LinearImpl& layer) {
  return layer.mode() == Mode::integer && !layer.is_fp8();
}

// Whether the kernels that end in codes of whole rows can quantize for a layer, and nothing else
// has to be done to its input or output.
bool is_plain(const nn::LinearImpl& layer) {
  if (!runs_integers(layer) || layer.is_watched() || !layer.input_from().empty() ||
      layer.output_quantizer || layer.batch_norm || !layer.weight_codes().defined())
    return false;
  const QuantizerSettings& settings = layer.input_quantizer->settings();
  const Scheme& scheme = settings.scheme;
  if (scheme.dynamic)
    return scheme.granularity == Granularity::per_token && scheme.symmetric &&
           !layer.input_quantizer->clips();
  return scheme.granularity == Granularity::per_tensor &&
         settings.policy != RangePolicy::following &&
         // The codes' zero point is made of the parameter anew each time.
         (scheme.symmetric || settings.policy != RangePolicy::learned);
}

bool same_values(const Tensor& a, const Tensor& b) {
  if (!a.defined() || !b.defined()) return a.defined() == b.defined();
  return a.is_alias_of(b) || (a.sizes() == b.sizes() && a.equal(b));
}

RowQuantization row_quantization_of(const QuantizerImpl& quantizer) {
  RowQuantization q;
  const Scheme& scheme = quantizer.scheme();
  if (!scheme.dynamic) {
    q.scale = quantizer.scale().detach();
    q.zero_point = quantizer.zero_point();
  }
  if (quantizer.pre_scale().numel() > 0) q.pre_scale = quantizer.pre_scale();
  q.bits = scheme.bits;
  q.narrow_range = scheme.narrow_range;
  return q;
}

// For the float32 values alone of an operation that ends in codes.
RowQuantization values_only(torch::Device device) {
  RowQuantization q;
  q.scale = torch::ones({1}, torch::dtype(torch::kFloat).device(device));
  q.with_output = true;
  return q;
}

NormCodes norm_codes(const Tensor& x, const Norm& norm, const RowQuantization& quantization,
                     const Tensor& added = {}) {
  NormOptions options;
  options.epsilon = norm.epsilon;
  if (added.defined()) options.residual = added;
  const auto given = [](const Tensor& tensor) {
    return tensor.defined() ? std::optional<Tensor>(tensor) : std::nullopt;
  };
  if (norm.centered)
    return layer_norm_quantize(x, given(norm.weight), given(norm.bias), quantization, options);
  return rms_norm_quantize(x, given(norm.weight), quantization, options);
}

// The parameters in float32, for kernels that take x in it.
Norm in_float(const Norm& norm) {
  const auto wide = [](const Tensor& tensor) {
    return tensor.defined() ? tensor.to(torch::kFloat) : tensor;
  };
  return {wide(norm.weight), wide(norm.bias), norm.epsilon, norm.centered};
}

}  // namespace

Tensor normalize(const Tensor& x, const Norm& norm) {
  const Tensor& parameter = norm.weight.defined() ? norm.weight : norm.bias;
  if (parameter.defined() && parameter.scalar_type() != x.scalar_type())
    return normalize(x.to(torch::kFloat), in_float(norm)).to(x.scalar_type());
  const std::vector<int64_t> size = {x.size(-1)};
  const auto given = [](const Tensor& tensor) {
    return tensor.defined() ? std::optional<Tensor>(tensor) : std::nullopt;
  };
  if (norm.centered)
    return torch::layer_norm(x, size, given(norm.weight), given(norm.bias), norm.epsilon);
  return torch::rms_norm(x, size, given(norm.weight), norm.epsilon);
}

Tensor activated(const Tensor& x, Activation activation) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return torch::relu(x);
    case Activation::gelu:
      return torch::gelu(x);
    case Activation::gelu_tanh:
      return torch::gelu(x, "tanh");
    case Activation::silu:
      return torch::silu(x);
  }
  throw Error("unknown activation");
}

// The layers' codes and scales as one layer's.
struct LinearGroup::Joint {
  bool fused = false;
  std::vector<Scheme> schemes;        // of the inputs
  std::vector<Snapshot> ingredients;  // of all layers
  RowQuantization quantization;       // of the input
  Tensor weight, weight_scale;        // int8 [out of all, in], float32 [1] or [out of all]
  std::optional<Tensor> bias;         // float32 [out of all]
  std::optional<Tensor> weight_sum;   // int32 [out of all]; with a zero point
  std::vector<int64_t> sizes;         // outputs of each layer

  bool is_of(const Layers& layers) const {
    size_t i = 0;
    for (size_t layer = 0; layer < layers.size(); ++layer) {
      if (layers[layer]->input_quantizer->scheme() != schemes[layer]) return false;
      for (const Tensor& tensor : vernier::ingredients(*layers[layer]))
        if (!ingredients[i++].shows(tensor)) return false;
    }
    return true;
  }
};

struct LinearGroup::State {
  std::mutex mutex;
  std::shared_ptr<const Joint> joint;
};

LinearGroup::LinearGroup(const std::vector<nn::Linear>& layers)
    : state_(std::make_shared<State>()) {
  for (const nn::Linear& layer : layers) layers_.push_back(layer.ptr());
  VERNIER_CHECK(!layers_.empty(), "a group of layers needs one at least");
  for (const auto& layer : layers_)
    VERNIER_CHECK(layer->options.in_features() == layers_[0]->options.in_features(), "layers of ",
                  layers_[0]->options.in_features(), " and ", layer->options.in_features(),
                  " inputs cannot read one activation");
}

std::shared_ptr<const LinearGroup::Joint> LinearGroup::joint(torch::Device device) const {
  for (const auto& layer : layers_)
    if (!is_plain(*layer) || layer->weight_codes().device() != device) return nullptr;
  const std::lock_guard lock(state_->mutex);
  if (!state_->joint || !state_->joint->is_of(layers_)) {
    const torch::NoGradGuard no_grad;
    state_->joint = nullptr;  // and its memory
    state_->joint = join();
  }
  return state_->joint->fused ? state_->joint : nullptr;
}

std::shared_ptr<const LinearGroup::Joint> LinearGroup::join() const {
  auto joint = std::make_shared<Joint>();
  const QuantizerImpl& input = *layers_[0]->input_quantizer;
  joint->fused = true;
  for (const auto& layer : layers_) {
    const QuantizerImpl& other = *layer->input_quantizer;
    joint->schemes.push_back(other.scheme());
    joint->fused = joint->fused && other.scheme() == input.scheme() &&
                   same_values(other.pre_scale(), input.pre_scale()) &&
                   (input.scheme().dynamic || (same_values(other.scale(), input.scale()) &&
                                               same_values(other.zero_point().value_or(Tensor()),
                                                           input.zero_point().value_or(Tensor()))));
  }
  if (joint->fused) {
    joint->quantization = row_quantization_of(input);
    const bool scale_a_channel = layers_.size() > 1;
    std::vector<Tensor> weights, scales, biases, sums;
    bool biased = false;
    for (const auto& layer : layers_) {
      const int64_t size = layer->options.out_features();
      joint->sizes.push_back(size);
      weights.push_back(layer->weight_codes());
      const Tensor scale = layer->weight_quantizer->scale().detach();
      scales.push_back(scale_a_channel ? scale.expand({size}) : scale);
      biased = biased || layer->bias.defined();
      biases.push_back(layer->bias.defined() ? layer->bias.detach().to(torch::kFloat)
                                             : scale.new_zeros({size}));
      if (joint->quantization.zero_point) sums.push_back(layer->weight_sum());
    }
    const auto joined = [](const std::vector<Tensor>& parts) {
      return parts.size() == 1 ? parts[0] : torch::cat(parts);
    };
    joint->weight = joined(weights);
    joint->weight_scale = joined(scales);
    if (biased) joint->bias = joined(biases);
    if (!sums.empty()) joint->weight_sum = joined(sums);
    // One copy of the codes in memory, not two.
    int64_t row = 0;
    for (const auto& layer : layers_) {
      const int64_t size = layer->options.out_features();
      if (layers_.size() > 1) layer->keep_weight_codes_in(joint->weight.narrow(0, row, size));
      row += size;
    }
  }
  for (const auto& layer : layers_)
    for (const Tensor& tensor : ingredients(*layer)) joint->ingredients.emplace_back(tensor);
  return joint;
}

// [rows, in] or [..., in] times all weights.
std::vector<Tensor> LinearGroup::multiply(const Joint& joint, const Tensor& codes,
                                          const Tensor& scale, torch::Dtype dtype) const {
  Int8LinearOperands operands{codes.reshape({-1, codes.size(-1)}), joint.weight,
                              scale.reshape({-1}), joint.weight_scale};
  operands.bias = joint.bias;
  operands.input_zero_point = joint.quantization.zero_point;
  operands.weight_sum = joint.weight_sum;
  std::vector<int64_t> shape = codes.sizes().vec();
  shape.back() = joint.weight.size(0);
  const Tensor all = int8_linear(operands, dtype).view(shape);
  if (layers_.size() == 1) return {all};
  return all.split_with_sizes(joint.sizes, -1);
}

bool LinearGroup::any_integer() const {
  for (const auto& layer : layers_)
    if (runs_integers(*layer)) return true;
  return false;
}

std::vector<Tensor> LinearGroup::one_by_one(const Tensor& x) const {
  std::vector<Tensor> outputs;
  for (const auto& layer : layers_) outputs.push_back(layer->forward(x));
  return outputs;
}

// Layers that multiply integers take the float32 values as they are and give outputs in the dtype:
// the same roundings as where codes are made of the values at once.
std::vector<Tensor> LinearGroup::one_by_one(const Tensor& values, torch::Dtype dtype) const {
  std::vector<Tensor> outputs;
  for (const auto& layer : layers_) {
    const Tensor output = layer->forward(runs_integers(*layer) ? values : values.to(dtype));
    outputs.push_back(layer->emits_codes() ? output : output.to(dtype));
  }
  return outputs;
}

std::vector<Tensor> LinearGroup::forward(const Tensor& x) const {
  const auto joint = this->joint(x.device());
  if (!joint) return one_by_one(x);
  // That kernel applies factors in passing.
  if (joint->quantization.pre_scale) return of_activation(x, Activation::none);
  const torch::NoGradGuard no_grad;
  const auto [codes, scale] = layers_[0]->input_quantizer->codes(x);
  return multiply(*joint, codes, scale, x.scalar_type());
}

LinearGroup::OfStream LinearGroup::of_norm(const Norm& norm, const Tensor& x,
                                           const Tensor& added) const {
  if (const auto joint = this->joint(x.device())) {
    const torch::NoGradGuard no_grad;
    const NormCodes codes = norm_codes(x, norm, joint->quantization, added);
    return {codes.sum.value_or(x),
            multiply(*joint, codes.codes, codes.scale ? *codes.scale : *joint->quantization.scale,
                     x.scalar_type())};
  }
  const Tensor stream = added.defined() ? x + added : x;
  if (!any_integer()) return {stream, one_by_one(normalize(stream, norm))};
  const torch::NoGradGuard no_grad;
  const NormCodes values =
      norm_codes(stream.to(torch::kFloat), in_float(norm), values_only(x.device()));
  return {stream, one_by_one(*values.output, x.scalar_type())};
}

std::vector<Tensor> LinearGroup::of_activation(const Tensor& x, Activation activation) const {
  if (const auto joint = this->joint(x.device())) {
    const torch::NoGradGuard no_grad;
    const RowCodesResult codes = activation_quantize(x, activation, joint->quantization);
    return multiply(*joint, codes.codes, codes.scale ? *codes.scale : *joint->quantization.scale,
                    x.scalar_type());
  }
  if (!any_integer()) return one_by_one(activated(x, activation));
  const torch::NoGradGuard no_grad;
  const RowCodesResult values =
      activation_quantize(x.to(torch::kFloat), activation, values_only(x.device()));
  return one_by_one(*values.output, x.scalar_type());
}

std::vector<Tensor> LinearGroup::of_gated(const Tensor& gate, const Tensor& up,
                                          Activation activation) const {
  if (const auto joint = this->joint(gate.device())) {
    const torch::NoGradGuard no_grad;
    const RowCodesResult codes =
        gated_activation_quantize(gate, up, activation, joint->quantization);
    return multiply(*joint, codes.codes, codes.scale ? *codes.scale : *joint->quantization.scale,
                    gate.scalar_type());
  }
  if (!any_integer()) return one_by_one(activated(gate, activation) * up);
  const torch::NoGradGuard no_grad;
  const RowCodesResult values = gated_activation_quantize(
      gate.to(torch::kFloat), up.to(torch::kFloat), activation, values_only(gate.device()));
  return one_by_one(*values.output, gate.scalar_type());
}

}  // namespace vernier
