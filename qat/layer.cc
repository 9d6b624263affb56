#include <vernier/kernels/error.h>
#include <vernier/kernels/fp8.h>
#include <vernier/kernels/int8_gemm.h>
#include <vernier/kernels/quantize.h>
#include <vernier/qat/layer.h>

namespace vernier {

using torch::Tensor;

std::string to_string(Mode mode) {
  switch (mode) {
    case Mode::full:
      return "float";
    case Mode::observe:
      return "observe";
    case Mode::fake_quant:
      return "fake_quant";
    case Mode::integer:
      return "integer";
  }
  return "unknown";
}

Mode mode_from_string(const std::string& name) {
  if (name == "full") return Mode::full;
  for (const Mode mode : {Mode::full, Mode::observe, Mode::fake_quant, Mode::integer})
    if (name == to_string(mode)) return mode;
  throw Error(concat("unknown mode '", name, "': use float, fake_quant or integer"));
}

void QuantizedLayer::set_quantized(bool quantized) {
  quantized_ = quantized;
  if (!quantized) mode_ = Mode::full;
}

void QuantizedLayer::set_mode(Mode mode) {
  if (!quantized_) return;
  if (mode == Mode::fake_quant || mode == Mode::integer) {
    VERNIER_CHECK(input_quantizer->calibrated(),
                  "the input has no scale: calibrate the model first, or skip the layer");
    VERNIER_CHECK(weight_quantizer->calibrated(),
                  "the weight has no scale: calibrate the model first, or skip the layer");
  }
  if (mode == Mode::integer && mode_ != Mode::integer) prepare_integer();
  mode_ = mode;
}

void QuantizedLayer::prepare_integer() {
  const Scheme& weights = weight_quantizer->scheme();
  const bool fits = weights.symmetric && (weights.granularity == Granularity::per_tensor ||
                                          weights.granularity == Granularity::per_channel);
  VERNIER_CHECK(fits, "the integer kernels take symmetric weights per_tensor or per_channel, not ",
                to_string(weights));
  const Scheme& inputs = input_quantizer->scheme();
  VERNIER_CHECK(inputs.is_fp8() == weights.is_fp8(), "the weights are ", to_string(weights.format),
                " and the inputs ", to_string(inputs.format),
                ": the kernels take integers or FP8 for both");
  if (!is_fp8()) {
    const int64_t k = float_weight().size(1);
    const int64_t limit = max_int8_gemm_k(inputs, weights);
    VERNIER_CHECK(k <= limit, "its ", k, " inputs could overflow the int32 accumulators (at most ",
                  limit, "): skip the layer or split it");
  }
  const torch::NoGradGuard no_grad;
  set_weight_codes(weight_quantizer->codes(float_weight().detach().to(torch::kFloat)).codes);
}

void QuantizedLayer::set_weight_codes(const Tensor& codes) {
  weight_codes_ = codes.contiguous();
  weight_sum_ = is_fp8() ? Tensor() : weight_codes_.sum(1, /*keepdim=*/false, torch::kInt);
}

void QuantizedLayer::end_copy(const std::optional<torch::Device>& device) {
  probe_ = nullptr;
  if (!weight_codes_.defined()) return;
  set_weight_codes(weight_codes_.to(device.value_or(weight_codes_.device()), torch::kChar,
                                    /*non_blocking=*/false, /*copy=*/true));
}

void QuantizedLayer::load_weight_codes(const Tensor& codes) {
  Tensor& weight = float_weight();
  const Scheme& scheme = weight_quantizer->scheme();
  const torch::Dtype dtype = scheme.is_fp8() ? fp8_dtype(scheme.format) : torch::kChar;
  VERNIER_CHECK(codes.scalar_type() == dtype && codes.sizes() == weight.sizes(),
                "weight codes must be ", scheme.is_fp8() ? to_string(scheme.format) : "int8",
                " of shape ", weight.sizes(), ", not ", c10::toString(codes.scalar_type()), " ",
                codes.sizes());
  // False for the NaN and the infinities of FP8.
  const Tensor values = scheme.is_fp8() ? codes.to(torch::kFloat) : codes;
  VERNIER_CHECK(values.ge(scheme.qmin()).logical_and(values.le(scheme.qmax())).all().item<bool>(),
                "weight codes leave [", scheme.qmin(), ", ", scheme.qmax(), "]");
  const torch::NoGradGuard no_grad;
  weight.set_data(dequantize(codes, weight_quantizer->scale(), weight_quantizer->zero_point(),
                             scheme, 0, weight.scalar_type()));
  set_weight_codes(codes);
}

Tensor QuantizedLayer::accumulators(const Tensor& codes) const {
  VERNIER_CHECK(!is_fp8(), "an FP8 layer has no integer accumulators");
  const Tensor sums = int8_matmul(codes, weight_codes_);
  const auto zero_point = input_quantizer->zero_point();
  return zero_point ? sums - *zero_point * weight_sum_ : sums;
}

std::vector<NamedLayer> quantized_layers(const torch::nn::Module& model) {
  std::vector<NamedLayer> layers;
  for (const auto& item : model.named_modules(std::string(), /*include_self=*/false))
    if (auto layer = std::dynamic_pointer_cast<QuantizedLayer>(item.value()))
      layers.push_back({item.key(), std::move(layer)});
  return layers;
}

void set_mode(const torch::nn::Module& model, Mode mode) {
  for (const auto& [name, layer] : quantized_layers(model)) {
    try {
      layer->set_mode(mode);
    } catch (const Error& error) {
      throw Error(concat("layer '", name, "': ", error.what()));
    }
  }
}

ModeGuard::ModeGuard(const torch::nn::Module& model, Mode mode) {
  for (const auto& item : quantized_layers(model))
    before_.emplace_back(item.layer, item.layer->mode());
  try {
    set_mode(model, mode);
  } catch (...) {
    restore();  // some layers may have changed before one could not
    throw;
  }
}

ModeGuard::~ModeGuard() { restore(); }

void ModeGuard::restore() {
  // The modes were set before, so their conditions hold; what may still throw must not leave a
  // destructor.
  for (auto& [layer, mode] : before_) {
    try {
      layer->set_mode(mode);
    } catch (const std::exception&) {
      continue;
    }
  }
}

}  // namespace vernier
