#include <vernier/calibration/atomic_file.h>
#include <vernier/kernels/error.h>
#include <vernier/qat/layer.h>
#include <vernier/recipes/model_folder.h>
#include <vernier/recipes/models/stored_names.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <map>
#include <set>

namespace vernier {
namespace {

namespace fs = std::filesystem;
using torch::Tensor;
using Json = nlohmann::ordered_json;

struct DtypeName {
  torch::Dtype dtype;
  const char* name;  // as in config.json
};
constexpr std::array<DtypeName, 3> kDtypes = {{
    {torch::kFloat, "float32"},
    {torch::kHalf, "float16"},
    {torch::kBFloat16, "bfloat16"},
}};

Json read_config(const TextModel& model, const fs::path& source) {
  std::string text = model.info.config;
  if (!source.empty()) {
    std::ifstream in(source / "config.json", std::ios::binary);
    VERNIER_CHECK(in, (source / "config.json").string(),
                  " cannot be read: give the folder that the model was loaded from");
    text.assign(std::istreambuf_iterator<char>(in), {});
  }
  Json config = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  VERNIER_CHECK(config.is_object(),
                source.empty() ? "the model's configuration" : (source / "config.json").string(),
                " is not a JSON object");
  VERNIER_CHECK(!config.contains("quantization_config"), source.string(),
                " is quantized: give the folder of the float model");
  return config;
}

// The field that says the dtype: transformers 5 writes `dtype` and reads both, 4 `torch_dtype`.
const char* dtype_field(const Json& config) {
  return config.contains("torch_dtype") && !config.contains("dtype") ? "torch_dtype" : "dtype";
}

torch::Dtype stored_dtype(const Json& config, const std::optional<SafetensorsFolder>& weights) {
  const auto field = config.find(dtype_field(config));
  if (field != config.end() && field->is_string())
    return dtype_from_name(field->get<std::string>());
  if (weights)
    for (const std::string& name : weights->names())
      for (const auto& [dtype, type_name] : kDtypes)
        if (weights->tensor(name).scalar_type() == dtype) return dtype;
  return torch::kFloat;
}

// A value in another dtype. Throws Error where it overflows.
Tensor converted(const Tensor& value, torch::Dtype dtype, const std::string& name) {
  const Tensor result = value.detach().to(dtype);
  VERNIER_CHECK(dtype == value.scalar_type() || result.isfinite().all().item<bool>(), "tensor '",
                name, "' overflows ", dtype_name(dtype), ": its largest magnitude is ",
                value.detach().abs().max().item<float>(), "; write the folder in float32");
  return result;
}

StoredTensor of_parameter(const TextModel& model, const std::string& parameter, const Tensor& value,
                          const std::string& name, torch::Dtype dtype) {
  const Tensor stored = model.to_stored(parameter, value.detach());
  return {{name, dtype, stored.sizes().vec(),
           [&model, parameter, value, name, dtype] {
             return converted(model.to_stored(parameter, value.detach()), dtype, name);
           }},
          parameter};
}

bool goes_along(const fs::directory_entry& entry) {
  const std::string name = entry.path().filename().string();
  if (name.starts_with(".")) return false;
  // A sentence-transformers model: modules.json names the folders 1_Pooling, 2_Dense, ...
  if (entry.is_directory()) return name.size() > 2 && std::isdigit(name[0]) && name[1] == '_';
  if (!entry.is_regular_file() || name == "config.json" || name.ends_with(".index.json"))
    return false;
  for (const char* beginning : {"LICENSE", "LICENCE", "NOTICE", "USE_POLICY"})
    if (name.starts_with(beginning)) return true;
  const std::string extension = entry.path().extension().string();
  for (const char* one : {".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe", ".py"})
    if (extension == one) return true;
  return false;
}

void copy_companions(const fs::path& source, const fs::path& out) {
  try {
    for (const fs::directory_entry& entry : fs::directory_iterator(source))
      if (goes_along(entry))  // follows links, as the hub's cache has them
        fs::copy(entry.path(), out / entry.path().filename(), fs::copy_options::recursive);
  } catch (const fs::filesystem_error& error) {
    throw Error(concat("cannot copy ", error.path1().string(), ": ", error.code().message()));
  }
}

}  // namespace

std::string dtype_name(torch::Dtype dtype) {
  for (const auto& [known, name] : kDtypes)
    if (dtype == known) return name;
  throw Error(concat("no dtype of models: ", c10::toString(dtype)));
}

torch::Dtype dtype_from_name(const std::string& name) {
  for (const auto& [dtype, known] : kDtypes)
    if (name == known) return dtype;
  throw Error(concat("unknown dtype '", name, "': use float32, float16 or bfloat16"));
}

ModelFolder model_folder(const TextModel& model, const fs::path& source,
                         std::optional<torch::Dtype> dtype) {
  std::optional<SafetensorsFolder> weights;
  if (!source.empty()) weights = SafetensorsFolder::open(source);
  ModelFolder folder{read_config(model, source), torch::kFloat, {}};
  folder.dtype = dtype ? *dtype : stored_dtype(folder.config, weights);
  folder.config[dtype_field(folder.config)] = dtype_name(folder.dtype);

  std::map<std::string, Tensor> parameters;
  for (const auto& item : model.named_parameters()) parameters.emplace(item.key(), item.value());
  for (const auto& [name, layer] : quantized_layers(model)) {
    VERNIER_CHECK(!layer->input_quantizer || layer->input_quantizer->pre_scale().numel() == 0,
                  "layer '", name,
                  "' has factors on its input (smoothing that could not be folded), which a folder "
                  "has no place for: export a checkpoint");
    for (const auto& [what, quantizer] : layer->quantizers())
      for (const auto& item : quantizer->named_parameters())  // learned scales
        parameters.erase(concat(name, ".", what, "_quantizer.", item.key()));
  }
  std::set<std::string> missing;
  for (const auto& item : parameters) missing.insert(item.first);
  const auto add = [&](const std::string& name, const std::string& parameter) {
    folder.tensors.push_back(
        of_parameter(model, parameter, parameters.at(parameter), name, folder.dtype));
    missing.erase(parameter);
  };
  if (!weights) {
    for (const auto& item : parameters) add(item.first, item.first);
    return folder;
  }
  for (const std::string& name : weights->names()) {
    const std::string parameter = parameter_of(model, name);
    if (parameters.count(parameter)) {
      add(name, parameter);
      const TensorToWrite& written = folder.tensors.back().tensor;
      VERNIER_CHECK(weights->info(name).shape == written.shape, source.string(), ": tensor '", name,
                    "' has shape ", at::IntArrayRef(weights->info(name).shape),
                    " and the model's has ", at::IntArrayRef(written.shape),
                    ": give the folder that the model was loaded from");
      continue;
    }
    const Tensor value = weights->tensor(name);
    const torch::Dtype kept = value.is_floating_point() ? folder.dtype : value.scalar_type();
    folder.tensors.push_back(
        {{name, kept, value.sizes().vec(), [=] { return converted(value, kept, name); }}, ""});
  }
  VERNIER_CHECK(missing.empty(), source.string(), " has no tensor '", *missing.begin(),
                "': give the folder that the model was loaded from");
  return folder;
}

void write_model_folder(const ModelFolder& folder, const fs::path& source, const fs::path& out) {
  AtomicFolder target(out);
  if (!source.empty()) copy_companions(source, target.temporary());
  std::vector<TensorToWrite> tensors;
  for (const StoredTensor& stored : folder.tensors) tensors.push_back(stored.tensor);
  write_safetensors_folder(target.temporary(), std::move(tensors));
  write_text_atomically(target.temporary() / "config.json", folder.config.dump(2) + "\n");
  target.commit();
}

void save_hugging_face(const TextModel& model, const fs::path& source, const fs::path& out,
                       std::optional<torch::Dtype> dtype) {
  write_model_folder(model_folder(model, source, dtype), source, out);
}

}  // namespace vernier
