// Random operands of an integer linear layer, for the tests of both devices.
#pragma once

#include <ATen/ATen.h>
#include <vernier/kernels/int8_gemm.h>

#include <algorithm>
#include <cmath>
#include <optional>

namespace vernier {

/// Each bit of a variant switches a feature on: a scale a row, a scale a column, bias, zero point.
constexpr int kOperandVariants = 16;

inline Int8LinearOperands random_operands(int64_t m, int64_t n, int64_t k, int variant,
                                          Activation activation = Activation::none) {
  Int8LinearOperands o;
  o.codes = at::randint(-128, 128, {m, k}, at::kChar);
  o.weight = at::randint(-128, 128, {n, k}, at::kChar);
  // Of a size that spreads the outputs around 0, where activations bend and codes are not clipped.
  const double spread = 1 / (5400.0 * std::sqrt(static_cast<double>(std::max<int64_t>(k, 1))));
  o.input_scale = at::rand({variant & 1 ? m : 1}) + 0.5f;
  o.weight_scale = (at::rand({variant & 2 ? n : 1}) + 0.5f) * (4 * spread);
  if (variant & 4) o.bias = at::randn({n});
  if (variant & 8) {
    o.input_zero_point = at::full({1}, -37, at::kInt);
    o.weight_sum = o.weight.sum(1, false, at::kInt);
  }
  o.activation = activation;
  return o;
}

inline Int8LinearOperands to(const Int8LinearOperands& o, at::Device device) {
  const auto moved = [&](const std::optional<at::Tensor>& tensor) {
    return tensor ? std::optional(tensor->to(device)) : std::nullopt;
  };
  return {o.codes.to(device),        o.weight.to(device), o.input_scale.to(device),
          o.weight_scale.to(device), moved(o.bias),       moved(o.input_zero_point),
          moved(o.weight_sum),       o.activation};
}

}  // namespace vernier
