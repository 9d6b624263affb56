// Quantization with a mask and the trained quantized linear layer on the CPU: against the
// operations that they stand for, and float64.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/kernels/fake_quantize.h>
#include <vernier/kernels/linear_training.h>
#include <vernier/kernels/masked_quantize.h>
#include <vernier/kernels/quantize.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/linear_training_cases.h>

#include <ATen/autocast_mode.h>

#include <limits>

using namespace vernier;

namespace {

using torch::Tensor;
using vernier::testing::LinearInputs;
using vernier::testing::LinearResults;
using vernier::testing::LinearSetting;
using vernier::testing::message_of;
using OptionalTensor = std::optional<Tensor>;

constexpr at::ScalarType kElementTypes[] = {at::kFloat, at::kHalf, at::kBFloat16};

[[maybe_unused]] const bool kOneThread = (at::set_num_threads(1), true);

bool same(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         at::allclose(a.to(at::kDouble), b.to(at::kDouble), 0, 0, /*equal_nan=*/true);
}

// ---- quantize_masked ----------------------------------------------------------------------------

struct MaskCase {
  std::vector<int64_t> shape;
  Granularity granularity;
  int64_t axis = 0;
  int64_t group = 0;
};

Tensor scales_for(const Tensor& x, const MaskCase& c) {
  int64_t count = 1;
  if (c.granularity == Granularity::per_channel) count = x.size(c.axis);
  if (c.granularity == Granularity::per_token) count = x.numel() / x.size(-1);
  if (c.granularity == Granularity::per_group) count = x.numel() / c.group;
  return torch::rand({count}) * 0.01 + 0.005;  // some clip at 8 bits, all do below
}

TEST(MaskedQuantize, HasValuesAndMaskOfTheOperationsItStandsFor) {
  const MaskCase cases[] = {
      {{1}, Granularity::per_tensor},           {{7, 33}, Granularity::per_tensor},
      {{5, 3, 16}, Granularity::per_token},     {{9, 13}, Granularity::per_token},
      {{12, 40}, Granularity::per_channel, 0},  {{6, 10}, Granularity::per_channel, 1},
      {{4, 96}, Granularity::per_group, 0, 32}, {{4, 15}, Granularity::per_group, 0, 5}};
  torch::manual_seed(1);
  for (const MaskCase& c : cases) {
    for (const at::ScalarType type : kElementTypes) {
      for (const bool symmetric : {true, false}) {
        for (const int bits : {8, 3}) {
          const Scheme scheme = symmetric ? symmetric_scheme(bits, c.granularity, c.group)
                                          : asymmetric_scheme(bits, c.granularity, c.group);
          Tensor x = torch::randn(c.shape);
          x.view(-1)[0] = std::numeric_limits<float>::quiet_NaN();
          if (x.numel() > 3) x.view(-1)[3] = std::numeric_limits<float>::infinity();
          x = x.to(type);
          const Tensor scale = scales_for(x, c);
          OptionalTensor zero_point;
          if (!symmetric)
            zero_point = torch::randint(scheme.qmin(), scheme.qmax() + 1, scale.sizes(), at::kInt);
          const auto [codes, clipped] =
              quantize_masked(x, scale, zero_point, scheme, c.axis, at::kChar);
          EXPECT_TRUE(same(codes, quantize(x, scale, zero_point, scheme, c.axis)));
          for (const at::ScalarType out : kElementTypes) {
            const auto [real, again] = quantize_masked(x, scale, zero_point, scheme, c.axis, out);
            EXPECT_TRUE(same(real, dequantize(codes, scale, zero_point, scheme, c.axis, out)));
            EXPECT_TRUE(same(again, clipped));
          }
          EXPECT_EQ(quantize_masked(x, scale, zero_point, scheme, c.axis, at::kChar, false)
                        .clipped.numel(),
                    0);

          const Tensor gradient = torch::randn(x.sizes()).to(type);
          const Tensor leaf = x.clone().set_requires_grad(true);
          fake_quantize(leaf, scale, zero_point, scheme, c.axis).backward(gradient);
          Tensor zeroed = gradient.clone();
          zero_clipped_(zeroed, clipped);
          EXPECT_TRUE(same(zeroed, leaf.grad())) << x.sizes();
        }
      }
    }
  }
}

TEST(MaskedQuantize, RefusesWhatDoesNotFit) {
  const Scheme scheme = symmetric_scheme(8);
  const Tensor x = torch::randn({4, 5}), scale = torch::ones({1});
  EXPECT_CONTAINS(message_of([&] { quantize_masked(x, scale, {}, scheme, 0, at::kDouble); }),
                  "dtype, where it is not int8, must be float32");
  EXPECT_CONTAINS(message_of([&] {
                    quantize_masked(x, scale, {}, fp8_scheme(NumberFormat::e4m3), 0, at::kFloat);
                  }),
                  "integer codes");
  Tensor gradient = torch::randn({4, 5});
  EXPECT_CONTAINS(message_of([&] { zero_clipped_(gradient, torch::zeros({2}, at::kByte)); }),
                  "needs 3");
  Tensor strided = gradient.t();
  EXPECT_CONTAINS(message_of([&] { zero_clipped_(strided, torch::zeros({3}, at::kByte)); }),
                  "must be contiguous");
  // Bits behind the last element are nobody's.
  Tensor nine = torch::ones({9});
  zero_clipped_(nine, torch::full({2}, 0xfe, at::kByte));
  EXPECT_EQ(nine.sum().item<float>(), 2);
}

// ---- fake_quantized_linear ----------------------------------------------------------------------

TEST(FakeQuantizedLinear, GivesValuesAndGradientsOfTheComposition) {
  for (const LinearSetting& setting : vernier::testing::linear_settings()) {
    for (const at::ScalarType type : kElementTypes) {
      for (const bool bias : {true, false}) {
        torch::manual_seed(2);
        const LinearInputs inputs({6, 5, 48}, 24, type, bias);
        const LinearResults ours = run_fused(inputs, setting);
        const LinearResults theirs = run_composed(inputs, setting);
        ASSERT_EQ(ours.names, theirs.names);
        for (size_t i = 0; i < ours.names.size(); ++i)
          EXPECT_TRUE(same(ours.tensors[i], theirs.tensors[i]))
              << setting.name << " " << type << " " << ours.names[i] << " "
              << (ours.tensors[i].to(at::kDouble) - theirs.tensors[i].to(at::kDouble))
                     .abs()
                     .max()
                     .item<double>();
      }
    }
  }
}

TEST(FakeQuantizedLinear, AgreesWithFloat64) {
  torch::manual_seed(3);
  for (const LinearSetting& setting : vernier::testing::linear_settings()) {
    const LinearInputs inputs({37, 65}, 33, at::kFloat, /*bias=*/true);
    if (setting.group_size() > 0 && 65 % setting.group_size() != 0) continue;
    const LinearResults ours = run_fused(inputs, setting);
    const Tensor g = inputs.gradient.to(at::kDouble);
    const auto [xq, x_passes] = setting.exact_operand(inputs.x, setting.input);
    const auto [wq, w_passes] = setting.exact_operand(inputs.w, setting.weight);
    const auto close = [&](const Tensor& got, const Tensor& want) {
      return at::allclose(got.to(at::kDouble), want, 1e-5, 1e-4);
    };
    EXPECT_TRUE(close(ours.tensors[0], xq.mm(wq.t()) + inputs.b->to(at::kDouble))) << setting.name;
    EXPECT_TRUE(close(ours.tensors[1], g.mm(wq) * x_passes)) << setting.name;
    EXPECT_TRUE(close(ours.tensors[2], g.t().mm(xq) * w_passes)) << setting.name;
    EXPECT_TRUE(close(ours.tensors[3], g.sum(0))) << setting.name;
  }
}

TEST(FakeQuantizedLinear, OfCodesIsTheIntegerLayerBitForBit) {
  torch::manual_seed(4);
  for (const LinearSetting& setting : vernier::testing::linear_settings()) {
    if (!setting.takes_codes()) continue;
    for (const at::ScalarType type : kElementTypes) {
      const LinearInputs inputs({6, 5, 48}, 24, type, /*bias=*/true);
      const LinearResults real = run_fused(inputs, setting);
      const LinearResults codes = run_fused(inputs, setting, TrainedProduct::codes);
      EXPECT_TRUE(same(codes.tensors[0], setting.integer_layer(inputs))) << setting.name;
      // The backward multiplies the same operands.
      for (size_t i = 1; i < real.names.size(); ++i)
        EXPECT_TRUE(same(codes.tensors[i], real.tensors[i])) << setting.name << real.names[i];
    }
  }
}

TEST(FakeQuantizedLinear, TakesAnyShapeOfInput) {
  const LinearSetting setting = vernier::testing::linear_settings().front();
  for (const std::vector<int64_t>& shape :
       std::vector<std::vector<int64_t>>{{48}, {1, 48}, {0, 48}, {3, 0, 48}, {2, 1, 3, 48}}) {
    for (const TrainedProduct product : {TrainedProduct::real, TrainedProduct::codes}) {
      const LinearInputs inputs(shape, 7, at::kFloat, true);
      const LinearResults ours = run_fused(inputs, setting, product);
      const LinearResults theirs = run_composed(inputs, setting);
      for (size_t i = 0; i < ours.names.size(); ++i) {
        EXPECT_EQ(ours.tensors[i].sizes(), theirs.tensors[i].sizes());
        EXPECT_TRUE(at::allclose(ours.tensors[i], theirs.tensors[i], 1e-5, 1e-5));
      }
    }
  }
}

TEST(FakeQuantizedLinear, TakesStridedOperands) {
  const LinearSetting setting = vernier::testing::linear_settings().front();
  LinearInputs inputs({16, 48}, 24, at::kFloat, true);
  const LinearResults dense = run_fused(inputs, setting);
  inputs.x = inputs.x.t().contiguous().t();
  inputs.w = torch::cat({inputs.w, inputs.w}, 1).slice(1, 0, 48);
  inputs.gradient = inputs.gradient.t().contiguous().t();
  const LinearResults strided = run_fused(inputs, setting);
  for (size_t i = 0; i < dense.names.size(); ++i)
    EXPECT_TRUE(same(dense.tensors[i], strided.tensors[i])) << dense.names[i];
}

TEST(FakeQuantizedLinear, AccumulatesGradients) {
  const LinearSetting setting = vernier::testing::linear_settings().front();
  const LinearInputs one({8, 48}, 24, at::kFloat, true), two({5, 48}, 24, at::kFloat, true);
  const Tensor w = one.w.clone().set_requires_grad(true);
  const Tensor b = one.b->clone().set_requires_grad(true);
  const TrainedOperand input = setting.input_operand(one.x), weight = setting.weight_operand(w);
  Tensor expected_w = torch::zeros_like(one.w), expected_b = torch::zeros_like(*one.b);
  for (const LinearInputs* inputs : {&one, &two}) {
    fake_quantized_linear(inputs->x, w, b, input, weight).output.backward(inputs->gradient);
    const Tensor w2 = one.w.clone().set_requires_grad(true);
    const Tensor b2 = one.b->clone().set_requires_grad(true);
    fake_quantized_linear(inputs->x, w2, b2, input, weight).output.backward(inputs->gradient);
    expected_w += w2.grad();
    expected_b += b2.grad();
  }
  EXPECT_TRUE(same(w.grad(), expected_w));
  EXPECT_TRUE(same(b.grad(), expected_b));
}

struct AutocastOn {
  explicit AutocastOn(at::ScalarType dtype) {
    at::autocast::set_autocast_enabled(at::kCPU, true);
    at::autocast::set_autocast_dtype(at::kCPU, dtype);
  }
  ~AutocastOn() {
    at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, false);
  }
};

TEST(FakeQuantizedLinear, FollowsAutocast) {
  torch::manual_seed(5);
  for (const LinearSetting& setting : vernier::testing::linear_settings()) {
    for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
      const LinearInputs inputs({6, 5, 48}, 24, type, true);
      LinearResults ours, theirs;
      {
        const AutocastOn on(at::kBFloat16);
        ours = run_fused(inputs, setting);
        theirs = run_composed(inputs, setting);
      }
      EXPECT_EQ(ours.tensors[0].scalar_type(), at::kBFloat16);
      for (size_t i = 0; i < ours.names.size(); ++i)
        EXPECT_TRUE(same(ours.tensors[i], theirs.tensors[i]))
            << setting.name << " " << ours.names[i];
    }
  }
}

TEST(FakeQuantizedLinear, ComputesTheGradientsThatAreAskedFor) {
  const LinearSetting setting = vernier::testing::linear_settings().front();
  const LinearInputs inputs({6, 48}, 24, at::kFloat, true);
  const LinearResults all = run_fused(inputs, setting);
  const TrainedOperand input = setting.input_operand(inputs.x),
                       weight = setting.weight_operand(inputs.w);
  for (const int which : {0, 1, 2}) {
    const Tensor x = inputs.x.clone().set_requires_grad(which == 0);
    const Tensor w = inputs.w.clone().set_requires_grad(which == 1);
    const Tensor b = inputs.b->clone().set_requires_grad(which == 2);
    fake_quantized_linear(x, w, b, input, weight).output.backward(inputs.gradient);
    const Tensor leaves[] = {x, w, b};
    for (int i = 0; i < 3; ++i) {
      EXPECT_EQ(leaves[i].grad().defined(), i == which);
      if (i == which) {
        EXPECT_TRUE(same(leaves[i].grad(), all.tensors[1 + i]));
      }
    }
  }
  {
    const torch::NoGradGuard no_grad;
    const Tensor w = inputs.w.clone().set_requires_grad(true);
    const Tensor y = fake_quantized_linear(inputs.x, w, inputs.b, input, weight).output;
    EXPECT_FALSE(y.requires_grad());
    EXPECT_TRUE(same(y, all.tensors[0]));
  }
  const Tensor x = inputs.x.clone().set_requires_grad(true),
               w = inputs.w.clone().set_requires_grad(true);
  const Tensor y = fake_quantized_linear(x, w, inputs.b, input, weight).output;
  const auto only = torch::autograd::grad({y}, {w}, {inputs.gradient}, /*retain_graph=*/true);
  EXPECT_TRUE(same(only[0], all.tensors[2]));
  EXPECT_CONTAINS(message_of([&] {
                    torch::autograd::grad({y}, {x}, {inputs.gradient}, true, /*create_graph=*/true);
                  }),
                  "once");
  y.backward(inputs.gradient);
  EXPECT_TRUE(same(x.grad(), all.tensors[1]));
  EXPECT_THROW(y.backward(inputs.gradient), c10::Error);  // freed
}

TEST(FakeQuantizedLinear, SeesAChangeOfWhatALearnedScaleNeeds) {
  LinearSetting setting = vernier::testing::linear_settings().front();
  setting.learned = true;
  const LinearInputs inputs({6, 48}, 24, at::kFloat, false);
  const Tensor w = inputs.w.clone().set_requires_grad(true);
  const Tensor y = fake_quantized_linear(inputs.x, w, {}, setting.input_operand(inputs.x),
                                         setting.weight_operand(inputs.w))
                       .output;
  {
    const torch::NoGradGuard no_grad;
    w.add_(1);
  }
  EXPECT_THROW(y.backward(inputs.gradient), c10::Error);
}

TEST(FakeQuantizedLinear, ReturnsTheScalesThatItFinds) {
  const LinearInputs inputs({6, 48}, 24, at::kFloat, true);
  const Scheme rows = symmetric_scheme(8, Granularity::per_token);
  const Scheme channels = symmetric_scheme(4, Granularity::per_channel);
  const Tensor given = torch::full({1}, 0.01f);
  const TrainedLinear both =
      fake_quantized_linear(inputs.x, inputs.w, inputs.b, {rows}, {channels});
  EXPECT_TRUE(same(both.input_scale, per_token_scale(inputs.x, rows)));
  EXPECT_TRUE(same(both.weight_scale, fake_quantize_dynamic(inputs.w, channels).second));
  const TrainedLinear one =
      fake_quantized_linear(inputs.x, inputs.w, inputs.b, {symmetric_scheme(8), given}, {channels});
  EXPECT_FALSE(one.input_scale.defined());
  EXPECT_TRUE(same(one.weight_scale, both.weight_scale));
}

TEST(FakeQuantizedLinear, RefusesWhatDoesNotFit) {
  const Tensor x = torch::randn({3, 8}), w = torch::randn({4, 8}), one = torch::ones({1});
  const TrainedOperand tensor{symmetric_scheme(8), one},
      dynamic{symmetric_scheme(8, Granularity::per_channel)};
  const auto message = [&](const Tensor& a, const Tensor& b, const OptionalTensor& bias,
                           const TrainedOperand& p, const TrainedOperand& q,
                           TrainedProduct product = TrainedProduct::real) {
    return message_of([&] { fake_quantized_linear(a, b, bias, p, q, product); });
  };
  EXPECT_CONTAINS(message(x, torch::randn({4, 9}), {}, tensor, dynamic), "[out, in]");
  EXPECT_CONTAINS(message(x, w, torch::randn({5}), tensor, dynamic), "bias must have one element");
  EXPECT_CONTAINS(message(x, w, {}, dynamic, dynamic), "not per_channel");
  EXPECT_CONTAINS(message(x, w, {}, {fp8_scheme(NumberFormat::e4m3), one}, dynamic),
                  "integer schemes");
  EXPECT_CONTAINS(message(x, w.to(at::kBFloat16), {}, tensor, dynamic), "autocast");
  EXPECT_CONTAINS(message(x.to(at::kDouble), w, {}, tensor, dynamic), "input must be float32");
  EXPECT_CONTAINS(message(x, w, {}, {asymmetric_scheme(8)}, dynamic), "calibrated");
  EXPECT_CONTAINS(message(x, w, {}, {asymmetric_scheme(8), one}, dynamic), "zero_point");
  EXPECT_CONTAINS(message(x, w, {}, {symmetric_scheme(8), torch::ones({2})}, dynamic), "scale has");
  EXPECT_CONTAINS(message(x, w, {}, tensor, {symmetric_scheme(4, Granularity::per_group, 4)},
                          TrainedProduct::codes),
                  "product of codes takes");
  EXPECT_CONTAINS(message(x, w, {}, tensor, {symmetric_scheme(8), {}, {}, 1.0}),
                  "no scale to learn");
  const Tensor wide = torch::zeros({1, 140000});
  EXPECT_CONTAINS(message(wide, wide, {}, tensor, dynamic, TrainedProduct::codes), "overflow");
}

}  // namespace
