// The epilogue of INT8 products on the CPU against formulas in float64, and the choice of the GPU
// kernel.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/int8_gemm.h>
#include <vernier/kernels/int8_gemm_choice.h>
#include <vernier/kernels/quantize.h>

#include <cstdlib>
#include <fstream>

#include <vernier/tests/expect_error.h>
#include <vernier/tests/int8_linear_operands.h>
#include <vernier/tests/temporary_folder.h>

namespace vernier {
namespace {

using at::Tensor;
using testing::message_of;
using testing::TemporaryFolder;

Tensor scalar(float value) { return at::full({1}, value); }

/// The layer in float64.
Tensor exact(const Int8LinearOperands& o) {
  const Tensor codes = o.codes.to(at::kDouble) - (o.input_zero_point ? -37.0 : 0.0);
  Tensor y = at::mm(codes, o.weight.to(at::kDouble).t()) * o.weight_scale.to(at::kDouble) *
             o.input_scale.to(at::kDouble).unsqueeze(1);
  if (o.bias) y = y + o.bias->to(at::kDouble);
  switch (o.activation) {
    case Activation::relu:
      return at::relu(y);
    case Activation::gelu:
      return at::gelu(y);
    case Activation::gelu_tanh:
      return at::gelu(y, "tanh");
    case Activation::silu:
      return at::silu(y);
    case Activation::none:
      break;
  }
  return y;
}

constexpr Activation kActivations[] = {Activation::none, Activation::relu, Activation::gelu,
                                       Activation::gelu_tanh, Activation::silu};

TEST(Int8LinearTest, ActivationsAreTheirFormulas) {
  for (const Activation activation : kActivations) {
    for (int variant = 0; variant < kOperandVariants; ++variant) {
      SCOPED_TRACE(to_string(activation) + concat(" variant ", variant));
      const Int8LinearOperands o = random_operands(13, 1100, 77, variant, activation);
      const Tensor expected = exact(o);
      EXPECT_TRUE(at::allclose(int8_linear(o).to(at::kDouble), expected, 1e-5, 2e-6));
      EXPECT_TRUE(
          at::allclose(int8_linear(o, at::kBFloat16).to(at::kDouble), expected, 0x1p-7, 1e-5));
    }
  }
}

TEST(Int8LinearTest, CodesAreThoseOfTheRealValues) {
  for (const bool symmetric : {true, false}) {
    for (const int bits : {8, 4, 2}) {
      for (int variant = 0; variant < kOperandVariants; ++variant) {
        SCOPED_TRACE(concat(symmetric ? "symmetric " : "asymmetric ", bits, " variant ", variant));
        const Scheme scheme = symmetric ? symmetric_scheme(bits) : asymmetric_scheme(bits);
        const Int8LinearOperands o = random_operands(
            9, 1050, 130, variant, variant & 4 ? Activation::silu : Activation::none);
        const Tensor scale = scalar(6.0f / static_cast<float>(scheme.qmax()));
        std::optional<Tensor> zero_point;
        if (!symmetric) zero_point = at::full({1}, -1, at::kInt);
        const Tensor codes = int8_linear_requantize(o, scale, zero_point, scheme);
        EXPECT_TRUE(at::equal(codes, quantize(int8_linear(o), scale, zero_point, scheme)));
        EXPECT_GE(std::get<0>(at::_unique(codes)).numel(), bits == 2 ? 2 : 6);
      }
    }
  }
}

TEST(Int8LinearTest, WrongOutputScalesAreRefused) {
  const Int8LinearOperands o = random_operands(3, 4, 8, 0);
  const Scheme scheme = symmetric_scheme(8);
  EXPECT_CONTAINS(
      message_of([&] { int8_linear_requantize(o, at::ones({4}), std::nullopt, scheme); }),
      "output_scale has 4 elements");
  EXPECT_CONTAINS(
      message_of([&] { int8_linear_requantize(o, scalar(1), at::zeros({1}, at::kInt), scheme); }),
      "output_zero_point goes with an asymmetric scheme");
  EXPECT_CONTAINS(message_of([&] {
                    int8_linear_requantize(o, scalar(1), std::nullopt,
                                           symmetric_scheme(8, Granularity::per_channel));
                  }),
                  "codes for a next layer are per_tensor");
}

TEST(GemmChoiceTest, TilesFitTheShape) {
  constexpr int kMultiprocessors = 132;
  const auto chosen = [&](int64_t m, int64_t n, int64_t k) {
    return gemm_configurations()[choose_configuration(m, n, k, kMultiprocessors).index];
  };
  EXPECT_TRUE(chosen(16384, 8192, 8192).hides_epilogue);
  // Few rows: narrow tiles, so that the weight is read by many blocks.
  EXPECT_EQ(chosen(1, 4096, 4096).tile_m, 64);
  EXPECT_LT(chosen(1, 4096, 4096).tile_n, 128);
  EXPECT_LT(chosen(128, 4096, 4096).tile_n, 128);
  EXPECT_LT(chosen(1, 4096, 4096).tile_n, chosen(16, 14336, 4096).tile_n);
  // Any size has a configuration and a reason.
  for (const int64_t m : {int64_t{1}, int64_t{100000}, int64_t{1} << 31})
    EXPECT_FALSE(choose_configuration(m, 1, 1, kMultiprocessors).reason().empty());
  EXPECT_NO_THROW(choose_configuration(5, 5, 5, 1));
}

TEST(GemmChoiceTest, WhatWasTimedIsRemembered) {
  const TemporaryFolder folder;
  const auto file = folder / "deeper" / "cache.txt";
  {
    GemmTuningCache cache(file);
    EXPECT_FALSE(cache.find(1, 2, 3));
    cache.store(1, 2, 3, 1);
    cache.store(4, 5, 6, 0);
    EXPECT_EQ(cache.find(1, 2, 3), 1);
  }
  EXPECT_EQ(GemmTuningCache(file).find(4, 5, 6), 0);
  std::ofstream(file, std::ios::app) << "7 8 9 no_such_kernel\nnot numbers\n10 11\n";
  const GemmTuningCache again(file);
  EXPECT_EQ(again.find(1, 2, 3), 1);
  EXPECT_FALSE(again.find(7, 8, 9));
  // A place that cannot be written to is no error.
  GemmTuningCache nowhere("/proc/vernier/cache.txt");
  EXPECT_NO_THROW(nowhere.store(1, 2, 3, 1));
  EXPECT_EQ(nowhere.find(1, 2, 3), 1);
}

TEST(GemmChoiceTest, TheCacheStandsWhereTheEnvironmentSays) {
  ::setenv("VERNIER_CACHE_DIR", "/somewhere", 1);
  EXPECT_EQ(gemm_tuning_file("NVIDIA H200"),
            "/somewhere/int8_gemm-NVIDIA_H200-" VERNIER_VERSION ".txt");
  ::unsetenv("VERNIER_CACHE_DIR");
  ::setenv("XDG_CACHE_HOME", "/cache", 1);
  EXPECT_EQ(gemm_tuning_file("x").parent_path(), "/cache/vernier");
  ::unsetenv("XDG_CACHE_HOME");
}

}  // namespace
}  // namespace vernier
