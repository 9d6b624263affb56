// What the tests of fake_quantized_linear on the CPU and the GPU share: settings, the composition
// that it stands for, and exact operands.
#pragma once

#include <torch/torch.h>
#include <vernier/kernels/fake_quantize.h>
#include <vernier/kernels/int8_gemm.h>
#include <vernier/kernels/linear_training.h>
#include <vernier/kernels/quantize.h>

#include <optional>
#include <string>
#include <vector>

namespace vernier::testing {

/// Operands and the output's gradient, none requiring gradients.
struct LinearInputs {
  torch::Tensor x, w;
  std::optional<torch::Tensor> b;
  torch::Tensor gradient;

  LinearInputs(std::vector<int64_t> shape, int64_t out, at::ScalarType type, bool bias,
               torch::Device device = torch::kCPU) {
    const auto make = [&](at::IntArrayRef sizes) { return torch::randn(sizes).to(device, type); };
    x = make(shape);
    w = make({out, shape.back()});
    if (bias) b = make({out});
    shape.back() = out;
    gradient = make(shape);
  }
};

/// How both operands are quantized.
struct LinearSetting {
  std::string name;
  Scheme input, weight;
  bool learned = false;
  bool input_dynamic = false, weight_dynamic = false;

  int64_t group_size() const { return std::max(input.group_size, weight.group_size); }
  bool takes_codes() const {
    return weight.symmetric && group_size() == 0 &&
           (input.symmetric || input.granularity == Granularity::per_tensor);
  }

  /// Scales that clip some of `x`'s elements, the same for equal shapes.
  static TrainedOperand operand(const torch::Tensor& x, const Scheme& scheme, bool dynamic,
                                bool learned) {
    TrainedOperand q{scheme};
    if (dynamic) return q;
    int64_t count = 1;
    if (scheme.granularity == Granularity::per_channel) count = x.size(0);
    if (scheme.granularity == Granularity::per_token) count = x.numel() / x.size(-1);
    if (scheme.granularity == Granularity::per_group) count = x.numel() / scheme.group_size;
    const auto options = x.options().dtype(at::kFloat);
    // The largest code stands for 1.5 or so: every seventh element of a normal is clipped.
    const double step = scheme.is_fp8() ? 1.5 / 448 : 1.5 / scheme.qmax();
    q.scale = torch::linspace(1.0, 1.1, count, options) * step;
    if (!scheme.symmetric) q.zero_point = torch::full({count}, 1, options.dtype(at::kInt));
    if (learned) {
      if (q.zero_point) q.zero_point = q.zero_point->to(at::kFloat) * 0.7;
      q.gradient_scale = 0.25;
    }
    return q;
  }
  TrainedOperand input_operand(const torch::Tensor& x) const {
    return operand(x, input, input_dynamic, learned);
  }
  TrainedOperand weight_operand(const torch::Tensor& w) const {
    return operand(w, weight, weight_dynamic, learned);
  }

  /// What a matrix is fake-quantized to and where gradients pass, in float64; of the settings that
  /// round trip through float32 exactly as scheme.h says.
  std::pair<torch::Tensor, torch::Tensor> exact_operand(const torch::Tensor& x,
                                                        const Scheme& scheme) const {
    const bool dynamic = &scheme == &input ? input_dynamic : weight_dynamic;
    const TrainedOperand q = operand(x, scheme, dynamic, learned);
    if (dynamic)
      return {fake_quantize_dynamic(x, scheme).first.to(at::kDouble),
              torch::ones_like(x, at::kDouble)};
    const torch::Tensor scale = q.scale->reshape({-1, 1});
    const auto by_scale = [&](const torch::Tensor& t) { return t.reshape({scale.size(0), -1}); };
    torch::Tensor zero = torch::zeros_like(scale);
    if (q.zero_point) zero = q.zero_point->to(at::kFloat).reshape({-1, 1}).round();
    const torch::Tensor code = (by_scale(x) / scale).round() + zero;
    const torch::Tensor clamped = code.clamp(scheme.qmin(), scheme.qmax());
    return {((clamped - zero).to(at::kDouble) * scale.to(at::kDouble)).reshape(x.sizes()),
            code.eq(clamped).to(at::kDouble).reshape(x.sizes())};
  }

  /// The output of the layer in integer mode.
  torch::Tensor integer_layer(const LinearInputs& inputs) const {
    const int64_t in = inputs.x.size(-1);
    const auto codes = [](const torch::Tensor& x, const TrainedOperand& q)
        -> std::tuple<torch::Tensor, torch::Tensor, std::optional<torch::Tensor>> {
      if (!q.scale) {
        auto [made, scale] = quantize_per_token(x, q.scheme);
        return {made, scale, std::nullopt};
      }
      std::optional<torch::Tensor> zero_point;
      if (q.zero_point)
        zero_point = q.zero_point->round().clamp(q.scheme.qmin(), q.scheme.qmax()).to(at::kInt);
      return {quantize(x, *q.scale, zero_point, q.scheme), *q.scale, zero_point};
    };
    const auto [a, a_scale, zero_point] =
        codes(inputs.x.reshape({-1, in}), input_operand(inputs.x));
    const auto [b, b_scale, none] = codes(inputs.w, weight_operand(inputs.w));
    std::optional<torch::Tensor> bias, sums;
    if (inputs.b) bias = inputs.b->to(at::kFloat);
    if (zero_point) sums = b.sum(1, false, at::kInt);
    return int8_linear(a, b, a_scale, b_scale, bias, zero_point, sums, inputs.x.scalar_type())
        .view(inputs.gradient.sizes());
  }
};

inline const std::vector<LinearSetting>& linear_settings() {
  constexpr Granularity kChannel = Granularity::per_channel, kToken = Granularity::per_token,
                        kGroup = Granularity::per_group;
  static const std::vector<LinearSetting> all = {
      {"static", symmetric_scheme(8), symmetric_scheme(8, kChannel)},
      {"static, tensor weight", symmetric_scheme(8), symmetric_scheme(8)},
      {"4 bits", symmetric_scheme(4), symmetric_scheme(4, kChannel)},
      {"asymmetric", asymmetric_scheme(8), symmetric_scheme(8, kChannel)},
      {"asymmetric weight", symmetric_scheme(8), asymmetric_scheme(4, kChannel)},
      {"dynamic", symmetric_scheme(8, kToken), symmetric_scheme(8, kChannel), false, true, true},
      {"dynamic weight", symmetric_scheme(8), symmetric_scheme(4, kChannel), false, false, true},
      {"groups", symmetric_scheme(8), symmetric_scheme(4, kGroup, 16)},
      {"dynamic groups", symmetric_scheme(8, kGroup, 16), symmetric_scheme(4, kGroup, 8), false,
       true, true},
      {"learned", symmetric_scheme(8), symmetric_scheme(4, kChannel), true},
      {"learned, asymmetric", asymmetric_scheme(8), symmetric_scheme(8, kChannel), true}};
  return all;
}

/// The output and every gradient, by name.
struct LinearResults {
  std::vector<std::string> names;
  std::vector<torch::Tensor> tensors;
};

/// Runs forward and backward of f(x, w, b, input operand, weight operand).
template <typename F>
LinearResults train_once(const LinearInputs& inputs, const LinearSetting& setting, const F& f) {
  const auto leaf = [](const torch::Tensor& t) {
    return t.detach().clone(at::MemoryFormat::Preserve).set_requires_grad(true);
  };
  const torch::Tensor x = leaf(inputs.x), w = leaf(inputs.w);
  std::optional<torch::Tensor> b;
  if (inputs.b) b = leaf(*inputs.b);
  TrainedOperand input = setting.input_operand(x.detach()),
                 weight = setting.weight_operand(w.detach());
  LinearResults results{{"output", "x", "w"}, {}};
  std::vector<torch::Tensor> leaves = {x, w};
  const auto add = [&](const char* name, const torch::Tensor& tensor) {
    results.names.push_back(name);
    leaves.push_back(tensor);
  };
  if (b) add("bias", *b);
  if (setting.learned) {
    for (TrainedOperand* q : {&input, &weight}) {
      add("scale", *(q->scale = leaf(*q->scale)));
      if (q->zero_point) add("zero point", *(q->zero_point = leaf(*q->zero_point)));
    }
  }
  const torch::Tensor y = f(x, w, b, input, weight);
  y.backward(inputs.gradient.to(y.scalar_type()));
  results.tensors.push_back(y.detach());
  for (const torch::Tensor& tensor : leaves) results.tensors.push_back(tensor.grad());
  return results;
}

inline LinearResults run_fused(const LinearInputs& inputs, const LinearSetting& setting,
                               TrainedProduct product = TrainedProduct::real) {
  return train_once(inputs, setting,
                    [&](const auto& x, const auto& w, const auto& b, const auto& p, const auto& q) {
                      return fake_quantized_linear(x, w, b, p, q, product).output;
                    });
}

inline LinearResults run_composed(const LinearInputs& inputs, const LinearSetting& setting) {
  return train_once(
      inputs, setting,
      [&](const auto& x, const auto& w, const auto& b, const auto& p, const auto& q) {
        const auto quantized = [](const torch::Tensor& t, const TrainedOperand& o) {
          if (!o.scale) return fake_quantize_dynamic(t, o.scheme).first;
          if (!o.gradient_scale) return fake_quantize(t, *o.scale, o.zero_point, o.scheme);
          return fake_quantize_learned(t, *o.scale, o.zero_point, o.scheme, 0, *o.gradient_scale);
        };
        return torch::linear(quantized(x, p), quantized(w, q), b.value_or(torch::Tensor()));
      });
}

}  // namespace vernier::testing
