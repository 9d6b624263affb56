#include <vernier/calibration/atomic_file.h>
#include <vernier/cli/commands.h>
#include <vernier/cli/console.h>
#include <vernier/kernels/error.h>
#include <vernier/recipes/calibration_run.h>

namespace vernier::cli {
namespace {

namespace fs = std::filesystem;

struct Options {
  CommonOptions common;
  DataOptions data;
  std::string model, out;
  std::vector<std::string> merge;
  int64_t first = 0;
  std::optional<int64_t> samples;
  int64_t save_every = 256;
  bool resume = false;
};

void report(const Options& options, const ModelStatistics& statistics) {
  nlohmann::ordered_json json;
  json["command"] = "calibrate";
  json["out"] = options.out;
  json["samples"] = statistics.samples;
  json["sites"] = statistics.sites.size();
  json["model_fingerprint"] = statistics.fingerprint;
  if (options.common.json) return print_json(json);
  std::vector<std::vector<std::string>> rows = {{"layer input", "values", "min", "max", "zeros"}};
  for (const auto& [name, site] : statistics.sites) {
    const Histogram& histogram = site.histogram;
    rows.push_back({name, grouped(histogram.total()), fixed(histogram.range().min, 4),
                    fixed(histogram.range().max, 4), grouped(histogram.zeros())});
  }
  print_table(rows);
  note(concat(options.out, ": ", statistics.samples, " samples"));
}

int merge(const Options& options) {
  VERNIER_CHECK(options.model.empty() && options.data.data.empty() && !options.resume,
                "--merge adds statistics files: it takes no --model, --data or --resume");
  const AtomicFile writable(options.out);
  ModelStatistics sum = load_statistics(options.merge.front());
  for (size_t i = 1; i < options.merge.size(); ++i) {
    try {
      sum.merge(load_statistics(options.merge[i]));
    } catch (const Error& error) {
      throw Error(concat("merging ", options.merge[i], ": ", error.what()));
    }
  }
  VERNIER_CHECK(sum.samples == sum.planned, options.merge.front(), " was interrupted after ",
                sum.samples, " of ", sum.planned, " samples: finish it with --resume");
  save_statistics(sum, options.out);
  report(options, sum);
  return kDone;
}

int run(const Options& options) {
  if (!options.merge.empty()) return merge(options);
  VERNIER_CHECK(!options.model.empty(),
                "give --model and --data, or --merge with statistics files");
  VERNIER_CHECK(options.save_every > 0, "--save-every must be at least 1");
  const torch::Device device = options.common.chosen_device();
  { const AtomicFile writable(options.out); }
  const auto model = load_text_model(options.model);
  VERNIER_CHECK(model->info.recipe.empty(), options.model,
                " is quantized already: calibrate the float model");
  model->to(device);
  const TokenDataset data = options.data.open(model.get(), "calibration");

  // What an interrupted run leaves stands beside the output, so that an older, whole output stays
  // what it is.
  const fs::path partial = options.out + ".partial";
  ModelStatistics statistics = plan_statistics(
      *model, data, options.first, options.samples.value_or(data.size() - options.first));
  if (options.resume && fs::exists(partial)) {
    ModelStatistics before = load_statistics(partial);
    VERNIER_CHECK(
        before.fingerprint == statistics.fingerprint && before.data == statistics.data &&
            before.first_sample == statistics.first_sample && before.planned == statistics.planned,
        partial.string(), " is of another model, data or share of it: remove it to start anew");
    statistics = std::move(before);
    note(concat("going on after ", statistics.samples, " of ", statistics.planned, " samples"));
  }
  {
    Progress progress("calibrating", statistics.planned);
    int64_t saved = statistics.samples;
    collect_statistics(*model, data, statistics, [&](const ModelStatistics& so_far) {
      progress.update(so_far.samples);
      if (so_far.samples - saved < options.save_every || so_far.samples == so_far.planned) return;
      save_statistics(so_far, partial);
      saved = so_far.samples;
    });
  }
  save_statistics(statistics, options.out);
  std::error_code ignored;
  fs::remove(partial, ignored);
  report(options, statistics);
  return kDone;
}

}  // namespace

void add_calibrate(CLI::App& app, Action& action) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand(
      "calibrate", "one pass over data: the statistics that every calibrator needs");
  command->add_option("--model", options->model, "Hugging Face folder");
  options->data.add_to(*command, "calibration data");
  command->add_option("--out", options->out, "statistics file to write, .h5")->required();
  command->add_option("--merge", options->merge,
                      "add these statistics files instead of running a model");
  command->add_option("--first", options->first, "first sample of this run's share of the data")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command->add_option("--samples", options->samples,
                      "samples of this run (default: all from --first)");
  command
      ->add_option("--save-every", options->save_every,
                   "keep what was gathered every so many samples, for --resume")
      ->capture_default_str();
  command->add_flag("--resume", options->resume,
                    "go on where an interrupted run with the same options stopped");
  options->common.add_to(*command);
  command->callback([options, &action] { action = [options] { return run(*options); }; });
}

}  // namespace vernier::cli
