// Recipes, token data, the BERT family against transformers, and calibration runs.
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/recipes/calibration_run.h>
#include <vernier/recipes/comparison.h>
#include <vernier/recipes/models/blocks.h>
#include <vernier/recipes/recipe.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/tiny_bert.h>

#include <cmath>
#include <limits>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace vernier {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using testing::add_tokens;
using testing::kLinearsPerLayer;
using testing::kPositions;
using testing::kVocabulary;
using testing::message_of;
using testing::NamedTensors;
using testing::random_rows;
using testing::random_tensors;
using testing::read_bytes;
using testing::Rows;
using testing::TemporaryFolder;
using testing::tensor_of;
using testing::tiny_config;
using testing::write_bert;
using testing::write_bytes;
using testing::write_hdf5;
using testing::write_pairs;
using testing::write_tokens;
using torch::Tensor;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();
const std::string kQuery = "encoder.layer.0.attention.self.query";

using TextModelPointer = std::shared_ptr<TextModel>;

class RecipesTest : public ::testing::Test {
 protected:
  RecipesTest() { torch::manual_seed(9); }

  /// The tiny model, from a folder.
  TextModelPointer tiny_bert(uint64_t seed = 1) {
    const fs::path folder = folder_ / ("bert" + std::to_string(seed));
    write_bert(folder, seed);
    return load_text_model(folder);
  }

  TokenDataset tokens(const Rows& rows, const std::string& name = "tokens.h5") {
    write_tokens(folder_ / name, rows);
    return TokenDataset::open(folder_ / name);
  }

  TemporaryFolder folder_;
};

/// Statistics of samples [first, first + count).
ModelStatistics collected(TextModel& model, const TokenDataset& data, int64_t first,
                          int64_t count) {
  ModelStatistics statistics = plan_statistics(model, data, first, count);
  collect_statistics(model, data, statistics);
  return statistics;
}

// ---- Recipes ------------------------------------------------------------------------------------

TEST_F(RecipesTest, EveryBuiltInRecipeLoads) {
  const std::vector<std::string> names = recipe_names();
  const TextModelPointer model = tiny_bert();
  for (const std::string& name : names) {
    const Recipe recipe = load_recipe(name);
    EXPECT_EQ(recipe.name, name);
    EXPECT_NE(recipe.description, "");
    EXPECT_NO_THROW(apply_recipe(*model, recipe));
  }
  EXPECT_TRUE(std::set<std::string>(names.begin(), names.end()).contains("w8a8-static"));
  EXPECT_FALSE(load_recipe("w8a8-static").activations.scheme.dynamic);
  EXPECT_TRUE(load_recipe("w8a8-dynamic").activations.scheme.dynamic);
}

TEST_F(RecipesTest, FieldsAreRead) {
  const Recipe recipe = parse_recipe(
      "name: mine\n"
      "description: of a test\n"
      "weights: {bits: 4, granularity: per_tensor, calibrator: mse}\n"
      "activations: {symmetric: false, calibrator: percentile, percentile: 99.5}\n"
      "skip: ['a.*', 'b?']\n",
      "test");
  EXPECT_EQ(recipe.name, "mine");
  EXPECT_EQ(recipe.description, "of a test");
  EXPECT_EQ(recipe.weights, (QuantizerSettings{symmetric_scheme(4), {CalibrationMethod::mse}}));
  EXPECT_EQ(recipe.activations,
            (QuantizerSettings{asymmetric_scheme(8), {CalibrationMethod::percentile, 99.5}}));
  EXPECT_EQ(recipe.skip, (std::vector<std::string>{"a.*", "b?"}));

  const Recipe plain = parse_recipe(
      "{name: p, weights: {narrow_range: false}, activations: {granularity: per_token}}", "test");
  EXPECT_EQ(plain.weights.scheme.qmin(), -128);
  EXPECT_EQ(plain.weights.scheme.granularity, Granularity::per_channel);
  EXPECT_TRUE(plain.activations.scheme.dynamic);
  EXPECT_TRUE(plain.skip.empty());
}

/// A recipe that is good but for what the arguments put into its three places.
std::string yaml(const std::string& weights, const std::string& activations,
                 const std::string& more = "") {
  return "name: x\nweights: {" + weights + "}\nactivations: {" + activations + "}\n" + more;
}

TEST_F(RecipesTest, WrongRecipesAreRefused) {
  const std::pair<std::string, const char*> cases[] = {
      {"", "must be a mapping"},
      {"only text", "must be a mapping"},
      {"[1, 2]", "must be a mapping"},
      {"name: [", "not valid YAML: line"},
      {"name: 'x", "not valid YAML"},
      {std::string("\xff\xfe\0\1", 4), "source"},
      {std::string(20000, '['), "not valid YAML"},
      {"weights: {}\nactivations: {}", "needs a name"},
      {"name: [a]\nweights: {}\nactivations: {}", "'name' is of the wrong kind"},
      {"name: x\nweights: {}", "needs both"},
      {"name: x\nactivations: {}", "needs both"},
      {"name: x\nweights: 8\nactivations: {}", "weights must be a mapping"},
      {"name: x\nweights:\nactivations: {}", "weights must be a mapping"},
      {"? [a]\n: 1\nname: x\nweights: {}\nactivations: {}", "source"},
      {yaml("", "", "skipp: []"), "unknown field 'skipp'"},
      {yaml("bit: 8", ""), "weights: unknown field 'bit'"},
      {yaml("", "scale: 1"), "activations: unknown field 'scale'"},
      {yaml("", "", "skip: lm_head"), "'skip' is of the wrong kind"},
      {yaml("", "", "skip: &a [*a]"), "'skip' is of the wrong kind"},
      {yaml("bits: 1", ""), "bits must be 2 to 8, not 1"},
      {yaml("", "bits: 9"), "bits must be 2 to 8, not 9"},
      {yaml("bits: eight", ""), "'bits' is of the wrong kind"},
      {yaml("bits: 7.5", ""), "'bits' is of the wrong kind"},
      {yaml("bits: 4294967304", ""), "'bits' is of the wrong kind"},
      {yaml("granularity: per_row", ""), "unknown granularity 'per_row'"},
      {yaml("granularity: per_token", ""), "weights must be symmetric and per_channel"},
      {yaml("granularity: per_group, group_size: 16", ""), "weights must be symmetric"},
      {yaml("granularity: per_group", ""), "group_size 0"},
      {yaml("symmetric: false", ""), "weights must be symmetric"},
      {yaml("group_size: 16", ""), "group_size 16"},
      {yaml("", "granularity: per_channel"), "activations must be per_tensor"},
      {yaml("", "granularity: per_token, symmetric: false"), "symmetric"},
      {yaml("", "symmetric: perhaps"), "'symmetric' is of the wrong kind"},
      {yaml("", "calibrator: best"), "'best'"},
      {yaml("", "percentile: 0"), "percentile must be in (0, 100], not 0"},
      {yaml("", "percentile: 100.5"), "percentile must be in (0, 100]"},
      {yaml("", "percentile: -1"), "percentile must be in (0, 100]"},
      {yaml("", "percentile: .nan"), "percentile must be in (0, 100]"},
      {yaml("", "percentile: most"), "'percentile' is of the wrong kind"}};
  EXPECT_EQ(message_of([] { parse_recipe(yaml("", ""), "source"); }), "");
  for (const auto& [text, part] : cases) {
    SCOPED_TRACE(text.substr(0, 100));
    EXPECT_CONTAINS(message_of([&] { parse_recipe(text, "source"); }), part);
  }
}

TEST_F(RecipesTest, RecipesAreReadFromFiles) {
  write_bytes(folder_ / "mine.yaml", yaml("", ""));
  EXPECT_EQ(load_recipe(folder_ / "mine.yaml").name, "x");
  EXPECT_CONTAINS(message_of([] { load_recipe("w8a8"); }), "unknown recipe 'w8a8': use ");
  EXPECT_CONTAINS(message_of([] { load_recipe("w8a8"); }), "qat-w8a8, w8a8-dynamic, ");
  EXPECT_CONTAINS(message_of([&] { load_recipe(folder_ / "none.yaml"); }), "cannot be read");
  write_bytes(folder_ / "broken.yml", "name: [");
  EXPECT_CONTAINS(message_of([&] { load_recipe(folder_ / "broken.yml"); }),
                  (folder_ / "broken.yml").string());
  write_bytes(folder_ / "huge.yaml", yaml("", "") + "#" + std::string(1 << 20, 'x'));
  EXPECT_CONTAINS(message_of([&] { load_recipe(folder_ / "huge.yaml"); }), "too large");
  fs::create_directory(folder_ / "folder.yaml");
  EXPECT_NE(message_of([&] { load_recipe(folder_ / "folder.yaml"); }), "");
}

std::vector<std::string> skipped_layers(const TextModel& model) {
  std::vector<std::string> names;
  for (const auto& [name, layer] : quantized_layers(model))
    if (!layer->quantized()) names.push_back(name);
  return names;
}

TEST_F(RecipesTest, SkipPatternsLeaveLayersInFullPrecision) {
  const TextModelPointer model = tiny_bert();
  const std::string attention = "encoder.layer.0.attention.";
  const std::pair<std::vector<std::string>, std::vector<std::string>> cases[] = {
      {{}, {}},
      {{kQuery}, {kQuery}},
      {{"*.attention.self.*"},
       {attention + "self.query", attention + "self.key", attention + "self.value"}},
      {{"*.?uery", "*.value"}, {attention + "self.query", attention + "self.value"}},
      {{"*intermediate*"}, {"encoder.layer.0.intermediate.dense"}}};
  for (const auto& [patterns, expected] : cases) {
    Recipe recipe = load_recipe("w8a8-static");
    recipe.skip = patterns;
    apply_recipe(*model, recipe);
    EXPECT_EQ(skipped_layers(*model), expected);
    for (const auto& [name, layer] : quantized_layers(*model)) {
      EXPECT_EQ(layer->input_quantizer->settings(), recipe.activations);
      EXPECT_EQ(layer->weight_quantizer->settings(), recipe.weights);
    }
  }
  for (const char* pattern : {"lm_head", "query", "*.pooler.*", ""}) {
    Recipe recipe = load_recipe("w8a8-static");
    recipe.skip = {"*.key", pattern};
    const std::string message = message_of([&] { apply_recipe(*model, recipe); });
    EXPECT_CONTAINS(message, std::string("skip '") + pattern + "' matches no layer");
    EXPECT_CONTAINS(message, kQuery);
  }
}

// ---- Calibration --------------------------------------------------------------------------------

Recipe min_max_recipe() { return parse_recipe("{name: mm, weights: {}, activations: {}}", "test"); }

TEST_F(RecipesTest, CalibratingSetsEveryScale) {
  const TextModelPointer model = tiny_bert();
  const ModelStatistics statistics = collected(*model, tokens(random_rows(5)), 0, 5);
  apply_recipe(*model, min_max_recipe());
  calibrate_layers(*model, statistics);
  for (const auto& [name, layer] : quantized_layers(*model)) {
    EXPECT_EQ(layer->input_quantizer->scale().item<float>(),
              statistics.sites.at(name).histogram.amax() / 127);
    EXPECT_TRUE(torch::equal(layer->weight_quantizer->scale(),
                             std::get<0>(layer->float_weight().abs().max(1)) / 127));
  }
  set_mode(*model, Mode::integer);
  apply_recipe(*model, min_max_recipe());  // begins anew
  for (const auto& [name, layer] : quantized_layers(*model)) {
    EXPECT_EQ(layer->mode(), Mode::full);
    EXPECT_FALSE(layer->input_quantizer->calibrated() || layer->weight_quantizer->calibrated());
  }
}

TEST_F(RecipesTest, StatisticsThatDoNotServeAreRefused) {
  const TextModelPointer model = tiny_bert();
  const ModelStatistics good = collected(*model, tokens(random_rows(5)), 0, 5);
  const auto add = [](float value) {
    return [=](SiteStatistics& site) { site.histogram.add(std::vector<float>{1, value}); };
  };
  const struct {
    const char* what;
    std::function<void(SiteStatistics&)> edit;
    const char* part;
  } cases[] = {
      {"never reached", [](SiteStatistics& site) { site = {}; }, "never reached"},
      {"NaN", add(kNaN), "1 NaN"},
      {"Inf", add(-kInf), "1 infinite"},
      {"another model", [](SiteStatistics& site) { site.channels.resize(99); }, "channels"},
  };
  apply_recipe(*model, min_max_recipe());
  for (const auto& [what, edit, part] : cases) {
    SCOPED_TRACE(what);
    ModelStatistics statistics = good;
    edit(statistics.sites.at(kQuery));
    const std::string message = message_of([&] { calibrate_layers(*model, statistics); });
    EXPECT_CONTAINS(message, part);
    EXPECT_CONTAINS(message, "layer '" + kQuery + "'");
  }

  ModelStatistics missing = good;
  missing.sites.erase(kQuery);
  EXPECT_CONTAINS(message_of([&] { calibrate_layers(*model, missing); }), "never reached");
  Recipe skipping = min_max_recipe();
  skipping.skip = {kQuery};
  apply_recipe(*model, skipping);
  EXPECT_EQ(message_of([&] { calibrate_layers(*model, missing); }), "");
  apply_recipe(*model, load_recipe("w8a8-dynamic"));
  EXPECT_EQ(message_of([&] { calibrate_layers(*model, ModelStatistics{}); }), "");
}

// ---- Token data ---------------------------------------------------------------------------------

const Rows kRows = {{1, 2, 3}, {4}, {5, 6}, {7, 8, 9, 10}, {11, 12}};

TEST_F(RecipesTest, FlatDataIsRead) {
  const TokenDataset data = tokens(kRows);
  EXPECT_EQ(data.size(), 5);
  EXPECT_FALSE(data.pairs());
  EXPECT_EQ(data.read(0, 5, 13, 4), kRows);
  EXPECT_EQ(data.read(1, 3, 13, 4), Rows(kRows.begin() + 1, kRows.begin() + 4));
  EXPECT_TRUE(data.read(5, 0, 13, 4).empty());
  for (const auto& [first, count] : {std::pair<int64_t, int64_t>{0, 6}, {5, 1}, {-1, 2}, {2, -1}})
    EXPECT_CONTAINS(message_of([&] { data.read(first, count, 13, 4); }), "not all there");
}

TEST_F(RecipesTest, PairsAlternate) {
  const Rows others = {{20}, {21, 22}, {23}, {24}, {25, 26, 27}};
  write_hdf5(folder_ / "pairs.h5", [&](hdf5::File& file) {
    add_tokens(file, kRows, "a/");
    add_tokens(file, others, "b/");
    file.write("score", std::vector<double>{1, 2, 3, 4, 5.5}, {5});
  });
  const TokenDataset data = TokenDataset::open(folder_ / "pairs.h5");
  EXPECT_EQ(data.size(), 10);
  EXPECT_TRUE(data.pairs());
  Rows expected;
  for (size_t i = 0; i < kRows.size(); ++i) {
    expected.push_back(kRows[i]);
    expected.push_back(others[i]);
  }
  EXPECT_EQ(data.read(0, 10, 30, 4), expected);
  for (int64_t first = 0; first < 10; ++first)  // pairs torn apart at either end
    for (int64_t count = 1; first + count <= 10; ++count)
      EXPECT_EQ(data.read(first, count, 30, 4),
                Rows(expected.begin() + first, expected.begin() + first + count));
  EXPECT_EQ(data.scores(), (std::vector<double>{1, 2, 3, 4, 5.5}));
}

template <typename T>
class IntegerTokens : public RecipesTest {};
using Integers = ::testing::Types<int8_t, uint8_t, int16_t, int32_t, uint32_t, int64_t, uint64_t>;
TYPED_TEST_SUITE(IntegerTokens, Integers);

TYPED_TEST(IntegerTokens, AreReadWithoutAMask) {
  write_hdf5(this->folder_ / "ids.h5", [](hdf5::File& file) {
    file.write("input_ids", std::vector<TypeParam>{1, 2, 3, 4, 5, 100}, {2, 3});
  });
  EXPECT_EQ(TokenDataset::open(this->folder_ / "ids.h5").read(0, 2, 101, 3),
            (Rows{{1, 2, 3}, {4, 5, 100}}));
}

TEST_F(RecipesTest, WrongTokenDataIsRefused) {
  using Fill = std::function<void(hdf5::File&)>;
  const std::vector<int64_t> ids = {1, 2, 3, 4, 5, 6};
  const auto flat = [&](const std::vector<int64_t>& values, const std::vector<int64_t>& shape) {
    return Fill([=](hdf5::File& file) { file.write("input_ids", values, shape); });
  };
  const auto masked = [&](const std::vector<int64_t>& mask, const std::vector<int64_t>& shape) {
    return Fill([=](hdf5::File& file) {
      file.write("input_ids", ids, {2, 3});
      file.write("attention_mask", mask, shape);
    });
  };
  const struct {
    const char* what;
    Fill fill;
    const char* part;
  } cases[] = {
      {"nothing", [](hdf5::File&) {}, "it holds nothing"},
      {"wrong name",
       [&](hdf5::File& f) {
         f.write("tokens", ids, {2, 3});
       },
       "holds 'tokens'"},
      {"half a pair",
       [&](hdf5::File& f) {
         f.write("a/input_ids", ids, {2, 3});
       },
       "it holds 'a'"},
      {"a group", [](hdf5::File& f) { f.create_group("input_ids"); }, "input_ids"},
      {"text", [](hdf5::File& f) { f.write_text("input_ids", "1 2 3"); }, "text"},
      {"float",
       [](hdf5::File& f) {
         f.write("input_ids", std::vector<float>{1, 2}, {1, 2});
       },
       "holds float32"},
      {"scalar", flat({1}, {}), "has 0 dimensions"},
      {"one dimension", flat(ids, {6}), "has 1 dimensions"},
      {"three dimensions", flat(ids, {1, 2, 3}), "has 3 dimensions"},
      {"no rows", flat({}, {0, 3}), "is empty"},
      {"no columns", flat({}, {3, 0}), "is empty"},
      {"id too large", flat({1, 2, 3, 4, kVocabulary, 5}, {3, 2}), "row 2 of 'input_ids'"},
      {"id negative", flat({1, 2, 3, -1}, {2, 2}), "token id -1 outside"},
      {"id beyond int64",
       [](hdf5::File& f) {
         f.write("input_ids", std::vector<uint64_t>{~uint64_t{0}}, {1, 1});
       },
       "input_ids"},
      {"too long", flat(std::vector<int64_t>(kPositions + 1, 1), {1, kPositions + 1}),
       "more than the model's 16 positions"},
      {"mask of another shape", masked({1, 1}, {2, 1}), "another shape"},
      {"mask of another rank", masked({1, 1, 1, 1, 1, 1}, {6}), "1 dimensions"},
      {"mask with a hole", masked({1, 1, 1, 1, 0, 1}, {2, 3}), "row 1 of 'attention_mask'"},
      {"mask on the left", masked({0, 1, 1, 1, 1, 1}, {2, 3}), "pad on the right"},
      {"mask of twos", masked({1, 1, 1, 2, 2, 0}, {2, 3}), "ones followed by zeros"},
      {"all masked", masked({1, 1, 0, 0, 0, 0}, {2, 3}), "row 1 of 'input_ids' has no token"},
      {"float mask",
       [&](hdf5::File& f) {
         f.write("input_ids", ids, {2, 3});
         f.write("attention_mask", std::vector<float>(6, 1), {2, 3});
       },
       "holds float32"},
      {"uneven pairs",
       [&](hdf5::File& f) {
         f.write("a/input_ids", ids, {2, 3});
         f.write("b/input_ids", ids, {3, 2});
       },
       "'a' has 2 rows but 'b' has 3"},
      {"id in b too large",
       [&](hdf5::File& f) {
         f.write("a/input_ids", ids, {2, 3});
         f.write("b/input_ids", std::vector<int64_t>{1, kVocabulary}, {2, 1});
       },
       "row 1 of 'b/input_ids'"},
  };
  const fs::path path = folder_ / "data.h5";
  const auto read_all = [&] {
    const TokenDataset data = TokenDataset::open(path);
    data.read(0, data.size(), kVocabulary, kPositions);
  };
  for (const auto& [what, fill, part] : cases) {
    SCOPED_TRACE(what);
    fs::remove(path);
    write_hdf5(path, fill);
    const std::string message = message_of(read_all);
    EXPECT_CONTAINS(message, part);
    EXPECT_CONTAINS(message, path.string());
  }
  fs::remove(path);
  EXPECT_CONTAINS(message_of(read_all), path.string());
}

TEST_F(RecipesTest, TruncatedTokenDataIsRefused) {
  tokens(random_rows(40));
  const std::string whole = read_bytes(folder_ / "tokens.h5");
  for (size_t size = 0; size < whole.size(); size += 1 + whole.size() / 30) {
    write_bytes(folder_ / "tokens.h5", whole.substr(0, size));
    EXPECT_NE(message_of([&] { TokenDataset::open(folder_ / "tokens.h5"); }), "") << size;
  }
}

TEST_F(RecipesTest, WrongScoresAreRefused) {
  using Fill = std::function<void(hdf5::File&)>;
  const auto score = [](const auto& values, const std::vector<int64_t>& shape) {
    return Fill([=](hdf5::File& file) { file.write("score", values, shape); });
  };
  const std::tuple<const char*, Fill, const char*> cases[] = {
      {"missing", [](hdf5::File&) {}, "the dataset 'score'"},
      {"NaN", score(std::vector<float>{1, NAN}, {2}), "NaN or Inf"},
      {"Inf", score(std::vector<double>{kInf, 1}, {2}), "NaN or Inf"},
      {"integers", score(std::vector<int32_t>{1, 2}, {2}), "must be float [2]"},
      {"too many", score(std::vector<float>{1, 2, 3, 4}, {4}), "must be float [2]"},
      {"a column", score(std::vector<float>{1, 2}, {2, 1}), "must be float [2]"}};
  for (const auto& [what, fill, part] : cases) {
    SCOPED_TRACE(what);
    const fs::path path = folder_ / "pairs.h5";
    write_hdf5(path, [&fill = fill](hdf5::File& file) {
      add_tokens(file, random_rows(2, 1), "a/");
      add_tokens(file, random_rows(2, 2), "b/");
      fill(file);
    });
    EXPECT_CONTAINS(message_of([&] { TokenDataset::open(path).scores(); }), part);
  }
  EXPECT_CONTAINS(message_of([&] { tokens(kRows).scores(); }), "needs pairs");
}

TEST_F(RecipesTest, FingerprintsAreOfWhatTheMaskShows) {
  const auto written = [&](const std::vector<int32_t>& ids, const std::vector<int32_t>& mask) {
    write_hdf5(folder_ / "f.h5", [&](hdf5::File& file) {
      file.write("input_ids", ids, {2, 2});
      file.write("attention_mask", mask, {2, 2});
    });
    return TokenDataset::open(folder_ / "f.h5").fingerprint();
  };
  const std::string one = written({1, 2, 3, 4}, {1, 1, 1, 0});
  EXPECT_EQ(one.size(), 16u);
  EXPECT_EQ(written({1, 2, 3, 9}, {1, 1, 1, 0}), one);
  const std::string others[] = {
      written({1, 2, 3, 4}, {1, 1, 1, 1}), written({1, 2, 9, 4}, {1, 1, 1, 0}),
      written({3, 4, 1, 2}, {1, 0, 1, 1}), written({1, 3, 2, 4}, {1, 0, 1, 1})};
  for (const std::string& other : others) EXPECT_NE(other, one);
}

TEST_F(RecipesTest, BatchesHoldSequencesOfOneLength) {
  using Batches = std::vector<std::vector<int64_t>>;
  EXPECT_EQ(batches_by_length(kRows, 8), (Batches{{1}, {2, 4}, {0}, {3}}));
  EXPECT_EQ(batches_by_length(kRows, 1), (Batches{{1}, {2}, {4}, {0}, {3}}));
  EXPECT_EQ(batches_by_length(Rows(5, {1, 2}), 2), (Batches{{0, 1}, {2, 3}, {4}}));
  EXPECT_TRUE(batches_by_length({}, 4).empty());
}

TEST_F(RecipesTest, BatchesAreLaidEndToEnd) {
  const TokenBatch batch = make_batch(kRows, torch::kCPU);
  EXPECT_EQ(batch.lengths, (std::vector<int64_t>{3, 1, 2, 4, 2}));
  EXPECT_TRUE(torch::equal(batch.tokens, torch::arange(1, 13)));
  EXPECT_EQ(batch.size(), 5);
  EXPECT_EQ(batch.longest(), 4);
  EXPECT_FALSE(batch.equal_lengths());
  EXPECT_TRUE(make_batch({{1, 2}, {3, 4}}, torch::kCPU).equal_lengths());
}

// ---- What models are made of --------------------------------------------------------------------

TEST_F(RecipesTest, AttentionStaysWithinItsSequence) {
  constexpr int64_t kHeads = 2, kSize = 3;
  const TokenBatch batch = make_batch(kRows, torch::kCPU);
  const auto random = [&] { return torch::randn({batch.tokens.numel(), kHeads, kSize}); };
  const Tensor q = random(), k = random(), v = random();
  const Heads heads = {kHeads, kHeads, kSize};
  const auto attend = [&](const Tensor& queries, const Tensor& keys, const Tensor& values,
                          const TokenBatch& of) {
    return attention(queries, keys, values, heads, Sequences(of, kPositions), /*causal=*/false);
  };
  const Tensor mixed = attend(q, k, v, batch);
  int64_t first = 0;
  for (const int64_t length : batch.lengths) {
    TokenBatch single;
    single.lengths = {length};
    const auto rows = [&](const Tensor& x) { return x.narrow(0, first, length); };
    EXPECT_TRUE(
        torch::allclose(rows(mixed), attend(rows(q), rows(k), rows(v), single), 1e-5, 1e-6));
    const auto by_head = [&](const Tensor& x) { return rows(x).transpose(0, 1); };
    const Tensor weights = torch::softmax(
        by_head(q).matmul(by_head(k).transpose(1, 2)) / std::sqrt(double{kSize}), -1);
    const Tensor expected =
        weights.matmul(by_head(v)).transpose(0, 1).reshape({length, kHeads * kSize});
    EXPECT_TRUE(torch::allclose(rows(mixed), expected, 1e-5, 1e-6));
    first += length;
  }
}

TEST_F(RecipesTest, PoolingIsTheMeanOfEachSequence) {
  for (const Rows& rows : {kRows, Rows{{1, 2}, {3, 4}, {5, 6}}}) {
    const TokenBatch batch = make_batch(rows, torch::kCPU);
    const Tensor hidden = torch::randn({batch.tokens.numel(), 3});
    const Tensor pooled = mean_pooling(hidden.to(torch::kBFloat16), batch);
    EXPECT_EQ(pooled.scalar_type(), torch::kFloat);
    int64_t first = 0;
    for (int64_t s = 0; s < batch.size(); ++s) {
      const Tensor own = hidden.narrow(0, first, batch.lengths[s]);
      EXPECT_TRUE(torch::allclose(pooled[s], own.to(torch::kBFloat16).to(torch::kFloat).mean(0)));
      first += batch.lengths[s];
    }
  }
}

// ---- BERT against transformers ------------------------------------------------------------------

struct Fixture {
  Fixture() {
    const fs::path folder = fs::path(VERNIER_SOURCE_DIR) / "tests/fixtures/bert-tiny";
    model = load_text_model(folder);
    const SafetensorsFile expected = SafetensorsFile::open(folder / "expected.safetensors");
    const Tensor ids = expected.tensor("input_ids"), mask = expected.tensor("attention_mask");
    for (int64_t i = 0; i < ids.size(0); ++i) {
      const int64_t length = mask[i].sum().item<int64_t>();
      const Tensor own = ids[i].narrow(0, 0, length).contiguous();
      const auto* first = own.const_data_ptr<int64_t>();
      rows.emplace_back(first, first + length);
      hidden.push_back(expected.tensor("last_hidden_state")[i].narrow(0, 0, length));
    }
  }

  /// The largest difference from transformers over these rows as one batch.
  double difference(const std::vector<int64_t>& indices) const {
    Rows members;
    std::vector<Tensor> expected;
    for (const int64_t i : indices) {
      members.push_back(rows[i]);
      expected.push_back(hidden[i]);
    }
    const torch::NoGradGuard no_grad;
    const Tensor actual = model->forward(make_batch(members, torch::kCPU));
    return (actual - torch::cat(expected)).abs().max().item<double>();
  }

  TextModelPointer model;
  Rows rows;
  std::vector<Tensor> hidden;
};

TEST(BertTest, HiddenStatesAreTransformers) {
  const Fixture fixture;
  std::vector<int64_t> all;
  for (size_t i = 0; i < fixture.rows.size(); ++i) {
    all.push_back(static_cast<int64_t>(i));
    EXPECT_LT(fixture.difference({all.back()}), 1e-5) << i;
  }
  EXPECT_LT(fixture.difference(all), 1e-5);  // of mixed lengths
  for (const auto& batch : batches_by_length(fixture.rows, 4))
    EXPECT_LT(fixture.difference(batch), 1e-5);
  EXPECT_GT(torch::cat(fixture.hidden).abs().max().item<double>(), 0.5);
}

TEST(BertTest, ReportsItsSizes) {
  const Fixture fixture;
  EXPECT_EQ(fixture.model->vocabulary(), 100);
  EXPECT_EQ(fixture.model->max_length(), 32);
  EXPECT_EQ(fixture.model->info.architecture, "BertModel");
  EXPECT_EQ(quantized_layers(*fixture.model).size(), 2u * kLinearsPerLayer);
  const TokenBatch too_long = make_batch({std::vector<int64_t>(33, 1)}, torch::kCPU);
  EXPECT_CONTAINS(message_of([&] { fixture.model->forward(too_long); }), "32 positions");
}

// ---- Loading ------------------------------------------------------------------------------------

TEST_F(RecipesTest, WrongFoldersAreRefused) {
  using Edit = std::function<void(Json&, NamedTensors&)>;
  const auto field = [](const char* name, const Json& value) {
    return Edit([=](Json& config, NamedTensors&) { config[name] = value; });
  };
  const auto tensor = [](const std::function<Tensor(const Tensor&)>& change) {
    return Edit([=](Json&, NamedTensors& tensors) {
      Tensor& weight = tensor_of(tensors, kQuery + ".weight");
      weight = change(weight.clone());
    });
  };
  const auto with_value = [&](double value) {
    return tensor([=](const Tensor& weight) {
      weight[3][2] = value;
      return weight;
    });
  };
  const struct {
    const char* what;
    Edit edit;
    const char* part;
  } cases[] = {
      {"unknown architecture", field("architectures", {"GPT2Model"}),
       "'GPT2Model' is not supported; supported are: BertModel"},
      {"two architectures", field("architectures", {"BertModel", "BertModel"}), "architectures"},
      {"no architecture", field("architectures", Json::array()), "architectures"},
      {"architecture a number", field("architectures", {1}), "architectures"},
      {"relative positions", field("position_embedding_type", "relative_key"),
       "position_embedding_type \"relative_key\" is not implemented"},
      {"decoder", field("is_decoder", true), "is_decoder true is not implemented"},
      {"activation", field("hidden_act", "tanh"), "hidden_act \"tanh\" is not implemented (relu"},
      {"no hidden size", field("hidden_size", nullptr), "no field 'hidden_size'"},
      {"hidden size 0", field("hidden_size", 0), "hidden_size must be a positive integer"},
      {"hidden size a string", field("hidden_size", "16"), "hidden_size must be a positive"},
      {"hidden size a fraction", field("hidden_size", 16.5), "hidden_size must be a positive"},
      {"hidden size beyond all", field("hidden_size", int64_t{1} << 40), "hidden_size must be"},
      {"layers negative", field("num_hidden_layers", -1), "num_hidden_layers must be a positive"},
      {"uneven heads", field("num_attention_heads", 3), "num_attention_heads 3"},
      {"epsilon 0", field("layer_norm_eps", 0), "layer_norm_eps must be a positive number"},
      {"more layers than tensors", field("num_hidden_layers", 2),
       "config.json: num_hidden_layers is 2 but there are tensors 'encoder.layer.N.*' of 1 layers"},
      {"fewer layers than tensors",
       [](Json&, NamedTensors& tensors) {
         tensors.emplace_back("encoder.layer.1.attention.self.query.weight", torch::ones({16, 16}));
       },
       "num_hidden_layers is 1 but"},
      {"larger than the tensors", field("intermediate_size", 64),
       "intermediate_size is 64 but tensor 'encoder.layer.0.intermediate.dense.weight' has shape "
       "[32, 16]"},
      {"missing tensor", [](Json&, NamedTensors& tensors) { tensors.erase(tensors.begin() + 7); },
       "' is missing"},
      {"tensor left over",
       [](Json&, NamedTensors& tensors) { tensors.emplace_back("extra", torch::ones({1})); },
       "tensor 'extra' has no place in a BertModel"},
      {"wrong shape", tensor([](const Tensor& w) {
         return w.reshape({-1, 8});
       }),
       "has shape [32, 8]"},
      {"integers", tensor([](const Tensor& w) { return w.to(torch::kChar); }),
       "a floating-point checkpoint is needed"},
      {"NaN", with_value(kNaN), "holds NaN or infinite values"},
      {"Inf", with_value(-kInf), "holds NaN or infinite values"},
      {"beyond float32", tensor([](const Tensor& w) { return w.to(torch::kDouble) * 1e300; }),
       "holds NaN or infinite values"},
  };
  for (const auto& [what, edit, part] : cases) {
    SCOPED_TRACE(what);
    Json config = tiny_config();
    NamedTensors tensors = random_tensors(config);
    edit(config, tensors);
    write_bert(folder_ / "bad", config, tensors);
    const std::string message = message_of([&] { load_text_model(folder_ / "bad"); });
    EXPECT_CONTAINS(message, part);
    EXPECT_CONTAINS(message, (folder_ / "bad").string());
  }
}

// Sizes for which a model would fill any memory, had it been built.
TEST_F(RecipesTest, EnormousSizesAreRefusedBeforeTheyAreTaken) {
  const TextModelPointer model = tiny_bert();
  apply_recipe(*model, load_recipe("w8a8-dynamic"));
  calibrate_layers(*model, {});
  const fs::path folder = folder_ / "enormous", checkpoint = folder_ / "enormous.h5";
  for (const char* key : {"vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size",
                          "max_position_embeddings", "type_vocab_size"}) {
    SCOPED_TRACE(key);
    Json config = tiny_config();
    config[key] = int64_t{1} << 31;
    const std::string found = std::string(key) + " is 2147483648 but ";
    write_bert(folder, config, random_tensors(tiny_config()));
    const std::string message = message_of([&] { load_text_model(folder); });
    EXPECT_CONTAINS(message, (folder / "config.json").string() + ": " + found);
    CheckpointInfo info = model->info;
    info.config = config.dump();
    save_checkpoint(*model, info, checkpoint);
    EXPECT_CONTAINS(message_of([&] { load_text_model(checkpoint); }),
                    checkpoint.string() + ": " + found);
  }
}

TEST_F(RecipesTest, DamagedFoldersAreRefused) {
  const fs::path folder = folder_ / "bert", config = folder / "config.json",
                 weights = folder / "model.safetensors";
  EXPECT_CONTAINS(message_of([&] { load_text_model(folder); }), "does not exist");
  const std::tuple<fs::path, std::function<void(const fs::path&)>, const char*> cases[] = {
      {config, [](const fs::path& path) { fs::remove(path); }, "config.json cannot be read"},
      {config, [](const fs::path& path) { write_bytes(path, "{\"a\": "); }, "not a JSON object"},
      {config, [](const fs::path& path) { write_bytes(path, "[1]"); }, "not a JSON object"},
      {config, [](const fs::path& path) { write_bytes(path, "{}"); }, "architectures"},
      {config, [](const fs::path& path) { write_bytes(path, std::string(100000, '[')); },
       "not a JSON object"},
      {weights, [](const fs::path& path) { fs::remove(path); }, "model.safetensors"},
      {weights, [](const fs::path& path) { fs::resize_file(path, fs::file_size(path) - 1); },
       "model.safetensors"},
      {weights, [](const fs::path& path) { fs::resize_file(path, 100); }, "model.safetensors"},
      {weights, [](const fs::path& path) { write_bytes(path, ""); }, "model.safetensors"}};
  for (const auto& [path, damage, part] : cases) {
    write_bert(folder);
    EXPECT_EQ(message_of([&] { load_text_model(folder); }), "");
    damage(path);
    EXPECT_CONTAINS(message_of([&] { load_text_model(folder); }), part);
  }
}

TEST_F(RecipesTest, EqualModelsHaveOneFingerprintHoweverStored) {
  const NamedTensors tensors = random_tensors(tiny_config());
  const std::string expected = tiny_bert()->info.fingerprint;
  EXPECT_EQ(expected.size(), 16u);
  EXPECT_NE(tiny_bert(2)->info.fingerprint, expected);

  Json config = tiny_config();  // the same by other words, and by what the model does not use
  config["layer_norm_eps"] = 1e-12;
  config["transformers_version"] = "4.0.0";
  write_bert(folder_ / "worded", config, tensors);
  EXPECT_EQ(load_text_model(folder_ / "worded")->info.fingerprint, expected);
  const std::pair<const char*, Json> settings[] = {
      {"num_attention_heads", 4}, {"layer_norm_eps", 1e-5}, {"hidden_act", "gelu_new"}};
  for (const auto& [key, value] : settings) {
    Json other = tiny_config();
    other[key] = value;
    write_bert(folder_ / "other", other, tensors);
    EXPECT_NE(load_text_model(folder_ / "other")->info.fingerprint, expected) << key;
  }

  NamedTensors prefixed;  // as a task model stores them, with its head
  for (const auto& [name, tensor] : tensors) prefixed.emplace_back("bert." + name, tensor);
  for (const char* unused : {"bert.pooler.dense.weight", "cls.predictions.bias",
                             "classifier.weight", "bert.embeddings.position_ids"})
    prefixed.emplace_back(unused, torch::ones({2}));
  write_bert(folder_ / "prefixed", tiny_config(), prefixed);
  EXPECT_EQ(load_text_model(folder_ / "prefixed")->info.fingerprint, expected);

  NamedTensors wide;
  for (const auto& [name, tensor] : tensors) wide.emplace_back(name, tensor.to(torch::kDouble));
  write_bert(folder_ / "wide", tiny_config(), wide);
  EXPECT_EQ(load_text_model(folder_ / "wide")->info.fingerprint, expected);

  const fs::path folder = folder_ / "sharded";
  write_bert(folder, tiny_config(), tensors);
  fs::remove(folder / "model.safetensors");
  const auto middle = tensors.begin() + static_cast<int64_t>(tensors.size() / 2);
  const std::pair<std::string, NamedTensors> shards[] = {
      {"model-00001-of-00002.safetensors", {tensors.begin(), middle}},
      {"model-00002-of-00002.safetensors", {middle, tensors.end()}}};
  Json index;
  for (const auto& [file, members] : shards) {
    write_safetensors(folder / file, members);
    for (const auto& [name, tensor] : members) index["weight_map"][name] = file;
  }
  write_bytes(folder / "model.safetensors.index.json", index.dump());
  EXPECT_EQ(load_text_model(folder)->info.fingerprint, expected);
  fs::remove(folder / shards[1].first);
  EXPECT_CONTAINS(message_of([&] { load_text_model(folder); }), shards[1].first);
}

TEST_F(RecipesTest, HalfPrecisionWeightsAreWidened) {
  for (const torch::Dtype dtype : {torch::kHalf, torch::kBFloat16}) {
    NamedTensors tensors = random_tensors(tiny_config());
    for (auto& [name, tensor] : tensors) tensor = tensor.to(dtype);
    write_bert(folder_ / "half", tiny_config(), tensors);
    const auto loaded = load_text_model(folder_ / "half")->named_parameters();
    for (const auto& [name, tensor] : tensors) {
      EXPECT_EQ(loaded[name].scalar_type(), torch::kFloat);
      EXPECT_TRUE(torch::equal(loaded[name], tensor.to(torch::kFloat)));
    }
  }
}

TEST_F(RecipesTest, CheckpointsLoadAsTextModels) {
  const TextModelPointer model = tiny_bert();
  apply_recipe(*model, load_recipe("w8a8-dynamic"));
  calibrate_layers(*model, {});
  model->info.recipe = "w8a8-dynamic";
  save_checkpoint(*model, model->info, folder_ / "model.h5");
  const TextModelPointer loaded = load_text_model(folder_ / "model.h5");
  EXPECT_EQ(loaded->info.recipe, "w8a8-dynamic");
  EXPECT_EQ(loaded->info.fingerprint, model->info.fingerprint);
  const torch::NoGradGuard no_grad;
  set_mode(*model, Mode::integer);
  const TokenBatch batch = make_batch(kRows, torch::kCPU);
  EXPECT_TRUE(torch::equal(loaded->forward(batch), model->forward(batch)));

  model->named_parameters()["embeddings.LayerNorm.bias"].data()[3] = kNaN;
  save_checkpoint(*model, model->info, folder_ / "model.h5");
  EXPECT_CONTAINS(message_of([&] { load_text_model(folder_ / "model.h5"); }),
                  "embeddings.LayerNorm.bias");
}

// ---- Calibration runs ---------------------------------------------------------------------------

/// Equal to the last count; `data` aside, which is of the file.
void expect_same_statistics(const ModelStatistics& actual, const ModelStatistics& expected) {
  EXPECT_EQ(actual.fingerprint, expected.fingerprint);
  EXPECT_EQ(actual.samples, expected.samples);
  EXPECT_EQ(actual.first_sample, expected.first_sample);
  EXPECT_EQ(actual.planned, expected.planned);
  ASSERT_EQ(actual.sites.size(), expected.sites.size());
  for (const auto& [name, site] : expected.sites)
    EXPECT_TRUE(actual.sites.at(name) == site) << name;
}

/// LibTorch's threads while it lives.
class Threads {
 public:
  explicit Threads(int count) { at::set_num_threads(count); }
  ~Threads() { at::set_num_threads(before_); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  int before_ = at::get_num_threads();
};

constexpr int64_t kSamples = 97;  // several blocks, the last of one sample

TEST_F(RecipesTest, StatisticsCountEveryValue) {
  const TextModelPointer model = tiny_bert();
  const Rows rows = random_rows(kSamples);
  const ModelStatistics statistics = collected(*model, tokens(rows), 0, kSamples);
  int64_t total = 0;
  for (const auto& row : rows) total += static_cast<int64_t>(row.size());
  EXPECT_EQ(statistics.samples, kSamples);
  EXPECT_EQ(statistics.sites.size(), static_cast<size_t>(kLinearsPerLayer));
  for (const auto& [name, layer] : quantized_layers(*model)) {
    const SiteStatistics& site = statistics.sites.at(name);
    EXPECT_EQ(site.histogram.total(), total * layer->float_weight().size(1)) << name;
    EXPECT_EQ(static_cast<int64_t>(site.channels.size()), layer->float_weight().size(1));
    EXPECT_EQ(layer->mode(), Mode::full);
  }
}

TEST_F(RecipesTest, StatisticsDoNotDependOnThreads) {
  const TextModelPointer model = tiny_bert();
  const TokenDataset data = tokens(random_rows(kSamples));
  const auto with = [&](int threads) {
    const Threads guard(threads);
    return collected(*model, data, 0, kSamples);
  };
  const ModelStatistics one = with(1);
  for (const int threads : {2, 3}) expect_same_statistics(with(threads), one);
}

TEST_F(RecipesTest, StatisticsOfOneSampleDoNotDependOnThreads) {
  // A product of so few rows is split by some libraries along the sum when several threads share
  // it.
  Json config = tiny_config();
  config["hidden_size"] = config["intermediate_size"] = 128;
  write_bert(folder_ / "wide", config, random_tensors(config));
  const TextModelPointer model = load_text_model(folder_ / "wide");
  for (const int64_t length : {1, 5, 7, 10, 16}) {
    SCOPED_TRACE(length);
    const TokenDataset data = tokens(random_rows(1, 3, length, length));
    const auto with = [&](int threads) {
      const Threads guard(threads);
      return collected(*model, data, 0, 1);
    };
    expect_same_statistics(with(2), with(1));
  }
}

TEST_F(RecipesTest, ShardsMergeToTheWhole) {
  const TextModelPointer model = tiny_bert();
  const TokenDataset data = tokens(random_rows(kSamples));
  const ModelStatistics whole = collected(*model, data, 0, kSamples);
  for (const int64_t cut : {1, 37, 64, 96}) {
    const ModelStatistics first = collected(*model, data, 0, cut),
                          second = collected(*model, data, cut, kSamples - cut);
    ModelStatistics forwards = first, backwards = second;
    forwards.merge(second);
    backwards.merge(first);
    expect_same_statistics(forwards, whole);
    expect_same_statistics(backwards, whole);
    EXPECT_EQ(forwards.data, whole.data);
  }
}

TEST_F(RecipesTest, StatisticsDoNotDependOnTheOrderOfTheData) {
  const TextModelPointer model = tiny_bert();
  Rows rows = random_rows(kSamples);
  const ModelStatistics whole = collected(*model, tokens(rows), 0, kSamples);
  std::shuffle(rows.begin(), rows.end(), std::mt19937_64(4));
  const ModelStatistics permuted = collected(*model, tokens(rows, "permuted.h5"), 0, kSamples);
  expect_same_statistics(permuted, whole);
  EXPECT_NE(permuted.data, whole.data);
}

TEST_F(RecipesTest, InterruptedRunsGoOn) {
  const TokenDataset data = tokens(random_rows(kSamples));
  const fs::path path = folder_ / "statistics.h5";
  const ModelStatistics whole = collected(*tiny_bert(), data, 0, kSamples);
  for (const int64_t stop_after : {1, 2, 3}) {
    const TextModelPointer model = tiny_bert();
    ModelStatistics statistics = plan_statistics(*model, data, 0, kSamples);
    int64_t blocks = 0;
    EXPECT_THROW(collect_statistics(*model, data, statistics,
                                    [&](const ModelStatistics& so_far) {
                                      save_statistics(so_far, path);
                                      if (++blocks == stop_after)
                                        throw std::runtime_error("interrupted");
                                    }),
                 std::runtime_error);
    ModelStatistics resumed = load_statistics(path);
    EXPECT_GT(resumed.samples, 0);
    EXPECT_LT(resumed.samples, kSamples);
    EXPECT_EQ(resumed.planned, kSamples);
    collect_statistics(*tiny_bert(), data, resumed);
    expect_same_statistics(resumed, whole);
  }
}

TEST_F(RecipesTest, BlocksAreReportedInOrder) {
  const TextModelPointer model = tiny_bert();
  const TokenDataset data = tokens(random_rows(kSamples));
  ModelStatistics statistics = plan_statistics(*model, data, 10, 80);
  std::vector<int64_t> seen = {0};
  collect_statistics(*model, data, statistics, [&](const ModelStatistics& so_far) {
    EXPECT_GT(so_far.samples, seen.back());
    seen.push_back(so_far.samples);
  });
  EXPECT_GT(seen.size(), 2u);
  EXPECT_EQ(seen.back(), 80);
}

TEST_F(RecipesTest, SharesBeyondTheDataAreRefused) {
  const TextModelPointer model = tiny_bert();
  const TokenDataset data = tokens(random_rows(5));
  const std::pair<int64_t, int64_t> shares[] = {
      {0, 6}, {5, 1}, {-1, 3}, {0, 0}, {0, -1}, {1, std::numeric_limits<int64_t>::max()}};
  for (const auto& [first, count] : shares)
    EXPECT_CONTAINS(message_of([&] { plan_statistics(*model, data, first, count); }),
                    "not all there");
}

TEST_F(RecipesTest, ValuesThatOverflowAreReported) {
  NamedTensors tensors = random_tensors(tiny_config());
  tensor_of(tensors, "embeddings.word_embeddings.weight") *= 1e38;  // finite, but its norm is not
  write_bert(folder_ / "overflow", tiny_config(), tensors);
  const TextModelPointer model = load_text_model(folder_ / "overflow");
  const TokenDataset data = tokens(random_rows(5));
  EXPECT_CONTAINS(message_of([&] { collected(*model, data, 0, 5); }), "layer 'encoder.layer.0.");
  for (const auto& item : quantized_layers(*model)) EXPECT_EQ(item.layer->mode(), Mode::full);
}

// ---- Comparisons --------------------------------------------------------------------------------

TEST_F(RecipesTest, FiguresOfEmbeddings) {
  // Cosines of the three pairs: 1, 0 and -1 / sqrt(2).
  const Tensor embeddings = torch::tensor(
      {{1.0f, 0.0f}, {2.0f, 0.0f}, {0.0f, 3.0f}, {1.0f, 0.0f}, {1.0f, 1.0f}, {-1.0f, 0.0f}});
  EXPECT_NEAR(similarity_spearman(embeddings, {5, 4, 3}), 100, 1e-9);
  EXPECT_NEAR(similarity_spearman(embeddings, {4, 5, 3}), 50, 1e-9);
  EXPECT_NEAR(similarity_spearman(embeddings, {3, 4, 5}), -100, 1e-9);
  Tensor other = embeddings.clone();
  other[1] = torch::tensor({0.0f, 2.0f});  // its cosine becomes 0
  EXPECT_NEAR(cosine_error(other, embeddings), 1.0 / 3, 1e-6);
  EXPECT_EQ(cosine_error(embeddings, embeddings), 0);
  // Signal 1 + 4 + 9 + 1 + 2 + 1 = 18, noise 8.
  EXPECT_NEAR(embedding_sqnr(other, embeddings), 10 * std::log10(18.0 / 8), 1e-6);
}

TEST_F(RecipesTest, EmbeddingsDoNotDependOnTheBatch) {
  const TextModelPointer model = tiny_bert();
  const Rows rows = random_rows(30);
  const TokenDataset data = tokens(rows);
  std::vector<int64_t> progress;
  const Tensor together = embed(*model, data, 8, [&](int64_t done) { progress.push_back(done); });
  EXPECT_EQ(progress.back(), 30);
  EXPECT_TRUE(torch::allclose(together, embed(*model, data, 1), 1e-4, 1e-5));
  const torch::NoGradGuard no_grad;
  for (const int64_t i : {0, 17, 29})
    EXPECT_TRUE(torch::allclose(
        together[i], model->forward(make_batch({rows[i]}, torch::kCPU)).mean(0), 1e-4, 1e-5));
  EXPECT_CONTAINS(message_of([&] { embed(*model, data, 0); }), "batch size");
}

TEST_F(RecipesTest, ComparisonsHoldModelsAgainstEachOther) {
  write_pairs(folder_ / "pairs.h5", 12);
  const TokenDataset pairs = TokenDataset::open(folder_ / "pairs.h5");
  const TextModelPointer reference = tiny_bert(), quantized = tiny_bert();
  EXPECT_CONTAINS(message_of([&] { compare(nullptr, *quantized, pairs, 4); }), kQuery);
  apply_recipe(*quantized, load_recipe("w8a8-dynamic"));
  calibrate_layers(*quantized, {});

  const Comparison both = compare(reference.get(), *quantized, pairs, 4);
  EXPECT_EQ(both.samples, 24);
  ASSERT_TRUE(both.full && both.full->spearman && both.integer.spearman);
  EXPECT_NEAR(*both.full->spearman,
              similarity_spearman(embed(*reference, pairs, 4), pairs.scores()), 1e-9);
  set_mode(*quantized, Mode::integer);
  const Tensor embeddings = embed(*quantized, pairs, 4);
  set_mode(*quantized, Mode::full);
  EXPECT_NEAR(*both.integer.spearman, similarity_spearman(embeddings, pairs.scores()), 1e-9);
  EXPECT_NEAR(both.integer.sqnr_db, embedding_sqnr(embeddings, embed(*reference, pairs, 4)), 1e-6);
  EXPECT_GT(both.fake_quant.sqnr_db, 15);
  EXPECT_GT(*both.integer.cosine_error, 0);
  EXPECT_TRUE(both.validation.passed(0.05));
  for (const auto& item : quantized_layers(*quantized)) EXPECT_EQ(item.layer->mode(), Mode::full);

  const Comparison alone = compare(nullptr, *quantized, tokens(random_rows(6)), 4);
  EXPECT_FALSE(alone.full || alone.integer.spearman || alone.integer.cosine_error);
  EXPECT_TRUE(alone.validation.passed(0.05));
}

}  // namespace
}  // namespace vernier
