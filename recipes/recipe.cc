#include <fnmatch.h>
#include <vernier/kernels/error.h>
#include <vernier/recipes/builtin_recipes.h>
#include <vernier/recipes/recipe.h>
#include <yaml-cpp/yaml.h>

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

QuantizerSettings parse_settings(const YAML::Node& node, const std::string& where,
                                 Granularity granularity) {
  Fields fields(node, where);
  QuantizerSettings settings;
  const NumberFormat format = number_format_from_string(
      fields.get<std::string>("format", to_string(NumberFormat::integer)));
  const int bits = fields.get("bits", 8);
  granularity =
      granularity_from_string(fields.get<std::string>("granularity", to_string(granularity)));
  VERNIER_CHECK(bits >= 2 && bits <= 8, where, ": bits must be 2 to 8, not ", bits);
  const bool symmetric = fields.get("symmetric", true);
  settings.scheme = symmetric_scheme(bits, granularity, fields.get<int64_t>("group_size", 0));
  settings.scheme.narrow_range = fields.get("narrow_range", settings.scheme.narrow_range);
  settings.scheme.format = format;
  if (!symmetric) settings.scheme.symmetric = settings.scheme.narrow_range = false;
  settings.scheme.dynamic = granularity == Granularity::per_token;
  settings.calibrator.method =
      calibration_method_from_string(fields.get<std::string>("calibrator", "min_max"));
  settings.calibrator.percentile = fields.get("percentile", settings.calibrator.percentile);
  VERNIER_CHECK(settings.calibrator.percentile > 0 && settings.calibrator.percentile <= 100, where,
                ": percentile must be in (0, 100], not ", settings.calibrator.percentile);
  VERNIER_CHECK(
      !settings.scheme.is_fp8() || settings.calibrator.method != CalibrationMethod::entropy, where,
      ": the entropy calibrator is for int: use min_max, percentile or mse");
  fields.done();
  settings.scheme.check();
  return settings;
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
    recipe.weights = parse_settings(weights, source + ": weights", Granularity::per_channel);
    recipe.activations =
        parse_settings(activations, source + ": activations", Granularity::per_tensor);
    fields.done();
    VERNIER_CHECK(recipe.weights.scheme.symmetric &&
                      (recipe.weights.scheme.granularity == Granularity::per_channel ||
                       recipe.weights.scheme.granularity == Granularity::per_tensor),
                  source, ": weights must be symmetric and per_channel or per_tensor");
    VERNIER_CHECK(recipe.activations.scheme.granularity == Granularity::per_tensor ||
                      recipe.activations.scheme.granularity == Granularity::per_token,
                  source, ": activations must be per_tensor (static) or per_token (dynamic)");
    VERNIER_CHECK(recipe.weights.scheme.is_fp8() == recipe.activations.scheme.is_fp8(), source,
                  ": weights and activations must both be int or both e4m3 or e5m2");
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

void apply_recipe(const torch::nn::Module& model, const Recipe& recipe) {
  const std::vector<NamedLayer> layers = quantized_layers(model);
  std::set<std::string> unmatched(recipe.skip.begin(), recipe.skip.end());
  for (const auto& [name, layer] : layers) {
    bool skipped = false;
    for (const std::string& pattern : recipe.skip) {
      if (fnmatch(pattern.c_str(), name.c_str(), 0) != 0) continue;
      skipped = true;
      unmatched.erase(pattern);
    }
    layer->set_mode(Mode::full);
    layer->set_quantized(!skipped);
    layer->set_name(name);
    for (const auto& item : layer->quantizers())
      item.quantizer->set_settings(
          item.quantizer->operand() == Operand::weight ? recipe.weights : recipe.activations);
  }
  VERNIER_CHECK(unmatched.empty(), "recipe ", recipe.name, ": skip '", *unmatched.begin(),
                "' matches no layer; layers are named like '",
                layers.empty() ? "" : layers.front().name, "'");
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
