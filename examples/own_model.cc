// A model of one's own, quantized in a C++ program: write vernier::nn::Linear where
// torch::nn::Linear stood, show it data, and run it on integers. Prints what changed and proves it;
// exits with 1 if the proof fails.

#include <torch/torch.h>
#include <vernier/export/validate.h>
#include <vernier/qat/linear.h>

#include <iostream>

namespace {

struct Mlp : torch::nn::Module {
  vernier::nn::Linear hidden{nullptr}, output{nullptr};

  Mlp() {
    hidden = register_module("hidden", vernier::nn::Linear(64, 256));
    output = register_module("output", vernier::nn::Linear(256, 10));
  }
  torch::Tensor forward(const torch::Tensor& x) { return output(torch::relu(hidden(x))); }
};

}  // namespace

int main() {
  torch::manual_seed(0);
  const torch::NoGradGuard no_grad;
  Mlp model;
  const torch::Tensor data = torch::randn({512, 64});
  const torch::Tensor expected = model.forward(data);

  // Calibration: run data in mode observe, then choose every scale.
  vernier::set_mode(model, vernier::Mode::observe);
  model.forward(data);
  for (const auto& [name, layer] : vernier::quantized_layers(model)) {
    layer->input_quantizer->calibrate(layer->input_quantizer->observer().statistics());
    layer->weight_quantizer->calibrate(layer->float_weight());
  }

  // The same model, now on int8 codes through the integer kernels.
  vernier::set_mode(model, vernier::Mode::integer);
  const torch::Tensor result = model.forward(data);
  const double error = ((result - expected).norm() / expected.norm()).item<double>();
  std::cout << "relative error of the int8 model: " << error << '\n';

  // And the proof that those kernels compute what fake-quantization (training) computes.
  vernier::Validator validator(model);
  validator.add([&] { return model.forward(data); });
  const vernier::ValidationReport& report = validator.report();
  using V = vernier::LayerValidation;
  std::cout << report.total(&V::codes) << " codes and " << report.total(&V::accumulators)
            << " accumulators compared, " << report.total(&V::code_mismatches) << " and "
            << report.total(&V::accumulator_mismatches) << " differ\n";
  return report.passed(0.05) && error < 0.05 ? 0 : 1;
}
