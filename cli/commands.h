// The program's commands. Each adds itself to the command line and leaves what is to be run in
// `action`.
#pragma once

#include <torch/types.h>
#include <vernier/recipes/comparison.h>
#include <vernier/recipes/recipe.h>
#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>

namespace vernier::cli {

/// What a command line asked for; returns the exit code.
using Action = std::function<int()>;

inline constexpr int kDone = 0;
inline constexpr int kBoundNotMet = 1;
inline constexpr int kWrongUse = 2;

void add_quantize(CLI::App& app, Action& action);
void add_calibrate(CLI::App& app, Action& action);
void add_export(CLI::App& app, Action& action);
void add_validate(CLI::App& app, Action& action);
void add_eval(CLI::App& app, Action& action);
void add_train(CLI::App& app, Action& action);
void add_inspect(CLI::App& app, Action& action);
void add_bench(CLI::App& app, Action& action);

// ---- What several commands share ----

/// --device and --json.
struct CommonOptions {
  std::string device = "auto";
  bool json = false;

  void add_to(CLI::App& command);
  /// Throws Error when the device is unknown or not there.
  torch::Device chosen_device() const;
};

/// --recipe, --calibrator and --percentile.
struct RecipeOptions {
  std::string recipe = "w8a8-static";
  std::optional<std::string> calibrator;
  std::optional<double> percentile;

  void add_to(CLI::App& command);
  Recipe load() const;
};

/// The first `samples` samples of the data through the model, with a progress bar; all where
/// absent.
ModelStatistics calibrate_on(TextModel& model, const TokenDataset& data,
                             std::optional<int64_t> samples);

/// A comparison with a progress bar.
Comparison compare_on(TextModel* reference, TextModel& quantized, const TokenDataset& data,
                      int64_t batch_size);

/// Loads a checkpoint onto a device, ready in mode integer. Throws Error where the path is no
/// checkpoint.
std::shared_ptr<TextModel> load_quantized(const std::filesystem::path& path, torch::Device device);

/// Throws Error when the statistics are not of this model or their run was interrupted.
void check_belongs(const ModelStatistics& statistics, const TextModel& model,
                   const std::filesystem::path& path);

/// Bytes of a checkpoint, or of all safetensors files of a folder.
int64_t model_bytes(const std::filesystem::path& path);

/// The figures of a comparison, flat; `tolerance` decides `passed`.
nlohmann::ordered_json comparison_json(const Comparison& comparison, double tolerance);
void print_comparison(const Comparison& comparison, double tolerance);

}  // namespace vernier::cli
