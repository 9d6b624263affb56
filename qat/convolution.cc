#include <torch/nn/functional/conv.h>
#include <torch/nn/functional/padding.h>
#include <vernier/kernels/error.h>
#include <vernier/qat/convolution.h>

#include <algorithm>
#include <ostream>
#include <variant>

namespace vernier::nn {

using torch::Tensor;
namespace F = torch::nn::functional;

namespace {

template <size_t D>
std::vector<int64_t> values(const torch::ExpandingArray<D>& array) {
  return {array->begin(), array->end()};
}

template <size_t D, typename Options>
torch::nn::detail::ConvNdOptions<D> general_options(const Options& o) {
  torch::nn::detail::ConvNdOptions<D> general(o.in_channels(), o.out_channels(), o.kernel_size());
  general.stride(o.stride()).padding(o.padding()).dilation(o.dilation()).groups(o.groups());
  general.bias(o.bias()).padding_mode(o.padding_mode());
  if constexpr (std::is_same_v<Options, torch::nn::ConvTransposeOptions<D>>)
    general.transposed(true).output_padding(o.output_padding());
  return general;
}

bool is_codes(const Tensor& tensor) { return tensor.scalar_type() == torch::kChar; }

}  // namespace

// What is added around the input before the convolution, in F::pad's order (last axis first), and
// what the convolution itself adds on both sides of each axis.
template <size_t D, typename Derived, typename Plain>
struct ConvolutionNd<D, Derived, Plain>::Padding {
  std::vector<int64_t> before;
  F::PadFuncOptions::mode_t mode = torch::kConstant;
  std::vector<int64_t> inside;
};

template <size_t D, typename Derived, typename Plain>
ConvolutionNd<D, Derived, Plain>::ConvolutionNd(const UserOptions& user_options)
    : Foldable<Derived, Plain>(general_options<D>(user_options)) {
  this->reset();
}

template <size_t D, typename Derived, typename Plain>
ConvolutionNd<D, Derived, Plain>::ConvolutionNd(const Plain& plain_layer)
    : Foldable<Derived, Plain>(plain_layer.options) {
  this->take(plain_layer);
}

template <size_t D, typename Derived, typename Plain>
std::shared_ptr<Plain> ConvolutionNd<D, Derived, Plain>::plain() const {
  const auto& o = this->options;
  UserOptions user(o.in_channels(), o.out_channels(), o.kernel_size());
  user.stride(o.stride()).dilation(o.dilation()).groups(o.groups()).bias(o.bias());
  user.padding_mode(o.padding_mode());
  if constexpr (kTransposed) {
    user.padding(std::get<torch::ExpandingArray<D>>(o.padding()));
    user.output_padding(o.output_padding());
  } else {
    user.padding(o.padding());
  }
  return std::make_shared<Plain>(user);
}

template <size_t D, typename Derived, typename Plain>
void ConvolutionNd<D, Derived, Plain>::pretty_print(std::ostream& stream) const {
  const auto& o = this->options;
  stream << std::boolalpha << "vernier::nn::Conv" << (kTransposed ? "Transpose" : "") << D << "d("
         << o.in_channels() << ", " << o.out_channels() << ", kernel_size=" << o.kernel_size()
         << ", stride=" << o.stride() << ", dilation=" << o.dilation() << ", groups=" << o.groups()
         << ", bias=" << o.bias();
  if (this->batch_norm) stream << ", batch norm folded in";
  stream << ")";
}

template <size_t D, typename Derived, typename Plain>
void ConvolutionNd<D, Derived, Plain>::make_quantizers() {
  Foldable<Derived, Plain>::make_quantizers();
  if (!kTransposed) return;
  this->unregister_module("weight_quantizer");
  this->register_weight_quantizer(/*axis=*/1);
}

template <size_t D, typename Derived, typename Plain>
auto ConvolutionNd<D, Derived, Plain>::padding() const -> Padding {
  const auto& o = this->options;
  const auto kernel = values(o.kernel_size()), dilation = values(o.dilation());
  const bool same = std::holds_alternative<torch::enumtype::kSame>(o.padding());
  std::vector<int64_t> low(D, 0), high(D, 0);
  if (const auto* given = std::get_if<torch::ExpandingArray<D>>(&o.padding())) {
    low = high = values(*given);
  } else if (same) {
    for (size_t i = 0; i < D; ++i) {
      const int64_t total = dilation[i] * (kernel[i] - 1);
      low[i] = total / 2;
      high[i] = total - low[i];
    }
  }
  Padding padding;
  padding.inside.assign(D, 0);
  const bool zeros = std::holds_alternative<torch::enumtype::kZeros>(o.padding_mode());
  if (zeros && low == high) {
    padding.inside = low;
    return padding;
  }
  for (size_t i = 0; i < D; ++i) {
    // torch::nn's Conv hands F::pad the amounts of "same" with the first axis first.
    const size_t axis = same && !zeros ? i : D - 1 - i;
    padding.before.push_back(low[axis]);
    padding.before.push_back(high[axis]);
  }
  if (std::holds_alternative<torch::enumtype::kReflect>(o.padding_mode()))
    padding.mode = torch::kReflect;
  if (std::holds_alternative<torch::enumtype::kReplicate>(o.padding_mode()))
    padding.mode = torch::kReplicate;
  if (std::holds_alternative<torch::enumtype::kCircular>(o.padding_mode()))
    padding.mode = torch::kCircular;
  return padding;
}

template <size_t D, typename Derived, typename Plain>
ConvolutionSettings ConvolutionNd<D, Derived, Plain>::settings(at::TensorList inputs) const {
  const auto& o = this->options;
  ConvolutionSettings s{values(o.stride()), {}, values(o.dilation()), o.groups(), kTransposed};
  if constexpr (!kTransposed) {
    s.padding = padding().inside;
  } else {
    s.padding = values(std::get<torch::ExpandingArray<D>>(o.padding()));
    s.output_padding = values(o.output_padding());
    if (inputs.size() == 1) return s;
    const Tensor wanted = inputs[1].to(torch::kCPU, torch::kLong);
    VERNIER_CHECK(wanted.numel() >= static_cast<int64_t>(D), "output_size has ", wanted.numel(),
                  " sizes, not one for each of the ", D, " axes");
    const auto kernel = values(o.kernel_size());
    for (size_t i = 0; i < D; ++i) {
      const auto axis = static_cast<int64_t>(i) - static_cast<int64_t>(D);
      const int64_t least = (inputs[0].size(axis) - 1) * s.stride[i] - 2 * s.padding[i] +
                            s.dilation[i] * (kernel[i] - 1) + 1;
      const int64_t size = wanted[axis].template item<int64_t>();
      VERNIER_CHECK(size >= least && size < least + s.stride[i], "output_size asks for ", size,
                    " but the input gives ", least, " to ", least + s.stride[i] - 1);
      s.output_padding[i] = size - least;
    }
  }
  return s;
}

template <size_t D, typename Derived, typename Plain>
Tensor ConvolutionNd<D, Derived, Plain>::compute(at::TensorList inputs, const Tensor& kernel,
                                                 const Tensor& added) const {
  const auto& o = this->options;
  if constexpr (kTransposed) {
    VERNIER_CHECK(std::holds_alternative<torch::enumtype::kZeros>(o.padding_mode()),
                  "transposed convolutions pad with zeros only");
    const ConvolutionSettings s = settings(inputs);
    if constexpr (D == 1)
      return torch::conv_transpose1d(inputs[0], kernel, added, s.stride, s.padding,
                                     s.output_padding, s.groups, s.dilation);
    else if constexpr (D == 2)
      return torch::conv_transpose2d(inputs[0], kernel, added, s.stride, s.padding,
                                     s.output_padding, s.groups, s.dilation);
    else
      return torch::conv_transpose3d(inputs[0], kernel, added, s.stride, s.padding,
                                     s.output_padding, s.groups, s.dilation);
  } else {
    F::ConvFuncOptions<D> how;
    how.bias(added).stride(o.stride()).dilation(o.dilation()).groups(o.groups());
    Tensor input = inputs[0];
    if (std::holds_alternative<torch::enumtype::kZeros>(o.padding_mode())) {
      how.padding(o.padding());
    } else {
      const Padding p = padding();
      input = F::pad(input, F::PadFuncOptions(p.before).mode(p.mode));
    }
    if constexpr (D == 1)
      return F::conv1d(input, kernel, how);
    else if constexpr (D == 2)
      return F::conv2d(input, kernel, how);
    else
      return F::conv3d(input, kernel, how);
  }
}

template <size_t D, typename Derived, typename Plain>
int64_t ConvolutionNd<D, Derived, Plain>::accumulation_length(at::TensorList) const {
  int64_t length = this->options.in_channels() / this->options.groups();
  for (const int64_t size : values(this->options.kernel_size())) length *= size;
  return length;
}

template <size_t D, typename Derived, typename Plain>
QuantizerSettings ConvolutionNd<D, Derived, Plain>::fitting(const std::string& quantizer,
                                                            const QuantizerSettings& wanted) const {
  return quantizer == "input" ? for_whole_tensor(wanted) : wanted;
}

template <size_t D, typename Derived, typename Plain>
void ConvolutionNd<D, Derived, Plain>::check_inputs(at::TensorList inputs) const {
  const Tensor& input = inputs[0];
  const int64_t channels = this->options.in_channels();
  const auto axes = static_cast<int64_t>(D);
  VERNIER_CHECK(
      (input.dim() == axes + 1 || input.dim() == axes + 2) && input.size(-axes - 1) == channels,
      "the input has shape ", input.sizes(), " but the layer takes [N, ", channels, "] and ", D,
      " spatial axes");
  VERNIER_CHECK(input.device() == this->weight.device(), "the input is on ", input.device(),
                " but the weight is on ", this->weight.device(), ": move one of them");
}

template <size_t D, typename Derived, typename Plain>
void ConvolutionNd<D, Derived, Plain>::prepare_integer() {
  const Scheme& inputs = this->input_quantizer->scheme();
  VERNIER_CHECK(!inputs.is_fp8() && !this->weight_quantizer->scheme().is_fp8(),
                "convolutions run on integer codes, not FP8: change the recipe or skip the layer");
  VERNIER_CHECK(inputs.granularity == Granularity::per_tensor,
                "the input of an integer convolution has one scale, not ", to_string(inputs),
                ": use per_tensor, or skip the layer");
  QuantizedLayer::prepare_integer();
}

template <size_t D, typename Derived, typename Plain>
void ConvolutionNd<D, Derived, Plain>::weight_codes_changed() {
  kernel_codes_ = convolution_weight(this->weight_codes(), this->options.groups(), kTransposed);
  kernel_sum_ = kernel_codes_.flatten(1).sum(1, /*keepdim=*/false, torch::kInt);
}

// The input with the padding that the kernels do not do themselves. Codes go by their real values,
// of which they are the codes again.
template <size_t D, typename Derived, typename Plain>
Tensor ConvolutionNd<D, Derived, Plain>::pad_codes(const Tensor& input) const {
  if constexpr (kTransposed) return input;
  const Padding p = padding();
  if (p.before.empty()) return input;
  const Tensor real =
      is_codes(input) ? this->input_quantizer->dequantize(input, torch::kFloat) : input;
  const Tensor padded = F::pad(real, F::PadFuncOptions(p.before).mode(p.mode));
  return is_codes(input) ? this->input_quantizer->codes(padded).codes : padded;
}

template <size_t D, typename Derived, typename Plain>
Tensor ConvolutionNd<D, Derived, Plain>::accumulators(at::TensorList codes) const {
  const Tensor padded = pad_codes(codes[0]);
  const bool batched = padded.dim() == static_cast<int64_t>(D) + 2;
  const auto zero_point = this->input_quantizer->zero_point();
  const Tensor sums = int8_convolution_accumulators(
      batched ? padded : padded.unsqueeze(0), kernel_codes_, zero_point,
      zero_point ? std::optional<Tensor>(kernel_sum_) : std::nullopt, settings(codes));
  return batched ? sums : sums.squeeze(0);
}

template <size_t D, typename Derived, typename Plain>
Tensor ConvolutionNd<D, Derived, Plain>::integer_compute(at::TensorList inputs) const {
  const Tensor& input = inputs[0];
  const torch::Dtype dtype = this->output_dtype(input);
  const bool batched = input.dim() == static_cast<int64_t>(D) + 2;
  // As the kernels read it, so that codes are made without a copy of the input.
  const auto format = batched ? input.suggest_memory_format() : torch::MemoryFormat::Contiguous;
  Tensor values = pad_codes(batched ? input : input.unsqueeze(0));
  if (format != torch::MemoryFormat::Contiguous) values = values.movedim(1, -1);
  auto [codes, scale] = this->input_codes(0, values);
  if (format != torch::MemoryFormat::Contiguous) codes = codes.movedim(-1, 1);
  Int8LinearOperands operands{codes, kernel_codes_, scale,
                              this->weight_quantizer->scale().detach()};
  if (kTransposed && operands.weight_scale.numel() > 1)  // those of one group; all have the same
    operands.weight_scale = operands.weight_scale.repeat({this->options.groups()});
  if (const Tensor added = this->float_bias(); added.defined())
    operands.bias = added.detach().to(torch::kFloat);
  operands.input_zero_point = this->input_quantizer->zero_point();
  if (operands.input_zero_point) operands.weight_sum = kernel_sum_;
  const auto shaped = [&](const Tensor& output) {
    const Tensor like_input = output.contiguous(format);
    return batched ? like_input : like_input.squeeze(0);
  };
  const Quantizer& to = this->output_quantizer;
  if (!to || to->scheme().is_fp8())
    return this->finish(shaped(int8_convolution(operands, settings(inputs), dtype)));
  return this->finish_codes(
      shaped(int8_convolution_requantize(operands, settings(inputs), to->scale().detach(),
                                         to->zero_point(), to->scheme())),
      dtype);
}

template class ConvolutionNd<1, Conv1dImpl, torch::nn::Conv1dImpl>;
template class ConvolutionNd<2, Conv2dImpl, torch::nn::Conv2dImpl>;
template class ConvolutionNd<3, Conv3dImpl, torch::nn::Conv3dImpl>;
template class ConvolutionNd<1, ConvTranspose1dImpl, torch::nn::ConvTranspose1dImpl>;
template class ConvolutionNd<2, ConvTranspose2dImpl, torch::nn::ConvTranspose2dImpl>;
template class ConvolutionNd<3, ConvTranspose3dImpl, torch::nn::ConvTranspose3dImpl>;

}  // namespace vernier::nn
