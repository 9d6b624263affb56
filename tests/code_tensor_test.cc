// Sums, concatenations and look-ups of codes against plain arithmetic.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <vernier/kernels/code_tensor.h>
#include <vernier/tests/expect_error.h>

namespace vernier {
namespace {

using at::Tensor;
using testing::message_of;

Tensor random_codes(at::IntArrayRef sizes) { return at::randint(-128, 128, sizes, at::kChar); }
Tensor one(float value) { return at::full({1}, value); }

CodeTensor symmetric_codes(at::IntArrayRef sizes, float scale) {
  return {at::randint(-127, 128, sizes, at::kChar),
          {one(scale), std::nullopt, symmetric_scheme(8)}};
}
CodeTensor asymmetric_codes(at::IntArrayRef sizes, float scale, int zero_point) {
  return {random_codes(sizes),
          {one(scale), at::full({1}, zero_point, at::kInt), asymmetric_scheme(8)}};
}
/// By the contract's formulas in plain C++.
int32_t code_of(float value, const CodeScale& s) {
  return quantize_value(value, s.scale.item<float>(),
                        s.zero_point ? s.zero_point->item<int32_t>() : 0, s.scheme.qmin(),
                        s.scheme.qmax());
}
float value_of(const CodeTensor& t, int64_t i) {
  return dequantize_value(t.codes.flatten()[i].item<int32_t>(), t.scale.scale.item<float>(),
                          t.scale.zero_point ? t.scale.zero_point->item<int32_t>() : 0);
}

TEST(CodeTensorTest, SumsAreThoseOfTheValues) {
  at::manual_seed(6);
  const CodeTensor a = symmetric_codes({6, 5}, 0.05f), b = asymmetric_codes({6, 5}, 0.013f, -20);
  const CodeScale scales[] = {{one(0.06f), std::nullopt, symmetric_scheme(8)},
                              {one(0.5f), at::full({1}, 3, at::kInt), asymmetric_scheme(4)}};
  for (const CodeScale& scale : scales) {
    const Tensor sum = add_codes(a, b, scale), same = requantize(a, scale);
    for (int64_t i = 0; i < sum.numel(); ++i) {
      EXPECT_EQ(sum.flatten()[i].item<int32_t>(), code_of(value_of(a, i) + value_of(b, i), scale));
      EXPECT_EQ(same.flatten()[i].item<int32_t>(), code_of(value_of(a, i), scale));
    }
  }
  const CodeTensor row = {b.codes[0], b.scale};
  EXPECT_EQ(add_codes(a, row, scales[0]).sizes(), a.codes.sizes());
}

TEST(CodeTensorTest, ConcatenationHasOneScale) {
  at::manual_seed(7);
  const CodeTensor a = symmetric_codes({2, 3}, 0.05f), b = asymmetric_codes({2, 4}, 0.013f, -20);
  const CodeTensor shared = {random_codes({2, 1}).clamp_min(-127), a.scale};
  const Tensor codes = concat_codes({a, b, shared}, 1, a.scale);
  EXPECT_EQ(codes.sizes(), (std::vector<int64_t>{2, 8}));
  // Codes of that very scale pass as they are.
  EXPECT_TRUE(at::equal(codes.slice(1, 0, 3), a.codes));
  EXPECT_TRUE(at::equal(codes.slice(1, 7), shared.codes));
  EXPECT_TRUE(at::equal(codes.slice(1, 3, 7), requantize(b, a.scale)));
  EXPECT_CONTAINS(message_of([&] { concat_codes({}, 0, a.scale); }), "nothing to concatenate");
}

TEST(CodeTensorTest, LookUpsAreRowsOfTheValues) {
  at::manual_seed(8);
  const int64_t rows = 11, columns = 8;
  const Tensor table = random_codes({rows, columns});
  const auto scales = [](int64_t count) { return at::rand({count}) + 0.01f; };
  const auto zeros = [](int64_t count) { return at::randint(-128, 128, {count}, at::kInt); };
  const CodeScale all[] = {
      {scales(1), std::nullopt, symmetric_scheme(8)},
      {scales(1), zeros(1), asymmetric_scheme(8)},
      {scales(rows), std::nullopt, symmetric_scheme(8, Granularity::per_channel), 0},
      {scales(rows), zeros(rows), asymmetric_scheme(8, Granularity::per_channel), -2},
      {scales(columns), zeros(columns), asymmetric_scheme(8, Granularity::per_channel), 1},
      {scales(rows * 2), std::nullopt, symmetric_scheme(4, Granularity::per_group, 4)},
  };
  const Tensor indices[] = {at::randint(rows, {3, 4}, at::kLong), at::randint(rows, {5}, at::kInt),
                            at::scalar_tensor(7, at::kLong), at::empty({0, 2}, at::kLong)};
  for (const CodeScale& scale : all) {
    const Tensor values = dequantize(CodeTensor{table, scale});
    for (const Tensor& index : indices) {
      SCOPED_TRACE(concat(to_string(scale.scheme), " axis ", scale.axis, " at ", index.sizes()));
      const Tensor expected = at::embedding(values, index);
      EXPECT_TRUE(at::equal(embedding_of_codes({table, scale}, index), expected));
      EXPECT_TRUE(
          at::equal(embedding_of_codes({table, scale}, index, at::kHalf), expected.to(at::kHalf)));
    }
  }
}

TEST(CodeTensorTest, IndicesOutsideOfTheTableAreRefused) {
  const CodeTensor table = symmetric_codes({4, 3}, 1);
  const auto message = [&](const Tensor& indices) {
    return message_of([&] { embedding_of_codes(table, indices); });
  };
  EXPECT_CONTAINS(message(at::full({1}, 4, at::kLong)), "index 4 is outside a table of 4 rows");
  EXPECT_CONTAINS(message(at::full({1}, -1, at::kLong)), "index -1 is outside");
  EXPECT_CONTAINS(message(at::zeros({1})), "indices must be int64 or int32");
  EXPECT_CONTAINS(message(at::zeros({1}, at::TensorOptions(at::kLong).device(at::kMeta))),
                  "move one of them");
}

}  // namespace
}  // namespace vernier
