#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
#include <vernier/kernels/dispatch.h>
#include <vernier/kernels/fp8.h>
#include <vernier/kernels/quantize.h>
#include <vernier/kernels/quantize_device.h>

namespace vernier {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// How a scheme travels through an operator's schema. Symmetric means: no zero point.
constexpr const char* kSchemeArguments =
    "int bits=8, str granularity=\"per_tensor\", int axis=0, int group_size=0, bool "
    "narrow_range=True";

Scheme scheme_from_arguments(const OptionalTensor& zero_point, int64_t bits,
                             std::string_view granularity, int64_t group_size, bool narrow_range) {
  Scheme scheme;
  VERNIER_CHECK(bits >= 2 && bits <= 8, "bits must be 2 to 8, not ", bits);
  scheme.bits = static_cast<int>(bits);
  scheme.granularity = granularity_from_string(std::string(granularity));
  scheme.group_size = group_size;
  scheme.symmetric = !zero_point.has_value();
  scheme.narrow_range = narrow_range;
  scheme.check();
  return scheme;
}

ScaleMap scale_map(const Tensor& input, const Scheme& scheme, int64_t axis) {
  const int64_t numel = input.numel();
  const int64_t columns = columns_of(input);
  switch (scheme.granularity) {
    case Granularity::per_tensor:
      return {std::max<int64_t>(numel, 1), 1};
    case Granularity::per_token:
      return {std::max<int64_t>(columns, 1), rows_of(input)};
    case Granularity::per_group:
      VERNIER_CHECK(columns % scheme.group_size == 0, "group_size ", scheme.group_size,
                    " does not divide the last axis of ", input.sizes());
      return {scheme.group_size, numel / scheme.group_size};
    case Granularity::per_channel:
      break;
  }
  const int64_t dim = input.dim();
  VERNIER_CHECK(axis >= -dim && axis < dim, "axis ", axis, " is outside a tensor of shape ",
                input.sizes());
  axis = axis < 0 ? axis + dim : axis;
  int64_t inner = 1;
  for (int64_t i = axis + 1; i < dim; ++i) inner *= input.size(i);
  return {std::max<int64_t>(inner, 1), input.size(axis)};
}

void check_scale(const Tensor& input, const Tensor& scale, const OptionalTensor& zero_point,
                 const Scheme& scheme, const ScaleMap& map) {
  check_tensor(scale, "scale", at::kFloat, input);
  VERNIER_CHECK(scale.numel() == map.count, "scale has ", scale.numel(), " elements but ",
                to_string(scheme.granularity), " needs ", map.count, " for a tensor of shape ",
                input.sizes());
  if (zero_point) {
    check_tensor(*zero_point, "zero_point", at::kInt, input);
    VERNIER_CHECK(zero_point->numel() == map.count, "zero_point has ", zero_point->numel(),
                  " elements and scale ", map.count, ": they must agree");
  }
}

// Contiguous operands, kept alive beside the raw arguments that point into them.
struct Prepared {
  Tensor input, scale, zero_point;
  QuantizeArguments arguments;

  Prepared(const Tensor& x, ElementType type, const Tensor& s, const OptionalTensor& z,
           const Scheme& scheme, int64_t axis)
      : input(x.contiguous()), scale(s.contiguous()) {
    if (z) zero_point = z->contiguous();
    arguments.map = scale_map(x, scheme, axis);
    check_scale(x, s, z, scheme, arguments.map);
    arguments.input = input.const_data_ptr();
    arguments.input_type = type;
    arguments.numel = input.numel();
    arguments.scale = scale.const_data_ptr<float>();
    arguments.zero_point = z ? zero_point.const_data_ptr<int32_t>() : nullptr;
    arguments.qmin = scheme.qmin();
    arguments.qmax = scheme.qmax();
  }
};

Tensor quantize_kernel(const Tensor& input, const Tensor& scale, const OptionalTensor& zero_point,
                       int64_t bits, std::string_view granularity, int64_t axis, int64_t group_size,
                       bool narrow_range) {
  const Scheme scheme =
      scheme_from_arguments(zero_point, bits, granularity, group_size, narrow_range);
  const Prepared p(input, element_type_of(input.scalar_type(), "input"), scale, zero_point, scheme,
                   axis);
  Tensor codes = at::empty(input.sizes(), input.options().dtype(at::kChar));
  int8_t* out = codes.data_ptr<int8_t>();
  on_device_of(
      input, [&] { cpu::quantize(p.arguments, out); },
      [&](void* stream) { cuda::quantize(p.arguments, out, stream); });
  return codes;
}

Tensor dequantize_kernel(const Tensor& codes, const Tensor& scale, const OptionalTensor& zero_point,
                         int64_t bits, std::string_view granularity, int64_t axis,
                         int64_t group_size, bool narrow_range, at::ScalarType dtype) {
  check_tensor(codes, "codes", at::kChar, codes);
  const Scheme scheme =
      scheme_from_arguments(zero_point, bits, granularity, group_size, narrow_range);
  const Prepared p(codes, element_type_of(dtype, "dtype"), scale, zero_point, scheme, axis);
  Tensor output = at::empty(codes.sizes(), codes.options().dtype(dtype));
  void* out = output.data_ptr();
  on_device_of(
      codes, [&] { cpu::dequantize(p.arguments, out); },
      [&](void* stream) { cuda::dequantize(p.arguments, out, stream); });
  return output;
}

Tensor fake_quantize_kernel(const Tensor& input, const Tensor& scale,
                            const OptionalTensor& zero_point, int64_t bits,
                            std::string_view granularity, int64_t axis, int64_t group_size,
                            bool narrow_range) {
  const Scheme scheme =
      scheme_from_arguments(zero_point, bits, granularity, group_size, narrow_range);
  const Prepared p(input, element_type_of(input.scalar_type(), "input"), scale, zero_point, scheme,
                   axis);
  Tensor output = at::empty(input.sizes(), input.options());
  void* out = output.data_ptr();
  on_device_of(
      input, [&] { cpu::fake_quantize(p.arguments, out); },
      [&](void* stream) { cuda::fake_quantize(p.arguments, out, stream); });
  return output;
}

Tensor fake_quantize_backward_kernel(const Tensor& gradient, const Tensor& input,
                                     const Tensor& scale, const OptionalTensor& zero_point,
                                     int64_t bits, std::string_view granularity, int64_t axis,
                                     int64_t group_size, bool narrow_range) {
  const Scheme scheme =
      scheme_from_arguments(zero_point, bits, granularity, group_size, narrow_range);
  check_tensor(gradient, "gradient", input.scalar_type(), input);
  VERNIER_CHECK(gradient.sizes() == input.sizes(), "gradient has shape ", gradient.sizes(),
                " but the input has ", input.sizes());
  const Prepared p(input, element_type_of(input.scalar_type(), "input"), scale, zero_point, scheme,
                   axis);
  const Tensor dense = gradient.contiguous();
  const void* grad = dense.const_data_ptr();
  Tensor output = at::empty(input.sizes(), input.options());
  void* out = output.data_ptr();
  on_device_of(
      input, [&] { cpu::fake_quantize_backward(p.arguments, grad, out); },
      [&](void* stream) { cuda::fake_quantize_backward(p.arguments, grad, out, stream); });
  return output;
}

Scheme per_token_scheme(int64_t bits, bool narrow_range) {
  return scheme_from_arguments(std::nullopt, bits, "per_token", 0, narrow_range);
}

Tensor empty_row_scales(const Tensor& input) {
  const auto sizes = input.sizes();
  return at::empty(sizes.slice(0, sizes.empty() ? 0 : sizes.size() - 1),
                   input.options().dtype(at::kFloat));
}

Tensor per_token_scale_kernel(const Tensor& input, int64_t bits, bool narrow_range) {
  const Scheme scheme = per_token_scheme(bits, narrow_range);
  const ElementType type = element_type_of(input.scalar_type(), "input");
  const Tensor x = input.contiguous();
  Tensor scale = empty_row_scales(input);
  float* out = scale.data_ptr<float>();
  const int64_t rows = rows_of(x), columns = columns_of(x);
  on_device_of(
      x, [&] { cpu::per_token_scale(x.const_data_ptr(), type, rows, columns, scheme.qmax(), out); },
      [&](void* stream) {
        cuda::per_token_scale(x.const_data_ptr(), type, rows, columns, scheme.qmax(), out, stream);
      });
  return scale;
}

std::tuple<Tensor, Tensor> quantize_per_token_kernel(const Tensor& input, int64_t bits,
                                                     bool narrow_range) {
  const Scheme scheme = per_token_scheme(bits, narrow_range);
  const ElementType type = element_type_of(input.scalar_type(), "input");
  const Tensor x = input.contiguous();
  Tensor scale = empty_row_scales(input);
  Tensor codes = at::empty(input.sizes(), input.options().dtype(at::kChar));
  float* scale_out = scale.data_ptr<float>();
  int8_t* codes_out = codes.data_ptr<int8_t>();
  const int64_t rows = rows_of(x), columns = columns_of(x);
  on_device_of(
      x,
      [&] {
        cpu::quantize_per_token(x.const_data_ptr(), type, rows, columns, scheme.qmin(),
                                scheme.qmax(), codes_out, scale_out);
      },
      [&](void* stream) {
        cuda::quantize_per_token(x.const_data_ptr(), type, rows, columns, scheme.qmin(),
                                 scheme.qmax(), codes_out, scale_out, stream);
      });
  return {codes, scale};
}

// Shapes and dtypes without data, for tracing. A meta operand beside a real input comes here, too.
void check_meta(const Tensor& input) {
  VERNIER_CHECK(input.is_meta(), "an operand is on meta but the input is on ", input.device(),
                ": move one of them");
}

Tensor quantize_meta(const Tensor& input, const Tensor&, const OptionalTensor&, int64_t,
                     std::string_view, int64_t, int64_t, bool) {
  check_meta(input);
  return at::empty_symint(input.sym_sizes(), input.options().dtype(at::kChar));
}
Tensor dequantize_meta(const Tensor& codes, const Tensor&, const OptionalTensor&, int64_t,
                       std::string_view, int64_t, int64_t, bool, at::ScalarType dtype) {
  check_meta(codes);
  return at::empty_symint(codes.sym_sizes(), codes.options().dtype(dtype));
}
Tensor fake_quantize_meta(const Tensor& input, const Tensor&, const OptionalTensor&, int64_t,
                          std::string_view, int64_t, int64_t, bool) {
  check_meta(input);
  return at::empty_symint(input.sym_sizes(), input.options());
}
Tensor fake_quantize_backward_meta(const Tensor&, const Tensor& input, const Tensor&,
                                   const OptionalTensor&, int64_t, std::string_view, int64_t,
                                   int64_t, bool) {
  check_meta(input);
  return at::empty_symint(input.sym_sizes(), input.options());
}
Tensor per_token_scale_meta(const Tensor& input, int64_t, bool) {
  check_meta(input);
  const auto sizes = input.sym_sizes();
  return at::empty_symint(sizes.slice(0, sizes.empty() ? 0 : sizes.size() - 1),
                          input.options().dtype(at::kFloat));
}
std::tuple<Tensor, Tensor> quantize_per_token_meta(const Tensor& input, int64_t bits,
                                                   bool narrow_range) {
  check_meta(input);
  return {at::empty_symint(input.sym_sizes(), input.options().dtype(at::kChar)),
          per_token_scale_meta(input, bits, narrow_range)};
}

auto& quantize_operator() {
  static const auto op = operator_handle<decltype(quantize_kernel)>("vernier::quantize");
  return op;
}
auto& dequantize_operator() {
  static const auto op = operator_handle<decltype(dequantize_kernel)>("vernier::dequantize");
  return op;
}
auto& fake_quantize_operator() {
  static const auto op = operator_handle<decltype(fake_quantize_kernel)>("vernier::fake_quantize");
  return op;
}
auto& fake_quantize_backward_operator() {
  static const auto op =
      operator_handle<decltype(fake_quantize_backward_kernel)>("vernier::fake_quantize_backward");
  return op;
}
auto& per_token_scale_operator() {
  static const auto op =
      operator_handle<decltype(per_token_scale_kernel)>("vernier::per_token_scale");
  return op;
}
auto& quantize_per_token_operator() {
  static const auto op =
      operator_handle<decltype(quantize_per_token_kernel)>("vernier::quantize_per_token");
  return op;
}

// Straight-through estimator. The mask is recomputed from the input, which the layer keeps alive
// anyway.
class FakeQuantizeFunction : public torch::autograd::Function<FakeQuantizeFunction> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& input,
                        const Tensor& scale, const OptionalTensor& zero_point, int64_t bits,
                        const std::string& granularity, int64_t axis, int64_t group_size,
                        bool narrow_range) {
    const at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({input, scale, zero_point.value_or(Tensor())});
    context->saved_data["bits"] = bits;
    context->saved_data["granularity"] = granularity;
    context->saved_data["axis"] = axis;
    context->saved_data["group_size"] = group_size;
    context->saved_data["narrow_range"] = narrow_range;
    return fake_quantize_operator().call(input, scale, zero_point, bits, granularity, axis,
                                         group_size, narrow_range);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    auto& data = context->saved_data;
    const OptionalTensor zero_point =
        saved[2].defined() ? OptionalTensor(saved[2]) : OptionalTensor();
    const std::string granularity = data["granularity"].toStringRef();
    Tensor result = fake_quantize_backward_operator().call(
        gradients[0], saved[0], saved[1], zero_point, data["bits"].toInt(), granularity,
        data["axis"].toInt(), data["group_size"].toInt(), data["narrow_range"].toBool());
    return {result, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor fake_quantize_autograd(const Tensor& input, const Tensor& scale,
                              const OptionalTensor& zero_point, int64_t bits,
                              std::string_view granularity, int64_t axis, int64_t group_size,
                              bool narrow_range) {
  return FakeQuantizeFunction::apply(input, scale, zero_point, bits, std::string(granularity), axis,
                                     group_size, narrow_range);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vernier, m) {
  const std::string scheme = kSchemeArguments;
  const std::string operands = "Tensor scale, Tensor? zero_point=None, *, " + scheme;
  m.def(("quantize(Tensor input, " + operands + ") -> Tensor").c_str());
  m.def(("dequantize(Tensor codes, " + operands + ", ScalarType dtype=float) -> Tensor").c_str());
  m.def(("fake_quantize(Tensor input, " + operands + ") -> Tensor").c_str());
  m.def(("fake_quantize_backward(Tensor gradient, Tensor input, " + operands + ") -> Tensor")
            .c_str());
  m.def("per_token_scale(Tensor input, *, int bits=8, bool narrow_range=True) -> Tensor");
  m.def(
      "quantize_per_token(Tensor input, *, int bits=8, bool narrow_range=True) -> (Tensor, "
      "Tensor)");
}

#define VERNIER_REGISTER_QUANTIZE(m)                                         \
  m.impl("quantize", TORCH_FN(quantize_kernel));                             \
  m.impl("dequantize", TORCH_FN(dequantize_kernel));                         \
  m.impl("fake_quantize", TORCH_FN(fake_quantize_kernel));                   \
  m.impl("fake_quantize_backward", TORCH_FN(fake_quantize_backward_kernel)); \
  m.impl("per_token_scale", TORCH_FN(per_token_scale_kernel));               \
  m.impl("quantize_per_token", TORCH_FN(quantize_per_token_kernel))

TORCH_LIBRARY_IMPL(vernier, CPU, m) { VERNIER_REGISTER_QUANTIZE(m); }
#ifdef VERNIER_WITH_CUDA
TORCH_LIBRARY_IMPL(vernier, CUDA, m) { VERNIER_REGISTER_QUANTIZE(m); }
#endif
TORCH_LIBRARY_IMPL(vernier, Meta, m) {
  m.impl("quantize", TORCH_FN(quantize_meta));
  m.impl("dequantize", TORCH_FN(dequantize_meta));
  m.impl("fake_quantize", TORCH_FN(fake_quantize_meta));
  m.impl("fake_quantize_backward", TORCH_FN(fake_quantize_backward_meta));
  m.impl("per_token_scale", TORCH_FN(per_token_scale_meta));
  m.impl("quantize_per_token", TORCH_FN(quantize_per_token_meta));
}
TORCH_LIBRARY_IMPL(vernier, Autograd, m) {
  m.impl("fake_quantize", TORCH_FN(fake_quantize_autograd));
}

namespace {

// A scheme without zero points when they are absent, so that qmin and qmax agree with the
// operator's view.
void check_zero_point(const Scheme& scheme, const OptionalTensor& zero_point) {
  VERNIER_CHECK(scheme.symmetric != zero_point.has_value(),
                scheme.symmetric ? "a symmetric scheme takes no zero_point"
                                 : "an asymmetric scheme needs a zero_point");
}

}  // namespace

Tensor quantize(const Tensor& input, const Tensor& scale, const OptionalTensor& zero_point,
                const Scheme& scheme, int64_t axis) {
  check_zero_point(scheme, zero_point);
  if (scheme.is_fp8()) return quantize_fp8(input, scale, scheme, axis);
  return quantize_operator().call(input, scale, zero_point, scheme.bits,
                                  to_string(scheme.granularity), axis, scheme.group_size,
                                  scheme.narrow_range);
}

Tensor dequantize(const Tensor& codes, const Tensor& scale, const OptionalTensor& zero_point,
                  const Scheme& scheme, int64_t axis, at::ScalarType dtype) {
  check_zero_point(scheme, zero_point);
  if (scheme.is_fp8()) return dequantize_fp8(codes, scale, scheme, axis, dtype);
  return dequantize_operator().call(codes, scale, zero_point, scheme.bits,
                                    to_string(scheme.granularity), axis, scheme.group_size,
                                    scheme.narrow_range, dtype);
}

Tensor fake_quantize(const Tensor& input, const Tensor& scale, const OptionalTensor& zero_point,
                     const Scheme& scheme, int64_t axis) {
  check_zero_point(scheme, zero_point);
  if (scheme.is_fp8()) return fake_quantize_fp8(input, scale, scheme, axis);
  return fake_quantize_operator().call(input, scale, zero_point, scheme.bits,
                                       to_string(scheme.granularity), axis, scheme.group_size,
                                       scheme.narrow_range);
}

Tensor per_token_scale(const Tensor& input, const Scheme& scheme) {
  if (scheme.is_fp8()) return per_token_scale_fp8(input, scheme.format);
  return per_token_scale_operator().call(input, scheme.bits, scheme.narrow_range);
}

std::pair<Tensor, Tensor> quantize_per_token(const Tensor& input, const Scheme& scheme) {
  if (scheme.is_fp8()) return quantize_fp8_per_token(input, scheme.format);
  auto [codes, scale] = quantize_per_token_operator().call(input, scheme.bits, scheme.narrow_range);
  return {std::move(codes), std::move(scale)};
}

}  // namespace vernier
