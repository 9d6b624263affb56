// vernier::nn::Linear in mode fake_quant: what its one operation computes against its quantizers
// and a linear layer one after the other, and against mode integer.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/qat/linear.h>
#include <vernier/tests/expect_error.h>

using namespace vernier;

namespace {

using torch::Tensor;
using vernier::testing::message_of;

[[maybe_unused]] const bool kOneThread = (at::set_num_threads(1), true);

struct Setting {
  std::string name;
  QuantizerSettings input, weight;
};

QuantizerSettings settings_of(const Scheme& scheme, RangePolicy policy = RangePolicy::frozen) {
  QuantizerSettings settings;
  settings.scheme = scheme;
  settings.policy = policy;
  return settings;
}

std::vector<Setting> all_settings() {
  const Scheme tensor = symmetric_scheme(8), asymmetric = asymmetric_scheme(8);
  const Scheme channel = symmetric_scheme(8, Granularity::per_channel);
  const Scheme four = symmetric_scheme(4, Granularity::per_channel);
  Scheme token = symmetric_scheme(8, Granularity::per_token);
  token.dynamic = true;
  constexpr RangePolicy kAverage = RangePolicy::moving_average, kLearned = RangePolicy::learned,
                        kFollowing = RangePolicy::following;
  return {
      {"frozen", settings_of(tensor), settings_of(channel)},
      {"asymmetric", settings_of(asymmetric), settings_of(channel)},
      {"4 bits", settings_of(tensor), settings_of(four)},
      {"dynamic", settings_of(token), settings_of(channel)},
      {"clipped", settings_of(token, kLearned), settings_of(channel)},
      {"moving average", settings_of(tensor, kAverage), settings_of(channel)},
      {"following weight", settings_of(tensor), settings_of(channel, kFollowing)},
      {"following both", settings_of(tensor, kFollowing), settings_of(four, kFollowing)},
      {"learned", settings_of(tensor, kLearned), settings_of(four, kLearned)},
      {"learned, asymmetric", settings_of(asymmetric, kLearned), settings_of(channel, kLearned)},
      {"groups", settings_of(tensor), settings_of(symmetric_scheme(4, Granularity::per_group, 8))}};
}

nn::Linear make_layer(const Setting& setting, const Tensor& calibration) {
  torch::manual_seed(1);
  nn::Linear layer(24, 10);
  layer->input_quantizer->set_settings(setting.input);
  layer->weight_quantizer->set_settings(setting.weight);
  if (!layer->input_quantizer->scheme().dynamic) layer->input_quantizer->calibrate(calibration);
  layer->weight_quantizer->calibrate(layer->weight * 0.7);  // clips
  layer->set_mode(Mode::fake_quant);
  return layer;
}

// The output and all gradients of one forward and backward.
std::vector<Tensor> train_once(nn::Linear layer, const Tensor& input, const Tensor& gradient,
                               const std::function<Tensor(const Tensor&)>& forward) {
  const Tensor x = input.clone().set_requires_grad(true);
  const Tensor y = forward(x);
  y.backward(gradient);
  std::vector<Tensor> results = {y.detach(), x.grad()};
  for (const Tensor& parameter : layer->parameters()) results.push_back(parameter.grad());
  for (const Tensor& buffer : layer->buffers()) results.push_back(buffer.clone());
  return results;
}

TEST(LinearInTraining, IsItsQuantizersAndALinearLayer) {
  torch::manual_seed(2);
  const Tensor x = torch::randn({4, 3, 24}), gradient = torch::randn({4, 3, 10});
  for (const Setting& setting : all_settings()) {
    nn::Linear one = make_layer(setting, x * 0.7), other = make_layer(setting, x * 0.7);
    const auto got = train_once(one, x, gradient, [&](const Tensor& v) { return one(v); });
    const auto want = train_once(other, x, gradient, [&](const Tensor& v) {
      return torch::linear(other->input_quantizer->forward(v),
                           other->weight_quantizer->forward(other->weight), other->bias);
    });
    ASSERT_EQ(got.size(), want.size());
    for (size_t i = 0; i < got.size(); ++i) {
      ASSERT_EQ(got[i].defined(), want[i].defined()) << setting.name << " " << i;
      if (!got[i].defined()) continue;
      EXPECT_TRUE(at::equal(got[i], want[i])) << setting.name << " " << i;
    }
  }
}

TEST(LinearInTraining, OfCodesIsModeInteger) {
  torch::manual_seed(3);
  const Tensor x = torch::randn({4, 3, 24});
  for (const Setting& setting : all_settings()) {
    if (setting.weight.scheme.granularity == Granularity::per_group) continue;
    nn::Linear layer = make_layer(setting, x * 0.7);
    layer->trained_product = TrainedProduct::codes;
    const Tensor trained = layer(x);
    EXPECT_TRUE(trained.requires_grad());
    nn::Linear copy(std::dynamic_pointer_cast<nn::LinearImpl>(layer->clone()));
    EXPECT_EQ(copy->trained_product, TrainedProduct::codes);
    layer->eval();  // averages stay as they are
    layer->set_mode(Mode::integer);
    EXPECT_TRUE(at::equal(layer(x), trained.detach())) << setting.name;
  }
}

TEST(LinearInTraining, GoesTheOtherWayWhereSchemesAskForIt) {
  torch::manual_seed(4);
  const Tensor x = torch::randn({5, 24}), gradient = torch::randn({5, 10});
  const Setting fp8{"fp8", settings_of(fp8_scheme(NumberFormat::e4m3)),
                    settings_of(fp8_scheme(NumberFormat::e4m3, Granularity::per_channel))};
  nn::Linear one = make_layer(fp8, x), other = make_layer(fp8, x);
  const auto got = train_once(one, x, gradient, [&](const Tensor& v) { return one(v); });
  const auto want = train_once(other, x, gradient, [&](const Tensor& v) {
    return torch::linear(other->input_quantizer->forward(v),
                         other->weight_quantizer->forward(other->weight), other->bias);
  });
  for (size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(at::equal(got[i], want[i])) << i;
  one->trained_product = TrainedProduct::codes;
  EXPECT_CONTAINS(message_of([&] { one(x); }), "integer schemes");
  nn::Linear groups = make_layer(all_settings().back(), x);
  groups->trained_product = TrainedProduct::codes;
  EXPECT_CONTAINS(message_of([&] { groups(x); }), "product of codes takes");
}

}  // namespace
