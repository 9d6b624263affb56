#include <vernier/cli/commands.h>
#include <vernier/cli/console.h>
#include <vernier/kernels/error.h>

#include <chrono>
#include <cmath>

namespace vernier::cli {
namespace {

struct Options {
  CommonOptions common;
  std::string model, reference, data, metric, mode;
  int64_t batch_size = 64;
};

int run(const Options& options) {
  const torch::Device device = options.common.chosen_device();
  const TokenDataset data = TokenDataset::open(options.data);
  const auto model = load_text_model(options.model);
  const bool quantized = !model->info.recipe.empty();
  const Mode mode = options.mode.empty() ? (quantized ? Mode::integer : Mode::full)
                                         : mode_from_string(options.mode);
  VERNIER_CHECK(quantized || mode == Mode::full, options.model, " is a float model: mode ",
                to_string(mode), " needs a quantized checkpoint");
  VERNIER_CHECK(mode != Mode::observe,
                "mode observe gathers statistics: use float, fake_quant or integer");
  const bool scored = options.metric == "spearman";
  VERNIER_CHECK(scored || !options.reference.empty(), "the metric ", options.metric,
                " needs the float model: give --reference");
  VERNIER_CHECK(options.metric == "sqnr" || data.pairs(), "the metric ", options.metric,
                " needs pairs: groups 'a' and 'b' in ", options.data);

  const auto embed_in = [&](TextModel& which, Mode in_mode, const std::string& path) {
    which.to(device);
    set_mode(which, Mode::full);
    set_mode(which, in_mode);
    Progress progress("evaluating", data.size());
    const torch::Tensor found =
        embed(which, data, options.batch_size, [&](int64_t done) { progress.update(done); });
    const int64_t broken = found.isfinite().all(1).logical_not().sum().item<int64_t>();
    VERNIER_CHECK(broken == 0, path, " in mode ", to_string(in_mode),
                  " gives NaN or infinite values for ", broken, " of ", data.size(),
                  " samples: no metric can be computed");
    return found;
  };
  const auto start = std::chrono::steady_clock::now();
  const torch::Tensor embeddings = embed_in(*model, mode, options.model);
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  double value = 0;
  if (scored) {
    value = similarity_spearman(embeddings, data.scores());
  } else {
    const auto reference = load_text_model(options.reference);
    const torch::Tensor exact = embed_in(*reference, Mode::full, options.reference);
    VERNIER_CHECK(exact.sizes() == embeddings.sizes(), options.reference,
                  " gives embeddings of another size");
    value = options.metric == "sqnr" ? embedding_sqnr(embeddings, exact)
                                     : cosine_error(embeddings, exact);
  }
  VERNIER_CHECK(!std::isnan(value), "the metric ", options.metric, " of ", options.model, " on ",
                options.data, " is not a number: all scores, or all that they are held against, ",
                "are equal");
  if (options.common.json) {
    nlohmann::ordered_json json;
    json["command"] = "eval";
    json["model"] = options.model;
    json["mode"] = to_string(mode);
    json["metric"] = options.metric;
    json["value"] = value;
    json["samples"] = data.size();
    json["seconds"] = seconds;
    print_json(json);
  } else {
    print_table({{"metric", "mode", "value", "samples", "seconds"},
                 {options.metric, to_string(mode), fixed(value, 4), grouped(data.size()),
                  fixed(seconds, 1)}});
  }
  return kDone;
}

}  // namespace

void add_eval(CLI::App& app, Action& action) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("eval", "one figure of a model, in any mode");
  command->add_option("--model", options->model, "Hugging Face folder or quantized checkpoint")
      ->required();
  command->add_option("--data", options->data, "data to run, HDF5")->required();
  command
      ->add_option("--metric", options->metric,
                   "spearman (x 100, of the cosines of pairs with their scores), or against "
                   "--reference: cosine_error (mean "
                   "difference of the cosines of pairs), sqnr (dB)")
      ->required()
      ->check(CLI::IsMember({"spearman", "cosine_error", "sqnr"}));
  command->add_option("--mode", options->mode,
                      "float, fake_quant or integer (default: what the model is)");
  command->add_option("--reference", options->reference,
                      "the float model, for cosine_error and sqnr");
  command->add_option("--batch-size", options->batch_size, "samples a batch")
      ->capture_default_str();
  options->common.add_to(*command);
  command->callback([options, &action] { action = [options] { return run(*options); }; });
}

}  // namespace vernier::cli
