// Norms and activations with codes on the GPU against the CPU: every result equal bit for bit.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <vernier/tests/row_quantize_cases.h>

#include <random>
#include <vector>

namespace vernier {
namespace {

using at::Tensor;
using testing::OptionalTensor;
using testing::random_rows;
using testing::same_bits;

constexpr at::ScalarType kElementTypes[] = {at::kFloat, at::kHalf, at::kBFloat16};
constexpr Activation kActivations[] = {Activation::relu, Activation::gelu, Activation::gelu_tanh,
                                       Activation::silu};

// Every group of threads at its smallest and largest row, rows read again, and odd ones.
constexpr int64_t kColumns[] = {1,     7,     8,     32,    100,   104,   768,  1000,
                                1024,  1032,  2048,  2056,  4096,  4104,  8192, 8200,
                                11008, 16384, 16392, 20001, 28672, 32768, 32776};

class RowQuantizeGpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA()) GTEST_SKIP() << "no GPU found";
    at::manual_seed(20260402);
  }

  bool coin() { return random_() % 2 == 0; }

  RowQuantization random_quantization(int64_t columns) {
    RowQuantization q;
    q.bits = coin() ? 8 : 4;
    q.narrow_range = coin();
    q.col32 = coin();
    q.with_output = coin();
    if (coin()) q.pre_scale = at::rand({columns}) + 0.1;
    if (coin()) {
      const float scales[] = {0.0213f, 0.25f, 3e-39f, 7.7e-3f};  // 0.25: ties; 3e-39: no reciprocal
      q.scale = at::full({1}, scales[random_() % 4], at::kFloat);
      if (coin()) q.zero_point = at::full({1}, -3, at::kInt);
    }
    return q;
  }

  std::mt19937 random_{20260402};
};

Tensor gpu(const Tensor& tensor) { return tensor.to(at::kCUDA); }
OptionalTensor gpu(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(gpu(*tensor)) : std::nullopt;
}
RowQuantization gpu(RowQuantization q) {
  q.scale = gpu(q.scale);
  q.zero_point = gpu(q.zero_point);
  q.pre_scale = gpu(q.pre_scale);
  return q;
}

/// The same values at an address that no vector load can take.
Tensor misaligned(const Tensor& tensor) {
  const Tensor storage = at::empty({tensor.numel() + 1}, tensor.options());
  Tensor view = storage.slice(0, 1).view(tensor.sizes());
  view.copy_(tensor);
  return view;
}

std::string name_of(const RowQuantization& q) {
  return concat(q.bits, " bits, narrow ", q.narrow_range, ", col32 ", q.col32, ", output ",
                q.with_output, ", pre_scale ", q.pre_scale.has_value(), ", scale ",
                q.scale ? q.scale->item<float>() : 0.0f, ", zero_point ", q.zero_point.has_value());
}

TEST_F(RowQuantizeGpuTest, Norms) {
  for (const int64_t columns : kColumns) {
    for (const at::ScalarType type : kElementTypes) {
      for (int repeat = 0; repeat < 6; ++repeat) {
        const int64_t rows = columns > 4104 ? 7 : 1 + static_cast<int64_t>(random_() % 40);
        const bool centered = repeat % 2 == 0, shifted = repeat == 5, with_residual = coin();
        const RowQuantization q = random_quantization(columns);
        SCOPED_TRACE(concat("[", rows, ", ", columns, "] ", type, centered ? " layer" : " rms",
                            ", residual ", with_residual, ", misaligned ", shifted, ", ",
                            name_of(q)));
        const Tensor x = random_rows({rows, columns}, type, repeat > 2);
        OptionalTensor w, b;
        const at::ScalarType parameter_type = coin() ? at::kFloat : type;
        if (repeat != 1) w = at::randn({columns}).to(parameter_type);
        if (repeat != 2) b = at::randn({columns}).to(parameter_type);
        NormOptions options, gpu_options;
        if (with_residual) {
          options.residual = random_rows({rows, columns}, type);
          gpu_options.residual = gpu(options.residual);
        }
        const Tensor y = shifted ? misaligned(gpu(x)) : gpu(x);
        const NormCodes cpu = centered ? layer_norm_quantize(x, w, b, q, options)
                                       : rms_norm_quantize(x, w, q, options);
        const NormCodes device = centered
                                     ? layer_norm_quantize(y, gpu(w), gpu(b), gpu(q), gpu_options)
                                     : rms_norm_quantize(y, gpu(w), gpu(q), gpu_options);
        EXPECT_TRUE(same_bits(cpu.codes, device.codes)) << "codes";
        EXPECT_TRUE(same_bits(cpu.scale, device.scale)) << "scale";
        EXPECT_TRUE(same_bits(cpu.sum, device.sum)) << "sum";
        EXPECT_TRUE(same_bits(cpu.output, device.output)) << "output";
        if (::testing::Test::HasFailure()) return;
      }
    }
  }
}

TEST_F(RowQuantizeGpuTest, ManyRowsForEachBlock) {
  for (const int64_t columns : {64, 768, 2048, 4096, 8192}) {
    const Tensor x = random_rows({(int64_t{1} << 23) / columns + 3, columns}, at::kBFloat16);
    const Tensor w = at::randn({columns}).to(at::kBFloat16);
    NormOptions options, gpu_options;
    options.residual = at::randn_like(x);
    gpu_options.residual = gpu(options.residual);
    const NormCodes cpu = rms_norm_quantize(x, w, {}, options);
    const NormCodes device = rms_norm_quantize(gpu(x), gpu(w), {}, gpu_options);
    EXPECT_TRUE(same_bits(cpu.codes, device.codes)) << columns;
    EXPECT_TRUE(same_bits(cpu.scale, device.scale)) << columns;
    EXPECT_TRUE(same_bits(cpu.sum, device.sum)) << columns;
    EXPECT_TRUE(same_bits(activation_quantize(x, Activation::silu, {}).codes,
                          activation_quantize(gpu(x), Activation::silu, {}).codes))
        << columns;
  }
}

TEST_F(RowQuantizeGpuTest, Activations) {
  for (const int64_t columns : kColumns) {
    for (const at::ScalarType type : kElementTypes) {
      for (const Activation activation : kActivations) {
        const int64_t rows = columns > 4104 ? 5 : 1 + static_cast<int64_t>(random_() % 40);
        const RowQuantization q = random_quantization(columns);
        const int form = static_cast<int>(random_() % 3);  // alone, gate and up, both in one
        const bool shifted = random_() % 5 == 0;
        SCOPED_TRACE(concat("[", rows, ", ", columns, "] ", type, " ", to_string(activation),
                            ", form ", form, ", misaligned ", shifted, ", ", name_of(q)));
        const Tensor x = random_rows({rows, form == 2 ? 2 * columns : columns}, type, coin());
        const OptionalTensor up =
            form == 1 ? OptionalTensor(random_rows({rows, columns}, type)) : std::nullopt;
        const Tensor y = shifted ? misaligned(gpu(x)) : gpu(x);
        const RowCodesResult cpu = form == 0 ? activation_quantize(x, activation, q)
                                             : gated_activation_quantize(x, up, activation, q);
        const RowCodesResult device =
            form == 0 ? activation_quantize(y, activation, gpu(q))
                      : gated_activation_quantize(y, gpu(up), activation, gpu(q));
        EXPECT_TRUE(same_bits(cpu.codes, device.codes)) << "codes";
        EXPECT_TRUE(same_bits(cpu.scale, device.scale)) << "scale";
        EXPECT_TRUE(same_bits(cpu.output, device.output)) << "output";
        if (::testing::Test::HasFailure()) return;
      }
    }
  }
}

TEST_F(RowQuantizeGpuTest, FunctionsOverAllExponents) {
  // Random bit patterns, and all of half precision: the functions themselves, through the output.
  RowQuantization q;
  q.with_output = true;
  const Tensor bits = at::randint(-(int64_t{1} << 31), int64_t{1} << 31, {512, 8192}, at::kInt);
  const Tensor near = at::randn({512, 8192}) * 8;
  for (const Activation activation : kActivations) {
    for (const Tensor& x :
         {bits.view(at::kFloat), near, at::arange(-32768, 32768, at::kShort).view(at::kHalf),
          at::arange(-32768, 32768, at::kShort).view(at::kBFloat16)}) {
      const RowCodesResult cpu = activation_quantize(x, activation, q);
      const RowCodesResult device = activation_quantize(gpu(x), activation, gpu(q));
      EXPECT_TRUE(same_bits(cpu.output, device.output)) << to_string(activation);
      EXPECT_TRUE(same_bits(cpu.codes, device.codes)) << to_string(activation);
    }
  }
}

TEST_F(RowQuantizeGpuTest, EmptyShapes) {
  for (const std::vector<int64_t>& sizes : std::vector<std::vector<int64_t>>{{0, 8}, {3, 0}}) {
    const Tensor x = at::randn(sizes);
    EXPECT_TRUE(same_bits(rms_norm_quantize(x, std::nullopt, {}).scale,
                          rms_norm_quantize(gpu(x), std::nullopt, {}).scale));
    EXPECT_TRUE(same_bits(activation_quantize(x, Activation::gelu, {}).scale,
                          activation_quantize(gpu(x), Activation::gelu, {}).scale));
  }
}

}  // namespace
}  // namespace vernier
