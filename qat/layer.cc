#include <vernier/kernels/error.h>
#include <vernier/kernels/fp8.h>
#include <vernier/kernels/int8_gemm.h>
#include <vernier/kernels/quantize.h>
#include <vernier/qat/layer.h>

#include <algorithm>

namespace vernier {

using torch::Tensor;

namespace {

// Calls f, and names the layer in what it throws.
template <typename F>
auto naming(const std::string& layer, const F& f) {
  try {
    return f();
  } catch (const Error& error) {
    if (layer.empty()) throw;
    throw Error(concat("layer '", layer, "': ", error.what()));
  }
}

bool is_codes(const Tensor& tensor) {
  return tensor.scalar_type() == torch::kChar || tensor.scalar_type() == torch::kFloat8_e4m3fn ||
         tensor.scalar_type() == torch::kFloat8_e5m2;
}

}  // namespace

std::string to_string(Mode mode) {
  switch (mode) {
    case Mode::full:
      return "float";
    case Mode::observe:
      return "observe";
    case Mode::fake_quant:
      return "fake_quant";
    case Mode::integer:
      return "integer";
  }
  return "unknown";
}

Mode mode_from_string(const std::string& name) {
  if (name == "full") return Mode::full;
  for (const Mode mode : {Mode::full, Mode::observe, Mode::fake_quant, Mode::integer})
    if (name == to_string(mode)) return mode;
  throw Error(concat("unknown mode '", name, "': use float, fake_quant or integer"));
}

std::vector<NamedQuantizer> QuantizedLayer::quantizers() const {
  std::vector<NamedQuantizer> all;
  if (input_quantizer && !chained(0)) all.push_back({"input", input_quantizer.ptr()});
  if (weight_quantizer) all.push_back({"weight", weight_quantizer.ptr()});
  if (output_quantizer) all.push_back({"output", output_quantizer.ptr()});
  return all;
}

QuantizerImpl* QuantizedLayer::quantizer_of_input(size_t index) const {
  return index == 0 && input_quantizer ? input_quantizer.ptr().get() : nullptr;
}

void QuantizedLayer::set_quantized(bool quantized) {
  quantized_ = quantized;
  if (!quantized) mode_ = Mode::full;
}

void QuantizedLayer::set_mode(Mode mode) {
  if (!quantized_) return;
  if (mode == Mode::fake_quant || mode == Mode::integer) {
    for (const auto& [what, quantizer] : quantizers())
      VERNIER_CHECK(quantizer->calibrated(), "the ", what,
                    " has no scale: calibrate the model first, or skip the layer");
  }
  if (mode == Mode::integer && mode_ != Mode::integer) {
    for (const auto& item : quantizers()) item.quantizer->check_learned();
    prepare_integer();
  }
  mode_ = mode;
}

bool QuantizedLayer::is_fp8() const {
  for (const Quantizer* quantizer : {&weight_quantizer, &input_quantizer})
    if (*quantizer) return (*quantizer)->scheme().is_fp8();
  return false;
}

Tensor QuantizedLayer::accumulators(at::TensorList) const {
  throw Error("the layer has no integer accumulators");
}

int64_t QuantizedLayer::accumulation_length(at::TensorList) const {
  if (!weight_codes_.defined() && !weight_quantizer) return 0;
  const Tensor weight = float_weight();
  const int64_t channels = weight.size(weight_quantizer->axis());
  return channels ? weight.numel() / channels : 0;
}

void QuantizedLayer::prepare_integer() {
  if (!weight_quantizer) return;
  const Scheme& weights = weight_quantizer->scheme();
  const bool fits = weights.symmetric && (weights.granularity == Granularity::per_tensor ||
                                          weights.granularity == Granularity::per_channel);
  VERNIER_CHECK(fits, "the integer kernels take symmetric weights per_tensor or per_channel, not ",
                to_string(weights));
  if (input_quantizer) {
    const Scheme& inputs = input_quantizer->scheme();
    VERNIER_CHECK(inputs.is_fp8() == weights.is_fp8(), "the weights are ",
                  to_string(weights.format), " and the inputs ", to_string(inputs.format),
                  ": the kernels take integers or FP8 for both");
    if (!is_fp8()) {
      const int64_t k = accumulation_length();
      const int64_t limit = max_int8_gemm_k(inputs, weights);
      VERNIER_CHECK(k <= limit, "its ", k,
                    " inputs could overflow the int32 accumulators (at most ", limit,
                    "): skip the layer or split it");
    }
  }
  const torch::NoGradGuard no_grad;
  set_weight_codes(weight_quantizer->codes(float_weight().detach().to(torch::kFloat)).codes);
}

void QuantizedLayer::set_weight_codes(const Tensor& codes) {
  weight_codes_ = codes.contiguous();
  weight_sum_ = Tensor();
  if (!is_fp8() && input_quantizer) {
    const int64_t axis = weight_quantizer->axis(), channels = codes.size(axis);
    weight_sum_ = weight_codes_.movedim(axis, 0)
                      .reshape({channels, channels ? codes.numel() / channels : 0})
                      .sum(1, /*keepdim=*/false, torch::kInt);
  }
  weight_codes_changed();
}

void QuantizedLayer::end_copy(const std::optional<torch::Device>& device) {
  probe_ = nullptr;
  stand_in_ = nullptr;
  if (!weight_codes_.defined()) return;
  set_weight_codes(weight_codes_.to(device.value_or(weight_codes_.device()), torch::kChar,
                                    /*non_blocking=*/false, /*copy=*/true));
}

void QuantizedLayer::load_weight_codes(const Tensor& codes) {
  Tensor weight = float_weight();
  const Scheme& scheme = weight_quantizer->scheme();
  const torch::Dtype dtype = scheme.is_fp8() ? fp8_dtype(scheme.format) : torch::kChar;
  VERNIER_CHECK(codes.scalar_type() == dtype && codes.sizes() == weight.sizes(),
                "weight codes must be ", scheme.is_fp8() ? to_string(scheme.format) : "int8",
                " of shape ", weight.sizes(), ", not ", c10::toString(codes.scalar_type()), " ",
                codes.sizes());
  // False for the NaN and the infinities of FP8.
  const Tensor values = scheme.is_fp8() ? codes.to(torch::kFloat) : codes;
  VERNIER_CHECK(values.ge(scheme.qmin()).logical_and(values.le(scheme.qmax())).all().item<bool>(),
                "weight codes leave [", scheme.qmin(), ", ", scheme.qmax(), "]");
  const torch::NoGradGuard no_grad;
  weight.set_data(weight_quantizer->dequantize(codes, weight.scalar_type()));
  set_weight_codes(codes);
}

void QuantizedLayer::quantize_output(const QuantizerSettings& settings) {
  VERNIER_CHECK(!settings.scheme.dynamic && settings.scheme.granularity == Granularity::per_tensor,
                "an output is quantized with one static scale, not ", to_string(settings.scheme));
  if (output_quantizer) {
    output_quantizer->set_settings(settings);
    return;
  }
  auto* module = dynamic_cast<torch::nn::Module*>(this);
  output_quantizer = module->register_module("output_quantizer", Quantizer(settings));
  output_quantizer->train(module->is_training());
  for (const Quantizer* other : {&input_quantizer, &weight_quantizer})
    if (*other) output_quantizer->to((*other)->scale().device());
}

void QuantizedLayer::set_pre_scale(const Tensor& factors) {
  VERNIER_CHECK(factors.numel() == 0, "layer '", layer_name_,
                "' takes no factors on its input: only Linear does");
}

QuantizerImpl::Codes QuantizedLayer::input_codes(size_t index, const Tensor& input) const {
  const QuantizerImpl& quantizer = *quantizer_of_input(index);
  if (!is_codes(input)) return quantizer.codes(input);
  VERNIER_CHECK(chained(index),
                "the input arrives as codes, but no chain says of which scale: chain the layer to "
                "the one that makes them");
  const Scheme& scheme = quantizer.scheme();
  const torch::Dtype wanted = scheme.is_fp8() ? fp8_dtype(scheme.format) : torch::kChar;
  VERNIER_CHECK(input.scalar_type() == wanted && quantizer.calibrated(), "the input's codes are ",
                c10::toString(input.scalar_type()), ", not those of the chain (", to_string(scheme),
                "): set the mode of the whole model again");
  return {input, quantizer.scale()};
}

Tensor QuantizedLayer::run(at::TensorList inputs) {
  const Tensor output =
      naming(layer_name_, [&] { return stand_in_ ? stand_in_(inputs) : run_in_mode(inputs); });
  if (probe_) probe_(inputs.vec(), output);
  return output;
}

Tensor QuantizedLayer::run_in_mode(at::TensorList inputs) {
  if (mode_ == Mode::fake_quant) {
    const Quantizer& any = weight_quantizer ? weight_quantizer : input_quantizer;
    VERNIER_CHECK(!any || any->scale().device() == inputs[0].device(), "the input is on ",
                  inputs[0].device(), " and the layer on ", any->scale().device(),
                  ": move one of them with to()");
    check_inputs(inputs);
    return fake_quant_forward(inputs);
  }
  if (mode_ == Mode::integer) return integer_forward(inputs);
  const bool observes = mode_ == Mode::observe;
  if (observes) {
    for (size_t i = 0; i < inputs.size(); ++i)
      if (QuantizerImpl* quantizer = quantizer_of_input(i); quantizer && !chained(i))
        quantizer->observe(inputs[i], input_channels().has_value());
  }
  c10::SmallVector<Tensor, 2> operands(inputs.begin(), inputs.end());
  if (input_quantizer && !chained(0))
    operands[0] = input_quantizer->pre_scaled(inputs[0]).to(inputs[0].scalar_type());
  const Tensor output = full_forward(operands);
  if (observes && output_quantizer) output_quantizer->observe(output, input_channels().has_value());
  return output;
}

Tensor QuantizedLayer::integer_forward(at::TensorList inputs) const {
  check_inputs(inputs);
  if (weight_quantizer) check_weight_codes(inputs[0]);
  const torch::NoGradGuard no_grad;
  return integer_compute(inputs);
}

Tensor QuantizedLayer::full_forward(at::TensorList inputs) {
  return compute(inputs, float_weight(), float_bias());
}

c10::SmallVector<Tensor, 2> QuantizedLayer::fake_quantized(at::TensorList inputs) {
  c10::SmallVector<Tensor, 2> quantized;
  for (size_t i = 0; i < inputs.size(); ++i) {
    QuantizerImpl* quantizer = quantizer_of_input(i);
    if (!quantizer || chained(i)) {
      quantized.push_back(inputs[i]);
    } else if (quantizer->scheme().granularity == Granularity::per_tensor &&
               inputs[i].suggest_memory_format() != torch::MemoryFormat::Contiguous) {
      // Channels stay last: the kernels leave tensors contiguous in the order of their axes.
      quantized.push_back(quantizer->forward(inputs[i].movedim(1, -1)).movedim(-1, 1));
    } else {
      quantized.push_back(quantizer->forward(inputs[i]));
    }
  }
  return quantized;
}

Tensor QuantizedLayer::fake_quant_forward(at::TensorList inputs) {
  const auto quantized = fake_quantized(inputs);
  const Tensor weight = float_weight();
  const Tensor output = compute(
      quantized, weight_quantizer ? weight_quantizer->forward(weight) : weight, float_bias());
  return output_quantizer ? output_quantizer->forward(output) : output;
}

Tensor QuantizedLayer::finish_codes(const Tensor& codes, torch::Dtype dtype) const {
  return emits_codes_ ? codes : output_quantizer->dequantize(codes, dtype);
}

Tensor QuantizedLayer::finish(const Tensor& output) const {
  if (!output_quantizer) return output;
  return finish_codes(output_quantizer->codes(output).codes, output.scalar_type());
}

torch::Dtype QuantizedLayer::output_dtype(const Tensor& input) const {
  if (!is_codes(input)) return input.scalar_type();
  const Tensor weight = float_weight();
  return weight.defined() ? weight.scalar_type() : torch::kFloat;
}

void QuantizedLayer::check_weight_codes(const Tensor& input) const {
  VERNIER_CHECK(weight_codes_.defined() && weight_codes_.device() == input.device(),
                "the input is on ", input.device(),
                " but the layer has no weight codes there: set the mode again after moving it");
}

std::vector<NamedLayer> quantized_layers(const torch::nn::Module& model) {
  std::vector<NamedLayer> layers;
  for (const auto& item : model.named_modules(std::string(), /*include_self=*/false))
    if (auto layer = std::dynamic_pointer_cast<QuantizedLayer>(item.value()))
      layers.push_back({item.key(), std::move(layer)});
  return layers;
}

namespace {

std::shared_ptr<QuantizedLayer> layer_named(const torch::nn::Module& model,
                                            const std::string& name) {
  const auto layers = quantized_layers(model);
  for (const NamedLayer& item : layers)
    if (item.name == name) return item.layer;
  throw Error(concat("the model has no quantized layer '", name, "'; layers are named like '",
                     layers.empty() ? "" : layers.front().name, "'"));
}

// Gives the far end of every chain the scale of its codes.
void join_chains(const torch::nn::Module& model, const std::vector<NamedLayer>& layers) {
  for (const auto& [name, layer] : layers) {
    if (layer->input_from().empty() || !layer->quantized()) continue;
    const auto producer = layer_named(model, layer->input_from());
    VERNIER_CHECK(producer->quantized() && producer->output_quantizer &&
                      producer->output_quantizer->calibrated(),
                  "layer '", producer->layer_name(), "': the output has no scale but '", name,
                  "' is chained to it: calibrate the model after chaining its layers, and skip "
                  "both or none");
    QuantizerImpl& input = *layer->input_quantizer;
    const QuantizerImpl& output = *producer->output_quantizer;
    output.check_learned();
    const torch::Device device = input.scale().device();
    std::optional<Tensor> zero_point = output.zero_point();
    if (zero_point) zero_point = zero_point->to(device);
    input.set_settings({output.scheme(), output.settings().calibrator});
    input.set_scale(output.scale().detach().to(device), zero_point);
  }
}

}  // namespace

void set_mode(const torch::nn::Module& model, Mode mode) {
  const auto layers = quantized_layers(model);
  for (const auto& [name, layer] : layers) layer->set_layer_name(name);
  if (mode == Mode::integer) join_chains(model, layers);
  for (const auto& [name, layer] : layers)
    naming(name, [&, &layer = layer] { layer->set_mode(mode); });
}

std::string site_name(const std::string& layer, const std::string& quantizer) {
  return quantizer == "input" ? layer : layer + "." + quantizer;
}

void calibrate_from_observers(const torch::nn::Module& model) {
  for (const auto& [name, layer] : quantized_layers(model)) {
    if (!layer->quantized()) continue;
    naming(name, [&, &layer = layer] {
      for (const auto& [what, quantizer] : layer->quantizers()) {
        if (quantizer->scheme().dynamic) continue;
        if (quantizer->operand() == Operand::weight) {
          quantizer->calibrate(layer->float_weight());
          continue;
        }
        const SiteStatistics seen = quantizer->observer().statistics();
        const Histogram& histogram = seen.histogram;
        VERNIER_CHECK(histogram.total() > 0, "the ", what,
                      " was never reached by the calibration batches: calibrate with data that "
                      "uses the layer, or skip it");
        VERNIER_CHECK(histogram.nans() + histogram.infinities() == 0, "the ", what, " was given ",
                      histogram.nans(), " NaN and ", histogram.infinities(),
                      " infinite values out of ", histogram.total(),
                      ": check the data, and the model's weights for overflow");
        quantizer->calibrate(seen);
      }
    });
  }
}

void chain(const torch::nn::Module& model, const std::string& producer,
           const std::string& consumer) {
  const auto from = layer_named(model, producer), to = layer_named(model, consumer);
  naming(consumer, [&] {
    VERNIER_CHECK(from != to && to->input_quantizer && to->quantized() && from->quantized(),
                  "a chain is of two different quantized layers of which the second has an input "
                  "to quantize, not from '",
                  producer, "'");
    VERNIER_CHECK(to->input_quantizer->pre_scale().numel() == 0,
                  "its input has factors of its own, which codes cannot take: chain before "
                  "smoothing, or not at all");
    const QuantizerSettings settings = to->input_quantizer->settings();
    if (!from->emits_codes()) {
      from->quantize_output(settings);
      if (to->input_quantizer->scale().numel() > 0)
        from->output_quantizer->set_scale(to->input_quantizer->scale(),
                                          to->input_quantizer->zero_point());
    } else {
      VERNIER_CHECK(from->output_quantizer->scheme() == settings.scheme, "its input is ",
                    to_string(settings.scheme), " but '", producer, "' already emits codes ",
                    to_string(from->output_quantizer->scheme()),
                    ": give all layers that read it the same scheme");
    }
    from->set_emits_codes(true);
    to->set_input_from(producer);
  });
}

ModeGuard::ModeGuard(const torch::nn::Module& model, Mode mode) {
  for (const auto& item : quantized_layers(model))
    before_.emplace_back(item.layer, item.layer->mode());
  try {
    set_mode(model, mode);
  } catch (...) {
    restore();  // some layers may have changed before one could not
    throw;
  }
}

ModeGuard::~ModeGuard() { restore(); }

void ModeGuard::restore() {
  // The modes were set before, so their conditions hold; what may still throw must not leave a
  // destructor.
  for (auto& [layer, mode] : before_) {
    try {
      layer->set_mode(mode);
    } catch (const std::exception&) {
      continue;
    }
  }
}

}  // namespace vernier
