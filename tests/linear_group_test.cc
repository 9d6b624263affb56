// Groups of linear layers: the fused way gives what one layer after the other gives, and is taken
// only where it may be.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/kernels/quantize.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/linear_group_cases.h>
#include <vernier/tests/row_quantize_cases.h>

namespace vernier {
namespace {

using testing::group_input_schemes;
using testing::group_layers;
using testing::group_uses;
using testing::GroupUse;
using testing::kGroupIn;
using testing::message_of;
using testing::same_bits;
using torch::Tensor;

constexpr torch::Dtype kDtypes[] = {torch::kFloat, torch::kHalf, torch::kBFloat16};

class LinearGroupTest : public ::testing::Test {
 protected:
  void SetUp() override { torch::manual_seed(7); }
};

TEST_F(LinearGroupTest, FusedAsOneByOne) {
  for (const Scheme& scheme : group_input_schemes()) {
    for (const torch::Dtype dtype : kDtypes) {
      auto layers = group_layers(scheme, dtype);
      const LinearGroup group(layers);
      for (const GroupUse& use : group_uses(dtype)) {
        SCOPED_TRACE(concat(to_string(scheme), " ", dtype, " ", use.name));
        ASSERT_TRUE(group.fuses(torch::kCPU));
        const std::vector<Tensor> fused = use.run(group);
        int calls = 0;
        layers[1]->set_probe([&](const std::vector<Tensor>&, const Tensor&) { ++calls; });
        ASSERT_FALSE(group.fuses(torch::kCPU));
        const std::vector<Tensor> single = use.run(group);
        layers[1]->set_probe(nullptr);
        EXPECT_EQ(calls, 1);
        ASSERT_EQ(fused.size(), single.size());
        for (size_t i = 0; i < fused.size(); ++i) {
          SCOPED_TRACE(concat("output ", i));
          EXPECT_EQ(fused[i].scalar_type(), dtype);
          EXPECT_TRUE(same_bits(single[i], fused[i]));
        }
      }
    }
  }
}

TEST_F(LinearGroupTest, CodesAreThoseOfTheFloat32Values) {
  const Scheme scheme = symmetric_scheme(8);
  auto layers = group_layers(scheme, torch::kBFloat16, torch::kCPU, {16});
  const Tensor x = torch::randn({5, kGroupIn}).to(torch::kBFloat16), gate = x * 2;
  Tensor codes;
  layers[0]->set_probe([&](const std::vector<Tensor>& inputs, const Tensor&) {
    codes = layers[0]->input_codes(0, inputs[0]).codes;
  });
  LinearGroup(layers).of_gated(gate, x, Activation::relu);
  const Tensor exact = torch::relu(gate.to(torch::kFloat)) * x.to(torch::kFloat);
  EXPECT_TRUE(torch::equal(
      codes, quantize(exact, layers[0]->input_quantizer->scale(), std::nullopt, scheme)));
}

TEST_F(LinearGroupTest, FallsBack) {
  const Tensor x = torch::randn({4, kGroupIn});
  const auto outputs = [&](std::vector<nn::Linear>& layers) {
    std::vector<Tensor> all;
    for (nn::Linear& layer : layers) all.push_back(layer->forward(x));
    return all;
  };
  const auto falls_back = [&](const char* why, const auto& change) {
    SCOPED_TRACE(why);
    auto layers = group_layers(symmetric_scheme(8), torch::kFloat);
    const LinearGroup group(layers);
    ASSERT_TRUE(group.fuses(torch::kCPU));
    change(*layers[2]);
    EXPECT_FALSE(group.fuses(torch::kCPU));
    const auto expected = outputs(layers), found = group.forward(x);
    for (size_t i = 0; i < expected.size(); ++i) EXPECT_TRUE(same_bits(expected[i], found[i]));
  };
  falls_back("another scale", [](nn::LinearImpl& layer) {
    layer.input_quantizer->set_scale(torch::full({1}, 0.25f), std::nullopt);
  });
  falls_back("another scheme", [](nn::LinearImpl& layer) {
    layer.input_quantizer->set_settings({symmetric_scheme(6), {}});
    layer.input_quantizer->set_scale(torch::full({1}, 0.25f), std::nullopt);
  });
  falls_back("full precision", [](nn::LinearImpl& layer) { layer.set_quantized(false); });
  falls_back("another mode", [](nn::LinearImpl& layer) { layer.set_mode(Mode::fake_quant); });
  falls_back("quantized output", [](nn::LinearImpl& layer) {
    layer.quantize_output({symmetric_scheme(8), {}});
    layer.output_quantizer->set_scale(torch::full({1}, 0.1f), std::nullopt);
  });
}

TEST_F(LinearGroupTest, FollowsChanges) {
  auto layers = group_layers(symmetric_scheme(8), torch::kFloat);
  const LinearGroup group(layers);
  const Tensor x = torch::randn({4, kGroupIn});
  const auto same_as_layers = [&] {
    EXPECT_TRUE(group.fuses(torch::kCPU));
    const auto outputs = group.forward(x);
    for (size_t i = 0; i < layers.size(); ++i) {
      nn::Linear& layer = layers[i];
      EXPECT_TRUE(same_bits(layer->forward(x), outputs[i]));
    }
  };
  same_as_layers();
  for (const float scale : {0.5f, 0.25f, 0.125f}) {
    for (nn::Linear& layer : layers)
      layer->input_quantizer->set_scale(torch::full({1}, scale), std::nullopt);
    same_as_layers();
  }
  const torch::NoGradGuard no_grad;
  layers[0]->bias.add_(1);
  same_as_layers();
  for (nn::Linear& layer : layers) {
    layer->weight.mul_(-0.5);
    layer->set_mode(Mode::full);
    layer->set_mode(Mode::integer);
  }
  same_as_layers();
  // Joined codes are in memory once.
  EXPECT_TRUE(layers[0]->weight_codes().is_alias_of(layers[2]->weight_codes()));
}

TEST_F(LinearGroupTest, OtherModesAreTheLayersOwnAndDifferentiable) {
  for (const Mode mode : {Mode::full, Mode::fake_quant}) {
    auto layers = group_layers(symmetric_scheme(8), torch::kFloat);
    for (nn::Linear& layer : layers) layer->set_mode(mode);
    const LinearGroup group(layers);
    const Tensor x = torch::randn({4, kGroupIn}).requires_grad_();
    const Norm norm{torch::rand({kGroupIn}).requires_grad_(), {}, 1e-6, false};
    const auto result = group.of_norm(norm, x, x * 0.5);
    const Tensor normed = torch::rms_norm(x * 1.5, {kGroupIn}, norm.weight, 1e-6);
    for (size_t i = 0; i < layers.size(); ++i) {
      nn::Linear& layer = layers[i];
      EXPECT_TRUE(torch::allclose(layer->forward(normed), result.outputs[i]));
    }
    (result.outputs[0].sum() + result.stream.sum()).backward();
    EXPECT_GT(x.grad().abs().sum().item<double>(), 0);
    EXPECT_GT(norm.weight.grad().abs().sum().item<double>(), 0);
    EXPECT_GT(layers[0]->weight.grad().abs().sum().item<double>(), 0);
  }
}

TEST_F(LinearGroupTest, Errors) {
  EXPECT_CONTAINS(message_of([] { LinearGroup(std::vector<nn::Linear>{}); }), "needs one at least");
  EXPECT_CONTAINS(message_of([] {
                    LinearGroup({nn::Linear(3, 4), nn::Linear(5, 4)});
                  }),
                  "layers of 3 and 5 inputs cannot read one activation");
}

}  // namespace
}  // namespace vernier
