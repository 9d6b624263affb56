#include <vernier/kernels/error.h>
#include <vernier/recipes/models/quantized_folder.h>

#include <algorithm>
#include <array>
#include <regex>

namespace vernier {
namespace {

using nlohmann::json;
using torch::Tensor;

bool absent(const json& object, const char* field) {
  const auto found = object.find(field);
  return found == object.end() || found->is_null();
}

// A field that may have one of few values; the first where it is absent.
template <typename T>
T one_of(const json& object, const char* field, std::initializer_list<T> known) {
  if (absent(object, field)) return *known.begin();
  for (const T& value : known)
    if (object[field] == value) return value;
  throw Error(
      concat("quantization_config: ", field, " ", object[field].dump(), " is not implemented"));
}

// The scheme of "weights" or "input_activations".
Scheme scheme_of(const json& arguments, bool weights) {
  VERNIER_CHECK(arguments.is_object(),
                "quantization_config: ", weights ? "weights" : "input_activations",
                " must be an object: weights alone, or inputs alone, are not implemented");
  Scheme scheme;
  scheme.format = one_of<std::string>(arguments, "type", {"int", "float"}) == "float"
                      ? NumberFormat::e4m3
                      : NumberFormat::integer;
  one_of(arguments, "num_bits", {8});
  scheme.symmetric = weights ? one_of(arguments, "symmetric", {true})
                             : one_of(arguments, "symmetric", {true, false});
  const bool fp8 = scheme.format != NumberFormat::integer;
  scheme.dynamic =
      weights ? one_of(arguments, "dynamic", {false}) : one_of(arguments, "dynamic", {false, true});
  scheme.narrow_range = fp8 || scheme.dynamic;  // others clip where int8 ends
  if (!scheme.symmetric) scheme.narrow_range = false;
  if (weights) {
    scheme.granularity =
        one_of<std::string>(arguments, "strategy", {"tensor", "channel"}) == "channel"
            ? Granularity::per_channel
            : Granularity::per_tensor;
  } else {
    VERNIER_CHECK(!scheme.dynamic || !absent(arguments, "strategy"),
                  "quantization_config: dynamic input_activations without a strategy");
    one_of<std::string>(arguments, "strategy", {scheme.dynamic ? "token" : "tensor"});
    scheme.granularity = scheme.dynamic ? Granularity::per_token : Granularity::per_tensor;
  }
  return scheme;
}

bool matches(const std::string& target, const std::string& layer) {
  if (!target.starts_with("re:")) return target == layer;
  VERNIER_CHECK(target.size() <= 500, "quantization_config: a target has ", target.size(),
                " characters");
  try {
    return std::regex_search(layer, std::regex(target.substr(3)),
                             std::regex_constants::match_continuous);
  } catch (const std::regex_error&) {
    throw Error(concat("quantization_config: the target ", json(target).dump(),
                       " is no regular expression"));
  }
}

Tensor scale_tensor(const SafetensorsFolder& folder, const std::string& name, int64_t count) {
  VERNIER_CHECK(folder.contains(name), "tensor '", name, "' is missing");
  const Tensor scale = folder.tensor(name);
  VERNIER_CHECK(scale.is_floating_point() && scale.numel() == count, "tensor '", name,
                "' has dtype ", c10::toString(scale.scalar_type()), " and shape ", scale.sizes(),
                ": it needs ", count, " scales");
  return scale.to(torch::kFloat).reshape({count}).clone();
}

}  // namespace

std::optional<QuantizedFolder> QuantizedFolder::of(const json& config) {
  if (absent(config, "quantization_config")) return std::nullopt;
  const json& quantization = config["quantization_config"];
  VERNIER_CHECK(quantization.is_object(), "quantization_config is not an object");
  VERNIER_CHECK(
      !absent(quantization, "quant_method") && quantization["quant_method"] == "compressed-tensors",
      "quantization_config: quant_method ", quantization.value("quant_method", json()).dump(),
      " is not implemented (compressed-tensors): give the float model");
  VERNIER_CHECK(!absent(quantization, "format"), "quantization_config: format is missing");
  one_of<std::string>(quantization, "format", {"int-quantized", "float-quantized"});
  for (const char* field : {"kv_cache_scheme", "sparsity_config", "transform_config"})
    VERNIER_CHECK(absent(quantization, field) || quantization[field].empty(),
                  "quantization_config: ", field, " is not implemented");
  VERNIER_CHECK(quantization.contains("config_groups") && quantization["config_groups"].is_object(),
                "quantization_config: config_groups is missing");
  QuantizedFolder folder;
  for (const auto& item : quantization["config_groups"].items()) {
    const json& group = item.value();
    VERNIER_CHECK(group.is_object() && group.contains("targets") && group["targets"].is_array(),
                  "quantization_config: ", item.key(), " has no targets");
    VERNIER_CHECK(absent(group, "output_activations"), "quantization_config: output_activations ",
                  "is not implemented");
    Group read;
    for (const json& target : group["targets"]) {
      VERNIER_CHECK(target.is_string(), "quantization_config: a target is no text");
      read.targets.push_back(target.get<std::string>());
    }
    read.weights = group.value("weights", json());
    read.inputs = group.value("input_activations", json());
    folder.groups_.push_back(std::move(read));
  }
  return folder;
}

bool QuantizedFolder::is_scale(const std::string& stored) {
  constexpr std::array<const char*, 4> kEndings = {".weight_scale", ".weight_zero_point",
                                                   ".input_scale", ".input_zero_point"};
  return std::any_of(kEndings.begin(), kEndings.end(),
                     [&](const char* ending) { return stored.ends_with(ending); });
}

// Names go before patterns and those before the kind of layer.
const QuantizedFolder::Group& QuantizedFolder::group_of(const std::string& layer) const {
  for (const bool pattern : {false, true})
    for (const Group& group : groups_)
      for (const std::string& target : group.targets)
        if (target.starts_with("re:") == pattern && matches(target, layer)) return group;
  for (const Group& group : groups_)
    if (std::count(group.targets.begin(), group.targets.end(), "Linear") > 0) return group;
  throw Error("quantization_config: no group has it as a target");
}

void QuantizedFolder::load_layer(const TextModel& model, const std::string& name,
                                 QuantizedLayer& layer, const SafetensorsFolder& folder,
                                 const std::string& weight) const {
  const std::string prefix = weight.substr(0, weight.size() - std::string("weight").size());
  const Group& group = group_of(name);
  QuantizerSettings weights, inputs;
  weights.scheme = scheme_of(group.weights, /*weights=*/true);
  inputs.scheme = scheme_of(group.inputs, /*weights=*/false);
  VERNIER_CHECK(weights.scheme.format == inputs.scheme.format,
                "quantization_config: weights and input_activations of two types are not "
                "implemented");
  VERNIER_CHECK(!folder.contains(prefix + "weight_zero_point"), "tensor '", prefix,
                "weight_zero_point': asymmetric weights are not implemented");
  layer.weight_quantizer->set_settings(weights);
  const bool channels = weights.scheme.granularity == Granularity::per_channel;
  Tensor scale =
      scale_tensor(folder, prefix + "weight_scale", channels ? layer.float_weight().size(0) : 1);
  // As the family's folders order the rows, so do those of the scales.
  if (channels) {
    const Tensor rows = scale.unsqueeze(1).expand(layer.float_weight().sizes()).contiguous();
    scale = model.from_stored(name + ".weight", rows).select(1, 0).contiguous();
  }
  layer.weight_quantizer->set_scale(scale, std::nullopt);
  layer.input_quantizer->set_settings(inputs);
  if (!inputs.scheme.dynamic) {
    std::optional<Tensor> zero_point;
    if (!inputs.scheme.symmetric) {
      const std::string stored = prefix + "input_zero_point";
      VERNIER_CHECK(folder.contains(stored), "tensor '", stored, "' is missing");
      const Tensor value = folder.tensor(stored);
      VERNIER_CHECK(!value.is_floating_point() && value.numel() == 1, "tensor '", stored,
                    "' is not one integer");
      zero_point = value.to(torch::kInt).reshape({1});
    }
    layer.input_quantizer->set_scale(scale_tensor(folder, prefix + "input_scale", 1), zero_point);
  }
  layer.load_weight_codes(model.from_stored(name + ".weight", folder.tensor(weight)).clone());
}

}  // namespace vernier
