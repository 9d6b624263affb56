#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
#include <vernier/kernels/fake_quantize.h>
#include <vernier/kernels/fake_quantize_device.h>
#include <vernier/kernels/fp8.h>
#include <vernier/kernels/quantize_dispatch.h>

namespace vernier {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- Kernels ------------------------------------------------------------------------------------

Tensor fake_quantize_kernel(const Tensor& input, const Tensor& scale,
                            const OptionalTensor& zero_point, int64_t bits,
                            std::string_view granularity, int64_t axis, int64_t group_size,
                            bool narrow_range) {
  const Scheme scheme =
      scheme_from_arguments(!zero_point, bits, granularity, group_size, narrow_range);
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
      scheme_from_arguments(!zero_point, bits, granularity, group_size, narrow_range);
  check_gradient(gradient, input);
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

std::tuple<Tensor, Tensor> fake_quantize_dynamic_kernel(const Tensor& input, int64_t bits,
                                                        std::string_view granularity, int64_t axis,
                                                        int64_t group_size, bool narrow_range) {
  const Scheme scheme = scheme_from_arguments(true, bits, granularity, group_size, narrow_range);
  const Tensor x = input.contiguous();
  QuantizeArguments arguments;
  arguments.input = x.const_data_ptr();
  arguments.input_type = element_type_of(x.scalar_type(), "input");
  arguments.numel = x.numel();
  arguments.map = scale_map_of(x, scheme, axis);
  arguments.qmin = scheme.qmin();
  arguments.qmax = scheme.qmax();
  Tensor output = at::empty(x.sizes(), x.options());
  Tensor scale = at::empty({arguments.map.count}, x.options().dtype(at::kFloat));
  void* out = output.data_ptr();
  float* scale_out = scale.data_ptr<float>();
  on_device_of(
      x, [&] { cpu::fake_quantize_dynamic(arguments, out, scale_out); },
      [&](void* stream) { cuda::fake_quantize_dynamic(arguments, out, scale_out, stream); });
  return {output, scale};
}

Tensor fake_quantize_learned_kernel(const Tensor& input, const Tensor& scale,
                                    const OptionalTensor& zero_point, int64_t bits,
                                    std::string_view granularity, int64_t axis, int64_t group_size,
                                    bool narrow_range, double) {
  const Scheme scheme =
      scheme_from_arguments(!zero_point, bits, granularity, group_size, narrow_range);
  return fake_quantize_kernel(input, scale, integer_zero_point(zero_point, scheme), bits,
                              granularity, axis, group_size, narrow_range);
}

// Writes the input's gradient to `output`, which may be `gradient`; returns the others.
std::tuple<Tensor, Tensor> learned_backward(const Tensor& gradient, const Tensor& input,
                                            const Tensor& scale, const OptionalTensor& zero_point,
                                            const Scheme& scheme, int64_t axis,
                                            double gradient_scale, const Tensor& output) {
  const bool learns_zero_point = zero_point && zero_point->scalar_type() == at::kFloat;
  const Prepared p(input, element_type_of(input.scalar_type(), "input"), scale,
                   integer_zero_point(zero_point, scheme), scheme, axis);
  const void* grad = gradient.const_data_ptr();
  Tensor scale_gradient = at::empty(scale.sizes(), scale.options());
  Tensor zero_point_gradient = learns_zero_point
                                   ? at::empty(zero_point->sizes(), zero_point->options())
                                   : at::empty({0}, scale.options());
  void* out = output.data_ptr();
  LearnedGradients gradients;
  gradients.scale = scale_gradient.data_ptr<float>();
  if (learns_zero_point) gradients.zero_point = zero_point_gradient.data_ptr<float>();
  gradients.gradient_scale = gradient_scale;
  on_device_of(
      input, [&] { cpu::fake_quantize_learned_backward(p.arguments, grad, out, gradients); },
      [&](void* stream) {
        Tensor scratch = at::empty({cuda::learned_backward_scratch(p.arguments)},
                                   input.options().dtype(at::kDouble));
        cuda::fake_quantize_learned_backward(p.arguments, grad, out, gradients,
                                             scratch.data_ptr<double>(), stream);
      });
  return {scale_gradient, zero_point_gradient};
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_learned_backward_kernel(
    const Tensor& gradient, const Tensor& input, const Tensor& scale,
    const OptionalTensor& zero_point, int64_t bits, std::string_view granularity, int64_t axis,
    int64_t group_size, bool narrow_range, double gradient_scale) {
  const Scheme scheme =
      scheme_from_arguments(!zero_point, bits, granularity, group_size, narrow_range);
  check_gradient(gradient, input);
  Tensor output = at::empty(input.sizes(), input.options());
  auto [scale_gradient, zero_point_gradient] = learned_backward(
      gradient.contiguous(), input, scale, zero_point, scheme, axis, gradient_scale, output);
  return {output, scale_gradient, zero_point_gradient};
}

// The input's gradient takes the gradient's place.
std::tuple<Tensor, Tensor> fake_quantize_learned_backward_in_place_kernel(
    Tensor& gradient, const Tensor& input, const Tensor& scale, const OptionalTensor& zero_point,
    int64_t bits, std::string_view granularity, int64_t axis, int64_t group_size, bool narrow_range,
    double gradient_scale) {
  const Scheme scheme =
      scheme_from_arguments(!zero_point, bits, granularity, group_size, narrow_range);
  check_gradient(gradient, input);
  VERNIER_CHECK(gradient.is_contiguous(), "gradient must be contiguous: it is changed in place");
  return learned_backward(gradient, input, scale, zero_point, scheme, axis, gradient_scale,
                          gradient);
}

// ---- Shapes and dtypes without data, for tracing ------------------------------------------------

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
std::tuple<Tensor, Tensor> fake_quantize_dynamic_meta(const Tensor& input, int64_t,
                                                      std::string_view granularity, int64_t axis,
                                                      int64_t group_size, bool) {
  check_meta(input);
  const auto sizes = input.sym_sizes();
  c10::SymInt count = 1;
  switch (granularity_from_string(std::string(granularity))) {
    case Granularity::per_tensor:
      break;
    case Granularity::per_channel:
      count = input.sym_size(axis);
      break;
    case Granularity::per_token:
      for (size_t i = 0; i + 1 < sizes.size(); ++i) count = count * sizes[i];
      break;
    case Granularity::per_group:
      count = input.sym_numel() / group_size;
      break;
  }
  return {at::empty_symint(sizes, input.options()),
          at::empty_symint({count}, input.options().dtype(at::kFloat))};
}
Tensor fake_quantize_learned_meta(const Tensor& input, const Tensor&, const OptionalTensor&,
                                  int64_t, std::string_view, int64_t, int64_t, bool, double) {
  check_meta(input);
  return at::empty_symint(input.sym_sizes(), input.options());
}
std::tuple<Tensor, Tensor, Tensor> fake_quantize_learned_backward_meta(
    const Tensor&, const Tensor& input, const Tensor& scale, const OptionalTensor& zero_point,
    int64_t, std::string_view, int64_t, int64_t, bool, double) {
  check_meta(input);
  const auto options = input.options().dtype(at::kFloat);
  const bool learns_zero_point = zero_point && zero_point->scalar_type() == at::kFloat;
  return {at::empty_symint(input.sym_sizes(), input.options()),
          at::empty_symint(scale.sym_sizes(), options),
          learns_zero_point ? at::empty_symint(zero_point->sym_sizes(), options)
                            : at::empty({0}, options)};
}

std::tuple<Tensor, Tensor> fake_quantize_learned_backward_in_place_meta(
    Tensor& gradient, const Tensor& input, const Tensor& scale, const OptionalTensor& zero_point,
    int64_t bits, std::string_view granularity, int64_t axis, int64_t group_size, bool narrow_range,
    double gradient_scale) {
  auto [same, scale_gradient, zero_point_gradient] =
      fake_quantize_learned_backward_meta(gradient, input, scale, zero_point, bits, granularity,
                                          axis, group_size, narrow_range, gradient_scale);
  return {scale_gradient, zero_point_gradient};
}

// ---- Gradients ----------------------------------------------------------------------------------

auto& fake_quantize_operator() {
  static const auto op = operator_handle<decltype(fake_quantize_kernel)>("vernier::fake_quantize");
  return op;
}
auto& fake_quantize_backward_operator() {
  static const auto op =
      operator_handle<decltype(fake_quantize_backward_kernel)>("vernier::fake_quantize_backward");
  return op;
}
auto& fake_quantize_dynamic_operator() {
  static const auto op =
      operator_handle<decltype(fake_quantize_dynamic_kernel)>("vernier::fake_quantize_dynamic");
  return op;
}
auto& fake_quantize_learned_operator() {
  static const auto op =
      operator_handle<decltype(fake_quantize_learned_kernel)>("vernier::fake_quantize_learned");
  return op;
}
auto& fake_quantize_learned_backward_operator() {
  static const auto op = operator_handle<decltype(fake_quantize_learned_backward_kernel)>(
      "vernier::fake_quantize_learned_backward");
  return op;
}

// The scheme's part of a call, kept between forward and backward.
struct SchemeArguments {
  int64_t bits;
  std::string granularity;
  int64_t axis;
  int64_t group_size;
  bool narrow_range;

  void save(AutogradContext& context) const {
    auto& data = context.saved_data;
    data["bits"] = bits;
    data["granularity"] = granularity;
    data["axis"] = axis;
    data["group_size"] = group_size;
    data["narrow_range"] = narrow_range;
  }
  static SchemeArguments load(AutogradContext& context) {
    auto& data = context.saved_data;
    return {data["bits"].toInt(), data["granularity"].toStringRef(), data["axis"].toInt(),
            data["group_size"].toInt(), data["narrow_range"].toBool()};
  }
};

OptionalTensor optional(const Tensor& saved) {
  return saved.defined() ? OptionalTensor(saved) : std::nullopt;
}

// Straight-through estimator. The mask is recomputed from the input, which the layer keeps alive
// anyway.
class FakeQuantizeFunction : public torch::autograd::Function<FakeQuantizeFunction> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& input, const Tensor& scale,
                        const OptionalTensor& zero_point, const SchemeArguments& s) {
    const at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({input, scale, zero_point.value_or(Tensor())});
    s.save(*context);
    return fake_quantize_operator().call(input, scale, zero_point, s.bits, s.granularity, s.axis,
                                         s.group_size, s.narrow_range);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const SchemeArguments s = SchemeArguments::load(*context);
    return {fake_quantize_backward_operator().call(gradients[0], saved[0], saved[1],
                                                   optional(saved[2]), s.bits, s.granularity,
                                                   s.axis, s.group_size, s.narrow_range),
            Tensor(), Tensor(), Tensor()};
  }
};

Tensor fake_quantize_autograd(const Tensor& input, const Tensor& scale,
                              const OptionalTensor& zero_point, int64_t bits,
                              std::string_view granularity, int64_t axis, int64_t group_size,
                              bool narrow_range) {
  return FakeQuantizeFunction::apply(
      input, scale, zero_point,
      SchemeArguments{bits, std::string(granularity), axis, group_size, narrow_range});
}

class FakeQuantizeDynamicFunction : public torch::autograd::Function<FakeQuantizeDynamicFunction> {
 public:
  static variable_list forward(AutogradContext* context, const Tensor& input,
                               const SchemeArguments& s) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [output, scale] = fake_quantize_dynamic_operator().call(
        input, s.bits, s.granularity, s.axis, s.group_size, s.narrow_range);
    context->mark_non_differentiable({scale});
    return {output, scale};
  }

  static variable_list backward(AutogradContext*, const variable_list& gradients) {
    return {gradients[0], Tensor()};
  }
};

std::tuple<Tensor, Tensor> fake_quantize_dynamic_autograd(const Tensor& input, int64_t bits,
                                                          std::string_view granularity,
                                                          int64_t axis, int64_t group_size,
                                                          bool narrow_range) {
  const variable_list results = FakeQuantizeDynamicFunction::apply(
      input, SchemeArguments{bits, std::string(granularity), axis, group_size, narrow_range});
  return {results[0], results[1]};
}

class FakeQuantizeLearnedFunction : public torch::autograd::Function<FakeQuantizeLearnedFunction> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& input, const Tensor& scale,
                        const OptionalTensor& zero_point, const SchemeArguments& s,
                        double gradient_scale) {
    const at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({input, scale, zero_point.value_or(Tensor())});
    s.save(*context);
    context->saved_data["gradient_scale"] = gradient_scale;
    return fake_quantize_learned_operator().call(input, scale, zero_point, s.bits, s.granularity,
                                                 s.axis, s.group_size, s.narrow_range,
                                                 gradient_scale);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const SchemeArguments s = SchemeArguments::load(*context);
    auto [input, scale, zero_point] = fake_quantize_learned_backward_operator().call(
        gradients[0], saved[0], saved[1], optional(saved[2]), s.bits, s.granularity, s.axis,
        s.group_size, s.narrow_range, context->saved_data["gradient_scale"].toDouble());
    const bool learns_zero_point = saved[2].defined() && saved[2].scalar_type() == at::kFloat;
    return {input, scale, learns_zero_point ? zero_point : Tensor(), Tensor(), Tensor()};
  }
};

Tensor fake_quantize_learned_autograd(const Tensor& input, const Tensor& scale,
                                      const OptionalTensor& zero_point, int64_t bits,
                                      std::string_view granularity, int64_t axis,
                                      int64_t group_size, bool narrow_range,
                                      double gradient_scale) {
  return FakeQuantizeLearnedFunction::apply(
      input, scale, zero_point,
      SchemeArguments{bits, std::string(granularity), axis, group_size, narrow_range},
      gradient_scale);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vernier, m) {
  const std::string scheme = kSchemeArguments;
  const std::string operands = "Tensor scale, Tensor? zero_point=None, *, " + scheme;
  const std::string learned = operands + ", float gradient_scale=1.0";
  m.def(("fake_quantize(Tensor input, " + operands + ") -> Tensor").c_str());
  m.def(("fake_quantize_backward(Tensor gradient, Tensor input, " + operands + ") -> Tensor")
            .c_str());
  m.def(("fake_quantize_dynamic(Tensor input, *, " + scheme + ") -> (Tensor output, Tensor scale)")
            .c_str());
  m.def(("fake_quantize_learned(Tensor input, " + learned + ") -> Tensor").c_str());
  m.def(("fake_quantize_learned_backward(Tensor gradient, Tensor input, " + learned +
         ") -> (Tensor input, Tensor scale, Tensor zero_point)")
            .c_str());
  m.def(("fake_quantize_learned_backward_(Tensor(a!) gradient, Tensor input, " + learned +
         ") -> (Tensor scale, Tensor zero_point)")
            .c_str());
}

#define VERNIER_REGISTER_FAKE_QUANTIZE(m)                                                    \
  m.impl("fake_quantize", TORCH_FN(fake_quantize_kernel));                                   \
  m.impl("fake_quantize_backward", TORCH_FN(fake_quantize_backward_kernel));                 \
  m.impl("fake_quantize_dynamic", TORCH_FN(fake_quantize_dynamic_kernel));                   \
  m.impl("fake_quantize_learned", TORCH_FN(fake_quantize_learned_kernel));                   \
  m.impl("fake_quantize_learned_backward", TORCH_FN(fake_quantize_learned_backward_kernel)); \
  m.impl("fake_quantize_learned_backward_",                                                  \
         TORCH_FN(fake_quantize_learned_backward_in_place_kernel))

TORCH_LIBRARY_IMPL(vernier, CPU, m) { VERNIER_REGISTER_FAKE_QUANTIZE(m); }
#ifdef VERNIER_WITH_CUDA
TORCH_LIBRARY_IMPL(vernier, CUDA, m) { VERNIER_REGISTER_FAKE_QUANTIZE(m); }
#endif
TORCH_LIBRARY_IMPL(vernier, Meta, m) {
  m.impl("fake_quantize", TORCH_FN(fake_quantize_meta));
  m.impl("fake_quantize_backward", TORCH_FN(fake_quantize_backward_meta));
  m.impl("fake_quantize_dynamic", TORCH_FN(fake_quantize_dynamic_meta));
  m.impl("fake_quantize_learned", TORCH_FN(fake_quantize_learned_meta));
  m.impl("fake_quantize_learned_backward", TORCH_FN(fake_quantize_learned_backward_meta));
  m.impl("fake_quantize_learned_backward_", TORCH_FN(fake_quantize_learned_backward_in_place_meta));
}
TORCH_LIBRARY_IMPL(vernier, Autograd, m) {
  m.impl("fake_quantize", TORCH_FN(fake_quantize_autograd));
  m.impl("fake_quantize_dynamic", TORCH_FN(fake_quantize_dynamic_autograd));
  m.impl("fake_quantize_learned", TORCH_FN(fake_quantize_learned_autograd));
}

Tensor fake_quantize(const Tensor& input, const Tensor& scale, const OptionalTensor& zero_point,
                     const Scheme& scheme, int64_t axis) {
  check_zero_point(scheme, zero_point);
  if (scheme.is_fp8()) return fake_quantize_fp8(input, scale, scheme, axis);
  return fake_quantize_operator().call(input, scale, zero_point, scheme.bits,
                                       to_string(scheme.granularity), axis, scheme.group_size,
                                       scheme.narrow_range);
}

std::pair<Tensor, Tensor> fake_quantize_dynamic(const Tensor& input, const Scheme& scheme,
                                                int64_t axis) {
  VERNIER_CHECK(scheme.symmetric, "dynamic scales are symmetric: ", to_string(scheme),
                " needs a calibrated or a learned scale");
  auto [output, scale] =
      fake_quantize_dynamic_operator().call(input, scheme.bits, to_string(scheme.granularity), axis,
                                            scheme.group_size, scheme.narrow_range);
  return {std::move(output), std::move(scale)};
}

Tensor fake_quantize_learned(const Tensor& input, const Tensor& scale,
                             const OptionalTensor& zero_point, const Scheme& scheme, int64_t axis,
                             double gradient_scale) {
  check_zero_point(scheme, zero_point);
  return fake_quantize_learned_operator().call(
      input, scale, zero_point, scheme.bits, to_string(scheme.granularity), axis, scheme.group_size,
      scheme.narrow_range, gradient_scale);
}

}  // namespace vernier
