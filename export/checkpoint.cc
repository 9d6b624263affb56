#include <vernier/export/checkpoint.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/fp8.h>
#include <vernier/qat/batch_norm.h>
#include <vernier/qat/layer.h>

#include <map>
#include <set>

namespace vernier {
namespace {

using torch::Tensor;

constexpr const char* kFormat = "vernier-checkpoint";
constexpr int64_t kVersion = 1;

template <typename T>
void write_as(hdf5::File& file, const std::string& path, const Tensor& dense) {
  file.write<T>(path, std::span<const T>(dense.const_data_ptr<T>(), dense.numel()),
                std::span<const int64_t>(dense.sizes().data(), dense.sizes().size()));
}

void write_tensor(hdf5::File& file, const std::string& path, const Tensor& tensor) {
  const Tensor dense = tensor.detach().cpu().contiguous();
  switch (dense.scalar_type()) {
    case torch::kFloat:
      return write_as<float>(file, path, dense);
    case torch::kDouble:
      return write_as<double>(file, path, dense);
    case torch::kChar:
      return write_as<int8_t>(file, path, dense);
    case torch::kByte:
      return write_as<uint8_t>(file, path, dense);
    case torch::kInt:
      return write_as<int32_t>(file, path, dense);
    case torch::kLong:
      return write_as<int64_t>(file, path, dense);
    case torch::kHalf:
    case torch::kBFloat16: {
      const auto* bits = static_cast<const uint16_t*>(dense.const_data_ptr());
      const bool half = dense.scalar_type() == torch::kHalf;
      return file.write_half_bits(
          path, {bits, static_cast<size_t>(dense.numel())},
          std::span<const int64_t>(dense.sizes().data(), dense.sizes().size()),
          half ? hdf5::ElementType::float16 : hdf5::ElementType::bfloat16);
    }
    default:
      throw Error(concat("tensor '", path, "' has dtype ", c10::toString(dense.scalar_type()),
                         ", which the checkpoint format has no place for"));
  }
}

template <typename T>
Tensor read_as(const hdf5::File& file, const std::string& path, const std::vector<int64_t>& shape,
               torch::Dtype dtype) {
  const std::vector<T> values = file.read<T>(path);
  return torch::from_blob(const_cast<T*>(values.data()), shape, dtype).clone();
}

Tensor read_tensor(const hdf5::File& file, const std::string& path) {
  const hdf5::DatasetInfo info = file.info(path);
  switch (info.type) {
    case hdf5::ElementType::float32:
      return read_as<float>(file, path, info.shape, torch::kFloat);
    case hdf5::ElementType::float64:
      return read_as<double>(file, path, info.shape, torch::kDouble);
    case hdf5::ElementType::int8:
      return read_as<int8_t>(file, path, info.shape, torch::kChar);
    case hdf5::ElementType::uint8:
      return read_as<uint8_t>(file, path, info.shape, torch::kByte);
    case hdf5::ElementType::int32:
      return read_as<int32_t>(file, path, info.shape, torch::kInt);
    case hdf5::ElementType::int64:
      return read_as<int64_t>(file, path, info.shape, torch::kLong);
    case hdf5::ElementType::float16:
    case hdf5::ElementType::bfloat16: {
      const std::vector<uint16_t> bits = file.read_half_bits(path);
      const auto dtype = info.type == hdf5::ElementType::float16 ? torch::kHalf : torch::kBFloat16;
      return torch::from_blob(const_cast<uint16_t*>(bits.data()), info.shape, dtype).clone();
    }
    default:
      throw Error(concat(file.path().string(), ": tensor '", path, "' has the element type ",
                         hdf5::element_type_name(info.type), ", which checkpoints do not use"));
  }
}

void write_quantizer(hdf5::File& file, const std::string& group, const std::string& prefix,
                     const QuantizerImpl& quantizer) {
  const Scheme& scheme = quantizer.scheme();
  file.set_attribute(group, prefix + "_format", to_string(scheme.format));
  file.set_attribute(group, prefix + "_bits", scheme.bits);
  file.set_attribute(group, prefix + "_granularity", to_string(scheme.granularity));
  file.set_attribute(group, prefix + "_group_size", scheme.group_size);
  file.set_attribute(group, prefix + "_symmetric", scheme.symmetric);
  file.set_attribute(group, prefix + "_narrow_range", scheme.narrow_range);
  file.set_attribute(group, prefix + "_dynamic", scheme.dynamic);
  if (quantizer.pre_scale().numel() > 0)
    write_tensor(file, group + "/" + prefix + "_pre_scale", quantizer.pre_scale());
  if (scheme.dynamic) return;
  write_tensor(file, group + "/" + prefix + "_scale", quantizer.scale().detach());
  if (const auto zero_point = quantizer.zero_point())
    write_tensor(file, group + "/" + prefix + "_zero_point", *zero_point);
}

void read_quantizer(const hdf5::File& file, const std::string& group, const std::string& prefix,
                    QuantizerImpl& quantizer) {
  Scheme scheme;
  // Absent from files that are older than the other formats.
  if (file.has_attribute(group, prefix + "_format"))
    scheme.format = number_format_from_string(file.attribute_string(group, prefix + "_format"));
  const int64_t bits = file.attribute_int(group, prefix + "_bits");
  VERNIER_CHECK(bits >= 2 && bits <= 8, prefix, "_bits is ", bits, ", not 2 to 8");
  scheme.bits = static_cast<int>(bits);
  scheme.granularity =
      granularity_from_string(file.attribute_string(group, prefix + "_granularity"));
  scheme.group_size = file.attribute_int(group, prefix + "_group_size");
  scheme.symmetric = file.attribute_bool(group, prefix + "_symmetric");
  scheme.narrow_range = file.attribute_bool(group, prefix + "_narrow_range");
  scheme.dynamic = file.attribute_bool(group, prefix + "_dynamic");
  QuantizerSettings settings;
  settings.scheme = scheme;
  quantizer.set_settings(settings);
  if (scheme.dynamic) return;
  std::optional<Tensor> zero_point;
  if (!scheme.symmetric) zero_point = read_tensor(file, group + "/" + prefix + "_zero_point");
  quantizer.set_scale(read_tensor(file, group + "/" + prefix + "_scale"), zero_point);
}

// FP8 codes are stored as their bytes; the format tells what they are.
void write_codes(hdf5::File& file, const std::string& path, const Tensor& codes) {
  const bool bytes = codes.scalar_type() != torch::kChar;
  write_tensor(file, path, bytes ? codes.contiguous().view(torch::kByte) : codes);
}

Tensor read_codes(const hdf5::File& file, const std::string& path, const Scheme& scheme) {
  const Tensor codes = read_tensor(file, path);
  if (!scheme.is_fp8()) return codes;
  VERNIER_CHECK(codes.scalar_type() == torch::kByte, "the bytes of ", to_string(scheme.format),
                " codes must be uint8, not ", c10::toString(codes.scalar_type()));
  return codes.view(fp8_dtype(scheme.format));
}

// Whether a layer can run with what was read.
void check_quantizers(QuantizedLayer& layer) {
  for (const auto& [what, quantizer] : layer.quantizers()) {
    const Scheme& scheme = quantizer->scheme();
    const Granularity granularity = scheme.granularity;
    const int64_t scales = quantizer->scale().numel();
    if (quantizer->operand() == Operand::weight) {
      VERNIER_CHECK(
          !scheme.dynamic &&
              (granularity == Granularity::per_channel || granularity == Granularity::per_tensor),
          what, "_granularity ", to_string(granularity), " is not per_channel or per_tensor");
      const int64_t wanted = granularity == Granularity::per_channel
                                 ? layer.float_weight().size(quantizer->axis())
                                 : 1;
      VERNIER_CHECK(scales == wanted, what, "_scale has ", scales, " elements, not ", wanted);
      continue;
    }
    VERNIER_CHECK(
        granularity == (scheme.dynamic ? Granularity::per_token : Granularity::per_tensor), what,
        "_granularity ", to_string(granularity), " is not per_tensor, or per_token if dynamic");
    VERNIER_CHECK(scheme.dynamic || scales == 1, what, "_scale has ", scales, " elements, not 1");
  }
}

// Every parameter and buffer that is not a quantizer's, under its name.
std::map<std::string, Tensor> plain_tensors(const torch::nn::Module& model) {
  std::set<std::string> of_quantizers;
  for (const auto& item : model.named_modules(std::string(), false))
    if (std::dynamic_pointer_cast<QuantizerImpl>(item.value()))
      for (const auto& tensors :
           {item.value()->named_buffers(false), item.value()->named_parameters(false)})
        for (const auto& tensor : tensors) of_quantizers.insert(item.key() + "." + tensor.key());
  std::map<std::string, Tensor> plain;
  for (const auto& tensors : {model.named_parameters(), model.named_buffers()})
    for (const auto& item : tensors)
      if (!of_quantizers.count(item.key())) plain.emplace(item.key(), item.value());
  return plain;
}

void write_checkpoint(const torch::nn::Module& model, const CheckpointInfo& info,
                      hdf5::File& file) {
  file.set_attribute("/", "format", kFormat);
  file.set_attribute("/", "version", kVersion);
  file.set_attribute("/", "architecture", info.architecture);
  file.set_attribute("/", "recipe", info.recipe);
  file.set_attribute("/", "model_fingerprint", info.fingerprint);
  file.write_text("config", info.config);
  file.create_group("layers");
  file.create_group("tensors");
  std::map<std::string, Tensor> tensors = plain_tensors(model);
  for (const auto& [name, layer] : quantized_layers(model)) {
    if (!layer->quantized()) {
      VERNIER_CHECK(!layer->input_quantizer || layer->input_quantizer->pre_scale().numel() == 0,
                    "layer '", name,
                    "' has factors on its input but is not quantized, which a checkpoint has no "
                    "place for: quantize it, or smooth without it");
      continue;
    }
    const std::string group = "layers/" + name;
    const auto* folding = dynamic_cast<const FoldsBatchNorm*>(layer.get());
    VERNIER_CHECK(!folding || !folding->batch_norm, "layer '", name,
                  "' has a batch norm folded in: convert() the model, or merge_batch_norms(), "
                  "before exporting it");
    for (const auto& item : layer->quantizers())
      VERNIER_CHECK(item.quantizer->calibrated(), "layer '", name,
                    "' is not calibrated: calibrate the model before exporting it");
    file.create_group(group);
    if (!layer->input_from().empty()) file.set_attribute(group, "input_from", layer->input_from());
    if (layer->emits_codes()) file.set_attribute(group, "emits_codes", true);
    if (layer->weight_quantizer) {  // first: a scale that follows the weight is made by its codes
      write_codes(
          file, group + "/weight_codes",
          layer->weight_quantizer->codes(layer->float_weight().detach().to(torch::kFloat)).codes);
      tensors.erase(name + ".weight");
    }
    for (const auto& [what, quantizer] : layer->quantizers()) {
      quantizer->check_learned();
      write_quantizer(file, group, what, *quantizer);
    }
  }
  for (const auto& [name, tensor] : tensors) write_tensor(file, "tensors/" + name, tensor);
}

}  // namespace

void save_checkpoint(const torch::nn::Module& model, const CheckpointInfo& info,
                     const std::filesystem::path& path) {
  hdf5::write_atomically(path, [&](hdf5::File& file) { write_checkpoint(model, info, file); });
}

bool Checkpoint::is_checkpoint(const std::filesystem::path& path) {
  try {
    const hdf5::File file = hdf5::File::open(path);
    return file.has_attribute("/", "format") && file.attribute_string("/", "format") == kFormat;
  } catch (const Error&) {
    return false;
  }
}

Checkpoint Checkpoint::open(const std::filesystem::path& path) {
  hdf5::File file = hdf5::File::open(path);
  VERNIER_CHECK(
      file.has_attribute("/", "format") && file.attribute_string("/", "format") == kFormat &&
          file.is_group("layers") && file.is_group("tensors"),
      path.string(),
      " is not a vernier checkpoint: make one with `vernier quantize` or `vernier export`");
  const int64_t version = file.attribute_int("/", "version");
  VERNIER_CHECK(version == kVersion, path.string(), " has version ", version,
                " of the checkpoint format and this program reads version ", kVersion);
  CheckpointInfo info;
  info.architecture = file.attribute_string("/", "architecture");
  info.recipe = file.attribute_string("/", "recipe");
  info.fingerprint = file.attribute_string("/", "model_fingerprint");
  info.config = file.read_text("config");
  return Checkpoint(std::move(file), std::move(info));
}

TensorShapes Checkpoint::tensor_shapes() const {
  TensorShapes shapes;
  const auto add = [&](const std::string& name, const std::string& dataset) {
    file_.check_claim(dataset);
    shapes.emplace(name, file_.info(dataset).shape);
  };
  for (const std::string& name : file_.children("layers"))
    if (file_.exists("layers/" + name + "/weight_codes"))
      add(name + ".weight", "layers/" + name + "/weight_codes");
  for (const std::string& name : file_.children("tensors")) add(name, "tensors/" + name);
  return shapes;
}

void Checkpoint::load_into(torch::nn::Module& model) const {
  const torch::NoGradGuard no_grad;
  const std::string where = file_.path().string();
  std::map<std::string, Tensor> tensors = plain_tensors(model);
  const auto parameters = model.named_parameters();
  std::set<std::string> in_file;
  for (const std::string& name : file_.children("layers")) in_file.insert(name);
  for (const auto& [name, layer] : quantized_layers(model)) {
    if (in_file.erase(name) == 0) {
      layer->set_quantized(false);
      continue;
    }
    const std::string group = "layers/" + name;
    try {
      layer->set_mode(Mode::full);
      layer->set_emits_codes(file_.has_attribute(group, "emits_codes"));
      layer->set_input_from(file_.has_attribute(group, "input_from")
                                ? file_.attribute_string(group, "input_from")
                                : "");
      if (file_.has_attribute(group, "output_bits") && !layer->output_quantizer)
        layer->quantize_output({});
      layer->set_layer_name(name);
      layer->set_pre_scale(file_.exists(group + "/input_pre_scale")
                               ? read_tensor(file_, group + "/input_pre_scale")
                               : torch::empty({0}, torch::kFloat));
      for (const auto& [what, quantizer] : layer->quantizers())
        read_quantizer(file_, group, what, *quantizer);
      check_quantizers(*layer);
      if (layer->weight_quantizer)
        layer->load_weight_codes(
            read_codes(file_, group + "/weight_codes", layer->weight_quantizer->scheme()));
    } catch (const Error& error) {
      throw Error(concat(where, ": layer '", name, "': ", error.what()));
    }
    if (layer->weight_quantizer) tensors.erase(name + ".weight");
  }
  VERNIER_CHECK(in_file.empty(), where, ": the model has no layer '", *in_file.begin(),
                "': the checkpoint is of another architecture");
  for (const std::string& name : file_.children("tensors")) {
    const auto found = tensors.find(name);
    VERNIER_CHECK(found != tensors.end(), where, ": the model has no tensor '", name,
                  "': the checkpoint is of another architecture");
    const Tensor value = read_tensor(file_, "tensors/" + name);
    VERNIER_CHECK(value.sizes() == found->second.sizes(), where, ": tensor '", name, "' has shape ",
                  value.sizes(), " but the model needs ", found->second.sizes());
    // Buffers may have followed the model to another dtype; parameters say what it computes in.
    const torch::Tensor* parameter = parameters.find(name);
    VERNIER_CHECK(!parameter || value.scalar_type() == parameter->scalar_type(), where,
                  ": tensor '", name, "' has dtype ", c10::toString(value.scalar_type()),
                  " but the model needs ", c10::toString(found->second.scalar_type()));
    VERNIER_CHECK(!value.is_floating_point() || value.isfinite().all().item<bool>(), where,
                  ": tensor '", name, "' holds NaN or infinite values: export the model again");
    found->second.set_data(value);
    tensors.erase(found);
  }
  VERNIER_CHECK(tensors.empty(), where, ": tensor '", tensors.begin()->first,
                "' is missing: the file is damaged or of another architecture");
  try {
    set_mode(model, Mode::integer);
  } catch (const Error& error) {
    throw Error(concat(where, ": ", error.what()));
  }
}

}  // namespace vernier
