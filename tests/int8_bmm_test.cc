// Batches of INT8 products on the CPU against float64, which is exact for codes.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <vernier/kernels/int8_bmm.h>
#include <vernier/kernels/quantize.h>
#include <vernier/tests/expect_error.h>

namespace vernier {
namespace {

using at::Tensor;
using testing::message_of;

Tensor random_codes(at::IntArrayRef sizes) { return at::randint(-128, 128, sizes, at::kChar); }
Tensor one(float value) { return at::full({1}, value); }

Tensor exact_sums(const Int8BmmOperands& o) {
  Tensor a = o.a.to(at::kDouble);
  if (o.a_zero_point) a = a - o.a_zero_point->to(at::kDouble);
  return at::matmul(a, o.b.to(at::kDouble).transpose(-2, -1)).to(at::kLong);
}

TEST(Int8BmmTest, IsEveryProductOfTheBatch) {
  at::manual_seed(4);
  const std::vector<int64_t> batches[] = {{}, {3}, {2, 4}, {0}, {2, 0, 3}};
  for (const auto& batch : batches) {
    for (int variant = 0; variant < 8; ++variant) {
      const int64_t m = 7, n = 5, k = 33;
      const auto sized = [&](std::initializer_list<int64_t> tail) {
        std::vector<int64_t> sizes = batch;
        sizes.insert(sizes.end(), tail);
        return sizes;
      };
      Int8BmmOperands o = {random_codes(sized({m, k})), random_codes(sized({n, k})), one(0.5f),
                           one(0.003f)};
      if (variant & 1) o.a_scale = at::rand(sized({m})) + 0.5f;
      if (variant & 2) o.b_scale = at::rand(sized({n})) * 0.01f + 0.001f;
      if (variant & 4) o.a_zero_point = at::full({1}, -128, at::kInt);
      SCOPED_TRACE(concat(at::IntArrayRef(batch), " variant ", variant));
      const Tensor sums = exact_sums(o);
      EXPECT_TRUE(at::equal(int8_bmm_accumulators(o.a, o.b, o.a_zero_point), sums.to(at::kInt)));
      const Tensor a_scale = variant & 1 ? o.a_scale.unsqueeze(-1) : o.a_scale;
      const Tensor b_scale = variant & 2 ? o.b_scale.unsqueeze(-2) : o.b_scale;
      const Tensor y = sums.to(at::kFloat) * b_scale * a_scale;
      EXPECT_TRUE(at::equal(int8_bmm(o), y));
      EXPECT_TRUE(at::equal(int8_bmm(o, at::kBFloat16), y.to(at::kBFloat16)));
      const Scheme scheme = symmetric_scheme(8);
      EXPECT_TRUE(at::equal(int8_bmm_requantize(o, one(0.1f), std::nullopt, scheme),
                            quantize(y, one(0.1f), std::nullopt, scheme)));
      // Transposed views, as attention hands them over.
      Int8BmmOperands strided = o;
      strided.b = o.b.transpose(-2, -1).contiguous().transpose(-2, -1);
      EXPECT_TRUE(at::equal(int8_bmm(strided), y));
    }
  }
}

TEST(Int8BmmTest, WhatDoesNotFitIsRefused) {
  const Tensor a = random_codes({2, 3, 4}), b = random_codes({2, 5, 4});
  const auto message = [&](const Int8BmmOperands& o) { return message_of([&] { int8_bmm(o); }); };
  EXPECT_CONTAINS(message({a, b.slice(2, 1), one(1), one(1)}), "a must be [..., M, K]");
  EXPECT_CONTAINS(message({a, b.slice(0, 1), one(1), one(1)}), "of the same batch");
  EXPECT_CONTAINS(message({a, b, at::ones({3}), one(1)}), "a_scale has 3 elements");
  EXPECT_CONTAINS(message({a, b, one(1), at::ones({5})}), "b_scale has 5 elements");
  EXPECT_CONTAINS(message({a, b.to(at::kMeta), one(1), one(1)}), "move one of them");
  EXPECT_CONTAINS(message({a.to(at::kFloat), b, one(1), one(1)}), "a must be Char");
}

TEST(Int8BmmTest, ShapesComeWithoutData) {
  const auto meta = [](const Tensor& tensor) { return tensor.to(at::kMeta); };
  const Tensor y = int8_bmm(
      {meta(random_codes({2, 3, 4})), meta(random_codes({2, 5, 4})), meta(one(1)), meta(one(1))},
      at::kHalf);
  EXPECT_EQ(y.sizes(), (std::vector<int64_t>{2, 3, 5}));
  EXPECT_EQ(y.scalar_type(), at::kHalf);
}

}  // namespace
}  // namespace vernier
