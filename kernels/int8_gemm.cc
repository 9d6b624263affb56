#include <ATen/ops/_int_mm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>
#include <vernier/kernels/int8_gemm.h>
#include <vernier/kernels/int8_gemm_device.h>
#include <vernier/kernels/int8_gemm_dispatch.h>
#include <vernier/kernels/quantize_dispatch.h>

#include <deque>
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
// codes and weight are contiguous and no size is 0.
void run_cuda(const Tensor& codes, const Tensor& weight, const EpilogueArguments& arguments) {
  const CudaScope scope(codes);
  const int64_t k = codes.size(1);
  const int64_t bytes =
      cuda::int8_gemm_workspace_bytes(arguments.rows, arguments.columns, k, arguments.output_type);
  Tensor workspace;
  if (bytes > 0) workspace = at::empty({bytes}, codes.options().dtype(at::kByte));
  cuda::int8_gemm(codes.const_data_ptr<int8_t>(), weight.const_data_ptr<int8_t>(), k, arguments,
                  bytes > 0 ? workspace.data_ptr() : nullptr, bytes, scope.stream());
}

Tensor int8_matmul_cuda(const Tensor& codes, const Tensor& weight) {
  check_operands(codes, weight);
  const int64_t m = codes.size(0), n = weight.size(0), k = codes.size(1);
  if (m == 0 || n == 0 || k == 0) return at::full({m, n}, 0, codes.options().dtype(at::kInt));
  Tensor out = at::empty({m, n}, codes.options().dtype(at::kInt));
  EpilogueArguments arguments;
  arguments.rows = m;
  arguments.columns = n;
  arguments.output = out.data_ptr();
  arguments.output_type = GemmOutput::i32;
  run_cuda(codes.contiguous(), weight.contiguous(), arguments);
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

GemmOutput output_type_of(at::ScalarType dtype) {
  switch (element_type_of(dtype, "dtype")) {
    case ElementType::f32:
      return GemmOutput::f32;
    case ElementType::f16:
      return GemmOutput::f16;
    case ElementType::bf16:
      break;
  }
  return GemmOutput::bf16;
}

// Checked, contiguous operands, kept alive beside the raw arguments that point into them.
class PreparedLinear {
 public:
  explicit PreparedLinear(const Int8LinearOperands& o) : codes_(o.codes), weight_(o.weight) {
    check_operands(codes_, weight_);
    VERNIER_CHECK(!o.input_zero_point || codes_.size(1) <= kMaxInt8GemmKAsymmetric,
                  "K = ", codes_.size(1),
                  " could overflow int32 with asymmetric activations: use symmetric ones or K <= ",
                  kMaxInt8GemmKAsymmetric);
    prepare(o, codes_, codes_.size(0), weight_.size(0));
  }

  // The epilogue alone.
  PreparedLinear(const Tensor& accumulators, const Int8LinearOperands& o)
      : accumulators_(accumulators) {
    prepare(o, accumulators_, accumulators_.size(0), accumulators_.size(1));
  }

  void requantize(const Requantization& r) {
    const Tensor& like = accumulators_.defined() ? accumulators_ : codes_;
    check_tensor(r.scale, "output_scale", at::kFloat, like);
    VERNIER_CHECK(r.scale.numel() == 1, "output_scale has ", r.scale.numel(),
                  " elements: codes for a next layer have one scale");
    if (r.zero_point) {
      check_tensor(*r.zero_point, "output_zero_point", at::kInt, like);
      VERNIER_CHECK(r.zero_point->numel() == 1, "output_zero_point has ", r.zero_point->numel(),
                    " elements, not 1");
      arguments_.output_zero_point = keep(*r.zero_point).const_data_ptr<int32_t>();
    }
    arguments_.output_scale = keep(r.scale).const_data_ptr<float>();
    arguments_.qmin = r.scheme.qmin();
    arguments_.qmax = r.scheme.qmax();
  }

  Tensor run(at::ScalarType dtype) {
    const Tensor& like = accumulators_.defined() ? accumulators_ : codes_;
    Tensor output = at::empty({arguments_.rows, arguments_.columns}, like.options().dtype(dtype));
    run_into(output);
    return output;
  }

  void run_into(const Tensor& output) {
    if (output.numel() == 0) return;
    arguments_.output = output.data_ptr();
    arguments_.output_type =
        output.scalar_type() == at::kChar ? GemmOutput::i8 : output_type_of(output.scalar_type());
#ifdef VERNIER_WITH_CUDA
    if (!accumulators_.defined() && codes_.is_cuda() && codes_.size(1) > 0) {
      run_cuda(codes_.contiguous(), weight_.contiguous(), arguments_);
      return;
    }
#endif
    if (!accumulators_.defined()) accumulators_ = int8_matmul_operator().call(codes_, weight_);
    on_device_of(
        accumulators_,
        [&] { cpu::int8_epilogue(accumulators_.const_data_ptr<int32_t>(), arguments_); },
        [&](void* stream) {
          cuda::int8_epilogue(accumulators_.const_data_ptr<int32_t>(), arguments_, stream);
        });
  }

 private:
  void prepare(const Int8LinearOperands& o, const Tensor& like, int64_t m, int64_t n) {
    check_tensor(o.input_scale, "input_scale", at::kFloat, like);
    check_tensor(o.weight_scale, "weight_scale", at::kFloat, like);
    VERNIER_CHECK(o.input_scale.numel() == 1 || o.input_scale.numel() == m, "input_scale has ",
                  o.input_scale.numel(), " elements: it needs 1 or one a row, ", m);
    VERNIER_CHECK(o.weight_scale.numel() == 1 || o.weight_scale.numel() == n, "weight_scale has ",
                  o.weight_scale.numel(), " elements: it needs 1 or one an output channel, ", n);
    if (o.bias) {
      check_tensor(*o.bias, "bias", at::kFloat, like);
      VERNIER_CHECK(o.bias->numel() == n, "bias has ", o.bias->numel(), " elements, not ", n);
    }
    VERNIER_CHECK(o.input_zero_point.has_value() == o.weight_sum.has_value(),
                  "input_zero_point and weight_sum go together: give both or neither");
    if (o.input_zero_point) {
      check_tensor(*o.input_zero_point, "input_zero_point", at::kInt, like);
      check_tensor(*o.weight_sum, "weight_sum", at::kInt, like);
      VERNIER_CHECK(o.input_zero_point->numel() == 1 && o.weight_sum->numel() == n,
                    "input_zero_point must have 1 element and weight_sum ", n, ", not ",
                    o.input_zero_point->numel(), " and ", o.weight_sum->numel());
    }
    arguments_.rows = m;
    arguments_.columns = n;
    arguments_.input_scale = keep(o.input_scale).const_data_ptr<float>();
    arguments_.input_scale_per_row = o.input_scale.numel() > 1;
    arguments_.weight_scale = keep(o.weight_scale).const_data_ptr<float>();
    arguments_.weight_scale_per_column = o.weight_scale.numel() > 1;
    if (o.bias) arguments_.bias = keep(*o.bias).const_data_ptr<float>();
    if (o.input_zero_point) {
      arguments_.input_zero_point = keep(*o.input_zero_point).const_data_ptr<int32_t>();
      arguments_.weight_sum = keep(*o.weight_sum).const_data_ptr<int32_t>();
    }
    arguments_.activation = o.activation;
  }

  const Tensor& keep(const Tensor& tensor) { return kept_.emplace_back(tensor.contiguous()); }

  Tensor codes_, weight_;
  Tensor accumulators_;
  std::deque<Tensor> kept_;
  EpilogueArguments arguments_;
};

Tensor int8_linear_kernel(const Tensor& codes, const Tensor& weight, const Tensor& input_scale,
                          const Tensor& weight_scale, const OptionalTensor& bias,
                          const OptionalTensor& input_zero_point, const OptionalTensor& weight_sum,
                          at::ScalarType dtype, std::string_view activation) {
  element_type_of(dtype, "dtype");
  PreparedLinear prepared({codes, weight, input_scale, weight_scale, bias, input_zero_point,
                           weight_sum, activation_from_string(activation)});
  return prepared.run(dtype);
}

Tensor int8_linear_requantize_kernel(const Tensor& codes, const Tensor& weight,
                                     const Tensor& input_scale, const Tensor& weight_scale,
                                     const OptionalTensor& bias,
                                     const OptionalTensor& input_zero_point,
                                     const OptionalTensor& weight_sum, const Tensor& output_scale,
                                     const OptionalTensor& output_zero_point, int64_t bits,
                                     bool narrow_range, std::string_view activation) {
  const Scheme scheme =
      scheme_from_arguments(!output_zero_point, bits, "per_tensor", 0, narrow_range);
  PreparedLinear prepared({codes, weight, input_scale, weight_scale, bias, input_zero_point,
                           weight_sum, activation_from_string(activation)});
  prepared.requantize({output_scale, output_zero_point, scheme});
  return prepared.run(at::kChar);
}

Tensor int8_linear_meta(const Tensor& codes, const Tensor& weight, const Tensor&, const Tensor&,
                        const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                        at::ScalarType dtype, std::string_view) {
  return at::empty_symint({codes.sym_size(0), weight.sym_size(0)}, codes.options().dtype(dtype));
}

Tensor int8_linear_requantize_meta(const Tensor& codes, const Tensor& weight, const Tensor&,
                                   const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                   const OptionalTensor&, const Tensor&, const OptionalTensor&,
                                   int64_t, bool, std::string_view) {
  return at::empty_symint({codes.sym_size(0), weight.sym_size(0)},
                          codes.options().dtype(at::kChar));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vernier, m) {
  m.def("int8_matmul(Tensor codes, Tensor weight) -> Tensor");
  m.def("int8_matmul_reference(Tensor codes, Tensor weight) -> Tensor");
  const std::string operands =
      "Tensor codes, Tensor weight, Tensor input_scale, Tensor weight_scale, Tensor? bias=None, "
      "Tensor? input_zero_point=None, Tensor? weight_sum=None";
  m.def(("int8_linear(" + operands +
         ", *, ScalarType dtype=float, str activation=\"none\") -> Tensor")
            .c_str());
  m.def(("int8_linear_requantize(" + operands +
         ", *, Tensor output_scale, Tensor? output_zero_point=None, int bits=8, bool "
         "narrow_range=True, str activation=\"none\") -> Tensor")
            .c_str());
}
TORCH_LIBRARY_IMPL(vernier, CPU, m) {
  m.impl("int8_matmul", TORCH_FN(int8_matmul_cpu));
  m.impl("int8_matmul_reference", TORCH_FN(int8_matmul_reference));
  m.impl("int8_linear", TORCH_FN(int8_linear_kernel));
  m.impl("int8_linear_requantize", TORCH_FN(int8_linear_requantize_kernel));
}
#ifdef VERNIER_WITH_CUDA
TORCH_LIBRARY_IMPL(vernier, CUDA, m) {
  m.impl("int8_matmul", TORCH_FN(int8_matmul_cuda));
  m.impl("int8_linear", TORCH_FN(int8_linear_kernel));
  m.impl("int8_linear_requantize", TORCH_FN(int8_linear_requantize_kernel));
}
#endif
TORCH_LIBRARY_IMPL(vernier, Meta, m) {
  m.impl("int8_matmul", TORCH_FN(int8_matmul_meta));
  m.impl("int8_matmul_reference", TORCH_FN(int8_matmul_meta));
  m.impl("int8_linear", TORCH_FN(int8_linear_meta));
  m.impl("int8_linear_requantize", TORCH_FN(int8_linear_requantize_meta));
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

Tensor int8_linear(const Int8LinearOperands& o, at::ScalarType dtype) {
  static const auto op = operator_handle<decltype(int8_linear_kernel)>("vernier::int8_linear");
  return op.call(o.codes, o.weight, o.input_scale, o.weight_scale, o.bias, o.input_zero_point,
                 o.weight_sum, dtype, to_string(o.activation));
}

Tensor int8_linear(const Tensor& codes, const Tensor& weight, const Tensor& input_scale,
                   const Tensor& weight_scale, const OptionalTensor& bias,
                   const OptionalTensor& input_zero_point, const OptionalTensor& weight_sum,
                   at::ScalarType dtype) {
  return int8_linear({codes, weight, input_scale, weight_scale, bias, input_zero_point, weight_sum},
                     dtype);
}

Tensor int8_linear_requantize(const Int8LinearOperands& o, const Tensor& output_scale,
                              const OptionalTensor& output_zero_point, const Scheme& scheme) {
  static const auto op =
      operator_handle<decltype(int8_linear_requantize_kernel)>("vernier::int8_linear_requantize");
  Requantization{output_scale, output_zero_point, scheme}.check();
  return op.call(o.codes, o.weight, o.input_scale, o.weight_scale, o.bias, o.input_zero_point,
                 o.weight_sum, output_scale, output_zero_point, scheme.bits, scheme.narrow_range,
                 to_string(o.activation));
}

void Requantization::check() const {
  scheme.check();
  VERNIER_CHECK(scheme.granularity == Granularity::per_tensor && !scheme.is_fp8(),
                "codes for a next layer are per_tensor integers, not ", to_string(scheme));
  VERNIER_CHECK(scheme.symmetric == !zero_point.has_value(),
                "output_zero_point goes with an asymmetric scheme, and only with one");
}

void int8_linear_into(const Int8LinearOperands& o,
                      const std::optional<Requantization>& requantization, const Tensor& output) {
  PreparedLinear prepared(o);
  if (requantization) prepared.requantize(*requantization);
  prepared.run_into(output);
}

void int8_epilogue_into(const Tensor& accumulators, const Int8LinearOperands& o,
                        const std::optional<Requantization>& requantization, const Tensor& output) {
  PreparedLinear prepared(accumulators, o);
  if (requantization) prepared.requantize(*requantization);
  prepared.run_into(output);
}

Int8GemmKernel int8_gemm_kernel([[maybe_unused]] int64_t m, [[maybe_unused]] int64_t n,
                                [[maybe_unused]] int64_t k) {
#ifdef VERNIER_WITH_CUDA
  auto [name, reason] = cuda::int8_gemm_kernel(m, n, k);
  return {std::move(name), std::move(reason)};
#else
  throw Error("int8_gemm_kernel: this build of Vernier has no CUDA parts");
#endif
}

void set_int8_gemm_autotune([[maybe_unused]] bool on) {
#ifdef VERNIER_WITH_CUDA
  cuda::set_int8_gemm_autotune(on);
#endif
}

}  // namespace vernier
