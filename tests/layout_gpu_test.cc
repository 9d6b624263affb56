// Layouts on the GPU against the CPU, and against cuBLASLt's own transform.
#include <ATen/ATen.h>
#include <cublasLt.h>
#include <gtest/gtest.h>
#include <vernier/kernels/layout.h>

#include <string>
#include <utility>
#include <vector>

namespace vernier {
namespace {

using at::Tensor;

constexpr Layout kLayouts[] = {Layout::row, Layout::col, Layout::col32, Layout::col4_4r2_8c,
                               Layout::col32_2r_4r4};
constexpr std::pair<int64_t, int64_t> kSizes[] = {
    {1, 1},    {3, 5},     {7, 33},    {8, 32},    {31, 64}, {33, 65},     {1, 100},  {100, 1},
    {45, 130}, {257, 384}, {384, 257}, {256, 512}, {48, 16}, {1000, 1040}, {64, 4096}};

bool fits(Layout layout, at::ScalarType dtype) {
  return dtype == at::kChar || layout == Layout::row || layout == Layout::col ||
         layout == Layout::col32;
}

class LayoutGpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA()) GTEST_SKIP() << "no GPU found";
    at::manual_seed(7);
  }
};

/// A buffer of a layout with a matrix in it and anything in its padding.
Tensor stored_in(Layout layout, int64_t rows, int64_t columns, at::ScalarType dtype) {
  const LayoutShape shape(layout, rows, columns);
  return at::randint(-128, 128, {shape.lines, shape.leading}, dtype);
}

TEST_F(LayoutGpuTest, EqualsTheCpu) {
  for (const at::ScalarType dtype : {at::kChar, at::kInt}) {
    for (const Layout from : kLayouts) {
      for (const Layout to : kLayouts) {
        if (!fits(from, dtype) || !fits(to, dtype)) continue;
        for (const auto& [rows, columns] : kSizes) {
          const Tensor input = stored_in(from, rows, columns, dtype);
          const Tensor expected = convert_layout(input, from, to, rows, columns);
          const Tensor actual = convert_layout(input.cuda(), from, to, rows, columns);
          ASSERT_TRUE(at::equal(actual.cpu(), expected))
              << to_string(from) << " to " << to_string(to) << " " << rows << " x " << columns
              << " " << c10::toString(dtype);
        }
      }
    }
  }
}

TEST_F(LayoutGpuTest, TakesWhatIsNotAligned) {
  for (const Layout from : kLayouts) {
    for (const Layout to : kLayouts) {
      const Tensor input = stored_in(from, 96, 160, at::kChar);
      Tensor shifted =
          at::empty({input.numel() + 3}, at::TensorOptions(at::kChar).device(at::kCUDA));
      shifted.slice(0, 3).copy_(input.flatten());
      EXPECT_TRUE(at::equal(convert_layout(shifted.slice(0, 3), from, to, 96, 160).cpu(),
                            convert_layout(input, from, to, 96, 160)))
          << to_string(from) << " to " << to_string(to);
    }
  }
}

TEST_F(LayoutGpuTest, TakesEmptyMatrices) {
  for (const Layout to : kLayouts) {
    const Tensor none = at::empty({0, 5}, at::TensorOptions(at::kChar).device(at::kCUDA));
    EXPECT_EQ(convert_layout(none, Layout::row, to, 0, 5).numel(), 0);
    EXPECT_EQ(convert_layout(none, Layout::row, to, 5, 0).numel(), 0);
  }
}

cublasLtOrder_t order_of(Layout layout) {
  switch (layout) {
    case Layout::row:
      return CUBLASLT_ORDER_ROW;
    case Layout::col:
      return CUBLASLT_ORDER_COL;
    case Layout::col32:
      return CUBLASLT_ORDER_COL32;
    case Layout::col4_4r2_8c:
      return CUBLASLT_ORDER_COL4_4R2_8C;
    case Layout::col32_2r_4r4:
      return CUBLASLT_ORDER_COL32_2R_4R4;
  }
  return CUBLASLT_ORDER_COL;
}

/// cuBLASLt's description of a matrix that lies as LayoutShape says.
class MatrixLayout {
 public:
  MatrixLayout(cudaDataType_t type, const LayoutShape& shape) {
    const auto rows = static_cast<uint64_t>(shape.rows);
    const auto columns = static_cast<uint64_t>(shape.columns);
    status_ = cublasLtMatrixLayoutCreate(&handle_, type, rows, columns, shape.leading);
    const auto order = static_cast<int32_t>(order_of(shape.layout));
    if (status_ == CUBLAS_STATUS_SUCCESS)
      status_ = cublasLtMatrixLayoutSetAttribute(handle_, CUBLASLT_MATRIX_LAYOUT_ORDER, &order,
                                                 sizeof order);
  }
  ~MatrixLayout() {
    if (handle_) cublasLtMatrixLayoutDestroy(handle_);
  }
  MatrixLayout(const MatrixLayout&) = delete;
  MatrixLayout& operator=(const MatrixLayout&) = delete;

  cublasLtMatrixLayout_t get() const { return handle_; }
  cublasStatus_t status() const { return status_; }

 private:
  cublasLtMatrixLayout_t handle_ = nullptr;
  cublasStatus_t status_ = CUBLAS_STATUS_SUCCESS;
};

/// `output` becomes `input` in another layout, by cublasLtMatrixTransform on the default stream.
cublasStatus_t transform(const Tensor& input, const LayoutShape& from, Tensor& output,
                         const LayoutShape& to) {
  const bool is_int8 = input.scalar_type() == at::kChar;
  const cudaDataType_t type = is_int8 ? CUDA_R_8I : CUDA_R_32I;
  const cudaDataType_t scale_type = is_int8 ? CUDA_R_32F : CUDA_R_32I;
  cublasLtHandle_t library = nullptr;
  cublasStatus_t status = cublasLtCreate(&library);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  cublasLtMatrixTransformDesc_t description = nullptr;
  status = cublasLtMatrixTransformDescCreate(&description, scale_type);
  const MatrixLayout a(type, from), c(type, to);
  if (status == CUBLAS_STATUS_SUCCESS) status = a.status();
  if (status == CUBLAS_STATUS_SUCCESS) status = c.status();
  const float one = 1, zero = 0;
  const int32_t integer_one = 1, integer_zero = 0;
  const void* alpha = is_int8 ? static_cast<const void*>(&one) : &integer_one;
  const void* beta = is_int8 ? static_cast<const void*>(&zero) : &integer_zero;
  if (status == CUBLAS_STATUS_SUCCESS)
    status = cublasLtMatrixTransform(library, description, alpha, input.const_data_ptr(), a.get(),
                                     beta, nullptr, nullptr, output.mutable_data_ptr(), c.get(),
                                     /*stream=*/nullptr);
  if (description) cublasLtMatrixTransformDescDestroy(description);
  cublasLtDestroy(library);
  return status;
}

/// One pair of layouts of one dtype a test, so that what the library does not support is seen as
/// skipped.
struct Conversion {
  Layout from, to;
  at::ScalarType dtype;
};

std::vector<Conversion> conversions() {
  std::vector<Conversion> all;
  for (const at::ScalarType dtype : {at::kChar, at::kInt})
    for (const Layout from : kLayouts)
      for (const Layout to : kLayouts)
        if (from != to && fits(from, dtype) && fits(to, dtype)) all.push_back({from, to, dtype});
  return all;
}

class CublasLtTransform : public ::testing::TestWithParam<Conversion> {};

TEST_P(CublasLtTransform, IsTheSame) {
  if (!at::hasCUDA()) GTEST_SKIP() << "no GPU found";
  at::manual_seed(11);
  const auto [from, to, dtype] = GetParam();
  int compared = 0;
  std::string refused;
  for (const auto& [rows, columns] : kSizes) {
    const LayoutShape source(from, rows, columns), target(to, rows, columns);
    const Tensor input = stored_in(from, rows, columns, dtype).cuda();
    const Tensor ours = convert_layout(input, from, to, rows, columns);
    Tensor theirs = at::zeros_like(ours);
    const cublasStatus_t status = transform(input, source, theirs, target);
    if (status != CUBLAS_STATUS_SUCCESS) {
      refused = cublasLtGetStatusString(status);
      continue;
    }
    ++compared;
    // Padding is the library's own: only the matrix is compared.
    const auto matrix = [&, rows = rows, columns = columns](const Tensor& stored) {
      return convert_layout(stored.cpu(), to, Layout::row, rows, columns);
    };
    EXPECT_TRUE(at::equal(matrix(ours), matrix(theirs))) << rows << " x " << columns;
  }
  if (compared == 0) GTEST_SKIP() << "cuBLASLt does not transform so here: " << refused;
}

std::string name_of(const ::testing::TestParamInfo<Conversion>& test) {
  const auto& [from, to, dtype] = test.param;
  return std::string(dtype == at::kChar ? "int8_" : "int32_") + to_string(from) + "_to_" +
         to_string(to);
}

INSTANTIATE_TEST_SUITE_P(All, CublasLtTransform, ::testing::ValuesIn(conversions()), name_of);

}  // namespace
}  // namespace vernier
