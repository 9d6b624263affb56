// Activations with codes on the CPU: the functions of math_functions.h followed by quantize().
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <vernier/kernels/activation_quantize.h>
#include <vernier/kernels/quantize.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/row_quantize_cases.h>

namespace vernier {
namespace {

using at::Tensor;
using testing::message_of;
using testing::random_rows;
using testing::same_bits;

constexpr Activation kActivations[] = {Activation::relu, Activation::gelu, Activation::gelu_tanh,
                                       Activation::silu};

Tensor activated(const Tensor& x, Activation activation) {
  Tensor y = x.to(at::kFloat).clone();
  float* values = y.data_ptr<float>();
  for (int64_t i = 0; i < y.numel(); ++i) values[i] = activate(activation, values[i]);
  return y;
}

TEST(ActivationQuantize, CodesAreThoseOfTheFunction) {
  at::manual_seed(1);
  const Tensor factors = at::rand({77}) + 0.5;
  for (const Activation activation : kActivations) {
    for (const at::ScalarType type : {at::kFloat, at::kHalf, at::kBFloat16}) {
      SCOPED_TRACE(concat(to_string(activation), " ", type));
      const Tensor x = random_rows({2, 5, 77}, type, true);
      const Tensor exact = activated(x, activation), y = exact * factors;
      RowQuantization q;
      q.pre_scale = factors;
      q.with_output = true;
      const RowCodesResult dynamic = activation_quantize(x, activation, q);
      const auto [codes, scale] =
          quantize_per_token(y, symmetric_scheme(8, Granularity::per_token));
      EXPECT_TRUE(same_bits(codes, dynamic.codes));
      EXPECT_TRUE(same_bits(scale, dynamic.scale));
      EXPECT_TRUE(same_bits(exact.to(type), dynamic.output));

      q.scale = at::full({1}, 0.03f);
      q.zero_point = at::full({1}, -100, at::kInt);
      EXPECT_TRUE(same_bits(quantize(y, *q.scale, q.zero_point, asymmetric_scheme(8)),
                            activation_quantize(x, activation, q).codes));
    }
  }
}

TEST(ActivationQuantize, Gated) {
  at::manual_seed(2);
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    const Tensor gate = random_rows({4, 50}, type), up = random_rows({4, 50}, type);
    const Tensor y = activated(gate, Activation::silu) * up.to(at::kFloat);
    const auto [codes, scale] = quantize_per_token(y, symmetric_scheme(8, Granularity::per_token));
    const RowCodesResult two = gated_activation_quantize(gate, up, Activation::silu, {});
    const RowCodesResult halves =
        gated_activation_quantize(at::cat({gate, up}, -1), std::nullopt, Activation::silu, {});
    EXPECT_TRUE(same_bits(codes, two.codes));
    EXPECT_TRUE(same_bits(codes, halves.codes));
    EXPECT_TRUE(same_bits(scale, two.scale));
    EXPECT_TRUE(same_bits(scale, halves.scale));
  }
}

TEST(ActivationQuantize, NamesAndClosenessToTorch) {
  at::manual_seed(3);
  const Tensor x = at::randn({1000}) * 4;
  RowQuantization q;
  q.with_output = true;
  const auto output = [&](const char* name) {
    return *activation_quantize(x, activation_from_string(name), q).output;
  };
  EXPECT_TRUE(at::allclose(output("gelu"), at::gelu(x), 1e-6, 2e-6));
  EXPECT_TRUE(at::allclose(output("gelu_tanh"), at::gelu(x, "tanh"), 1e-6, 2e-6));
  EXPECT_TRUE(at::allclose(output("silu"), at::silu(x), 2e-6, 1e-7));
  EXPECT_TRUE(at::equal(output("relu"), at::relu(x)));
  for (const Activation activation : kActivations)
    EXPECT_EQ(activation_from_string(to_string(activation)), activation);
  EXPECT_CONTAINS(message_of([] { activation_from_string("swish"); }),
                  "unknown activation 'swish'");
}

TEST(ActivationQuantize, LayoutMetaAndErrors) {
  const Tensor x = at::randn({3, 40});
  RowQuantization q;
  q.col32 = true;
  const Tensor blocked = activation_quantize(x, Activation::gelu, q).codes;
  ASSERT_EQ(blocked.sizes(), at::IntArrayRef({2, 3, 32}));
  EXPECT_TRUE(same_bits(activation_quantize(x, Activation::gelu, {}).codes,
                        blocked.permute({1, 0, 2}).reshape({3, 64}).slice(1, 0, 40)));

  const Tensor meta = at::empty({3, 40}, at::device(at::kMeta).dtype(at::kFloat));
  const RowCodesResult shapes = gated_activation_quantize(meta, std::nullopt, Activation::silu, {});
  EXPECT_EQ(shapes.codes.sizes(), at::IntArrayRef({3, 20}));
  EXPECT_EQ(shapes.scale->sizes(), at::IntArrayRef({3}));

  const auto gated = [](const Tensor& gate, const std::optional<Tensor>& up) {
    return message_of([&] { gated_activation_quantize(gate, up, Activation::silu, {}); });
  };
  EXPECT_CONTAINS(gated(at::randn({3, 5}), std::nullopt), "must be even, not 5");
  EXPECT_CONTAINS(gated(x, at::randn({3, 39})), "up has shape [3, 39]");
  EXPECT_CONTAINS(gated(x, x.to(at::kHalf)), "up must be Float, not Half");
}

}  // namespace
}  // namespace vernier
