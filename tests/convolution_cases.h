// Random convolutions on codes, for the tests of both devices.
#pragma once

#include <ATen/ATen.h>
#include <vernier/kernels/convolution.h>
#include <vernier/kernels/error.h>

#include <ostream>
#include <vector>

namespace vernier::testing {

struct ConvolutionCase {
  int64_t batch, channels, out_channels;
  std::vector<int64_t> input, kernel;
  ConvolutionSettings settings;
};

inline std::ostream& operator<<(std::ostream& out, const ConvolutionCase& c) {
  const ConvolutionSettings& s = c.settings;
  return out << (s.transposed ? "transposed [" : "[") << c.batch << ", " << c.channels << ", "
             << at::IntArrayRef(c.input) << "] to " << c.out_channels << " kernel "
             << at::IntArrayRef(c.kernel) << " stride " << at::IntArrayRef(s.stride) << " padding "
             << at::IntArrayRef(s.padding) << " dilation " << at::IntArrayRef(s.dilation)
             << " groups " << s.groups;
}

inline std::vector<ConvolutionCase> convolution_cases() {
  return {
      {2, 3, 5, {17}, {3}, {{1}, {0}, {1}}},
      {3, 16, 8, {20}, {5}, {{2}, {3}, {2}}},
      {2, 8, 12, {9}, {3}, {{1}, {1}, {1}, 4}},
      {2, 6, 9, {7}, {4}, {{3}, {2}, {2}, 3, true, {1}}},
      {1, 3, 7, {13, 11}, {3, 3}, {{1, 1}, {1, 1}, {1, 1}}},
      {4, 16, 24, {9, 14}, {3, 2}, {{2, 3}, {2, 1}, {1, 3}}},
      {2, 4, 6, {8, 8}, {5, 5}, {{1, 2}, {2, 2}, {1, 1}}},
      {3, 32, 40, {6, 7}, {1, 1}, {{1, 1}, {0, 0}, {1, 1}}},
      {3, 20, 16, {6, 7}, {1, 1}, {{2, 2}, {0, 0}, {1, 1}}},
      {2, 10, 10, {12, 9}, {3, 3}, {{1, 1}, {1, 1}, {1, 1}, 10}},
      {2, 24, 36, {7, 6}, {3, 3}, {{2, 1}, {1, 0}, {1, 2}, 3}},
      {2, 3, 6, {7, 6}, {3, 3}, {{1, 1}, {1, 1}, {1, 1}, 3}},
      {2, 16, 7, {5, 6}, {4, 4}, {{2, 2}, {1, 1}, {1, 1}, 1, true}},
      {2, 5, 8, {4, 3}, {3, 2}, {{3, 1}, {0, 1}, {2, 1}, 1, true, {2, 0}}},
      {1, 8, 8, {5, 5}, {3, 3}, {{2, 2}, {1, 1}, {1, 1}, 8, true, {1, 1}}},
      {1, 4, 3, {6, 5, 7}, {3, 2, 3}, {{1, 2, 1}, {1, 0, 2}, {1, 1, 2}}},
      {2, 6, 4, {4, 4, 4}, {3, 3, 3}, {{2, 1, 1}, {1, 1, 1}, {1, 1, 1}, 2}},
      {1, 4, 2, {3, 2, 4}, {2, 3, 2}, {{2, 2, 1}, {0, 1, 1}, {1, 1, 1}, 1, true, {1, 0, 0}}},
      {0, 4, 6, {8, 8}, {3, 3}, {{1, 1}, {1, 1}, {1, 1}}},
      {0, 4, 6, {8, 8}, {3, 3}, {{1, 1}, {1, 1}, {1, 1}, 2}},
  };
}

struct ConvolutionOperands {
  at::Tensor torch_weight;  ///< codes in torch::nn's order
  Int8LinearOperands codes;
};

/// Each bit of a variant switches a feature on: a scale an output channel, bias, zero point.
constexpr int kConvolutionVariants = 8;

inline ConvolutionOperands random_operands(const ConvolutionCase& c, int variant) {
  const ConvolutionSettings& s = c.settings;
  ConvolutionOperands o;
  std::vector<int64_t> input = {c.batch, c.channels};
  input.insert(input.end(), c.input.begin(), c.input.end());
  std::vector<int64_t> weight = {c.out_channels, c.channels / s.groups};
  if (s.transposed) weight = {c.channels, c.out_channels / s.groups};
  weight.insert(weight.end(), c.kernel.begin(), c.kernel.end());
  o.codes.codes = at::randint(-128, 128, input, at::kChar);
  o.torch_weight = at::randint(-128, 128, weight, at::kChar);
  o.codes.weight = convolution_weight(o.torch_weight, s.groups, s.transposed);
  o.codes.input_scale = at::rand({1}) + 0.5f;
  o.codes.weight_scale = (at::rand({variant & 1 ? c.out_channels : 1}) + 0.5f) * 1e-4f;
  if (variant & 2) o.codes.bias = at::randn({c.out_channels});
  if (variant & 4) {
    o.codes.input_zero_point = at::full({1}, -37, at::kInt);
    o.codes.weight_sum = o.codes.weight.flatten(1).sum(1, false, at::kInt);
  }
  return o;
}

}  // namespace vernier::testing
