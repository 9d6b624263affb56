// Groups of linear layers and what may stand in front of them, for the tests on both devices.
#pragma once

#include <torch/torch.h>
#include <vernier/qat/linear_group.h>

#include <functional>
#include <string>
#include <vector>

namespace vernier::testing {

inline constexpr int64_t kGroupIn = 48;

inline const std::vector<Scheme>& group_input_schemes() {
  static const std::vector<Scheme> all = {
      symmetric_scheme(8), asymmetric_scheme(8), symmetric_scheme(4),
      Scheme{.granularity = Granularity::per_token, .dynamic = true}};
  return all;
}

/// Calibrated layers in mode integer, the middle one without bias and with one scale for its
/// weight.
inline std::vector<nn::Linear> group_layers(const Scheme& input, torch::Dtype dtype,
                                            torch::Device device = torch::kCPU,
                                            std::vector<int64_t> sizes = {32, 8, 24}) {
  std::vector<nn::Linear> layers;
  for (size_t i = 0; i < sizes.size(); ++i) {
    nn::Linear layer(torch::nn::LinearOptions(kGroupIn, sizes[i]).bias(i != 1));
    layer->to(dtype);
    layer->input_quantizer->set_settings({input, {}});
    if (i == 1) layer->weight_quantizer->set_settings({symmetric_scheme(8), {}});
    layer->weight_quantizer->calibrate(layer->weight);
    if (!input.dynamic) layer->input_quantizer->set_ranges({{-1.5f, 2.0f}}, torch::kCPU);
    layer->to(device);
    layer->set_mode(Mode::integer);
    layers.push_back(layer);
  }
  return layers;
}

/// What reads a group: the name, and the outputs for random input of a dtype.
struct GroupUse {
  std::string name;
  std::function<std::vector<torch::Tensor>(const LinearGroup&)> run;
};

/// Every way, on one random input on the device.
inline std::vector<GroupUse> group_uses(torch::Dtype dtype, torch::Device device = torch::kCPU) {
  const auto on_device = [&](const torch::Tensor& x) { return x.to(device, dtype); };
  const torch::Tensor x = on_device(torch::randn({3, 7, kGroupIn})),
                      other = on_device(torch::randn({3, 7, kGroupIn}));
  const torch::Tensor pair = on_device(torch::randn({3, 7, 2 * kGroupIn}));
  const Norm rms{on_device(torch::rand({kGroupIn}) + 0.5), {}, 1e-6, false};
  const Norm layer_norm{on_device(torch::rand({kGroupIn}) + 0.5),
                        on_device(torch::randn({kGroupIn}) * 0.1), 1e-5, true};
  const auto all_of = [](const LinearGroup::OfStream& result) {
    std::vector<torch::Tensor> all = result.outputs;
    all.push_back(result.stream);
    return all;
  };
  return {
      {"plain", [=](const LinearGroup& group) { return group.forward(x); }},
      {"rms", [=](const LinearGroup& group) { return all_of(group.of_norm(rms, x)); }},
      {"rms, added",
       [=](const LinearGroup& group) { return all_of(group.of_norm(rms, x, other)); }},
      {"layer norm, added",
       [=](const LinearGroup& group) { return all_of(group.of_norm(layer_norm, x, other)); }},
      {"gelu",
       [=](const LinearGroup& group) { return group.of_activation(x, Activation::gelu_tanh); }},
      {"gated",
       [=](const LinearGroup& group) { return group.of_gated(x, other, Activation::silu); }},
      {"gated slices",
       [=](const LinearGroup& group) {
         return group.of_gated(pair.narrow(-1, 0, kGroupIn), pair.narrow(-1, kGroupIn, kGroupIn),
                               Activation::silu);
       }},
  };
}

}  // namespace vernier::testing
