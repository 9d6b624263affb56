// Layouts of matrices: addresses by hand, the operator on the CPU.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <vernier/kernels/layout.h>
#include <vernier/tests/expect_error.h>

#include <limits>
#include <set>
#include <string>
#include <tuple>
#include <vector>

namespace vernier {
namespace {

using at::Tensor;
using testing::message_of;

constexpr Layout kLayouts[] = {Layout::row, Layout::col, Layout::col32, Layout::col4_4r2_8c,
                               Layout::col32_2r_4r4};
constexpr Layout kInt32Layouts[] = {Layout::row, Layout::col, Layout::col32};
constexpr std::pair<int64_t, int64_t> kSizes[] = {{1, 1},   {3, 5},   {7, 33},  {8, 32},
                                                  {9, 31},  {31, 64}, {32, 32}, {33, 65},
                                                  {100, 1}, {1, 100}, {64, 96}, {45, 130}};

Tensor random_matrix(int64_t rows, int64_t columns, at::ScalarType dtype) {
  return at::randint(-128, 128, {rows, columns}, dtype);
}

TEST(Layout, AddressesWorkedByHand) {
  const struct {
    Layout layout;
    int64_t rows, columns, row, column, address;
  } cases[] = {
      {Layout::row, 5, 7, 2, 3, 17},
      {Layout::col, 5, 7, 2, 3, 17},
      {Layout::col, 6, 7, 2, 3, 20},
      {Layout::col32, 5, 70, 2, 3, 67},
      {Layout::col32, 5, 70, 2, 33, 5 * 32 + 2 * 32 + 1},
      {Layout::col32, 5, 70, 4, 69, 2 * 5 * 32 + 4 * 32 + 5},
      // The first inner tile: rows 0, 2, 4, 6 of columns 0 to 3.
      {Layout::col4_4r2_8c, 16, 64, 0, 3, 3},
      {Layout::col4_4r2_8c, 16, 64, 2, 0, 4},
      {Layout::col4_4r2_8c, 16, 64, 6, 3, 15},
      {Layout::col4_4r2_8c, 16, 64, 0, 4, 16},    // the inner tile to its right
      {Layout::col4_4r2_8c, 16, 64, 6, 31, 127},  // the last element of an even row
      {Layout::col4_4r2_8c, 16, 64, 1, 0, 128},   // odd rows follow
      {Layout::col4_4r2_8c, 16, 64, 7, 31, 255},
      {Layout::col4_4r2_8c, 16, 64, 8, 0, 256},                     // the tile below
      {Layout::col4_4r2_8c, 16, 64, 0, 32, 512},                    // the next group
      {Layout::col4_4r2_8c, 9, 64, 3, 37, 512 + 128 + 16 + 4 + 1},  // 9 rows take 16
      // ((row%8)/2*4 + row/8)*2 + row%2 lines of 32.
      {Layout::col32_2r_4r4, 64, 64, 0, 31, 31},
      {Layout::col32_2r_4r4, 64, 64, 1, 0, 32},
      {Layout::col32_2r_4r4, 64, 64, 8, 0, 64},  // rows 0 and 1, then 8 and 9
      {Layout::col32_2r_4r4, 64, 64, 25, 5, 7 * 32 + 5},
      {Layout::col32_2r_4r4, 64, 64, 2, 0, 256},
      {Layout::col32_2r_4r4, 64, 64, 31, 31, 1023},
      {Layout::col32_2r_4r4, 64, 64, 32, 0, 1024},
      {Layout::col32_2r_4r4, 33, 64, 0, 32, 2048},  // 33 rows take 64
  };
  for (const auto& [layout, rows, columns, row, column, address] : cases)
    EXPECT_EQ(LayoutShape(layout, rows, columns).address(row, column), address)
        << to_string(layout) << " " << row << " " << column;
}

// The least leading dimensions that cublasLt.h gives as examples.
TEST(Layout, LeadingDimensionsAreCublasLts) {
  EXPECT_EQ(LayoutShape(Layout::col32, 2, 33).leading, 32 * 2);
  EXPECT_EQ(LayoutShape(Layout::col4_4r2_8c, 1, 33).leading, 32 * 8);
  EXPECT_EQ(LayoutShape(Layout::col32_2r_4r4, 1, 33).leading, 32 * 32);
  for (const Layout layout : {Layout::col32, Layout::col4_4r2_8c, Layout::col32_2r_4r4})
    EXPECT_EQ(LayoutShape(layout, 1, 33).lines, 2);
}

TEST(Layout, EveryElementHasAnAddressOfItsOwn) {
  for (const Layout layout : kLayouts) {
    for (const auto& [rows, columns] : kSizes) {
      const LayoutShape shape(layout, rows, columns);
      std::set<int64_t> addresses;
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t column = 0; column < columns; ++column)
          addresses.insert(shape.address(row, column));
      EXPECT_EQ(static_cast<int64_t>(addresses.size()), rows * columns) << to_string(layout);
      EXPECT_GE(*addresses.begin(), 0);
      EXPECT_LT(*addresses.rbegin(), shape.size());
    }
  }
}

TEST(Layout, ConvertsBetweenAllAndZeroesThePadding) {
  at::manual_seed(1);
  for (const at::ScalarType dtype : {at::kChar, at::kInt}) {
    const std::vector<Layout> layouts =
        dtype == at::kChar
            ? std::vector<Layout>(std::begin(kLayouts), std::end(kLayouts))
            : std::vector<Layout>(std::begin(kInt32Layouts), std::end(kInt32Layouts));
    for (const auto& [rows, columns] : kSizes) {
      const Tensor matrix = random_matrix(rows, columns, dtype);
      for (const Layout from : layouts) {
        const LayoutShape source(from, rows, columns);
        Tensor stored = at::full({source.lines, source.leading}, 99, dtype);  // padding too
        const Tensor flat = stored.flatten();
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = 0; c < columns; ++c) flat[source.address(r, c)] = matrix[r][c];
        for (const Layout to : layouts) {
          SCOPED_TRACE(to_string(from) + " to " + to_string(to));
          const LayoutShape target(to, rows, columns);
          const Tensor converted = convert_layout(stored, from, to, rows, columns);
          ASSERT_EQ(converted.sizes(), (std::vector<int64_t>{target.lines, target.leading}));
          EXPECT_EQ(converted.scalar_type(), dtype);
          EXPECT_EQ(converted.ne(0).sum().item<int64_t>(), matrix.ne(0).sum().item<int64_t>());
          EXPECT_TRUE(at::equal(convert_layout(converted, to, Layout::row, rows, columns), matrix));
        }
      }
      EXPECT_TRUE(
          at::equal(convert_layout(matrix, Layout::row, Layout::col, rows, columns), matrix.t()));
    }
  }
}

TEST(Layout, TakesStridedAndEmptyMatrices) {
  const Tensor matrix = random_matrix(20, 40, at::kChar), every_other = matrix.slice(1, 0, 40, 2);
  EXPECT_TRUE(
      at::equal(convert_layout(every_other, Layout::row, Layout::col32, 20, 20),
                convert_layout(every_other.contiguous(), Layout::row, Layout::col32, 20, 20)));
  for (const Layout to : kLayouts) {
    const LayoutShape shape(to, 0, 5);
    EXPECT_EQ(convert_layout(at::empty({0, 5}, at::kChar), Layout::row, to, 0, 5).sizes(),
              (std::vector<int64_t>{shape.lines, shape.leading}));
    EXPECT_EQ(convert_layout(at::empty({5, 0}, at::kChar), Layout::row, to, 5, 0).numel(), 0);
  }
}

TEST(Layout, MetaGivesTheShape) {
  const Tensor matrix = at::empty({33, 65}, at::TensorOptions(at::kChar).device(at::kMeta));
  for (const Layout to : kLayouts) {
    const LayoutShape shape(to, 33, 65);
    const Tensor out = convert_layout(matrix, Layout::row, to, 33, 65);
    EXPECT_TRUE(out.is_meta());
    EXPECT_EQ(out.sizes(), (std::vector<int64_t>{shape.lines, shape.leading}));
  }
}

TEST(Layout, NamesAndMistakes) {
  for (const Layout layout : kLayouts) EXPECT_EQ(layout_from_string(to_string(layout)), layout);
  EXPECT_CONTAINS(message_of([] { layout_from_string("col64"); }), "unknown layout 'col64'");
  const Tensor codes = random_matrix(8, 32, at::kChar);
  const auto refusal = [](const Tensor& matrix, Layout from, Layout to, int64_t rows,
                          int64_t columns) {
    return message_of([&] { convert_layout(matrix, from, to, rows, columns); });
  };
  EXPECT_CONTAINS(refusal(codes.to(at::kFloat), Layout::row, Layout::col, 8, 32), "not Float");
  EXPECT_CONTAINS(refusal(codes.to(at::kInt), Layout::row, Layout::col4_4r2_8c, 8, 32),
                  "is for int8, not int32");
  EXPECT_CONTAINS(refusal(codes, Layout::row, Layout::col, 8, 33), "has 264 elements, not 256");
  EXPECT_CONTAINS(refusal(codes, Layout::col32_2r_4r4, Layout::row, 8, 32),
                  "has 1024 elements, not 256");
  EXPECT_CONTAINS(refusal(codes, Layout::row, Layout::col, -8, -32), "cannot have -8 rows");
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
  EXPECT_CONTAINS(refusal(codes, Layout::row, Layout::col, kHuge, 1), "cannot have");
  EXPECT_CONTAINS(refusal(codes, Layout::row, Layout::col, int64_t{1} << 32, int64_t{1} << 32),
                  "cannot have");
}

}  // namespace
}  // namespace vernier
