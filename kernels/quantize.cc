#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <vernier/kernels/fp8.h>
#include <vernier/kernels/quantize.h>
#include <vernier/kernels/quantize_device.h>
#include <vernier/kernels/quantize_dispatch.h>

namespace vernier {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor quantize_kernel(const Tensor& input, const Tensor& scale, const OptionalTensor& zero_point,
                       int64_t bits, std::string_view granularity, int64_t axis, int64_t group_size,
                       bool narrow_range) {
  const Scheme scheme =
      scheme_from_arguments(!zero_point, bits, granularity, group_size, narrow_range);
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
      scheme_from_arguments(!zero_point, bits, granularity, group_size, narrow_range);
  const Prepared p(codes, element_type_of(dtype, "dtype"), scale, zero_point, scheme, axis);
  Tensor output = at::empty(codes.sizes(), codes.options().dtype(dtype));
  void* out = output.data_ptr();
  on_device_of(
      codes, [&] { cpu::dequantize(p.arguments, out); },
      [&](void* stream) { cuda::dequantize(p.arguments, out, stream); });
  return output;
}

Scheme per_token_scheme(int64_t bits, bool narrow_range) {
  return scheme_from_arguments(true, bits, "per_token", 0, narrow_range);
}

Tensor per_token_scale_kernel(const Tensor& input, int64_t bits, bool narrow_range) {
  const Scheme scheme = per_token_scheme(bits, narrow_range);
  const ElementType type = element_type_of(input.scalar_type(), "input");
  const Tensor x = input.contiguous();
  Tensor scale = at::empty_symint(row_sizes(input), input.options().dtype(at::kFloat));
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
  Tensor scale = at::empty_symint(row_sizes(input), input.options().dtype(at::kFloat));
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

// Shapes and dtypes without data, for tracing.
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
Tensor per_token_scale_meta(const Tensor& input, int64_t, bool) {
  check_meta(input);
  return at::empty_symint(row_sizes(input), input.options().dtype(at::kFloat));
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

}  // namespace

TORCH_LIBRARY_FRAGMENT(vernier, m) {
  const std::string scheme = kSchemeArguments;
  const std::string operands = "Tensor scale, Tensor? zero_point=None, *, " + scheme;
  m.def(("quantize(Tensor input, " + operands + ") -> Tensor").c_str());
  m.def(("dequantize(Tensor codes, " + operands + ", ScalarType dtype=float) -> Tensor").c_str());
  m.def("per_token_scale(Tensor input, *, int bits=8, bool narrow_range=True) -> Tensor");
  m.def(
      "quantize_per_token(Tensor input, *, int bits=8, bool narrow_range=True) -> (Tensor, "
      "Tensor)");
}

#define VERNIER_REGISTER_QUANTIZE(m)                           \
  m.impl("quantize", TORCH_FN(quantize_kernel));               \
  m.impl("dequantize", TORCH_FN(dequantize_kernel));           \
  m.impl("per_token_scale", TORCH_FN(per_token_scale_kernel)); \
  m.impl("quantize_per_token", TORCH_FN(quantize_per_token_kernel))

TORCH_LIBRARY_IMPL(vernier, CPU, m) { VERNIER_REGISTER_QUANTIZE(m); }
#ifdef VERNIER_WITH_CUDA
TORCH_LIBRARY_IMPL(vernier, CUDA, m) { VERNIER_REGISTER_QUANTIZE(m); }
#endif
TORCH_LIBRARY_IMPL(vernier, Meta, m) {
  m.impl("quantize", TORCH_FN(quantize_meta));
  m.impl("dequantize", TORCH_FN(dequantize_meta));
  m.impl("per_token_scale", TORCH_FN(per_token_scale_meta));
  m.impl("quantize_per_token", TORCH_FN(quantize_per_token_meta));
}

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
