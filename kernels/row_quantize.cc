#include <ATen/ops/empty.h>
#include <vernier/kernels/row_quantize_dispatch.h>

namespace vernier {
namespace {

using at::Tensor;

bool is_col32(std::string_view layout) {
  VERNIER_CHECK(layout == "row_major" || layout == "col32", "unknown layout '", layout,
                "': use row_major or col32");
  return layout == "col32";
}

/// Sizes, symbolic or not, with another last one; a scalar is a row of one and stays a scalar.
template <typename Size>
std::vector<Size> with_last_size(c10::ArrayRef<Size> sizes, const Size& last) {
  std::vector<Size> out = sizes.vec();
  if (!out.empty()) out.back() = last;
  return out;
}

/// Sizes of the scales of rows.
template <typename Size>
c10::ArrayRef<Size> row_sizes(c10::ArrayRef<Size> sizes) {
  return sizes.slice(0, sizes.empty() ? 0 : sizes.size() - 1);
}

}  // namespace

RowQuantization row_quantization(const std::optional<Tensor>& scale,
                                 const std::optional<Tensor>& zero_point,
                                 const std::optional<Tensor>& pre_scale, int64_t bits,
                                 bool narrow_range, std::string_view layout, bool with_output) {
  VERNIER_CHECK(bits >= 2 && bits <= 8, "bits must be 2 to 8, not ", bits);
  return {scale,        zero_point,       pre_scale,  static_cast<int>(bits),
          narrow_range, is_col32(layout), with_output};
}

const char* layout_name(const RowQuantization& quantization) {
  return quantization.col32 ? "col32" : "row_major";
}

template <typename T>
const T* PreparedRowCodes::operand(const Tensor& tensor, const char* what, at::ScalarType dtype,
                                   int64_t count, const Tensor& input) {
  check_tensor(tensor, what, dtype, input);
  VERNIER_CHECK(tensor.numel() == count, what, " has ", tensor.numel(), " elements, not ", count);
  kept_.push_back(tensor.contiguous());
  return kept_.back().const_data_ptr<T>();
}

PreparedRowCodes::PreparedRowCodes(const Tensor& input, int64_t columns, const RowQuantization& q) {
  raw.type = element_type_of(input.scalar_type(), "input");
  raw.rows = rows_of(input);
  raw.columns = columns;
  raw.col32 = q.col32;
  Scheme scheme;
  scheme.bits = q.bits;
  scheme.narrow_range = q.narrow_range;
  scheme.symmetric = !q.zero_point.has_value();
  scheme.check();
  raw.qmin = scheme.qmin();
  raw.qmax = scheme.qmax();
  VERNIER_CHECK(q.scale.has_value() || !q.zero_point.has_value(),
                "zero_point without scale: dynamic scales are symmetric");
  if (q.scale) raw.scale = operand<float>(*q.scale, "scale", at::kFloat, 1, input);
  if (q.zero_point)
    raw.zero_point = operand<int32_t>(*q.zero_point, "zero_point", at::kInt, 1, input);
  if (q.pre_scale)
    raw.pre_scale = operand<float>(*q.pre_scale, "pre_scale", at::kFloat, columns, input);

  const auto sizes = with_last_size(input.sizes(), columns);
  const auto int8 = input.options().dtype(at::kChar);
  const auto float32 = input.options().dtype(at::kFloat);
  codes = q.col32 ? at::empty({raw.code_columns() / kCol32, raw.rows, kCol32}, int8)
                  : at::empty(sizes, int8);
  scale = q.scale ? at::empty({0}, float32) : at::empty(row_sizes(input.sizes()), float32);
  output = q.with_output ? at::empty(sizes, input.options()) : at::empty({0}, input.options());
  raw.codes = codes.data_ptr<int8_t>();
  if (!q.scale) raw.row_scale = scale.data_ptr<float>();
  if (q.with_output) raw.output = output.data_ptr();
}

std::tuple<Tensor, Tensor, Tensor> meta_row_codes(const Tensor& input, const c10::SymInt& columns,
                                                  bool dynamic, std::string_view layout,
                                                  bool with_output) {
  VERNIER_CHECK(input.is_meta(), "an operand is on meta but the input is on ", input.device(),
                ": move one of them");
  const auto sizes = with_last_size(input.sym_sizes(), columns);
  const auto int8 = input.options().dtype(at::kChar);
  const auto float32 = input.options().dtype(at::kFloat);
  c10::SymInt rows = 1;
  for (const c10::SymInt& size : row_sizes(input.sym_sizes())) rows = rows * size;
  return {
      is_col32(layout) ? at::empty_symint({(columns + (kCol32 - 1)) / kCol32, rows, kCol32}, int8)
                       : at::empty_symint(sizes, int8),
      dynamic ? at::empty_symint(row_sizes(input.sym_sizes()), float32) : at::empty({0}, float32),
      with_output ? at::empty_symint(sizes, input.options()) : at::empty({0}, input.options())};
}

}  // namespace vernier
