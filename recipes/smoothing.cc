#include <torch/nn/functional/normalization.h>
#include <vernier/calibration/atomic_file.h>
#include <vernier/kernels/error.h>
#include <vernier/recipes/calibration_run.h>
#include <vernier/recipes/language_model.h>
#include <vernier/recipes/models/causal_lm.h>
#include <vernier/recipes/smoothing.h>
#include <vernier/smoothquant/folding.h>
#include <vernier/smoothquant/smoothing.h>
#include <nlohmann/json.hpp>

#include <fstream>
#include <map>
#include <set>

namespace vernier {
namespace {

using nlohmann::json;
using torch::Tensor;
namespace fs = std::filesystem;

constexpr const char* kReport = "smoothquant.json";
constexpr int64_t kEmbeddingBatch = 64;

std::vector<SmoothingGroup> groups_of(TextModel& model, bool folded_only) {
  std::vector<SmoothingGroup> groups = quantized_groups(model, model.smoothing_groups());
  if (folded_only) std::erase_if(groups, [](const SmoothingGroup& g) { return !g.producer; });
  return groups;
}

json read_json(const fs::path& path, const char* what) {
  std::ifstream in(path, std::ios::binary);
  VERNIER_CHECK(in, path.string(), " cannot be read");
  json value = json::parse(in, nullptr, /*allow_exceptions=*/false);
  VERNIER_CHECK(value.is_object(), path.string(), " is no ", what, ": remove it");
  return value;
}

void write_json(const json& value, const fs::path& path, int indent) {
  const std::string text = value.dump(indent) + "\n";
  AtomicFile file(path);
  file.write(text.data(), text.size());
  file.commit();
}

std::string describe(const QuantizerSettings& settings) {
  return concat(to_string(settings.scheme), " ", to_string(settings.calibrator.method), " ",
                settings.calibrator.percentile, " ", to_string(settings.policy));
}

// Batches of the samples that propose, then of those that decide.
struct Halves {
  std::vector<TokenBatch> batches;
  int64_t proposing = 0;
};

Halves halves_of(const TextModel& model, const TokenDataset& data, int64_t batch_size,
                 bool by_length) {
  VERNIER_CHECK(batch_size > 0, "the batch size must be at least 1, not ", batch_size);
  const torch::Device device = model.parameters().front().device();
  const auto samples = data.read(0, data.size(), model.vocabulary(), model.max_length());
  std::vector<std::vector<int64_t>> half[2];
  const size_t together = data.pairs() ? 2 : 1;
  for (size_t i = 0; i < samples.size(); ++i) half[(i / together) % 2].push_back(samples[i]);
  Halves halves;
  for (const auto& part : half) {
    std::vector<std::vector<int64_t>> index;
    if (by_length) {
      index = batches_by_length(part, batch_size);
    } else {
      for (size_t i = 0; i < part.size(); ++i) {
        if (i % static_cast<size_t>(batch_size) == 0) index.emplace_back();
        index.back().push_back(static_cast<int64_t>(i));
      }
    }
    for (const std::vector<int64_t>& members : index) {
      std::vector<std::vector<int64_t>> sequences;
      for (const int64_t member : members) sequences.push_back(part[member]);
      halves.batches.push_back(make_batch(sequences, device));
    }
    if (&part == &half[0]) halves.proposing = static_cast<int64_t>(halves.batches.size());
  }
  return halves;
}

SmoothingResult search(TextModel& model, const Recipe& recipe, const TokenDataset& data,
                       const SmoothingRun& run) {
  VERNIER_CHECK(data.size() >= (data.pairs() ? 4 : 2), data.name(),
                " has too few samples to search on: half of them propose and the other half has "
                "to agree");
  auto* language_model = dynamic_cast<CausalLanguageModel*>(&model);
  const int64_t batch_size =
      run.batch_size.value_or(language_model ? default_batch_size(data) : kEmbeddingBatch);
  // Padding is all the same to embeddings, but not to the time that long windows take.
  const Halves halves = halves_of(model, data, batch_size, language_model != nullptr);
  SearchedModel searched{model, halves.proposing,
                         static_cast<int64_t>(halves.batches.size()) - halves.proposing, nullptr,
                         nullptr};
  searched.run = [&](int64_t batch) {
    const TokenBatch& tokens = halves.batches.at(batch);
    const Tensor hidden = model.forward(tokens);
    if (language_model) return hidden;
    return torch::nn::functional::normalize(
        mean_pooling(hidden, tokens), torch::nn::functional::NormalizeFuncOptions().p(2).dim(1));
  };
  if (language_model)
    searched.logits = [language_model](const Tensor& rows) { return language_model->logits(rows); };

  SearchOptions options = run.search;
  options.per_group = recipe.smoothing != "auto-global";
  const json identity = {{"model", model.info.fingerprint},
                         {"data", data.fingerprint()},
                         {"samples", data.size()},
                         {"batch_size", batch_size},
                         {"smoothing", recipe.smoothing},
                         {"weights", describe(recipe.weights)},
                         {"activations", describe(recipe.activations)},
                         {"folded_only", run.folded_only},
                         {"passes_per_group", options.passes_per_group},
                         {"rounds", options.rounds},
                         {"sample_rows", options.sample_rows}};
  json before;
  if (!run.state.empty()) {
    if (run.resume && fs::exists(run.state)) {
      before = read_json(run.state, "state of a search");
      VERNIER_CHECK(before.contains("identity") && before["identity"] == identity,
                    run.state.string(),
                    " is of another model, data, recipe or options: remove it to start anew");
      options.resume = &before.at("state");
    }
    options.save = [&](const json& state) {
      write_json({{"identity", identity}, {"state", state}}, run.state, -1);
    };
  }
  return search_smoothing(searched, groups_of(model, run.folded_only), options);
}

}  // namespace

SmoothingResult smooth_model(TextModel& model, const Recipe& recipe, const TokenDataset& data,
                             const SmoothingRun& run) {
  if (recipe.smoothing.empty()) return {};
  SmoothingResult result;
  result.method = recipe.smoothing;
  if (groups_of(model, run.folded_only).empty()) return result;
  if (smoothing_alpha(recipe.smoothing)) {
    ModelStatistics statistics = plan_statistics(model, data, 0, data.size());
    collect_statistics(model, data, statistics, [&](const ModelStatistics& so_far) {
      if (run.search.progress)
        run.search.progress(
            concat(so_far.samples, " samples seen"),
            static_cast<double>(so_far.samples) / static_cast<double>(so_far.planned));
    });
    return smooth_model(model, recipe, statistics, run);
  }
  result = search(model, recipe, data, run);
  result.method = recipe.smoothing;
  return result;
}

SmoothingResult smooth_model(TextModel& model, const Recipe& recipe,
                             const ModelStatistics& statistics, const SmoothingRun& run) {
  const std::optional<double> alpha = smoothing_alpha(recipe.smoothing);
  VERNIER_CHECK(alpha, "smoothing '", recipe.smoothing,
                "' is searched on data, which statistics do not hold: give --data, or an alpha");
  SmoothingResult result;
  result.method = recipe.smoothing;
  const torch::NoGradGuard no_grad;
  FoldedFactors folded(model, groups_of(model, run.folded_only), run.search.storage);
  // All that can be wrong with the statistics comes before the first change.
  std::vector<Tensor> factors;
  for (size_t i = 0; i < folded.size(); ++i) {
    const SmoothingGroup& group = folded.group(i);
    const std::string& reader = group.readers.front();
    const auto site = statistics.sites.find(reader);
    VERNIER_CHECK(site != statistics.sites.end(), "the statistics have no layer '", reader,
                  "': calibrate this model");
    try {
      factors.push_back(folded.factors(i, channel_amax(site->second), *alpha));
    } catch (const Error& error) {
      throw Error(concat("layer '", reader, "': ", error.what()));
    }
    result.groups.push_back(
        {group.name, group.readers, group.producer.has_value(), {alpha, 1, 1}, 0, 0});
  }
  try {
    for (size_t i = 0; i < folded.size(); ++i) folded.set(i, factors[i]);
  } catch (...) {
    for (size_t i = 0; i < folded.size(); ++i) folded.set(i, Tensor());
    throw;
  }
  return result;
}

void save_smoothing_report(const SmoothingResult& result, const Recipe& recipe,
                           const fs::path& folder) {
  json report = result;
  report["format"] = "vernier-smoothing";
  report["recipe"] = recipe.name;
  report["activations"] = to_string(recipe.activations.scheme);
  write_json(report, folder / kReport, 2);
}

bool is_smoothed(const fs::path& folder) { return fs::exists(folder / kReport); }

int64_t use_reported_clipping(TextModel& model, const fs::path& folder) {
  const fs::path path = folder / kReport;
  if (!is_smoothed(folder)) return 0;
  const json report = read_json(path, "report of `vernier smoothquant`");
  SmoothingResult result;
  std::string activations;
  try {
    report.get_to(result);
    report.at("activations").get_to(activations);
  } catch (const json::exception& error) {
    throw Error(concat(path.string(), " is no report of `vernier smoothquant` (", error.what(),
                       "): remove it"));
  }
  if (result.metric.empty()) return 0;  // an alpha alone: the recipe's calibrators stand
  std::map<std::string, std::shared_ptr<QuantizedLayer>> layers;
  for (const NamedLayer& item : quantized_layers(model)) layers.emplace(item.name, item.layer);
  int64_t used = 0;
  for (const SmoothedGroup& group : result.groups) {
    for (const std::string& reader : group.readers) {
      const auto found = layers.find(reader);
      VERNIER_CHECK(found != layers.end() && found->second->input_quantizer, path.string(),
                    " names layer '", reader, "', which the model does not have");
      QuantizedLayer& layer = *found->second;
      QuantizerSettings settings = layer.input_quantizer->settings();
      if (!layer.quantized() || settings.scheme.dynamic ||
          to_string(settings.scheme) != activations)
        continue;
      settings.calibrator = Calibrator{};
      settings.calibrator.keep_low = group.choice.keep_low;
      settings.calibrator.keep_high = group.choice.keep_high;
      try {
        layer.input_quantizer->set_settings(settings);
      } catch (const Error& error) {
        throw Error(concat(path.string(), ": layer '", reader, "': ", error.what()));
      }
      ++used;
    }
  }
  return used;
}

}  // namespace vernier
