#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
#include <vernier/kernels/dispatch.h>
#include <vernier/kernels/fp8.h>
#include <vernier/kernels/fp8_device.h>
#include <vernier/kernels/quantize_device.h>

namespace vernier {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// How a scheme travels through an operator's schema.
constexpr const char* kSchemeArguments =
    "str format=\"e4m3\", str granularity=\"per_tensor\", int axis=0, int group_size=0";

NumberFormat fp8_format(std::string_view name) {
  const NumberFormat format = number_format_from_string(std::string(name));
  VERNIER_CHECK(format != NumberFormat::integer, "format must be e4m3 or e5m2, not int");
  return format;
}

Scheme scheme_from_arguments(std::string_view format, std::string_view granularity,
                             int64_t group_size) {
  return fp8_scheme(fp8_format(format), granularity_from_string(std::string(granularity)),
                    group_size);
}

bool is_fp8_dtype(at::ScalarType type) {
  return type == at::kFloat8_e4m3fn || type == at::kFloat8_e5m2;
}

void check_codes(const Tensor& codes, const char* what, const Tensor& other) {
  VERNIER_CHECK(is_fp8_dtype(codes.scalar_type()), what,
                " must be float8_e4m3fn or float8_e5m2, not ", c10::toString(codes.scalar_type()));
  check_tensor(codes, what, codes.scalar_type(), other);
}

NumberFormat format_of(const Tensor& codes) {
  return codes.scalar_type() == at::kFloat8_e4m3fn ? NumberFormat::e4m3 : NumberFormat::e5m2;
}

uint8_t* code_pointer(const Tensor& codes) { return static_cast<uint8_t*>(codes.data_ptr()); }

// Contiguous operands, kept alive beside the raw arguments that point into them.
struct Prepared {
  Tensor input, scale;
  Fp8Arguments arguments;

  Prepared(const Tensor& x, ElementType type, const Tensor& s, const Scheme& scheme, int64_t axis)
      : input(x.contiguous()), scale(s.contiguous()) {
    check_tensor(s, "scale", at::kFloat, x);
    arguments.format = scheme.format;
    arguments.map = scale_map_of(x, scheme, axis);
    VERNIER_CHECK(s.numel() == arguments.map.count, "scale has ", s.numel(), " elements but ",
                  to_string(scheme.granularity), " needs ", arguments.map.count,
                  " for a tensor of shape ", x.sizes());
    arguments.input = input.const_data_ptr();
    arguments.type = type;
    arguments.numel = input.numel();
    arguments.scale = scale.const_data_ptr<float>();
  }
};

Tensor quantize_kernel(const Tensor& input, const Tensor& scale, std::string_view format,
                       std::string_view granularity, int64_t axis, int64_t group_size) {
  const Scheme scheme = scheme_from_arguments(format, granularity, group_size);
  const Prepared p(input, element_type_of(input.scalar_type(), "input"), scale, scheme, axis);
  const Tensor codes = at::empty(input.sizes(), input.options().dtype(fp8_dtype(scheme.format)));
  uint8_t* out = code_pointer(codes);
  on_device_of(
      input, [&] { cpu::quantize_fp8(p.arguments, out); },
      [&](void* stream) { cuda::quantize_fp8(p.arguments, out, stream); });
  return codes;
}

Tensor dequantize_kernel(const Tensor& codes, const Tensor& scale, std::string_view granularity,
                         int64_t axis, int64_t group_size, at::ScalarType dtype) {
  check_codes(codes, "codes", codes);
  const Scheme scheme = scheme_from_arguments(to_string(format_of(codes)), granularity, group_size);
  const Prepared p(codes, element_type_of(dtype, "dtype"), scale, scheme, axis);
  Tensor output = at::empty(codes.sizes(), codes.options().dtype(dtype));
  void* out = output.data_ptr();
  on_device_of(
      codes, [&] { cpu::dequantize_fp8(p.arguments, out); },
      [&](void* stream) { cuda::dequantize_fp8(p.arguments, out, stream); });
  return output;
}

Tensor fake_quantize_kernel(const Tensor& input, const Tensor& scale, std::string_view format,
                            std::string_view granularity, int64_t axis, int64_t group_size) {
  const Scheme scheme = scheme_from_arguments(format, granularity, group_size);
  const Prepared p(input, element_type_of(input.scalar_type(), "input"), scale, scheme, axis);
  Tensor output = at::empty(input.sizes(), input.options());
  void* out = output.data_ptr();
  on_device_of(
      input, [&] { cpu::fake_quantize_fp8(p.arguments, out); },
      [&](void* stream) { cuda::fake_quantize_fp8(p.arguments, out, stream); });
  return output;
}

Tensor fake_quantize_backward_kernel(const Tensor& gradient, const Tensor& input,
                                     const Tensor& scale, std::string_view format,
                                     std::string_view granularity, int64_t axis,
                                     int64_t group_size) {
  const Scheme scheme = scheme_from_arguments(format, granularity, group_size);
  check_gradient(gradient, input);
  const Prepared p(input, element_type_of(input.scalar_type(), "input"), scale, scheme, axis);
  const Tensor dense = gradient.contiguous();
  Tensor output = at::empty(input.sizes(), input.options());
  void* out = output.data_ptr();
  on_device_of(
      input, [&] { cpu::fake_quantize_fp8_backward(p.arguments, dense.const_data_ptr(), out); },
      [&](void* stream) {
        cuda::fake_quantize_fp8_backward(p.arguments, dense.const_data_ptr(), out, stream);
      });
  return output;
}

Tensor per_token_scale_kernel(const Tensor& input, std::string_view format) {
  const int32_t largest = fp8_scheme(fp8_format(format)).qmax();
  const ElementType type = element_type_of(input.scalar_type(), "input");
  const Tensor x = input.contiguous();
  Tensor scale = at::empty_symint(row_sizes(input), input.options().dtype(at::kFloat));
  float* out = scale.data_ptr<float>();
  const int64_t rows = rows_of(x), columns = columns_of(x);
  on_device_of(
      x, [&] { cpu::per_token_scale(x.const_data_ptr(), type, rows, columns, largest, out); },
      [&](void* stream) {
        cuda::per_token_scale(x.const_data_ptr(), type, rows, columns, largest, out, stream);
      });
  return scale;
}

std::tuple<Tensor, Tensor> quantize_per_token_kernel(const Tensor& input,
                                                     std::string_view format_name) {
  const NumberFormat format = fp8_format(format_name);
  if (input.is_cpu()) {
    Tensor scale = per_token_scale_kernel(input, format_name);
    Tensor codes = quantize_kernel(input, scale, format_name, "per_token", 0, 0);
    return {codes, scale};
  }
  const ElementType type = element_type_of(input.scalar_type(), "input");
  const Tensor x = input.contiguous();
  Tensor scale = at::empty_symint(row_sizes(input), input.options().dtype(at::kFloat));
  Tensor codes = at::empty(input.sizes(), input.options().dtype(fp8_dtype(format)));
  on_device_of(
      x, [] {},
      [&](void* stream) {
        cuda::quantize_fp8_per_token(format, x.const_data_ptr(), type, rows_of(x), columns_of(x),
                                     code_pointer(codes), scale.data_ptr<float>(), stream);
      });
  return {codes, scale};
}

// ---- Linear -------------------------------------------------------------------------------------

// A linear layer's operands, checked, contiguous and aligned for vectors.
struct LinearOperands {
  Tensor codes, weight, input_scale, weight_scale, bias;  // bias undefined where there is none
  int64_t m, n, k;
  at::ScalarType dtype;

  LinearOperands(const Tensor& x, const Tensor& w, const Tensor& x_scale, const Tensor& w_scale,
                 const OptionalTensor& b, at::ScalarType type)
      : dtype(type) {
    check_codes(x, "codes", x);
    check_codes(w, "weight", x);
    VERNIER_CHECK(x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(1),
                  "codes must be [M, K] and weight [N, K], not ", x.sizes(), " and ", w.sizes());
    m = x.size(0), n = w.size(0), k = x.size(1);
    check_tensor(x_scale, "input_scale", at::kFloat, x);
    check_tensor(w_scale, "weight_scale", at::kFloat, x);
    VERNIER_CHECK(x_scale.numel() == 1 || x_scale.numel() == m, "input_scale has ", x_scale.numel(),
                  " elements: it needs 1 or one a row, ", m);
    VERNIER_CHECK(w_scale.numel() == 1 || w_scale.numel() == n, "weight_scale has ",
                  w_scale.numel(), " elements: it needs 1 or one an output channel, ", n);
    element_type_of(dtype, "dtype");
    if (b) {
      check_tensor(*b, "bias", b->scalar_type() == dtype ? dtype : at::kFloat, x);
      VERNIER_CHECK(b->numel() == n, "bias has ", b->numel(), " elements, not ", n);
      bias = aligned(b->to(dtype));
    }
    codes = aligned(x), weight = aligned(w);
    input_scale = aligned(x_scale.flatten()), weight_scale = aligned(w_scale.flatten());
  }

  static Tensor aligned(const Tensor& tensor) {
    const Tensor dense = tensor.contiguous();
    return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : dense.clone();
  }
};

// Sums of products of codes, times scales, plus bias.
Tensor scaled_products(const Tensor& products, const LinearOperands& o) {
  Tensor output = at::empty({o.m, o.n}, o.codes.options().dtype(o.dtype));
  const Tensor bias = o.bias.defined() ? o.bias.to(at::kFloat) : Tensor();
  Fp8EpilogueArguments a;
  a.products = products.const_data_ptr<float>();
  a.stride = products.size(1);
  a.rows = o.m;
  a.columns = o.n;
  a.input_scale = o.input_scale.const_data_ptr<float>();
  a.input_scale_per_row = o.input_scale.numel() > 1;
  a.weight_scale = o.weight_scale.const_data_ptr<float>();
  a.weight_scale_per_column = o.weight_scale.numel() > 1;
  if (bias.defined()) a.bias = bias.const_data_ptr<float>();
  a.output = output.data_ptr();
  a.output_type = element_type_of(o.dtype, "dtype");
  on_device_of(
      products, [&] { cpu::fp8_epilogue(a); },
      [&](void* stream) { cuda::fp8_epilogue(a, stream); });
  return output;
}

// In float32, where every code is exact, in TF32 as well.
Tensor float_linear(const LinearOperands& o) {
  const Tensor products = o.k == 0 ? at::zeros({o.m, o.n}, o.codes.options().dtype(at::kFloat))
                                   : at::mm(o.codes.to(at::kFloat), o.weight.to(at::kFloat).t());
  return scaled_products(products.contiguous(), o);
}

#ifdef VERNIER_WITH_CUDA
constexpr int64_t kMultiple = 16;
int64_t padded(int64_t size) { return (size + kMultiple - 1) / kMultiple * kMultiple; }

// Zero rows and columns behind a matrix of codes.
Tensor padded_codes(const Tensor& codes, int64_t rows, int64_t columns) {
  if (codes.size(0) == rows && codes.size(1) == columns) return codes;
  return at::constant_pad_nd(codes.view(at::kByte),
                             {0, columns - codes.size(1), 0, rows - codes.size(0)})
      .view(codes.scalar_type());
}

// What a product through cuBLASLt needs: arguments, and the tensors they point into.
struct LibraryProduct {
  Tensor codes, weight, input_scale, weight_scale, bias, output, workspace;
  Fp8GemmArguments arguments;

  /// Scaled by the library into the output's dtype, with the bias where that is half precision;
  /// needs sizes that are multiples of 16. Or, unscaled, plain sums in float32, padded in n.
  LibraryProduct(const LinearOperands& o, bool scaled, bool fast_accumulation) {
    const int64_t n = padded(o.n), k = padded(o.k);
    codes = padded_codes(o.codes, o.m, k);
    weight = padded_codes(o.weight, n, k);
    const at::ScalarType dtype = scaled ? o.dtype : at::kFloat;
    output = at::empty({o.m, n}, o.codes.options().dtype(dtype));
    workspace = at::empty({cuda::kFp8WorkspaceBytes}, o.codes.options().dtype(at::kByte));
    arguments.codes = codes.const_data_ptr();
    arguments.codes_format = format_of(codes);
    arguments.weight = weight.const_data_ptr();
    arguments.weight_format = format_of(weight);
    arguments.m = o.m;
    arguments.n = n;
    arguments.k = k;
    arguments.output = output.data_ptr();
    arguments.output_type = element_type_of(dtype, "dtype");
    arguments.fast_accumulation = fast_accumulation;
    arguments.workspace = workspace.data_ptr();
    arguments.workspace_bytes = cuda::kFp8WorkspaceBytes;
    if (!scaled) return;
    arguments.vector_scales = o.input_scale.numel() > 1 || o.weight_scale.numel() > 1;
    input_scale = o.input_scale, weight_scale = o.weight_scale;
    if (arguments.vector_scales) {  // of both operands
      input_scale = input_scale.expand({o.m}).contiguous();
      weight_scale = weight_scale.expand({n}).contiguous();
    }
    arguments.input_scale = input_scale.const_data_ptr<float>();
    arguments.weight_scale = weight_scale.const_data_ptr<float>();
    if (o.bias.defined() && o.dtype != at::kFloat) {
      bias = o.bias;
      arguments.bias = bias.const_data_ptr();
    }
  }
};

bool fits_library(const LinearOperands& o) { return o.n % kMultiple == 0 && o.k % kMultiple == 0; }

// Whether the bias is left to a kernel of its own behind a scaled product.
bool bias_is_left(const LinearOperands& o) { return o.bias.defined() && o.dtype == at::kFloat; }

Tensor library_linear(const LinearOperands& o, bool fast_accumulation) {
  const CudaScope scope(o.codes);
  if (fits_library(o)) {
    LibraryProduct product(o, /*scaled=*/true, fast_accumulation);
    if (cuda::fp8_matmul(product.arguments, scope.stream())) {
      if (!bias_is_left(o)) return product.output;
      Fp8EpilogueArguments a;
      a.products = product.output.const_data_ptr<float>();
      a.stride = a.columns = o.n;
      a.rows = o.m;
      a.bias = o.bias.const_data_ptr<float>();
      a.output = product.output.data_ptr();
      cuda::fp8_epilogue(a, scope.stream());
      return product.output;
    }
  }
  LibraryProduct product(o, /*scaled=*/false, fast_accumulation);
  if (cuda::fp8_matmul(product.arguments, scope.stream()))
    return scaled_products(product.output, o);
  return float_linear(o);
}

void tune_library(const LinearOperands& o, bool fast_accumulation) {
  const CudaScope scope(o.codes);
  if (fits_library(o)) {
    LibraryProduct product(o, /*scaled=*/true, fast_accumulation);
    if (cuda::tune_fp8_matmul(product.arguments, scope.stream())) return;
  }
  LibraryProduct product(o, /*scaled=*/false, fast_accumulation);
  cuda::tune_fp8_matmul(product.arguments, scope.stream());
}
#endif

Tensor fp8_linear_kernel(const Tensor& codes, const Tensor& weight, const Tensor& input_scale,
                         const Tensor& weight_scale, const OptionalTensor& bias,
                         at::ScalarType dtype, [[maybe_unused]] bool fast_accumulation) {
  const LinearOperands operands(codes, weight, input_scale, weight_scale, bias, dtype);
  if (operands.m == 0 || operands.n == 0)
    return at::empty({operands.m, operands.n}, codes.options().dtype(dtype));
#ifdef VERNIER_WITH_CUDA
  if (codes.is_cuda() && operands.k > 0) return library_linear(operands, fast_accumulation);
#endif
  return float_linear(operands);
}

void tune_fp8_linear_kernel(const Tensor& codes, const Tensor& weight, const Tensor& input_scale,
                            const Tensor& weight_scale, const OptionalTensor& bias,
                            at::ScalarType dtype, [[maybe_unused]] bool fast_accumulation) {
  const LinearOperands operands(codes, weight, input_scale, weight_scale, bias, dtype);
#ifdef VERNIER_WITH_CUDA
  if (codes.is_cuda() && operands.m > 0 && operands.n > 0 && operands.k > 0)
    tune_library(operands, fast_accumulation);
#endif
}

// ---- Shapes and dtypes without data -------------------------------------------------------------

Tensor quantize_meta(const Tensor& input, const Tensor&, std::string_view format, std::string_view,
                     int64_t, int64_t) {
  check_meta(input);
  return at::empty_symint(input.sym_sizes(), input.options().dtype(fp8_dtype(fp8_format(format))));
}
Tensor dequantize_meta(const Tensor& codes, const Tensor&, std::string_view, int64_t, int64_t,
                       at::ScalarType dtype) {
  check_meta(codes);
  return at::empty_symint(codes.sym_sizes(), codes.options().dtype(dtype));
}
Tensor fake_quantize_meta(const Tensor& input, const Tensor&, std::string_view, std::string_view,
                          int64_t, int64_t) {
  check_meta(input);
  return at::empty_symint(input.sym_sizes(), input.options());
}
Tensor fake_quantize_backward_meta(const Tensor&, const Tensor& input, const Tensor&,
                                   std::string_view, std::string_view, int64_t, int64_t) {
  check_meta(input);
  return at::empty_symint(input.sym_sizes(), input.options());
}
Tensor per_token_scale_meta(const Tensor& input, std::string_view) {
  check_meta(input);
  return at::empty_symint(row_sizes(input), input.options().dtype(at::kFloat));
}
std::tuple<Tensor, Tensor> quantize_per_token_meta(const Tensor& input, std::string_view format) {
  check_meta(input);
  return {at::empty_symint(input.sym_sizes(), input.options().dtype(fp8_dtype(fp8_format(format)))),
          per_token_scale_meta(input, format)};
}
Tensor fp8_linear_meta(const Tensor& codes, const Tensor& weight, const Tensor&, const Tensor&,
                       const OptionalTensor&, at::ScalarType dtype, bool) {
  check_meta(codes);
  return at::empty_symint({codes.sym_size(0), weight.sym_size(0)}, codes.options().dtype(dtype));
}

auto& quantize_operator() {
  static const auto op = operator_handle<decltype(quantize_kernel)>("vernier::quantize_fp8");
  return op;
}
auto& dequantize_operator() {
  static const auto op = operator_handle<decltype(dequantize_kernel)>("vernier::dequantize_fp8");
  return op;
}
auto& fake_quantize_operator() {
  static const auto op =
      operator_handle<decltype(fake_quantize_kernel)>("vernier::fake_quantize_fp8");
  return op;
}
auto& fake_quantize_backward_operator() {
  static const auto op = operator_handle<decltype(fake_quantize_backward_kernel)>(
      "vernier::fake_quantize_fp8_backward");
  return op;
}
auto& per_token_scale_operator() {
  static const auto op =
      operator_handle<decltype(per_token_scale_kernel)>("vernier::per_token_scale_fp8");
  return op;
}
auto& quantize_per_token_operator() {
  static const auto op =
      operator_handle<decltype(quantize_per_token_kernel)>("vernier::quantize_fp8_per_token");
  return op;
}

// Straight-through estimator. The mask is recomputed from the input, which the layer keeps alive
// anyway.
class FakeQuantizeFunction : public torch::autograd::Function<FakeQuantizeFunction> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& input,
                        const Tensor& scale, const std::string& format,
                        const std::string& granularity, int64_t axis, int64_t group_size) {
    context->save_for_backward({input, scale});
    auto& data = context->saved_data;
    data["format"] = format;
    data["granularity"] = granularity;
    data["axis"] = axis;
    data["group_size"] = group_size;
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return fake_quantize_operator().call(input, scale, format, granularity, axis, group_size);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    auto& data = context->saved_data;
    const std::string format = data["format"].toStringRef();
    const std::string granularity = data["granularity"].toStringRef();
    Tensor result = fake_quantize_backward_operator().call(gradients[0], saved[0], saved[1], format,
                                                           granularity, data["axis"].toInt(),
                                                           data["group_size"].toInt());
    return {result, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor fake_quantize_autograd(const Tensor& input, const Tensor& scale, std::string_view format,
                              std::string_view granularity, int64_t axis, int64_t group_size) {
  return FakeQuantizeFunction::apply(input, scale, std::string(format), std::string(granularity),
                                     axis, group_size);
}

void check_scheme(const Scheme& scheme) {
  VERNIER_CHECK(scheme.is_fp8(), "the scheme is ", to_string(scheme),
                ": FP8 operations need format e4m3 or e5m2");
  scheme.check();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vernier, m) {
  const std::string scheme = kSchemeArguments;
  const std::string operands =
      "(Tensor codes, Tensor weight, Tensor input_scale, Tensor weight_scale, Tensor? bias=None, "
      "*, ScalarType dtype=float, bool fast_accumulation=False) -> ";
  m.def(("quantize_fp8(Tensor input, Tensor scale, *, " + scheme + ") -> Tensor").c_str());
  m.def(
      "dequantize_fp8(Tensor codes, Tensor scale, *, str granularity=\"per_tensor\", int axis=0, "
      "int group_size=0, ScalarType dtype=float) -> Tensor");
  m.def(("fake_quantize_fp8(Tensor input, Tensor scale, *, " + scheme + ") -> Tensor").c_str());
  m.def(("fake_quantize_fp8_backward(Tensor gradient, Tensor input, Tensor scale, *, " + scheme +
         ") -> Tensor")
            .c_str());
  m.def("per_token_scale_fp8(Tensor input, *, str format=\"e4m3\") -> Tensor");
  m.def("quantize_fp8_per_token(Tensor input, *, str format=\"e4m3\") -> (Tensor, Tensor)");
  m.def(("fp8_linear" + operands + "Tensor").c_str());
  m.def(("tune_fp8_linear" + operands + "()").c_str());
}

#define VERNIER_REGISTER_FP8(m)                                                  \
  m.impl("quantize_fp8", TORCH_FN(quantize_kernel));                             \
  m.impl("dequantize_fp8", TORCH_FN(dequantize_kernel));                         \
  m.impl("fake_quantize_fp8", TORCH_FN(fake_quantize_kernel));                   \
  m.impl("fake_quantize_fp8_backward", TORCH_FN(fake_quantize_backward_kernel)); \
  m.impl("per_token_scale_fp8", TORCH_FN(per_token_scale_kernel));               \
  m.impl("quantize_fp8_per_token", TORCH_FN(quantize_per_token_kernel));         \
  m.impl("fp8_linear", TORCH_FN(fp8_linear_kernel));                             \
  m.impl("tune_fp8_linear", TORCH_FN(tune_fp8_linear_kernel))

TORCH_LIBRARY_IMPL(vernier, CPU, m) { VERNIER_REGISTER_FP8(m); }
#ifdef VERNIER_WITH_CUDA
TORCH_LIBRARY_IMPL(vernier, CUDA, m) { VERNIER_REGISTER_FP8(m); }
#endif
TORCH_LIBRARY_IMPL(vernier, Meta, m) {
  m.impl("quantize_fp8", TORCH_FN(quantize_meta));
  m.impl("dequantize_fp8", TORCH_FN(dequantize_meta));
  m.impl("fake_quantize_fp8", TORCH_FN(fake_quantize_meta));
  m.impl("fake_quantize_fp8_backward", TORCH_FN(fake_quantize_backward_meta));
  m.impl("per_token_scale_fp8", TORCH_FN(per_token_scale_meta));
  m.impl("quantize_fp8_per_token", TORCH_FN(quantize_per_token_meta));
  m.impl("fp8_linear", TORCH_FN(fp8_linear_meta));
}
TORCH_LIBRARY_IMPL(vernier, Autograd, m) {
  m.impl("fake_quantize_fp8", TORCH_FN(fake_quantize_autograd));
}

at::ScalarType fp8_dtype(NumberFormat format) {
  VERNIER_CHECK(format != NumberFormat::integer, "integer codes have no FP8 dtype");
  return format == NumberFormat::e4m3 ? at::kFloat8_e4m3fn : at::kFloat8_e5m2;
}

Tensor quantize_fp8(const Tensor& input, const Tensor& scale, const Scheme& scheme, int64_t axis) {
  check_scheme(scheme);
  return quantize_operator().call(input, scale, to_string(scheme.format),
                                  to_string(scheme.granularity), axis, scheme.group_size);
}

Tensor dequantize_fp8(const Tensor& codes, const Tensor& scale, const Scheme& scheme, int64_t axis,
                      at::ScalarType dtype) {
  check_scheme(scheme);
  VERNIER_CHECK(codes.scalar_type() == fp8_dtype(scheme.format), "codes are ",
                c10::toString(codes.scalar_type()), " but the scheme is ", to_string(scheme));
  return dequantize_operator().call(codes, scale, to_string(scheme.granularity), axis,
                                    scheme.group_size, dtype);
}

Tensor fake_quantize_fp8(const Tensor& input, const Tensor& scale, const Scheme& scheme,
                         int64_t axis) {
  check_scheme(scheme);
  return fake_quantize_operator().call(input, scale, to_string(scheme.format),
                                       to_string(scheme.granularity), axis, scheme.group_size);
}

Tensor per_token_scale_fp8(const Tensor& input, NumberFormat format) {
  return per_token_scale_operator().call(input, to_string(format));
}

std::pair<Tensor, Tensor> quantize_fp8_per_token(const Tensor& input, NumberFormat format) {
  auto [codes, scale] = quantize_per_token_operator().call(input, to_string(format));
  return {std::move(codes), std::move(scale)};
}

Tensor fp8_linear(const Tensor& codes, const Tensor& weight, const Tensor& input_scale,
                  const Tensor& weight_scale, const OptionalTensor& bias, at::ScalarType dtype,
                  bool fast_accumulation) {
  static const auto op = operator_handle<decltype(fp8_linear_kernel)>("vernier::fp8_linear");
  return op.call(codes, weight, input_scale, weight_scale, bias, dtype, fast_accumulation);
}

void tune_fp8_linear(const Tensor& codes, const Tensor& weight, const Tensor& input_scale,
                     const Tensor& weight_scale, const OptionalTensor& bias, at::ScalarType dtype,
                     bool fast_accumulation) {
  static const auto op =
      operator_handle<decltype(tune_fp8_linear_kernel)>("vernier::tune_fp8_linear");
  op.call(codes, weight, input_scale, weight_scale, bias, dtype, fast_accumulation);
}

}  // namespace vernier
