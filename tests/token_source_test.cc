// Data from the model itself, alone and behind a file's, and continued prompts.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/recipes/generation.h>
#include <vernier/recipes/recipe.h>
#include <vernier/recipes/token_source.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/tiny_llama.h>

#include <limits>
#include <set>
#include <string>
#include <vector>

namespace vernier {
namespace {

using testing::all_logits;
using testing::kLlamaPositions;
using testing::kLlamaStart;
using testing::kVocabulary;
using testing::message_of;
using testing::random_rows;
using testing::Rows;
using testing::write_bert;
using testing::write_pairs;
using testing::write_tokens;
using torch::Tensor;

class TokenSourceTest : public ::testing::Test {
 protected:
  std::string file(const std::string& name) const { return folder_ / name; }
  CausalLanguageModel& causal_model() { return causal(*model_, "the test"); }

  static WindowOptions windows(int64_t count, int64_t length, uint64_t seed = 0) {
    WindowOptions options;
    options.count = count;
    options.length = length;
    options.seed = seed;
    return options;
  }

  /// The likeliest continuation, each token from a run over all before it.
  Rows greedy(const Rows& prompts, int64_t count) {
    Rows result;
    for (std::vector<int64_t> tokens : prompts) {
      const size_t length = tokens.size();
      for (int64_t i = 0; i < count; ++i)
        tokens.push_back(all_logits(causal_model(), tokens)[-1].argmax().item<int64_t>());
      result.emplace_back(tokens.begin() + static_cast<int64_t>(length), tokens.end());
    }
    return result;
  }

  GenerationOptions new_tokens(int64_t count) const {
    GenerationOptions options;
    options.max_tokens = count;
    return options;
  }

  testing::TemporaryFolder folder_;
  std::shared_ptr<TextModel> model_ = testing::load_tiny_llama(folder_);
};

// ---- Windows ------------------------------------------------------------------------------------

TEST_F(TokenSourceTest, WindowsStartWithTheStartTokenAndFollowTheSeed) {
  const Tensor first = sample_windows(causal_model(), windows(5, 20));
  ASSERT_EQ(first.sizes(), (std::vector<int64_t>{5, 20}));
  EXPECT_EQ(first.scalar_type(), torch::kLong);
  EXPECT_TRUE(first.select(1, 0).eq(kLlamaStart).all().item<bool>());
  EXPECT_TRUE(first.ge(0).logical_and(first.lt(kVocabulary)).all().item<bool>());
  EXPECT_GT(std::get<0>(at::_unique(first)).numel(), 10);
  EXPECT_FALSE(first[0].equal(first[1]));
  EXPECT_TRUE(first.equal(sample_windows(causal_model(), windows(5, 20))));
  EXPECT_FALSE(first.equal(sample_windows(causal_model(), windows(5, 20, 1))));
}

TEST_F(TokenSourceTest, WindowsDependNeitherOnTheBatchNorOnHowManyThereAre) {
  const Tensor all = sample_windows(causal_model(), windows(5, 20));
  WindowOptions options = windows(3, 20);
  options.batch_size = 2;
  int64_t last = 0;
  const Tensor few = sample_windows(causal_model(), options, [&](int64_t tokens) {
    EXPECT_GT(tokens, last);
    last = tokens;
  });
  EXPECT_EQ(last, 3 * 20);
  EXPECT_TRUE(few.equal(all.narrow(0, 0, 3)));
}

TEST_F(TokenSourceTest, WindowsFollowTheModelsDistribution) {
  // The second token after the start token, and the third after each second, by their frequencies.
  constexpr int64_t kCount = 4000;
  WindowOptions options = windows(kCount, 3);
  options.batch_size = 500;
  const Tensor sampled = sample_windows(causal_model(), options);
  const auto expect_frequencies = [&](const Tensor& tokens, const std::vector<int64_t>& before) {
    const auto count = static_cast<double>(tokens.numel());
    const Tensor found = tokens.bincount({}, kVocabulary).to(torch::kDouble) / count;
    const Tensor wanted = all_logits(causal_model(), before)[-1].to(torch::kDouble).softmax(0);
    const Tensor deviation = (wanted * (1 - wanted) / count).sqrt();
    // Five standard deviations, and one token for the rare ones.
    EXPECT_TRUE(((found - wanted).abs() <= 5 * deviation + 1 / count).all().item<bool>())
        << at::stack({found, wanted});
  };
  const Tensor second = sampled.select(1, 1);
  expect_frequencies(second, {kLlamaStart});
  const int64_t frequent = std::get<0>(second.mode()).item<int64_t>();
  expect_frequencies(sampled.select(1, 2).masked_select(second.eq(frequent)),
                     {kLlamaStart, frequent});
}

TEST_F(TokenSourceTest, TheTemperatureSharpens) {
  WindowOptions options = windows(2, 16);
  options.temperature = 1e-4;
  const Tensor cold = sample_windows(causal_model(), options);
  const std::vector<int64_t> wanted = greedy({{kLlamaStart}}, 15).front();
  for (int64_t i = 0; i < 2; ++i)
    EXPECT_TRUE(cold[i].narrow(0, 1, 15).equal(torch::tensor(wanted, torch::kLong)));
  options.temperature = 0;
  EXPECT_TRUE(cold.equal(sample_windows(causal_model(), options)));
}

TEST_F(TokenSourceTest, WindowsThatCannotBeSampledAreRefused) {
  const auto refused = [&](const WindowOptions& options) {
    return message_of([&] { sample_windows(causal_model(), options); });
  };
  EXPECT_CONTAINS(refused(windows(0, 8)), "at least one window");
  EXPECT_CONTAINS(refused(windows(1, 1)), "2 to 48 tokens");
  EXPECT_CONTAINS(refused(windows(1, kLlamaPositions + 1)), "not 49");
  WindowOptions options = windows(1, 8);
  options.temperature = -1;
  EXPECT_CONTAINS(refused(options), "temperature");
  EXPECT_EQ(sample_windows(causal_model(), windows(1, kLlamaPositions)).size(1), kLlamaPositions);

  const torch::NoGradGuard no_grad;
  model_->parameters().back().fill_(std::numeric_limits<float>::quiet_NaN());
  EXPECT_CONTAINS(refused(windows(1, 8)), "NaN or infinite");
}

// ---- Sources ------------------------------------------------------------------------------------

TEST_F(TokenSourceTest, SelfIsWindowsOfTheModel) {
  const TokenDataset data = open_tokens("self:6", model_.get(), {.length = 12, .seed = 4});
  EXPECT_EQ(data.size(), 6);
  EXPECT_FALSE(data.pairs());
  EXPECT_EQ(data.name(), "self:6");
  EXPECT_EQ(data.longest_row(), 12);
  const Tensor wanted = sample_windows(causal_model(), windows(6, 12, 4));
  const auto rows = data.read(0, 6, kVocabulary, kLlamaPositions);
  for (int64_t i = 0; i < 6; ++i)
    EXPECT_TRUE(torch::tensor(rows[i], torch::kLong).equal(wanted[i]));
  EXPECT_EQ(open_tokens("self", model_.get()).size(), 32);
  EXPECT_EQ(open_tokens("self:1", model_.get()).longest_row(), kLlamaPositions);  // not 512
}

TEST_F(TokenSourceTest, AFilesSamplesGoBeforeTheModels) {
  const Rows rows = random_rows(5, 1, 10, 10);
  write_tokens(file("tokens.h5"), rows);
  const TokenDataset both = open_tokens(file("tokens.h5") + "+self:3", model_.get());
  EXPECT_EQ(both.size(), 8);
  EXPECT_EQ(both.name(), file("tokens.h5") + "+self:3");
  Rows all = rows;
  const auto own = open_tokens("self:3", model_.get(), {.length = 10})
                       .read(0, 3, kVocabulary, kLlamaPositions);  // as long as the file's
  all.insert(all.end(), own.begin(), own.end());
  EXPECT_EQ(both.read(0, 8, kVocabulary, kLlamaPositions), all);
  EXPECT_EQ(both.read(4, 2, kVocabulary, kLlamaPositions), (Rows{all[4], all[5]}));
  EXPECT_EQ(both.read(6, 2, kVocabulary, kLlamaPositions), (Rows{all[6], all[7]}));
  // The same content has the same hash wherever it lies.
  write_tokens(file("all.h5"), all);
  EXPECT_EQ(both.fingerprint(), TokenDataset::open(file("all.h5")).fingerprint());
  EXPECT_NE(both.fingerprint(), TokenDataset::open(file("tokens.h5")).fingerprint());
  EXPECT_CONTAINS(message_of([&] { both.read(7, 1, 2, kLlamaPositions); }), "window 2 holds token");
  EXPECT_CONTAINS(message_of([&] { both.read(4, 4, kVocabulary, 9); }), "row 4 of 'input_ids'");
}

TEST_F(TokenSourceTest, SourcesThatAreNoneAreRefused) {
  const auto refused = [&](const std::string& spec, TextModel* model) {
    return message_of([&] { open_tokens(spec, model); });
  };
  EXPECT_CONTAINS(refused("self:0", model_.get()), "1 to 1000000");
  EXPECT_CONTAINS(refused("self:", model_.get()), "how many windows");
  EXPECT_CONTAINS(refused("self:4x", model_.get()), "how many windows");
  EXPECT_CONTAINS(refused("self:99999999999", model_.get()), "how many windows");
  EXPECT_CONTAINS(refused("+self", model_.get()), "no file");
  EXPECT_CONTAINS(refused(file("none.h5"), model_.get()), "none.h5");
  EXPECT_CONTAINS(refused("self", nullptr), "float model");
  write_bert(file("bert"));
  EXPECT_CONTAINS(refused("self", load_text_model(file("bert")).get()), "BertModel is none");
  write_pairs(file("pairs.h5"), 3);
  EXPECT_CONTAINS(refused(file("pairs.h5") + "+self:2", model_.get()), "holds pairs");
  model_->info.recipe = "w8a8-static";
  EXPECT_CONTAINS(refused("self", model_.get()), "float model");

  EXPECT_FALSE(samples_the_model("./self.h5"));
  EXPECT_FALSE(samples_the_model("myself"));
  EXPECT_TRUE(samples_the_model("a+b.h5+self:2"));
}

TEST_F(TokenSourceTest, AShareIsDataOfItsOwn) {
  const Rows rows = random_rows(10);
  write_tokens(file("tokens.h5"), rows);
  const TokenDataset data = TokenDataset::open(file("tokens.h5"));
  const TokenDataset share = data.share(2, 5).share(1, std::nullopt);
  EXPECT_EQ(share.size(), 4);
  EXPECT_EQ(share.read(0, 4, kVocabulary, kLlamaPositions),
            Rows(rows.begin() + 3, rows.begin() + 7));
  EXPECT_EQ(share.fingerprint(), data.fingerprint());
  EXPECT_CONTAINS(message_of([&] { share.read(3, 2, kVocabulary, kLlamaPositions); }), "4 samples");
  for (const auto& [first, count] : {std::pair{0, 11}, {10, 1}, {-1, 2}, {3, 0}, {3, -1}})
    EXPECT_CONTAINS(message_of([&, f = first, c = count] { data.share(f, c); }), "not all there");
  write_pairs(file("pairs.h5"), 4);
  const TokenDataset pairs = TokenDataset::open(file("pairs.h5"));
  const auto scores = pairs.scores();
  EXPECT_EQ(pairs.share(2, 4).scores(), std::vector<double>(scores.begin() + 1, scores.end() - 1));
  EXPECT_CONTAINS(message_of([&] { pairs.share(1, 2); }), "cut one in two");
}

// ---- Continued prompts --------------------------------------------------------------------------

TEST_F(TokenSourceTest, GreedyTextsAreTheLikeliestWhateverTheBatch) {
  const Rows prompts = random_rows(7, 3, 1, 6);
  const Rows wanted = greedy(prompts, 12);
  for (const int64_t batch_size : {1, 16}) {
    GenerationOptions options = new_tokens(12);
    options.batch_size = batch_size;
    const Generation result = generate(causal_model(), prompts, options);
    EXPECT_EQ(result.tokens, wanted);
    EXPECT_EQ(result.new_tokens, 7 * 12);
    EXPECT_EQ(result.decoded_tokens, 7 * 11);
    EXPECT_GT(result.decode_seconds, 0);
  }
}

TEST_F(TokenSourceTest, TextsEndWithTheStopToken) {
  const Rows prompts = random_rows(4, 3, 2, 2);
  const Rows whole = greedy(prompts, 40);
  GenerationOptions options = new_tokens(40);
  options.stop = {whole[0][5], whole[1][20]};
  const Generation result = generate(causal_model(), prompts, options);
  for (size_t i = 0; i < prompts.size(); ++i) {
    const auto end = std::find_first_of(whole[i].begin(), whole[i].end(), options.stop.begin(),
                                        options.stop.end());
    EXPECT_EQ(result.tokens[i],
              std::vector<int64_t>(whole[i].begin(), end == whole[i].end() ? end : end + 1));
  }
  EXPECT_LE(result.tokens[0].size(), 6u);
}

TEST_F(TokenSourceTest, SamplingStaysAmongTheLikeliest) {
  const Rows prompts(200, {kLlamaStart, 7});
  const Tensor probability = all_logits(causal_model(), prompts[0])[-1].softmax(0);
  const auto [sorted, order] = probability.sort(0, /*descending=*/true);
  const auto first_tokens = [&](double temperature, int64_t top_k, double top_p) {
    GenerationOptions options = new_tokens(1);
    options.sampling = {temperature, top_k, top_p};
    options.batch_size = 64;
    std::set<int64_t> found;
    for (const auto& tokens : generate(causal_model(), prompts, options).tokens)
      found.insert(tokens.front());
    return found;
  };
  const auto likeliest = [&](int64_t count) {
    const Tensor tokens = order.narrow(0, 0, count).contiguous();
    return std::set<int64_t>(tokens.const_data_ptr<int64_t>(),
                             tokens.const_data_ptr<int64_t>() + count);
  };
  EXPECT_EQ(first_tokens(1, 1, 1), likeliest(1));
  EXPECT_EQ(first_tokens(5, 3, 1), likeliest(3));
  // The second token is needed to reach a little more than the first one's probability.
  EXPECT_EQ(first_tokens(1, 0, sorted[0].item<double>() + 1e-3), likeliest(2));
  EXPECT_EQ(first_tokens(1, 0, 1e-6), likeliest(1));
  EXPECT_GT(first_tokens(1, 0, 1).size(), 3u);
}

TEST_F(TokenSourceTest, PromptsThatCannotBeContinuedAreRefused) {
  const auto refused = [&](const Rows& prompts, const GenerationOptions& options) {
    return message_of([&] { generate(causal_model(), prompts, options); });
  };
  EXPECT_CONTAINS(refused({{1}, {}}, new_tokens(4)), "prompt 1 is empty");
  EXPECT_CONTAINS(refused({{kVocabulary}}, new_tokens(4)), "vocabulary of 50");
  EXPECT_CONTAINS(refused({{-1}}, new_tokens(4)), "token id -1");
  EXPECT_CONTAINS(refused({{1, 2}}, new_tokens(kLlamaPositions - 1)), "48 positions");
  EXPECT_CONTAINS(refused({{1}}, new_tokens(0)), "at least one new token");
  for (const Sampling sampling : {Sampling{-1, 0, 1}, {1, -1, 1}, {1, 0, 0}, {1, 0, 1.5}}) {
    GenerationOptions options = new_tokens(1);
    options.sampling = sampling;
    EXPECT_NE(refused({{1}}, options), "");
  }
  EXPECT_EQ(generate(causal_model(), {{1, 2}}, new_tokens(kLlamaPositions - 2)).new_tokens,
            kLlamaPositions - 2);
}

TEST_F(TokenSourceTest, StopTokensAreTheConfigurations) {
  const auto of = [&](const std::string& config) {
    model_->info.config = config;
    return stop_tokens(*model_);
  };
  EXPECT_EQ(of("{}"), std::vector<int64_t>());
  EXPECT_EQ(of(R"({"eos_token_id": 2})"), std::vector<int64_t>{2});
  EXPECT_EQ(of(R"({"eos_token_id": [2, 5]})"), (std::vector<int64_t>{2, 5}));
  EXPECT_EQ(of(R"({"eos_token_id": null})"), std::vector<int64_t>());
}

}  // namespace
}  // namespace vernier
