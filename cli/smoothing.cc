#include <vernier/cli/console.h>
#include <vernier/cli/smoothing.h>
#include <vernier/kernels/error.h>

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <system_error>

namespace vernier::cli {
namespace {

// 0.0123 with as many digits as tell something.
std::string significant(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g", value);
  return text;
}

std::string kept(const SmoothingChoice& choice) {
  if (choice.keep_low == choice.keep_high) return fixed(choice.keep_high, 2);
  return concat(fixed(choice.keep_low, 2), " ", fixed(choice.keep_high, 2));
}

}  // namespace

void SmoothingSearchOptions::add_to(CLI::App& command) {
  command
      .add_option("--passes", search.passes_per_group,
                  "end the search for alphas after so many forward passes a group")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command
      .add_option("--refine-steps", search.refine_steps,
                  "steps of gradient descent on all factors at the end of --alpha auto, at most")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command.add_option("--refine-rate", search.refine_rate, "their learning rate")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command
      .add_option("--refine-average", search.refine_average,
                  "take an average over steps, each counting this much less than the next")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 0.999));
  command.add_flag("--resume", resume, "go on with an interrupted search");
}

SmoothingRun SmoothingSearchOptions::run_of(const std::filesystem::path& state) const {
  SmoothingRun run;
  run.state = state;
  run.resume = resume;
  run.search = search;
  return run;
}

SmoothingResult smooth_on(TextModel& model, const Recipe& recipe, const TokenDataset& data,
                          SmoothingRun run) {
  const bool terminal = isatty(STDERR_FILENO) != 0;
  size_t width = 0;
  run.search.progress = [&](const std::string& step, double share) {
    if (!terminal) return;
    std::string line = concat("smoothing ", static_cast<int>(100 * share), " %: ", step);
    if (line.size() > 110) line.resize(110);
    width = std::max(width, line.size());
    line.resize(width, ' ');
    std::fprintf(stderr, "\r%s", line.c_str());
    std::fflush(stderr);
  };
  SmoothingResult result = smooth_model(model, recipe, data, run);
  if (width > 0) std::fprintf(stderr, "\r%s\r", std::string(width, ' ').c_str());
  return result;
}

SmoothingResult smooth_for(TextModel& model, const Recipe& recipe,
                           const std::filesystem::path& folder, const TokenDataset* data,
                           const SmoothingRun& run, bool own_calibrator) {
  if (is_smoothed(folder)) {
    const int64_t clipped = own_calibrator ? 0 : use_reported_clipping(model, folder);
    note(concat(folder.string(), " is smoothed already",
                clipped > 0 ? concat(": ", clipped, " layers keep the ranges found for it") : ""));
    return {};
  }
  if (recipe.smoothing.empty()) return {};
  VERNIER_CHECK(data, "recipe ", recipe.name, " smooths (", recipe.smoothing,
                "): give it data, or a folder of `vernier smoothquant`");
  SmoothingResult result = smooth_on(model, recipe, *data, run);
  if (result.groups.empty())
    note("smoothing: no quantized layer of this model reads what a factor could change");
  else if (!result.metric.empty())
    note(concat("smoothing: ", result.groups.size(), " groups, loss ",
                significant(result.before.held_out), " before, ",
                significant(result.after.held_out), " after on samples held out, ",
                fixed(result.passes, 0), " forward passes"));
  return result;
}

void forget_state(const SmoothingRun& run) {
  std::error_code ignored;
  if (!run.state.empty()) std::filesystem::remove(run.state, ignored);
}

nlohmann::ordered_json smoothing_json(const SmoothingResult& result) {
  const nlohmann::json plain = result;
  nlohmann::ordered_json json;
  json["alpha"] = result.method;
  for (const char* field : {"metric", "before", "after", "refined", "passes", "curve", "groups"})
    json[field] = plain.at(field);
  return json;
}

void print_smoothing(const SmoothingResult& result) {
  const bool searched = !result.metric.empty();
  std::vector<std::vector<std::string>> rows = {{"group", "alpha"}};
  if (searched)
    for (const char* heading : {"range kept", "error before", "error after"})
      rows.front().emplace_back(heading);
  for (const SmoothedGroup& group : result.groups) {
    rows.push_back({group.name, group.choice.alpha ? fixed(*group.choice.alpha, 3) : "none"});
    if (!searched) continue;
    rows.back().push_back(kept(group.choice));
    rows.back().push_back(significant(group.error_before));
    rows.back().push_back(significant(group.error_after));
  }
  print_table(rows);
  if (!searched) return;
  note(concat(result.metric == "kl" ? "KL divergence from the float model, nats a token: "
                                    : "squared error of the outputs, share: ",
              significant(result.before.proposing), " before, ",
              significant(result.after.proposing), " after; on the samples held out ",
              significant(result.before.held_out), " before, ", significant(result.after.held_out),
              " after"));
  note(concat(fixed(result.passes, 0), " forward passes over the data, ",
              fixed(result.passes / static_cast<double>(result.groups.size()), 1), " a group",
              result.refined ? "; factors refined from these alphas" : ""));
}

}  // namespace vernier::cli
