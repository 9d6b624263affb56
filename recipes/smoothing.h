// Smoothing a text model before it is quantized, and what is kept of it.
#pragma once

#include <vernier/calibration/statistics_file.h>
#include <vernier/recipes/models/text_model.h>
#include <vernier/recipes/recipe.h>
#include <vernier/recipes/token_dataset.h>
#include <vernier/smoothquant/search.h>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

namespace vernier {

struct SmoothingRun {
  std::optional<int64_t> batch_size;  ///< samples; default: by the kind of model
  bool folded_only = false;  ///< leaves out groups whose factors a float folder has no place for
  /// Where the search keeps its state, for `resume`; empty: nowhere.
  std::filesystem::path state;
  bool resume = false;  ///< go on from the state, where there is one
  SearchOptions search;
};

/// Smooths a model to which the recipe was applied, as recipe.smoothing says: by one alpha from the
/// channel maxima over the data, or by search_smoothing() on two halves of the data, each other
/// sample (pair of samples) proposing. Causal models are compared by their logits, others by their
/// normalized sentence embeddings. Factors stand in the weights, or in pre_scale, and found
/// clipping in the calibrators of static activations, afterwards: calibrating the model on the same
/// data then quantizes what was found. Where nothing is to be smoothed, groups are empty.
///
/// Throws Error as search_smoothing() and TokenDataset::read, and when the state is of another
/// model, data, recipe or options.
SmoothingResult smooth_model(TextModel& model, const Recipe& recipe, const TokenDataset& data,
                             const SmoothingRun& run = {});

/// The same by one alpha from statistics of the model. Throws Error when recipe.smoothing asks for
/// a search, and when the statistics lack a layer or its channel maxima.
SmoothingResult smooth_model(TextModel& model, const Recipe& recipe,
                             const ModelStatistics& statistics, const SmoothingRun& run = {});

/// The report of a smoothed folder: `smoothquant.json` in it.
void save_smoothing_report(const SmoothingResult& result, const Recipe& recipe,
                           const std::filesystem::path& folder);

/// Whether a folder holds such a report.
bool is_smoothed(const std::filesystem::path& folder);

/// Gives the layers of a model, to which a recipe was applied, the clipping that the report in the
/// folder it was loaded from holds, where it was found for activations of their scheme. Returns the
/// number of layers; 0 without a report. Throws Error when the report is damaged or of another
/// model.
int64_t use_reported_clipping(TextModel& model, const std::filesystem::path& folder);

}  // namespace vernier
