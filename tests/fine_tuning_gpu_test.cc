// Fine-tuning on a GPU: recorded steps against those that are launched one by one, and trainings
// that resume to the bit.
#include <gtest/gtest.h>
#include <torch/cuda.h>
#include <vernier/tests/fine_tuning_cases.h>

namespace vernier {
namespace {

using testing::random_windows;
using testing::short_training;
using testing::train;
using testing::TunedModel;

class FineTuningGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!torch::cuda::is_available()) GTEST_SKIP() << "no GPU";
    testing::write_llama(folder());
    testing::write_llama(tied(), /*tied=*/true);
  }
  std::filesystem::path folder() const { return files_ / "llama"; }
  std::filesystem::path tied() const { return files_ / "tied"; }

  testing::TemporaryFolder files_;
  const TokenDataset data_ = random_windows(12, 16);
};

void expect_equal(const TunedModel& a, const TunedModel& b) {
  const auto left = a.parameters(), right = b.parameters();
  for (const auto& [name, value] : left) EXPECT_TRUE(value.equal(right.at(name))) << name;
}

FineTuningSettings gpu_training(int64_t steps, TrainingPrecision precision, bool capture) {
  FineTuningSettings settings = short_training(steps);
  settings.precision = precision;
  settings.capture = capture;
  return settings;
}

TEST_F(FineTuningGpu, RecordedStepsAreTheSteps) {
  for (const TrainingPrecision precision :
       {TrainingPrecision::bf16, TrainingPrecision::tf32, TrainingPrecision::float32}) {
    for (const TrainedProduct product : {TrainedProduct::real, TrainedProduct::codes}) {
      for (const char* recipe :
           {testing::kTokenRecipe, testing::kStaticRecipe, testing::kClippedRecipe}) {
        const std::string what = to_string(precision) + " " + recipe;
        TunedModel one_by_one(tied(), data_, recipe, torch::kCUDA),
            recorded(tied(), data_, recipe, torch::kCUDA);
        FineTuningSettings settings = gpu_training(20, precision, /*capture=*/false);
        settings.product = product;
        settings.accumulate = 2;
        FineTuner plain(*one_by_one.model, *one_by_one.reference, data_, settings);
        const auto expected = train(plain);
        settings.capture = true;
        FineTuner captured(*recorded.model, *recorded.reference, data_, settings);
        std::vector<double> losses;
        bool from_recording = false;
        captured.run([&](const FineTuningProgress& progress) {
          losses.push_back(progress.loss);
          from_recording = progress.captured;
          return true;
        });
        EXPECT_TRUE(from_recording) << what << captured.capture_refusal();
        EXPECT_EQ(losses, expected) << what;
        expect_equal(one_by_one, recorded);
        EXPECT_LT(losses.back(), losses.front()) << what;
      }
    }
  }
}

TEST_F(FineTuningGpu, ResumedEqualsUninterrupted) {
  const auto path = files_ / "half.training";
  const FineTuningSettings settings = gpu_training(20, TrainingPrecision::bf16, true);
  TunedModel whole(folder(), data_, testing::kStaticRecipe, torch::kCUDA),
      half(folder(), data_, testing::kStaticRecipe, torch::kCUDA),
      rest(folder(), data_, testing::kStaticRecipe, torch::kCUDA);
  FineTuner at_once(*whole.model, *whole.reference, data_, settings);
  const auto losses = train(at_once);
  FineTuner first(*half.model, *half.reference, data_, settings);
  train(first, 9);
  first.save(path);
  FineTuner second(*rest.model, *rest.reference, data_, settings);
  second.load(path);
  const auto later = train(second);
  EXPECT_EQ(later, std::vector<double>(losses.begin() + 9, losses.end()));
  expect_equal(whole, rest);
}

// Against the CPU, whose products are exact float32: the first loss is the same but for roundings,
// and both learn.
TEST_F(FineTuningGpu, LearnsAsTheCpuDoes) {
  TunedModel cpu(folder(), data_), gpu(folder(), data_, testing::kTokenRecipe, torch::kCUDA);
  FineTuningSettings settings = gpu_training(40, TrainingPrecision::float32, true);
  FineTuner on_cpu(*cpu.model, *cpu.reference, data_, settings);
  FineTuner on_gpu(*gpu.model, *gpu.reference, data_, settings);
  const auto expected = train(on_cpu), found = train(on_gpu);
  EXPECT_NEAR(found.front(), expected.front(), 0.01 * expected.front());
  EXPECT_NEAR(found.back(), expected.back(), 0.3 * expected.back());
}

TEST_F(FineTuningGpu, FollowingScalesSurviveTheRecording) {
  TunedModel tuned(folder(), data_,
                   "name: x\nweights: {bits: 4, ranges: following}\n"
                   "activations: {bits: 8, granularity: per_token}\n",
                   torch::kCUDA);
  FineTuner tuner(*tuned.model, *tuned.reference, data_,
                  gpu_training(20, TrainingPrecision::bf16, true));
  train(tuner);
  tuner.save(files_ / "following.training");
  for (const auto& [name, layer] : quantized_layers(*tuned.model)) {
    if (!layer->quantized()) continue;
    const torch::Tensor wanted = layer->float_weight().detach().abs().amax(1) / 7;
    EXPECT_TRUE(torch::allclose(layer->weight_quantizer->scale(), wanted, 1e-6, 0)) << name;
  }
}

}  // namespace
}  // namespace vernier
