#include <vernier/calibration/atomic_file.h>
#include <vernier/cli/commands.h>
#include <vernier/cli/console.h>
#include <vernier/cli/smoothing.h>
#include <vernier/kernels/error.h>

namespace vernier::cli {
namespace {

struct Options {
  CommonOptions common;
  RecipeOptions recipe;
  DataOptions data;
  SmoothingSearchOptions smoothing;
  std::string model, out, eval_data;
  std::optional<int64_t> samples, batch_size;
  double tolerance = 0.05;
};

int run(const Options& options) {
  const torch::Device device = options.common.chosen_device();
  const Recipe recipe = options.recipe.load();
  const bool needs_data = !recipe.activations.scheme.dynamic;
  VERNIER_CHECK(std::filesystem::is_directory(options.model), options.model,
                " is not a Hugging Face folder: quantize starts from a float model");
  {
    const AtomicFile writable(options.out);
  }  // so that an hour's work does not end at a missing folder
  const auto model = load_model(options.model, device);
  std::optional<TokenDataset> data, eval_data;
  const bool smooths = !recipe.smoothing.empty() && !is_smoothed(options.model);
  if (needs_data || smooths || !options.data.data.empty())
    data = options.data.open(model.get(), concat("recipe ", recipe.name,
                                                 needs_data ? " has static scales" : " smooths"));
  if (!options.eval_data.empty()) {
    DataOptions judging = options.data;
    judging.data = options.eval_data;
    eval_data = judging.open(model.get(), "validation");
  }
  const TokenDataset* judged = eval_data ? &*eval_data : data ? &*data : nullptr;
  if (judged)
    judged->check(model->vocabulary(), model->max_length());  // before anything is written

  apply_recipe(*model, recipe);
  const SmoothingRun run_of_search = options.smoothing.run_of(options.out + ".search.json");
  std::optional<TokenDataset> searched = data;
  if (searched && options.samples) searched = searched->share(0, *options.samples);
  const SmoothingResult smoothing =
      smooth_for(*model, recipe, options.model, searched ? &*searched : nullptr, run_of_search,
                 options.recipe.calibrator.has_value());
  ModelStatistics statistics;
  if (needs_data) statistics = calibrate_on(*model, *data, options.samples);
  calibrate_layers(*model, statistics);
  model->info.recipe = recipe.name;
  save_checkpoint(*model, model->info, options.out);
  forget_state(run_of_search);

  nlohmann::ordered_json json;
  json["command"] = "quantize";
  json["model"] = options.model;
  json["recipe"] = recipe.name;
  json["out"] = options.out;
  json["device"] = device.str();
  json["bytes_float"] = model_bytes(options.model);
  json["bytes_integer"] = model_bytes(options.out);
  json["layers"] = quantized_layers(*model).size();
  if (!smoothing.groups.empty()) json["smoothing"] = smoothing_json(smoothing);

  if (!judged) {
    note("no data to validate on: give some with --eval-data");
    if (options.common.json) print_json(json);
    return kDone;
  }
  // What is judged is what was written: the checkpoint, loaded back.
  const auto quantized = load_quantized(options.out, device);
  const Comparison comparison = compare_on(model.get(), *quantized, *judged,
                                           batch_size_for(*model, *judged, options.batch_size));
  json.update(comparison_json(comparison, options.tolerance));
  if (options.common.json) {
    print_json(json);
  } else {
    print_comparison(comparison, options.tolerance);
    note(concat(options.out, ": ", megabytes(json["bytes_integer"]), ", ",
                megabytes(json["bytes_float"]), " before"));
  }
  return comparison.passed(options.tolerance) ? kDone : kBoundNotMet;
}

}  // namespace

void add_quantize(CLI::App& app, Action& action) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand(
      "quantize",
      "calibrate, quantize, export and validate a model, with its accuracy before and after");
  command->add_option("--model", options->model, "Hugging Face folder")->required();
  options->data.add_to(*command, "calibration data");
  command->add_option("--eval-data", options->eval_data,
                      "data to validate on, as --data (default: the same)");
  command->add_option("--out", options->out, "checkpoint to write, .h5")->required();
  command->add_option("--samples", options->samples, "calibrate on the first so many samples");
  command->add_option(
      "--batch-size", options->batch_size,
      "samples a batch when validating (default: 64; of causal language models 8192 tokens)");
  command
      ->add_option("--tolerance", options->tolerance,
                   "largest relative difference of the outputs of integer and fake-quant runs")
      ->capture_default_str();
  options->smoothing.add_to(*command);
  options->recipe.add_to(*command);
  options->common.add_to(*command);
  command->callback([options, &action] { action = [options] { return run(*options); }; });
}

}  // namespace vernier::cli
