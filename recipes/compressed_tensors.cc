#include <vernier/kernels/error.h>
#include <vernier/qat/linear.h>
#include <vernier/recipes/compressed_tensors.h>
#include <vernier/recipes/model_folder.h>

#include <algorithm>
#include <map>
#include <set>

namespace vernier {
namespace {

namespace fs = std::filesystem;
using torch::Tensor;
using Json = nlohmann::ordered_json;

constexpr const char* kVersion = "0.20.0";  // of compressed-tensors, whose fields these are

// One layer as the format holds it.
struct Layer {
  std::string name;
  std::shared_ptr<QuantizedLayer> layer;
  Tensor codes;
  Tensor weight_scale;      // float32 [out, 1] or [1]
  Tensor input_scale;       // float32 [1]; undefined where dynamic
  Tensor input_zero_point;  // int8 [1]; undefined where symmetric
  Json arguments;  // of weights and input_activations: layers that have the same are one group
};

Json arguments_of(const Scheme& scheme, const char* strategy) {
  Json arguments;
  arguments["num_bits"] = 8;
  arguments["type"] = scheme.is_fp8() ? "float" : "int";
  arguments["symmetric"] = scheme.symmetric;
  arguments["strategy"] = strategy;
  arguments["dynamic"] = scheme.dynamic;
  return arguments;
}

void check_scheme(const Scheme& scheme, const char* what) {
  VERNIER_CHECK(scheme.format != NumberFormat::e5m2, "its ", what,
                " is e5m2 and the format's FP8 is e4m3: use recipe fp8-static or fp8-dynamic");
  VERNIER_CHECK(scheme.bits == 8, "its ", what, " has ", scheme.bits,
                " bits and format int-quantized holds 8: choose a recipe of 8 bits, or leave the "
                "layer in full precision (skip)");
}

// Which row of a weight each row is that the family's folders store. Throws Error where they store
// columns.
Tensor stored_rows(const TextModel& model, const std::string& name, const Tensor& weight) {
  const Tensor numbers =
      torch::arange(weight.size(0), torch::kInt).unsqueeze(1).expand(weight.sizes()).contiguous();
  const Tensor stored = model.to_stored(name, numbers);
  VERNIER_CHECK(stored.sizes() == weight.sizes() &&
                    stored.eq(stored.select(1, 0).unsqueeze(1)).all().item<bool>(),
                model.info.architecture,
                " stores it transposed, in a layer that compressed-tensors does not quantize: "
                "export a checkpoint");
  return stored.select(1, 0).contiguous();
}

Layer make_layer(const TextModel& model, const std::string& name,
                 const std::shared_ptr<QuantizedLayer>& quantized) {
  VERNIER_CHECK(dynamic_cast<const nn::LinearImpl*>(quantized.get()),
                "it is not linear, and compressed-tensors folders hold linear layers: leave it in "
                "full precision (skip)");
  VERNIER_CHECK(
      quantized->input_from().empty() && !quantized->emits_codes() && !quantized->output_quantizer,
      "codes are handed on from layer to layer, which the format has no place for: "
      "export a checkpoint");
  const Tensor weight = quantized->float_weight().detach();
  const Tensor order = stored_rows(model, name + ".weight", weight);
  QuantizerImpl& weights = *quantized->weight_quantizer;
  QuantizerImpl& inputs = *quantized->input_quantizer;
  check_scheme(weights.scheme(), "weight");
  check_scheme(inputs.scheme(), "input");
  VERNIER_CHECK(!inputs.scheme().dynamic || inputs.scale().numel() == 0,
                "its dynamic scales have a learned factor, which the format has no place for: "
                "export a checkpoint, or train with other ranges of the activations");
  VERNIER_CHECK(
      inputs.pre_scale().numel() == 0,
      "its input is smoothed by factors inside the quantizer (pre_scale), which the format "
      "has no place for: leave its group out of smoothing, or export a checkpoint");
  VERNIER_CHECK(weights.calibrated() && inputs.calibrated(),
                "it is not calibrated: calibrate the model before exporting it");
  weights.check_learned();
  inputs.check_learned();

  Layer layer;
  layer.name = name;
  layer.layer = quantized;
  const Tensor codes = weights.codes(weight.to(torch::kFloat)).codes;  // first: a scale may follow
  layer.codes = model.to_stored(name + ".weight", codes.cpu());
  const bool channels = weights.scheme().granularity == Granularity::per_channel;
  layer.weight_scale =
      weights.scale()
          .detach()
          .to(torch::kFloat)
          .reshape(channels ? std::vector<int64_t>{-1, 1} : std::vector<int64_t>{1});
  if (channels) layer.weight_scale = layer.weight_scale.cpu().index_select(0, order);
  layer.arguments["weights"] = arguments_of(weights.scheme(), channels ? "channel" : "tensor");
  layer.arguments["input_activations"] =
      arguments_of(inputs.scheme(), inputs.scheme().dynamic ? "token" : "tensor");
  if (!inputs.scheme().dynamic) {
    layer.input_scale = inputs.scale().detach().to(torch::kFloat).reshape({1});
    if (const auto zero_point = inputs.zero_point())
      layer.input_zero_point = zero_point->to(torch::kChar).reshape({1});
  }
  return layer;
}

// Makes the ranges of layers that read one activation one: the smallest that holds them all.
// Returns whether any was another.
bool join(const std::vector<Layer*>& readers) {
  const Layer& first = *readers.front();
  if (!first.input_scale.defined()) return false;
  const auto same = [&](const Tensor& a, const Tensor& b) {
    return a.defined() ? a.cpu().equal(b.cpu()) : !b.defined();
  };
  if (std::all_of(readers.begin(), readers.end(), [&](const Layer* reader) {
        return same(reader->input_scale, first.input_scale) &&
               same(reader->input_zero_point, first.input_zero_point);
      }))
    return false;
  const Scheme& scheme = first.layer->input_quantizer->scheme();
  Range range;
  for (const Layer* reader : readers) {
    const auto scale = reader->input_scale.item<float>();
    const int zero_point =
        reader->input_zero_point.defined() ? reader->input_zero_point.item<int>() : 0;
    range.min = std::min(range.min, static_cast<float>(scheme.qmin() - zero_point) * scale);
    range.max = std::max(range.max, static_cast<float>(scheme.qmax() - zero_point) * scale);
  }
  const ScaleAndZeroPoint joint = scale_from_range(range, scheme);
  for (Layer* reader : readers) {
    reader->input_scale = torch::full({1}, joint.scale, torch::kFloat);
    if (!scheme.symmetric)
      reader->input_zero_point = torch::full({1}, joint.zero_point, torch::kChar);
  }
  return true;
}

std::vector<std::string> join_readers(TextModel& model, std::vector<Layer>& layers) {
  std::map<std::string, Layer*> by_name;
  for (Layer& layer : layers) by_name[layer.name] = &layer;
  std::vector<std::string> joined;
  for (const SmoothingGroup& group : model.smoothing_groups()) {
    const std::vector<std::string>& names = group.readers;
    std::vector<Layer*> readers;
    for (const std::string& name : names)
      if (by_name.count(name)) readers.push_back(by_name[name]);
    VERNIER_CHECK(readers.empty() || readers.size() == names.size(), "layers '", names.front(),
                  "' and '", names.back(),
                  "' read one activation, which runtimes quantize once, "
                  "but only some of them are quantized: give them the same rule");
    for (const Layer* reader : readers)
      VERNIER_CHECK(reader->arguments == readers.front()->arguments, "layers '",
                    readers.front()->name, "' and '", reader->name,
                    "' read one activation, which runtimes quantize once, but they are quantized "
                    "in different ways: give them the same rule");
    if (readers.size() > 1 && join(readers))
      for (const Layer* reader : readers) joined.push_back(reader->name);
  }
  return joined;
}

// Names of linear layers, as the runtimes call them, that stay in floating point.
Json ignored(const TextModel& model, const ModelFolder& folder, const std::vector<Layer>& layers) {
  std::set<std::string> quantized, ignore = {"lm_head"};  // tied ones show in no tensor
  for (const Layer& layer : layers) quantized.insert(layer.name);
  for (const auto& [name, layer] : quantized_layers(model)) ignore.insert(name);
  for (const StoredTensor& stored : folder.tensors) {
    const std::string& name = stored.tensor.name;
    if (stored.parameter.empty() && stored.tensor.shape.size() == 2 && name.ends_with(".weight") &&
        name.find("embedding") == std::string::npos)
      ignore.insert(name.substr(0, name.size() - std::string(".weight").size()));
  }
  Json names = Json::array();
  for (const std::string& name : ignore)
    if (!quantized.count(name)) names.push_back(name);
  return names;
}

// Layers of the same arguments are a group. Those of the largest are found by their type, the
// others, which go before, by their names.
Json config_groups(const std::vector<Layer>& layers) {
  std::vector<std::vector<const Layer*>> groups;
  for (const Layer& layer : layers) {
    const auto found = std::find_if(groups.begin(), groups.end(), [&](const auto& group) {
      return group.front()->arguments == layer.arguments;
    });
    if (found == groups.end())
      groups.push_back({&layer});
    else
      found->push_back(&layer);
  }
  std::stable_sort(groups.begin(), groups.end(),
                   [](const auto& a, const auto& b) { return a.size() < b.size(); });
  Json all = Json::object();
  for (size_t i = 0; i < groups.size(); ++i) {
    Json group;
    group["targets"] = Json::array();
    if (i + 1 == groups.size())
      group["targets"].push_back("Linear");
    else
      for (const Layer* layer : groups[i]) group["targets"].push_back(layer->name);
    group.update(groups[i].front()->arguments);
    group["output_activations"] = nullptr;
    all[concat("group_", i)] = group;
  }
  return all;
}

Json quantization_config(const TextModel& model, const ModelFolder& folder,
                         const std::vector<Layer>& layers) {
  const bool fp8 = layers.front().layer->is_fp8();
  for (const Layer& layer : layers)
    VERNIER_CHECK(layer.layer->is_fp8() == fp8, "layers '", layers.front().name, "' and '",
                  layer.name, "' are one int8 and one FP8: a folder has one of them");
  Json config;
  config["quant_method"] = "compressed-tensors";
  config["version"] = kVersion;
  config["format"] = fp8 ? "float-quantized" : "int-quantized";
  config["quantization_status"] = "compressed";
  config["kv_cache_scheme"] = nullptr;
  config["global_compression_ratio"] = nullptr;
  config["ignore"] = ignored(model, folder, layers);
  config["config_groups"] = config_groups(layers);
  return config;
}

}  // namespace

CompressedTensorsReport save_compressed_tensors(TextModel& model, const fs::path& source,
                                                const fs::path& out,
                                                std::optional<torch::Dtype> dtype) {
  std::vector<Layer> layers;
  for (const auto& [name, layer] : quantized_layers(model)) {
    if (!layer->quantized()) continue;
    try {
      layers.push_back(make_layer(model, name, layer));
    } catch (const Error& error) {
      throw Error(concat("layer '", name, "': ", error.what()));
    }
  }
  VERNIER_CHECK(!layers.empty(), "the model has no quantized layer: apply a recipe first");
  CompressedTensorsReport report;
  report.layers = static_cast<int64_t>(layers.size());
  report.joined = join_readers(model, layers);

  ModelFolder folder = model_folder(model, source, dtype);
  folder.config["quantization_config"] = quantization_config(model, folder, layers);
  std::map<std::string, const Layer*> by_weight;
  for (const Layer& layer : layers) by_weight[layer.name + ".weight"] = &layer;
  std::vector<StoredTensor> tensors;
  for (StoredTensor& stored : folder.tensors) {
    const auto found = by_weight.find(stored.parameter);
    if (found == by_weight.end()) {
      tensors.push_back(std::move(stored));
      continue;
    }
    const Layer& layer = *found->second;
    const std::string& weight = stored.tensor.name;
    const std::string prefix = weight.substr(0, weight.size() - std::string("weight").size());
    tensors.push_back({{weight, layer.codes}, stored.parameter});
    const auto add = [&](const char* name, const Tensor& tensor) {
      if (tensor.defined()) tensors.push_back({{prefix + name, tensor}, ""});
    };
    add("weight_scale", layer.weight_scale);
    add("input_scale", layer.input_scale);
    add("input_zero_point", layer.input_zero_point);
  }
  folder.tensors = std::move(tensors);
  write_model_folder(folder, source, out);
  return report;
}

}  // namespace vernier
