// What the GPU tests share: a fixture that skips without a GPU, and comparison with the CPU by
// bits.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <optional>

namespace vernier::testing {

class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA()) GTEST_SKIP() << "no GPU found";
    at::manual_seed(20260401);
  }
};

inline at::Tensor gpu(const at::Tensor& tensor) { return tensor.to(at::kCUDA); }
inline std::optional<at::Tensor> gpu(const std::optional<at::Tensor>& tensor) {
  return tensor ? std::optional(gpu(*tensor)) : std::nullopt;
}

/// The bits of a floating-point tensor, so that NaN equals NaN and -0.0 differs from 0.0.
inline at::Tensor bits(const at::Tensor& tensor) {
  const at::Tensor dense = tensor.detach().cpu().contiguous();
  if (!at::isFloatingType(dense.scalar_type())) return dense;
  return dense.view(dense.element_size() == 4 ? at::kInt : at::kShort);
}

inline ::testing::AssertionResult same(const at::Tensor& cpu, const at::Tensor& from_gpu) {
  if (!from_gpu.is_cuda()) return ::testing::AssertionFailure() << "the result is not on the GPU";
  if (cpu.scalar_type() != from_gpu.scalar_type() || cpu.sizes() != from_gpu.sizes())
    return ::testing::AssertionFailure()
           << "dtype or shape: " << c10::toString(cpu.scalar_type()) << cpu.sizes() << " and "
           << c10::toString(from_gpu.scalar_type()) << from_gpu.sizes();
  const at::Tensor a = bits(cpu).flatten(), b = bits(from_gpu).flatten();
  if (at::equal(a, b)) return ::testing::AssertionSuccess();
  const at::Tensor differing = at::nonzero(a != b);
  const int64_t i = differing[0].item<int64_t>();
  return ::testing::AssertionFailure()
         << differing.size(0) << " of " << a.numel() << " differ, first [" << i << "]: CPU "
         << cpu.detach().flatten()[i].item<double>() << " (bits " << a[i].item<int64_t>()
         << "), GPU " << from_gpu.detach().flatten()[i].item<double>() << " (bits "
         << b[i].item<int64_t>() << ")";
}

}  // namespace vernier::testing
