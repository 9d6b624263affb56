#include <vernier/export/validate.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/fp8.h>

#include <cmath>

namespace vernier {
namespace {

using torch::Tensor;

// FP8 codes as their bytes: there zeros differ by sign, and NaN equals itself.
Tensor comparable(const Tensor& codes) {
  return codes.element_size() == 1 ? codes.contiguous().view(torch::kByte) : codes;
}

int64_t differing(const Tensor& a, const Tensor& b) {
  return comparable(a).ne(comparable(b)).sum().item<int64_t>();
}

// The codes, zero point taken off, that a fake-quantized tensor stands for: its values are exact
// multiples of the scale but for one rounding, so the nearest multiple, or value of the FP8 format,
// is the code. Integers are float64, as they are summed; FP8 codes have their dtype.
Tensor centred_codes(const Tensor& fake_quantized, const Tensor& scale, const Scheme& scheme) {
  const Tensor multiples = fake_quantized.to(torch::kDouble).div(scale.to(torch::kDouble));
  return scheme.is_fp8() ? multiples.to(torch::kFloat).to(fp8_dtype(scheme.format))
                         : multiples.round();
}

// The larger of two, or NaN where one is: a maximum must not hide what is no number.
double larger(double a, double b) { return std::isnan(a) || a > b ? a : b; }

// A scale per row or one for all, as a column that broadcasts over [rows, channels].
Tensor as_column(const Tensor& scale) { return scale.reshape({-1, 1}); }

// Takes the probes off again, also when a run throws.
class ProbeGuard {
 public:
  explicit ProbeGuard(const std::vector<NamedLayer>& layers) : layers_(layers) {}
  ~ProbeGuard() {
    for (const auto& item : layers_) item.layer->set_probe(nullptr);
  }
  ProbeGuard(const ProbeGuard&) = delete;
  ProbeGuard& operator=(const ProbeGuard&) = delete;

 private:
  const std::vector<NamedLayer>& layers_;
};

}  // namespace

int64_t ValidationReport::total(int64_t LayerValidation::*member) const {
  int64_t sum = 0;
  for (const LayerValidation& layer : layers) sum += layer.*member;
  return sum;
}

double ValidationReport::worst_of_bound() const {
  double worst = 0;
  for (const LayerValidation& layer : layers) worst = larger(worst, layer.worst_of_bound);
  return worst;
}

double ValidationReport::relative_output_error() const {
  return output_signal > 0 ? std::sqrt(output_noise / output_signal) : std::sqrt(output_noise);
}

bool ValidationReport::passed(double output_tolerance) const {
  return runs > 0 && total(&LayerValidation::code_mismatches) == 0 &&
         total(&LayerValidation::weight_code_mismatches) == 0 &&
         total(&LayerValidation::accumulator_mismatches) == 0 &&
         total(&LayerValidation::outside_bound) == 0 &&
         relative_output_error() <= output_tolerance;  // false for NaN
}

Validator::Validator(torch::nn::Module& model) : model_(model) {
  const ModeGuard integer(model,
                          Mode::integer);  // checks the calibration and makes the weight codes
  for (const NamedLayer& item : quantized_layers(model)) {
    if (!item.layer->quantized()) continue;
    layers_.push_back(item);
    LayerValidation result;
    result.name = item.name;
    compare_weight(*item.layer, result);
    report_.layers.push_back(std::move(result));
  }
  VERNIER_CHECK(!layers_.empty(), "the model has no quantized layer: nothing can be validated");
}

void Validator::compare_weight(QuantizedLayer& layer, LayerValidation& result) {
  const torch::NoGradGuard no_grad;
  const Tensor fake =
      layer.weight_quantizer->forward(layer.float_weight().detach().to(torch::kFloat));
  const Tensor implied = centred_codes(fake, as_column(layer.weight_quantizer->scale()),
                                       layer.weight_quantizer->scheme());
  result.weight_codes = implied.numel();
  result.weight_code_mismatches =
      differing(implied, layer.weight_codes().to(implied.scalar_type()));
}

void Validator::add(const std::function<Tensor()>& run) {
  const torch::NoGradGuard no_grad;
  const ProbeGuard probes(layers_);

  // The integer run, each layer on what the layers before it made of the batch.
  std::vector<std::vector<Tensor>> integer_codes(layers_.size());
  for (size_t i = 0; i < layers_.size(); ++i) {
    QuantizedLayer* layer = layers_[i].layer.get();
    layer->set_probe([layer, &codes = integer_codes[i]](const Tensor& input, const Tensor&) {
      codes.push_back(layer->input_quantizer->codes(input).codes);
    });
  }
  Tensor integer_output;
  {
    const ModeGuard mode(model_, Mode::integer);
    integer_output = run();
  }

  // The fake-quant run, whose inputs both sides of every layer are given.
  std::vector<size_t> calls(layers_.size());
  for (size_t i = 0; i < layers_.size(); ++i) {
    const auto probe = [&, i](const Tensor& input, const Tensor& output) {
      QuantizedLayer& layer = *layers_[i].layer;
      LayerValidation& result = report_.layers[i];
      const int64_t k = input.size(-1);
      const Tensor x = input.reshape({-1, k});

      const QuantizerImpl::Codes integer = layer.input_quantizer->codes(x);
      const Tensor scale = as_column(integer.scale);
      const Tensor implied = centred_codes(layer.input_quantizer->forward(x.to(torch::kFloat)),
                                           scale, layer.input_quantizer->scheme());
      const Tensor fake = implied.to(torch::kDouble);
      Tensor centred = integer.codes.to(implied.scalar_type());
      if (const auto zero_point = layer.input_quantizer->zero_point())
        centred -= zero_point->to(torch::kDouble);
      result.codes += fake.numel();
      result.code_mismatches += differing(implied, centred);

      const Tensor weight = layer.weight_codes().to(torch::kDouble);
      if (!layer.is_fp8()) {
        const Tensor exact = fake.mm(weight.t());
        result.accumulators += exact.numel();
        result.accumulator_mismatches +=
            differing(exact, layer.accumulators(integer.codes).to(torch::kDouble));
      }

      const Tensor integer_y = layer.integer_forward(x).to(torch::kDouble);
      const Tensor fake_y = output.reshape({x.size(0), -1}).to(torch::kDouble);
      // Equal infinities, which half precision outputs can overflow to, do not differ.
      const Tensor difference = (integer_y - fake_y).abs().masked_fill(integer_y.eq(fake_y), 0.0);
      // sum |x||w| in float32: a rounding of the bound itself, which the 8 spare roundings cover.
      const Tensor magnitude = fake.abs().to(torch::kFloat).mm(weight.abs().to(torch::kFloat).t());
      Tensor bound = magnitude * scale * layer.weight_quantizer->scale();
      if (const Tensor& bias = layer.float_bias(); bias.defined()) bound = bound + bias.abs();
      double unit = std::ldexp(1.0, -24);
      // Half precision outputs add their own rounding, one on each side.
      if (output.scalar_type() != torch::kFloat)
        unit +=
            (output.scalar_type() == torch::kHalf ? std::ldexp(1.0, -10) : std::ldexp(1.0, -7)) /
            static_cast<double>(k + 8);
      // FP8 tensor cores round their sums more coarsely than float32.
      if (layer.is_fp8() && x.is_cuda()) unit += kFp8TensorCoreError / static_cast<double>(k + 8);
      bound = bound.to(torch::kDouble) * (static_cast<double>(k + 8) * unit);
      result.outputs += difference.numel();
      result.outside_bound += difference.le(bound).logical_not().sum().item<int64_t>();  // or NaN
      if (difference.numel() > 0) {
        result.max_difference = larger(result.max_difference, difference.max().item<double>());
        const Tensor share = difference / bound.clamp_min(1e-300);
        result.worst_of_bound = larger(result.worst_of_bound, share.max().item<double>());
      }

      VERNIER_CHECK(calls[i] < integer_codes[i].size(), "layer '", layers_[i].name,
                    "' ran more often in fake_quant than in integer mode");
      result.moved_codes +=
          differing(integer.codes.flatten(), integer_codes[i][calls[i]++].flatten());
    };
    layers_[i].layer->set_probe(probe);
  }
  Tensor fake_output;
  {
    const ModeGuard mode(model_, Mode::fake_quant);
    fake_output = run();
  }

  const Tensor expected = fake_output.to(torch::kDouble);
  const Tensor difference = integer_output.to(torch::kDouble) - expected;
  ++report_.runs;
  report_.output_signal += expected.square().sum().item<double>();
  report_.output_noise += difference.square().sum().item<double>();
  if (expected.numel() > 0) {
    report_.max_output_difference =
        larger(report_.max_output_difference, difference.abs().max().item<double>());
    report_.max_output = larger(report_.max_output, expected.abs().max().item<double>());
  }
}

}  // namespace vernier
