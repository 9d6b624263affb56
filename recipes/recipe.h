// Recipes: what a user picks by name to say how a model is quantized.
#pragma once

#include <vernier/calibration/statistics_file.h>
#include <vernier/qat/prepare.h>

#include <string>
#include <vector>

namespace vernier {

/// How the layers of a model are quantized. As YAML (docs/recipes.md):
///
///     name: w4a8
///     description: one line
///     weights:     {bits: 4, granularity: per_channel, calibrator: mse, ranges: learned}
///     activations: {bits: 8, granularity: per_tensor, symmetric: false, calibrator: percentile,
///                   percentile: 99.99}
///     skip: ["lm_head", "*.pooler.*"]   # names that stay in full precision, * and ? as in a shell
///     first_last: 8                     # or float: what the first and the last layer get
///     rules:                            # exceptions by name and type; the first that matches
///       - {match: "*.attention.*", type: Linear, weights: {bits: 8}}
///
/// `format: e4m3` or `e5m2` in place of `bits` makes FP8 codes, of weights and activations both.
struct Recipe : QuantizationRules {
  std::string name;
  std::string description;
};

/// Names of the built-in recipes.
std::vector<std::string> recipe_names();

/// A built-in recipe by name, or a YAML file by its path. Throws Error for an unknown name (lists
/// the known ones), a field that is unknown or out of range, or settings that the integer kernels
/// cannot run.
Recipe load_recipe(const std::string& name_or_path);

/// The recipe written in YAML; `source` names it in errors.
Recipe parse_recipe(const std::string& yaml, const std::string& source);

/// The recipe as it applies to a model: the layer that makes a causal language model's logits stays
/// in full precision (`skip`) unless a rule names it. Where the embedding makes them there is none.
Recipe with_defaults(const Recipe& recipe, const torch::nn::Module& model);

/// Gives every layer its settings (apply_rules), with_defaults(). Throws Error, naming the recipe,
/// when a pattern of `skip` or a rule matches no layer.
void apply_recipe(const torch::nn::Module& model, const Recipe& recipe);

/// Chooses all scales of a model to which a recipe was applied: weights from themselves, static
/// activations from the statistics. Throws Error naming the layer when it has no statistics, was
/// never reached or saw NaN or Inf, and when the statistics are of another model.
void calibrate_layers(const torch::nn::Module& model, const ModelStatistics& statistics);

/// Throws Error naming the first site that saw NaN or infinite values, or none at all though it is
/// quantized statically.
void check_statistics(const ModelStatistics& statistics);

}  // namespace vernier
