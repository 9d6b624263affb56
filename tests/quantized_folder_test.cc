// compressed-tensors folders: written (recipes/compressed_tensors.h) and read back
// (recipes/models/quantized_folder.h). tests/compressed_tensors_test.py has transformers load them.
#include <gtest/gtest.h>
#include <vernier/qat/layer.h>
#include <vernier/recipes/calibration_run.h>
#include <vernier/recipes/compressed_tensors.h>
#include <vernier/recipes/model_folder.h>
#include <vernier/recipes/recipe.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/temporary_folder.h>
#include <vernier/tests/tiny_bert.h>

namespace vernier {
namespace {

namespace fs = std::filesystem;
using testing::message_of;
using testing::read_bytes;
using testing::write_bytes;
using Json = nlohmann::ordered_json;

const std::string kLayer = "encoder.layer.0.attention.self.";
const std::string kWeights = "weights: {bits: 8, granularity: per_channel}";
const std::string kInputs = "activations: {bits: 8, granularity: per_tensor, symmetric: false}";

class QuantizedFolderTest : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::write_bert(source);
    testing::write_tokens(folder / "tokens.h5", testing::random_rows(10));
  }

  // The model with a recipe's scales.
  std::shared_ptr<TextModel> quantized(const Recipe& recipe) {
    auto model = load_text_model(source);
    apply_recipe(*model, recipe);
    const TokenDataset data = TokenDataset::open(folder / "tokens.h5");
    ModelStatistics statistics = plan_statistics(*model, data, 0, data.size());
    collect_statistics(*model, data, statistics);
    calibrate_layers(*model, statistics);
    return model;
  }
  std::shared_ptr<TextModel> quantized(const std::string& rules, const std::string& inputs) {
    return quantized(parse_recipe("{name: r, " + kWeights + ", " + inputs + rules + "}", "test"));
  }

  static torch::Tensor run(TextModel& model, Mode mode) {
    const ModeGuard in_mode(model, mode);
    const torch::NoGradGuard no_grad;
    return model.forward(make_batch(
        testing::random_rows(5, 7, 1, testing::kPositions, model.vocabulary()), torch::kCPU));
  }

  // What loading says of the folder after a change to its configuration.
  std::string loading(const std::function<void(Json&)>& change) {
    Json config = Json::parse(read_bytes(out / "config.json"));
    change(config["quantization_config"]);
    const std::string before = read_bytes(out / "config.json");
    write_bytes(out / "config.json", config.dump());
    const std::string message = message_of([&] { load_text_model(out); });
    write_bytes(out / "config.json", before);
    return message;
  }

  testing::TemporaryFolder folder;
  const fs::path source = folder / "model", out = folder / "out";
};

TEST_F(QuantizedFolderTest, HoldsWhatTheFormatSays) {
  const auto model = quantized(load_recipe("w8a8-static"));
  const CompressedTensorsReport report = save_compressed_tensors(*model, source, out);
  EXPECT_EQ(report.layers, 6);
  EXPECT_TRUE(report.joined.empty());
  Json config = Json::parse(read_bytes(out / "config.json"));
  EXPECT_EQ(config["quantization_config"], Json::parse(R"({
    "quant_method": "compressed-tensors", "version": "0.20.0", "format": "int-quantized",
    "quantization_status": "compressed", "kv_cache_scheme": null, "global_compression_ratio": null,
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {
      "targets": ["Linear"],
      "weights": {"num_bits": 8, "type": "int", "symmetric": true, "strategy": "channel",
                  "dynamic": false},
      "input_activations": {"num_bits": 8, "type": "int", "symmetric": false, "strategy": "tensor",
                            "dynamic": false},
      "output_activations": null}}})"));
  const SafetensorsFolder weights = SafetensorsFolder::open(out);
  const auto has = [&](const std::string& name, const char* dtype, std::vector<int64_t> shape) {
    ASSERT_TRUE(weights.contains(name)) << name;
    EXPECT_EQ(weights.info(name).dtype, dtype) << name;
    EXPECT_EQ(weights.info(name).shape, shape) << name;
  };
  has("encoder.layer.0.intermediate.dense.weight", "I8", {32, 16});
  has("encoder.layer.0.intermediate.dense.weight_scale", "F32", {32, 1});
  has("encoder.layer.0.intermediate.dense.input_scale", "F32", {1});
  has("encoder.layer.0.intermediate.dense.input_zero_point", "I8", {1});
  has("encoder.layer.0.intermediate.dense.bias", "F32", {32});
  EXPECT_EQ(weights.names().size(), SafetensorsFolder::open(source).names().size() + 6 * 3);
}

TEST_F(QuantizedFolderTest, ReadBackItComputesTheSameBits) {
  int number = 0;
  for (const char* inputs :
       {"activations: {granularity: per_tensor, symmetric: false}",
        "activations: {granularity: per_tensor, narrow_range: false}",
        "activations: {granularity: per_token}",
        "activations: {granularity: per_token}, rules: [{match: '*.output.dense', activations: "
        "{granularity: per_tensor, symmetric: false}}, {match: '*.intermediate.*', quantize: "
        "false}]"}) {
    const auto model = quantized("", inputs);
    const fs::path written = folder / concat("written", number++);
    save_compressed_tensors(*model, source, written);
    const auto read = load_text_model(written);
    EXPECT_EQ(read->info.recipe, "compressed-tensors");
    for (const Mode mode : {Mode::integer, Mode::fake_quant})
      EXPECT_TRUE(run(*read, mode).equal(run(*model, mode))) << inputs << to_string(mode);
    // And as a checkpoint, from which the folder comes again.
    save_checkpoint(*read, read->info, folder / "m.h5");
    const auto checkpoint = load_text_model(folder / "m.h5");
    const fs::path again = folder / concat("again", number);
    save_compressed_tensors(*checkpoint, source, again);
    EXPECT_EQ(read_bytes(again / "model.safetensors"), read_bytes(written / "model.safetensors"));
    EXPECT_EQ(read_bytes(again / "config.json"), read_bytes(written / "config.json"));
  }
  for (const char* recipe : {"fp8-static", "fp8-dynamic"}) {
    const auto model = quantized(load_recipe(recipe));
    save_compressed_tensors(*model, source, folder / recipe);
    const auto read = load_text_model(folder / recipe);
    EXPECT_TRUE(run(*read, Mode::fake_quant).equal(run(*model, Mode::fake_quant))) << recipe;
  }
}

TEST_F(QuantizedFolderTest, RowsAreOrderedAsTheFamilyStoresThem) {
  const fs::path families = fs::path(VERNIER_SOURCE_DIR) / "tests/fixtures/families";
  const auto dynamic = [&](const fs::path& path) {
    auto model = load_text_model(path);
    apply_recipe(*model, load_recipe("w8a8-dynamic"));
    calibrate_layers(*model, {});
    return model;
  };
  const auto model = dynamic(families / "gpt-neox");
  save_compressed_tensors(*model, families / "gpt-neox", out);
  EXPECT_TRUE(run(*load_text_model(out), Mode::integer).equal(run(*model, Mode::integer)));
  // The real values of codes and scales are those of the weights that they stand for.
  const SafetensorsFolder weights = SafetensorsFolder::open(out);
  const SafetensorsFolder floats = SafetensorsFolder::open(families / "gpt-neox");
  const std::string name = "gpt_neox.layers.0.attention.query_key_value.weight";
  const torch::Tensor scale = weights.tensor(name + "_scale");
  const torch::Tensor error = weights.tensor(name) * scale - floats.tensor(name).to(torch::kFloat);
  EXPECT_TRUE(error.abs().le(scale).all().item<bool>());

  EXPECT_CONTAINS(message_of([&] {
                    save_compressed_tensors(*dynamic(families / "gpt2"), families / "gpt2",
                                            folder / "gpt2");
                  }),
                  "GPT2LMHeadModel stores it transposed");
}

TEST_F(QuantizedFolderTest, SchemesAreGroupsAndFloatLayersAreIgnored) {
  const auto model = quantized(
      ", rules: [{match: '*.output.dense', activations: {granularity: per_token, symmetric: "
      "true}}, {match: '*.intermediate.*', quantize: false}]",
      kInputs);
  save_compressed_tensors(*model, source, out);
  const Json config = Json::parse(read_bytes(out / "config.json"))["quantization_config"];
  EXPECT_EQ(config["ignore"], Json::parse(R"(["encoder.layer.0.intermediate.dense", "lm_head"])"));
  EXPECT_EQ(config["config_groups"]["group_1"]["targets"], Json::parse(R"(["Linear"])"));
  EXPECT_EQ(config["config_groups"]["group_0"]["targets"],
            Json::parse(R"(["encoder.layer.0.attention.output.dense",
                            "encoder.layer.0.output.dense"])"));
  EXPECT_EQ(config["config_groups"]["group_0"]["input_activations"]["strategy"], "token");
  const SafetensorsFolder weights = SafetensorsFolder::open(out);
  EXPECT_FALSE(weights.contains("encoder.layer.0.output.dense.input_scale"));
  EXPECT_EQ(weights.info("encoder.layer.0.intermediate.dense.weight").dtype, "F32");
}

TEST_F(QuantizedFolderTest, LayersOfOneActivationGetOneRange) {
  for (const bool symmetric : {true, false}) {
    const auto model = quantized(
        ", rules: [{match: '*.key', activations: {calibrator: percentile, percentile: 80}}]",
        concat("activations: {granularity: per_tensor, symmetric: ", symmetric ? "true" : "false",
               "}"));
    const fs::path written = folder / (symmetric ? "symmetric" : "asymmetric");
    const CompressedTensorsReport report = save_compressed_tensors(*model, source, written);
    EXPECT_EQ(report.joined,
              (std::vector<std::string>{kLayer + "query", kLayer + "key", kLayer + "value"}));
    const SafetensorsFolder weights = SafetensorsFolder::open(written);
    const torch::Tensor scale = weights.tensor(kLayer + "query.input_scale");
    float largest = 0;
    for (const auto& [name, layer] : quantized_layers(*model))
      if (name.starts_with(kLayer))
        largest = std::max(largest, layer->input_quantizer->scale().item<float>());
    EXPECT_NEAR(scale.item<float>(), largest, 0.02 * largest);
    for (const char* name : {"key", "value"}) {
      EXPECT_TRUE(weights.tensor(kLayer + name + ".input_scale").equal(scale));
      if (!symmetric) {
        EXPECT_TRUE(weights.tensor(kLayer + name + ".input_zero_point")
                        .equal(weights.tensor(kLayer + "query.input_zero_point")));
      }
    }
  }
}

TEST_F(QuantizedFolderTest, RefusesWhatTheFormatHasNoPlaceFor) {
  const auto saving = [&](const std::string& rules, const std::string& inputs = kInputs) {
    const auto model = quantized(rules, inputs);
    return message_of([&] { save_compressed_tensors(*model, source, out); });
  };
  EXPECT_CONTAINS(saving(", rules: [{match: '*.key', weights: {bits: 4}}]"),
                  "layer '" + kLayer + "key': its weight has 4 bits");
  EXPECT_CONTAINS(saving(", rules: [{match: '*.key', quantize: false}]"),
                  "only some of them are quantized");
  EXPECT_CONTAINS(saving(", rules: [{match: '*.key', activations: {granularity: per_token, "
                         "symmetric: true}}]"),
                  "quantized in different ways");
  EXPECT_CONTAINS(saving(", skip: ['*']"), "no quantized layer");

  const auto refusal = [&](TextModel& model) {
    return message_of([&] { save_compressed_tensors(model, source, out); });
  };
  auto model =
      quantized(parse_recipe("{name: r, weights: {format: e5m2}, activations: {format: "
                             "e5m2, granularity: per_token}}",
                             "test"));
  EXPECT_CONTAINS(refusal(*model), "e5m2");
  model = load_text_model(source);
  apply_recipe(*model, load_recipe("w8a8-static"));
  EXPECT_CONTAINS(refusal(*model), "not calibrated");
  model = quantized("", kInputs);
  quantized_layers(*model).front().layer->set_pre_scale(torch::full({16}, 2.0f));
  EXPECT_CONTAINS(refusal(*model), "pre_scale");
  EXPECT_FALSE(fs::exists(out));
}

TEST_F(QuantizedFolderTest, AFolderThatIsQuantizedIsNoFloatModel) {
  save_compressed_tensors(*quantized("", kInputs), source, out);
  const auto model = load_text_model(out);
  EXPECT_CONTAINS(message_of([&] { save_hugging_face(*model, out, folder / "x"); }),
                  "is quantized: give the folder of the float model");
}

TEST_F(QuantizedFolderTest, DamagedFoldersAreRefused) {
  save_compressed_tensors(*quantized("", kInputs), source, out);
  EXPECT_EQ(loading([](Json&) {}), "");
  EXPECT_CONTAINS(loading([](Json& q) { q["quant_method"] = "gptq"; }), "quant_method \"gptq\"");
  EXPECT_CONTAINS(loading([](Json& q) { q["format"] = "pack-quantized"; }), "\"pack-quantized\"");
  EXPECT_CONTAINS(loading([](Json& q) { q.erase("config_groups"); }), "config_groups is missing");
  EXPECT_CONTAINS(loading([](Json& q) {
                    q["kv_cache_scheme"] = {{"num_bits", 8}};
                  }),
                  "kv_cache_scheme is not implemented");
  const auto group = [&](const char* part, const char* field, const Json& value) {
    return loading([&](Json& q) { q["config_groups"]["group_0"][part][field] = value; });
  };
  EXPECT_CONTAINS(group("weights", "num_bits", 4), "num_bits 4 is not implemented");
  EXPECT_CONTAINS(group("weights", "strategy", "group"), "strategy \"group\"");
  EXPECT_CONTAINS(group("weights", "strategy", "tensor"), "it needs 1 scales");
  EXPECT_CONTAINS(group("input_activations", "type", "float"), "two types");
  EXPECT_CONTAINS(
      loading([](Json& q) { q["config_groups"]["group_0"]["targets"] = {"re:.*(query|"}; }),
      "no regular expression");
  EXPECT_CONTAINS(
      loading([](Json& q) { q["config_groups"]["group_0"]["targets"] = {"re:.*query"}; }),
      "no group has it as a target");
  EXPECT_EQ(
      loading([](Json& q) { q["config_groups"]["group_0"]["targets"] = {"re:encoder[.].*"}; }), "");

  // Tensors.
  const auto without = [&](const std::string& name, const torch::Tensor& instead = {}) {
    std::vector<std::pair<std::string, torch::Tensor>> tensors;
    {
      const SafetensorsFolder weights = SafetensorsFolder::open(out);
      for (const std::string& one : weights.names())
        if (one != name) tensors.emplace_back(one, weights.tensor(one).clone());
    }
    if (instead.defined()) tensors.emplace_back(name, instead);
    const std::string before = read_bytes(out / "model.safetensors");
    write_safetensors(out / "model.safetensors", tensors);
    const std::string message = message_of([&] { load_text_model(out); });
    write_bytes(out / "model.safetensors", before);
    return message;
  };
  EXPECT_CONTAINS(without(kLayer + "key.weight_scale"),
                  "tensor '" + kLayer + "key.weight_scale' is missing");
  EXPECT_CONTAINS(without(kLayer + "key.input_zero_point"), "input_zero_point' is missing");
  EXPECT_CONTAINS(without(kLayer + "key.weight_scale", torch::ones({3})), "it needs 16 scales");
  EXPECT_CONTAINS(without(kLayer + "key.input_scale", torch::zeros({1})), "finite and positive");
  EXPECT_CONTAINS(without(kLayer + "key.weight", torch::ones({16, 16})),
                  "is of no layer with quantized weights");
  EXPECT_CONTAINS(without("pooler.weight_scale", torch::ones({1})),
                  "is of no layer with quantized weights");
  EXPECT_CONTAINS(without(kLayer + "key.weight_zero_point", torch::zeros({16, 1})),
                  "asymmetric weights are not implemented");
}

}  // namespace
}  // namespace vernier
