#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <vernier/kernels/masked_quantize.h>
#include <vernier/kernels/masked_quantize_device.h>
#include <vernier/kernels/quantize_dispatch.h>

namespace vernier {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A checked operand and its result.
struct Quantization {
  Prepared prepared;
  Tensor output, clipped;
  MaskedJob job;

  Quantization(const Tensor& input, const Tensor& scale, const OptionalTensor& zero_point,
               const Scheme& scheme, int64_t axis, at::ScalarType dtype, bool mask)
      : prepared(input, element_type_of(input.scalar_type(), "input"), scale, zero_point, scheme,
                 axis) {
    if (dtype != at::kChar)
      job.output.type = element_type_of(dtype, "dtype, where it is not int8,");
    output = at::empty(input.sizes(), input.options().dtype(dtype));
    clipped = at::empty({mask ? (input.numel() + 7) / 8 : 0}, input.options().dtype(at::kByte));
    job.arguments = prepared.arguments;
    job.output.values = output.data_ptr();
    if (mask) job.output.clipped = clipped.data_ptr<uint8_t>();
  }
};

std::tuple<Tensor, Tensor> quantize_masked_kernel(const Tensor& input, const Tensor& scale,
                                                  const OptionalTensor& zero_point, int64_t bits,
                                                  std::string_view granularity, int64_t axis,
                                                  int64_t group_size, bool narrow_range,
                                                  at::ScalarType dtype, bool mask) {
  Quantization q(input, scale, zero_point,
                 scheme_from_arguments(!zero_point, bits, granularity, group_size, narrow_range),
                 axis, dtype, mask);
  on_device_of(
      input, [&] { cpu::quantize_masked(q.job); },
      [&](void* stream) { cuda::quantize_masked(q.job, nullptr, stream); });
  return {std::move(q.output), std::move(q.clipped)};
}

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

FourTensors quantize_masked_pair_kernel(const Tensor& a, const Tensor& a_scale,
                                        const OptionalTensor& a_zero_point, const Tensor& b,
                                        const Tensor& b_scale, const OptionalTensor& b_zero_point,
                                        int64_t a_bits, std::string_view a_granularity,
                                        int64_t a_axis, int64_t a_group_size, bool a_narrow_range,
                                        bool a_mask, int64_t b_bits, std::string_view b_granularity,
                                        int64_t b_axis, int64_t b_group_size, bool b_narrow_range,
                                        bool b_mask, at::ScalarType dtype) {
  VERNIER_CHECK(a.device() == b.device(), "the tensors are on ", a.device(), " and ", b.device(),
                ": move one of them");
  Quantization p(
      a, a_scale, a_zero_point,
      scheme_from_arguments(!a_zero_point, a_bits, a_granularity, a_group_size, a_narrow_range),
      a_axis, dtype, a_mask);
  Quantization q(
      b, b_scale, b_zero_point,
      scheme_from_arguments(!b_zero_point, b_bits, b_granularity, b_group_size, b_narrow_range),
      b_axis, dtype, b_mask);
  on_device_of(
      a,
      [&] {
        cpu::quantize_masked(p.job);
        cpu::quantize_masked(q.job);
      },
      [&](void* stream) { cuda::quantize_masked(p.job, &q.job, stream); });
  return {std::move(p.output), std::move(p.clipped), std::move(q.output), std::move(q.clipped)};
}

// A checked gradient and its mask. Without a mask there is nothing to do.
struct Zeroing {
  Tensor dense;
  ClippedGradient job;

  Zeroing(Tensor& gradient, const Tensor& clipped) {
    job.type = element_type_of(gradient.scalar_type(), "gradient");
    check_tensor(clipped, "clipped", at::kByte, gradient);
    if (clipped.numel() == 0) return;
    const int64_t numel = gradient.numel();
    VERNIER_CHECK(clipped.numel() == (numel + 7) / 8, "clipped has ", clipped.numel(),
                  " bytes but a gradient of ", numel, " elements needs ", (numel + 7) / 8);
    VERNIER_CHECK(gradient.is_contiguous(), "gradient must be contiguous: it is changed in place");
    dense = clipped.contiguous();
    job.clipped = dense.const_data_ptr<uint8_t>();
    job.numel = numel;
    job.gradient = gradient.data_ptr();
  }
};

void zero_clipped_kernel(Tensor& gradient, const Tensor& clipped) {
  const Zeroing zeroing(gradient, clipped);
  on_device_of(
      gradient, [&] { cpu::zero_clipped(zeroing.job); },
      [&](void* stream) { cuda::zero_clipped(zeroing.job, nullptr, stream); });
}

void zero_clipped_pair_kernel(Tensor& a, const Tensor& a_clipped, Tensor& b,
                              const Tensor& b_clipped) {
  VERNIER_CHECK(a.device() == b.device(), "the gradients are on ", a.device(), " and ", b.device(),
                ": move one of them");
  const Zeroing first(a, a_clipped), second(b, b_clipped);
  on_device_of(
      a,
      [&] {
        cpu::zero_clipped(first.job);
        cpu::zero_clipped(second.job);
      },
      [&](void* stream) { cuda::zero_clipped(first.job, &second.job, stream); });
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
FourTensors quantize_masked_pair_meta(const Tensor& a, const Tensor& a_scale,
                                      const OptionalTensor& a_zero_point, const Tensor& b,
                                      const Tensor& b_scale, const OptionalTensor& b_zero_point,
                                      int64_t, std::string_view, int64_t, int64_t, bool,
                                      bool a_mask, int64_t, std::string_view, int64_t, int64_t,
                                      bool, bool b_mask, at::ScalarType dtype) {
  return std::tuple_cat(
      quantize_masked_meta(a, a_scale, a_zero_point, 8, "", 0, 0, true, dtype, a_mask),
      quantize_masked_meta(b, b_scale, b_zero_point, 8, "", 0, 0, true, dtype, b_mask));
}
void zero_clipped_meta(Tensor&, const Tensor&) {}
void zero_clipped_pair_meta(Tensor&, const Tensor&, Tensor&, const Tensor&) {}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vernier, m) {
  m.def((std::string("quantize_masked(Tensor input, Tensor scale, Tensor? zero_point=None, *, ") +
         kSchemeArguments +
         ", ScalarType dtype=int8, bool mask=True) -> (Tensor output, Tensor clipped)")
            .c_str());
  m.def(
      "quantize_masked_pair(Tensor a, Tensor a_scale, Tensor? a_zero_point, Tensor b, Tensor "
      "b_scale, Tensor? b_zero_point, int a_bits, str a_granularity, int a_axis, int a_group_size, "
      "bool a_narrow_range, bool a_mask, int b_bits, str b_granularity, int b_axis, int "
      "b_group_size, bool b_narrow_range, bool b_mask, ScalarType dtype) -> (Tensor a_output, "
      "Tensor a_clipped, Tensor b_output, Tensor b_clipped)");
  m.def("zero_clipped_(Tensor(a!) gradient, Tensor clipped) -> ()");
  m.def("zero_clipped_pair_(Tensor(a!) a, Tensor a_clipped, Tensor(b!) b, Tensor b_clipped) -> ()");
}

#define VERNIER_REGISTER_MASKED_QUANTIZE(m)                              \
  m.impl("quantize_masked", TORCH_FN(quantize_masked_kernel));           \
  m.impl("quantize_masked_pair", TORCH_FN(quantize_masked_pair_kernel)); \
  m.impl("zero_clipped_", TORCH_FN(zero_clipped_kernel));                \
  m.impl("zero_clipped_pair_", TORCH_FN(zero_clipped_pair_kernel))

TORCH_LIBRARY_IMPL(vernier, CPU, m) { VERNIER_REGISTER_MASKED_QUANTIZE(m); }
#ifdef VERNIER_WITH_CUDA
TORCH_LIBRARY_IMPL(vernier, CUDA, m) { VERNIER_REGISTER_MASKED_QUANTIZE(m); }
#endif
TORCH_LIBRARY_IMPL(vernier, Meta, m) {
  m.impl("quantize_masked", TORCH_FN(quantize_masked_meta));
  m.impl("quantize_masked_pair", TORCH_FN(quantize_masked_pair_meta));
  m.impl("zero_clipped_", TORCH_FN(zero_clipped_meta));
  m.impl("zero_clipped_pair_", TORCH_FN(zero_clipped_pair_meta));
}

namespace {

void check_scheme(const Scheme& scheme, const OptionalTensor& zero_point) {
  check_zero_point(scheme, zero_point);
  VERNIER_CHECK(!scheme.is_fp8(), "quantize_masked makes integer codes, not ", to_string(scheme));
}

}  // namespace

MaskedQuantized quantize_masked(const Tensor& input, const Tensor& scale,
                                const OptionalTensor& zero_point, const Scheme& scheme,
                                int64_t axis, at::ScalarType dtype, bool mask) {
  static const auto op =
      operator_handle<decltype(quantize_masked_kernel)>("vernier::quantize_masked");
  check_scheme(scheme, zero_point);
  auto [output, clipped] =
      op.call(input, scale, zero_point, scheme.bits, to_string(scheme.granularity), axis,
              scheme.group_size, scheme.narrow_range, dtype, mask);
  return {std::move(output), std::move(clipped)};
}

std::pair<MaskedQuantized, MaskedQuantized> quantize_masked(const MaskedOperand& a,
                                                            const MaskedOperand& b,
                                                            at::ScalarType dtype) {
  static const auto op =
      operator_handle<decltype(quantize_masked_pair_kernel)>("vernier::quantize_masked_pair");
  check_scheme(a.scheme, a.zero_point);
  check_scheme(b.scheme, b.zero_point);
  auto [a_output, a_clipped, b_output, b_clipped] =
      op.call(a.input, a.scale, a.zero_point, b.input, b.scale, b.zero_point, a.scheme.bits,
              to_string(a.scheme.granularity), a.axis, a.scheme.group_size, a.scheme.narrow_range,
              a.mask, b.scheme.bits, to_string(b.scheme.granularity), b.axis, b.scheme.group_size,
              b.scheme.narrow_range, b.mask, dtype);
  return {{std::move(a_output), std::move(a_clipped)}, {std::move(b_output), std::move(b_clipped)}};
}

void zero_clipped_(Tensor& gradient, const Tensor& clipped) {
  static const auto op = operator_handle<decltype(zero_clipped_kernel)>("vernier::zero_clipped_");
  op.call(gradient, clipped);
}

void zero_clipped_(Tensor& first, const Tensor& first_clipped, Tensor& second,
                   const Tensor& second_clipped) {
  static const auto op =
      operator_handle<decltype(zero_clipped_pair_kernel)>("vernier::zero_clipped_pair_");
  op.call(first, first_clipped, second, second_clipped);
}

}  // namespace vernier
