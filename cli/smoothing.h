// Smoothing as the commands show it: options, progress, a table and JSON.
#pragma once

#include <vernier/recipes/smoothing.h>
#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <cstdint>
#include <filesystem>
#include <string>

namespace vernier::cli {

/// What a user may say of a search.
struct SmoothingSearchOptions {
  SearchOptions search;
  bool resume = false;

  void add_to(CLI::App& command);
  /// A run that keeps its state in `state`.
  SmoothingRun run_of(const std::filesystem::path& state) const;
};

/// smooth_model() with its progress on stderr.
SmoothingResult smooth_on(TextModel& model, const Recipe& recipe, const TokenDataset& data,
                          SmoothingRun run);

/// What is to be done about smoothing before a model of a folder, to which the recipe was applied,
/// is calibrated: where `vernier smoothquant` wrote the folder, its clipping is taken over (not
/// where `own_calibrator`), else the recipe's smoothing is run on the data. Says on stderr what it
/// did. Throws Error as smooth_model(), and where it needs data and `data` is null.
SmoothingResult smooth_for(TextModel& model, const Recipe& recipe,
                           const std::filesystem::path& folder, const TokenDataset* data,
                           const SmoothingRun& run, bool own_calibrator = false);

/// Removes the state of a search whose result has been written.
void forget_state(const SmoothingRun& run);

/// Groups with alpha, clipping and errors before and after, and the losses.
nlohmann::ordered_json smoothing_json(const SmoothingResult& result);
void print_smoothing(const SmoothingResult& result);

}  // namespace vernier::cli
