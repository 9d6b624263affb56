#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <vernier/kernels/norm_quantize.h>
#include <vernier/kernels/norm_quantize_device.h>
#include <vernier/kernels/row_quantize_dispatch.h>

namespace vernier {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // codes, scale, sum, output

// weight or bias, contiguous; undefined where absent.
Tensor parameter(const OptionalTensor& tensor, const char* what, const Tensor& input) {
  if (!tensor) return {};
  const at::ScalarType dtype = tensor->scalar_type();
  check_tensor(*tensor, what, dtype == at::kFloat ? at::kFloat : input.scalar_type(), input);
  VERNIER_CHECK(tensor->numel() == columns_of(input), what, " has ", tensor->numel(),
                " elements but the last axis of the input ", columns_of(input));
  return tensor->contiguous();
}

Results norm_quantize(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                      bool centered, double epsilon, const OptionalTensor& residual,
                      const RowQuantization& quantization) {
  const PreparedRowCodes p(input, columns_of(input), quantization);
  const Tensor x = input.contiguous();
  const Tensor w = parameter(weight, "weight", input), b = parameter(bias, "bias", input);
  VERNIER_CHECK(!w.defined() || !b.defined() || w.scalar_type() == b.scalar_type(), "weight is ",
                c10::toString(w.scalar_type()), " but bias ", c10::toString(b.scalar_type()),
                ": they must agree");
  Tensor added;
  Tensor sum = at::empty({0}, input.options());
  if (residual) {
    check_tensor(*residual, "residual", input.scalar_type(), input);
    VERNIER_CHECK(residual->sizes() == input.sizes(), "residual has shape ", residual->sizes(),
                  " but the input has ", input.sizes());
    added = residual->contiguous();
    sum = at::empty(input.sizes(), input.options());
  }

  NormQuantizeArguments arguments;
  arguments.codes = p.raw;
  arguments.input = x.const_data_ptr();
  if (residual) {
    arguments.residual = added.const_data_ptr();
    arguments.sum = sum.data_ptr();
  }
  if (w.defined()) arguments.weight = w.const_data_ptr();
  if (b.defined()) arguments.bias = b.const_data_ptr();
  if (w.defined() || b.defined())
    arguments.weight_type = element_type_of((w.defined() ? w : b).scalar_type(), "weight");
  arguments.centered = centered;
  arguments.epsilon = static_cast<float>(epsilon);
  on_device_of(
      x, [&] { cpu::norm_quantize(arguments); },
      [&](void* stream) { cuda::norm_quantize(arguments, stream); });
  return {p.codes, p.scale, sum, p.output};
}

Results layer_norm_quantize_kernel(const Tensor& input, const OptionalTensor& weight,
                                   const OptionalTensor& bias, double epsilon,
                                   const OptionalTensor& residual, const OptionalTensor& scale,
                                   const OptionalTensor& zero_point,
                                   const OptionalTensor& pre_scale, int64_t bits, bool narrow_range,
                                   std::string_view layout, bool with_output) {
  return norm_quantize(
      input, weight, bias, true, epsilon, residual,
      row_quantization(scale, zero_point, pre_scale, bits, narrow_range, layout, with_output));
}

Results rms_norm_quantize_kernel(const Tensor& input, const OptionalTensor& weight, double epsilon,
                                 const OptionalTensor& residual, const OptionalTensor& scale,
                                 const OptionalTensor& zero_point, const OptionalTensor& pre_scale,
                                 int64_t bits, bool narrow_range, std::string_view layout,
                                 bool with_output) {
  return norm_quantize(
      input, weight, std::nullopt, false, epsilon, residual,
      row_quantization(scale, zero_point, pre_scale, bits, narrow_range, layout, with_output));
}

Results norm_quantize_meta(const Tensor& input, bool dynamic, bool with_sum,
                           std::string_view layout, bool with_output) {
  const c10::SymInt columns = input.dim() ? input.sym_size(-1) : c10::SymInt(1);
  const auto [codes, scale, output] = meta_row_codes(input, columns, dynamic, layout, with_output);
  const Tensor sum = with_sum ? at::empty_symint(input.sym_sizes(), input.options())
                              : at::empty({0}, input.options());
  return {codes, scale, sum, output};
}

Results layer_norm_quantize_meta(const Tensor& input, const OptionalTensor&, const OptionalTensor&,
                                 double, const OptionalTensor& residual,
                                 const OptionalTensor& scale, const OptionalTensor&,
                                 const OptionalTensor&, int64_t, bool, std::string_view layout,
                                 bool with_output) {
  return norm_quantize_meta(input, !scale.has_value(), residual.has_value(), layout, with_output);
}

Results rms_norm_quantize_meta(const Tensor& input, const OptionalTensor&, double,
                               const OptionalTensor& residual, const OptionalTensor& scale,
                               const OptionalTensor&, const OptionalTensor&, int64_t, bool,
                               std::string_view layout, bool with_output) {
  return norm_quantize_meta(input, !scale.has_value(), residual.has_value(), layout, with_output);
}

NormCodes results_of(const Results& results, const RowQuantization& q, const NormOptions& options) {
  const auto& [codes, scale, sum, output] = results;
  NormCodes out;
  out.codes = codes;
  if (!q.scale) out.scale = scale;
  if (options.residual) out.sum = sum;
  if (q.with_output) out.output = output;
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vernier, m) {
  const std::string tail = std::string("float eps=1e-5, *, Tensor? residual=None, ") +
                           kRowQuantizationSchema +
                           ") -> (Tensor codes, Tensor scale, Tensor sum, Tensor output)";
  m.def(("layer_norm_quantize(Tensor input, Tensor? weight=None, Tensor? bias=None, " + tail)
            .c_str());
  m.def(("rms_norm_quantize(Tensor input, Tensor? weight=None, " + tail).c_str());
}
TORCH_LIBRARY_IMPL(vernier, CPU, m) {
  m.impl("layer_norm_quantize", TORCH_FN(layer_norm_quantize_kernel));
  m.impl("rms_norm_quantize", TORCH_FN(rms_norm_quantize_kernel));
}
#ifdef VERNIER_WITH_CUDA
TORCH_LIBRARY_IMPL(vernier, CUDA, m) {
  m.impl("layer_norm_quantize", TORCH_FN(layer_norm_quantize_kernel));
  m.impl("rms_norm_quantize", TORCH_FN(rms_norm_quantize_kernel));
}
#endif
TORCH_LIBRARY_IMPL(vernier, Meta, m) {
  m.impl("layer_norm_quantize", TORCH_FN(layer_norm_quantize_meta));
  m.impl("rms_norm_quantize", TORCH_FN(rms_norm_quantize_meta));
}

NormCodes layer_norm_quantize(const Tensor& input, const OptionalTensor& weight,
                              const OptionalTensor& bias, const RowQuantization& q,
                              const NormOptions& options) {
  static const auto op =
      operator_handle<decltype(layer_norm_quantize_kernel)>("vernier::layer_norm_quantize");
  return results_of(
      op.call(input, weight, bias, options.epsilon, options.residual, q.scale, q.zero_point,
              q.pre_scale, q.bits, q.narrow_range, layout_name(q), q.with_output),
      q, options);
}

NormCodes rms_norm_quantize(const Tensor& input, const OptionalTensor& weight,
                            const RowQuantization& q, const NormOptions& options) {
  static const auto op =
      operator_handle<decltype(rms_norm_quantize_kernel)>("vernier::rms_norm_quantize");
  return results_of(op.call(input, weight, options.epsilon, options.residual, q.scale, q.zero_point,
                            q.pre_scale, q.bits, q.narrow_range, layout_name(q), q.with_output),
                    q, options);
}

}  // namespace vernier
