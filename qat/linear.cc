#include <torch/nn/functional/linear.h>
#include <torch/nn/modules/linear.h>
#include <torch/serialize/archive.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/fp8.h>
#include <vernier/kernels/int8_gemm.h>
#include <vernier/qat/linear.h>

#include <ostream>
#include <utility>

namespace vernier::nn {

using torch::Tensor;

LinearImpl::LinearImpl(const torch::nn::LinearOptions& linear_options) : options(linear_options) {
  LinearImpl::reset();
}

void LinearImpl::reset() {
  const torch::nn::Linear fresh(options);
  weight = register_parameter("weight", fresh->weight);
  bias = register_parameter("bias", fresh->bias, /*requires_grad=*/options.bias());
  input_quantizer = register_module("input_quantizer", Quantizer(QuantizerSettings{}));
  QuantizerSettings per_channel;
  per_channel.scheme = symmetric_scheme(8, Granularity::per_channel);
  weight_quantizer = register_module("weight_quantizer", Quantizer(per_channel));
}

std::shared_ptr<torch::nn::Module> LinearImpl::clone(
    const std::optional<torch::Device>& device) const {
  auto copy = std::static_pointer_cast<LinearImpl>(Cloneable::clone(device));
  copy->end_copy(device);
  return copy;
}

void LinearImpl::load(torch::serialize::InputArchive& archive) {
  const Mode before = mode();
  set_mode(Mode::full);
  for (auto& parameter : named_parameters(/*recurse=*/false))
    archive.read(parameter.key(), parameter.value());
  bool calibrated = true;
  for (const auto& [name, quantizer] : {std::pair("input_quantizer", input_quantizer.get()),
                                        std::pair("weight_quantizer", weight_quantizer.get())}) {
    torch::serialize::InputArchive saved;
    if (archive.try_read(name, saved)) {
      quantizer->load(saved);
    } else {
      quantizer->set_settings(QuantizerSettings(quantizer->settings()));
    }
    calibrated = calibrated && quantizer->calibrated();
  }
  if (calibrated || before == Mode::observe) set_mode(before);
}

void LinearImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "vernier::nn::Linear(in_features=" << options.in_features()
         << ", out_features=" << options.out_features() << ", bias=" << options.bias() << ")";
}

void LinearImpl::check_input(const Tensor& input) const {
  VERNIER_CHECK(input.dim() >= 1 && input.size(-1) == options.in_features(), "the input has shape ",
                input.sizes(), " but the layer takes [..., ", options.in_features(), "]");
}

Tensor LinearImpl::forward(const Tensor& input) {
  Tensor output;
  switch (mode()) {
    case Mode::observe:
      input_quantizer->observe(input);
      [[fallthrough]];
    case Mode::full:
      output = torch::nn::functional::linear(input, weight, bias);
      break;
    case Mode::fake_quant:
      check_input(input);
      output = torch::nn::functional::linear(input_quantizer->forward(input),
                                             weight_quantizer->forward(weight), bias);
      break;
    case Mode::integer:
      output = integer_forward(input);
      break;
  }
  after_forward(input, output);
  return output;
}

Tensor LinearImpl::integer_forward(const Tensor& input) const {
  const torch::NoGradGuard no_grad;
  const int64_t in = options.in_features(), out = options.out_features();
  check_input(input);
  VERNIER_CHECK(weight_codes().defined() && weight_codes().device() == input.device(),
                "the input is on ", input.device(),
                " but the layer has no weight codes there: set the mode again after moving it");
  const auto [codes, scale] = input_quantizer->codes(input.reshape({-1, in}));
  const Tensor& weight_scale = weight_quantizer->scale();
  Tensor output;
  if (is_fp8()) {
    std::optional<Tensor> own_bias;
    if (bias.defined()) own_bias = bias.to(input.scalar_type());
    output = fp8_linear(codes, weight_codes(), scale, weight_scale, own_bias, input.scalar_type());
  } else {
    std::optional<Tensor> zero_point = input_quantizer->zero_point();
    std::optional<Tensor> sums;
    if (zero_point) sums = weight_sum();
    std::optional<Tensor> float_bias;
    if (bias.defined()) float_bias = bias.to(torch::kFloat);
    output = int8_linear(codes, weight_codes(), scale, weight_scale, float_bias, zero_point, sums,
                         input.scalar_type());
  }
  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() = out;
  return output.view(shape);
}

}  // namespace vernier::nn
