// Rotary embeddings: against torch's operations bit for bit, slices, gradients, errors.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/rotary.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/rotary_cases.h>

namespace vernier {
namespace {

using testing::message_of;
using testing::rotary_tables;
using testing::rotated;
using torch::Tensor;

TEST(Rotary, AsTorchsOperations) {
  torch::manual_seed(1);
  for (const torch::Dtype dtype : {torch::kFloat, torch::kHalf, torch::kBFloat16}) {
    for (const int64_t half : {0, 1, 5, 8, 16}) {
      SCOPED_TRACE(concat(dtype, " ", half));
      const auto [cosine, sine] = rotary_tables(6, half);
      const Tensor wide = torch::randn({12, 5 * 32 + 3}).to(dtype);
      const Tensor slice = wide.narrow(1, 3, 3 * 32).unflatten(1, {3, 32});
      EXPECT_TRUE(
          torch::equal(rotary_embedding(slice, cosine, sine), rotated(slice, cosine, sine)));
    }
  }
  EXPECT_EQ(
      rotary_embedding(torch::empty({0, 2, 8}), torch::rand({1, 4}), torch::rand({1, 4})).sizes(),
      at::IntArrayRef({0, 2, 8}));
}

TEST(Rotary, GradientsAreTorchs) {
  torch::manual_seed(2);
  const auto [cosine, sine] = rotary_tables(5, 6);
  const Tensor x = torch::randn({10, 2, 16}), direction = torch::randn({10, 2, 16});
  const auto gradient = [&](const auto& function) {
    const Tensor leaf = x.clone().requires_grad_();
    (function(leaf, cosine, sine) * direction).sum().backward();
    return leaf.grad();
  };
  EXPECT_TRUE(torch::allclose(gradient(rotary_embedding), gradient(rotated)));
}

TEST(Rotary, MetaAndErrors) {
  const Tensor x = torch::randn({6, 2, 16}), table = torch::rand({3, 8});
  EXPECT_EQ(
      rotary_embedding(x.to(torch::kMeta), table.to(torch::kMeta), table.to(torch::kMeta)).sizes(),
      x.sizes());
  const auto error = [&](const Tensor& values, const Tensor& cosine, const Tensor& sine) {
    return message_of([&] { rotary_embedding(values, cosine, sine); });
  };
  EXPECT_CONTAINS(error(x[0], table, table), "x must be [tokens, heads, size]");
  EXPECT_CONTAINS(error(x, torch::rand({3, 9}), torch::rand({3, 9})), "R <= 16");
  EXPECT_CONTAINS(error(x, torch::rand({4, 8}), torch::rand({4, 8})), "divisor of 6");
  EXPECT_CONTAINS(error(x, table, torch::rand({3, 7})), "sine has shape [3, 7]");
  EXPECT_CONTAINS(error(x, table.to(torch::kHalf), table), "cosine must be Float, not Half");
  EXPECT_CONTAINS(error(x.to(torch::kDouble), table, table), "float32, float16 or bfloat16");
}

}  // namespace
}  // namespace vernier
