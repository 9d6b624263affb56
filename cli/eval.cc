#include <vernier/cli/commands.h>
#include <vernier/cli/console.h>
#include <vernier/kernels/error.h>
#include <vernier/recipes/language_model.h>

#include <chrono>
#include <cmath>

namespace vernier::cli {
namespace {

struct Options {
  CommonOptions common;
  DtypeOption dtype;
  DataOptions data;
  std::string model, reference, metric, mode;
  int64_t first = 0;
  std::optional<int64_t> samples, batch_size;
};

/// Runs f(progress) under a progress bar.
template <typename F>
auto with_progress(const TokenDataset& data, const F& f) {
  Progress progress("evaluating", data.size());
  return f([&](int64_t done) { progress.update(done); });
}

// Metrics of embeddings. `reference` is there where the metric needs it.
double embedding_metric(const Options& options, TextModel& model, Mode mode, TextModel* reference,
                        const TokenDataset& data, int64_t batch_size) {
  VERNIER_CHECK(options.metric == "sqnr" || data.pairs(), "the metric ", options.metric,
                " needs pairs: groups 'a' and 'b' in ", data.name());
  const auto embed_in = [&](TextModel& which, Mode in_mode, const std::string& path) {
    set_mode(which, in_mode);
    const torch::Tensor found = with_progress(
        data, [&](const auto& progress) { return embed(which, data, batch_size, progress); });
    const int64_t broken = found.isfinite().all(1).logical_not().sum().item<int64_t>();
    VERNIER_CHECK(broken == 0, path, " in mode ", to_string(in_mode),
                  " gives NaN or infinite values for ", broken, " of ", data.size(),
                  " samples: no metric can be computed");
    return found;
  };
  const torch::Tensor embeddings = embed_in(model, mode, options.model);
  if (options.metric == "spearman") return similarity_spearman(embeddings, data.scores());
  const torch::Tensor exact = embed_in(*reference, Mode::full, options.reference);
  VERNIER_CHECK(exact.sizes() == embeddings.sizes(), options.reference,
                " gives embeddings of another size");
  return options.metric == "sqnr" ? embedding_sqnr(embeddings, exact)
                                  : cosine_error(embeddings, exact);
}

double prediction_metric(const Options& options, TextModel& model, Mode mode, TextModel* reference,
                         const TokenDataset& data, int64_t batch_size) {
  set_mode(model, mode);
  if (reference) set_mode(*reference, Mode::full);
  const std::string what = "the metric " + options.metric;
  CausalLanguageModel& predicting = causal(model, what);
  return with_progress(data, [&](const auto& progress) {
    return options.metric == "perplexity"
               ? perplexity(predicting, data, batch_size, progress)
               : logits_kl(predicting, causal(*reference, what), data, batch_size, progress);
  });
}

int run(const Options& options) {
  const torch::Device device = options.common.chosen_device();
  const auto model = load_model(options.model, device, options.dtype.chosen());
  const bool quantized = !model->info.recipe.empty();
  const Mode mode = options.mode.empty() ? (quantized ? Mode::integer : Mode::full)
                                         : mode_from_string(options.mode);
  VERNIER_CHECK(quantized || mode == Mode::full, options.model, " is a float model: mode ",
                to_string(mode), " needs a quantized checkpoint");
  VERNIER_CHECK(mode != Mode::observe,
                "mode observe gathers statistics: use float, fake_quant or integer");
  const bool predicted = options.metric == "perplexity" || options.metric == "kl";
  const bool alone = options.metric == "spearman" || options.metric == "perplexity";
  VERNIER_CHECK(alone || !options.reference.empty(), "the metric ", options.metric,
                " needs the float model: give --reference");
  std::shared_ptr<TextModel> reference;
  if (!options.reference.empty()) reference = load_model(options.reference, device);
  TokenDataset data = options.data.open(reference ? reference.get() : model.get(),
                                        "the metric " + options.metric + " is of data");
  if (options.first > 0 || options.samples) data = data.share(options.first, options.samples);
  const int64_t batch_size = batch_size_for(*model, data, options.batch_size);

  const auto start = std::chrono::steady_clock::now();
  const double value = (predicted ? prediction_metric : embedding_metric)(
      options, *model, mode, alone ? nullptr : reference.get(), data, batch_size);
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  VERNIER_CHECK(!std::isnan(value), "the metric ", options.metric, " of ", options.model, " on ",
                data.name(), " is not a number: all scores, or all that they are held against, ",
                "are equal");
  if (options.common.json) {
    nlohmann::ordered_json json;
    json["command"] = "eval";
    json["model"] = options.model;
    json["mode"] = to_string(mode);
    json["dtype"] = options.dtype.dtype;
    json["metric"] = options.metric;
    json["value"] = value;
    json["samples"] = data.size();
    json["seconds"] = seconds;
    print_json(json);
  } else {
    print_table({{"metric", "mode", "value", "samples", "seconds"},
                 {options.metric, to_string(mode), fixed(value, predicted ? 6 : 4),
                  grouped(data.size()), fixed(seconds, 1)}});
  }
  return kDone;
}

}  // namespace

void add_eval(CLI::App& app, Action& action) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("eval", "one figure of a model, in any mode");
  command->add_option("--model", options->model, "Hugging Face folder or quantized checkpoint")
      ->required();
  options->data.add_to(*command, "what to run");
  command
      ->add_option("--metric", options->metric,
                   "spearman (x 100, of the cosines of pairs with their scores), perplexity, or "
                   "against --reference: cosine_error (mean difference of the cosines of pairs), "
                   "sqnr (dB), kl (mean divergence of next-token distributions, nats)")
      ->required()
      ->check(CLI::IsMember({"spearman", "cosine_error", "sqnr", "perplexity", "kl"}));
  command->add_option("--mode", options->mode,
                      "float, fake_quant or integer (default: what the model is)");
  command->add_option("--reference", options->reference,
                      "the float model, for cosine_error, sqnr and kl");
  command->add_option("--first", options->first, "first sample of a share of the data")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command->add_option("--samples", options->samples, "samples of the share (default: all)");
  command->add_option("--batch-size", options->batch_size,
                      "samples a batch (default: 64; of causal language models 8192 tokens)");
  options->dtype.add_to(*command);
  options->common.add_to(*command);
  command->callback([options, &action] { action = [options] { return run(*options); }; });
}

}  // namespace vernier::cli
