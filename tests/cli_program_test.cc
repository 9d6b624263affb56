// What the program's commands do and print, from a model to a proven checkpoint.
#include <vernier/recipes/comparison.h>
#include <vernier/tests/cli_program.h>

namespace vernier::testing {
namespace {

// ---- The way from a model to a checkpoint -------------------------------------------------------

int64_t weight_bytes(const std::string& folder) {
  return static_cast<int64_t>(fs::file_size(fs::path(folder) / "model.safetensors"));
}

void expect_numbers(const Json& json, const std::vector<const char*>& keys) {
  for (const char* key : keys) {
    ASSERT_TRUE(json.contains(key)) << key;
    EXPECT_TRUE(json[key].is_number()) << key << ": " << json[key];
  }
}

/// What validation must have found, whatever the recipe.
void expect_proven(const Json& json) {
  for (const char* key :
       {"code_mismatches", "weight_code_mismatches", "accumulator_mismatches", "outside_bound"})
    EXPECT_EQ(json.at(key), 0) << key;
  for (const char* key : {"codes", "weight_codes", "accumulators", "outputs"})
    EXPECT_GT(json.at(key), 0) << key;
  EXPECT_EQ(json.at("passed"), true);
  EXPECT_EQ(json.at("layers_quantized"), kLinearsPerLayer);
}

TEST_F(CliTest, QuantizeGoesTheWholeWay) {
  for (const std::string recipe : {"w8a8-static", "w8a8-dynamic"}) {
    SCOPED_TRACE(recipe);
    const std::string out = own(recipe + ".h5");
    const bool is_static = recipe == "w8a8-static";
    const Json json = run_json(
        quantize(recipe, out,
                 is_static ? Arguments{"--data", path("tokens.h5"), "--eval-data", path("pairs.h5")}
                           : Arguments{"--eval-data", path("pairs.h5")}));
    expect_proven(json);
    expect_numbers(json, {"float", "fake_quant", "integer", "ms_float", "ms_fake_quant",
                          "ms_integer", "moved_share", "relative_output_error"});
    EXPECT_EQ(json["metric"], "spearman");
    EXPECT_EQ(json["samples"], 2 * kPairs);
    EXPECT_EQ(json["recipe"], recipe);
    EXPECT_EQ(json["bytes_float"], weight_bytes(path("model")));
    EXPECT_EQ(json["bytes_integer"], fs::file_size(out));
    EXPECT_GT(json["sqnr_db_integer"], 10);
    EXPECT_NEAR(json["integer"], json["float"], 20);
  }
  EXPECT_EQ(own_.entries(), 2u);
}

TEST_F(CliTest, QuantizeWithoutScoresOrValidation) {
  const Json json = run_json(quantize("w8a8-static", own("a.h5"), {"--data", path("tokens.h5")}));
  expect_proven(json);
  EXPECT_EQ(json["metric"], "sqnr_db");
  EXPECT_TRUE(json["float"].is_null());
  EXPECT_GT(json["integer"], 10);

  const Json unjudged = run_json(quantize("w8a8-dynamic", own("b.h5")));
  EXPECT_EQ(unjudged["bytes_integer"], fs::file_size(own("b.h5")));
  EXPECT_FALSE(unjudged.contains("passed"));
}

TEST_F(CliTest, CalibratorsAreChosenByOption) {
  const auto scale_with = [&](const Arguments& options) {
    expect_done(export_to(own("c.h5"), Arguments{"--stats", path("stats.h5")} + options));
    const Json layers = run_json({"inspect", own("c.h5")})["layers"];
    return layers["encoder.layer.0.attention.self.query"]["input_scale"].get<double>();
  };
  const double whole = scale_with({"--calibrator", "min_max"});
  EXPECT_LT(scale_with({"--calibrator", "percentile", "--percentile", "80"}), whole);
  EXPECT_LT(scale_with({"--calibrator", "percentile", "--percentile", "60"}), 0.9 * whole);
}

TEST_F(CliTest, StepByStepIsTheSameAsQuantize) {
  expect_done(quantize("w8a8-static", own("whole.h5"), {"--data", path("tokens.h5")}));
  EXPECT_EQ(read_bytes(own("whole.h5")), read_bytes(path("model.h5")));
}

TEST_F(CliTest, ValidateComparesEveryLayer) {
  const Json alone = run_json(validate());
  expect_proven(alone);
  EXPECT_FALSE(alone.contains("float"));
  const Json json = run_json(validate({"--reference", path("model"), "--batch-size", "7"}));
  expect_proven(json);
  expect_numbers(json, {"float", "fake_quant", "integer", "ms_float", "cosine_error_integer"});
  EXPECT_EQ(json["codes"], alone["codes"]);
  ASSERT_EQ(json["layer_results"].size(), static_cast<size_t>(kLinearsPerLayer));
  int64_t codes = 0;
  for (const Json& layer : json["layer_results"]) {
    codes += layer.at("codes").get<int64_t>();
    EXPECT_EQ(layer.at("code_mismatches"), 0);
    EXPECT_LE(layer.at("worst_of_bound"), 1);
  }
  EXPECT_EQ(json["codes"], codes);
  EXPECT_CONTAINS(run(validate()).err, "computes what fake-quantization says");
}

TEST_F(CliTest, ABoundNotMetIsExitCodeOne) {
  const Json json = run_json(validate({"--tolerance", "0"}), 1);
  EXPECT_GT(json["relative_output_error"], 0);
  EXPECT_EQ(json["passed"], false);
  const Outcome outcome = run(validate({"--tolerance", "0"}));
  EXPECT_EQ(outcome.code(), 1);
  EXPECT_CONTAINS(outcome.err, "NOT PASSED");
  EXPECT_EQ(
      run(quantize("w8a8-static", own("q.h5"), {"--data", path("tokens.h5"), "--tolerance", "0"}))
          .code(),
      1);
}

TEST_F(CliTest, EvalGivesTheLibrarysFigures) {
  const TokenDataset data = TokenDataset::open(path("pairs.h5"));
  const auto reference = load_text_model(path("model"));
  const auto embeddings = embed(*reference, data, 64);
  const Json json = run_json(eval(path("model"), "spearman"));
  EXPECT_NEAR(json["value"], similarity_spearman(embeddings, data.scores()), 1e-6);
  EXPECT_EQ(json["mode"], "float");
  EXPECT_EQ(json["samples"], 2 * kPairs);

  const auto quantized = load_text_model(path("model.h5"));
  for (const Mode mode : {Mode::full, Mode::fake_quant, Mode::integer}) {
    set_mode(*quantized, Mode::full);
    set_mode(*quantized, mode);
    const Json sqnr = run_json(
        eval(path("model.h5"), "sqnr", {"--reference", path("model"), "--mode", to_string(mode)}));
    EXPECT_EQ(sqnr["mode"], to_string(mode));
    EXPECT_NEAR(sqnr["value"], embedding_sqnr(embed(*quantized, data, 64), embeddings), 0.01);
  }
  const Json error =
      run_json(eval(path("model.h5"), "cosine_error", {"--reference", path("model")}));
  EXPECT_EQ(error["mode"], "integer");
  EXPECT_NEAR(error["value"], cosine_error(embed(*quantized, data, 64), embeddings), 1e-4);
}

TEST_F(CliTest, InspectShowsEveryKindOfFile) {
  const struct {
    std::string file;
    const char* kind;
    const char* key;
    size_t items;
    const char* shown;
  } cases[] = {
      {path("stats.h5"), "statistics", "sites", kLinearsPerLayer, "self.query"},
      {path("model.h5"), "checkpoint", "layers", kLinearsPerLayer, "int8 per_channel"},
      {path("pairs.h5"), "token pairs", "datasets", 5, "a/input_ids"},
      {path("tokens.h5"), "tokens", "datasets", 2, "attention_mask"},
      {path("model"), "folder", "tensors", 21, "F32"},
      {path("model") + "/model.safetensors", "safetensors", "tensors", 21, "LayerNorm.bias"}};
  for (const auto& [file, kind, key, items, shown] : cases) {
    SCOPED_TRACE(file);
    const Json json = run_json({"inspect", file});
    EXPECT_EQ(json["kind"], kind);
    EXPECT_EQ(json[key].size(), items);
    const Outcome outcome = run({"inspect", file});
    EXPECT_EQ(outcome.code(), 0);
    EXPECT_CONTAINS(outcome.out, shown);
  }
}

TEST_F(CliTest, HelpAndVersion) {
  for (const Arguments& arguments :
       {Arguments{"--help"}, Arguments{"calibrate", "--help"}, Arguments{"--version"}}) {
    const Outcome outcome = run(arguments);
    EXPECT_EQ(outcome.code(), 0);
    EXPECT_EQ(outcome.err, "");
    EXPECT_NE(outcome.out, "");
  }
}

}  // namespace
}  // namespace vernier::testing
