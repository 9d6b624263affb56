// Operands and comparisons for the tests of the operations that end in codes of whole rows.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <vernier/kernels/activation_quantize.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/norm_quantize.h>

#include <limits>
#include <optional>

namespace vernier::testing {

using OptionalTensor = std::optional<at::Tensor>;

/// Equal dtype, shape and bits, except that any NaN equals any NaN: which of them an operation
/// gives differs between processors.
inline ::testing::AssertionResult same_bits(const at::Tensor& expected, const at::Tensor& actual) {
  if (expected.scalar_type() != actual.scalar_type() || expected.sizes() != actual.sizes())
    return ::testing::AssertionFailure()
           << concat("expected ", expected.scalar_type(), expected.sizes(), ", got ",
                     actual.scalar_type(), actual.sizes());
  const auto bits = [](const at::Tensor& tensor) {
    const at::Tensor dense = tensor.detach().cpu().contiguous().flatten();
    if (!at::isFloatingType(dense.scalar_type())) return dense;
    return at::nan_to_num(dense, 0.0, std::numeric_limits<double>::infinity(),
                          -std::numeric_limits<double>::infinity())
        .masked_fill(at::isnan(dense), 12345.0)
        .view(dense.element_size() == 4 ? at::kInt : at::kShort);
  };
  const at::Tensor differing = at::nonzero(bits(expected) != bits(actual)).flatten();
  if (differing.numel() == 0) return ::testing::AssertionSuccess();
  const int64_t i = differing[0].item<int64_t>();
  return ::testing::AssertionFailure()
         << concat(differing.numel(), " of ", expected.numel(), " differ, first [", i,
                   "]: ", expected.detach().cpu().flatten()[i].item<double>(), " and ",
                   actual.detach().cpu().flatten()[i].item<double>());
}

inline ::testing::AssertionResult same_bits(const OptionalTensor& expected,
                                            const OptionalTensor& actual) {
  if (expected.has_value() != actual.has_value())
    return ::testing::AssertionFailure() << "one of the two is absent";
  return expected ? same_bits(*expected, *actual) : ::testing::AssertionSuccess();
}

/// Rows of normal values of quite different sizes; where asked, some with NaN, infinities and
/// nothing but zeros.
inline at::Tensor random_rows(at::IntArrayRef sizes, at::ScalarType type, bool specials = false) {
  at::Tensor x = at::randn(sizes, at::kFloat) * 3 + 0.25;
  const int64_t columns = sizes.back();
  at::Tensor rows = x.view({-1, columns});
  if (specials && columns > 0) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    for (int64_t row = 0; row < rows.size(0); ++row) {
      const int64_t column = row * 7919 % columns;
      if (row % 5 == 1) rows[row][column] = std::numeric_limits<float>::quiet_NaN();
      if (row % 5 == 2) rows[row][column] = row % 2 ? kInfinity : -kInfinity;
      if (row % 5 == 3) rows[row].zero_();
      if (row % 5 == 4) rows[row].mul_(1e-3f);
    }
  }
  return x.to(type);
}

}  // namespace vernier::testing
