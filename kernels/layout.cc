#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <vernier/kernels/dispatch.h>
#include <vernier/kernels/layout.h>
#include <vernier/kernels/layout_device.h>

#include <array>
#include <limits>

namespace vernier {
namespace {

using at::Tensor;

constexpr std::array<Layout, 5> kLayouts = {Layout::row, Layout::col, Layout::col32,
                                            Layout::col4_4r2_8c, Layout::col32_2r_4r4};

bool takes_int32(Layout layout) {
  return layout == Layout::row || layout == Layout::col || layout == Layout::col32;
}

struct Shapes {
  LayoutShape from, to;
};

Shapes check_arguments(const Tensor& matrix, std::string_view source, std::string_view target,
                       int64_t rows, int64_t columns) {
  const Layout from = layout_from_string(source), to = layout_from_string(target);
  const bool is_int8 = matrix.scalar_type() == at::kChar;
  VERNIER_CHECK(is_int8 || matrix.scalar_type() == at::kInt,
                "convert_layout takes int8 or int32, not ", c10::toString(matrix.scalar_type()));
  for (const Layout layout : {from, to})
    VERNIER_CHECK(is_int8 || takes_int32(layout), "the layout ", to_string(layout),
                  " is for int8, not int32: use row, col or col32");
  // A tile may be 31 larger than the matrix either way.
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max() - kLayoutGroup;
  int64_t bound = 0;
  VERNIER_CHECK(rows >= 0 && columns >= 0 && rows < kMost && columns < kMost &&
                    !__builtin_mul_overflow(rows + kLayoutGroup, columns + kLayoutGroup, &bound),
                "a matrix cannot have ", rows, " rows and ", columns, " columns");
  const Shapes shapes{{from, rows, columns}, {to, rows, columns}};
  VERNIER_CHECK(matrix.numel() == shapes.from.size(), "a matrix of ", rows, " rows and ", columns,
                " columns in layout ", to_string(from), " has ", shapes.from.size(),
                " elements, not ", matrix.numel());
  return shapes;
}

Tensor convert_layout_kernel(const Tensor& matrix, std::string_view source, std::string_view target,
                             int64_t rows, int64_t columns) {
  const Shapes shapes = check_arguments(matrix, source, target, rows, columns);
  const Tensor input = matrix.contiguous();
  const Tensor output = at::empty({shapes.to.lines, shapes.to.leading}, matrix.options());
  if (output.numel() == 0) return output;
  const ConvertLayoutArguments arguments{input.const_data_ptr(), shapes.from,
                                         output.mutable_data_ptr(), shapes.to,
                                         static_cast<int>(matrix.element_size())};
  on_device_of(
      matrix, [&] { cpu::convert_layout(arguments); },
      [&](void* stream) { cuda::convert_layout(arguments, stream); });
  return output;
}

Tensor convert_layout_meta(const Tensor& matrix, std::string_view source, std::string_view target,
                           int64_t rows, int64_t columns) {
  const LayoutShape to = check_arguments(matrix, source, target, rows, columns).to;
  return at::empty({to.lines, to.leading}, matrix.options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vernier, m) {
  m.def("convert_layout(Tensor matrix, str source, str target, int rows, int columns) -> Tensor");
}
TORCH_LIBRARY_IMPL(vernier, CPU, m) { m.impl("convert_layout", TORCH_FN(convert_layout_kernel)); }
#ifdef VERNIER_WITH_CUDA
TORCH_LIBRARY_IMPL(vernier, CUDA, m) { m.impl("convert_layout", TORCH_FN(convert_layout_kernel)); }
#endif
TORCH_LIBRARY_IMPL(vernier, Meta, m) { m.impl("convert_layout", TORCH_FN(convert_layout_meta)); }

std::string to_string(Layout layout) {
  switch (layout) {
    case Layout::row:
      return "row";
    case Layout::col:
      return "col";
    case Layout::col32:
      return "col32";
    case Layout::col4_4r2_8c:
      return "col4_4r2_8c";
    case Layout::col32_2r_4r4:
      return "col32_2r_4r4";
  }
  return "unknown";
}

Layout layout_from_string(std::string_view name) {
  for (const Layout layout : kLayouts)
    if (name == to_string(layout)) return layout;
  throw Error(
      concat("unknown layout '", name, "': use row, col, col32, col4_4r2_8c or col32_2r_4r4"));
}

Tensor convert_layout(const Tensor& matrix, Layout from, Layout to, int64_t rows, int64_t columns) {
  static const auto op =
      operator_handle<decltype(convert_layout_kernel)>("vernier::convert_layout");
  return op.call(matrix, to_string(from), to_string(to), rows, columns);
}

}  // namespace vernier
