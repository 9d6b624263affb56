#include <torch/nn/functional/padding.h>
#include <vernier/export/safetensors.h>
#include <vernier/kernels/error.h>
#include <vernier/qat/linear.h>
#include <vernier/recipes/models/bert.h>
#include <vernier/recipes/models/gpt2.h>
#include <vernier/recipes/models/gpt_neox.h>
#include <vernier/recipes/models/llama.h>
#include <vernier/recipes/models/opt.h>
#include <vernier/recipes/models/quantized_folder.h>
#include <vernier/recipes/models/stored_names.h>
#include <vernier/recipes/models/text_model.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <fstream>
#include <map>
#include <numeric>
#include <set>
#include <sstream>

namespace vernier {
namespace {

using torch::Tensor;
namespace fs = std::filesystem;

const std::vector<Family>& families() {
  static const std::vector<Family> all = [] {
    std::vector<Family> made = {bert_family(), opt_family(), gpt_neox_family(), gpt2_family()};
    for (Family& family : llama_families()) made.push_back(std::move(family));
    return made;
  }();
  return all;
}

const Family& family_of(const std::string& architecture, const std::string& where) {
  std::string known;
  for (const Family& family : families()) {
    if (architecture == family.architecture) return family;
    known += concat(known.empty() ? "" : ", ", family.architecture);
  }
  throw Error(concat(where, ": the architecture '", architecture,
                     "' is not supported; supported are: ", known));
}

// Builds the model of a configuration, whose sizes are first held against the tensors that are
// there: it then takes no more memory than they say.
std::shared_ptr<TextModel> make_model(const CheckpointInfo& info, const TensorShapes& shapes,
                                      const std::string& where) {
  nlohmann::json config;
  try {
    config = nlohmann::json::parse(info.config);
  } catch (const nlohmann::json::exception&) {
    throw Error(concat(where, ": the configuration is not valid JSON"));
  }
  const Family& family = family_of(info.architecture, where);
  std::shared_ptr<TextModel> model;
  try {
    family.check(config, shapes);
    const nn::Uninitialized parameters;  // they are loaded
    model = family.make(config);
  } catch (const Error& error) {
    throw Error(concat(where, ": ", error.what()));
  } catch (const nlohmann::json::exception& error) {
    throw Error(concat(where, ": ", error.what()));
  }
  model->info = info;
  model->eval();
  return model;
}

std::string read_text(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  VERNIER_CHECK(in, path.string(), " cannot be read: give a Hugging Face folder with config.json");
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

// Gives the layers that a folder has quantized their codes and scales, and takes their weights off
// `stored_name`. Returns the weights' names.
std::set<std::string> load_layers(TextModel& model, const QuantizedFolder& quantized,
                                  const SafetensorsFolder& weights,
                                  std::map<std::string, std::string>& stored_name,
                                  const fs::path& folder) {
  std::set<std::string> loaded, prefixes;
  for (const auto& [name, layer] : quantized_layers(model)) {
    const auto found = stored_name.find(name + ".weight");
    const std::string dtype = found == stored_name.end() ? "" : weights.info(found->second).dtype;
    layer->set_quantized(dtype == "I8" || dtype == "F8_E4M3");
    if (!layer->quantized()) continue;
    try {
      quantized.load_layer(model, name, *layer, weights, found->second);
    } catch (const Error& error) {
      throw Error(concat(folder.string(), ": layer '", name, "': ", error.what()));
    }
    loaded.insert(found->first);
    prefixes.insert(found->second.substr(0, found->second.rfind('.')));
    stored_name.erase(found);
  }
  for (const std::string& name : weights.names())
    VERNIER_CHECK(
        !QuantizedFolder::is_scale(name) || prefixes.count(name.substr(0, name.rfind('.'))),
        folder.string(), ": tensor '", name, "' is of no layer with quantized weights");
  VERNIER_CHECK(!loaded.empty(), folder.string(),
                ": config.json says that it is quantized, and no layer is");
  return loaded;
}

std::shared_ptr<TextModel> load_folder(const fs::path& folder) {
  const fs::path config_path = folder / "config.json";
  CheckpointInfo info;
  info.config = read_text(config_path);
  const auto config = nlohmann::json::parse(info.config, nullptr, /*allow_exceptions=*/false);
  VERNIER_CHECK(config.is_object(), config_path.string(), " is not a JSON object");
  const auto names = config.find("architectures");
  VERNIER_CHECK(names != config.end() && names->is_array() && names->size() == 1 &&
                    names->front().is_string(),
                config_path.string(), " names no single architecture in 'architectures'");
  info.architecture = names->front().get<std::string>();
  const Family& family = family_of(info.architecture, config_path.string());
  std::optional<QuantizedFolder> quantized;
  try {
    quantized = QuantizedFolder::of(config);
  } catch (const Error& error) {
    throw Error(concat(config_path.string(), ": ", error.what()));
  }
  if (quantized) {  // what follows is of the model, not of how it is stored
    auto plain = nlohmann::ordered_json::parse(info.config);
    plain.erase("quantization_config");
    info.config = plain.dump(2);
  }
  const SafetensorsFolder weights = SafetensorsFolder::open(folder);
  std::map<std::string, std::string> stored_name;  // by the parameter's
  TensorShapes shapes;
  for (const std::string& name : weights.names()) {
    if (quantized && QuantizedFolder::is_scale(name)) continue;
    const auto [item, added] =
        stored_name.emplace(family.parameter_name ? family.parameter_name(name) : name, name);
    if (!added) continue;
    std::vector<int64_t> shape = weights.info(name).shape;
    if (family.transposed && family.transposed(item->first))
      std::reverse(shape.begin(), shape.end());
    shapes.emplace(item->first, std::move(shape));
  }
  auto model = make_model(info, shapes, config_path.string());
  const std::string stored_embedding = family.embedding ? stored_name.at(family.embedding) : "";

  const torch::NoGradGuard no_grad;
  std::set<std::string> loaded;
  if (quantized) loaded = load_layers(*model, *quantized, weights, stored_name, folder);
  for (auto& item : model->named_parameters()) {
    if (loaded.count(item.key())) continue;
    const auto found = stored_name.find(item.key());
    VERNIER_CHECK(found != stored_name.end(), folder.string(), ": tensor '", item.key(),
                  "' is missing from the safetensors files");
    const Tensor value = model->from_stored(item.key(), weights.tensor(found->second));
    VERNIER_CHECK(value.sizes() == item.value().sizes(), folder.string(), ": tensor '",
                  found->second, "' has shape ", value.sizes(), " but config.json asks for ",
                  item.value().sizes());
    VERNIER_CHECK(value.is_floating_point(), folder.string(), ": tensor '", found->second,
                  "' has dtype ", c10::toString(value.scalar_type()),
                  ": a floating-point checkpoint is needed");
    const Tensor full = value.to(torch::kFloat);
    VERNIER_CHECK(full.isfinite().all().item<bool>(), folder.string(), ": tensor '", found->second,
                  "' holds NaN or infinite values: repair the checkpoint");
    item.value().set_data(full);
    stored_name.erase(found);
  }
  for (const auto& [name, stored] : stored_name) {
    if (family.output && name == family.output) {
      VERNIER_CHECK(torch::equal(weights.tensor(stored), weights.tensor(stored_embedding)),
                    folder.string(), ": tensor '", stored, "' differs from '", family.embedding,
                    "', to which tie_word_embeddings ties it: set that to false");
      continue;
    }
    VERNIER_CHECK(family.unused && family.unused(name), folder.string(), ": tensor '", stored,
                  "' has no place in a ", info.architecture);
  }
  model->info.fingerprint = fingerprint_of(*model);
  if (quantized) {
    model->info.recipe = "compressed-tensors";
    try {
      set_mode(*model, Mode::integer);
    } catch (const Error& error) {
      throw Error(concat(folder.string(), ": ", error.what()));
    }
  }
  return model;
}

}  // namespace

int64_t TokenBatch::longest() const { return *std::max_element(lengths.begin(), lengths.end()); }

bool TokenBatch::equal_lengths() const {
  return std::all_of(lengths.begin(), lengths.end(),
                     [&](int64_t length) { return length == lengths.front(); });
}

std::shared_ptr<TextModel> load_text_model(const fs::path& path) {
  VERNIER_CHECK(fs::exists(path), path.string(),
                " does not exist: give a Hugging Face folder or a vernier checkpoint");
  if (fs::is_directory(path)) return load_folder(path);
  const Checkpoint checkpoint = Checkpoint::open(path);
  auto model = make_model(checkpoint.info(), checkpoint.tensor_shapes(), path.string());
  checkpoint.load_into(*model);
  return model;
}

std::string parameter_of(const TextModel& model, const std::string& stored) {
  const Family& family = family_of(model.info.architecture, "the model");
  const std::string name = family.parameter_name ? family.parameter_name(stored) : stored;
  const auto parameters = model.named_parameters();
  if (parameters.contains(name)) return name;
  return family.output && name == family.output ? family.embedding : "";
}

std::string fingerprint_of(const TextModel& model) {
  // FNV-1a, eight bytes at a time: against mistakes, not against forgery.
  uint64_t hash = 0xcbf29ce484222325u;
  const auto mix = [&](uint64_t word) { hash = (hash ^ word) * 0x100000001b3u; };
  const auto mix_bytes = [&](const char* bytes, size_t count) {
    size_t i = 0;
    for (; i + 8 <= count; i += 8) {
      uint64_t word;
      std::memcpy(&word, bytes + i, 8);
      mix(word);
      hash ^= hash >> 29;  // carries high bits down, which multiplication never does
    }
    for (; i < count; ++i) mix(static_cast<unsigned char>(bytes[i]));
  };
  const std::string settings = model.settings();
  mix_bytes(settings.data(), settings.size());
  for (const auto& item : model.named_parameters()) {
    mix_bytes(item.key().data(), item.key().size());
    for (const int64_t size : item.value().sizes()) mix(static_cast<uint64_t>(size));
    const Tensor dense = item.value().detach().cpu().contiguous();
    mix_bytes(static_cast<const char*>(dense.const_data_ptr()), dense.nbytes());
  }
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

Tensor mean_pooling(const Tensor& hidden, const TokenBatch& batch) {
  const int64_t width = hidden.size(1);
  if (batch.equal_lengths())
    return hidden.to(torch::kFloat).view({batch.size(), -1, width}).mean(1);
  std::vector<Tensor> means;
  int64_t first = 0;
  for (const int64_t length : batch.lengths) {
    means.push_back(hidden.narrow(0, first, length).to(torch::kFloat).mean(0));
    first += length;
  }
  return torch::stack(means);
}

}  // namespace vernier
