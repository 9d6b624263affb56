// Fake-quantization on the GPU against the CPU: outputs, scales and the input's gradient equal bit
// for bit, sums inside the bound of fake_quantize.h.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/fake_quantize.h>
#include <vernier/tests/gpu_compare.h>

#include <limits>
#include <vector>

namespace vernier {
namespace {

using at::Tensor;
using testing::gpu;
using testing::same;
using OptionalTensor = std::optional<Tensor>;

constexpr at::ScalarType kElementTypes[] = {at::kFloat, at::kHalf, at::kBFloat16};
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

class FakeQuantizeGpuTest : public testing::GpuTest {};

struct Case {
  std::vector<int64_t> shape;
  Granularity granularity;
  int64_t axis = 0;
  int64_t group = 0;
};

const std::vector<Case>& cases() {
  constexpr Granularity kTensor = Granularity::per_tensor, kChannel = Granularity::per_channel,
                        kToken = Granularity::per_token, kGroup = Granularity::per_group;
  static const std::vector<Case> all = {{{1}, kTensor},
                                        {{7, 33}, kTensor},
                                        {{1003, 997}, kTensor},
                                        {{4096, 2051}, kTensor},
                                        {{19, 1}, kToken},
                                        {{989, 111}, kToken},
                                        {{300, 512}, kToken},
                                        {{65, 4104}, kToken},
                                        {{17, 11008}, kToken},
                                        {{9, 16391}, kToken},
                                        {{40, 32768}, kToken},
                                        {{3, 40000}, kToken},
                                        {{2, 40001}, kToken},
                                        {{70000, 8}, kToken},
                                        {{3300, 2056}, kToken},
                                        {{430, 16392}, kToken},
                                        {{64, 3, 7, 7}, kChannel, 0},
                                        {{256, 768}, kChannel, 0},
                                        {{1024, 8192}, kChannel, 0},
                                        {{5, 64, 33}, kChannel, 1},
                                        {{5, 6, 4096}, kChannel, 1},
                                        {{9, 16, 56, 56}, kChannel, 1},
                                        {{2000, 3}, kChannel, 1},
                                        {{50000, 48}, kChannel, 1},
                                        {{700, 264}, kChannel, 1},
                                        {{300, 1000}, kChannel, 1},
                                        {{300, 40, 7}, kChannel, -2},
                                        {{4, 5, 6}, kChannel, 2},
                                        {{128, 4096}, kGroup, 0, 32},
                                        {{128, 4096}, kGroup, 0, 64},
                                        {{128, 4096}, kGroup, 0, 128},
                                        {{33, 1024}, kGroup, 0, 256},
                                        {{33, 96}, kGroup, 0, 3},
                                        {{33, 99}, kGroup, 0, 33}};
  return all;
}

/// Normal values with the specials of every kind strewn in, and a dead row.
Tensor mixed(at::IntArrayRef sizes, at::ScalarType type) {
  const Tensor x = at::randn(sizes, at::kFloat);
  float* const values = x.data_ptr<float>();
  const float specials[] = {kNaN, kInfinity, -kInfinity, 0.0f, -0.0f, 1e-40f};
  for (int64_t i = 3, s = 0; i < x.numel(); i += 1037, ++s) values[i] = specials[s % 6];
  if (x.size(0) > 4) x.select(0, 4).zero_();
  return x.to(type);
}

TEST_F(FakeQuantizeGpuTest, Dynamic) {
  for (const at::ScalarType type : kElementTypes) {
    for (const Case& c : cases()) {
      for (const int bits : {8, 4}) {
        const Scheme scheme = symmetric_scheme(bits, c.granularity, c.group);
        SCOPED_TRACE(concat(to_string(scheme), at::IntArrayRef(c.shape), " axis ", c.axis, type));
        const Tensor x = mixed(c.shape, type);
        const auto [output, scale] = fake_quantize_dynamic(x, scheme, c.axis);
        const auto [gpu_output, gpu_scale] = fake_quantize_dynamic(gpu(x), scheme, c.axis);
        EXPECT_TRUE(same(scale, gpu_scale));
        EXPECT_TRUE(same(output, gpu_output));
      }
    }
  }
}

struct Learned {
  Tensor output, input, scale, zero_point;
};

Learned learned(const Tensor& x, const Tensor& scale, const OptionalTensor& zero_point,
                const Scheme& scheme, int64_t axis, const Tensor& gradient) {
  const Tensor leaf = x.detach().requires_grad_(true);
  const Tensor s = scale.detach().requires_grad_(true);
  OptionalTensor z;
  if (zero_point) z = zero_point->detach().requires_grad_(true);
  const Tensor output = fake_quantize_learned(leaf, s, z, scheme, axis, 0.37);
  output.backward(gradient);
  return {output, leaf.grad(), s.grad(), z ? z->grad() : Tensor()};
}

void expect_same_learning(const Tensor& x, const Tensor& x_gpu, const Tensor& gradient,
                          const Scheme& scheme, int64_t axis) {
  SCOPED_TRACE(concat(to_string(scheme), x.sizes(), " axis ", axis, x.scalar_type()));
  Scheme dynamic = symmetric_scheme(scheme.bits, scheme.granularity, scheme.group_size);
  // Half the maximum: some elements are clipped.
  const Tensor scale = fake_quantize_dynamic(x, dynamic, axis).second * 0.5f;
  OptionalTensor zero_point;
  if (!scheme.symmetric) zero_point = at::rand_like(scale) * 5.0f - 2.5f;
  const Tensor g_gpu = gpu(gradient), s_gpu = gpu(scale);
  const OptionalTensor z_gpu = gpu(zero_point);
  const Learned cpu = learned(x, scale, zero_point, scheme, axis, gradient);
  const Learned first = learned(x_gpu, s_gpu, z_gpu, scheme, axis, g_gpu);
  EXPECT_TRUE(same(cpu.output, first.output));
  EXPECT_TRUE(same(cpu.input, first.input));

  // The bound with the largest term that there is. sum |g| of each scale, times 0.37, is what a
  // learned scale gets from elements that are all clipped at the code 1.
  Scheme two_bits = dynamic;
  two_bits.bits = 2;
  const Tensor total = learned(at::full_like(x, 1e30f, at::kFloat), at::ones_like(scale),
                               std::nullopt, two_bits, axis, gradient.to(at::kFloat).abs())
                           .scale.to(at::kDouble);
  const double largest = scheme.symmetric ? 127 : 255;
  const Tensor bound = total * (std::exp2(-14) + 41 * std::exp2(-24) * largest) + 1e-12;
  EXPECT_TRUE(((first.scale.cpu().to(at::kDouble) - cpu.scale.to(at::kDouble)).abs() <= bound)
                  .all()
                  .item<bool>());
  if (zero_point) {
    const Tensor zero_bound = total * scale.to(at::kDouble) * 41 * std::exp2(-24) + 1e-12;
    EXPECT_TRUE(((first.zero_point.cpu().to(at::kDouble) - cpu.zero_point.to(at::kDouble)).abs() <=
                 zero_bound)
                    .all()
                    .item<bool>());
  }
  // Equal calls, equal bits.
  const Learned second = learned(x_gpu, s_gpu, z_gpu, scheme, axis, g_gpu);
  EXPECT_TRUE(same(first.scale.cpu(), second.scale));
}

TEST_F(FakeQuantizeGpuTest, Learned) {
  for (const at::ScalarType type : kElementTypes) {
    for (const Case& c : cases()) {
      const Tensor x = mixed(c.shape, type), gradient = at::randn(c.shape).to(type);
      expect_same_learning(x, gpu(x), gradient, symmetric_scheme(8, c.granularity, c.group),
                           c.axis);
      expect_same_learning(x, gpu(x), gradient, asymmetric_scheme(4, c.granularity, c.group),
                           c.axis);
    }
  }
}

TEST_F(FakeQuantizeGpuTest, UnalignedInputs) {
  for (const at::ScalarType type : kElementTypes) {
    const Tensor base = mixed({64 * 1024 + 3}, type);
    const auto view = [](const Tensor& t) { return t.narrow(0, 3, 64 * 1024).view({64, 1024}); };
    const Tensor gradient = at::randn({64, 1024}).to(type);
    for (const Scheme& scheme : {symmetric_scheme(8), symmetric_scheme(8, Granularity::per_channel),
                                 symmetric_scheme(8, Granularity::per_group, 64)}) {
      expect_same_learning(view(base), view(gpu(base)), gradient, scheme, 0);
      EXPECT_TRUE(same(fake_quantize_dynamic(view(base), scheme).first,
                       fake_quantize_dynamic(view(gpu(base)), scheme).first));
    }
  }
}

TEST_F(FakeQuantizeGpuTest, EmptyTensors) {
  const auto [output, scale] =
      fake_quantize_dynamic(gpu(at::empty({3, 0})), symmetric_scheme(8, Granularity::per_token));
  EXPECT_TRUE(same(at::ones({3}), scale));
  const Learned result =
      learned(gpu(at::empty({0, 3})), gpu(at::ones({3})), gpu(at::zeros({3})),
              asymmetric_scheme(8, Granularity::per_channel), 1, gpu(at::empty({0, 3})));
  EXPECT_TRUE(same(at::zeros({3}), result.scale));
}

}  // namespace
}  // namespace vernier
