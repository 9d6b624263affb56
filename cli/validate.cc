#include <vernier/cli/commands.h>
#include <vernier/cli/console.h>
#include <vernier/kernels/error.h>

namespace vernier::cli {
namespace {

struct Options {
  CommonOptions common;
  DataOptions data;
  std::string model, reference;
  std::optional<int64_t> samples, batch_size;
  double tolerance = 0.05;
};

nlohmann::ordered_json layers_json(const ValidationReport& report) {
  auto layers = nlohmann::ordered_json::array();
  for (const LayerValidation& layer : report.layers) {
    nlohmann::ordered_json item;
    item["name"] = layer.name;
    item["codes"] = layer.codes;
    item["code_mismatches"] = layer.code_mismatches;
    item["weight_code_mismatches"] = layer.weight_code_mismatches;
    item["accumulators"] = layer.accumulators;
    item["accumulator_mismatches"] = layer.accumulator_mismatches;
    item["outside_bound"] = layer.outside_bound;
    item["worst_of_bound"] = layer.worst_of_bound;
    item["max_difference"] = layer.max_difference;
    item["moved_codes"] = layer.moved_codes;
    layers.push_back(std::move(item));
  }
  return layers;
}

int run(const Options& options) {
  const torch::Device device = options.common.chosen_device();
  const auto quantized = load_quantized(options.model, device);
  std::shared_ptr<TextModel> reference;
  if (!options.reference.empty()) reference = load_reference(options.reference, *quantized, device);
  TokenDataset data = options.data.open(reference.get(), "validation");
  if (options.samples) data = data.share(0, options.samples);
  const Comparison comparison = compare_on(reference.get(), *quantized, data,
                                           batch_size_for(*quantized, data, options.batch_size));
  if (options.common.json) {
    nlohmann::ordered_json json;
    json["command"] = "validate";
    json["model"] = options.model;
    json["device"] = device.str();
    json.update(comparison_json(comparison, options.tolerance));
    json["layer_results"] = layers_json(comparison.validation);
    print_json(json);
  } else {
    print_comparison(comparison, options.tolerance);
  }
  return comparison.passed(options.tolerance) ? kDone : kBoundNotMet;
}

}  // namespace

void add_validate(CLI::App& app, Action& action) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand(
      "validate",
      "hold a quantized model's integer kernels against its fake-quantization, layer by layer");
  command->add_option("--model", options->model, "quantized checkpoint")->required();
  command->add_option("--reference", options->reference, "the float model it was made from");
  options->data.add_to(*command, "what to run");
  command->add_option("--samples", options->samples, "only the first so many samples");
  command->add_option("--batch-size", options->batch_size,
                      "samples a batch (default: 64; of causal language models 8192 tokens)");
  command
      ->add_option("--tolerance", options->tolerance,
                   "largest relative difference of the outputs of integer and fake-quant runs")
      ->capture_default_str();
  options->common.add_to(*command);
  command->callback([options, &action] { action = [options] { return run(*options); }; });
}

}  // namespace vernier::cli
