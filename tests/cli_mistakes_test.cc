// What users do wrong: exit code 2, one line that says what, and nothing written.
#include <sys/stat.h>
#include <torch/cuda.h>
#include <vernier/tests/cli_program.h>

#include <functional>

namespace vernier::testing {
namespace {

class CliMistakes : public CliTest {
 protected:
  static std::string data_of(const std::string& name,
                             const std::function<void(hdf5::File&)>& fill) {
    write_hdf5(path(name), fill);
    return path(name);
  }
  static std::string file_of(const std::string& name, const std::string& bytes) {
    write_bytes(path(name), bytes);
    return path(name);
  }
  static std::string folder_of(const std::string& name,
                               const std::function<void(const fs::path&)>& damage) {
    write_bert(path(name));
    damage(path(name));
    return path(name);
  }

  struct Case {
    const char* what;
    Arguments arguments;
    std::string part;
  };
  /// Runs every command, each of which must be refused and write nothing.
  void expect_all_refused(const std::vector<Case>& cases) {
    for (const auto& [what, arguments, part] : cases) {
      SCOPED_TRACE(what);
      expect_refused(run(arguments), part);
      for (const auto& left : fs::directory_iterator(own_.path())) {
        ADD_FAILURE() << "it wrote " << left.path();
        fs::remove_all(left.path());
      }
    }
  }
};

TEST_F(CliMistakes, InModels) {
  const auto header = [](const std::string& json, uint64_t length) {
    return std::string(reinterpret_cast<const char*>(&length), 8) + json;
  };
  const std::string enormous =
      R"({"x":{"dtype":"F32","shape":[4611686018427387904,16],"data_offsets":[0,4]}})";
  const auto weights = [](const std::string& bytes) {
    return [=](const fs::path& folder) { write_bytes(folder / "model.safetensors", bytes); };
  };
  const auto calibrate_model = [&](const std::string& model) {
    return Arguments{"calibrate",       "--model", model,        "--data",
                     path("tokens.h5"), "--out",   own("out.h5")};
  };
  const std::string shard = "model-00001-of-00001.safetensors";
  NamedTensors large = random_tensors(tiny_config());
  tensor_of(large, "embeddings.word_embeddings.weight") *= 1e38;
  const std::string overflowing = path("overflowing");
  write_bert(overflowing, tiny_config(), large);
  const std::string cut = file_of("cut.h5", read_bytes(path("model.h5")).substr(0, 5000));
  expect_all_refused({
      {"missing", calibrate_model(path("nowhere")), "nowhere does not exist"},
      {"missing, to be quantized",
       {"quantize", "--model", path("nowhere"), "--recipe", "w8a8-dynamic", "--out", own("o.h5")},
       "nowhere is not a Hugging Face folder"},
      {"missing shard",
       calibrate_model(folder_of("sharded",
                                 [&](const fs::path& folder) {
                                   fs::remove(folder / "model.safetensors");
                                   write_bytes(folder / "model.safetensors.index.json",
                                               R"({"weight_map": {"x": ")" + shard + "\"}}");
                                 })),
       shard},
      {"unknown architecture",
       calibrate_model(folder_of("gpt",
                                 [](const fs::path& folder) {
                                   Json config = tiny_config();
                                   config["architectures"] = {"GPT2Model"};
                                   write_bytes(folder / "config.json", config.dump());
                                 })),
       "supported are: BertModel"},
      {"no JSON",
       calibrate_model(folder_of(
           "nojson", [](const fs::path& folder) { write_bytes(folder / "config.json", "{"); })),
       "config.json"},
      {"header beyond the file",
       calibrate_model(folder_of("header", weights(header("{}", uint64_t{1} << 60)))),
       "model.safetensors"},
      {"enormous tensor",
       calibrate_model(folder_of("enormous", weights(header(enormous, enormous.size()) + "1234"))),
       "model.safetensors"},
      {"already quantized, to calibrate", calibrate_model(path("model.h5")), "quantized already"},
      {"already quantized, to export",
       {"export", "--model", path("model.h5"), "--recipe", "w8a8-dynamic", "--out", own("o.h5")},
       "quantized already"},
      {"checkpoint cut short", eval(cut, "spearman"), "cut.h5"},
      {"values that overflow", eval(overflowing, "spearman"),
       "overflowing in mode float gives NaN"},
      {"values that overflow in the reference",
       eval(path("model.h5"), "sqnr", {"--reference", overflowing}),
       "overflowing in mode float gives NaN"},
      {"folder to validate",
       {"validate", "--model", path("model"), "--data", path("pairs.h5")},
       "is a folder"},
      {"another reference", validate({"--reference", path("other")}), "is not the model"},
      {"float model in integer mode", eval(path("model"), "spearman", {"--mode", "integer"}),
       "is a float model"},
  });
}

TEST_F(CliMistakes, InData) {
  const auto one = [](const char* name, const std::vector<int64_t>& values,
                      const std::vector<int64_t>& shape) {
    return [=](hdf5::File& file) { file.write(name, values, shape); };
  };
  const std::string out = own("out.h5");
  const std::string foreign =
      data_of("foreign.h5", one("input_ids", {1, 2, kVocabulary, 4}, {2, 2}));
  const std::string unscored = data_of("unscored.h5", [](hdf5::File& file) {
    testing::add_tokens(file, random_rows(3), "a/");
    testing::add_tokens(file, random_rows(3), "b/");
  });
  const std::string whole = read_bytes(path("tokens.h5"));
  expect_all_refused({
      {"missing", calibrate(path("nowhere.h5"), out), "nowhere.h5"},
      {"wrong name", calibrate(data_of("ids.h5", one("ids", {1, 2}, {1, 2})), out),
       "needs the dataset 'input_ids'"},
      {"wrong rank", calibrate(data_of("rank.h5", one("input_ids", {1, 2}, {2})), out),
       "has 1 dimensions but needs 2"},
      {"outside the vocabulary", calibrate(foreign, out), "token id 50 outside"},
      {"cut short", calibrate(file_of("short.h5", whole.substr(0, whole.size() / 2)), out),
       "short.h5"},
      {"no HDF5", calibrate(file_of("text.h5", "1 2 3"), out), "text.h5"},
      {"a checkpoint", calibrate(path("model.h5"), out), "needs the dataset 'input_ids'"},
      {"to quantize with", quantize("w8a8-static", out, {"--data", foreign}), "token id 50"},
      {"to quantize with, late", quantize("w8a8-dynamic", out, {"--eval-data", foreign}),
       "token id 50"},
      {"pairs without scores, late", quantize("w8a8-dynamic", out, {"--eval-data", unscored}),
       "the dataset 'score'"},
      {"to validate with",
       {"validate", "--model", path("model.h5"), "--data", foreign},
       "token id 50"},
      {"no pairs for spearman",
       {"eval", "--model", path("model"), "--data", path("tokens.h5"), "--metric", "spearman"},
       "needs pairs"},
      {"more samples than there are", calibrate(path("tokens.h5"), out, {"--samples", "41"}),
       "not all there"},
      {"first beyond the end", calibrate(path("tokens.h5"), out, {"--first", "40"}),
       "not all there"},
      {"a sum beyond int64",
       calibrate(path("tokens.h5"), out, {"--first", "1", "--samples", "9223372036854775807"}),
       "not all there"},
      {"no samples", calibrate(path("tokens.h5"), out, {"--samples", "0"}), "not all there"},
      {"unknown file to inspect", {"inspect", file_of("plain.txt", "text")}, "plain.txt"},
      {"missing file to inspect", {"inspect", path("nowhere")}, "does not exist"},
  });
}

TEST_F(CliMistakes, InStatistics) {
  expect_done({"calibrate", "--model", path("other"), "--data", path("tokens.h5"), "--out",
               path("other.h5"), "--device", "cpu"});
  Json heads = tiny_config();
  heads["num_attention_heads"] = 4;
  write_bert(path("heads"), heads, random_tensors(tiny_config()));
  const auto share = [&](const std::string& name, const Arguments& range) {
    expect_done(calibrate(path("tokens.h5"), path(name), range));
    return path(name);
  };
  const std::string head = share("head.h5", {"--samples", "10"}),
                    tail = share("tail.h5", {"--first", "20"}), sum = path("sum.h5");
  expect_done({"calibrate", "--out", sum, "--merge", head, tail});
  const std::string out = own("out.h5");
  const std::string newer = path("newer.h5");
  write_hdf5(newer, [](hdf5::File& file) {
    file.set_attribute("/", "format", "vernier-statistics");
    file.set_attribute("/", "version", 99);
    file.create_group("sites");
  });
  expect_all_refused({
      {"none", export_to(out), "give statistics with --stats"},
      {"of another model", export_to(out, {"--stats", path("other.h5")}),
       "statistics of another model"},
      {"data for statistics", export_to(out, {"--stats", path("tokens.h5")}),
       "not a statistics file"},
      {"missing", export_to(out, {"--stats", path("nowhere.h5")}), "nowhere.h5"},
      {"newer", export_to(out, {"--stats", newer}), "version 99"},
      {"merged with another model's",
       {"calibrate", "--out", out, "--merge", path("stats.h5"), path("other.h5")},
       "different models"},
      {"of the same weights in another configuration",
       {"export", "--model", path("heads"), "--out", out, "--stats", path("stats.h5")},
       "statistics of another model"},
      {"merged with itself",
       {"calibrate", "--out", out, "--merge", path("stats.h5"), path("stats.h5")},
       "samples 0 to 39 of the data"},
      {"merged with a part of it",
       {"calibrate", "--out", out, "--merge", sum, tail},
       "samples 20 to 39 of the data"},
      {"merged with a model",
       {"calibrate", "--out", out, "--model", path("model"), "--merge", path("stats.h5")},
       "it takes no --model"},
  });
}

TEST_F(CliMistakes, InOutputs) {
  fs::create_directory(path("taken"));
  // Not even root may create a file in /proc.
  const std::string locked = geteuid() == 0 ? "/proc" : path("locked");
  if (geteuid() != 0) fs::create_directory(locked);
  ::chmod(path("locked").c_str(), 0555);
  const auto to = [&](const std::string& out, const char* part) {
    return Case{part, calibrate(path("tokens.h5"), out), part};
  };
  const std::string missing = path("nowhere/out.h5"), hint = "does not exist; create it first";
  expect_all_refused({
      to(locked + "/out.h5", "cannot write"),
      to(missing, "does not exist; create it first"),
      to(path("taken"), "it is a folder"),
      to(path("tokens.h5") + "/out.h5", "is not a folder"),
      to("/dev/null", "not a regular file"),
      to("", "output path is empty"),
      {"quantize", quantize("w8a8-dynamic", missing), hint},
      {"export", export_to(missing, {"--recipe", "w8a8-dynamic"}), hint},
      {"merge", {"calibrate", "--out", missing, "--merge", path("stats.h5")}, hint},
  });
}

TEST_F(CliMistakes, InOptions) {
  const std::string out = own("out.h5"), tokens = path("tokens.h5");
  const std::string recipe = file_of("bad.yaml", "name: x\nweights: {bits: 3.5}\nactivations: {}");
  const auto on_device = [&](const char* device) {
    Arguments command = calibrate(tokens, out);
    command.back() = device;  // for cpu
    return command;
  };
  std::vector<Case> cases = {
      {"no command", {}, "subcommand"},
      {"unknown command", {"quantise"}, "quantise"},
      {"unknown option", calibrate(tokens, out, {"--fast"}), "--fast"},
      {"required option", {"calibrate", "--model", path("model")}, "--out"},
      {"no number", calibrate(tokens, out, {"--samples", "some"}), "--samples"},
      {"negative", calibrate(tokens, out, {"--first", "-1"}), "--first"},
      {"nothing to do", {"calibrate", "--out", out}, "give --model and --data"},
      {"saving never", calibrate(tokens, out, {"--save-every", "0"}), "--save-every"},
      {"batches of none", validate({"--batch-size", "0"}), "batch size must be at least 1"},
      {"unknown device", on_device("tpu"), "unknown device 'tpu'"},
      {"unknown recipe", quantize("w8a9", out), "unknown recipe 'w8a9': use "},
      {"broken recipe", quantize(recipe, out), "bad.yaml: weights: the value of 'bits'"},
      {"static recipe without data", quantize("w8a8-static", out), "--data"},
      {"unknown calibrator", quantize("w8a8-static", out, {"--calibrator", "best"}), "'best'"},
      {"percentile alone", quantize("w8a8-dynamic", out, {"--percentile", "99"}), "goes with"},
      {"percentile 0",
       quantize("w8a8-static", out, {"--calibrator", "percentile", "--percentile", "0"}),
       "(0, 100]"},
      {"unknown metric", eval(path("model"), "bleu"), "--metric"},
      {"no reference", eval(path("model.h5"), "sqnr"), "give --reference"},
      {"unknown mode", eval(path("model.h5"), "spearman", {"--mode", "int8"}), "'int8'"},
      {"mode observe", eval(path("model.h5"), "spearman", {"--mode", "observe"}), "observe"},
  };
  for (const char* device : {"cuda", "cuda:99"}) {
#ifdef VERNIER_WITH_CUDA
    if (std::string(device) == "cuda" && torch::cuda::is_available()) continue;
#endif
    cases.push_back({device, on_device(device), std::string("--device ") + device});
  }
  expect_all_refused(cases);
}

}  // namespace
}  // namespace vernier::testing
