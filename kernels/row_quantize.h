// What operations that end in codes of whole rows have in common: how they quantize, and what they
// return.
#pragma once

#include <ATen/core/Tensor.h>
#include <vernier/kernels/scheme.h>

#include <optional>

namespace vernier {

/// How the rows [..., C] of real values that an operation computes become codes.
struct RowQuantization {
  /// Static: float32 [1], one scale for the tensor. Absent: dynamic, each row gets the symmetric
  /// scale of its own absolute maximum over finite values (quantize.h's per_token_scale).
  std::optional<at::Tensor> scale;
  /// int32 [1], static only; makes the codes asymmetric.
  std::optional<at::Tensor> zero_point;
  /// float32 [C]: multiplies the real values before they are quantized. SmoothQuant's division by
  /// its factors (Xiao 2022, arXiv 2211.10438), given as reciprocals, where no weight can absorb
  /// it.
  std::optional<at::Tensor> pre_scale;
  int bits = 8;              ///< 2..8, as in Scheme
  bool narrow_range = true;  ///< symmetric only, as in Scheme
  /// Codes in COL32 order instead of row-major: column c of row r of an R x C matrix stands at
  /// (c / 32) * 32 R + 32 r + c % 32. Columns are padded with codes 0 to a multiple of 32.
  bool col32 = false;
  bool with_output = false;  ///< also return the real values
};

/// Codes of rows and what came with them.
struct RowCodesResult {
  /// int8, of the result's shape [..., C]; in COL32 order [ceil(C / 32), rows, 32].
  at::Tensor codes;
  std::optional<at::Tensor> scale;   ///< dynamic only: float32 [...]
  std::optional<at::Tensor> output;  ///< real values before pre_scale, in the input's dtype
};

}  // namespace vernier
