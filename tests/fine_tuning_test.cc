// Fine-tuning on the CPU: that models learn, that trainings resume to the bit, and what is refused.
#include <gtest/gtest.h>
#include <vernier/export/checkpoint.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/fine_tuning_cases.h>

namespace vernier {
namespace {

using testing::message_of;
using testing::random_windows;
using testing::short_training;
using testing::train;
using testing::TunedModel;

class FineTuning : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    files_ = std::make_unique<testing::TemporaryFolder>();
    testing::write_llama(*files_ / "llama");
    testing::write_llama(*files_ / "tied", /*tied=*/true);
    testing::write_bert(*files_ / "bert");
  }
  static void TearDownTestSuite() { files_.reset(); }

  static std::filesystem::path folder(const char* name = "llama") { return *files_ / name; }
  static std::unique_ptr<testing::TemporaryFolder> files_;

  const TokenDataset data_ = random_windows(12, 10);
};

std::unique_ptr<testing::TemporaryFolder> FineTuning::files_;

void expect_equal(const TunedModel& a, const TunedModel& b) {
  const auto left = a.parameters(), right = b.parameters();
  ASSERT_EQ(left.size(), right.size());
  for (const auto& [name, value] : left) EXPECT_TRUE(value.equal(right.at(name))) << name;
}

TEST_F(FineTuning, LearnsWhatRoundingTook) {
  for (const char* recipe :
       {testing::kTokenRecipe, testing::kStaticRecipe, testing::kClippedRecipe}) {
    TunedModel tuned(folder(), data_, recipe);
    const double before = tuned.divergence(data_);
    FineTuner tuner(*tuned.model, *tuned.reference, data_, short_training(60));
    const std::vector<double> losses = train(tuner);
    ASSERT_EQ(losses.size(), 60u);
    const double after = tuned.divergence(data_);
    EXPECT_LT(after, 0.5 * before) << recipe;
    EXPECT_LT(losses.back(), 0.5 * losses.front()) << recipe;
    EXPECT_FALSE(tuned.model->is_training());
    // The checkpoint computes what was trained.
    const auto path = *files_ / "trained.h5";
    tuned.model->info.recipe = "t";
    save_checkpoint(*tuned.model, tuned.model->info, path);
    const auto loaded = load_text_model(path);
    EXPECT_NEAR(logits_kl(causal(*loaded, "test"), causal(*tuned.reference, "test"), data_, 8),
                after, 0.05 * after + 1e-4);
  }
}

TEST_F(FineTuning, TheFirstLossIsTheDivergenceBefore) {
  TunedModel tuned(folder("tied"), data_);
  const double before = tuned.divergence(data_);
  FineTuningSettings settings = short_training(1);
  settings.batch_size = data_.size();
  FineTuner tuner(*tuned.model, *tuned.reference, data_, settings);
  EXPECT_NEAR(train(tuner).front(), before, 1e-2 * before);
}

TEST_F(FineTuning, GradientsAreThoseOfAutograd) {
  TunedModel tuned(folder("tied"), data_), plain(folder("tied"), data_);
  FineTuningSettings settings = short_training(1);
  settings.batch_size = data_.size() / 2;
  settings.accumulate = 2;
  settings.adamw.clip_norm = 0;
  settings.rate = settings.range_rate = 0;
  settings.hidden_weight = 0.5;
  settings.product = TrainedProduct::real;  // as the plain model's
  FineTuner tuner(*tuned.model, *tuned.reference, data_, settings);
  train(tuner);

  const auto found = tuned.model->named_parameters();
  for (auto& item : plain.model->named_parameters()) {  // scales passed through their logarithms
    const torch::NoGradGuard no_grad;
    item.value().copy_(found[item.key()]);
  }
  const TokenBatch batch =
      make_batch(data_.read(0, data_.size(), plain.model->vocabulary(), plain.model->max_length()),
                 torch::kCPU);
  const torch::Tensor wanted = plain.reference->forward(batch).detach();
  const torch::Tensor hidden = plain.model->forward(batch);
  const torch::Tensor loss = distillation_loss(causal(*plain.model, "test").logits(hidden),
                                               causal(*plain.reference, "test").logits(wanted)) +
                             0.5 * (hidden - wanted).square().mean() / wanted.square().mean();
  loss.backward();
  for (const auto& item : plain.model->named_parameters()) {
    if (item.key().find("quantizer") != std::string::npos) continue;  // the step changes them
    EXPECT_TRUE(torch::allclose(found[item.key()].grad(), item.value().grad(), 1e-3, 1e-6))
        << item.key();
  }
}

TEST_F(FineTuning, AccumulationIsALargerBatch) {
  TunedModel parts(folder(), data_), whole(folder(), data_);
  FineTuningSettings settings = short_training(4);
  settings.batch_size = 2;
  settings.accumulate = 3;
  FineTuner in_parts(*parts.model, *parts.reference, data_, settings);
  settings.batch_size = 6;
  settings.accumulate = 1;
  FineTuner at_once(*whole.model, *whole.reference, data_, settings);
  const auto a = train(in_parts), b = train(at_once);
  // Later steps see weights that Adam's division made of roundings.
  EXPECT_NEAR(a.front(), b.front(), 1e-5 * a.front());
  EXPECT_NEAR(a.back(), b.back(), 0.02 * a.back());
}

TEST_F(FineTuning, ResumedEqualsUninterrupted) {
  for (const char* recipe :
       {testing::kTokenRecipe, testing::kStaticRecipe, testing::kClippedRecipe}) {
    const auto path = *files_ / "half.training";
    TunedModel whole(folder(), data_, recipe), half(folder(), data_, recipe),
        rest(folder(), data_, recipe);
    FineTuner at_once(*whole.model, *whole.reference, data_, short_training(11));
    const auto losses = train(at_once);
    {
      FineTuner first(*half.model, *half.reference, data_, short_training(11));
      train(first, /*until=*/4);
      EXPECT_EQ(first.steps(), 4);
      first.save(path);
    }
    FineTuner second(*rest.model, *rest.reference, data_, short_training(11));
    second.load(path);
    EXPECT_EQ(second.steps(), 4);
    const auto later = train(second);
    ASSERT_EQ(later.size(), 7u);
    for (size_t i = 0; i < later.size(); ++i) EXPECT_EQ(later[i], losses[4 + i]) << i;
    expect_equal(whole, rest);
    // Stopping and going on in one process is the same.
    FineTuner again(*half.model, *half.reference, data_, short_training(11));
    again.load(path);
    train(again, 6);
    train(again);
    expect_equal(whole, half);
  }
}

TEST_F(FineTuning, EqualSeedsEqualBits) {
  TunedModel a(folder(), data_), b(folder(), data_), c(folder(), data_);
  FineTuningSettings settings = short_training(3);
  FineTuner first(*a.model, *a.reference, data_, settings);
  FineTuner second(*b.model, *b.reference, data_, settings);
  settings.seed = 1;
  FineTuner third(*c.model, *c.reference, data_, settings);
  const auto losses = train(first);
  EXPECT_EQ(losses, train(second));
  expect_equal(a, b);
  EXPECT_NE(losses, train(third));
}

TEST_F(FineTuning, SequencesOfSeveralLengths) {
  testing::write_tokens(*files_ / "uneven.h5", testing::random_rows(9, 3, 2, 12));
  const TokenDataset uneven = TokenDataset::open(*files_ / "uneven.h5");
  TunedModel tuned(folder(), uneven);
  const double before = tuned.divergence(uneven);
  FineTuner tuner(*tuned.model, *tuned.reference, uneven, short_training(40));
  train(tuner);
  EXPECT_LT(tuned.divergence(uneven), 0.6 * before);
}

TEST_F(FineTuning, EncodersLearnTheirHiddenStates) {
  testing::write_tokens(*files_ / "bert.h5", testing::random_rows(16, 5));
  const TokenDataset data = TokenDataset::open(*files_ / "bert.h5");
  const std::string recipe =
      "name: b\nweights: {bits: 3, calibrator: mse, ranges: learned}\n"
      "activations: {bits: 8, symmetric: false, ranges: learned}\n";
  TunedModel tuned(folder("bert"), data, recipe);
  FineTuner tuner(*tuned.model, *tuned.reference, data, short_training(60));
  const auto losses = train(tuner);
  EXPECT_LT(losses.back(), 0.6 * losses.front());
}

TEST_F(FineTuning, FollowingAndAveragedRanges) {
  for (const char* ranges : {"following", "moving_average"}) {
    const bool following = std::string(ranges) == "following";
    TunedModel tuned(folder(), data_,
                     "name: x\nweights: {bits: 4, ranges: following}\nactivations: {bits: 8, "
                     "ranges: " +
                         std::string(following ? "frozen" : ranges) + "}\n");
    FineTuner tuner(*tuned.model, *tuned.reference, data_, short_training(30));
    const auto losses = train(tuner);
    EXPECT_LT(losses.back(), losses.front()) << ranges;
    tuner.save(*files_ / "following.training");
  }
}

TEST_F(FineTuning, RefusesWhatDoesNotFit) {
  TunedModel tuned(folder(), data_), other(folder("tied"), data_);
  const auto made = [&](const FineTuningSettings& settings, TextModel& reference) {
    return message_of([&] { FineTuner(*tuned.model, reference, data_, settings); });
  };
  FineTuningSettings settings = short_training(4);
  settings.batch_size = 0;
  EXPECT_CONTAINS(made(settings, *tuned.reference), "batch_size");
  settings = short_training(4);
  settings.range_rate = 2;
  EXPECT_CONTAINS(made(settings, *tuned.reference), "scale_lr");
  settings = short_training(4);
  settings.logits_weight = 0;
  EXPECT_CONTAINS(made(settings, *tuned.reference), "nothing to learn");
  EXPECT_CONTAINS(made(short_training(4), *tuned.model), "two models");
  const auto bert = load_text_model(folder("bert"));
  EXPECT_CONTAINS(made(short_training(4), *bert), "causal");
  const auto untouched = load_text_model(folder());
  EXPECT_CONTAINS(
      message_of([&] { FineTuner(*untouched, *tuned.reference, data_, short_training(4)); }),
      "no scale");
  const TokenDataset foreign =
      TokenDataset::of_windows(torch::full({2, 4}, testing::kVocabulary, torch::kLong), "foreign");
  EXPECT_CONTAINS(
      message_of([&] { FineTuner(*tuned.model, *tuned.reference, foreign, short_training(4)); }),
      "vocabulary");
}

TEST_F(FineTuning, ResumesOnlyWhatWasBegun) {
  const auto path = *files_ / "begun.training";
  TunedModel tuned(folder(), data_), same(folder(), data_);
  FineTuner tuner(*tuned.model, *tuned.reference, data_, short_training(4));
  train(tuner, 2);
  tuner.save(path);
  const auto before = same.parameters();
  const auto resumed = [&](const TokenDataset& data, const FineTuningSettings& settings) {
    return message_of([&] {
      FineTuner other(*same.model, *same.reference, data, settings);
      other.load(path);
    });
  };
  EXPECT_CONTAINS(resumed(random_windows(12, 10, 2), short_training(4)), "another data");
  EXPECT_CONTAINS(resumed(data_, short_training(5)), "another steps: 4 where this one has 5");
  FineTuningSettings settings = short_training(4);
  settings.rate = 1e-3;
  EXPECT_CONTAINS(resumed(data_, settings), "another lr");
  for (const auto& [name, value] : same.parameters()) {
    if (name.find("learned") != std::string::npos) continue;  // passed through their logarithms
    EXPECT_TRUE(value.equal(before.at(name))) << name;
  }
  TunedModel eight(folder(), data_,
                   "name: x\nweights: {bits: 8, ranges: learned}\n"
                   "activations: {bits: 8, granularity: per_token}\n");
  FineTuner wrong(*eight.model, *eight.reference, data_, short_training(4));
  EXPECT_CONTAINS(message_of([&] { wrong.load(path); }), "recipe");
  EXPECT_CONTAINS(message_of([&] { wrong.load(*files_ / "nowhere"); }), "does not exist");
  testing::write_bytes(*files_ / "damaged", "not an archive");
  EXPECT_CONTAINS(message_of([&] { wrong.load(*files_ / "damaged"); }), "damaged");
}

TEST_F(FineTuning, ARateTooHighIsAnError) {
  TunedModel tuned(folder(), data_);
  FineTuningSettings settings = short_training(30);
  settings.rate = 1e30;
  settings.warmup = 0;
  FineTuner tuner(*tuned.model, *tuned.reference, data_, settings);
  EXPECT_CONTAINS(message_of([&] { train(tuner); }), "learning rate");
}

TEST(FineTuningRecipe, Training) {
  const Recipe recipe = parse_recipe(
      "name: x\nweights: {bits: 4}\nactivations: {bits: 8}\n"
      "training: {steps: 7, lr: 1e-5, scale_lr: 0.01, precision: tf32, product: real}\n",
      "test");
  EXPECT_EQ(recipe.training.steps, 7);
  EXPECT_EQ(recipe.training.rate, 1e-5);
  EXPECT_EQ(recipe.training.range_rate, 0.01);
  EXPECT_EQ(recipe.training.precision, TrainingPrecision::tf32);
  EXPECT_EQ(recipe.training.product, TrainedProduct::real);
  const auto refused = [](const std::string& training) {
    return message_of([&] {
      parse_recipe("name: x\nweights: {}\nactivations: {}\ntraining: {" + training + "}\n", "test");
    });
  };
  EXPECT_CONTAINS(refused("epochs: 3"), "unknown field 'epochs'");
  EXPECT_CONTAINS(refused("steps: 0"), "steps must be at least 1");
  EXPECT_CONTAINS(refused("precision: fp8"), "unknown precision");
  EXPECT_CONTAINS(refused("final_lr: 2"), "final_lr");
  for (const std::string& name : recipe_names()) EXPECT_NO_THROW(load_recipe(name)) << name;
}

}  // namespace
}  // namespace vernier
