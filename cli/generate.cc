#include <vernier/cli/commands.h>
#include <vernier/cli/console.h>
#include <vernier/cli/tokenizer.h>
#include <vernier/kernels/error.h>
#include <vernier/recipes/generation.h>

#include <charconv>
#include <iostream>

namespace vernier::cli {
namespace {

namespace fs = std::filesystem;

struct Options {
  CommonOptions common;
  DtypeOption dtype;
  GenerationOptions generation;
  std::string model, mode, data, tokenizer, cache = "full";
  std::vector<std::string> prompts, prompt_ids;
  std::optional<int64_t> samples, prompt_length;
  std::vector<int64_t> stop;
  bool ignore_stop = false;
};

// "1,2,3" as numbers.
std::vector<int64_t> parse_ids(const std::string& text) {
  std::vector<int64_t> ids;
  const char* at = text.data();
  const char* const end = at + text.size();
  while (true) {
    int64_t id = 0;
    const auto [next, error] = std::from_chars(at, end, id);
    VERNIER_CHECK(error == std::errc() && (next == end || *next == ','), "--prompt-ids '", text,
                  "' must be token ids with commas between them, such as 1,2,3");
    ids.push_back(id);
    if (next == end) return ids;
    at = next + 1;
  }
}

std::string ids_text(const std::vector<int64_t>& ids) {
  std::string text;
  for (const int64_t id : ids) text += concat(text.empty() ? "" : ",", id);
  return text;
}

// The rows of a file, cut to a length.
std::vector<std::vector<int64_t>> rows_of(const Options& options, const TextModel& model) {
  TokenDataset data = TokenDataset::open(options.data);
  if (options.samples) data = data.share(0, options.samples);
  auto rows = data.read(0, data.size(), model.vocabulary(), data.longest_row());
  if (!options.prompt_length) return rows;
  VERNIER_CHECK(*options.prompt_length >= 1, "--prompt-length must be at least 1");
  for (auto& row : rows)
    row.resize(std::min<size_t>(row.size(), static_cast<size_t>(*options.prompt_length)));
  return rows;
}

// Where the tokenizer of a model is, for prompts that are text.
std::string tokenizer_of(const Options& options) {
  if (!options.tokenizer.empty()) return options.tokenizer;
  VERNIER_CHECK(fs::is_directory(options.model), options.model,
                " has no tokenizer: give the folder of one with --tokenizer, or ids with "
                "--prompt-ids");
  return options.model;
}

double rate(int64_t tokens, double seconds) {
  return seconds > 0 ? static_cast<double>(tokens) / seconds : 0;
}

void report(const Options& options, const std::string& device, Mode mode,
            const std::vector<std::vector<int64_t>>& prompts, const Generation& result,
            const std::vector<std::string>& texts) {
  const double prefill = rate(result.prompt_tokens, result.prefill_seconds);
  const double decode = rate(result.decoded_tokens, result.decode_seconds);
  if (options.common.json) {
    nlohmann::ordered_json json;
    json["command"] = "generate";
    json["model"] = options.model;
    json["mode"] = to_string(mode);
    json["dtype"] = options.dtype.dtype;
    json["device"] = device;
    json["results"] = nlohmann::ordered_json::array();
    for (size_t i = 0; i < prompts.size(); ++i) {
      nlohmann::ordered_json item;
      item["prompt_ids"] = prompts[i];
      item["ids"] = result.tokens[i];
      if (!texts.empty()) item["text"] = texts[i];
      json["results"].push_back(std::move(item));
    }
    json["prompt_tokens"] = result.prompt_tokens;
    json["new_tokens"] = result.new_tokens;
    json["prefill_seconds"] = result.prefill_seconds;
    json["decode_seconds"] = result.decode_seconds;
    json["prefill_tokens_per_second"] = prefill;
    json["decode_tokens_per_second"] = decode;
    print_json(json);
    return;
  }
  for (size_t i = 0; i < prompts.size(); ++i)
    std::cout << (texts.empty() ? ids_text(result.tokens[i]) : texts[i]) << '\n';
  std::cout << std::flush;
  note(concat("prefill: ", grouped(result.prompt_tokens), " tokens, ", fixed(prefill, 1),
              " a second; decode: ", grouped(result.decoded_tokens), " tokens, ", fixed(decode, 1),
              " a second"));
}

int run(const Options& options) {
  const torch::Device device = options.common.chosen_device();
  const int sources = !options.prompts.empty() + !options.prompt_ids.empty() +
                      static_cast<int>(!options.data.empty());
  VERNIER_CHECK(sources <= 1, "give prompts as one of --prompt, --prompt-ids and --data");
  VERNIER_CHECK(!options.data.empty() || !(options.samples || options.prompt_length),
                "--samples and --prompt-length go with --data");
  VERNIER_CHECK(!options.ignore_stop || options.stop.empty(),
                "--eos and --ignore-eos contradict each other");
  const bool text = !options.prompts.empty() || !options.tokenizer.empty();
  std::vector<std::vector<int64_t>> prompts;
  for (const std::string& ids : options.prompt_ids) prompts.push_back(parse_ids(ids));
  if (!options.prompts.empty()) prompts = encode_texts(tokenizer_of(options), options.prompts);

  const auto model = load_model(options.model, device, options.dtype.chosen());
  CausalLanguageModel& predicting = causal(*model, "generation");
  const bool quantized = !model->info.recipe.empty();
  const Mode mode = options.mode.empty() ? (quantized ? Mode::integer : Mode::full)
                                         : mode_from_string(options.mode);
  VERNIER_CHECK(mode != Mode::observe,
                "mode observe gathers statistics: use float, fake_quant "
                "or integer");
  VERNIER_CHECK(quantized || mode == Mode::full, options.model, " is a float model: mode ",
                to_string(mode), " needs a quantized checkpoint");
  set_mode(*model, mode);
  if (!options.data.empty()) prompts = rows_of(options, *model);
  if (prompts.empty()) prompts = {{predicting.start_token()}};

  GenerationOptions generation = options.generation;
  generation.cache = cache_format_from_string(options.cache);
  if (!options.ignore_stop)
    generation.stop = options.stop.empty() ? stop_tokens(*model) : options.stop;
  Generation result;
  {
    Progress progress("generating tokens",
                      static_cast<int64_t>(prompts.size()) * generation.max_tokens);
    result =
        generate(predicting, prompts, generation, [&](int64_t done) { progress.update(done); });
  }
  std::vector<std::string> texts;
  if (text) texts = decode_ids(tokenizer_of(options), result.tokens);
  report(options, device.str(), mode, prompts, result, texts);
  return kDone;
}

}  // namespace

void add_generate(CLI::App& app, Action& action) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("generate", "continue prompts with a causal language model");
  command->add_option("--model", options->model, "Hugging Face folder or quantized checkpoint")
      ->required();
  command->add_option("--mode", options->mode,
                      "float, fake_quant or integer (default: what the model is)");
  command->add_option("--prompt", options->prompts,
                      "texts to continue (default: the start token alone)");
  command->add_option("--prompt-ids", options->prompt_ids, "the same as token ids: 1,2,3");
  command->add_option("--data", options->data, "the same from the rows of an HDF5 file");
  command->add_option("--samples", options->samples, "with --data: only the first so many rows");
  command->add_option("--prompt-length", options->prompt_length,
                      "with --data: only the first so many tokens of each row");
  command->add_option("--tokenizer", options->tokenizer,
                      "folder with the tokenizer.json that makes ids of texts and texts of ids "
                      "(default with --prompt: the model's)");
  GenerationOptions& generation = options->generation;
  command->add_option("--max-tokens", generation.max_tokens, "new tokens for each prompt")
      ->capture_default_str();
  command
      ->add_option("--temperature", generation.sampling.temperature,
                   "0: the likeliest token; above: sampling")
      ->capture_default_str();
  command->add_option("--top-k", generation.sampling.top_k,
                      "sample from the k likeliest tokens (0: all)");
  command->add_option("--top-p", generation.sampling.top_p,
                      "sample from the likeliest tokens that together have this probability");
  command->add_option("--seed", generation.seed, "of sampling")->capture_default_str();
  command->add_option("--eos", options->stop,
                      "tokens that end a text (default: eos_token_id of the configuration)");
  command->add_flag("--ignore-eos", options->ignore_stop, "go on to --max-tokens");
  command
      ->add_option("--kv-cache", options->cache,
                   "full: in the model's dtype; int8: a scale for every token and head")
      ->capture_default_str()
      ->check(CLI::IsMember({"full", "int8"}));
  command->add_option("--batch-size", generation.batch_size, "prompts of equal length at a time")
      ->capture_default_str();
  options->dtype.add_to(*command);
  options->common.add_to(*command);
  command->callback([options, &action] { action = [options] { return run(*options); }; });
}

}  // namespace vernier::cli
