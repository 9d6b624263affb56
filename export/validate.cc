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

// A quantizer's scales as they broadcast over its tensor: one for all, one a row, or one an index
// of the axis.
Tensor broadcast_over(const Tensor& values, const Tensor& scale, const QuantizerImpl& quantizer) {
  std::vector<int64_t> shape(values.dim(), 1);
  if (quantizer.scheme().granularity == Granularity::per_channel) {
    shape[quantizer.axis()] = -1;
  } else if (quantizer.scheme().granularity == Granularity::per_token) {
    shape = values.sizes().vec();
    shape.back() = 1;
  }
  return scale.detach().reshape(shape);
}

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
  if (!layer.weight_quantizer) return;
  QuantizerImpl& quantizer = *layer.weight_quantizer;
  const Tensor weight = layer.float_weight().detach().to(torch::kFloat);
  const Tensor fake = quantizer.forward(weight);
  const Tensor implied =
      centred_codes(fake, broadcast_over(weight, quantizer.scale(), quantizer), quantizer.scheme());
  result.weight_codes = implied.numel();
  result.weight_code_mismatches =
      differing(implied, layer.weight_codes().to(implied.scalar_type()));
}

void Validator::compare_layer(QuantizedLayer& layer, const std::vector<Tensor>& inputs,
                              const Tensor& output, LayerValidation& result,
                              const std::vector<Tensor>& other_run, size_t& seen) {
  std::vector<Tensor> codes, exact_operands, magnitudes;
  for (size_t input = 0; input < inputs.size(); ++input) {
    const Tensor& x = inputs[input];
    QuantizerImpl* quantizer = layer.quantizer_of_input(input);
    if (!quantizer) {  // an index, or a mask
      codes.push_back(x);
      exact_operands.push_back(x);
      magnitudes.push_back(x);
      continue;
    }
    const QuantizerImpl::Codes integer = layer.input_codes(input, x);
    const Scheme& scheme = quantizer->scheme();
    const Tensor fake = quantizer->forward(x.to(torch::kFloat));
    const Tensor implied =
        centred_codes(fake, broadcast_over(x, integer.scale, *quantizer), scheme);
    Tensor centred = integer.codes.to(implied.scalar_type());
    if (const auto zero_point = quantizer->zero_point()) centred -= zero_point->to(torch::kDouble);
    result.codes += implied.numel();
    result.code_mismatches += differing(implied, centred);
    codes.push_back(integer.codes);
    exact_operands.push_back(implied.to(torch::kDouble));
    magnitudes.push_back(fake.abs());

    VERNIER_CHECK(seen < other_run.size(), "layer '", result.name,
                  "' ran more often in fake_quant than in integer mode");
    result.moved_codes += differing(integer.codes.flatten(), other_run[seen++].flatten());
  }

  const bool has_weight = static_cast<bool>(layer.weight_quantizer);
  if (layer.has_accumulators()) {
    const Tensor exact = layer.compute(
        exact_operands, has_weight ? layer.weight_codes().to(torch::kDouble) : Tensor(), Tensor());
    result.accumulators += exact.numel();
    result.accumulator_mismatches += differing(exact, layer.accumulators(codes).to(torch::kDouble));
  }

  Tensor integer_y = layer.integer_forward(inputs);
  if (layer.output_quantizer && layer.emits_codes())
    integer_y = layer.output_quantizer->dequantize(integer_y, torch::kFloat);
  integer_y = integer_y.to(torch::kDouble);
  const Tensor fake_y = output.to(torch::kDouble);
  // Equal infinities, which half precision outputs can overflow to, do not differ.
  const Tensor difference = (integer_y - fake_y).abs().masked_fill(integer_y.eq(fake_y), 0.0);
  // sum |x||w| + |bias| in float32: a rounding of the bound itself, which the 8 spare roundings
  // cover.
  Tensor weight_magnitude, bias_magnitude;
  if (has_weight)
    weight_magnitude =
        layer.weight_quantizer->dequantize(layer.weight_codes(), torch::kFloat).abs();
  if (const Tensor& bias = layer.float_bias(); bias.defined())
    bias_magnitude = bias.detach().abs().to(torch::kFloat);
  const Tensor magnitude = layer.compute(magnitudes, weight_magnitude, bias_magnitude);
  const auto roundings = static_cast<double>(layer.accumulation_length(inputs) + 8);
  double unit = std::ldexp(1.0, -24);
  // Half precision outputs add their own rounding, one on each side.
  if (output.scalar_type() != torch::kFloat)
    unit += (output.scalar_type() == torch::kHalf ? std::ldexp(1.0, -10) : std::ldexp(1.0, -7)) /
            roundings;
  // FP8 tensor cores round their sums more coarsely than float32.
  if (layer.is_fp8() && output.is_cuda()) unit += kFp8TensorCoreError / roundings;
  Tensor bound = magnitude.to(torch::kDouble) * (roundings * unit);
  // Codes of such outputs are the same or, where the difference leads over an edge, neighbours.
  if (layer.output_quantizer)
    bound = bound +
            layer.output_quantizer->scale().detach().to(torch::kDouble) * (1 + std::ldexp(1.0, -7));
  result.outputs += difference.numel();
  result.outside_bound += difference.le(bound).logical_not().sum().item<int64_t>();  // or NaN
  if (difference.numel() > 0) {
    result.max_difference = larger(result.max_difference, difference.max().item<double>());
    const Tensor share = difference / bound.clamp_min(1e-300);
    result.worst_of_bound = larger(result.worst_of_bound, share.max().item<double>());
  }
}

void Validator::add(const std::function<Tensor()>& run) {
  const torch::NoGradGuard no_grad;
  const ProbeGuard probes(layers_);

  // The integer run, each layer on what the layers before it made of the batch.
  std::vector<std::vector<Tensor>> integer_codes(layers_.size());
  for (size_t i = 0; i < layers_.size(); ++i) {
    QuantizedLayer* layer = layers_[i].layer.get();
    layer->set_probe(
        [layer, &codes = integer_codes[i]](const std::vector<Tensor>& inputs, const Tensor&) {
          for (size_t input = 0; input < inputs.size(); ++input)
            if (layer->quantizer_of_input(input))
              codes.push_back(layer->input_codes(input, inputs[input]).codes);
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
    const auto probe = [&, i](const std::vector<Tensor>& inputs, const Tensor& output) {
      compare_layer(*layers_[i].layer, inputs, output, report_.layers[i], integer_codes[i],
                    calls[i]);
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
