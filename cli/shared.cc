#include <torch/cuda.h>
#include <vernier/cli/commands.h>
#include <vernier/cli/console.h>
#include <vernier/kernels/error.h>
#include <vernier/recipes/calibration_run.h>
#include <vernier/recipes/language_model.h>

#include <cmath>
#include <map>

namespace vernier::cli {

namespace fs = std::filesystem;

void CommonOptions::add_to(CLI::App& command) {
  command
      .add_option("--device", device, "auto, cpu, cuda or cuda:N (auto: cuda where there is one)")
      ->capture_default_str();
  command.add_flag("--json", json, "print one JSON object on stdout");
}

torch::Device CommonOptions::chosen_device() const {
#ifdef VERNIER_WITH_CUDA
  const int64_t gpus = static_cast<int64_t>(torch::cuda::device_count());
#else
  const int64_t gpus = 0;
#endif
  if (device == "auto")
    return gpus > 0 ? torch::Device(torch::kCUDA, 0) : torch::Device(torch::kCPU);
  if (device == "cpu") return torch::kCPU;
  int64_t index = 0;
  const bool numbered = device.starts_with("cuda:") && device.size() > 5 && device.size() < 9 &&
                        device.find_first_not_of("0123456789", 5) == std::string::npos;
  if (numbered) index = std::stoll(device.substr(5));
  VERNIER_CHECK(numbered || device == "cuda", "unknown device '", device,
                "': use auto, cpu, cuda or cuda:N");
#ifndef VERNIER_WITH_CUDA
  throw Error(
      concat("--device ", device,
             ": this program was built without CUDA: use --device cpu, or build it where nvcc is"));
#endif
  VERNIER_CHECK(index < gpus, "--device ", device, ": ", gpus,
                " GPUs were found: use --device cpu, or a machine with one");
  return torch::Device(torch::kCUDA, static_cast<c10::DeviceIndex>(index));
}

void DtypeOption::add_to(CLI::App& command) {
  command
      .add_option("--dtype", dtype,
                  "of what is not quantized: float32, bfloat16 or float16 (bfloat16 suits GPUs)")
      ->capture_default_str()
      ->check(CLI::IsMember({"float32", "bfloat16", "float16"}));
}

torch::Dtype DtypeOption::chosen() const {
  return dtype == "bfloat16" ? torch::kBFloat16 : dtype == "float16" ? torch::kHalf : torch::kFloat;
}

CLI::Option* DataOptions::add_to(CLI::App& command, const std::string& help) {
  CLI::Option* option = command.add_option(
      "--data", data,
      help +
          ": HDF5; or self[:N], windows sampled from the float causal language model (32); or "
          "both, data.h5+self[:N]");
  command.add_option("--window-length", window_length,
                     "tokens of a sampled window (default: as long as the data's, else 512)");
  command.add_option("--seed", seed, "of sampling")->capture_default_str();
  return option;
}

TokenDataset DataOptions::open(TextModel* model, const std::string& needed_by) const {
  const bool can_sample =
      model && dynamic_cast<CausalLanguageModel*>(model) && model->info.recipe.empty();
  VERNIER_CHECK(!data.empty() || can_sample, needed_by, ": give data with --data");
  std::optional<Progress> bar;
  return open_tokens(data.empty() ? "self" : data, model, {window_length, seed},
                     [&](int64_t done, int64_t total) {
                       if (!bar) bar.emplace("sampling tokens", total);
                       bar->update(done);
                     });
}

void RecipeOptions::add_to(CLI::App& command) {
  std::string names;
  for (const std::string& name : recipe_names()) names += (names.empty() ? "" : ", ") + name;
  command.add_option("--recipe", recipe, "how to quantize: " + names + ", or a .yaml file")
      ->capture_default_str();
  command.add_option(
      "--calibrator", calibrator,
      "min_max, percentile, mse or entropy in place of the recipe's for activations");
  command.add_option("--percentile", percentile,
                     "share of the values kept, of 100, with percentile");
}

Recipe RecipeOptions::load() const {
  Recipe loaded = load_recipe(recipe);
  if (calibrator)
    loaded.activations.calibrator.method = calibration_method_from_string(*calibrator);
  if (percentile) {
    VERNIER_CHECK(*percentile > 0 && *percentile <= 100, "--percentile must be in (0, 100], not ",
                  *percentile);
    VERNIER_CHECK(loaded.activations.calibrator.method == CalibrationMethod::percentile,
                  "--percentile goes with --calibrator percentile");
    loaded.activations.calibrator.percentile = *percentile;
  }
  return loaded;
}

ModelStatistics calibrate_on(TextModel& model, const TokenDataset& data,
                             std::optional<int64_t> samples) {
  ModelStatistics statistics = plan_statistics(model, data, 0, samples.value_or(data.size()));
  Progress progress("calibrating", statistics.planned);
  collect_statistics(model, data, statistics,
                     [&](const ModelStatistics& so_far) { progress.update(so_far.samples); });
  return statistics;
}

Comparison compare_on(TextModel* reference, TextModel& quantized, const TokenDataset& data,
                      int64_t batch_size) {
  Progress progress("validating", data.size());
  return compare(reference, quantized, data, batch_size,
                 [&](int64_t done) { progress.update(done); });
}

std::shared_ptr<TextModel> load_model(const fs::path& path, torch::Device device,
                                      torch::Dtype dtype) {
  auto model = load_text_model(path);
  model->to(device, dtype);
  if (model->info.recipe.empty()) return model;
  set_mode(*model, Mode::full);
  set_mode(*model, Mode::integer);  // makes the weight codes anew where the model is now
  return model;
}

std::shared_ptr<TextModel> load_quantized(const fs::path& path, torch::Device device) {
  auto model = load_model(path, device);
  VERNIER_CHECK(
      !model->info.recipe.empty(), path.string(),
      " is a folder in full precision: give a quantized checkpoint, as `vernier quantize` "
      "writes it");
  return model;
}

std::shared_ptr<TextModel> load_reference(const fs::path& path, const TextModel& quantized,
                                          torch::Device device) {
  auto reference = load_text_model(path);
  VERNIER_CHECK(reference->info.recipe.empty(), path.string(),
                " is quantized: give the float model as the reference");
  VERNIER_CHECK(reference->info.fingerprint == quantized.info.fingerprint, path.string(),
                " is not the model that the quantized one was made from (fingerprints ",
                reference->info.fingerprint, " and ", quantized.info.fingerprint, ")");
  reference->to(device);
  return reference;
}

int64_t batch_size_for(const TextModel& model, const TokenDataset& data,
                       std::optional<int64_t> asked) {
  if (asked) return *asked;
  return dynamic_cast<const CausalLanguageModel*>(&model) ? default_batch_size(data) : 64;
}

void check_belongs(const ModelStatistics& statistics, const TextModel& model,
                   const fs::path& path) {
  VERNIER_CHECK(statistics.fingerprint == model.info.fingerprint, path.string(),
                " holds statistics of another model (fingerprint ", statistics.fingerprint,
                ", this one has ", model.info.fingerprint, "): calibrate this model");
  VERNIER_CHECK(statistics.samples == statistics.planned, path.string(), " was interrupted after ",
                statistics.samples, " of ", statistics.planned,
                " samples: finish it with `vernier calibrate --resume`");
}

int64_t model_bytes(const fs::path& path) {
  if (!fs::is_directory(path)) return static_cast<int64_t>(fs::file_size(path));
  int64_t bytes = 0;
  for (const auto& entry : fs::directory_iterator(path))
    if (entry.path().extension() == ".safetensors")
      bytes += static_cast<int64_t>(entry.file_size());
  return bytes;
}

nlohmann::ordered_json comparison_json(const Comparison& comparison, double tolerance) {
  using V = LayerValidation;
  const ValidationReport& report = comparison.validation;
  const bool predicts = comparison.integer.perplexity.has_value();
  const bool scored = predicts || comparison.integer.spearman.has_value();
  const auto metric = [&](const ModeResult& mode) {
    return predicts ? *mode.perplexity : scored ? *mode.spearman : mode.sqnr_db;
  };
  nlohmann::ordered_json json;
  json["samples"] = comparison.samples;
  json["metric"] = predicts ? "perplexity" : scored ? "spearman" : "sqnr_db";
  if (comparison.full)
    json["float"] = scored ? nlohmann::json(metric(*comparison.full)) : nlohmann::json();
  if (scored || comparison.full) {
    json["fake_quant"] = metric(comparison.fake_quant);
    json["integer"] = metric(comparison.integer);
  }
  if (comparison.full) {
    json["sqnr_db_fake_quant"] = comparison.fake_quant.sqnr_db;
    json["sqnr_db_integer"] = comparison.integer.sqnr_db;
    json["ms_float"] = comparison.full->ms_per_sample;
  }
  if (comparison.integer.kl) {
    json["kl_fake_quant"] = *comparison.fake_quant.kl;
    json["kl_integer"] = *comparison.integer.kl;
  }
  if (comparison.integer.cosine_error) {
    json["cosine_error_fake_quant"] = *comparison.fake_quant.cosine_error;
    json["cosine_error_integer"] = *comparison.integer.cosine_error;
  }
  json["ms_fake_quant"] = comparison.fake_quant.ms_per_sample;
  json["ms_integer"] = comparison.integer.ms_per_sample;
  json["layers_quantized"] = report.layers.size();
  json["codes"] = report.total(&V::codes);
  json["code_mismatches"] = report.total(&V::code_mismatches);
  json["weight_codes"] = report.total(&V::weight_codes);
  json["weight_code_mismatches"] = report.total(&V::weight_code_mismatches);
  json["accumulators"] = report.total(&V::accumulators);
  json["accumulator_mismatches"] = report.total(&V::accumulator_mismatches);
  json["outputs"] = report.total(&V::outputs);
  json["outside_bound"] = report.total(&V::outside_bound);
  json["worst_of_bound"] = report.worst_of_bound();
  json["moved_codes"] = report.total(&V::moved_codes);
  json["moved_share"] = static_cast<double>(report.total(&V::moved_codes)) /
                        static_cast<double>(report.total(&V::codes));
  json["relative_output_error"] = report.relative_output_error();
  json["max_output_difference"] = report.max_output_difference;
  json["max_output"] = report.max_output;
  json["output_tolerance"] = tolerance;
  json["passed"] = comparison.passed(tolerance);
  return json;
}

void print_comparison(const Comparison& comparison, double tolerance) {
  using V = LayerValidation;
  const ValidationReport& report = comparison.validation;
  std::vector<std::vector<std::string>> rows = {{"", "float", "fake-quant", "integer"}};
  const auto row = [&](const char* name, const auto& value) {
    std::vector<std::string> cells = {name, comparison.full ? value(*comparison.full) : "-"};
    cells.push_back(value(comparison.fake_quant));
    cells.push_back(value(comparison.integer));
    rows.push_back(cells);
  };
  if (comparison.integer.spearman)
    row("Spearman x 100", [](const ModeResult& mode) { return fixed(*mode.spearman, 2); });
  if (comparison.integer.perplexity)
    row("perplexity", [](const ModeResult& mode) { return fixed(*mode.perplexity, 4); });
  if (comparison.integer.kl)
    row("KL from the float model, nats",
        [](const ModeResult& mode) { return mode.kl ? fixed(*mode.kl, 6) : std::string("-"); });
  if (comparison.full) {
    if (comparison.integer.cosine_error)
      row("mean |cosine - float's|", [](const ModeResult& mode) {
        return mode.cosine_error ? fixed(*mode.cosine_error, 4) : std::string("-");
      });
    row("SQNR of the output, dB", [&](const ModeResult& mode) {
      return &mode == &*comparison.full ? std::string("-") : fixed(mode.sqnr_db, 1);
    });
  }
  row("ms a sample", [](const ModeResult& mode) { return fixed(mode.ms_per_sample, 2); });
  print_table(rows);
  const auto line = [&](const char* what, int64_t V::*count, int64_t V::*wrong, const char* how) {
    note(concat(what, ": ", grouped(report.total(count)), " compared, ",
                grouped(report.total(wrong)), " ", how));
  };
  line("input codes", &V::codes, &V::code_mismatches, "different");
  line("weight codes", &V::weight_codes, &V::weight_code_mismatches, "different");
  if (report.total(&V::accumulators) > 0)
    line("accumulators", &V::accumulators, &V::accumulator_mismatches, "different");
  else
    note("accumulators: none to compare, FP8 products are summed in floating point");
  line("layer outputs", &V::outputs, &V::outside_bound, "outside their rounding bound");
  line("codes end to end", &V::codes, &V::moved_codes, "moved by roundings upstream");
  note(concat("relative difference of the whole runs' outputs: ", report.relative_output_error(),
              " (at most ", tolerance, " allowed)"));
  note(comparison.passed(tolerance)
           ? "the integer model computes what fake-quantization says"
           : "NOT PASSED: the integer model differs from fake-quantization");
}

}  // namespace vernier::cli
