#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
#include <vernier/kernels/dispatch.h>
#include <vernier/kernels/rotary.h>
#include <vernier/kernels/rotary_device.h>

#include <limits>

namespace vernier {
namespace {

using at::Tensor;

Tensor rotary_embedding_kernel(const Tensor& x, const Tensor& cosine, const Tensor& sine) {
  RotaryArguments a;
  a.type = element_type_of(x.scalar_type(), "x");
  VERNIER_CHECK(x.dim() == 3, "x must be [tokens, heads, size], not ", x.sizes());
  for (const auto& [table, what] : {std::pair(&cosine, "cosine"), std::pair(&sine, "sine")}) {
    check_tensor(*table, what, at::kFloat, x);
    VERNIER_CHECK(
        table->dim() == 2 && table->sizes() == cosine.sizes() && 2 * table->size(1) <= x.size(2) &&
            table->size(0) > 0 && x.size(0) % table->size(0) == 0,
        what, " has shape ", table->sizes(), " but must be [rows, R / 2] with R <= ", x.size(2),
        " and rows a divisor of ", x.size(0), ", as cosine and sine both");
  }
  VERNIER_CHECK(x.size(1) * x.size(2) <= std::numeric_limits<int32_t>::max(), "a token of x has ",
                x.size(1) * x.size(2), " elements: more than 2^31 - 1");
  const Tensor input = x.stride(2) == 1 || x.size(2) <= 1 ? x : x.contiguous();
  const Tensor cosines = cosine.contiguous(), sines = sine.contiguous();
  const Tensor output = at::empty(x.sizes(), x.options());
  a.tokens = x.size(0);
  a.heads = x.size(1);
  a.size = x.size(2);
  a.half = cosine.size(1);
  a.table_rows = cosine.size(0);
  a.input = input.const_data_ptr();
  a.token_stride = input.stride(0);
  a.head_stride = input.stride(1);
  a.cosine = cosines.const_data_ptr<float>();
  a.sine = sines.const_data_ptr<float>();
  a.output = output.mutable_data_ptr();
  on_device_of(
      x, [&] { cpu::rotary_embedding(a); },
      [&](void* stream) { cuda::rotary_embedding(a, stream); });
  return output;
}

Tensor rotary_embedding_meta(const Tensor& x, const Tensor&, const Tensor&) {
  check_meta(x);
  return at::empty_symint(x.sym_sizes(), x.options());
}

auto& rotary_embedding_operator() {
  static const auto op =
      operator_handle<decltype(rotary_embedding_kernel)>("vernier::rotary_embedding");
  return op;
}

// A rotation's gradient turns back.
class RotaryFunction : public torch::autograd::Function<RotaryFunction> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x,
                        const Tensor& cosine, const Tensor& sine) {
    const at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({cosine, sine});
    return rotary_embedding_operator().call(x, cosine, sine);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto tables = context->get_saved_variables();
    return {rotary_embedding_operator().call(gradients[0], tables[0], tables[1].neg()), Tensor(),
            Tensor()};
  }
};

Tensor rotary_embedding_autograd(const Tensor& x, const Tensor& cosine, const Tensor& sine) {
  return RotaryFunction::apply(x, cosine, sine);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vernier, m) {
  m.def("rotary_embedding(Tensor x, Tensor cosine, Tensor sine) -> Tensor");
}
TORCH_LIBRARY_IMPL(vernier, CPU, m) {
  m.impl("rotary_embedding", TORCH_FN(rotary_embedding_kernel));
}
#ifdef VERNIER_WITH_CUDA
TORCH_LIBRARY_IMPL(vernier, CUDA, m) {
  m.impl("rotary_embedding", TORCH_FN(rotary_embedding_kernel));
}
#endif
TORCH_LIBRARY_IMPL(vernier, Meta, m) {
  m.impl("rotary_embedding", TORCH_FN(rotary_embedding_meta));
}
TORCH_LIBRARY_IMPL(vernier, Autograd, m) {
  m.impl("rotary_embedding", TORCH_FN(rotary_embedding_autograd));
}

Tensor rotary_embedding(const Tensor& x, const Tensor& cosine, const Tensor& sine) {
  return rotary_embedding_operator().call(x, cosine, sine);
}

}  // namespace vernier
