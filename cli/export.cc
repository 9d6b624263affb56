#include <vernier/cli/commands.h>
#include <vernier/cli/console.h>
#include <vernier/cli/smoothing.h>
#include <vernier/kernels/error.h>

namespace vernier::cli {
namespace {

struct Options {
  CommonOptions common;
  RecipeOptions recipe;
  std::string model, statistics, out;
};

int run(const Options& options) {
  const Recipe recipe = options.recipe.load();
  VERNIER_CHECK(recipe.activations.scheme.dynamic || !options.statistics.empty(), "recipe ",
                recipe.name, " has static scales: give statistics with --stats");
  const auto model = load_text_model(options.model);
  VERNIER_CHECK(model->info.recipe.empty(), options.model,
                " is quantized already: give the float model");
  apply_recipe(*model, recipe);
  VERNIER_CHECK(recipe.smoothing.empty() || is_smoothed(options.model), "recipe ", recipe.name,
                " smooths first: use `vernier quantize`, or give a folder of `vernier smoothquant` "
                "and its statistics");
  smooth_for(*model, recipe, options.model, nullptr, {}, options.recipe.calibrator.has_value());
  ModelStatistics statistics;
  if (!options.statistics.empty()) {
    statistics = load_statistics(options.statistics);
    check_belongs(statistics, *model, options.statistics);
  }
  calibrate_layers(*model, statistics);
  model->info.recipe = recipe.name;
  save_checkpoint(*model, model->info, options.out);
  nlohmann::ordered_json json;
  json["command"] = "export";
  json["out"] = options.out;
  json["recipe"] = recipe.name;
  json["bytes_float"] = model_bytes(options.model);
  json["bytes_integer"] = model_bytes(options.out);
  if (options.common.json) {
    print_json(json);
  } else {
    note(concat(options.out, ": ", megabytes(json["bytes_integer"]), ", ",
                megabytes(json["bytes_float"]), " before"));
  }
  return kDone;
}

}  // namespace

void add_export(CLI::App& app, Action& action) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("export", "write a quantized checkpoint from statistics");
  command->add_option("--model", options->model, "Hugging Face folder")->required();
  command->add_option("--stats", options->statistics, "statistics of `vernier calibrate`");
  command->add_option("--out", options->out, "checkpoint to write, .h5")->required();
  options->recipe.add_to(*command);
  command->add_flag("--json", options->common.json, "print one JSON object on stdout");
  command->callback([options, &action] { action = [options] { return run(*options); }; });
}

}  // namespace vernier::cli
