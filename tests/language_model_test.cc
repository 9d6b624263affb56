// Perplexity and divergence of causal language models, and how they are calibrated and compared.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/recipes/calibration_run.h>
#include <vernier/recipes/comparison.h>
#include <vernier/recipes/language_model.h>
#include <vernier/recipes/recipe.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/tiny_llama.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace vernier {
namespace {

using testing::all_logits;
using testing::kLlamaLayers;
using testing::kLlamaLinearsPerLayer;
using testing::kLlamaPositions;
using testing::kVocabulary;
using testing::message_of;
using testing::random_rows;
using testing::Rows;
using testing::write_tokens;
using torch::Tensor;

class LanguageModelTest : public ::testing::Test {
 protected:
  std::shared_ptr<TextModel> model(bool tied = false, uint64_t seed = 1) {
    return testing::load_tiny_llama(folder_, tied, seed);
  }

  TokenDataset tokens(const Rows& rows, const std::string& name = "tokens.h5") {
    write_tokens(folder_ / name, rows);
    return TokenDataset::open(folder_ / name);
  }

  static CausalLanguageModel& causal(TextModel& model) {
    return vernier::causal(model, "the test");
  }

  static Tensor log_probabilities(TextModel& model, const std::vector<int64_t>& row) {
    return all_logits(causal(model), row).to(torch::kDouble).log_softmax(-1);
  }

  /// In float64, a sequence at a time.
  static double plain_perplexity(TextModel& model, const Rows& rows) {
    double loss = 0;
    int64_t count = 0;
    for (const auto& row : rows) {
      const Tensor log_probability = log_probabilities(model, row);
      for (size_t i = 1; i < row.size(); ++i, ++count)
        loss -= log_probability[static_cast<int64_t>(i) - 1][row[i]].item<double>();
    }
    return std::exp(loss / static_cast<double>(count));
  }

  static double plain_kl(TextModel& model, TextModel& reference, const Rows& rows) {
    double sum = 0;
    int64_t count = 0;
    for (const auto& row : rows) {
      const Tensor p = log_probabilities(reference, row), q = log_probabilities(model, row);
      sum += (p.exp() * (p - q)).sum().item<double>();
      count += static_cast<int64_t>(row.size());
    }
    return sum / static_cast<double>(count);
  }

  static QuantizedLayer& layer(TextModel& model, const std::string& name) {
    for (const auto& item : quantized_layers(model))
      if (item.name == name) return *item.layer;
    throw std::logic_error("no layer " + name);
  }

  static ModelStatistics statistics(TextModel& model, const TokenDataset& data) {
    ModelStatistics result = plan_statistics(model, data, 0, data.size());
    collect_statistics(model, data, result);
    return result;
  }

  testing::TemporaryFolder folder_;
};

// ---- Figures ------------------------------------------------------------------------------------

TEST_F(LanguageModelTest, PerplexityIsThatOfTheProbabilities) {
  // Of several lengths, one token among them, which has nothing to score.
  Rows rows = random_rows(20, 5, 1, kLlamaPositions);
  rows.push_back({7});
  const TokenDataset data = tokens(rows);
  for (const bool tied : {false, true}) {
    const auto tested = model(tied);
    const double wanted = plain_perplexity(*tested, rows);
    for (const int64_t batch_size : {1, 4, 100}) {
      int64_t done = 0;
      const double found =
          perplexity(causal(*tested), data, batch_size, [&](int64_t samples) { done = samples; });
      EXPECT_NEAR(found / wanted, 1, 1e-6);
      EXPECT_EQ(done, data.size());
    }
  }
}

TEST_F(LanguageModelTest, LossOfSequencesOfSeveralLengthsInOneBatch) {
  const Rows rows = random_rows(6, 5, 1, 20);
  const auto tested = model();
  const torch::NoGradGuard no_grad;
  const TokenBatch batch = make_batch(rows, torch::kCPU);
  const TokenSum loss =
      next_token_loss(causal(*tested), causal(*tested).forward(batch, nullptr), batch);
  EXPECT_EQ(loss.tokens, batch.tokens.numel() - 6);
  EXPECT_NEAR(std::exp(loss.mean()) / plain_perplexity(*tested, rows), 1, 1e-6);
}

TEST_F(LanguageModelTest, DivergenceIsThatOfTheDistributions) {
  const Rows rows = random_rows(10, 5, 1, 30);
  const TokenDataset data = tokens(rows);
  const auto tested = model(), other = model(false, 2);
  const double wanted = plain_kl(*tested, *other, rows);
  EXPECT_GT(wanted, 0.1);
  for (const int64_t batch_size : {1, 100})
    EXPECT_NEAR(logits_kl(causal(*tested), causal(*other), data, batch_size) / wanted, 1, 1e-5);
  EXPECT_NE(plain_kl(*other, *tested, rows), wanted);
  EXPECT_EQ(logits_kl(causal(*tested), causal(*model()), data, 4), 0);
}

TEST_F(LanguageModelTest, WhatCannotBeScoredIsRefused) {
  const auto tested = model();
  const TokenDataset single = tokens({{1}, {2}}, "single.h5");
  EXPECT_CONTAINS(message_of([&] { perplexity(causal(*tested), single, 4); }), "no token to score");
  const TokenDataset data = tokens(random_rows(4, 5, 2, 8));
  EXPECT_CONTAINS(message_of([&] { perplexity(causal(*tested), data, 0); }), "batch size");
  const torch::NoGradGuard no_grad;
  tested->parameters().back().fill_(std::numeric_limits<float>::quiet_NaN());
  EXPECT_CONTAINS(message_of([&] { perplexity(causal(*tested), data, 4); }), "not a number");
  EXPECT_CONTAINS(message_of([&] { logits_kl(causal(*tested), causal(*model()), data, 4); }),
                  "not a number");
}

// ---- Recipes ------------------------------------------------------------------------------------

TEST_F(LanguageModelTest, TheOutputLayerStaysFullUnlessARuleNamesIt) {
  const auto untied = model();
  apply_recipe(*untied, load_recipe("w8a8-static"));
  EXPECT_FALSE(layer(*untied, "lm_head").quantized());
  EXPECT_TRUE(layer(*untied, "model.layers.0.mlp.down_proj").quantized());
  apply_recipe(*model(true), load_recipe("w8a8-static"));  // there is none to skip

  const Recipe naming = parse_recipe(
      "name: n\nweights: {bits: 4}\nactivations: {bits: 8}\n"
      "rules: [{match: lm_head, weights: {bits: 8}}]",
      "the test");
  apply_recipe(*untied, naming);
  ASSERT_TRUE(layer(*untied, "lm_head").quantized());
  EXPECT_EQ(layer(*untied, "lm_head").weight_quantizer->scheme().bits, 8);
  // Its input has statistics, too.
  const TokenDataset data = tokens(random_rows(8, 5, 2, 20));
  calibrate_layers(*untied, statistics(*untied, data));
  const Comparison comparison = compare(nullptr, *untied, data, 8);
  EXPECT_TRUE(comparison.validation.passed(0.05));
  EXPECT_EQ(comparison.validation.layers.size(),
            static_cast<size_t>(kLlamaLayers * kLlamaLinearsPerLayer + 1));
}

TEST_F(LanguageModelTest, ComparisonHoldsPredictionsAgainstTheFloatModels) {
  const Rows rows = random_rows(12, 5, 2, kLlamaPositions);
  const TokenDataset data = tokens(rows);
  for (const char* recipe : {"w8a8-static", "w8a8-dynamic"}) {
    SCOPED_TRACE(recipe);
    const auto reference = model(), quantized = model();
    apply_recipe(*quantized, load_recipe(recipe));
    calibrate_layers(*quantized, statistics(*quantized, data));
    const Comparison comparison = compare(reference.get(), *quantized, data, 5);
    EXPECT_EQ(comparison.samples, 12);
    EXPECT_NEAR(*comparison.full->perplexity / plain_perplexity(*reference, rows), 1, 1e-6);
    const auto expect_figures = [&](const ModeResult& result, Mode mode) {
      set_mode(*quantized, mode);
      EXPECT_NEAR(*result.perplexity / plain_perplexity(*quantized, rows), 1, 1e-4);
      EXPECT_NEAR(*result.kl / plain_kl(*quantized, *reference, rows), 1, 0.02);
      EXPECT_GT(*result.kl, 0);
      EXPECT_GT(result.sqnr_db, 10);
      EXPECT_FALSE(result.spearman);
    };
    expect_figures(comparison.fake_quant, Mode::fake_quant);
    expect_figures(comparison.integer, Mode::integer);
    EXPECT_FALSE(comparison.full->kl);
    EXPECT_TRUE(comparison.passed(0.05));

    Comparison apart = comparison;
    apart.integer.perplexity = *apart.fake_quant.perplexity * (1 + 2 * kPerplexityTolerance);
    EXPECT_FALSE(apart.passed(0.05));
    apart.integer.perplexity = std::numeric_limits<double>::quiet_NaN();
    EXPECT_FALSE(apart.passed(0.05));
  }
}

TEST_F(LanguageModelTest, BatchesHaveAboutAsManyTokens) {
  EXPECT_EQ(default_batch_size(tokens(random_rows(2, 1, 32, 32))), 256);
  EXPECT_EQ(default_batch_size(tokens({std::vector<int64_t>(10000, 1)}, "long.h5")), 1);
}

}  // namespace
}  // namespace vernier
