#include <ATen/ops/_int_mm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>
#include <vernier/kernels/dispatch.h>
#include <vernier/kernels/int8_gemm.h>
#include <vernier/kernels/int8_gemm_device.h>

#include <limits>

namespace vernier {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check_operands(const Tensor& codes, const Tensor& weight) {
  check_tensor(codes, "codes", at::kChar, codes);
  check_tensor(weight, "weight", at::kChar, codes);
  VERNIER_CHECK(codes.dim() == 2 && weight.dim() == 2 && codes.size(1) == weight.size(1),
                "codes must be [M, K] and weight [N, K], not ", codes.sizes(), " and ",
                weight.sizes());
  VERNIER_CHECK(
      codes.size(1) <= kMaxInt8GemmK, "K = ", codes.size(1),
      " could overflow the int32 accumulators: split the layer so that K <= ", kMaxInt8GemmK);
}

// oneDNN is exact only where the CPU multiplies int8 without saturating (AVX512-VNNI, AVX-VNNI,
// AMX); elsewhere it sums pairs of products in 16 bits and clips them. Asked once, with the
// operands that clip first.
bool onednn_is_exact() {
  static const bool exact = [] {
    constexpr int64_t kSize = 64;
    const auto int8 = at::TensorOptions(at::kChar);
    for (const int64_t a : {-128, 127}) {
      for (const int64_t b : {-128, 127}) {
        const Tensor product =
            at::_int_mm(at::full({kSize, kSize}, a, int8), at::full({kSize, kSize}, b, int8).t());
        const int32_t* sums = product.const_data_ptr<int32_t>();
        for (int64_t i = 0; i < kSize * kSize; ++i)
          if (sums[i] != a * b * kSize) return false;
      }
    }
    return true;
  }();
  return exact;
}

Tensor int8_matmul_cpu(const Tensor& codes, const Tensor& weight) {
  check_operands(codes, weight);
  const int64_t m = codes.size(0), n = weight.size(0), k = codes.size(1);
  if (m == 0 || n == 0 || k == 0) return at::full({m, n}, 0, codes.options().dtype(at::kInt));
  const Tensor a = codes.contiguous(), b = weight.contiguous();
  // LibTorch 2.11 hands oneDNN a wrong stride where K is 1, and gets other products back.
  if (k > 1 && onednn_is_exact()) return at::_int_mm(a, b.t());
  Tensor out = at::empty({m, n}, codes.options().dtype(at::kInt));
  cpu::int8_matmul(a.const_data_ptr<int8_t>(), b.const_data_ptr<int8_t>(), m, n, k,
                   out.data_ptr<int32_t>());
  return out;
}

// The exact scalar sum, whatever the CPU: what tests and `validate` hold the fast paths against.
Tensor int8_matmul_reference(const Tensor& codes, const Tensor& weight) {
  check_operands(codes, weight);
  const Tensor a = codes.contiguous(), b = weight.contiguous();
  Tensor out = at::empty({a.size(0), b.size(0)}, codes.options().dtype(at::kInt));
  cpu::int8_matmul(a.const_data_ptr<int8_t>(), b.const_data_ptr<int8_t>(), a.size(0), b.size(0),
                   a.size(1), out.data_ptr<int32_t>());
  return out;
}

#ifdef VERNIER_WITH_CUDA
Tensor int8_matmul_cuda(const Tensor& codes, const Tensor& weight) {
  check_operands(codes, weight);
  const int64_t m = codes.size(0), n = weight.size(0), k = codes.size(1);
  if (m == 0 || n == 0 || k == 0) return at::full({m, n}, 0, codes.options().dtype(at::kInt));
  const Tensor a = codes.contiguous(), b = weight.contiguous();
  Tensor out = at::empty({m, n}, codes.options().dtype(at::kInt));
  const CudaScope scope(codes);
  const int64_t bytes = cuda::int8_workspace_bytes(m, n, k);
  Tensor workspace = at::empty({bytes}, codes.options().dtype(at::kByte));
  cuda::int8_matmul(a.const_data_ptr<int8_t>(), b.const_data_ptr<int8_t>(), m, n, k,
                    out.data_ptr<int32_t>(), workspace.data_ptr(), bytes, scope.stream());
  return out;
}
#endif

Tensor int8_matmul_meta(const Tensor& codes, const Tensor& weight) {
  return at::empty_symint({codes.sym_size(0), weight.sym_size(0)}, codes.options().dtype(at::kInt));
}

auto& int8_matmul_operator() {
  static const auto op = operator_handle<decltype(int8_matmul_meta)>("vernier::int8_matmul");
  return op;
}

Tensor int8_linear_kernel(const Tensor& codes, const Tensor& weight, const Tensor& input_scale,
                          const Tensor& weight_scale, const OptionalTensor& bias,
                          const OptionalTensor& input_zero_point, const OptionalTensor& weight_sum,
                          at::ScalarType dtype) {
  check_operands(codes, weight);
  const int64_t m = codes.size(0), n = weight.size(0);
  check_tensor(input_scale, "input_scale", at::kFloat, codes);
  check_tensor(weight_scale, "weight_scale", at::kFloat, codes);
  VERNIER_CHECK(input_scale.numel() == 1 || input_scale.numel() == m, "input_scale has ",
                input_scale.numel(), " elements: it needs 1 or one a row, ", m);
  VERNIER_CHECK(weight_scale.numel() == 1 || weight_scale.numel() == n, "weight_scale has ",
                weight_scale.numel(), " elements: it needs 1 or one an output channel, ", n);
  if (bias) {
    check_tensor(*bias, "bias", at::kFloat, codes);
    VERNIER_CHECK(bias->numel() == n, "bias has ", bias->numel(), " elements, not ", n);
  }
  VERNIER_CHECK(input_zero_point.has_value() == weight_sum.has_value(),
                "input_zero_point and weight_sum go together: give both or neither");
  if (input_zero_point) {
    check_tensor(*input_zero_point, "input_zero_point", at::kInt, codes);
    check_tensor(*weight_sum, "weight_sum", at::kInt, codes);
    VERNIER_CHECK(input_zero_point->numel() == 1 && weight_sum->numel() == n,
                  "input_zero_point must have 1 element and weight_sum ", n, ", not ",
                  input_zero_point->numel(), " and ", weight_sum->numel());
    VERNIER_CHECK(codes.size(1) <= kMaxInt8GemmKAsymmetric, "K = ", codes.size(1),
                  " could overflow int32 with asymmetric activations: use symmetric ones or K <= ",
                  kMaxInt8GemmKAsymmetric);
  }

  const Tensor accumulators = int8_matmul_operator().call(codes, weight);
  const Tensor row_scale = input_scale.contiguous(), column_scale = weight_scale.contiguous();
  const Tensor dense_bias = bias ? bias->contiguous() : Tensor();
  const Tensor dense_sum = weight_sum ? weight_sum->contiguous() : Tensor();
  Tensor output = at::empty({m, n}, codes.options().dtype(dtype));
  EpilogueArguments arguments;
  arguments.output_type = element_type_of(dtype, "dtype");
  arguments.accumulators = accumulators.const_data_ptr<int32_t>();
  arguments.rows = m;
  arguments.columns = n;
  arguments.input_scale = row_scale.const_data_ptr<float>();
  arguments.input_scale_per_row = row_scale.numel() > 1;
  arguments.weight_scale = column_scale.const_data_ptr<float>();
  arguments.weight_scale_per_column = column_scale.numel() > 1;
  if (bias) arguments.bias = dense_bias.const_data_ptr<float>();
  if (input_zero_point) {
    arguments.input_zero_point = input_zero_point->const_data_ptr<int32_t>();
    arguments.weight_sum = dense_sum.const_data_ptr<int32_t>();
  }
  arguments.output = output.data_ptr();
  if (output.numel() == 0) return output;
  on_device_of(
      codes, [&] { cpu::int8_epilogue(arguments); },
      [&](void* stream) { cuda::int8_epilogue(arguments, stream); });
  return output;
}

Tensor int8_linear_meta(const Tensor& codes, const Tensor& weight, const Tensor&, const Tensor&,
                        const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                        at::ScalarType dtype) {
  return at::empty_symint({codes.sym_size(0), weight.sym_size(0)}, codes.options().dtype(dtype));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vernier, m) {
  m.def("int8_matmul(Tensor codes, Tensor weight) -> Tensor");
  m.def("int8_matmul_reference(Tensor codes, Tensor weight) -> Tensor");
  m.def(
      "int8_linear(Tensor codes, Tensor weight, Tensor input_scale, Tensor weight_scale, Tensor? "
      "bias=None, Tensor? input_zero_point=None, Tensor? weight_sum=None, *, ScalarType "
      "dtype=float) -> Tensor");
}
TORCH_LIBRARY_IMPL(vernier, CPU, m) {
  m.impl("int8_matmul", TORCH_FN(int8_matmul_cpu));
  m.impl("int8_matmul_reference", TORCH_FN(int8_matmul_reference));
  m.impl("int8_linear", TORCH_FN(int8_linear_kernel));
}
#ifdef VERNIER_WITH_CUDA
TORCH_LIBRARY_IMPL(vernier, CUDA, m) {
  m.impl("int8_matmul", TORCH_FN(int8_matmul_cuda));
  m.impl("int8_linear", TORCH_FN(int8_linear_kernel));
}
#endif
TORCH_LIBRARY_IMPL(vernier, Meta, m) {
  m.impl("int8_matmul", TORCH_FN(int8_matmul_meta));
  m.impl("int8_matmul_reference", TORCH_FN(int8_matmul_meta));
  m.impl("int8_linear", TORCH_FN(int8_linear_meta));
}

int64_t max_int8_gemm_k(const Scheme& activations, const Scheme& weights) {
  const auto largest = [](const Scheme& scheme) -> int64_t {
    if (!scheme.symmetric) return scheme.qmax() - scheme.qmin();
    return -int64_t{scheme.qmin()};
  };
  const int64_t limit =
      std::numeric_limits<int32_t>::max() / (largest(activations) * largest(weights));
  return std::min(limit, activations.symmetric ? kMaxInt8GemmK : kMaxInt8GemmKAsymmetric);
}

Tensor int8_matmul(const Tensor& codes, const Tensor& weight) {
  return int8_matmul_operator().call(codes, weight);
}

Tensor int8_linear(const Tensor& codes, const Tensor& weight, const Tensor& input_scale,
                   const Tensor& weight_scale, const OptionalTensor& bias,
                   const OptionalTensor& input_zero_point, const OptionalTensor& weight_sum,
                   at::ScalarType dtype) {
  static const auto op = operator_handle<decltype(int8_linear_kernel)>("vernier::int8_linear");
  return op.call(codes, weight, input_scale, weight_scale, bias, input_zero_point, weight_sum,
                 dtype);
}

}  // namespace vernier
