// From the arguments of operators that end in codes of whole rows to raw ones; internal.
#pragma once

#include <vernier/kernels/dispatch.h>
#include <vernier/kernels/row_codes.h>
#include <vernier/kernels/row_quantize.h>

#include <string_view>
#include <tuple>
#include <vector>

namespace vernier {

/// How a RowQuantization travels through an operator's schema.
inline constexpr const char* kRowQuantizationSchema =
    "Tensor? scale=None, Tensor? zero_point=None, Tensor? pre_scale=None, int bits=8, bool "
    "narrow_range=True, str layout=\"row_major\", bool with_output=False";

/// The same from an operator's arguments. Throws Error for an unknown layout or a width that is
/// none.
RowQuantization row_quantization(const std::optional<at::Tensor>& scale,
                                 const std::optional<at::Tensor>& zero_point,
                                 const std::optional<at::Tensor>& pre_scale, int64_t bits,
                                 bool narrow_range, std::string_view layout, bool with_output);

/// The layout as row_quantization() takes it.
const char* layout_name(const RowQuantization& quantization);

/// Results in the making: their tensors, those not wanted empty, and the raw arguments that point
/// into them and into operands that this keeps alive.
class PreparedRowCodes {
 public:
  /// The result has `columns` columns, else the shape and dtype of `input`. Throws Error when an
  /// operand does not fit.
  PreparedRowCodes(const at::Tensor& input, int64_t columns, const RowQuantization& quantization);

  at::Tensor codes, scale, output;
  RowCodes raw;

 private:
  template <typename T>
  const T* operand(const at::Tensor& tensor, const char* what, at::ScalarType dtype, int64_t count,
                   const at::Tensor& input);

  std::vector<at::Tensor> kept_;
};

/// Shapes and dtypes of the results without data: {codes, scale, output}.
std::tuple<at::Tensor, at::Tensor, at::Tensor> meta_row_codes(const at::Tensor& input,
                                                              const c10::SymInt& columns,
                                                              bool dynamic, std::string_view layout,
                                                              bool with_output);

}  // namespace vernier
