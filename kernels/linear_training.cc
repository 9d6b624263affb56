#include <ATen/autocast_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>
#include <vernier/kernels/fake_quantize.h>
#include <vernier/kernels/int8_gemm.h>
#include <vernier/kernels/linear_training.h>
#include <vernier/kernels/masked_quantize.h>
#include <vernier/kernels/quantize.h>
#include <vernier/kernels/quantize_dispatch.h>

namespace vernier {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// ---- Operands -----------------------------------------------------------------------------------

// A matrix quantized: what is multiplied and what the backward needs of it.
struct QuantizedOperand {
  Tensor values;              // [rows, columns], of the operands' dtype or int8
  Tensor scale;               // that they were made with
  OptionalTensor zero_point;  // int32
  Tensor clipped;  // empty or undefined: nothing was clipped, or it will be found out again
};

// The scales of a matrix from its own absolute maxima.
Tensor dynamic_scale(const Tensor& matrix, const Scheme& scheme) {
  switch (scheme.granularity) {
    case Granularity::per_tensor:
      return per_token_scale(matrix.reshape({1, matrix.numel()}), scheme);
    case Granularity::per_group:
      VERNIER_CHECK(matrix.size(1) % scheme.group_size == 0, "group_size ", scheme.group_size,
                    " does not divide the last axis of ", matrix.sizes());
      return per_token_scale(
          matrix.reshape({matrix.numel() / scheme.group_size, scheme.group_size}), scheme);
    default:  // a scale a row
      return per_token_scale(matrix, scheme);
  }
}

QuantizedOperand quantize_dynamic(const Tensor& matrix, const Scheme& scheme,
                                  at::ScalarType dtype) {
  const bool rows = scheme.granularity == Granularity::per_token ||
                    scheme.granularity == Granularity::per_channel;
  QuantizedOperand operand;
  if (dtype == at::kChar && rows) {
    std::tie(operand.values, operand.scale) = quantize_per_token(matrix, scheme);
  } else if (dtype == matrix.scalar_type()) {
    std::tie(operand.values, operand.scale) = fake_quantize_dynamic(matrix, scheme);
  } else {
    operand.scale = dynamic_scale(matrix, scheme);
    operand.values = quantize_masked(matrix, operand.scale, std::nullopt, scheme, /*axis=*/0, dtype,
                                     /*mask=*/false)
                         .output;
  }
  return operand;
}

// What quantize_masked is given where there is a scale. `mask`: the gradient of the matrix is
// wanted; the backward of a learned scale reads the matrix anyway and finds out what was clipped.
MaskedOperand masked_operand(const Tensor& matrix, const TrainedOperand& q, bool mask) {
  return {matrix,   *q.scale,   integer_zero_point(q.zero_point, q.scheme),
          q.scheme, /*axis=*/0, mask && !q.gradient_scale};
}

QuantizedOperand quantized_operand(const MaskedOperand& given, MaskedQuantized result) {
  return {std::move(result.output), given.scale, given.zero_point, std::move(result.clipped)};
}

QuantizedOperand quantize_operand(const Tensor& matrix, const TrainedOperand& q,
                                  at::ScalarType dtype, bool mask) {
  if (!q.scale) return quantize_dynamic(matrix, q.scheme, dtype);
  const MaskedOperand given = masked_operand(matrix, q, mask);
  return quantized_operand(given, quantize_masked(matrix, given.scale, given.zero_point, q.scheme,
                                                  given.axis, dtype, given.mask));
}

// ---- Checks -------------------------------------------------------------------------------------

struct LinearCall {
  const Tensor& input;
  const Tensor& weight;
  const OptionalTensor& bias;
  TrainedOperand input_quantizer;
  TrainedOperand weight_quantizer;
  TrainedProduct product = TrainedProduct::real;
  at::ScalarType dtype = at::kFloat;  // of the operands

  // int8, or the operands' dtype.
  at::ScalarType values_dtype() const {
    return product == TrainedProduct::codes ? at::kChar : dtype;
  }
};

void check_operand(const Tensor& tensor, const TrainedOperand& q, const char* what) {
  element_type_of(tensor.scalar_type(), what);
  VERNIER_CHECK(q.scale || !q.zero_point, what,
                ": a zero point without a scale: dynamic scales are symmetric");
  VERNIER_CHECK(q.scale || !q.gradient_scale, what, ": there is no scale to learn");
}

void check(const LinearCall& call) {
  check_operand(call.input, call.input_quantizer, "input");
  check_operand(call.weight, call.weight_quantizer, "weight");
  element_type_of(call.dtype, "dtype");
  VERNIER_CHECK(
      call.weight.dim() == 2 && call.input.dim() >= 1 && call.input.size(-1) == call.weight.size(1),
      "input must be [..., in] and weight [out, in], not ", call.input.sizes(), " and ",
      call.weight.sizes());
  VERNIER_CHECK(call.input.device() == call.weight.device(), "the input is on ",
                call.input.device(), " but the weight is on ", call.weight.device(),
                ": move one of them");
  if (call.bias) {
    VERNIER_CHECK(call.bias->dim() == 1 && call.bias->size(0) == call.weight.size(0),
                  "bias must have one element an output, ", call.weight.size(0), ", not shape ",
                  call.bias->sizes());
    VERNIER_CHECK(call.bias->device() == call.input.device(), "the input is on ",
                  call.input.device(), " but the bias is on ", call.bias->device(),
                  ": move one of them");
  }
  VERNIER_CHECK(call.input_quantizer.scheme.granularity != Granularity::per_channel,
                "inputs are per_tensor, per_token or per_group, not per_channel");
  if (call.product != TrainedProduct::codes) return;
  const Scheme &inputs = call.input_quantizer.scheme, &weights = call.weight_quantizer.scheme;
  VERNIER_CHECK(weights.symmetric && inputs.granularity != Granularity::per_group &&
                    weights.granularity != Granularity::per_group &&
                    (inputs.symmetric || inputs.granularity == Granularity::per_tensor),
                "a product of codes takes inputs per_tensor or per_token (asymmetric: per_tensor) "
                "and weights symmetric, per_tensor or per_channel, not ",
                to_string(inputs), " and ", to_string(weights));
  const int64_t k = call.weight.size(1), limit = max_int8_gemm_k(inputs, weights);
  VERNIER_CHECK(k <= limit, "its ", k, " inputs could overflow the int32 accumulators (at most ",
                limit, "): use TrainedProduct::real");
}

// ---- Forward ------------------------------------------------------------------------------------

Tensor as_matrix(const Tensor& tensor) {
  if (tensor.dim() == 2) return tensor;
  return tensor.reshape({rows_of(tensor), columns_of(tensor)});
}

Tensor as_dtype(const Tensor& tensor, at::ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : tensor.to(dtype);
}

Tensor multiply(const LinearCall& call, const QuantizedOperand& x, const QuantizedOperand& w) {
  if (call.product == TrainedProduct::codes) {
    OptionalTensor bias, sums;
    if (call.bias) bias = as_dtype(*call.bias, at::kFloat);
    if (x.zero_point) sums = w.values.sum(/*dim=*/1, /*keepdim=*/false, at::kInt);
    return int8_linear(x.values, w.values, x.scale, w.scale, bias, x.zero_point, sums, call.dtype);
  }
  if (!call.bias) return at::mm(x.values, w.values.t());
  return at::addmm(as_dtype(*call.bias, call.dtype), x.values, w.values.t());
}

struct ForwardResult {
  Tensor output;
  QuantizedOperand input, weight;
};

// `input_mask`, `weight_mask`: whose gradient is wanted.
ForwardResult forward(const LinearCall& call, bool input_mask, bool weight_mask) {
  ForwardResult result;
  const at::ScalarType dtype = call.values_dtype();
  const TrainedOperand &x = call.input_quantizer, &w = call.weight_quantizer;
  const Tensor input = as_matrix(call.input);
  if (x.scale && w.scale) {  // at once
    const MaskedOperand a = masked_operand(input, x, input_mask),
                        b = masked_operand(call.weight, w, weight_mask);
    auto [p, q] = quantize_masked(a, b, dtype);
    result.input = quantized_operand(a, std::move(p));
    result.weight = quantized_operand(b, std::move(q));
  } else {
    result.input = quantize_operand(input, x, dtype, input_mask);
    result.weight = quantize_operand(call.weight, w, dtype, weight_mask);
  }
  result.output = multiply(call, result.input, result.weight);
  if (call.input.dim() != 2) {
    std::vector<int64_t> sizes = call.input.sizes().vec();
    sizes.back() = call.weight.size(0);
    result.output = result.output.view(sizes);
  }
  return result;
}

// ---- Backward -----------------------------------------------------------------------------------

// In place.
using LearnedBackward = std::tuple<Tensor, Tensor>(Tensor&, const Tensor&, const Tensor&,
                                                   const OptionalTensor&, int64_t, std::string_view,
                                                   int64_t, int64_t, bool, double);
auto& learned_backward_operator() {
  static const auto op =
      operator_handle<LearnedBackward>("vernier::fake_quantize_learned_backward_");
  return op;
}

// The gradients of an operand and of what is learned of its quantizer.
struct OperandGradients {
  Tensor operand, scale, zero_point;
};

// One operand as the backward keeps it.
class SavedOperand {
 public:
  // `values`: the other operand's gradient, which is made of them, is wanted.
  void save(const Tensor& original, const TrainedOperand& q, const QuantizedOperand& quantized,
            bool values) {
    scheme_ = q.scheme;
    gradient_scale_ = q.gradient_scale;
    dtype_ = original.scalar_type();
    sizes_ = original.sizes().vec();
    if (values) values_ = SavedVariable(quantized.values, /*is_output=*/false);
    is_codes_ = quantized.values.scalar_type() == at::kChar;
    has_mask_ = quantized.clipped.defined() && quantized.clipped.numel() > 0;
    if (has_mask_) clipped_ = SavedVariable(quantized.clipped, false);
    // What is not learned may be given other memory before the backward comes.
    const auto own = [&](const Tensor& t) { return gradient_scale_ ? t : t.detach(); };
    if (is_codes_ || gradient_scale_) scale_ = SavedVariable(own(quantized.scale), false);
    // Of a learned zero point the float one, from which the backward makes the other again.
    has_zero_point_ = quantized.zero_point.has_value();
    if (has_zero_point_ && is_codes_)
      integer_zero_point_ = SavedVariable(own(*quantized.zero_point), false);
    if (gradient_scale_) {
      original_ = SavedVariable(original, false);
      if (has_zero_point_) zero_point_ = SavedVariable(q.zero_point, false);
    }
  }

  // The quantized operand as a matrix of real values.
  Tensor matrix(at::ScalarType dtype) const {
    const Tensor values = values_.unpack();
    if (!is_codes_) return values;
    OptionalTensor zero_point;
    if (has_zero_point_) zero_point = integer_zero_point_.unpack();
    return dequantize(values, scale_.unpack(), zero_point, scheme_, /*axis=*/0, dtype);
  }

  // Where the operand was clipped; undefined where nothing is to become zero.
  Tensor clipped() const { return has_mask_ ? clipped_.unpack() : Tensor(); }

  // From the gradient of the quantized operand, a new matrix; what clipped() names is still to
  // become zero.
  OperandGradients gradients(Tensor gradient) const {
    OperandGradients result;
    gradient = as_dtype(gradient, dtype_);
    if (gradient_scale_) {
      const Tensor original = as_matrix(original_.unpack());
      OptionalTensor zero_point;
      if (has_zero_point_) zero_point = zero_point_.unpack();
      std::tie(result.scale, result.zero_point) = learned_backward_operator().call(
          gradient, original, scale_.unpack(), zero_point, scheme_.bits,
          to_string(scheme_.granularity), /*axis=*/0, scheme_.group_size, scheme_.narrow_range,
          *gradient_scale_);
      if (!zero_point || zero_point->scalar_type() != at::kFloat) result.zero_point = Tensor();
    }
    result.operand = sizes_.size() == 2 ? gradient : gradient.view(sizes_);
    return result;
  }

  void release() {
    for (SavedVariable* saved :
         {&values_, &clipped_, &scale_, &integer_zero_point_, &zero_point_, &original_})
      saved->reset_data();
  }

 private:
  Scheme scheme_;
  std::optional<double> gradient_scale_;
  at::ScalarType dtype_ = at::kFloat;
  std::vector<int64_t> sizes_;
  bool is_codes_ = false, has_mask_ = false, has_zero_point_ = false;
  SavedVariable values_, clipped_, scale_, integer_zero_point_, zero_point_, original_;
};

// A node of its own instead of torch::autograd::Function, whose boxed values cost the host as much
// as a small layer's kernel launches.
class FakeQuantizedLinearBackward : public torch::autograd::Node {
 public:
  // The edges, in the order of the operator's differentiable arguments.
  enum Edge : size_t {
    kInput,
    kWeight,
    kBias,
    kInputScale,
    kInputZeroPoint,
    kWeightScale,
    kWeightZeroPoint,
    kEdges
  };

  void save(const LinearCall& call, const ForwardResult& result) {
    dtype_ = call.dtype;
    if (call.bias) bias_dtype_ = call.bias->scalar_type();
    const auto wanted_at_all = [&](Edge a, Edge b, Edge c) {
      return should_compute_output(a) || should_compute_output(b) || should_compute_output(c);
    };
    input_.save(call.input, call.input_quantizer, result.input,
                wanted_at_all(kWeight, kWeightScale, kWeightZeroPoint));
    weight_.save(call.weight, call.weight_quantizer, result.weight,
                 wanted_at_all(kInput, kInputScale, kInputZeroPoint));
  }

  variable_list apply(variable_list&& gradients) override {
    VERNIER_CHECK(!at::GradMode::is_enabled(),
                  "fake_quantized_linear can be differentiated once: create_graph is not possible");
    const std::lock_guard lock(mutex_);
    variable_list results(kEdges);
    if (!gradients[0].defined()) return results;
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor gradient = as_matrix(gradients[0]).contiguous();
    OperandGradients input, weight;
    if (wanted(kInput) || wanted(kInputScale) || wanted(kInputZeroPoint)) {
      input = input_.gradients(at::mm(gradient, weight_.matrix(dtype_)));
    }
    if (wanted(kWeight) || wanted(kWeightScale) || wanted(kWeightZeroPoint)) {
      weight = weight_.gradients(at::mm(gradient.t(), input_.matrix(dtype_)));
    }
    zero_clipped(input.operand, input_.clipped(), weight.operand, weight_.clipped());
    results[kInput] = std::move(input.operand);
    results[kInputScale] = std::move(input.scale);
    results[kInputZeroPoint] = std::move(input.zero_point);
    results[kWeight] = std::move(weight.operand);
    results[kWeightScale] = std::move(weight.scale);
    results[kWeightZeroPoint] = std::move(weight.zero_point);
    if (wanted(kBias)) results[kBias] = as_dtype(gradient.sum(0), bias_dtype_);
    return results;
  }

  std::string name() const override { return "FakeQuantizedLinearBackward"; }

  void release_variables() override {
    const std::lock_guard lock(mutex_);
    input_.release();
    weight_.release();
  }

 private:
  bool wanted(Edge edge) const { return task_should_compute_output(edge); }

  // Of gradients that were computed and masks that are there.
  static void zero_clipped(Tensor& a, const Tensor& a_clipped, Tensor& b, const Tensor& b_clipped) {
    const bool first = a.defined() && a_clipped.defined();
    const bool second = b.defined() && b_clipped.defined();
    if (first && second) {
      zero_clipped_(a, a_clipped, b, b_clipped);
    } else if (first) {
      zero_clipped_(a, a_clipped);
    } else if (second) {
      zero_clipped_(b, b_clipped);
    }
  }

  at::ScalarType dtype_ = at::kFloat, bias_dtype_ = at::kFloat;
  SavedOperand input_, weight_;
};

// ---- Operator -----------------------------------------------------------------------------------

LinearCall call_of(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& input_scale, const OptionalTensor& input_zero_point,
                   const OptionalTensor& weight_scale, const OptionalTensor& weight_zero_point,
                   int64_t input_bits, std::string_view input_granularity, int64_t input_group_size,
                   bool input_narrow_range, std::optional<double> input_gradient_scale,
                   int64_t weight_bits, std::string_view weight_granularity,
                   int64_t weight_group_size, bool weight_narrow_range,
                   std::optional<double> weight_gradient_scale, bool product_of_codes,
                   std::optional<at::ScalarType> dtype) {
  LinearCall call{input,
                  weight,
                  bias,
                  {scheme_from_arguments(!input_zero_point, input_bits, input_granularity,
                                         input_group_size, input_narrow_range),
                   input_scale, input_zero_point, input_gradient_scale},
                  {scheme_from_arguments(!weight_zero_point, weight_bits, weight_granularity,
                                         weight_group_size, weight_narrow_range),
                   weight_scale, weight_zero_point, weight_gradient_scale},
                  product_of_codes ? TrainedProduct::codes : TrainedProduct::real,
                  dtype.value_or(input.scalar_type())};
  check(call);
  if (!dtype)
    VERNIER_CHECK(weight.scalar_type() == input.scalar_type() &&
                      (!bias || bias->scalar_type() == input.scalar_type()),
                  "input and weight are ", c10::toString(input.scalar_type()), " and ",
                  c10::toString(weight.scalar_type()),
                  ": make them (and the bias) equal, use autocast, or give a dtype");
  return call;
}

using Results = std::tuple<Tensor, Tensor, Tensor>;

// The output, and scales that were found.
Results results_of(const LinearCall& call, ForwardResult& result) {
  return {std::move(result.output), call.input_quantizer.scale ? Tensor() : result.input.scale,
          call.weight_quantizer.scale ? Tensor() : result.weight.scale};
}

// Without gradients.
Results run(const LinearCall& call) {
  ForwardResult result = forward(call, /*input_mask=*/false, /*weight_mask=*/false);
  return results_of(call, result);
}

Results run_with_autograd(const LinearCall& call) {
  const TrainedOperand &x = call.input_quantizer, &w = call.weight_quantizer;
  std::shared_ptr<FakeQuantizedLinearBackward> node;
  if (torch::autograd::compute_requires_grad(call.input, call.weight, call.bias, x.scale,
                                             x.zero_point, w.scale, w.zero_point)) {
    node = std::shared_ptr<FakeQuantizedLinearBackward>(new FakeQuantizedLinearBackward,
                                                        torch::autograd::deleteNode);
    // A scale that is not learned is a constant, whatever it says itself.
    const OptionalTensor constant;
    node->set_next_edges(torch::autograd::collect_next_edges(
        call.input, call.weight, call.bias, x.gradient_scale ? x.scale : constant,
        x.gradient_scale ? x.zero_point : constant, w.gradient_scale ? w.scale : constant,
        w.gradient_scale ? w.zero_point : constant));
  }
  ForwardResult result;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    result = forward(call, node && call.input.requires_grad(), node && call.weight.requires_grad());
  }
  if (node) {
    node->save(call, result);
    torch::autograd::set_history(result.output, node);
  }
  return results_of(call, result);
}

using Signature = Results(const Tensor&, const Tensor&, const OptionalTensor&,
                          const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                          const OptionalTensor&, int64_t, std::string_view, int64_t, bool,
                          std::optional<double>, int64_t, std::string_view, int64_t, bool,
                          std::optional<double>, bool, std::optional<at::ScalarType>);

auto& fake_quantized_linear_operator() {
  static const auto op = operator_handle<Signature>("vernier::fake_quantized_linear");
  return op;
}

template <typename>
struct Kernels;

// What is registered, with the operator's many arguments written once.
template <typename... Arguments>
struct Kernels<Results(Arguments...)> {
  static Results plain(Arguments... arguments) { return run(call_of(arguments...)); }

  static Results autograd(Arguments... arguments) {
    return run_with_autograd(call_of(arguments...));
  }

  template <at::DeviceType kDevice>
  static Results autocast(Arguments... arguments) {
    const c10::impl::ExcludeDispatchKeyGuard done(
        at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
    std::tuple<Arguments...> call(arguments...);
    auto& dtype = std::get<sizeof...(Arguments) - 1>(call);
    if (!dtype) dtype = at::autocast::get_autocast_dtype(kDevice);
    return std::apply(
        [](const auto&... all) { return fake_quantized_linear_operator().call(all...); }, call);
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(vernier, m) {
  const auto scheme = [](const std::string& name, const std::string& granularity) {
    return "int " + name + "_bits=8, str " + name + "_granularity=\"" + granularity + "\", int " +
           name + "_group_size=0, bool " + name + "_narrow_range=True, float? " + name +
           "_gradient_scale=None, ";
  };
  m.def(("fake_quantized_linear(Tensor input, Tensor weight, Tensor? bias=None, "
         "Tensor? input_scale=None, Tensor? input_zero_point=None, Tensor? weight_scale=None, "
         "Tensor? weight_zero_point=None, *, " +
         scheme("input", "per_tensor") + scheme("weight", "per_channel") +
         "bool product_of_codes=False, ScalarType? dtype=None) -> (Tensor output, Tensor "
         "input_scale, "
         "Tensor weight_scale)")
            .c_str());
}
TORCH_LIBRARY_IMPL(vernier, CompositeExplicitAutograd, m) {
  m.impl("fake_quantized_linear", TORCH_FN(Kernels<Signature>::plain));
}
TORCH_LIBRARY_IMPL(vernier, Autograd, m) {
  m.impl("fake_quantized_linear", TORCH_FN(Kernels<Signature>::autograd));
}
TORCH_LIBRARY_IMPL(vernier, AutocastCPU, m) {
  m.impl("fake_quantized_linear", TORCH_FN(Kernels<Signature>::autocast<at::kCPU>));
}
TORCH_LIBRARY_IMPL(vernier, AutocastCUDA, m) {
  m.impl("fake_quantized_linear", TORCH_FN(Kernels<Signature>::autocast<at::kCUDA>));
}

TrainedLinear fake_quantized_linear(const Tensor& input, const Tensor& weight,
                                    const OptionalTensor& bias, const TrainedOperand& x,
                                    const TrainedOperand& w, TrainedProduct product,
                                    std::optional<at::ScalarType> dtype) {
  for (const TrainedOperand* q : {&x, &w}) {
    VERNIER_CHECK(!q->scheme.is_fp8(), "fake_quantized_linear takes integer schemes, not ",
                  to_string(q->scheme));
    if (q->scale) check_zero_point(q->scheme, q->zero_point);
    VERNIER_CHECK(q->scale || q->scheme.symmetric,
                  "dynamic scales are symmetric: ", to_string(q->scheme),
                  " needs a calibrated or a learned scale");
  }
  auto [output, input_scale, weight_scale] = fake_quantized_linear_operator().call(
      input, weight, bias, x.scale, x.zero_point, w.scale, w.zero_point, x.scheme.bits,
      to_string(x.scheme.granularity), x.scheme.group_size, x.scheme.narrow_range, x.gradient_scale,
      w.scheme.bits, to_string(w.scheme.granularity), w.scheme.group_size, w.scheme.narrow_range,
      w.gradient_scale, product == TrainedProduct::codes, dtype);
  return {std::move(output), std::move(input_scale), std::move(weight_scale)};
}

}  // namespace vernier
