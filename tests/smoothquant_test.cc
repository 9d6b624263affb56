#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/kernels/error.h>
#include <vernier/smoothquant/smoothing.h>

#include <limits>

namespace {

using torch::Tensor;
using namespace vernier;

TEST(SmoothingTest, FactorsFollowEquationFour) {
  const Tensor activation = torch::tensor({16.0f, 1.0f, 4.0f});
  const Tensor weight = torch::tensor({1.0f, 4.0f, 4.0f});
  EXPECT_TRUE(smoothing_factors(activation, weight, 0.5).equal(torch::tensor({4.0f, 0.5f, 1.0f})));
  EXPECT_TRUE(smoothing_factors(activation, weight, 1.0).equal(activation));
  EXPECT_TRUE(smoothing_factors(activation, weight, 0.0).equal(1 / weight));
}

TEST(SmoothingTest, DeadChannelsKeepFactorOne) {
  const float tiny = std::numeric_limits<float>::denorm_min();
  const Tensor activation = torch::tensor({0.0f, 2.0f, tiny, 3.0e38f});
  const Tensor weight = torch::tensor({2.0f, 0.0f, 3.0e38f, tiny});
  const Tensor factors = smoothing_factors(activation, weight, 0.5);
  EXPECT_TRUE(factors.isfinite().all().item<bool>());
  EXPECT_TRUE(factors.gt(0).all().item<bool>());
  EXPECT_EQ(factors[0].item<float>(), 1.0f);
  EXPECT_EQ(factors[1].item<float>(), 1.0f);
}

TEST(SmoothingTest, ChannelMaximaComeFromTheStatistics) {
  Observer observer;
  observer.observe(torch::tensor({{1.0f, -5.0f, 0.0f}, {-2.0f, 3.0f, 0.0f}}));
  EXPECT_TRUE(channel_amax(observer.statistics()).equal(torch::tensor({2.0f, 5.0f, 0.0f})));
  EXPECT_THROW(channel_amax(SiteStatistics()), Error);
  EXPECT_TRUE(input_channel_amax({torch::tensor({{1.0f, -2.0f}}), torch::tensor({{-3.0f, 1.0f}})})
                  .equal(torch::tensor({3.0f, 2.0f})));
}

// norm -> two readers, and linear -> ReLU -> linear: the composed function stays what it was.
TEST(SmoothingTest, FoldingLeavesTheFunctionUnchanged) {
  torch::manual_seed(0);
  const torch::NoGradGuard no_grad;
  const Tensor x = torch::randn({64, 16}, torch::kDouble).to(torch::kFloat);
  Tensor norm_weight = torch::rand({16}) + 0.5, norm_bias = torch::randn({16});
  Tensor q = torch::randn({8, 16}), k = torch::randn({4, 16});
  const auto heads = [&] {
    const Tensor normed = torch::layer_norm(x, {16}, norm_weight, norm_bias);
    return torch::cat({normed.mm(q.t()), normed.mm(k.t())}, 1);
  };
  const Tensor before = heads();
  norm_weight[3] *= 100;  // an outlier channel, planted without changing the function
  norm_bias[3] *= 100;
  q.select(1, 3).div_(100);
  k.select(1, 3).div_(100);
  const Tensor activation = torch::layer_norm(x, {16}, norm_weight, norm_bias).abs().amax(0);
  const Tensor factors = smoothing_factors(activation, input_channel_amax({q, k}), 0.5);
  divide_outputs(norm_weight, norm_bias, factors);
  multiply_inputs(q, factors);
  multiply_inputs(k, factors);
  EXPECT_LE((heads() - before).abs().max().item<float>(), 1e-4f);
  const Tensor smoothed = torch::layer_norm(x, {16}, norm_weight, norm_bias).abs().amax(0);
  EXPECT_LT((smoothed.max() / smoothed.median()).item<float>(),
            0.5f * (activation.max() / activation.median()).item<float>());

  Tensor up = torch::randn({32, 16}), up_bias = torch::randn({32}), down = torch::randn({16, 32});
  const auto mlp = [&] { return torch::relu(torch::addmm(up_bias, x, up.t())).mm(down.t()); };
  const Tensor mlp_before = mlp();
  const Tensor pair = smoothing_factors(torch::relu(torch::addmm(up_bias, x, up.t())).amax(0),
                                        input_channel_amax({down}), 0.8);
  divide_outputs(up, up_bias, pair);
  multiply_inputs(down, pair);
  EXPECT_LE((mlp() - mlp_before).abs().max().item<float>(), 1e-3f);
}

TEST(SmoothingTest, WhatCannotBeFoldedIsRefusedAndNothingChanges) {
  Tensor weight = torch::full({2, 2}, 60000.0f, torch::kHalf), bias;
  const Tensor before = weight.clone();
  EXPECT_THROW(multiply_inputs(weight, torch::tensor({1.0f, 2.0f})), Error);
  EXPECT_THROW(divide_outputs(weight, bias, torch::tensor({0.5f, 1.0f})), Error);
  EXPECT_THROW(multiply_inputs(weight, torch::ones({3})), Error);
  EXPECT_TRUE(weight.equal(before));
  const Tensor two = torch::ones({2});
  EXPECT_THROW(smoothing_factors(two, two, 1.5), Error);
  EXPECT_THROW(smoothing_factors(two, torch::ones({3}), 0.5), Error);
  EXPECT_THROW(smoothing_factors(-two, two, 0.5), Error);
  EXPECT_THROW(smoothing_factors(two / 0, two, 0.5), Error);
  EXPECT_THROW(input_channel_amax({}), Error);
}

}  // namespace
