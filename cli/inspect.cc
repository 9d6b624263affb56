#include <vernier/calibration/hdf5.h>
#include <vernier/cli/commands.h>
#include <vernier/cli/console.h>
#include <vernier/export/safetensors.h>
#include <vernier/kernels/error.h>

namespace vernier::cli {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

struct Options {
  std::string path;
  bool json = false;
};

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += concat(i ? ", " : "", shape[i]);
  return text + "]";
}

// What a file is, and a table of what it holds: the first row is the heading.
struct Contents {
  Json json;
  std::vector<std::string> lines;
  std::vector<std::vector<std::string>> table;
};

Contents inspect_statistics(const fs::path& path) {
  const ModelStatistics statistics = load_statistics(path);
  Contents contents;
  contents.json["kind"] = "statistics";
  contents.json["samples"] = statistics.samples;
  contents.json["planned_samples"] = statistics.planned;
  contents.json["model_fingerprint"] = statistics.fingerprint;
  contents.lines = {concat("statistics of model ", statistics.fingerprint, ", ", statistics.samples,
                           " of ", statistics.planned, " samples")};
  contents.table = {{"layer input", "values", "min", "max", "zeros", "NaN", "Inf", "bin width"}};
  for (const auto& [name, site] : statistics.sites) {
    const Histogram& h = site.histogram;
    contents.table.push_back({name, grouped(h.total()), fixed(h.range().min, 4),
                              fixed(h.range().max, 4), grouped(h.zeros()), grouped(h.nans()),
                              grouped(h.infinities()), concat("2^", h.exponent())});
    Json& item = contents.json["sites"][name];
    item["values"] = h.total();
    item["min"] = h.range().min;
    item["max"] = h.range().max;
    item["zeros"] = h.zeros();
    item["nans"] = h.nans();
    item["infinities"] = h.infinities();
    item["exponent"] = h.exponent();
    item["channels"] = site.channels.size();
  }
  return contents;
}

Contents inspect_checkpoint(const fs::path& path) {
  const auto model = load_text_model(path);
  Contents contents;
  contents.json["kind"] = "checkpoint";
  contents.json["architecture"] = model->info.architecture;
  contents.json["recipe"] = model->info.recipe;
  contents.json["model_fingerprint"] = model->info.fingerprint;
  contents.json["bytes"] = model_bytes(path);
  contents.lines = {concat(model->info.architecture, " quantized with ", model->info.recipe, ", ",
                           megabytes(model_bytes(path)), ", from model ", model->info.fingerprint)};
  contents.table = {{"layer", "shape", "weight", "input", "input scale"}};
  for (const auto& [name, layer] : quantized_layers(*model)) {
    Json& item = contents.json["layers"][name];
    item["shape"] = layer->float_weight().sizes().vec();
    item["quantized"] = layer->quantized();
    if (!layer->quantized()) {
      contents.table.push_back(
          {name, shape_text(layer->float_weight().sizes().vec()), "float", "float", "-"});
      continue;
    }
    const QuantizerImpl& input = *layer->input_quantizer;
    const std::string weight_scheme = to_string(layer->weight_quantizer->scheme());
    const std::string input_scheme = to_string(input.scheme());
    item["weight"] = weight_scheme;
    item["input"] = input_scheme;
    std::string scale = "per token";
    if (!input.scheme().dynamic) {
      item["input_scale"] = input.scale().item<float>();
      scale = concat(input.scale().item<float>());
      if (const auto zero_point = input.zero_point()) {
        item["input_zero_point"] = zero_point->item<int>();
        scale += concat(", zero point ", zero_point->item<int>());
      }
    }
    contents.table.push_back({name, shape_text(layer->float_weight().sizes().vec()), weight_scheme,
                              input_scheme, scale});
  }
  return contents;
}

Contents inspect_data(const fs::path& path) {
  const TokenDataset data = TokenDataset::open(path);
  const hdf5::File file = hdf5::File::open(path);
  Contents contents;
  contents.json["kind"] = data.pairs() ? "token pairs" : "tokens";
  contents.json["samples"] = data.size();
  contents.lines = {concat(data.pairs() ? "pairs of sequences" : "token sequences", ", ",
                           data.size(), " samples")};
  contents.table = {{"dataset", "type", "shape"}};
  const auto add = [&](const std::string& name) {
    if (!file.is_dataset(name)) return;
    const hdf5::DatasetInfo info = file.info(name);
    contents.table.push_back({name, hdf5::element_type_name(info.type), shape_text(info.shape)});
    contents.json["datasets"][name] = {{"type", hdf5::element_type_name(info.type)},
                                       {"shape", info.shape}};
  };
  for (const char* name : {"input_ids", "attention_mask", "a/input_ids", "a/attention_mask",
                           "b/input_ids", "b/attention_mask", "score"})
    if (file.exists(name)) add(name);
  return contents;
}

Contents inspect_weights(const fs::path& path) {
  Contents contents;
  contents.table = {{"tensor", "dtype", "shape"}};
  int64_t parameters = 0;
  const auto add = [&](const auto& weights) {
    for (const std::string& name : weights.names()) {
      const SafetensorsInfo& info = weights.info(name);
      int64_t count = 1;
      for (const int64_t size : info.shape) count *= size;
      parameters += count;
      contents.table.push_back({name, info.dtype, shape_text(info.shape)});
      contents.json["tensors"][name] = {{"dtype", info.dtype}, {"shape", info.shape}};
    }
  };
  contents.json["kind"] = fs::is_directory(path) ? "folder" : "safetensors";
  if (fs::is_directory(path)) {
    add(SafetensorsFolder::open(path));
  } else {
    add(SafetensorsFile::open(path));
  }
  contents.json["parameters"] = parameters;
  contents.lines = {
      concat(contents.table.size() - 1, " tensors, ", grouped(parameters), " parameters")};
  return contents;
}

Contents inspect(const fs::path& path) {
  VERNIER_CHECK(fs::exists(path), path.string(), " does not exist");
  if (fs::is_directory(path) || path.extension() == ".safetensors") return inspect_weights(path);
  const hdf5::File file = hdf5::File::open(path);
  if (!file.has_attribute("/", "format")) return inspect_data(path);
  const std::string format = file.attribute_string("/", "format");
  if (format == "vernier-statistics") return inspect_statistics(path);
  if (format == "vernier-checkpoint") return inspect_checkpoint(path);
  throw Error(concat(path.string(), " is of the unknown format '", format, "'"));
}

int run(const Options& options) {
  const Contents contents = inspect(options.path);
  if (options.json) {
    print_json(contents.json);
  } else {
    for (const std::string& line : contents.lines) note(line);
    print_table(contents.table);
  }
  return kDone;
}

}  // namespace

void add_inspect(CLI::App& app, Action& action) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("inspect", "what is in a file");
  command
      ->add_option("file", options->path,
                   "statistics, checkpoint or data (HDF5), safetensors, or a Hugging Face folder")
      ->required();
  command->add_flag("--json", options->json, "print one JSON object on stdout");
  command->callback([options, &action] { action = [options] { return run(*options); }; });
}

}  // namespace vernier::cli
