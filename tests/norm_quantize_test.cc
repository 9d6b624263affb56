// LayerNorm and RMSNorm with codes on the CPU: against double precision, against the norm's own
// float output followed by quantize(), and the order of the sums as docs/numerics.md has it.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <vernier/kernels/norm_quantize.h>
#include <vernier/kernels/quantize.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/row_quantize_cases.h>

#include <array>
#include <cmath>
#include <vector>

namespace vernier {
namespace {

using at::Tensor;
using testing::message_of;
using testing::OptionalTensor;
using testing::random_rows;
using testing::same_bits;

constexpr at::ScalarType kElementTypes[] = {at::kFloat, at::kHalf, at::kBFloat16};

Tensor scalar(float value) { return at::full({1}, value, at::kFloat); }

/// The numeric contract once more, slowly.
float sum_by_contract(const float* x, int64_t n, bool squares) {
  int lanes = 32;
  while (lanes < 512 && 32 * lanes < n) lanes *= 2;
  std::vector<std::array<float, 4>> ways(lanes, std::array<float, 4>{});
  for (int64_t c = 0; c < n; ++c) {
    float& sum = ways[c / 8 % lanes][c % 4];
    sum = squares ? std::fmaf(x[c], x[c], sum) : sum + x[c];
  }
  std::vector<float> warps;
  for (int first = 0; first < lanes; first += 32) {
    std::vector<float> sums;
    for (int i = first; i < first + 32; ++i)
      sums.push_back((ways[i][0] + ways[i][2]) + (ways[i][1] + ways[i][3]));
    for (int half = 16; half >= 1; half /= 2)
      for (int i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
    warps.push_back(sums[0]);
  }
  for (size_t half = warps.size() / 2; half >= 1; half /= 2)
    for (size_t i = 0; i < half; ++i) warps[i] = warps[i] + warps[i + half];
  return warps[0];
}

std::vector<float> norm_by_contract(const float* input, int64_t n, bool centered, float epsilon) {
  std::vector<float> x(input, input + n);
  const float inverse = 1.0f / static_cast<float>(n);
  if (centered) {
    const float mean = sum_by_contract(x.data(), n, false) * inverse;
    for (float& value : x) value = value - mean;
  }
  const float factor = 1.0f / std::sqrt(sum_by_contract(x.data(), n, true) * inverse + epsilon);
  for (float& value : x) value = value * factor;
  return x;
}

TEST(NormQuantize, SumsInTheOrderOfTheContract) {
  at::manual_seed(1);
  for (const int64_t columns : {1, 7, 8, 9, 100, 768, 1024, 1025, 2048, 2051, 4100, 8200, 16400}) {
    const Tensor x = random_rows({2, columns}, at::kFloat);
    RowQuantization q;
    q.with_output = true;
    for (const bool centered : {true, false}) {
      SCOPED_TRACE(concat(columns, centered ? " LayerNorm" : " RMSNorm"));
      const NormCodes result = centered ? layer_norm_quantize(x, std::nullopt, std::nullopt, q)
                                        : rms_norm_quantize(x, std::nullopt, q);
      for (int row = 0; row < 2; ++row) {
        std::vector<float> expected =
            norm_by_contract(x.const_data_ptr<float>() + row * columns, columns, centered, 1e-5f);
        EXPECT_TRUE(same_bits(at::from_blob(expected.data(), {columns}, at::kFloat),
                              (*result.output)[row]));
      }
    }
  }
}

TEST(NormQuantize, CloseToDoublePrecision) {
  at::manual_seed(2);
  for (const int64_t columns : {8, 768, 4099}) {
    const Tensor x = random_rows({5, columns}, at::kFloat), w = at::randn({columns}),
                 b = at::randn({columns});
    RowQuantization q;
    q.with_output = true;
    const Tensor exact =
        at::layer_norm(x.to(at::kDouble), {columns}, w.to(at::kDouble), b.to(at::kDouble), 1e-5);
    const Tensor layer = *layer_norm_quantize(x, w, b, q).output;
    EXPECT_LT((layer - exact).abs().max().item<double>(), 1e-5);
    const Tensor wide = x.to(at::kDouble);
    const Tensor exact_rms =
        wide / (wide.square().mean(-1, true) + 1e-5).sqrt() * w.to(at::kDouble);
    EXPECT_LT((*rms_norm_quantize(x, w, q).output - exact_rms).abs().max().item<double>(), 1e-5);
  }
}

TEST(NormQuantize, CodesAreThoseOfTheFloatOutput) {
  at::manual_seed(3);
  const int64_t columns = 333;
  const Tensor x = random_rows({3, 4, columns}, at::kFloat, true);
  const Tensor w = at::randn({columns}), b = at::randn({columns}), factors = at::rand({columns});
  for (const int bits : {8, 4, 2}) {
    for (const bool narrow : {true, false}) {
      for (const bool scaled : {true, false}) {
        SCOPED_TRACE(concat(bits, " bits, narrow ", narrow, ", pre_scale ", scaled));
        RowQuantization q;
        q.bits = bits;
        q.narrow_range = narrow;
        q.with_output = true;
        if (scaled) q.pre_scale = factors;
        Scheme scheme = symmetric_scheme(bits, Granularity::per_token);
        scheme.narrow_range = narrow;
        const NormCodes dynamic = layer_norm_quantize(x, w, b, q);
        const Tensor y = scaled ? *dynamic.output * factors : *dynamic.output;
        const auto [codes, scale] = quantize_per_token(y, scheme);
        EXPECT_TRUE(same_bits(codes, dynamic.codes));
        EXPECT_TRUE(same_bits(scale, dynamic.scale));

        q.scale = scalar(0.0137f);
        scheme.granularity = Granularity::per_tensor;
        const NormCodes fixed = layer_norm_quantize(x, w, b, q);
        EXPECT_FALSE(fixed.scale.has_value());
        EXPECT_TRUE(same_bits(dynamic.output, fixed.output));
        EXPECT_TRUE(same_bits(quantize(y, *q.scale, std::nullopt, scheme), fixed.codes));

        q.zero_point = at::full({1}, 1, at::kInt);
        EXPECT_TRUE(same_bits(quantize(y, *q.scale, q.zero_point, asymmetric_scheme(bits)),
                              layer_norm_quantize(x, w, b, q).codes));
      }
    }
  }
}

TEST(NormQuantize, HalfPrecisionIsFloatArithmeticOnItsValues) {
  at::manual_seed(4);
  for (const at::ScalarType type : kElementTypes) {
    const Tensor x = random_rows({6, 200}, type), w = at::randn({200}).to(type),
                 b = at::randn({200}).to(type);
    RowQuantization q;
    q.with_output = true;
    const NormCodes wide =
        layer_norm_quantize(x.to(at::kFloat), w.to(at::kFloat), b.to(at::kFloat), q);
    const NormCodes narrow = layer_norm_quantize(x, w, b, q);
    const NormCodes mixed = layer_norm_quantize(x, w.to(at::kFloat), b.to(at::kFloat), q);
    EXPECT_TRUE(same_bits(wide.codes, narrow.codes));
    EXPECT_TRUE(same_bits(wide.codes, mixed.codes));
    EXPECT_TRUE(same_bits(wide.scale, narrow.scale));
    EXPECT_TRUE(same_bits(wide.output->to(type), narrow.output));
  }
}

TEST(NormQuantize, ResidualIsAddedInTheInputsType) {
  at::manual_seed(5);
  for (const at::ScalarType type : kElementTypes) {
    const Tensor x = random_rows({4, 130}, type), residual = random_rows({4, 130}, type);
    const Tensor w = at::randn({130});
    NormOptions options;
    options.residual = residual;
    const NormCodes fused = rms_norm_quantize(x, w, {}, options);
    EXPECT_TRUE(same_bits(x + residual, *fused.sum));
    const NormCodes apart = rms_norm_quantize(x + residual, w, {});
    EXPECT_FALSE(apart.sum.has_value());
    EXPECT_TRUE(same_bits(apart.codes, fused.codes));
    EXPECT_TRUE(same_bits(apart.scale, fused.scale));
  }
}

TEST(NormQuantize, Col32) {
  at::manual_seed(6);
  for (const int64_t columns : {1, 31, 32, 40, 96, 101}) {
    const Tensor x = random_rows({2, 3, columns}, at::kFloat);
    RowQuantization q;
    q.scale = scalar(0.02f);
    q.zero_point = at::full({1}, 5, at::kInt);
    const Tensor plain = layer_norm_quantize(x, std::nullopt, std::nullopt, q).codes;
    q.col32 = true;
    const Tensor blocked = layer_norm_quantize(x, std::nullopt, std::nullopt, q).codes;
    const int64_t blocks = (columns + 31) / 32;
    ASSERT_EQ(blocked.sizes(), at::IntArrayRef({blocks, 6, 32}));
    const Tensor rows = blocked.permute({1, 0, 2}).reshape({6, blocks * 32});
    EXPECT_TRUE(same_bits(plain.view({6, columns}), rows.slice(1, 0, columns)));
    EXPECT_EQ(at::count_nonzero(rows.slice(1, columns)).item<int64_t>(), 0);
  }
}

TEST(NormQuantize, RowsThatAreNoNumbers) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  Tensor x = at::ones({4, 16}, at::kFloat);
  x[1][3] = std::numeric_limits<float>::quiet_NaN();
  x[2][3] = kInfinity;
  x[3].zero_();
  const NormCodes result = rms_norm_quantize(x, std::nullopt, {});
  EXPECT_TRUE(same_bits(at::full({16}, 127, at::kChar), result.codes[0]));
  EXPECT_TRUE(same_bits(at::full({16}, -127, at::kChar), result.codes[1]));  // all NaN
  EXPECT_EQ(result.codes[2][3].item<int>(), -127);                           // infinity / infinity
  EXPECT_EQ(result.codes[2][4].item<int>(), 0);
  EXPECT_EQ(at::count_nonzero(result.codes[3]).item<int64_t>(), 0);
  for (const int row : {1, 2, 3}) EXPECT_EQ((*result.scale)[row].item<float>(), 1.0f);
}

TEST(NormQuantize, ShapesAndThreads) {
  for (const std::vector<int64_t>& shape :
       std::vector<std::vector<int64_t>>{{0, 8}, {3, 0}, {8}, {2, 1, 8}}) {
    const at::IntArrayRef sizes = shape;
    const Tensor x = at::randn(sizes);
    RowQuantization q;
    q.with_output = true;
    const NormCodes result = rms_norm_quantize(x, std::nullopt, q);
    EXPECT_EQ(result.codes.sizes(), sizes);
    EXPECT_EQ(result.output->sizes(), sizes);
    EXPECT_EQ(result.scale->sizes(), sizes.slice(0, sizes.size() - 1));
  }
  const Tensor x = random_rows({40, 2000}, at::kFloat);
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const Tensor one =
      layer_norm_quantize(x.t().contiguous().t(), std::nullopt, std::nullopt, {}).codes;
  at::set_num_threads(2);
  EXPECT_TRUE(same_bits(one, layer_norm_quantize(x, std::nullopt, std::nullopt, {}).codes));
  at::set_num_threads(threads);
}

TEST(NormQuantize, MetaGivesShapes) {
  const Tensor x = at::empty({2, 3, 40}, at::device(at::kMeta).dtype(at::kHalf));
  RowQuantization q;
  q.col32 = true;
  q.with_output = true;
  NormOptions options;
  options.residual = x;
  const NormCodes result = layer_norm_quantize(x, std::nullopt, std::nullopt, q, options);
  EXPECT_EQ(result.codes.sizes(), at::IntArrayRef({2, 6, 32}));
  EXPECT_EQ(result.scale->sizes(), at::IntArrayRef({2, 3}));
  EXPECT_EQ(result.sum->scalar_type(), at::kHalf);
  EXPECT_EQ(result.output->sizes(), x.sizes());
}

TEST(NormQuantize, ErrorsNameWhatIsWrong) {
  const Tensor x = at::randn({2, 8});
  const auto message = [&](const OptionalTensor& weight, const RowQuantization& q,
                           const NormOptions& options = {}) {
    return message_of([&] { rms_norm_quantize(x, weight, q, options); });
  };
  RowQuantization q;
  EXPECT_CONTAINS(message(at::ones({7}), q), "weight has 7 elements");
  EXPECT_CONTAINS(message(at::ones({8}, at::kHalf), q), "weight must be Float, not Half");
  q.bits = 9;
  EXPECT_CONTAINS(message({}, q), "bits must be 2 to 8, not 9");
  q = {};
  q.zero_point = at::zeros({1}, at::kInt);
  EXPECT_CONTAINS(message({}, q), "zero_point without scale");
  q = {};
  q.scale = at::ones({2});
  EXPECT_CONTAINS(message({}, q), "scale has 2 elements, not 1");
  q = {};
  q.pre_scale = at::ones({9});
  EXPECT_CONTAINS(message({}, q), "pre_scale has 9 elements, not 8");
  NormOptions options;
  options.residual = at::randn({8, 2});
  EXPECT_CONTAINS(message({}, {}, options), "residual has shape [8, 2]");
  EXPECT_CONTAINS(message_of([&] { rms_norm_quantize(x.to(at::kInt), {}, {}); }),
                  "input must be float32, float16 or bfloat16, not Int");
  EXPECT_CONTAINS(message_of([&] {
                    layer_norm_quantize(x.to(at::kHalf), at::ones({8}), at::ones({8}, at::kHalf),
                                        {});
                  }),
                  "weight is Float but bias Half");
}

}  // namespace
}  // namespace vernier
