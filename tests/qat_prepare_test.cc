// From torch::nn to layers that train quantized, by rules; and from there to integers.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/qat/linear.h>
#include <vernier/qat/prepare.h>
#include <vernier/recipes/recipe.h>
#include <vernier/tests/expect_error.h>

#include <set>
#include <sstream>
#include <string>
#include <vector>

namespace vernier {
namespace {

using testing::message_of;
using torch::Tensor;
namespace tnn = torch::nn;

using Names = std::vector<std::string>;

QuantizationRules plain_rules() {
  QuantizationRules rules;
  rules.weights = {symmetric_scheme(4, Granularity::per_channel), {}, RangePolicy::following};
  rules.activations.scheme = asymmetric_scheme(4);
  return rules;
}

/// Layers in every kind of place.
struct Places : tnn::Module {
  Places() {
    body =
        register_module("body", tnn::Sequential(tnn::Linear(4, 6), tnn::ReLU(), tnn::Linear(6, 6),
                                                tnn::LayerNorm(tnn::LayerNormOptions({6}))));
    list = register_module("list", tnn::ModuleList(tnn::Linear(6, 6), tnn::Tanh()));
    const std::vector<std::pair<std::string, std::shared_ptr<tnn::Module>>> entries{
        {"x", tnn::Linear(6, 5).ptr()}};
    dictionary = register_module("dictionary", tnn::ModuleDict(entries));
    member = register_module("member", tnn::Linear(5, 5));
    mine = register_module("mine", nn::Linear(5, 3));
    bilinear = register_module("bilinear", tnn::Bilinear(3, 3, 2));
    register_module("unheld", tnn::Linear(3, 3));
  }
  Tensor forward(const Tensor& x) {
    Tensor y = body->forward(x);
    for (const auto& module : *list) {
      if (auto* linear = module->as<nn::LinearImpl>()) y = linear->forward(y);
      if (auto* linear = module->as<tnn::LinearImpl>()) y = linear->forward(y);
      if (auto* tanh = module->as<tnn::TanhImpl>()) y = tanh->forward(y);
    }
    const auto in_dictionary = (*dictionary)["x"];
    if (auto* linear = in_dictionary->as<nn::LinearImpl>()) y = linear->forward(y);
    if (auto* linear = in_dictionary->as<tnn::LinearImpl>()) y = linear->forward(y);
    y = mine(member(y));
    return bilinear(y, y);
  }
  tnn::Sequential body{nullptr};
  tnn::ModuleList list{nullptr};
  tnn::ModuleDict dictionary{nullptr};
  tnn::Linear member{nullptr};
  nn::Linear mine{nullptr};
  tnn::Bilinear bilinear{nullptr};
};

void calibrate(tnn::Module& model, const std::function<void()>& run) {
  const torch::NoGradGuard no_grad;
  set_mode(model, Mode::observe);
  run();
  calibrate_from_observers(model);
  set_mode(model, Mode::fake_quant);
}

class QatPrepare : public ::testing::Test {
 protected:
  QatPrepare() { torch::manual_seed(17); }
};

TEST_F(QatPrepare, SwapsWhatItReachesAndNamesTheRest) {
  Places model;
  const Tensor x = torch::randn({7, 4});
  const Tensor expected = model.forward(x);
  const auto before = model.named_parameters();
  QuantizationRules rules = plain_rules();
  rules.skip = {"unheld"};
  const PrepareReport report = prepare(model, rules);
  EXPECT_EQ(report.replaced, (Names{"body.0", "body.2", "list.0", "dictionary.x"}));
  EXPECT_EQ(report.already, Names{"mine"});
  EXPECT_EQ(report.skipped, Names{"unheld"});
  ASSERT_EQ(report.unreachable.size(), 2u);
  EXPECT_EQ(report.unreachable[0].name, "member");
  EXPECT_EQ(report.unreachable[0].type, "Linear");
  EXPECT_CONTAINS(report.unreachable[0].remedy, "vernier::nn::Linear");
  EXPECT_EQ(report.unreachable[1].name, "bilinear");
  std::ostringstream text;
  text << report;
  EXPECT_CONTAINS(text.str(), "not reached: member (Linear)");

  // Nothing is lost: the same tensors under the same names, the same result.
  const auto after = model.named_parameters();
  EXPECT_EQ(after.keys(), before.keys());
  for (const auto& item : before) EXPECT_TRUE(after[item.key()].is_same(item.value()));
  EXPECT_TRUE(torch::equal(model.forward(x), expected));
  EXPECT_TRUE(model.member.get() == model.named_children()["member"].get());

  calibrate(model, [&] { model.forward(x); });
  const Tensor fake = model.forward(x);
  EXPECT_FALSE(torch::equal(fake, expected));
  for (const auto& [name, layer] : quantized_layers(model)) {
    EXPECT_EQ(layer->mode(), Mode::fake_quant) << name;
    EXPECT_EQ(layer->weight_quantizer->scheme().bits, 4);
    layer->set_probe([&text, name = name](const std::vector<Tensor>&, const Tensor&) {
      text << "<" << name << ">";  // all of them are called
    });
  }
  model.forward(x);
  for (const char* name : {"<body.0>", "<body.2>", "<list.0>", "<dictionary.x>", "<mine>"})
    EXPECT_CONTAINS(text.str(), name);
}

TEST_F(QatPrepare, SharedLayersStayShared) {
  tnn::Sequential model;
  {
    tnn::Linear shared(4, 4);
    model->push_back("a", shared);
    model->push_back("b", shared);
  }
  prepare(model, plain_rules());
  EXPECT_EQ(model->ptr(0), model->ptr(1));
  EXPECT_NE(model->ptr(0)->as<nn::LinearImpl>(), nullptr);
}

TEST_F(QatPrepare, AnOptimizerMadeBeforeGoesOn) {
  tnn::Sequential model(tnn::Linear(4, 2));
  torch::optim::SGD optimizer(model->parameters(), 0.5);
  prepare(model, plain_rules());
  calibrate(*model, [&] { model->forward(torch::randn({8, 4})); });
  const Tensor before = model->parameters()[0].detach().clone();
  model->forward(torch::randn({8, 4})).sum().backward();
  optimizer.step();
  EXPECT_FALSE(torch::equal(model->parameters()[0], before));
}

TEST_F(QatPrepare, RulesSaySettingsByNameAndType) {
  const auto make = [] {
    return tnn::Sequential(tnn::Linear(4, 4), tnn::Linear(4, 4), tnn::Linear(4, 4),
                           tnn::Linear(4, 4), tnn::Linear(4, 4));
  };
  const auto bits = [](const tnn::Sequential& model) {
    std::vector<int> all;
    for (const auto& [name, layer] : quantized_layers(*model))
      all.push_back(layer->quantized() ? layer->weight_quantizer->scheme().bits : 0);
    return all;
  };
  QuantizationRules rules = plain_rules();
  tnn::Sequential model = make();
  rules.first_last = EndLayers::bits8;
  prepare(model, rules);
  EXPECT_EQ(bits(model), (std::vector<int>{8, 4, 4, 4, 8}));
  EXPECT_EQ(quantized_layers(*model)[0].layer->input_quantizer->scheme(), asymmetric_scheme(8));

  rules.first_last = EndLayers::full;
  rules.skip = {"4"};
  model = make();
  prepare(model, rules);
  EXPECT_EQ(bits(model), (std::vector<int>{0, 4, 4, 0}));

  LayerRule wide, none, first;
  wide.match = "[12]";
  wide.weights = QuantizerSettings{symmetric_scheme(6, Granularity::per_channel), {}};
  none.type = "Linear";
  none.match = "2";
  none.quantize = false;
  first.match = "0";
  first.weights = QuantizerSettings{symmetric_scheme(5, Granularity::per_channel), {}};
  rules.skip.clear();
  rules.first_last = EndLayers::bits8;
  rules.rules = {none, wide, first};
  model = make();
  const PrepareReport report = prepare(model, rules);
  EXPECT_EQ(bits(model), (std::vector<int>{5, 6, 4, 8}));
  EXPECT_EQ(report.skipped, Names{"2"});

  rules.rules[0].type = "Conv2d";
  model = make();
  EXPECT_CONTAINS(message_of([&] { prepare(model, rules); }), "of type Conv2d matches no layer");
  rules.rules.clear();
  rules.skip = {"head"};
  EXPECT_CONTAINS(message_of([&] { prepare(model, rules); }), "skip 'head'");
}

TEST_F(QatPrepare, PreparedModelsStayAsTheyAre) {
  tnn::Sequential model(tnn::Linear(4, 4), tnn::ReLU(), tnn::Linear(4, 2));
  QuantizationRules rules = plain_rules();
  prepare(model, rules);
  calibrate(*model, [&] { model->forward(torch::randn({8, 4})); });
  const Tensor x = torch::randn({3, 4}), expected = model->forward(x);
  const PrepareReport again = prepare(model, rules);
  EXPECT_TRUE(again.replaced.empty());
  EXPECT_EQ(again.already, (Names{"0", "2"}));
  EXPECT_TRUE(torch::equal(model->forward(x), expected));

  rules.activations.scheme = symmetric_scheme(8);
  const std::string message = message_of([&] { prepare(model, rules); });
  EXPECT_CONTAINS(message, "layer '0'");
  EXPECT_CONTAINS(message, "other settings");
  EXPECT_TRUE(torch::equal(model->forward(x), expected));
}

TEST_F(QatPrepare, ModelsThatAreALayerAreRefused) {
  tnn::Linear linear(3, 3);
  EXPECT_CONTAINS(message_of([&] { prepare(linear, plain_rules()); }), "Sequential");
  EXPECT_EQ(type_name(*linear), "Linear");
  EXPECT_EQ(type_name(*nn::Linear(3, 3)), "Linear");
}

TEST_F(QatPrepare, ConvertNamesWhatIsMissing) {
  tnn::Sequential model(tnn::Linear(4, 4), tnn::ReLU(), tnn::Linear(4, 2));
  EXPECT_CONTAINS(message_of([&] {
                    model->eval();
                    convert(model);
                  }),
                  "no quantized layer");
  prepare(model, plain_rules());
  model->train();
  EXPECT_CONTAINS(message_of([&] { convert(model); }), "training mode");
  model->eval();
  const std::string message = message_of([&] { convert(model); });
  EXPECT_CONTAINS(message, "'0' (input)");
  EXPECT_CONTAINS(message, "'2' (input)");
  calibrate(*model, [&] { model->forward(torch::randn({8, 4})); });
  model->train();
  EXPECT_CONTAINS(message_of([&] { convert(model); }), "eval()");
  model->eval();
  const torch::NoGradGuard no_grad;
  const Tensor x = torch::randn({5, 4}), fake = model->forward(x);
  convert(model);
  EXPECT_TRUE(torch::allclose(model->forward(x), fake, 1e-4, 1e-4));
}

// ---- Recipes ------------------------------------------------------------------------------------

TEST_F(QatPrepare, RecipesSayRanges) {
  const Recipe recipe = parse_recipe(
      "name: x\n"
      "weights: {bits: 4, calibrator: lsq, ranges: learned}\n"
      "activations: {ranges: moving_average, averaging: 0.1, symmetric: false}\n"
      "first_last: 8\n"
      "rules:\n"
      "  - {match: 'head*', type: Linear, weights: {bits: 6}}\n"
      "  - {type: Embedding, quantize: false}\n",
      "test");
  EXPECT_EQ(recipe.weights.policy, RangePolicy::learned);
  EXPECT_EQ(recipe.weights.calibrator.method, CalibrationMethod::lsq);
  EXPECT_EQ(recipe.activations.policy, RangePolicy::moving_average);
  EXPECT_EQ(recipe.activations.averaging, 0.1);
  EXPECT_EQ(recipe.first_last, EndLayers::bits8);
  ASSERT_EQ(recipe.rules.size(), 2u);
  EXPECT_EQ(recipe.rules[0].weights->scheme, symmetric_scheme(6, Granularity::per_channel));
  EXPECT_EQ(recipe.rules[0].weights->policy, RangePolicy::learned);
  EXPECT_FALSE(recipe.rules[0].activations.has_value());
  EXPECT_FALSE(recipe.rules[1].quantize);

  const std::string begin = "name: x\nweights: {}\nactivations: {}\n";
  const std::pair<std::string, const char*> wrong[] = {
      {"first_last: 4", "8 or float"},
      {"rules: {match: a}", "must be a list"},
      {"rules: [{weights: {bits: 4}}]", "matches every layer"},
      {"rules: [{match: a, weight: {}}]", "rule 1: unknown field 'weight'"},
      {"rules: [{match: a, weights: {symmetric: false}}]", "rule 1: weights must be symmetric"},
      {"rules: [{match: a}, {match: b, weights: {format: e4m3}}]",
       "rule 2: weights and activations"}};
  for (const auto& [text, part] : wrong)
    EXPECT_CONTAINS(message_of([&, t = text] { parse_recipe(begin + t, "source"); }), part);
  for (const auto& [text, part] : {std::pair("ranges: ema", "'ema'"),
                                   std::pair("ranges: moving_average, averaging: 2", "averaging"),
                                   std::pair("ranges: learned, format: e4m3", "cannot be learned")})
    EXPECT_CONTAINS(message_of([&, t = text] {
                      parse_recipe(concat("name: x\nweights: {", t, "}\nactivations: {}"),
                                   "source");
                    }),
                    part);
}

TEST_F(QatPrepare, TrainingRecipesPrepareModels) {
  for (const char* name : {"qat-w8a8", "qat-w4a8", "qat-w4a4", "qat-w3a3", "qat-w2a2"}) {
    SCOPED_TRACE(name);
    tnn::Sequential model(tnn::Linear(4, 8), tnn::ReLU(), tnn::Linear(8, 8), tnn::ReLU(),
                          tnn::Linear(8, 2));
    prepare(model, load_recipe(name));
    calibrate(*model, [&] { model->forward(torch::randn({64, 4})); });
    model->forward(torch::randn({16, 4})).sum().backward();
    for (const Tensor& parameter : model->parameters())
      EXPECT_TRUE(parameter.grad().isfinite().all().item<bool>());
    model->eval();
    const torch::NoGradGuard no_grad;
    const Tensor x = torch::randn({5, 4}), fake = model->forward(x);
    convert(model);
    EXPECT_TRUE(torch::allclose(model->forward(x), fake, 1e-4, 1e-4));
  }
}

}  // namespace
}  // namespace vernier
