// The commands on a causal language model: from a folder without any data to a proven checkpoint,
// its perplexity and its texts.
#include <vernier/recipes/generation.h>
#include <vernier/recipes/language_model.h>
#include <vernier/recipes/recipe.h>
#include <vernier/tests/cli_program.h>
#include <vernier/tests/tiny_llama.h>

namespace vernier::testing {
namespace {

class CliLanguageModelTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    shared_ = std::make_unique<TemporaryFolder>();
    write_llama(path("model"));
    write_llama(path("tied"), /*tied=*/true);
    write_llama(path("other"), /*tied=*/false, 2);
    write_bert(path("bert"));
    write_tokens(path("tokens.h5"), random_rows(16, 5, 24, 24));
    quantized_ = run_json(quantize({"--out", path("model.h5"), "--data", path("tokens.h5")}));
  }
  static void TearDownTestSuite() { shared_.reset(); }

  static std::string path(const std::string& name) { return *shared_ / name; }
  std::string own(const std::string& name) const { return own_ / name; }

  static Arguments quantize(const Arguments& more, const std::string& model = "model") {
    return Arguments{"quantize", "--model", path(model), "--device", "cpu"} + more;
  }
  static Arguments eval(const std::string& model, const std::string& metric,
                        const Arguments& more = {}) {
    return Arguments{"eval", "--model", model, "--metric", metric, "--device", "cpu"} + more;
  }
  static Arguments generate(const Arguments& more, const std::string& model = "model") {
    return Arguments{"generate", "--model", path(model), "--device", "cpu"} + more;
  }

  static void expect_proven(const Json& json) {
    for (const char* key :
         {"code_mismatches", "weight_code_mismatches", "accumulator_mismatches", "outside_bound"})
      EXPECT_EQ(json.at(key), 0) << key;
    EXPECT_EQ(json.at("passed"), true);
    EXPECT_EQ(json.at("layers_quantized"), kLlamaLayers * kLlamaLinearsPerLayer);
    EXPECT_EQ(json.at("metric"), "perplexity");
    for (const char* key : {"float", "fake_quant", "integer"}) EXPECT_GT(json.at(key), 1) << key;
    EXPECT_GT(json.at("kl_integer"), 0);
    EXPECT_LT(json.at("kl_integer"), 0.5);
  }

  static inline std::unique_ptr<TemporaryFolder> shared_;
  static inline Json quantized_;
  TemporaryFolder own_;
};

TEST_F(CliLanguageModelTest, QuantizeReportsPerplexityAndDivergence) {
  expect_proven(quantized_);
  EXPECT_EQ(quantized_["samples"], 16);
  const Outcome outcome =
      run({"validate", "--model", path("model.h5"), "--reference", path("model"), "--data",
           path("tokens.h5"), "--samples", "4", "--device", "cpu"});
  EXPECT_EQ(outcome.code(), 0) << outcome.err;
  EXPECT_CONTAINS(outcome.out, "perplexity");
  EXPECT_CONTAINS(outcome.out, "KL from the float model");
}

TEST_F(CliLanguageModelTest, WithoutDataTheModelMakesItsOwn) {
  const Arguments windows = {"--window-length", "12"};
  for (const char* model : {"model", "tied"}) {
    const Json json = run_json(quantize(Arguments{"--out", own("self.h5")} + windows, model));
    expect_proven(json);
    EXPECT_EQ(json["samples"], 32);
  }
  // Step by step, the same; and another seed is other data.
  const auto by_steps = [&](const Arguments& more, const std::string& out) {
    expect_done(Arguments{"calibrate", "--model", path("tied"), "--out", own("stats.h5"),
                          "--device", "cpu"} +
                windows + more);
    expect_done({"export", "--model", path("tied"), "--stats", own("stats.h5"), "--out", out});
    return read_bytes(out);
  };
  const std::string whole = read_bytes(own("self.h5"));
  EXPECT_EQ(by_steps({}, own("a.h5")), whole);
  EXPECT_EQ(by_steps({"--data", "self:32"}, own("b.h5")), whole);
  EXPECT_NE(by_steps({"--seed", "1"}, own("c.h5")), whole);
  const Json mixed =
      run_json(quantize({"--out", own("mixed.h5"), "--data", path("tokens.h5") + "+self:4",
                         "--eval-data", path("tokens.h5")}));
  expect_proven(mixed);
  EXPECT_EQ(mixed["samples"], 16);
  const Json validated = run_json({"validate", "--model", path("model.h5"), "--reference",
                                   path("model"), "--data", "self:3", "--device", "cpu"});
  EXPECT_EQ(validated["samples"], 3);
}

TEST_F(CliLanguageModelTest, EvalGivesTheLibrarysPerplexityInEveryMode) {
  const TokenDataset data = TokenDataset::open(path("tokens.h5"));
  const auto value = [](const Arguments& arguments) {
    return run_json(arguments)["value"].get<double>();
  };
  const Arguments tokens = {"--data", path("tokens.h5")};
  const auto model = load_text_model(path("model"));
  const double exact = perplexity(causal(*model, "the test"), data, 16);
  EXPECT_NEAR(value(eval(path("model"), "perplexity", tokens)) / exact, 1, 1e-6);
  EXPECT_NEAR(
      value(eval(path("model"), "perplexity", tokens + Arguments{"--dtype", "bfloat16"})) / exact,
      1, 0.05);
  for (const char* mode : {"float", "fake_quant", "integer"}) {
    const Arguments in_mode = tokens + Arguments{"--mode", mode};
    const double found = value(eval(path("model.h5"), "perplexity", in_mode));
    EXPECT_NEAR(found / exact, 1, 0.2) << mode;
    if (std::string(mode) != "float") {
      EXPECT_NEAR(found / quantized_[mode].get<double>(), 1, 1e-3) << mode;
    }
  }
  const Arguments share = tokens + Arguments{"--first", "3", "--samples", "5"};
  EXPECT_NEAR(value(eval(path("model"), "perplexity", share)) /
                  perplexity(causal(*model, "the test"), data.share(3, 5), 16),
              1, 1e-6);
  const Arguments reference = {"--reference", path("model")};
  EXPECT_NEAR(value(eval(path("model.h5"), "kl", tokens + reference)) /
                  quantized_["kl_integer"].get<double>(),
              1, 0.02);
  EXPECT_EQ(value(eval(path("model"), "kl", tokens + reference)), 0);
  EXPECT_GT(value(eval(path("model.h5"), "kl", Arguments{"--data", "self:4"} + reference)), 0);
}

TEST_F(CliLanguageModelTest, GenerateContinuesPrompts) {
  const auto model = load_text_model(path("model"));
  GenerationOptions options;
  options.max_tokens = 9;
  const Rows prompts = {{1, 2, 3}, {4}};
  const Generation wanted = vernier::generate(causal(*model, "the test"), prompts, options);
  const Json json = run_json(generate({"--prompt-ids", "1,2,3", "4", "--max-tokens", "9"}));
  ASSERT_EQ(json["results"].size(), 2u);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(json["results"][i]["prompt_ids"], prompts[i]);
    EXPECT_EQ(json["results"][i]["ids"], wanted.tokens[i]);
  }
  EXPECT_EQ(json["new_tokens"], 18);
  EXPECT_GT(json["decode_tokens_per_second"], 0);

  const auto ids = [&](const Arguments& more, const std::string& of = "model") {
    return run_json(generate(Arguments{"--max-tokens", "12"} + more, of))["results"][0]["ids"]
        .get<std::vector<int64_t>>();
  };
  const auto whole = ids({});  // after the start token
  EXPECT_EQ(whole, vernier::generate(causal(*model, "the test"), {{kLlamaStart}},
                                     [&] {
                                       GenerationOptions more;
                                       more.max_tokens = 12;
                                       return more;
                                     }())
                       .tokens[0]);
  const auto cut = ids({"--eos", std::to_string(whole[4])});
  EXPECT_LE(cut.size(), 5u);
  EXPECT_EQ(cut.back(), whole[4]);
  const Arguments sampled = {"--temperature", "2", "--seed", "5"};
  EXPECT_EQ(ids(sampled), ids(sampled));
  EXPECT_NE(ids(sampled), ids({"--temperature", "2", "--seed", "6"}));
  EXPECT_EQ(ids(sampled + Arguments{"--top-k", "1"}), whole);
  EXPECT_EQ(ids({}, "model.h5").size(), 12u);
  EXPECT_EQ(ids({"--kv-cache", "int8"}).size(), 12u);
  EXPECT_EQ(ids({"--mode", "fake_quant"}, "model.h5").size(), 12u);

  const Json rows = run_json(generate({"--data", path("tokens.h5"), "--samples", "3",
                                       "--prompt-length", "5", "--max-tokens", "2"}));
  EXPECT_EQ(rows["results"].size(), 3u);
  EXPECT_EQ(rows["prompt_tokens"], 15);
  const Outcome plain = run(generate({"--prompt-ids", "4", "--max-tokens", "3"}));
  EXPECT_EQ(plain.code(), 0);
  EXPECT_EQ(std::count(plain.out.begin(), plain.out.end(), ','), 2);
  EXPECT_CONTAINS(plain.err, "decode: 2 tokens");
}

TEST_F(CliLanguageModelTest, MistakesAreRefusedInOneLine) {
  const std::string out = own("out.h5");
  const Arguments tokens = {"--data", path("tokens.h5")};
  expect_refused(run(quantize({"--out", out, "--data", "self:0"})), "how many windows");
  expect_refused(run(quantize({"--out", out, "--data", "self:2", "--window-length", "49"})),
                 "2 to 48 tokens");
  expect_refused(run(quantize({"--out", out}, "bert")), "give data with --data");
  expect_refused(run(quantize({"--out", out, "--data", "self"}, "bert")), "BertModel is none");
  expect_refused(run({"validate", "--model", path("model.h5"), "--device", "cpu"}), "--data");
  expect_refused(
      run({"validate", "--model", path("model.h5"), "--data", "self", "--device", "cpu"}),
      "float model");
  expect_refused(run({"validate", "--model", path("model.h5"), "--reference", path("other"),
                      "--device", "cpu"}),
                 "is not the model");
  expect_refused(run(eval(path("bert"), "perplexity", tokens)), "BertModel is none");
  expect_refused(run(eval(path("model.h5"), "kl", tokens)), "--reference");
  expect_refused(run(eval(path("model.h5"), "perplexity")), "--data");
  expect_refused(run(eval(path("model"), "perplexity", tokens + Arguments{"--samples", "17"})),
                 "16 samples");
  expect_refused(run(generate({}, "bert")), "BertModel is none");
  for (const char* ids : {"1,", ",1", "1,x", "1 2", "99999999999999999999"})
    expect_refused(run(generate({"--prompt-ids", ids})), "commas between");
  expect_refused(run(generate({"--prompt-ids", "50"})), "vocabulary of 50");
  expect_refused(run(generate({"--prompt-ids", "1", "--max-tokens", "48"})), "48 positions");
  expect_refused(run(generate({"--prompt-ids", "1", "--data", path("tokens.h5")})), "one of");
  expect_refused(run(generate({"--prompt", "hello"}, "model.h5")), "has no tokenizer");
  expect_refused(run(generate({"--mode", "integer"})), "quantized checkpoint");
  expect_refused(run(generate({"--top-p", "0"})), "top-p");
  EXPECT_EQ(own_.entries(), 0u);
}

}  // namespace
}  // namespace vernier::testing
