// INT8 convolutions on the CPU against LibTorch's in float64, which is exact for codes.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <vernier/kernels/convolution.h>
#include <vernier/kernels/quantize.h>
#include <vernier/tests/convolution_cases.h>
#include <vernier/tests/expect_error.h>

namespace vernier {
namespace {

using at::Tensor;
using testing::convolution_cases;
using testing::ConvolutionCase;
using testing::ConvolutionOperands;
using testing::kConvolutionVariants;
using testing::message_of;
using testing::random_operands;

/// The sums of (code - zero point) * weight, in int64.
Tensor exact_sums(const ConvolutionCase& c, const ConvolutionOperands& o) {
  const ConvolutionSettings& s = c.settings;
  const int64_t axes = static_cast<int64_t>(c.input.size());
  Tensor x = o.codes.codes.to(at::kDouble);
  if (o.codes.input_zero_point) x = x - o.codes.input_zero_point->to(at::kDouble);
  const std::vector<int64_t> none(axes, 0);
  const Tensor sums = at::convolution(x, o.torch_weight.to(at::kDouble), std::nullopt, s.stride,
                                      s.padding, s.dilation, s.transposed,
                                      s.output_padding.empty() ? none : s.output_padding, s.groups);
  return sums.to(at::kLong);
}

Tensor along_channels(const Tensor& values, const Tensor& like) {
  std::vector<int64_t> sizes(like.dim(), 1);
  sizes[1] = -1;
  return values.view(sizes);
}

TEST(ConvolutionTest, AccumulatorsAreExact) {
  at::manual_seed(1);
  for (const ConvolutionCase& c : convolution_cases()) {
    for (const int variant : {0, 4}) {
      SCOPED_TRACE(concat(c, " variant ", variant));
      const ConvolutionOperands o = random_operands(c, variant);
      const Tensor sums = int8_convolution_accumulators(
          o.codes.codes, o.codes.weight, o.codes.input_zero_point, o.codes.weight_sum, c.settings);
      EXPECT_EQ(sums.scalar_type(), at::kInt);
      EXPECT_TRUE(at::equal(sums.to(at::kLong), exact_sums(c, o)));
    }
  }
}

// The epilogue in float32, one operation at a time.
TEST(ConvolutionTest, OutputsAreTheEpilogueOfTheAccumulators) {
  at::manual_seed(2);
  for (const ConvolutionCase& c : convolution_cases()) {
    for (int variant = 0; variant < kConvolutionVariants; ++variant) {
      SCOPED_TRACE(concat(c, " variant ", variant));
      const ConvolutionOperands o = random_operands(c, variant);
      const Tensor sums = exact_sums(c, o).to(at::kFloat);
      Tensor y = sums * along_channels(o.codes.weight_scale, sums) * o.codes.input_scale;
      if (o.codes.bias) y = y + along_channels(*o.codes.bias, sums);
      EXPECT_TRUE(at::equal(int8_convolution(o.codes, c.settings), y));
      EXPECT_TRUE(at::equal(int8_convolution(o.codes, c.settings, at::kHalf), y.to(at::kHalf)));
      EXPECT_TRUE(
          at::equal(int8_convolution(o.codes, c.settings, at::kBFloat16), y.to(at::kBFloat16)));

      const Scheme scheme = variant & 2 ? asymmetric_scheme(8) : symmetric_scheme(4);
      const Tensor scale = at::full({1}, 0.037f);
      std::optional<Tensor> zero_point;
      if (!scheme.symmetric) zero_point = at::full({1}, 11, at::kInt);
      EXPECT_TRUE(
          at::equal(int8_convolution_requantize(o.codes, c.settings, scale, zero_point, scheme),
                    quantize(y, scale, zero_point, scheme)));
    }
  }
}

TEST(ConvolutionTest, ActivationsComeLast) {
  ConvolutionCase c = {2, 8, 6, {9, 9}, {3, 3}, {{1, 1}, {1, 1}, {1, 1}}};
  for (const int64_t groups : {1, 2}) {
    c.settings.groups = groups;
    ConvolutionOperands o = random_operands(c, 7);
    const Tensor y = int8_convolution(o.codes, c.settings);
    o.codes.activation = Activation::relu;
    EXPECT_TRUE(at::equal(int8_convolution(o.codes, c.settings), at::relu(y)));
  }
}

// More output positions than one matrix of patches holds.
TEST(ConvolutionTest, ManyPositionsGoInBands) {
  at::manual_seed(3);
  const ConvolutionCase c = {2, 256, 2, {150, 130}, {3, 3}, {{1, 1}, {1, 1}, {1, 1}}};
  for (const int variant : {0, 7}) {
    const ConvolutionOperands o = random_operands(c, variant);
    EXPECT_TRUE(at::equal(
        int8_convolution_accumulators(o.codes.codes, o.codes.weight, o.codes.input_zero_point,
                                      o.codes.weight_sum, c.settings)
            .to(at::kLong),
        exact_sums(c, o)));
    const Tensor both = int8_convolution(o.codes, c.settings);
    Int8LinearOperands one = o.codes;
    one.codes = one.codes.slice(0, 1);
    EXPECT_TRUE(at::equal(both.slice(0, 1), int8_convolution(one, c.settings)));
  }
}

TEST(ConvolutionTest, TakesAnyMemoryFormatAndLeavesChannelsLast) {
  const ConvolutionCase c = {2, 8, 6, {9, 7}, {3, 3}, {{1, 1}, {1, 1}, {1, 1}}};
  const ConvolutionOperands o = random_operands(c, 7);
  const Tensor y = int8_convolution(o.codes, c.settings);
  EXPECT_TRUE(y.is_contiguous(at::MemoryFormat::ChannelsLast));
  Int8LinearOperands other = o.codes;
  other.codes = other.codes.contiguous(at::MemoryFormat::ChannelsLast);
  EXPECT_TRUE(at::equal(int8_convolution(other, c.settings), y));
  other.codes = o.codes.codes.flip(3).flip(3).transpose(2, 3).contiguous().transpose(2, 3);
  other.weight = o.codes.weight.transpose(1, 2).contiguous().transpose(1, 2);
  EXPECT_TRUE(at::equal(int8_convolution(other, c.settings), y));
}

TEST(ConvolutionTest, ShapesComeWithoutData) {
  for (const ConvolutionCase& c : convolution_cases()) {
    const ConvolutionOperands o = random_operands(c, 0);
    const auto meta = [](const Tensor& tensor) { return tensor.to(at::kMeta); };
    const Int8LinearOperands operands = {meta(o.codes.codes), meta(o.codes.weight),
                                         meta(o.codes.input_scale), meta(o.codes.weight_scale)};
    const Tensor y = int8_convolution(operands, c.settings, at::kHalf);
    const Tensor expected = int8_convolution(o.codes, c.settings, at::kHalf);
    EXPECT_EQ(y.sizes(), expected.sizes()) << c;
    EXPECT_EQ(y.strides(), expected.strides()) << c;
    EXPECT_EQ(y.scalar_type(), at::kHalf);
  }
}

TEST(ConvolutionTest, WhatDoesNotFitIsRefused) {
  const ConvolutionCase c = {2, 8, 6, {9, 7}, {3, 3}, {{1, 1}, {1, 1}, {1, 1}}};
  const ConvolutionOperands o = random_operands(c, 0);
  const auto message = [&](auto change) {
    Int8LinearOperands operands = o.codes;
    ConvolutionSettings settings = c.settings;
    change(operands, settings);
    return message_of([&] { int8_convolution(operands, settings); });
  };
  using O = Int8LinearOperands&;
  using S = ConvolutionSettings&;
  EXPECT_CONTAINS(message([](O x, S) { x.codes = x.codes.slice(1, 1); }), "do not fit a weight");
  EXPECT_CONTAINS(message([](O x, S) { x.codes = x.codes[0]; }), "codes must be [N, C");
  EXPECT_CONTAINS(message([](O, S s) { s.stride = {1}; }), "for each of the 2 spatial axes");
  EXPECT_CONTAINS(message([](O, S s) { s.stride = {0, 1}; }), "must be positive");
  EXPECT_CONTAINS(message([](O, S s) { s.groups = 3; }), "3 groups");
  EXPECT_CONTAINS(message([](O, S s) { s.dilation = {6, 6}; }), "there is no output");
  EXPECT_CONTAINS(message([](O, S s) { s.output_padding = {1, 1}; }), "0 unless transposed");
  EXPECT_CONTAINS(message([](O x, S) { x.input_scale = at::ones({2}); }), "has one scale");
  EXPECT_CONTAINS(message([](O x, S) { x.weight_scale = at::ones({2}); }), "weight_scale");
  EXPECT_CONTAINS(message([](O x, S) { x.input_zero_point = at::zeros({1}, at::kInt); }),
                  "go together");
  EXPECT_CONTAINS(message([](O x, S) { x.weight = x.weight.to(at::kMeta); }), "move one of them");
  EXPECT_CONTAINS(message([](O x, S) {
                    x.codes = at::zeros({1, 20000, 3, 3}, at::kChar);
                    x.weight = at::zeros({6, 3, 3, 20000}, at::kChar);
                  }),
                  "could overflow the int32 accumulators");
}

}  // namespace
}  // namespace vernier
