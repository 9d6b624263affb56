// The program's commands. Each adds itself to the command line and leaves what is to be run in
// `action`.
#pragma once

#include <torch/types.h>
#include <vernier/recipes/comparison.h>
#include <vernier/recipes/recipe.h>
#include <vernier/recipes/token_source.h>
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
void add_generate(CLI::App& app, Action& action);
void add_inspect(CLI::App& app, Action& action);
void add_smoothquant(CLI::App& app, Action& action);
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

/// --dtype, of a model that runs.
struct DtypeOption {
  std::string dtype = "float32";

  void add_to(CLI::App& command);
  torch::Dtype chosen() const;
};

/// --data and what goes with data that a model makes itself.
struct DataOptions {
  std::string data;  ///< as of open_tokens(); may be empty
  std::optional<int64_t> window_length;
  uint64_t seed = 0;

  /// `help` says what the data is for.
  CLI::Option* add_to(CLI::App& command, const std::string& help);

  /// What --data names, or `self` in its place where it is absent and the model is a float causal
  /// language model; with a progress bar while windows are sampled. `model` may be null. Throws
  /// Error as open_tokens(), and where there is neither data nor such a model, saying what
  /// `needed_by` needs it.
  TokenDataset open(TextModel* model, const std::string& needed_by) const;
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

/// Loads a float folder or a checkpoint onto a device; a checkpoint is ready in mode integer.
std::shared_ptr<TextModel> load_model(const std::filesystem::path& path, torch::Device device,
                                      torch::Dtype dtype = torch::kFloat);

/// load_model() of a checkpoint. Throws Error where the path is a folder.
std::shared_ptr<TextModel> load_quantized(const std::filesystem::path& path, torch::Device device);

/// Loads the float model that another was made from onto its device. Throws Error when it is
/// another one or no float model.
std::shared_ptr<TextModel> load_reference(const std::filesystem::path& path,
                                          const TextModel& quantized, torch::Device device);

/// The samples a batch takes: what was asked for, else by the kind of model.
int64_t batch_size_for(const TextModel& model, const TokenDataset& data,
                       std::optional<int64_t> asked);

/// Throws Error when the statistics are not of this model or their run was interrupted.
void check_belongs(const ModelStatistics& statistics, const TextModel& model,
                   const std::filesystem::path& path);

/// Bytes of a checkpoint, or of all safetensors files of a folder.
int64_t model_bytes(const std::filesystem::path& path);

/// The figures of a comparison, flat; `tolerance` decides `passed`.
nlohmann::ordered_json comparison_json(const Comparison& comparison, double tolerance);
void print_comparison(const Comparison& comparison, double tolerance);

}  // namespace vernier::cli
