// Quantization with a mask on the GPU against the CPU, bit for bit, and the trained quantized
// linear layer against the operations that it stands for on the same GPU.
#include <ATen/autocast_mode.h>
#include <c10/cuda/CUDAFunctions.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/masked_quantize.h>
#include <vernier/tests/gpu_compare.h>
#include <vernier/tests/linear_training_cases.h>

#include <limits>

namespace vernier {
namespace {

using at::Tensor;
using testing::gpu;
using testing::LinearInputs;
using testing::LinearResults;
using testing::LinearSetting;
using testing::same;
using OptionalTensor = std::optional<Tensor>;

constexpr at::ScalarType kElementTypes[] = {at::kFloat, at::kHalf, at::kBFloat16};

class LinearTrainingGpuTest : public testing::GpuTest {};

// ---- quantize_masked ----------------------------------------------------------------------------

struct MaskCase {
  std::vector<int64_t> shape;
  Granularity granularity;
  int64_t axis = 0;
  int64_t group = 0;
};

const std::vector<MaskCase>& mask_cases() {
  constexpr Granularity kTensor = Granularity::per_tensor, kChannel = Granularity::per_channel,
                        kToken = Granularity::per_token, kGroup = Granularity::per_group;
  static const std::vector<MaskCase> all = {{{1}, kTensor},
                                            {{7, 33}, kTensor},
                                            {{0, 8}, kTensor},
                                            {{1003, 997}, kTensor},
                                            {{1024, 2051}, kTensor},
                                            {{300, 512}, kToken},
                                            {{989, 111}, kToken},
                                            {{65, 4104}, kToken},
                                            {{70000, 8}, kToken},
                                            {{256, 768}, kChannel, 0},
                                            {{1024, 8192}, kChannel, 0},
                                            {{64, 3, 7, 7}, kChannel, 0},
                                            {{5, 64, 33}, kChannel, 1},
                                            {{2000, 48}, kChannel, 1},
                                            {{128, 4096}, kGroup, 0, 64},
                                            {{33, 96}, kGroup, 0, 3}};
  return all;
}

/// Normal values with the specials strewn in, and some next to the middle between two codes.
Tensor mixed(at::IntArrayRef sizes, at::ScalarType type) {
  const Tensor x = at::randn(sizes, at::kFloat);
  float* const values = x.data_ptr<float>();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float specials[] = {
      std::numeric_limits<float>::quiet_NaN(), kInfinity, -kInfinity, 1e30f, -0.0f, 1e-40f};
  for (int64_t i = 3, s = 0; i < x.numel(); i += 1037, ++s) values[i] = specials[s % 6];
  for (int64_t i = 5; i < x.numel(); i += 101)
    values[i] = (static_cast<float>(i % 200 - 100) + 0.5f) * 0.01f;
  return x.to(type);
}

TEST_F(LinearTrainingGpuTest, MaskedCodesAndValuesEqualTheCpus) {
  for (const MaskCase& c : mask_cases()) {
    for (const at::ScalarType type : kElementTypes) {
      const Tensor x = mixed(c.shape, type);
      for (const bool symmetric : {true, false}) {
        const int bits = symmetric ? 8 : 4;
        const Scheme scheme = symmetric ? symmetric_scheme(bits, c.granularity, c.group)
                                        : asymmetric_scheme(bits, c.granularity, c.group);
        int64_t count = 1;
        if (c.granularity == Granularity::per_channel) count = x.size(c.axis);
        if (c.granularity == Granularity::per_token) count = x.numel() / x.size(-1);
        if (c.granularity == Granularity::per_group) count = x.numel() / c.group;
        const Tensor scale = at::rand({count}, at::kFloat) * 0.01 + 0.01;
        scale.fill_(scale[0]);
        if (count > 2) scale[2] = 0.015625;  // whose reciprocal is exact
        OptionalTensor zero_point;
        if (!symmetric) zero_point = at::randint(-8, 8, {count}, at::kInt);
        for (const at::ScalarType out : {at::kChar, at::kFloat, at::kHalf, at::kBFloat16}) {
          SCOPED_TRACE(::testing::Message() << x.sizes() << " " << to_string(scheme) << " "
                                            << c10::toString(type) << " to " << c10::toString(out));
          const auto cpu = quantize_masked(x, scale, zero_point, scheme, c.axis, out);
          const auto device =
              quantize_masked(gpu(x), gpu(scale), gpu(zero_point), scheme, c.axis, out);
          EXPECT_TRUE(same(cpu.output, device.output));
          EXPECT_TRUE(same(cpu.clipped, device.clipped));
          const auto unmasked =
              quantize_masked(gpu(x), gpu(scale), gpu(zero_point), scheme, c.axis, out, false);
          EXPECT_TRUE(same(cpu.output, unmasked.output));
          EXPECT_EQ(unmasked.clipped.numel(), 0);
        }
      }
    }
  }
}

TEST_F(LinearTrainingGpuTest, TakesTwoTensorsAtOnce) {
  const Scheme scheme = symmetric_scheme(8);
  const Tensor scale = at::full({1}, 0.01, at::kFloat);
  for (const at::ScalarType first : kElementTypes) {
    for (const at::ScalarType second : kElementTypes) {
      for (const int64_t numel : {0, 5, 3000, 70000}) {
        for (const int64_t offset : {0, 1}) {
          const Tensor a = mixed({100003}, first);
          const Tensor b = mixed({numel + offset}, second);
          const Tensor device_b = gpu(b).slice(0, offset);
          const auto [p, q] = quantize_masked({gpu(a), gpu(scale), {}, scheme},
                                              {device_b, gpu(scale), {}, scheme}, at::kBFloat16);
          const auto x = quantize_masked(a, scale, {}, scheme, 0, at::kBFloat16);
          const auto y = quantize_masked(b.slice(0, offset), scale, {}, scheme, 0, at::kBFloat16);
          EXPECT_TRUE(same(x.output, p.output));
          EXPECT_TRUE(same(x.clipped, p.clipped));
          EXPECT_TRUE(same(y.output, q.output));
          EXPECT_TRUE(same(y.clipped, q.clipped));
          Tensor g = at::ones_like(a), h = at::ones({numel}, b.options());
          Tensor device_g = gpu(g), device_h = gpu(h);
          zero_clipped_(device_g, p.clipped, device_h, q.clipped);
          zero_clipped_(g, x.clipped, h, y.clipped);
          EXPECT_TRUE(same(g, device_g));
          EXPECT_TRUE(same(h, device_h));
        }
      }
    }
  }
}

TEST_F(LinearTrainingGpuTest, TakesUnalignedOperands) {
  const Scheme scheme = symmetric_scheme(8);
  const Tensor scale = at::full({1}, 0.01, at::kFloat);
  for (const at::ScalarType type : kElementTypes) {
    const Tensor x = mixed({100003}, type);
    const Tensor device = gpu(x);
    for (const int64_t offset : {1, 2, 4, 7}) {
      const Tensor part = x.slice(0, offset), device_part = device.slice(0, offset);
      const auto cpu = quantize_masked(part, scale, {}, scheme, 0, type);
      const auto result = quantize_masked(device_part, gpu(scale), {}, scheme, 0, type);
      EXPECT_TRUE(same(cpu.output, result.output));
      EXPECT_TRUE(same(cpu.clipped, result.clipped));
      // An unaligned mask and gradient.
      const Tensor padded = at::zeros({cpu.clipped.numel() + 1}, result.clipped.options());
      padded.slice(0, 1).copy_(result.clipped);
      Tensor expected = at::randn({part.numel()}).to(type);
      Tensor zeroed = at::zeros({part.numel() + 1}, device.options()).slice(0, 1);
      zeroed.copy_(expected);
      zero_clipped_(expected, cpu.clipped);
      zero_clipped_(zeroed, padded.slice(0, 1));
      EXPECT_TRUE(same(expected, zeroed));
    }
  }
}

TEST_F(LinearTrainingGpuTest, ZeroesWhatIsClippedAndNothingElse) {
  for (const at::ScalarType type : kElementTypes) {
    for (const int64_t numel : {1, 8, 31, 32, 33, 1000, 4096 * 17 + 5, 1 << 20}) {
      for (const double share : {0.0, 0.001, 0.5, 1.0}) {
        const Tensor bits = at::rand({(numel + 7) / 8 * 8}).lt(share).to(at::kByte);
        Tensor mask = at::zeros({bits.numel() / 8}, at::kByte);
        for (int j = 0; j < 8; ++j)  // bits behind the last element, too
          mask += bits.view({-1, 8}).select(1, j) * (1 << j);
        Tensor gradient = at::randn({numel}).to(type);
        gradient[0] = std::numeric_limits<float>::quiet_NaN();
        Tensor guarded = at::ones({numel + 64}, gradient.options().device(at::kCUDA));
        Tensor device = guarded.slice(0, 0, numel);
        device.copy_(gradient);
        zero_clipped_(gradient, mask);
        zero_clipped_(device, gpu(mask));
        EXPECT_TRUE(same(gradient, device)) << numel << " " << share;
        EXPECT_EQ(guarded.slice(0, numel).eq(1).sum().item<int64_t>(), 64);
      }
    }
  }
}

// ---- fake_quantized_linear ----------------------------------------------------------------------

/// As near as sums of bfloat16 operands in another order may be; zeros where the others are, where
/// they come of a mask. `roundings`: how many roundings to the results' dtype they may be apart.
::testing::AssertionResult close(const Tensor& got, const Tensor& want, double roundings = 1,
                                 bool masked = true) {
  if (got.scalar_type() != want.scalar_type() || got.sizes() != want.sizes())
    return ::testing::AssertionFailure() << "dtype or shape";
  const Tensor a = got.to(at::kDouble), b = want.to(at::kDouble);
  const double step = roundings * (want.scalar_type() == at::kFloat ? 1e-4 : 0x1p-7);
  const double length = b.numel() ? b.pow(2).mean().sqrt().item<double>() : 0;
  if (!a.sub(b).abs().le(b.abs() * step + step * length + 1e-12).all().item<bool>())
    return ::testing::AssertionFailure() << "apart by " << a.sub(b).abs().max().item<double>();
  // A sum that is not clipped is hardly ever zero.
  const int64_t differ = a.eq(0).ne(b.eq(0)).sum().item<int64_t>();
  if (masked && differ > b.numel() / 10000)
    return ::testing::AssertionFailure() << differ << " zeros differ";
  return ::testing::AssertionSuccess();
}

class NoSync {
 public:
  NoSync() { c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_ERROR); }
  ~NoSync() {
    c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_DISABLED);
  }
};

TEST_F(LinearTrainingGpuTest, GivesValuesAndGradientsOfTheComposition) {
  for (const LinearSetting& setting : testing::linear_settings()) {
    for (const at::ScalarType type : kElementTypes) {
      for (const std::vector<int64_t>& shape :
           {std::vector<int64_t>{4, 33, 64}, {257, 320}, {2, 48}, {0, 64}}) {
        for (const bool bias : {true, false}) {
          const LinearInputs inputs(shape, 72, type, bias, at::kCUDA);
          SCOPED_TRACE(::testing::Message()
                       << setting.name << " " << type << " " << inputs.x.sizes());
          const LinearResults theirs = run_composed(inputs, setting);
          LinearResults ours;
          {
            const NoSync no_sync;
            ours = run_fused(inputs, setting);
          }
          ASSERT_EQ(ours.names, theirs.names);
          for (size_t i = 0; i < ours.names.size(); ++i)
            EXPECT_TRUE(close(ours.tensors[i], theirs.tensors[i])) << ours.names[i];
        }
      }
    }
  }
}

TEST_F(LinearTrainingGpuTest, TakesSizesWithoutFactors) {
  for (const LinearSetting& setting : testing::linear_settings()) {
    if (setting.group_size() > 0) continue;
    for (const at::ScalarType type : kElementTypes) {
      const LinearInputs inputs({61, 131}, 37, type, true, at::kCUDA);
      const LinearResults ours = run_fused(inputs, setting);
      const LinearResults theirs = run_composed(inputs, setting);
      for (size_t i = 0; i < ours.names.size(); ++i)
        EXPECT_TRUE(close(ours.tensors[i], theirs.tensors[i])) << setting.name << ours.names[i];
    }
  }
}

TEST_F(LinearTrainingGpuTest, OfCodesIsTheIntegerLayerBitForBit) {
  for (const LinearSetting& setting : testing::linear_settings()) {
    if (!setting.takes_codes()) continue;
    for (const at::ScalarType type : kElementTypes) {
      const LinearInputs inputs({4, 33, 96}, 80, type, true, at::kCUDA);
      const LinearResults real = run_fused(inputs, setting);
      LinearResults codes;
      {
        const NoSync no_sync;
        codes = run_fused(inputs, setting, TrainedProduct::codes);
      }
      EXPECT_TRUE(
          at::equal(testing::bits(codes.tensors[0]), testing::bits(setting.integer_layer(inputs))))
          << setting.name;
      for (size_t i = 1; i < real.names.size(); ++i)
        EXPECT_TRUE(close(codes.tensors[i], real.tensors[i])) << setting.name << real.names[i];
    }
  }
}

TEST_F(LinearTrainingGpuTest, FollowsAutocast) {
  for (const LinearSetting& setting : testing::linear_settings()) {
    const LinearInputs inputs({4, 33, 96}, 80, at::kFloat, true, at::kCUDA);
    at::autocast::set_autocast_enabled(at::kCUDA, true);
    at::autocast::set_autocast_dtype(at::kCUDA, at::kBFloat16);
    const LinearResults ours = run_fused(inputs, setting);
    const LinearResults theirs = run_composed(inputs, setting);
    at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCUDA, false);
    EXPECT_EQ(ours.tensors[0].scalar_type(), at::kBFloat16);
    EXPECT_EQ(ours.tensors[1].scalar_type(), at::kFloat);
    for (size_t i = 0; i < ours.names.size(); ++i) {
      // Sums of bfloat16 gradients, whatever their own dtype.
      EXPECT_TRUE(close(ours.tensors[i].to(at::kBFloat16), theirs.tensors[i].to(at::kBFloat16)))
          << setting.name << ours.names[i];
    }
  }
}

TEST_F(LinearTrainingGpuTest, AgreesWithFloat64) {
  for (const LinearSetting& setting : testing::linear_settings()) {
    const LinearInputs inputs({257, 320}, 129, at::kBFloat16, true, at::kCUDA);
    const LinearResults ours = run_fused(inputs, setting);
    const auto [xq, x_passes] = setting.exact_operand(inputs.x, setting.input);
    const auto [wq, w_passes] = setting.exact_operand(inputs.w, setting.weight);
    // What the product sees: bfloat16.
    const Tensor x = xq.to(at::kBFloat16).to(at::kDouble), w = wq.to(at::kBFloat16).to(at::kDouble);
    const Tensor g = inputs.gradient.to(at::kDouble);
    // cuBLAS may add up parts of a sum in bfloat16; now and then one ends at zero.
    const auto near = [&](const Tensor& got, const Tensor& want, bool masked) {
      return close(got, want.to(at::kBFloat16), /*roundings=*/4, masked);
    };
    EXPECT_TRUE(near(ours.tensors[0], x.mm(w.t()) + inputs.b->to(at::kDouble), false))
        << setting.name;
    EXPECT_TRUE(near(ours.tensors[1], g.mm(w) * x_passes, true)) << setting.name;
    EXPECT_TRUE(near(ours.tensors[2], g.t().mm(x) * w_passes, true)) << setting.name;
    EXPECT_TRUE(near(ours.tensors[3], g.sum(0), false)) << setting.name;
  }
}

TEST_F(LinearTrainingGpuTest, RefusesOperandsOnAnotherDevice) {
  const LinearInputs inputs({8, 16}, 8, at::kFloat, true, at::kCUDA);
  const LinearSetting& setting = testing::linear_settings().front();
  const TrainedOperand input = setting.input_operand(inputs.x),
                       weight = setting.weight_operand(inputs.w);
  EXPECT_THROW(fake_quantized_linear(inputs.x, inputs.w.cpu(), {}, input, weight), Error);
  EXPECT_THROW(fake_quantized_linear(inputs.x, inputs.w, inputs.b->cpu(), input, weight), Error);
  EXPECT_THROW(fake_quantized_linear(inputs.x.cpu(), inputs.w.cpu(), {}, input, weight), Error);
}

}  // namespace
}  // namespace vernier
