#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <vernier/kernels/int8_bmm.h>
#include <vernier/kernels/int8_gemm_dispatch.h>
#include <vernier/kernels/quantize_dispatch.h>

namespace vernier {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check_shapes(const Tensor& a, const Tensor& b) {
  const bool fits = a.dim() >= 2 && a.dim() == b.dim() && a.size(-1) == b.size(-1) &&
                    a.sizes().slice(0, a.dim() - 2) == b.sizes().slice(0, b.dim() - 2);
  VERNIER_CHECK(fits, "a must be [..., M, K] and b [..., N, K] of the same batch, not ", a.sizes(),
                " and ", b.sizes());
}

std::vector<int64_t> output_sizes(const Tensor& a, const Tensor& b) {
  std::vector<int64_t> sizes = a.sizes().vec();
  sizes.back() = b.size(-2);
  return sizes;
}

/// Checked operands as batches of matrices.
struct PreparedBmm {
  Tensor a, b;         // [batch, M, K], [batch, N, K]
  OptionalTensor sum;  // [batch, N], where a has a zero point
  int64_t batch;

  PreparedBmm(const Tensor& codes_a, const Tensor& codes_b, const OptionalTensor& zero_point) {
    check_tensor(codes_a, "a", at::kChar, codes_a);
    check_tensor(codes_b, "b", at::kChar, codes_a);
    check_shapes(codes_a, codes_b);
    batch = 1;
    for (int64_t i = 0; i + 2 < codes_a.dim(); ++i) batch *= codes_a.size(i);
    a = matrices(codes_a);
    b = matrices(codes_b);
    if (!zero_point) return;
    check_tensor(*zero_point, "a_zero_point", at::kInt, codes_a);
    sum = b.sum(-1, /*keepdim=*/false, at::kInt);
  }

  Tensor matrices(const Tensor& codes) const {
    return codes.reshape({batch, codes.size(-2), codes.size(-1)});
  }

  // One scale, or those of each matrix.
  Tensor scales(const Tensor& scale, const char* what, const Tensor& codes) const {
    check_tensor(scale, what, at::kFloat, a);
    const int64_t rows = batch * codes.size(1);
    VERNIER_CHECK(scale.numel() == 1 || scale.numel() == rows, what, " has ", scale.numel(),
                  " elements: it needs 1 or one a row, ", rows);
    return scale.numel() == 1 ? scale.reshape({1}) : scale.reshape({batch, codes.size(1)});
  }
};

Tensor accumulators_kernel(const Tensor& a, const Tensor& b, const OptionalTensor& zero_point) {
  const PreparedBmm p(a, b, zero_point);
  Tensor output = at::empty({p.batch, p.a.size(1), p.b.size(1)}, a.options().dtype(at::kInt));
  for (int64_t i = 0; i < p.batch; ++i) {
    Tensor sums = output.select(0, i);
    sums.copy_(int8_matmul(p.a.select(0, i), p.b.select(0, i)));
    if (zero_point) sums.sub_(zero_point->mul(p.sum->select(0, i)));
  }
  return output.view(output_sizes(a, b));
}

Tensor run(const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
           const OptionalTensor& zero_point, const std::optional<Requantization>& requantization,
           at::ScalarType dtype) {
  const PreparedBmm p(a, b, zero_point);
  const Tensor scale_a = p.scales(a_scale, "a_scale", p.a);
  const Tensor scale_b = p.scales(b_scale, "b_scale", p.b);
  const auto of = [](const Tensor& scale, int64_t i) {
    return scale.dim() == 1 ? scale : scale.select(0, i);
  };
  Tensor output = at::empty({p.batch, p.a.size(1), p.b.size(1)}, a.options().dtype(dtype));
  Int8LinearOperands operands;
  operands.input_zero_point = zero_point;
  for (int64_t i = 0; i < p.batch; ++i) {
    operands.codes = p.a.select(0, i);
    operands.weight = p.b.select(0, i);
    operands.input_scale = of(scale_a, i);
    operands.weight_scale = of(scale_b, i);
    if (zero_point) operands.weight_sum = p.sum->select(0, i);
    int8_linear_into(operands, requantization, output.select(0, i));
  }
  return output.view(output_sizes(a, b));
}

Tensor int8_bmm_kernel(const Tensor& a, const Tensor& b, const Tensor& a_scale,
                       const Tensor& b_scale, const OptionalTensor& a_zero_point,
                       at::ScalarType dtype) {
  element_type_of(dtype, "dtype");
  return run(a, b, a_scale, b_scale, a_zero_point, std::nullopt, dtype);
}

Tensor requantize_kernel(const Tensor& a, const Tensor& b, const Tensor& a_scale,
                         const Tensor& b_scale, const OptionalTensor& a_zero_point,
                         const Tensor& output_scale, const OptionalTensor& output_zero_point,
                         int64_t bits, bool narrow_range) {
  const Scheme scheme =
      scheme_from_arguments(!output_zero_point, bits, "per_tensor", 0, narrow_range);
  return run(a, b, a_scale, b_scale, a_zero_point,
             Requantization{output_scale, output_zero_point, scheme}, at::kChar);
}

// Shapes and dtypes without data, for tracing.
Tensor meta(const Tensor& a, const Tensor& b, at::ScalarType dtype) {
  check_meta(a);
  check_shapes(a, b);
  return at::empty(output_sizes(a, b), a.options().dtype(dtype));
}
Tensor accumulators_meta(const Tensor& a, const Tensor& b, const OptionalTensor&) {
  return meta(a, b, at::kInt);
}
Tensor int8_bmm_meta(const Tensor& a, const Tensor& b, const Tensor&, const Tensor&,
                     const OptionalTensor&, at::ScalarType dtype) {
  return meta(a, b, dtype);
}
Tensor requantize_meta(const Tensor& a, const Tensor& b, const Tensor&, const Tensor&,
                       const OptionalTensor&, const Tensor&, const OptionalTensor&, int64_t, bool) {
  return meta(a, b, at::kChar);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vernier, m) {
  m.def("int8_bmm_accumulators(Tensor a, Tensor b, Tensor? a_zero_point=None) -> Tensor");
  m.def(
      "int8_bmm(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? a_zero_point=None, *, "
      "ScalarType dtype=float) -> Tensor");
  m.def(
      "int8_bmm_requantize(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? "
      "a_zero_point=None, *, Tensor output_scale, Tensor? output_zero_point=None, int bits=8, bool "
      "narrow_range=True) -> Tensor");
}

#define VERNIER_REGISTER_BMM(m)                                   \
  m.impl("int8_bmm_accumulators", TORCH_FN(accumulators_kernel)); \
  m.impl("int8_bmm", TORCH_FN(int8_bmm_kernel));                  \
  m.impl("int8_bmm_requantize", TORCH_FN(requantize_kernel))

TORCH_LIBRARY_IMPL(vernier, CPU, m) { VERNIER_REGISTER_BMM(m); }
#ifdef VERNIER_WITH_CUDA
TORCH_LIBRARY_IMPL(vernier, CUDA, m) { VERNIER_REGISTER_BMM(m); }
#endif
TORCH_LIBRARY_IMPL(vernier, Meta, m) {
  m.impl("int8_bmm_accumulators", TORCH_FN(accumulators_meta));
  m.impl("int8_bmm", TORCH_FN(int8_bmm_meta));
  m.impl("int8_bmm_requantize", TORCH_FN(requantize_meta));
}

Tensor int8_bmm_accumulators(const Tensor& a, const Tensor& b, const OptionalTensor& a_zero_point) {
  static const auto op =
      operator_handle<decltype(accumulators_kernel)>("vernier::int8_bmm_accumulators");
  return op.call(a, b, a_zero_point);
}

Tensor int8_bmm(const Int8BmmOperands& o, at::ScalarType dtype) {
  static const auto op = operator_handle<decltype(int8_bmm_kernel)>("vernier::int8_bmm");
  return op.call(o.a, o.b, o.a_scale, o.b_scale, o.a_zero_point, dtype);
}

Tensor int8_bmm_requantize(const Int8BmmOperands& o, const Tensor& output_scale,
                           const OptionalTensor& output_zero_point, const Scheme& scheme) {
  static const auto op =
      operator_handle<decltype(requantize_kernel)>("vernier::int8_bmm_requantize");
  Requantization{output_scale, output_zero_point, scheme}.check();
  return op.call(o.a, o.b, o.a_scale, o.b_scale, o.a_zero_point, output_scale, output_zero_point,
                 scheme.bits, scheme.narrow_range);
}

}  // namespace vernier
