#include <vernier/calibration/atomic_file.h>
#include <vernier/cli/charts.h>
#include <vernier/cli/commands.h>
#include <vernier/cli/console.h>
#include <vernier/cli/smoothing.h>
#include <vernier/kernels/error.h>
#include <vernier/recipes/model_folder.h>

#include <algorithm>
#include <cmath>

namespace vernier::cli {
namespace {

namespace fs = std::filesystem;

struct Options {
  CommonOptions common;
  RecipeOptions recipe;
  DataOptions data;
  std::string model, statistics, alpha, out, dtype, picture;
  std::optional<int64_t> samples, batch_size;
  SmoothingSearchOptions search;
};

std::optional<torch::Dtype> dtype_of(const Options& options) {
  if (options.dtype.empty()) return std::nullopt;
  return dtype_from_name(options.dtype);
}

// Loss over alpha as the search saw it, beside what it started from and came to.
LineChart curve_chart(const SmoothingResult& result, const std::string& model) {
  LineChart chart;
  chart.title = "Loss over alpha: " + fs::path(model).filename().string();
  chart.subtitle = "one alpha for all groups, on the samples that propose";
  chart.x_unit = "alpha";
  chart.unit = result.metric == "kl" ? "KL divergence from the float model, nats a token"
                                     : "squared error of the outputs, share";
  LineChart::Series series{"one alpha for all groups", {}};
  double highest = result.after.proposing;
  for (const auto& point : result.curve) {
    if (!std::isfinite(point.loss)) continue;
    series.points.emplace_back(point.alpha, point.loss);
    highest = std::max(highest, point.loss);
  }
  chart.series.push_back(series);
  // Without smoothing the loss may be so high that nothing else could be told apart.
  if (result.before.proposing <= 3 * highest)
    chart.references.push_back({result.before.proposing, "no smoothing"});
  else
    chart.subtitle += concat("; without smoothing ", fixed(result.before.proposing, 4));
  chart.references.push_back({result.after.proposing, "found"});
  return chart;
}

int run(const Options& options) {
  const torch::Device device = options.common.chosen_device();
  Recipe recipe = options.recipe.load();
  if (!options.alpha.empty()) recipe.smoothing = options.alpha;
  if (recipe.smoothing.empty()) recipe.smoothing = "auto";
  const bool searched = !smoothing_alpha(recipe.smoothing);
  VERNIER_CHECK(options.statistics.empty() || !searched, "--alpha ", recipe.smoothing,
                " is searched on data, which statistics do not hold: give --data, or an alpha");
  VERNIER_CHECK(options.statistics.empty() || options.data.data.empty(),
                "give --stats or --data, not both");
  VERNIER_CHECK(fs::is_directory(options.model), options.model,
                " is not a Hugging Face folder: smoothing starts from a float model");
  VERNIER_CHECK(options.picture.empty() || searched,
                "--picture shows the loss over alpha: it goes "
                "with --alpha auto or auto-global");
  { const AtomicFolder writable(options.out); }

  const auto model = load_model(options.model, device);
  const ModelFolder as_stored = model_folder(*model, options.model, dtype_of(options));
  apply_recipe(*model, recipe);
  SmoothingRun smoothing = options.search.run_of(options.out + ".search.json");
  smoothing.folded_only = true;
  smoothing.search.storage = as_stored.dtype;
  smoothing.batch_size = options.batch_size;
  const size_t declared = quantized_groups(*model, model->smoothing_groups()).size();
  SmoothingResult result;
  if (!options.statistics.empty()) {
    const ModelStatistics statistics = load_statistics(options.statistics);
    check_belongs(statistics, *model, options.statistics);
    result = smooth_model(*model, recipe, statistics, smoothing);
  } else {
    TokenDataset data = options.data.open(model.get(), "smoothing looks at activations");
    if (options.samples) data = data.share(0, *options.samples);
    result = smooth_on(*model, recipe, data, smoothing);
  }
  VERNIER_CHECK(!result.groups.empty(), options.model,
                ": no factor can be folded into this model, which a float folder would need: "
                "`vernier quantize` with a smoothing recipe puts them into the layers' inputs");
  if (result.groups.size() < declared)
    note(concat(declared - result.groups.size(),
                " groups whose factors cannot be folded were left out: a float folder has no place "
                "for them, `vernier quantize` has"));
  save_hugging_face(*model, options.model, options.out, dtype_of(options));
  save_smoothing_report(result, recipe, options.out);
  forget_state(smoothing);
  if (!options.picture.empty())
    write_text_atomically(options.picture, to_svg(curve_chart(result, options.model)));

  if (options.common.json) {
    nlohmann::ordered_json json;
    json["command"] = "smoothquant";
    json["model"] = options.model;
    json["recipe"] = recipe.name;
    json["out"] = options.out;
    json.update(smoothing_json(result));
    print_json(json);
  } else {
    print_smoothing(result);
    note(concat(options.out, ": smoothed, ", result.groups.size(), " groups"));
  }
  return kDone;
}

}  // namespace

void add_smoothquant(CLI::App& app, Action& action) {
  auto options = std::make_shared<Options>();
  options->recipe.recipe = "w8a8-smoothquant";
  CLI::App* command = app.add_subcommand(
      "smoothquant",
      "move activation outliers into the weights: a float model that quantizes better");
  command->add_option("--model", options->model, "Hugging Face folder")->required();
  options->data.add_to(*command, "data to search on, or for the channels' maxima");
  command->add_option("--stats", options->statistics,
                      "statistics of `vernier calibrate` in place of data, for a given alpha");
  command->add_option("--alpha", options->alpha,
                      "0 to 1 for all groups; auto: searched, each group its own; auto-global: "
                      "searched, one for all (default: the recipe's)");
  command->add_option("--out", options->out, "folder to write")->required();
  command->add_option("--dtype", options->dtype,
                      "float32, float16 or bfloat16 of the folder (default: the model's)");
  command->add_option("--samples", options->samples, "use the first so many samples");
  command->add_option("--batch-size", options->batch_size, "samples a batch");
  command->add_option("--picture", options->picture, "write the loss over alpha as SVG");
  options->search.add_to(*command);
  options->recipe.add_to(*command);
  options->common.add_to(*command);
  command->callback([options, &action] { action = [options] { return run(*options); }; });
}

}  // namespace vernier::cli
