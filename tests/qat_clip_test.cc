// Dynamic scales with a learned factor: what is clipped, its gradient, and what keeps it.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/export/checkpoint.h>
#include <vernier/kernels/fake_quantize.h>
#include <vernier/qat/linear.h>
#include <vernier/qat/prepare.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/temporary_folder.h>

#include <sstream>

using namespace vernier;

namespace {

using torch::Tensor;
using vernier::testing::message_of;
using vernier::testing::TemporaryFolder;

QuantizerSettings clipped_settings(int bits) {
  QuantizerSettings settings;
  settings.scheme = symmetric_scheme(bits, Granularity::per_token);
  settings.scheme.dynamic = true;
  settings.policy = RangePolicy::learned;
  return settings;
}

// A quantizer of 4 bits with a factor, and tokens of several magnitudes.
struct Clipped : ::testing::Test {
  Clipped() {
    torch::manual_seed(0);
    values = torch::randn({6, 32}) * torch::tensor({1., 10., .1, 3., 0., 100.}).unsqueeze(1);
    quantizer = Quantizer(clipped_settings(4));
    quantizer->set_scale(torch::full({1}, 0.75), std::nullopt);
  }

  Tensor expected_scale(double factor) const {
    const Tensor amax = values.abs().amax(1);
    return torch::where(amax > 0, amax / torch::full({1}, 7.0), 1.0) * factor;
  }

  Tensor values;
  Quantizer quantizer{nullptr};
};

TEST_F(Clipped, StartsAtOneAndIsAFactorOnEveryTokensScale) {
  EXPECT_EQ(Quantizer(clipped_settings(4))->scale().item<float>(), 1);
  const auto [codes, scale] = quantizer->codes(values);
  EXPECT_TRUE(torch::equal(scale, expected_scale(0.75)));
  const Tensor wanted = (values / scale.unsqueeze(1)).round().clamp(-8, 7);
  EXPECT_TRUE(torch::equal(codes.to(torch::kFloat), wanted));
  EXPECT_GT((values.abs() > 8 * scale.unsqueeze(1)).sum().item<int64_t>(), 0);  // some are clipped
  EXPECT_TRUE(torch::equal(quantizer->forward(values), wanted * scale.unsqueeze(1)));
}

// The formula of LSQ for a token's scale, times what the factor multiplies.
TEST_F(Clipped, GradientOfTheFactor) {
  const Tensor upstream = torch::randn_like(values);
  (quantizer->forward(values) * upstream).sum().backward();
  const Tensor own = expected_scale(1).unsqueeze(1), v = values / (own * 0.75f);
  const Tensor inside = (v.round() >= -8) & (v.round() <= 7);
  const Tensor slope = torch::where(inside, v.round() - v, v.round().clamp(-8, 7));
  const double gradient_scale = learned_gradient_scale(32, quantizer->scheme());
  const Tensor wanted = (upstream * slope * own).sum() * gradient_scale;
  const Tensor found = quantizer->parameters().at(0).grad();
  ASSERT_TRUE(found.defined());
  EXPECT_NEAR(found.item<double>(), wanted.item<double>(), 1e-4 * std::abs(wanted.item<double>()));
}

TEST_F(Clipped, PolicyCopiesAndArchivesKeepIt) {
  const Tensor before = quantizer->forward(values).detach();
  quantizer->set_policy(RangePolicy::frozen);
  EXPECT_TRUE(quantizer->parameters().empty());
  EXPECT_TRUE(torch::equal(quantizer->forward(values), before));

  std::stringstream stream;
  torch::save(quantizer, stream);
  Quantizer loaded;
  torch::load(loaded, stream);
  EXPECT_TRUE(torch::equal(loaded->forward(values), before));
  const auto copy = std::dynamic_pointer_cast<QuantizerImpl>(quantizer->clone());
  EXPECT_TRUE(torch::equal(copy->forward(values), before));
}

TEST_F(Clipped, RefusesWhatIsNoFactor) {
  EXPECT_NE(
      message_of([&] { quantizer->set_scale(torch::ones({2}), std::nullopt); }).find("one factor"),
      std::string::npos);
  EXPECT_NE(
      message_of([&] { quantizer->set_scale(torch::zeros({1}), std::nullopt); }).find("positive"),
      std::string::npos);
  QuantizerSettings fp8 = clipped_settings(8);
  fp8.scheme = fp8_scheme(NumberFormat::e4m3, Granularity::per_token);
  fp8.scheme.dynamic = true;
  EXPECT_NE(message_of([&] { fp8.check(); }).find("clip of integers"), std::string::npos);
}

// Trained with an optimizer, the factor falls below 1 where clipping pays, and the checkpoint of
// the trained layer computes in mode integer what was trained.
TEST(LearnedClip, IsTrainedAndSurvivesACheckpoint) {
  torch::manual_seed(0);
  torch::nn::Sequential model(nn::Linear(64, 16));
  auto& layer = *model[0]->as<nn::LinearImpl>();
  layer.input_quantizer->set_settings(clipped_settings(3));
  layer.weight_quantizer->calibrate(layer.weight);
  set_mode(*model, Mode::fake_quant);
  torch::optim::Adam optimizer({layer.input_quantizer->scale()}, 0.01);
  const Tensor input = torch::randn({256, 64});
  const Tensor exact = torch::linear(input, layer.weight, layer.bias).detach();
  const auto loss = [&] { return (model->forward(input) - exact).square().mean(); };
  const double before = loss().item<double>();
  for (int step = 0; step < 100; ++step) {
    optimizer.zero_grad();
    loss().backward();
    optimizer.step();
  }
  EXPECT_LT(layer.input_quantizer->scale().item<float>(), 0.95);
  EXPECT_LT(loss().item<double>(), 0.9 * before);

  model->eval();
  const torch::NoGradGuard no_grad;
  const Tensor trained = model->forward(input);
  const TemporaryFolder folder;
  save_checkpoint(*model, {"test", "{}", "test", "0"}, folder.path() / "m.h5");
  torch::nn::Sequential loaded(nn::Linear(64, 16));
  Checkpoint::open(folder.path() / "m.h5").load_into(*loaded);
  EXPECT_EQ(loaded[0]->as<nn::LinearImpl>()->mode(), Mode::integer);
  EXPECT_TRUE(torch::allclose(loaded->forward(input), trained, 1e-4, 1e-5));
}

}  // namespace
