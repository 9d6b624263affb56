#include <vernier/kernels/code_tensor.h>
#include <vernier/kernels/error.h>
#include <vernier/qat/elementwise.h>

#include <ostream>

namespace vernier::nn {

using torch::Tensor;

namespace {

bool makes_int8(const Quantizer& quantizer) { return quantizer && !quantizer->scheme().is_fp8(); }

// int32 without the zero point.
Tensor centred(const Tensor& codes, const QuantizerImpl& quantizer) {
  const Tensor wide = codes.to(torch::kInt);
  const auto zero_point = quantizer.zero_point();
  return zero_point ? wide - *zero_point : wide;
}

}  // namespace

template <typename Derived, typename Options>
Joining<Derived, Options>::Joining(const Options& joining_options)
    : DropIn<Derived, torch::nn::Module, Options>(joining_options) {
  this->reset();
}

template <typename Derived, typename Options>
void Joining<Derived, Options>::check_inputs(at::TensorList inputs) const {
  VERNIER_CHECK(!inputs.empty(), "there is nothing to join");
  for (const Tensor& input : inputs)
    VERNIER_CHECK(input.device() == inputs[0].device(), "an input is on ", input.device(),
                  " but the first is on ", inputs[0].device(), ": move one of them");
}

template <typename Derived, typename Options>
void Joining<Derived, Options>::prepare_integer() {
  const Scheme& scheme = this->input_quantizer->scheme();
  VERNIER_CHECK(
      !scheme.is_fp8() && !scheme.dynamic && scheme.granularity == Granularity::per_tensor,
      "inputs that are joined share one static scale of integers, not ", to_string(scheme));
}

template class Joining<AddImpl, AddOptions>;
template class Joining<ConcatImpl, ConcatOptions>;

void AddImpl::pretty_print(std::ostream& stream) const { stream << "vernier::nn::Add()"; }

Tensor AddImpl::compute(at::TensorList inputs, const Tensor&, const Tensor&) const {
  return inputs[0] + inputs[1];
}

Tensor AddImpl::accumulators(at::TensorList codes) const {
  return centred(codes[0], *input_quantizer) + centred(codes[1], *input_quantizer);
}

Tensor AddImpl::integer_compute(at::TensorList inputs) const {
  const torch::Dtype dtype = output_dtype(inputs[0]);
  const CodeScale scale = input_quantizer->code_scale();
  const CodeTensor a{input_codes(0, inputs[0]).codes, scale};
  const CodeTensor b{input_codes(1, inputs[1]).codes, scale};
  if (makes_int8(output_quantizer))
    return finish_codes(add_codes(a, b, output_quantizer->code_scale()), dtype);
  return finish(dequantize(a, dtype) + dequantize(b, dtype));
}

void ConcatImpl::pretty_print(std::ostream& stream) const {
  stream << "vernier::nn::Concat(dim=" << options.dim() << ")";
}

Tensor ConcatImpl::compute(at::TensorList inputs, const Tensor&, const Tensor&) const {
  return torch::cat(inputs, options.dim());
}

Tensor ConcatImpl::accumulators(at::TensorList codes) const {
  return centred(torch::cat(codes, options.dim()), *input_quantizer);
}

Tensor ConcatImpl::integer_compute(at::TensorList inputs) const {
  const torch::Dtype dtype = output_dtype(inputs[0]);
  const CodeScale scale = input_quantizer->code_scale();
  std::vector<CodeTensor> tensors;
  for (size_t i = 0; i < inputs.size(); ++i)
    tensors.push_back({input_codes(i, inputs[i]).codes, scale});
  if (makes_int8(output_quantizer))
    return finish_codes(concat_codes(tensors, options.dim(), output_quantizer->code_scale()),
                        dtype);
  return finish(dequantize({concat_codes(tensors, options.dim(), scale), scale}, dtype));
}

}  // namespace vernier::nn
