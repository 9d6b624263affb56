// int8_linear into memory that is there, for operations made of several products: convolution.cc,
// int8_bmm.cc; internal.
#pragma once

#include <vernier/kernels/int8_gemm.h>

#include <optional>

namespace vernier {

/// Codes that a product ends in, for a next layer: one scale; integers.
struct Requantization {
  at::Tensor scale;                      ///< float32 [1]
  std::optional<at::Tensor> zero_point;  ///< int32 [1], for asymmetric schemes
  Scheme scheme;

  /// Throws Error unless the scheme is one of per_tensor integers that goes with the zero point.
  void check() const;
};

/// int8_linear, or int8_linear_requantize where there is a requantization, into a contiguous
/// `output` [M, N] on the device of the codes: int8 with a requantization, else a floating type.
void int8_linear_into(const Int8LinearOperands& operands,
                      const std::optional<Requantization>& requantization,
                      const at::Tensor& output);

/// The epilogue of int8_linear_into alone, of contiguous accumulators int32 [M, N]; codes and
/// weight of the operands are not looked at.
void int8_epilogue_into(const at::Tensor& accumulators, const Int8LinearOperands& operands,
                        const std::optional<Requantization>& requantization,
                        const at::Tensor& output);

}  // namespace vernier
