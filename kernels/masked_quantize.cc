#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <vernier/kernels/masked_quantize.h>
#include <vernier/kernels/masked_quantize_device.h>
#include <vernier/kernels/quantize_dispatch.h>

namespace vernier {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> quantize_masked_kernel(const Tensor& input, const Tensor& scale,
                                                  const OptionalTensor& zero_point, int64_t bits,
                                                  std::string_view granularity, int64_t axis,
                                                  int64_t group_size, bool narrow_range,
                                                  at::ScalarType dtype, bool mask) {
  const Scheme scheme =
      scheme_from_arguments(!zero_point, bits, granularity, group_size, narrow_range);
  MaskedOutput masked;
  if (dtype != at::kChar) masked.type = element_type_of(dtype, "dtype, where it is not int8,");
  const Prepared p(input, element_type_of(input.scalar_type(), "input"), scale, zero_point, scheme,
                   axis);
  Tensor output = at::empty(input.sizes(), input.options().dtype(dtype));
  Tensor clipped =
      at::empty({mask ? (input.numel() + 7) / 8 : 0}, input.options().dtype(at::kByte));
  masked.values = output.data_ptr();
  if (mask) masked.clipped = clipped.data_ptr<uint8_t>();
  on_device_of(
      input, [&] { cpu::quantize_masked(p.arguments, masked); },
      [&](void* stream) { cuda::quantize_masked(p.arguments, masked, stream); });
  return {std::move(output), std::move(clipped)};
}

Tensor& zero_clipped_kernel(Tensor& gradient, const Tensor& clipped) {
  const ElementType type = element_type_of(gradient.scalar_type(), "gradient");
  check_tensor(clipped, "clipped", at::kByte, gradient);
  const int64_t numel = gradient.numel();
  if (clipped.numel() == 0) return gradient;
  VERNIER_CHECK(clipped.numel() == (numel + 7) / 8, "clipped has ", clipped.numel(),
                " bytes but a gradient of ", numel, " elements needs ", (numel + 7) / 8);
  VERNIER_CHECK(gradient.is_contiguous(), "gradient must be contiguous: it is changed in place");
  const Tensor dense = clipped.contiguous();
  const uint8_t* bits = dense.const_data_ptr<uint8_t>();
  void* out = gradient.data_ptr();
  on_device_of(
      gradient, [&] { cpu::zero_clipped(bits, numel, type, out); },
      [&](void* stream) { cuda::zero_clipped(bits, numel, type, out, stream); });
  return gradient;
}

// Shapes and dtypes without data, for tracing.
std::tuple<Tensor, Tensor> quantize_masked_meta(const Tensor& input, const Tensor&,
                                                const OptionalTensor&, int64_t, std::string_view,
                                                int64_t, int64_t, bool, at::ScalarType dtype,
                                                bool mask) {
  check_meta(input);
  const c10::SymInt bytes = mask ? (input.sym_numel() + 7) / 8 : c10::SymInt(0);
  return {at::empty_symint(input.sym_sizes(), input.options().dtype(dtype)),
          at::empty_symint({bytes}, input.options().dtype(at::kByte))};
}
Tensor& zero_clipped_meta(Tensor& gradient, const Tensor&) { return gradient; }

}  // namespace

TORCH_LIBRARY_FRAGMENT(vernier, m) {
  m.def((std::string("quantize_masked(Tensor input, Tensor scale, Tensor? zero_point=None, *, ") +
         kSchemeArguments +
         ", ScalarType dtype=int8, bool mask=True) -> (Tensor output, Tensor clipped)")
            .c_str());
  m.def("zero_clipped_(Tensor(a!) gradient, Tensor clipped) -> Tensor(a!)");
}
TORCH_LIBRARY_IMPL(vernier, CPU, m) {
  m.impl("quantize_masked", TORCH_FN(quantize_masked_kernel));
  m.impl("zero_clipped_", TORCH_FN(zero_clipped_kernel));
}
#ifdef VERNIER_WITH_CUDA
TORCH_LIBRARY_IMPL(vernier, CUDA, m) {
  m.impl("quantize_masked", TORCH_FN(quantize_masked_kernel));
  m.impl("zero_clipped_", TORCH_FN(zero_clipped_kernel));
}
#endif
TORCH_LIBRARY_IMPL(vernier, Meta, m) {
  m.impl("quantize_masked", TORCH_FN(quantize_masked_meta));
  m.impl("zero_clipped_", TORCH_FN(zero_clipped_meta));
}

MaskedQuantized quantize_masked(const Tensor& input, const Tensor& scale,
                                const OptionalTensor& zero_point, const Scheme& scheme,
                                int64_t axis, at::ScalarType dtype, bool mask) {
  static const auto op =
      operator_handle<decltype(quantize_masked_kernel)>("vernier::quantize_masked");
  check_zero_point(scheme, zero_point);
  VERNIER_CHECK(!scheme.is_fp8(), "quantize_masked makes integer codes, not ", to_string(scheme));
  auto [output, clipped] =
      op.call(input, scale, zero_point, scheme.bits, to_string(scheme.granularity), axis,
              scheme.group_size, scheme.narrow_range, dtype, mask);
  return {std::move(output), std::move(clipped)};
}

Tensor& zero_clipped_(Tensor& gradient, const Tensor& clipped) {
  static const auto op = operator_handle<decltype(zero_clipped_kernel)>("vernier::zero_clipped_");
  return op.call(gradient, clipped);
}

}  // namespace vernier
