#include <torch/nn/functional/linear.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/fp8.h>
#include <vernier/kernels/int8_gemm.h>
#include <vernier/qat/linear.h>

#include <ostream>
#include <utility>

namespace vernier::nn {

using torch::Tensor;

namespace {

thread_local std::optional<torch::TensorOptions> uninitialized;

// [rows, columns] as [..., columns] with the leading sizes of a tensor.
Tensor unflatten(const Tensor& matrix, const Tensor& like) {
  std::vector<int64_t> shape = like.sizes().vec();
  shape.back() = matrix.size(1);
  return matrix.view(shape);
}

}  // namespace

LinearImpl::LinearImpl(const torch::nn::LinearOptions& linear_options) : Foldable(linear_options) {
  LinearImpl::reset();
}

LinearImpl::LinearImpl(const torch::nn::LinearImpl& linear) : Foldable(linear.options) {
  take(linear);
}

Uninitialized::Uninitialized(const torch::TensorOptions& options)
    : before_(std::exchange(uninitialized, options)) {}

Uninitialized::~Uninitialized() { uninitialized = before_; }

const std::optional<torch::TensorOptions>& Uninitialized::options() { return uninitialized; }

std::shared_ptr<torch::nn::LinearImpl> LinearImpl::plain() const {
  if (!uninitialized) return std::make_shared<torch::nn::LinearImpl>(options);
  // A small one, whose parameters give way.
  const auto layer =
      std::make_shared<torch::nn::LinearImpl>(torch::nn::LinearOptions(1, 1).bias(options.bias()));
  layer->options = options;
  layer->weight.set_data(
      torch::empty({options.out_features(), options.in_features()}, *uninitialized));
  if (options.bias()) layer->bias.set_data(torch::empty({options.out_features()}, *uninitialized));
  return layer;
}

void LinearImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "vernier::nn::Linear(in_features=" << options.in_features()
         << ", out_features=" << options.out_features() << ", bias=" << options.bias() << ")";
}

void LinearImpl::check_inputs(at::TensorList inputs) const {
  const Tensor& input = inputs[0];
  VERNIER_CHECK(input.dim() >= 1 && input.size(-1) == options.in_features(), "the input has shape ",
                input.sizes(), " but the layer takes [..., ", options.in_features(), "]");
}

void LinearImpl::set_pre_scale(const Tensor& factors) {
  VERNIER_CHECK(factors.numel() == 0 || factors.numel() == options.in_features(), "layer '",
                layer_name(), "' has ", options.in_features(), " inputs and takes no ",
                factors.numel(), " factors");
  VERNIER_CHECK(factors.numel() == 0 || input_from().empty(), "layer '", layer_name(),
                "' is given codes by '", input_from(), "', which take no factors");
  if (factors.numel() == 0 && input_quantizer->pre_scale().numel() == 0) return;
  set_mode(Mode::full);
  input_quantizer->set_pre_scale(factors.to(input_quantizer->scale().device()));
  input_quantizer->set_settings(QuantizerSettings(input_quantizer->settings()));
}

Tensor LinearImpl::compute(at::TensorList inputs, const Tensor& linear_weight,
                           const Tensor& linear_bias) const {
  return torch::nn::functional::linear(inputs[0], linear_weight, linear_bias);
}

Tensor LinearImpl::accumulators(at::TensorList codes) const {
  VERNIER_CHECK(!is_fp8(), "an FP8 layer has no integer accumulators");
  const Tensor sums = int8_matmul(codes[0].reshape({-1, options.in_features()}), weight_codes());
  const auto zero_point = input_quantizer->zero_point();
  return unflatten(zero_point ? sums - *zero_point * weight_sum() : sums, codes[0]);
}

// One operation that quantizes and multiplies, forward and backward, where the schemes allow it and
// no batch norm corrects the output to its batch.
Tensor LinearImpl::fake_quant_forward(at::TensorList inputs) {
  const Scheme &input = input_quantizer->scheme(), &weights = weight_quantizer->scheme();
  const bool fits =
      input_from().empty() && !input.is_fp8() && !weights.is_fp8() &&
      input.granularity != Granularity::per_channel &&
      (input_quantizer->pre_scale().numel() == 0 || inputs[0].scalar_type() == torch::kFloat) &&
      !(batch_norm && batch_norm->uses_batch());
  if (!fits) {
    VERNIER_CHECK(trained_product == TrainedProduct::real,
                  "codes are multiplied in training where the layer quantizes its own input, with "
                  "integer schemes, has no batch norm that takes the batch's statistics, and no "
                  "factors on a half precision input");
    return Foldable::fake_quant_forward(inputs);
  }
  const Tensor used_weight = float_weight(), added = float_bias();
  const Tensor values = input_quantizer->pre_scaled(inputs[0]);
  const TrainedLinear result = fake_quantized_linear(
      values, used_weight, added.defined() ? std::optional(added) : std::nullopt,
      input_quantizer->operand(values), weight_quantizer->operand(used_weight), trained_product);
  if (result.input_scale.defined()) input_quantizer->found(result.input_scale);
  if (result.weight_scale.defined()) weight_quantizer->found(result.weight_scale);
  return output_quantizer ? output_quantizer->forward(result.output) : result.output;
}

Tensor LinearImpl::integer_compute(at::TensorList inputs) const {
  const Tensor& input = inputs[0];
  const torch::Dtype dtype = output_dtype(input);
  const auto [codes, scale] = input_codes(0, input.reshape({-1, options.in_features()}));
  if (is_fp8()) {
    std::optional<Tensor> own_bias;
    if (const Tensor added = float_bias(); added.defined()) own_bias = added.to(dtype);
    const Tensor output = fp8_linear(codes, weight_codes(), scale,
                                     weight_quantizer->scale().detach(), own_bias, dtype);
    return finish(unflatten(output, input));
  }
  Int8LinearOperands operands{codes, weight_codes(), scale, weight_quantizer->scale().detach()};
  if (const Tensor added = float_bias(); added.defined()) operands.bias = added.to(torch::kFloat);
  operands.input_zero_point = input_quantizer->zero_point();
  if (operands.input_zero_point) operands.weight_sum = weight_sum();
  if (!output_quantizer || output_quantizer->scheme().is_fp8())
    return finish(unflatten(int8_linear(operands, dtype), input));
  const Tensor output =
      int8_linear_requantize(operands, output_quantizer->scale().detach(),
                             output_quantizer->zero_point(), output_quantizer->scheme());
  return finish_codes(unflatten(output, input), dtype);
}

}  // namespace vernier::nn
