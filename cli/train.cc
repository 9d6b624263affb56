#include <vernier/calibration/atomic_file.h>
#include <vernier/cli/commands.h>
#include <vernier/cli/console.h>
#include <vernier/kernels/error.h>
#include <vernier/recipes/fine_tuning.h>
#include <vernier/recipes/language_model.h>
#include <vernier/recipes/model_folder.h>

#include <csignal>

namespace vernier::cli {
namespace {

namespace fs = std::filesystem;

struct Options {
  CommonOptions common;
  RecipeOptions recipe;
  std::string model, data, eval_data, out, float_out, checkpoint;
  int64_t calibration_samples = 32;
  int64_t checkpoint_every = 0;
  bool resume = false;
  bool no_graph = false;
  double tolerance = 0.05;
  // In place of the recipe's.
  std::optional<int64_t> steps, batch_size, accumulate, windows, warmup, report_every,
      window_length;
  std::optional<uint64_t> seed;
  std::optional<double> rate, range_rate, final_rate, logits_weight, hidden_weight, weight_decay,
      clip;
  std::optional<std::string> precision, product;
};

FineTuningSettings settings_of(const Options& options, const Recipe& recipe) {
  FineTuningSettings s = recipe.training;
  const auto take = [](const auto& given, auto& setting) {
    if (given) setting = *given;
  };
  take(options.steps, s.steps);
  take(options.batch_size, s.batch_size);
  take(options.accumulate, s.accumulate);
  take(options.windows, s.windows);
  take(options.warmup, s.warmup);
  take(options.report_every, s.report_every);
  take(options.seed, s.seed);
  take(options.rate, s.rate);
  take(options.range_rate, s.range_rate);
  take(options.final_rate, s.final_rate);
  take(options.logits_weight, s.logits_weight);
  take(options.hidden_weight, s.hidden_weight);
  take(options.weight_decay, s.adamw.weight_decay);
  take(options.clip, s.adamw.clip_norm);
  if (options.precision) s.precision = training_precision_from_string(*options.precision);
  if (options.product)
    s.product = *options.product == "codes" ? TrainedProduct::codes : TrainedProduct::real;
  s.capture = !options.no_graph;
  s.check();
  return s;
}

// "self" asks for as many windows as the settings say.
std::string data_spec(const Options& options, const FineTuningSettings& settings) {
  const std::string spec = options.data.empty() ? "self" : options.data;
  const bool counted = spec != "self" && !spec.ends_with("+self");
  return counted ? spec : concat(spec, ":", settings.windows);
}

TokenDataset open_data(const Options& options, const FineTuningSettings& settings,
                       TextModel& reference) {
  VERNIER_CHECK(!options.data.empty() || dynamic_cast<CausalLanguageModel*>(&reference),
                reference.info.architecture,
                " makes no text of its own to learn from: give training data with --data");
  DataOptions source;
  source.data = data_spec(options, settings);
  source.window_length = options.window_length;
  source.seed = settings.seed;
  return source.open(&reference, "training");
}

volatile std::sig_atomic_t interrupted = 0;

// While it lives, an interrupt asks for a stop at the next report instead of ending the program.
class StopOnInterrupt {
 public:
  StopOnInterrupt() {
    interrupted = 0;
    before_ = std::signal(SIGINT, [](int) { interrupted = 1; });
  }
  ~StopOnInterrupt() { std::signal(SIGINT, before_); }
  StopOnInterrupt(const StopOnInterrupt&) = delete;
  StopOnInterrupt& operator=(const StopOnInterrupt&) = delete;

 private:
  void (*before_)(int);
};

std::optional<double> perplexity_of(TextModel& model, const TokenDataset* data) {
  auto* causal = dynamic_cast<CausalLanguageModel*>(&model);
  if (!causal || !data) return std::nullopt;
  return perplexity(*causal, *data, default_batch_size(*data));
}

int run(const Options& options) {
  const torch::Device device = options.common.chosen_device();
  const Recipe recipe = options.recipe.load();
  const FineTuningSettings settings = settings_of(options, recipe);
  VERNIER_CHECK(fs::is_directory(options.model), options.model,
                " is not a Hugging Face folder: training starts from a float model");
  {
    const AtomicFile writable(options.out);
  }  // so that an hour's work does not end at a missing folder
  VERNIER_CHECK(options.float_out.empty() || !fs::exists(options.float_out) ||
                    fs::is_empty(options.float_out),
                options.float_out, " is there already: give --float-out an empty or new folder");
  const std::string checkpoint =
      options.checkpoint.empty() ? options.out + ".training" : options.checkpoint;
  VERNIER_CHECK(!options.resume || fs::exists(checkpoint), "--resume: ", checkpoint,
                " does not exist: a training that saves itself is begun with --checkpoint-every");
  std::optional<TokenDataset> eval_data;
  if (!options.eval_data.empty()) eval_data = TokenDataset::open(options.eval_data);
  const TokenDataset* judged = eval_data ? &*eval_data : nullptr;

  const auto reference = load_text_model(options.model);
  if (judged) judged->check(reference->vocabulary(), reference->max_length());
  reference->to(device);
  const TokenDataset data = open_data(options, settings, *reference);
  const std::optional<double> before_quantization = perplexity_of(*reference, judged);

  const auto model = load_text_model(options.model);
  model->to(device);
  apply_recipe(*model, recipe);
  ModelStatistics statistics;
  if (!recipe.activations.scheme.dynamic)
    statistics = calibrate_on(*model, data, std::min(options.calibration_samples, data.size()));
  calibrate_layers(*model, statistics);
  set_mode(*model, Mode::fake_quant);
  const std::optional<double> before_training = perplexity_of(*model, judged);
  if (before_training)
    note(concat("perplexity: ", fixed(*before_quantization, 4), " in full precision, ",
                fixed(*before_training, 4), " quantized and not yet trained"));

  FineTuner tuner(*model, *reference, data, settings);
  if (options.resume) {
    tuner.load(checkpoint);
    note(concat("going on after step ", tuner.steps()));
  }
  double loss = 0, speed = 0, seconds = 0;
  bool stopped = false;
  {
    const StopOnInterrupt stop;
    const auto start = std::chrono::steady_clock::now();
    int64_t saved = tuner.steps();
    tuner.run([&](const FineTuningProgress& now) {
      loss = now.loss;
      speed = now.tokens_per_second;
      seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      note(concat("step ", now.step, "/", now.steps, "  loss ", fixed(now.loss, 6), "  ",
                  grouped(static_cast<int64_t>(speed)), " tokens/s", now.captured ? " (graph)" : "",
                  "  ", fixed(seconds, 1), " s"));
      stopped = interrupted != 0 && now.step < now.steps;
      if (options.checkpoint_every > 0 && now.step < now.steps &&
          (stopped || now.step - saved >= options.checkpoint_every)) {
        tuner.save(checkpoint);
        saved = now.step;
      }
      return !stopped;
    });
  }
  if (!tuner.capture_refusal().empty())
    note("steps were launched one operation after the other: " + tuner.capture_refusal());
  if (stopped) {
    note(concat("stopped after step ", tuner.steps(),
                options.checkpoint_every > 0 ? ": --resume goes on from " + checkpoint
                                             : ": nothing was written"));
    return kBoundNotMet;
  }
  model->info.recipe = recipe.name;
  save_checkpoint(*model, model->info, options.out);

  nlohmann::ordered_json json;
  json["command"] = "train";
  json["model"] = options.model;
  json["recipe"] = recipe.name;
  json["out"] = options.out;
  json["device"] = device.str();
  json["data"] = data.name();
  json["steps"] = settings.steps;
  json["loss"] = loss;
  json["tokens_per_second"] = speed;
  json["seconds"] = seconds;
  if (!options.float_out.empty()) {
    // Codes' real values in place of the weights: what the quantized layers multiply.
    const torch::NoGradGuard no_grad;
    for (const auto& [name, layer] : quantized_layers(*model))
      if (layer->quantized() && layer->weight_quantizer) {
        torch::Tensor weight = layer->float_weight();
        weight.copy_(layer->weight_quantizer->forward(weight));
      }
    save_hugging_face(*model, options.model, options.float_out, torch::kFloat);
    json["float_out"] = options.float_out;
  }
  if (!judged) {
    note("no data to validate on: give some with --eval-data");
    if (options.common.json) print_json(json);
    return kDone;
  }
  // What is judged is what was written: the checkpoint, loaded back.
  const auto quantized = load_quantized(options.out, device);
  const Comparison comparison =
      compare_on(reference.get(), *quantized, *judged, default_batch_size(*judged));
  if (before_training) {
    json["perplexity_float"] = *before_quantization;
    json["perplexity_before"] = *before_training;
    json["perplexity_after"] = *comparison.integer.perplexity;
  }
  json.update(comparison_json(comparison, options.tolerance));
  if (options.common.json) {
    print_json(json);
  } else {
    if (before_training)
      print_table({{"perplexity", "float", "before training", "after"},
                   {recipe.name, fixed(*before_quantization, 4), fixed(*before_training, 4),
                    fixed(json["perplexity_after"], 4)}});
    print_comparison(comparison, options.tolerance);
  }
  return comparison.passed(options.tolerance) ? kDone : kBoundNotMet;
}

}  // namespace

void add_train(CLI::App& app, Action& action) {
  auto options = std::make_shared<Options>();
  options->recipe.recipe = "qat-lm-w4a8";
  CLI::App* command = app.add_subcommand(
      "train",
      "quantization-aware fine-tuning: the quantized model learns to answer as the float "
      "one does, from data or from text it makes up itself");
  const auto setting = [&](const char* name, auto& value, const std::string& help) {
    return command->add_option(name, value, help + " (default: the recipe's)");
  };
  command->add_option("--model", options->model, "Hugging Face folder")->required();
  command->add_option("--out", options->out, "quantized checkpoint to write, .h5")->required();
  command->add_option("--float-out", options->float_out,
                      "folder to write as well: the weights' quantized values in floating point");
  command->add_option(
      "--data", options->data,
      "training data: HDF5; or self[:N], windows sampled from the float causal language model; or "
      "both, data.h5+self[:N] (default: self)");
  command->add_option("--eval-data", options->eval_data,
                      "data to validate on, with the perplexity before and after");
  command
      ->add_option("--calibration-samples", options->calibration_samples,
                   "find static ranges on the first so many samples before training")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  setting("--windows", options->windows, "sampled windows where --data gives no number");
  command->add_option("--window-length", options->window_length,
                      "tokens of a sampled window (default: as long as the data's, else 512)");
  setting("--steps", options->steps, "steps of the optimizer");
  setting("--batch-size,--batch", options->batch_size, "sequences that run at once");
  setting("--accumulate", options->accumulate, "such batches a step");
  setting("--lr", options->rate, "peak learning rate of the weights");
  setting("--scale-lr", options->range_rate,
          "of learned ranges: the share of itself by which one moves in a step");
  setting("--final-lr", options->final_rate, "share of the rates that is left at the end");
  setting("--warmup", options->warmup, "steps in which the rates rise");
  setting("--logits-weight", options->logits_weight, "of the divergence of the logits");
  setting("--hidden-weight", options->hidden_weight, "of the error of the last hidden states");
  setting("--weight-decay", options->weight_decay, "of weights, never of scales");
  setting("--clip", options->clip, "largest length of the gradient; 0: as it is");
  setting("--precision", options->precision, "auto, bf16, tf32 or float32");
  setting("--product", options->product, "what quantized layers multiply: real values or codes")
      ->check(CLI::IsMember({"real", "codes"}));
  setting("--seed", options->seed, "of the data's order and of sampling");
  setting("--report-every", options->report_every, "steps between lines of progress");
  command
      ->add_option("--checkpoint-every", options->checkpoint_every,
                   "save the training every so many steps, at reports, and when interrupted; 0: "
                   "never")
      ->capture_default_str();
  command->add_option("--checkpoint", options->checkpoint,
                      "where to save it (default: OUT.training)");
  command->add_flag("--resume", options->resume,
                    "go on from there, with the same options, to the same bits");
  command->add_flag("--no-graph", options->no_graph,
                    "launch every operation instead of recording steps");
  command
      ->add_option("--tolerance", options->tolerance,
                   "largest relative difference of the outputs of integer and fake-quant runs")
      ->capture_default_str();
  options->recipe.add_to(*command);
  options->common.add_to(*command);
  command->callback([options, &action] { action = [options] { return run(*options); }; });
}

}  // namespace vernier::cli
