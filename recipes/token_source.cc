#include <vernier/kernels/error.h>
#include <vernier/recipes/generation.h>
#include <vernier/recipes/token_source.h>

#include <algorithm>

namespace vernier {
namespace {

constexpr int64_t kMostWindows = 1'000'000;
const std::string kSelf = "self";

struct Source {
  std::string file;       // empty: none
  std::string own;        // "self" or "self:N" as it was written; empty: none
  int64_t own_count = 0;  // windows of the model
};

Source parse(const std::string& spec) {
  Source source;
  const size_t plus = spec.rfind('+');
  const std::string last = plus == std::string::npos ? spec : spec.substr(plus + 1);
  if (last != kSelf && !last.starts_with(kSelf + ":")) {
    source.file = spec;
    return source;
  }
  if (plus != std::string::npos) {
    source.file = spec.substr(0, plus);
    VERNIER_CHECK(!source.file.empty(), "'", spec, "' names no file before the '+'");
  }
  source.own = last;
  source.own_count = WindowOptions{}.count;
  if (last.size() > kSelf.size()) {
    const std::string count = last.substr(kSelf.size() + 1);
    const bool number = !count.empty() && count.size() < 8 &&
                        count.find_first_not_of("0123456789") == std::string::npos;
    source.own_count = number ? std::stoll(count) : 0;
    VERNIER_CHECK(source.own_count >= 1 && source.own_count <= kMostWindows, "'", spec,
                  "': after self: stands how many windows are sampled, 1 to ", kMostWindows);
  }
  return source;
}

}  // namespace

bool samples_the_model(const std::string& spec) { return parse(spec).own_count > 0; }

TokenDataset open_tokens(const std::string& spec, TextModel* model,
                         const TokenSourceOptions& options,
                         const std::function<void(int64_t, int64_t)>& progress) {
  const Source source = parse(spec);
  std::optional<TokenDataset> data;
  if (!source.file.empty()) data = TokenDataset::open(source.file);
  if (source.own_count == 0) return std::move(*data);

  VERNIER_CHECK(model && model->info.recipe.empty(), "data '", spec,
                "' is sampled from a float model: give one");
  CausalLanguageModel& sampled = causal(*model, concat("sampling data ('", spec, "')"));
  WindowOptions windows;
  windows.count = source.own_count;
  windows.length = options.length.value_or(
      std::min(data ? data->longest_row() : windows.length, model->max_length()));
  windows.seed = options.seed;
  const int64_t total = windows.count * windows.length;
  TokenDataset own = TokenDataset::of_windows(sample_windows(sampled, windows,
                                                             [&](int64_t done) {
                                                               if (progress) progress(done, total);
                                                             }),
                                              source.own);
  if (!data) return own;
  data->append(own);
  return std::move(*data);
}

}  // namespace vernier
