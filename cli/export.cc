#include <vernier/calibration/atomic_file.h>
#include <vernier/cli/commands.h>
#include <vernier/cli/console.h>
#include <vernier/cli/smoothing.h>
#include <vernier/kernels/error.h>
#include <vernier/recipes/compressed_tensors.h>
#include <vernier/recipes/model_folder.h>

namespace vernier::cli {
namespace {

namespace fs = std::filesystem;

struct Options {
  CommonOptions common;
  RecipeOptions recipe;
  std::string model, statistics, out, files, dtype, format = "h5";
  bool asks_for_recipe = false;
};

// The model with all its scales: from a recipe and statistics, or as a checkpoint has it.
std::shared_ptr<TextModel> quantized_model(const Options& options) {
  VERNIER_CHECK(fs::exists(options.model), options.model,
                " does not exist: give a Hugging Face folder or a vernier checkpoint");
  if (!fs::is_directory(options.model)) {
    VERNIER_CHECK(!options.asks_for_recipe && options.statistics.empty(), options.model,
                  " is quantized already: give the float model, or no --recipe and no --stats");
    VERNIER_CHECK(options.format != "h5", options.model,
                  " is a checkpoint already: choose another --format, or give the float model");
    return load_text_model(options.model);
  }
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
  return model;
}

// Writes the folder of a model; what it tells of it goes into `json`.
void write_folder(TextModel& model, const Options& options, nlohmann::ordered_json& json) {
  // A folder's own files, else those that --files names.
  const fs::path source = fs::is_directory(options.model) ? options.model : options.files;
  std::optional<torch::Dtype> dtype;
  if (!options.dtype.empty()) dtype = dtype_from_name(options.dtype);
  if (options.format == "float") return save_hugging_face(model, source, options.out, dtype);
  const CompressedTensorsReport report = save_compressed_tensors(model, source, options.out, dtype);
  json["layers_quantized"] = report.layers;
  json["joined"] = report.joined;
  if (!report.joined.empty())
    note(concat(report.joined.size(), " layers (", report.joined.front(),
                ", ...) got one input range with others that read the same activation"));
}

int run(const Options& options) {
  const bool folder = options.format != "h5";
  VERNIER_CHECK(folder || options.dtype.empty(), "--dtype goes with the formats that are folders");
  VERNIER_CHECK(options.files.empty() || (folder && !fs::is_directory(options.model)),
                "--files goes with a checkpoint as --model and a folder as --out");
  if (folder) {
    const AtomicFolder writable(options.out);
  }
  const auto model = quantized_model(options);
  nlohmann::ordered_json json;
  json["command"] = "export";
  json["out"] = options.out;
  json["format"] = options.format;
  json["recipe"] = model->info.recipe;
  if (folder)
    write_folder(*model, options, json);
  else
    save_checkpoint(*model, model->info, options.out);
  const bool was_float = fs::is_directory(options.model);
  if (was_float) json["bytes_float"] = model_bytes(options.model);
  json["bytes_integer"] = model_bytes(options.out);
  if (options.common.json) {
    print_json(json);
  } else {
    note(concat(options.out, ": ", megabytes(json["bytes_integer"]),
                was_float ? concat(", ", megabytes(json["bytes_float"]), " before") : ""));
    if (folder && !was_float && options.files.empty())
      note("without tokenizer and generation settings: --files names the folder that has them");
  }
  return kDone;
}

}  // namespace

void add_export(CLI::App& app, Action& action) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("export", "write a quantized model from statistics, or in another format");
  command
      ->add_option("--model", options->model, "Hugging Face folder, or a checkpoint to write anew")
      ->required();
  command->add_option("--stats", options->statistics, "statistics of `vernier calibrate`");
  command->add_option("--out", options->out, "checkpoint (.h5) or folder to write")->required();
  command
      ->add_option("--format", options->format,
                   "h5 (a checkpoint), compressed-tensors (a folder for vLLM and transformers) or "
                   "float (a folder with the real values of the codes)")
      ->check(CLI::IsMember({"h5", "compressed-tensors", "float"}))
      ->capture_default_str();
  command->add_option("--files", options->files,
                      "the folder that a checkpoint was made from: its tokenizer, generation "
                      "settings and tensors that the program does not use go along");
  command->add_option("--dtype", options->dtype,
                      "float32, float16 or bfloat16 for what a folder has in floating point "
                      "(default: as config.json says)");
  options->recipe.add_to(*command);
  command->add_flag("--json", options->common.json, "print one JSON object on stdout");
  command->callback([options, command, &action] {
    for (const char* name : {"--recipe", "--calibrator", "--percentile"})
      options->asks_for_recipe |= command->count(name) > 0;
    action = [options] { return run(*options); };
  });
}

}  // namespace vernier::cli
