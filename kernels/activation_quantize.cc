#include <torch/library.h>
#include <vernier/kernels/activation_quantize.h>
#include <vernier/kernels/activation_quantize_device.h>
#include <vernier/kernels/row_quantize_dispatch.h>

namespace vernier {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Results = std::tuple<Tensor, Tensor, Tensor>;  // codes, scale, output

// Whether the input's last axis holds gate and up.
bool holds_both(bool gated, const OptionalTensor& up) {
  VERNIER_CHECK(gated || !up.has_value(), "up without gated: set gated to true");
  return gated && !up.has_value();
}

// Elements from a row of [..., C] to the next; absent where rows do not follow each other evenly.
std::optional<int64_t> row_stride_of(const Tensor& x) {
  if (x.is_contiguous()) return columns_of(x);
  if (x.dim() < 2 || x.stride(-1) != 1) return std::nullopt;
  for (int64_t i = x.dim() - 2; i > 0; --i)
    if (x.stride(i - 1) != x.stride(i) * x.size(i)) return std::nullopt;
  return x.stride(-2);
}

Results activation_quantize_kernel(const Tensor& input, std::string_view activation,
                                   const OptionalTensor& up, bool gated,
                                   const OptionalTensor& scale, const OptionalTensor& zero_point,
                                   const OptionalTensor& pre_scale, int64_t bits, bool narrow_range,
                                   std::string_view layout, bool with_output) {
  const bool both = holds_both(gated, up);
  const int64_t width = columns_of(input);
  VERNIER_CHECK(!both || (width % 2 == 0 && input.dim() > 0),
                "the last axis of the input holds gate and up and must be even, not ", width);
  const PreparedRowCodes p(
      input, both ? width / 2 : width,
      row_quantization(scale, zero_point, pre_scale, bits, narrow_range, layout, with_output));
  Tensor x = input, factors;
  if (up) {
    check_tensor(*up, "up", input.scalar_type(), input);
    VERNIER_CHECK(up->sizes() == input.sizes(), "up has shape ", up->sizes(), " but the gate has ",
                  input.sizes());
    factors = *up;
  }
  std::optional<int64_t> stride = row_stride_of(x);
  if (!stride || (up && row_stride_of(factors) != stride)) {
    x = x.contiguous();
    if (up) factors = factors.contiguous();
    stride = width;
  }
  ActivationQuantizeArguments arguments;
  arguments.codes = p.raw;
  arguments.activation = activation_from_string(std::string(activation));
  arguments.input = x.const_data_ptr();
  arguments.row_stride = *stride;
  if (both) {
    arguments.up = static_cast<const char*>(arguments.input) + p.raw.columns * x.element_size();
  } else if (up) {
    arguments.up = factors.const_data_ptr();
  }
  on_device_of(
      x, [&] { cpu::activation_quantize(arguments); },
      [&](void* stream) { cuda::activation_quantize(arguments, stream); });
  return {p.codes, p.scale, p.output};
}

Results activation_quantize_meta(const Tensor& input, std::string_view, const OptionalTensor& up,
                                 bool gated, const OptionalTensor& scale, const OptionalTensor&,
                                 const OptionalTensor&, int64_t, bool, std::string_view layout,
                                 bool with_output) {
  const c10::SymInt width = input.dim() ? input.sym_size(-1) : c10::SymInt(1);
  return meta_row_codes(input, holds_both(gated, up) ? width / 2 : width, !scale.has_value(),
                        layout, with_output);
}

RowCodesResult call(const Tensor& input, Activation activation, const OptionalTensor& up,
                    bool gated, const RowQuantization& q) {
  static const auto op =
      operator_handle<decltype(activation_quantize_kernel)>("vernier::activation_quantize");
  const std::string name = to_string(activation);
  const auto [codes, scale, output] =
      op.call(input, name, up, gated, q.scale, q.zero_point, q.pre_scale, q.bits, q.narrow_range,
              layout_name(q), q.with_output);
  RowCodesResult out;
  out.codes = codes;
  if (!q.scale) out.scale = scale;
  if (q.with_output) out.output = output;
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vernier, m) {
  m.def((std::string("activation_quantize(Tensor input, str activation, *, Tensor? up=None, bool "
                     "gated=False, ") +
         kRowQuantizationSchema + ") -> (Tensor codes, Tensor scale, Tensor output)")
            .c_str());
}
TORCH_LIBRARY_IMPL(vernier, CPU, m) {
  m.impl("activation_quantize", TORCH_FN(activation_quantize_kernel));
}
#ifdef VERNIER_WITH_CUDA
TORCH_LIBRARY_IMPL(vernier, CUDA, m) {
  m.impl("activation_quantize", TORCH_FN(activation_quantize_kernel));
}
#endif
TORCH_LIBRARY_IMPL(vernier, Meta, m) {
  m.impl("activation_quantize", TORCH_FN(activation_quantize_meta));
}

RowCodesResult activation_quantize(const Tensor& input, Activation activation,
                                   const RowQuantization& quantization) {
  return call(input, activation, std::nullopt, false, quantization);
}

RowCodesResult gated_activation_quantize(const Tensor& gate, const OptionalTensor& up,
                                         Activation activation,
                                         const RowQuantization& quantization) {
  return call(gate, activation, up, true, quantization);
}

}  // namespace vernier
