#include <ATen/ops/cat.h>
#include <vernier/kernels/code_tensor.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/quantize.h>

namespace vernier {
namespace {

using at::Tensor;

bool same(const CodeScale& a, const CodeScale& b) {
  const bool same_zero = a.zero_point.has_value() == b.zero_point.has_value() &&
                         (!a.zero_point || a.zero_point->is_same(*b.zero_point));
  return a.scale.is_same(b.scale) && same_zero && a.scheme == b.scheme && a.axis == b.axis;
}

Tensor quantize(const Tensor& values, const CodeScale& s) {
  return quantize(values, s.scale, s.zero_point, s.scheme, s.axis);
}

}  // namespace

Tensor dequantize(const CodeTensor& t, at::ScalarType dtype) {
  const CodeScale& s = t.scale;
  return dequantize(t.codes, s.scale, s.zero_point, s.scheme, s.axis, dtype);
}

Tensor requantize(const CodeTensor& tensor, const CodeScale& scale) {
  if (same(tensor.scale, scale)) return tensor.codes;
  return quantize(dequantize(tensor), scale);
}

Tensor add_codes(const CodeTensor& a, const CodeTensor& b, const CodeScale& scale) {
  return quantize(dequantize(a).add(dequantize(b)), scale);
}

Tensor concat_codes(const std::vector<CodeTensor>& tensors, int64_t dim, const CodeScale& scale) {
  VERNIER_CHECK(!tensors.empty(), "there is nothing to concatenate");
  std::vector<Tensor> codes;
  for (const CodeTensor& tensor : tensors) codes.push_back(requantize(tensor, scale));
  return at::cat(codes, dim);
}

Tensor embedding_of_codes(const CodeTensor& table, const Tensor& indices, at::ScalarType dtype) {
  const Tensor& codes = table.codes;
  VERNIER_CHECK(codes.dim() == 2, "a table of codes must be [rows, columns], not ", codes.sizes());
  VERNIER_CHECK(indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt,
                "indices must be int64 or int32, not ", c10::toString(indices.scalar_type()));
  VERNIER_CHECK(indices.device() == codes.device(), "indices are on ", indices.device(),
                " but the table is on ", codes.device(), ": move one of them");
  const Tensor flat = indices.reshape({-1});
  if (flat.is_cpu() && flat.numel() > 0) {
    const int64_t low = flat.min().item<int64_t>(), high = flat.max().item<int64_t>();
    VERNIER_CHECK(low >= 0 && high < codes.size(0), "index ", low < 0 ? low : high,
                  " is outside a table of ", codes.size(0), " rows");
  }
  CodeTensor rows = {codes.index_select(0, flat), table.scale};
  CodeScale& s = rows.scale;
  const bool row_by_row =
      s.scheme.granularity == Granularity::per_group ||
      (s.scheme.granularity == Granularity::per_channel && (s.axis == 0 || s.axis == -2));
  if (row_by_row && codes.size(0) > 0) {
    const auto gathered = [&](const Tensor& values) {
      return values.reshape({codes.size(0), -1}).index_select(0, flat).flatten();
    };
    s.scale = gathered(s.scale);
    if (s.zero_point) s.zero_point = gathered(*s.zero_point);
  }
  std::vector<int64_t> sizes = indices.sizes().vec();
  sizes.push_back(codes.size(1));
  return dequantize(rows, dtype).view(sizes);
}

}  // namespace vernier
