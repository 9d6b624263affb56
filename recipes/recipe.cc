#include <fnmatch.h>
#include <vernier/kernels/error.h>
#include <vernier/recipes/builtin_recipes.h>
#include <vernier/recipes/models/causal_lm.h>
#include <vernier/recipes/recipe.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>

namespace vernier {
namespace {

constexpr size_t kMaxYamlBytes = 1 << 20;

// One mapping of a recipe, read key by key so that a misspelt one is found.
class Fields {
 public:
  Fields(const YAML::Node& node, std::string where) : node_(node), where_(std::move(where)) {
    VERNIER_CHECK(node.IsMap(), where_, " must be a mapping of fields");
    for (const auto& item : node) left_.insert(item.first.as<std::string>());
  }

  template <typename T>
  T get(const std::string& field, const T& otherwise) {
    left_.erase(field);
    const YAML::Node value = node_[field];
    if (!value) return otherwise;
    try {
      return value.as<T>();
    } catch (const YAML::Exception&) {
      throw Error(concat(where_, ": the value of '", field, "' is of the wrong kind"));
    }
  }

  YAML::Node node(const std::string& field) {
    left_.erase(field);
    return node_[field];
  }

  void done() const {
    VERNIER_CHECK(left_.empty(), where_, ": unknown field '", *left_.begin(), "'");
  }

 private:
  YAML::Node node_;
  std::string where_;
  std::set<std::string> left_;
};

// `base`: what fields that are not given are.
QuantizerSettings parse_settings(const YAML::Node& node, const std::string& where,
                                 const QuantizerSettings& base) {
  Fields fields(node, where);
  QuantizerSettings settings;
  const NumberFormat format =
      number_format_from_string(fields.get<std::string>("format", to_string(base.scheme.format)));
  const int bits = fields.get("bits", base.scheme.bits);
  const Granularity granularity = granularity_from_string(
      fields.get<std::string>("granularity", to_string(base.scheme.granularity)));
  VERNIER_CHECK(bits >= 2 && bits <= 8, where, ": bits must be 2 to 8, not ", bits);
  const bool symmetric = fields.get("symmetric", base.scheme.symmetric);
  settings.scheme = symmetric_scheme(bits, granularity,
                                     fields.get<int64_t>("group_size", base.scheme.group_size));
  const bool as_base = bits == base.scheme.bits && symmetric == base.scheme.symmetric;
  settings.scheme.narrow_range =
      fields.get("narrow_range", as_base ? base.scheme.narrow_range : settings.scheme.narrow_range);
  settings.scheme.format = format;
  if (!symmetric) settings.scheme.symmetric = settings.scheme.narrow_range = false;
  settings.scheme.dynamic = granularity == Granularity::per_token;
  settings.calibrator.method = calibration_method_from_string(
      fields.get<std::string>("calibrator", to_string(base.calibrator.method)));
  settings.calibrator.percentile = fields.get("percentile", base.calibrator.percentile);
  VERNIER_CHECK(settings.calibrator.percentile > 0 && settings.calibrator.percentile <= 100, where,
                ": percentile must be in (0, 100], not ", settings.calibrator.percentile);
  VERNIER_CHECK(
      !settings.scheme.is_fp8() || settings.calibrator.method != CalibrationMethod::entropy, where,
      ": the entropy calibrator is for int: use min_max, percentile or mse");
  VERNIER_CHECK(settings.calibrator.method != CalibrationMethod::lsq ||
                    (symmetric && !settings.scheme.is_fp8()),
                where, ": the lsq calibrator is for symmetric int: use min_max, percentile or mse");
  settings.policy =
      range_policy_from_string(fields.get<std::string>("ranges", to_string(base.policy)));
  settings.averaging = fields.get("averaging", base.averaging);
  fields.done();
  try {
    settings.check();
  } catch (const Error& error) {
    throw Error(concat(where, ": ", error.what()));
  }
  return settings;
}

// Throws Error where the integer kernels could not run a layer of such settings.
void check_runs(const QuantizerSettings& weights, const QuantizerSettings& activations,
                const std::string& where) {
  const Granularity rows = weights.scheme.granularity, inputs = activations.scheme.granularity;
  VERNIER_CHECK(weights.scheme.symmetric &&
                    (rows == Granularity::per_channel || rows == Granularity::per_tensor),
                where, ": weights must be symmetric and per_channel or per_tensor");
  VERNIER_CHECK(inputs == Granularity::per_tensor || inputs == Granularity::per_token, where,
                ": activations must be per_tensor (static) or per_token (dynamic)");
  VERNIER_CHECK(weights.scheme.is_fp8() == activations.scheme.is_fp8(), where,
                ": weights and activations must both be int or both e4m3 or e5m2");
}

EndLayers parse_first_last(const std::string& text, const std::string& source) {
  if (text.empty()) return EndLayers::as_others;
  if (text == "8") return EndLayers::bits8;
  VERNIER_CHECK(text == "float", source, ": first_last must be 8 or float, not '", text, "'");
  return EndLayers::full;
}

std::vector<LayerRule> parse_rules(const YAML::Node& node, const Recipe& recipe,
                                   const std::string& source) {
  std::vector<LayerRule> rules;
  if (!node) return rules;
  VERNIER_CHECK(node.IsSequence(), source, ": rules must be a list");
  for (const YAML::Node& item : node) {
    const std::string where = concat(source, ": rule ", rules.size() + 1);
    Fields fields(item, where);
    LayerRule rule;
    rule.match = fields.get<std::string>("match", rule.match);
    rule.type = fields.get<std::string>("type", "");
    rule.quantize = fields.get("quantize", true);
    if (const YAML::Node weights = fields.node("weights"))
      rule.weights = parse_settings(weights, where + ": weights", recipe.weights);
    if (const YAML::Node activations = fields.node("activations"))
      rule.activations = parse_settings(activations, where + ": activations", recipe.activations);
    fields.done();
    VERNIER_CHECK(rule.match != "*" || !rule.type.empty(), where,
                  " matches every layer: give a name to 'match' or a 'type'");
    check_runs(rule.weights.value_or(recipe.weights), rule.activations.value_or(recipe.activations),
               where);
    rules.push_back(std::move(rule));
  }
  return rules;
}

std::string known_names() {
  std::string known;
  for (const std::string& name : recipe_names()) known += concat(known.empty() ? "" : ", ", name);
  return known;
}

}  // namespace

std::vector<std::string> recipe_names() {
  std::vector<std::string> names;
  for (const auto& [name, yaml] : builtin_recipes()) names.push_back(name);
  return names;
}

Recipe parse_recipe(const std::string& yaml, const std::string& source) {
  YAML::Node root;
  try {
    root = YAML::Load(yaml);
  } catch (const YAML::Exception& error) {
    throw Error(concat(source, " is not valid YAML: line ", error.mark.line + 1, ": ", error.msg));
  }
  try {
    Fields fields(root, source);
    Recipe recipe;
    recipe.name = fields.get<std::string>("name", "");
    VERNIER_CHECK(!recipe.name.empty(), source, ": a recipe needs a name");
    recipe.description = fields.get<std::string>("description", "");
    recipe.skip = fields.get<std::vector<std::string>>("skip", {});
    const YAML::Node weights = fields.node("weights"), activations = fields.node("activations");
    VERNIER_CHECK(weights && activations, source, " needs both 'weights' and 'activations'");
    QuantizerSettings base;
    base.scheme = symmetric_scheme(8, Granularity::per_channel);
    recipe.weights = parse_settings(weights, source + ": weights", base);
    base.scheme = symmetric_scheme(8, Granularity::per_tensor);
    recipe.activations = parse_settings(activations, source + ": activations", base);
    check_runs(recipe.weights, recipe.activations, source);
    recipe.first_last = parse_first_last(fields.get<std::string>("first_last", ""), source);
    recipe.rules = parse_rules(fields.node("rules"), recipe, source);
    fields.done();
    return recipe;
  } catch (const YAML::Exception& error) {
    throw Error(concat(source, ": ", error.what()));
  }
}

Recipe load_recipe(const std::string& name_or_path) {
  for (const auto& [name, yaml] : builtin_recipes())
    if (name == name_or_path) return parse_recipe(yaml, "recipe " + name);
  const std::filesystem::path path = name_or_path;
  VERNIER_CHECK(path.extension() == ".yaml" || path.extension() == ".yml", "unknown recipe '",
                name_or_path, "': use ", known_names(), ", or the path of a .yaml file");
  std::ifstream in(path, std::ios::binary);
  VERNIER_CHECK(in, path.string(), " cannot be read: use ", known_names(),
                ", or the path of a .yaml file");
  std::string text(kMaxYamlBytes + 1, '\0');
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(in.gcount()));
  VERNIER_CHECK(text.size() <= kMaxYamlBytes, path.string(), " is too large for a recipe");
  return parse_recipe(text, path.string());
}

Recipe with_defaults(const Recipe& recipe, const torch::nn::Module& model) {
  Recipe result = recipe;
  const auto* predicting = dynamic_cast<const CausalLanguageModel*>(&model);
  const std::string output = predicting ? predicting->output_layer() : "";
  const auto names_it = [&](const LayerRule& rule) {
    return rule.match != "*" && fnmatch(rule.match.c_str(), output.c_str(), 0) == 0;
  };
  if (!output.empty() && std::none_of(recipe.rules.begin(), recipe.rules.end(), names_it))
    result.skip.push_back(output);
  return result;
}

void apply_recipe(const torch::nn::Module& model, const Recipe& recipe) {
  try {
    apply_rules(model, with_defaults(recipe, model));
  } catch (const Error& error) {
    throw Error(concat("recipe ", recipe.name, ": ", error.what()));
  }
}

void check_statistics(const ModelStatistics& statistics) {
  for (const auto& [name, site] : statistics.sites) {
    const Histogram& histogram = site.histogram;
    VERNIER_CHECK(histogram.nans() + histogram.infinities() == 0, "layer '", name, "' was given ",
                  histogram.nans(), " NaN and ", histogram.infinities(), " infinite values out of ",
                  histogram.total(), ": check the data, and the model's weights for overflow");
  }
}

void calibrate_layers(const torch::nn::Module& model, const ModelStatistics& statistics) {
  check_statistics(statistics);
  for (const auto& [name, layer] : quantized_layers(model)) {
    if (!layer->quantized()) continue;
    try {
      for (const auto& [what, quantizer] : layer->quantizers()) {
        if (quantizer->operand() == Operand::weight) {
          quantizer->calibrate(layer->float_weight());
          continue;
        }
        if (quantizer->scheme().dynamic) continue;
        const auto site = statistics.sites.find(site_name(name, what));
        VERNIER_CHECK(site != statistics.sites.end() && site->second.histogram.total() > 0,
                      "it was never reached by the calibration data: calibrate with data that uses "
                      "it, or skip it");
        const auto inputs = layer->input_channels();
        const size_t channels = site->second.channels.size();
        VERNIER_CHECK(what != "input" || !inputs || channels == static_cast<size_t>(*inputs),
                      "its statistics have ", channels, " channels and it has ", *inputs,
                      " inputs: calibrate this model");
        quantizer->calibrate(site->second);
      }
    } catch (const Error& error) {
      throw Error(concat("layer '", name, "': ", error.what()));
    }
  }
}

}  // namespace vernier
