// The GPU kernels against the CPU ones, through the public API: every result equal bit for bit.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/fake_quantize.h>
#include <vernier/kernels/int8_gemm.h>
#include <vernier/kernels/int8_gemm_device.h>
#include <vernier/kernels/quantize.h>
#include <vernier/kernels/statistics.h>
#include <vernier/tests/gpu_compare.h>

#include <functional>
#include <limits>
#include <thread>
#include <vector>

namespace vernier {
namespace {

using at::Tensor;
using testing::bits;
using testing::gpu;
using testing::same;
using OptionalTensor = std::optional<Tensor>;
using View = std::function<Tensor(const Tensor&)>;

constexpr at::ScalarType kElementTypes[] = {at::kFloat, at::kHalf, at::kBFloat16};
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kSmallestDenormal = std::numeric_limits<float>::denorm_min();
constexpr float kLargest = std::numeric_limits<float>::max();

class KernelsGpuTest : public testing::GpuTest {};

/// n floats of random bits: normal, denormal, huge, NaN, infinite.
Tensor random_bits(int64_t n) {
  return at::randint(-(int64_t{1} << 31), int64_t{1} << 31, {n}, at::kInt).view(at::kFloat);
}

/// Every value of a 16-bit type.
Tensor all_patterns(at::ScalarType type) {
  return at::arange(-32768, 32768, at::kShort).view(type);
}

Tensor scalar(float value) { return at::full({1}, value, at::kFloat); }

/// Normal values with the specials of every kind strewn in.
Tensor mixed(at::IntArrayRef sizes, at::ScalarType type) {
  const Tensor x = at::randn(sizes, at::kFloat);
  float* const values = x.data_ptr<float>();
  const float specials[] = {kNaN, kInfinity, -kInfinity, 0.0f, -0.0f, 1e-40f, -kSmallestDenormal};
  for (int64_t i = 3, s = 0; i < x.numel(); i += 37, ++s) values[i] = specials[s % 7];
  return x.to(type);
}

OptionalTensor random_zero_point(const Scheme& scheme, int64_t count) {
  if (scheme.symmetric) return std::nullopt;
  return at::randint(scheme.qmin(), scheme.qmax() + 1, {count}, at::kInt);
}

Tensor straight_through(const Tensor& x, const Tensor& scale, const OptionalTensor& zero_point,
                        const Scheme& scheme, int64_t axis, const Tensor& gradient) {
  Tensor leaf = x.detach().requires_grad_(true);
  fake_quantize(leaf, scale, zero_point, scheme, axis).backward(gradient);
  return leaf.grad();
}

/// quantize and fake_quantize forward, and where asked dequantize and backward, of view(base).
void expect_same_codes(
    const Tensor& base, const Tensor& scale, const OptionalTensor& zero_point, const Scheme& scheme,
    int64_t axis = 0, bool all = true, const View& view = [](const Tensor& t) { return t; }) {
  SCOPED_TRACE(concat(to_string(scheme), ", axis ", axis, ", ", c10::toString(base.scalar_type()),
                      base.sizes(), ", first scale ",
                      scale.numel() ? scale.flatten()[0].item<float>() : 0.0f));
  const Tensor x = view(base), x_gpu = view(gpu(base)), s = gpu(scale);
  const OptionalTensor z = gpu(zero_point);
  const Tensor codes = quantize(x, scale, zero_point, scheme, axis);
  const Tensor codes_gpu = quantize(x_gpu, s, z, scheme, axis);
  EXPECT_TRUE(same(codes, codes_gpu)) << "quantize";
  EXPECT_TRUE(same(fake_quantize(x, scale, zero_point, scheme, axis),
                   fake_quantize(x_gpu, s, z, scheme, axis)))
      << "fake_quantize";
  if (!all) return;
  for (const at::ScalarType type : kElementTypes) {
    EXPECT_TRUE(same(dequantize(codes, scale, zero_point, scheme, axis, type),
                     dequantize(codes_gpu, s, z, scheme, axis, type)))
        << "dequantize to " << c10::toString(type);
  }
  const Tensor gradient = at::randn(x.sizes(), at::kFloat).to(x.scalar_type());
  EXPECT_TRUE(same(straight_through(x, scale, zero_point, scheme, axis, gradient),
                   straight_through(x_gpu, s, z, scheme, axis, gpu(gradient))))
      << "fake_quantize backward";
}

// ---- Codes --------------------------------------------------------------------------------------

TEST_F(KernelsGpuTest, RandomBitPatterns) {
  const float scales[] = {0.0371f, 1.0f,    1e-40f,         kSmallestDenormal,
                          3e38f,   7.3e-5f, 1.17549435e-38f};
  const Scheme symmetric = symmetric_scheme(8), asymmetric = asymmetric_scheme(8),
               narrow = symmetric_scheme(4);
  for (int chunk = 0; chunk < 10; ++chunk) {
    const Tensor x = random_bits(10'000'000);
    for (int i = 0; i < 3; ++i) {
      const Tensor scale = scalar(scales[(3 * chunk + i) % std::size(scales)]);
      expect_same_codes(x, scale, std::nullopt, i == 2 ? narrow : symmetric, 0, chunk < 3);
      if (i == 0) {
        expect_same_codes(x, scale, at::full({1}, chunk * 25 - 128, at::kInt), asymmetric, 0,
                          chunk < 3);
      }
    }
    if (HasFailure()) return;
  }
}

TEST_F(KernelsGpuTest, ExactHalvesAndTheirNeighbours) {
  // Row r holds (k + 0.5) * scale[r] and the floats next to it, for k from -300 to 299: ties, and
  // what is nearly one.
  const int64_t rows = 8000;
  const Tensor exponent = at::randint(-149, 110, {rows}, at::kInt).to(at::kFloat);
  Tensor scale = at::exp2(exponent) * (at::rand({rows}, at::kFloat) + 1.0f);
  scale.slice(0, 0, 300).copy_(at::exp2(exponent.slice(0, 0, 300)));  // powers of two: exact ties
  scale = scale.clamp_min(kSmallestDenormal);
  const Tensor half = at::arange(-300, 300, at::kFloat) + 0.5f;
  const Tensor tie = scale.unsqueeze(1) * half;
  const Tensor x = at::cat(
      {tie, at::nextafter(tie, scalar(kInfinity)), at::nextafter(tie, scalar(-kInfinity))}, 1);
  const Scheme symmetric = symmetric_scheme(8, Granularity::per_channel);
  const Scheme asymmetric = asymmetric_scheme(8, Granularity::per_channel);
  expect_same_codes(x, scale, std::nullopt, symmetric);
  expect_same_codes(x, scale, random_zero_point(asymmetric, rows), asymmetric);

  // The same ties by hand: half to even, whatever the sign.
  const Tensor by_hand = at::arange(-4, 4, at::kFloat) + 0.5f;
  const Tensor codes = quantize(gpu(by_hand), gpu(scalar(1)), std::nullopt, symmetric_scheme(8));
  const std::vector<int> expected = {-4, -2, -2, 0, 0, 2, 2, 4};
  EXPECT_TRUE(same(at::tensor(expected).to(at::kChar), codes));
}

TEST_F(KernelsGpuTest, SignedZerosNaNAndInfinity) {
  const std::vector<float> values = {0.0f,       -0.0f,  kNaN,    -kNaN,    kInfinity,
                                     -kInfinity, 1e-40f, -1e-40f, kLargest, -kLargest};
  for (const at::ScalarType type : kElementTypes) {
    const Tensor x = at::tensor(values).to(type);
    for (const float scale : {1.0f, 1e-40f, 3e38f}) {
      expect_same_codes(x, scalar(scale), std::nullopt, symmetric_scheme(8));
      expect_same_codes(x, scalar(scale), at::full({1}, -128, at::kInt), asymmetric_scheme(8));
    }
  }
}

TEST_F(KernelsGpuTest, EveryHalfAndBfloat16Value) {
  for (const at::ScalarType type : {at::kHalf, at::kBFloat16}) {
    const Tensor x = all_patterns(type);
    for (const float scale :
         {1.0f, 0.5f, 0.0123f, 6e-8f, 1e-40f, kSmallestDenormal, 500.0f, 3e38f}) {
      for (const int bits_of_code : {8, 4, 2}) {
        expect_same_codes(x, scalar(scale), std::nullopt, symmetric_scheme(bits_of_code));
        const Scheme asymmetric = asymmetric_scheme(bits_of_code);
        expect_same_codes(x, scalar(scale), random_zero_point(asymmetric, 1), asymmetric);
      }
    }
  }
}

TEST_F(KernelsGpuTest, EveryGranularityAtOddSizes) {
  const std::vector<std::vector<int64_t>> shapes = {
      {1}, {19}, {99}, {989, 111}, {7, 19, 5}, {3, 4, 64}, {111, 989}, {2, 3, 4, 96}};
  const auto check = [](const Tensor& x, Scheme scheme, int64_t count, int64_t axis) {
    const Tensor scale = at::rand({count}, at::kFloat) * 0.1f + 1e-3f;
    expect_same_codes(x, scale, std::nullopt, scheme, axis);
    scheme.symmetric = scheme.narrow_range = false;
    expect_same_codes(x, scale, random_zero_point(scheme, count), scheme, axis);
  };
  for (const at::ScalarType type : kElementTypes) {
    for (const auto& shape : shapes) {
      const Tensor x = mixed(shape, type);
      const int64_t columns = x.size(-1);
      check(x, symmetric_scheme(8), 1, 0);
      for (int64_t axis = -1; axis < x.dim(); ++axis)
        check(x, symmetric_scheme(8, Granularity::per_channel), x.size(axis), axis);
      check(x, symmetric_scheme(8, Granularity::per_token), x.numel() / columns, 0);
      for (const int64_t group : {1, 3, 32, 37}) {
        if (columns % group == 0)
          check(x, symmetric_scheme(4, Granularity::per_group, group), x.numel() / group, 0);
      }
    }
  }
}

TEST_F(KernelsGpuTest, StridedAndUnalignedInputs) {
  const std::vector<View> views = {[](const Tensor& t) { return t.t(); },
                                   [](const Tensor& t) { return t.slice(1, 3, 90, 2); },
                                   [](const Tensor& t) {
                                     return t.flatten().narrow(0, 1, t.numel() - 5).view({-1, 1});
                                   },
                                   [](const Tensor& t) {
                                     return t.flatten().narrow(0, 3, 128 * 96).view({128, 96});
                                   },
                                   [](const Tensor& t) {
                                     return t.select(0, 1).expand({50, t.size(1)});
                                   }};
  for (const at::ScalarType type : kElementTypes) {
    const Tensor base = mixed({129, 99}, type);
    for (const View& view : views) {
      const int64_t rows = view(base).size(0);
      const Scheme scheme = symmetric_scheme(8, Granularity::per_channel);
      expect_same_codes(base, scalar(0.02f), std::nullopt, symmetric_scheme(8), 0, true, view);
      expect_same_codes(base, at::rand({rows}, at::kFloat) + 0.01f, std::nullopt, scheme, 0, true,
                        view);
      const Tensor x = view(base), x_gpu = view(gpu(base));
      const auto [codes, scale] = quantize_per_token(x, symmetric_scheme(8));
      const auto [codes_gpu, scale_gpu] = quantize_per_token(x_gpu, symmetric_scheme(8));
      EXPECT_TRUE(same(codes, codes_gpu));
      EXPECT_TRUE(same(scale, scale_gpu));
      EXPECT_TRUE(same(vernier::histogram(x).counts, vernier::histogram(x_gpu).counts));
      EXPECT_TRUE(same(channel_range(x), channel_range(x_gpu)));
    }
  }
}

TEST_F(KernelsGpuTest, PerTokenCodesAndScales) {
  const std::vector<std::vector<int64_t>> shapes = {
      {1, 1},       {19, 1},      {989, 99},   {1000, 111},  {5, 19},      {300, 512}, {257, 768},
      {33, 4096},   {65, 4104},   {17, 11008}, {9, 16391},   {200, 32768}, {3, 40000}, {2, 40001},
      {1, 1000003}, {1, 2097152}, {2, 3, 64},  {131, 20000}, {140, 33333}, {70000, 8}};
  for (const at::ScalarType type : kElementTypes) {
    for (const auto& shape : shapes) {
      Tensor x = mixed(shape, type);
      Tensor rows = x.view({-1, x.size(-1)});
      if (rows.size(0) >= 5) {
        rows[0].zero_();
        rows[1].fill_(kNaN);
        rows[2].fill_(-kInfinity);
        rows[3].mul_(1e-42);  // its scale is denormal, or none and so 1
        rows[4].mul_(1e5);
      }
      for (const Scheme& scheme : {symmetric_scheme(8), symmetric_scheme(4)}) {
        SCOPED_TRACE(concat(c10::toString(type), x.sizes(), " int", scheme.bits));
        const auto [codes, scale] = quantize_per_token(x, scheme);
        const auto [codes_gpu, scale_gpu] = quantize_per_token(gpu(x), scheme);
        EXPECT_TRUE(same(codes, codes_gpu));
        EXPECT_TRUE(same(scale, scale_gpu));
        EXPECT_TRUE(same(scale, per_token_scale(gpu(x), scheme)));
      }
    }
  }
  // Random bits: rows whose maximum may be any finite float.
  const Tensor x = random_bits(10'000'000).view({-1, 40});
  const auto [codes, scale] = quantize_per_token(x, symmetric_scheme(8));
  const auto [codes_gpu, scale_gpu] = quantize_per_token(gpu(x), symmetric_scheme(8));
  EXPECT_TRUE(same(codes, codes_gpu));
  EXPECT_TRUE(same(scale, scale_gpu));
}

// ---- Statistics ---------------------------------------------------------------------------------

void expect_same_histogram(const HistogramTensors& cpu, const HistogramTensors& from_gpu) {
  EXPECT_TRUE(same(cpu.counts, from_gpu.counts)) << "counts";
  EXPECT_TRUE(same(cpu.range, from_gpu.range)) << "range";
  EXPECT_TRUE(same(cpu.tallies, from_gpu.tallies)) << "tallies";
}

TEST_F(KernelsGpuTest, Histograms) {
  std::vector<Tensor> inputs = {at::empty({0}, at::kFloat),
                                at::zeros({99}, at::kFloat),
                                -at::zeros({99}, at::kFloat),
                                at::full({19}, kNaN, at::kFloat),
                                at::full({19}, -kInfinity, at::kFloat),
                                scalar(1.0f),
                                scalar(-kSmallestDenormal),
                                scalar(kLargest),
                                at::full({5'000'011}, -3.0f, at::kFloat),  // all in one bin
                                at::rand({989}, at::kFloat) * 1e-39f,
                                at::rand({989}, at::kFloat) + 1.0f,  // no zero, one sign
                                at::exp2(at::arange(-149, 128, at::kFloat)),
                                random_bits(10'000'000),
                                random_bits(1'000'003).narrow(0, 1, 1'000'001)};
  for (const at::ScalarType type : {at::kHalf, at::kBFloat16}) {
    inputs.push_back(all_patterns(type));
    inputs.push_back(mixed({989, 111}, type));
  }
  inputs.push_back(mixed({3, 1'000'003}, at::kFloat));
  for (size_t i = 0; i < inputs.size(); ++i) {
    for (const int64_t bins : {4096, 4, 16, 8192, 65536}) {
      SCOPED_TRACE(concat("input ", i, ", ", bins, " bins"));
      expect_same_histogram(vernier::histogram(inputs[i], bins),
                            vernier::histogram(gpu(inputs[i]), bins));
    }
  }
}

/// Counts at 2^by times the bin width.
Tensor coarsened(const Tensor& counts, int64_t by) {
  const int64_t bins = counts.size(1);
  while (by > 0 && (int64_t{1} << by) > bins) --by;
  const Tensor merged = counts.view({2, bins >> by, int64_t{1} << by}).sum(-1);
  return at::constant_pad_nd(merged, {0, bins - (bins >> by)});
}

TEST_F(KernelsGpuTest, HistogramsKnowNoOrderAndAddUp) {
  Tensor x = at::randn({3'000'017}, at::kFloat) * at::exp2(at::randn({3'000'017}, at::kFloat) * 4);
  x.slice(0, 0, 500).copy_(mixed({500}, at::kFloat));
  const HistogramTensors whole = vernier::histogram(x);
  const Tensor shuffled = gpu(x).index_select(0, gpu(at::randperm(x.numel(), at::kLong)));
  expect_same_histogram(whole, vernier::histogram(shuffled));

  Tensor counts = at::zeros_like(whole.counts), tallies = at::zeros({3}, at::kLong);
  const int64_t exponent = whole.tallies[0].item<int64_t>();
  int64_t begin = 0;
  for (const int64_t length : {1, 19, 99, 989, 111'111, 1'000'000, 1'887'798}) {
    const HistogramTensors part = vernier::histogram(shuffled.narrow(0, begin, length));
    const Tensor part_tallies = part.tallies.cpu();
    counts += coarsened(part.counts.cpu(), exponent - part_tallies[0].item<int64_t>());
    tallies += part_tallies.slice(0, 1);
    begin += length;
  }
  ASSERT_EQ(begin, x.numel());
  EXPECT_TRUE(at::equal(counts, whole.counts));
  EXPECT_TRUE(at::equal(tallies, whole.tallies.slice(0, 1)));
}

TEST_F(KernelsGpuTest, ChannelRanges) {
  const std::vector<std::vector<int64_t>> shapes = {
      {1},       {19, 1},     {1, 19},     {989, 99},      {1003, 111},  {2, 3, 64},
      {7, 4096}, {4099, 768}, {5, 100001}, {1'000'003, 1}, {300'001, 8}, {0, 7}};
  for (const at::ScalarType type : kElementTypes) {
    for (const auto& shape : shapes) {
      SCOPED_TRACE(concat(c10::toString(type), at::IntArrayRef(shape)));
      Tensor x = mixed(shape, type);
      if (x.dim() == 2 && x.size(1) > 6) {
        x.select(1, 0).fill_(-0.0f);
        x.select(1, 1).fill_(kNaN);
        x.select(1, 2).fill_(kInfinity);
        x.select(1, 3).abs_();
        x.select(1, 4).abs_().neg_();
      }
      EXPECT_TRUE(same(channel_range(x), channel_range(gpu(x))));
    }
  }
  const Tensor x = random_bits(9'999'990).view({-1, 111});
  EXPECT_TRUE(same(channel_range(x), channel_range(gpu(x))));
}

TEST_F(KernelsGpuTest, MoreThanTwoToTheThirtyOneElements) {
  // Equal rows, so that one row on the CPU says what the rest has to be.
  constexpr int64_t kRows = 32769, kColumns = 65536;
  const Tensor row = all_patterns(at::kHalf).view({1, kColumns});
  const Tensor column_scale = at::rand({kColumns}, at::kFloat) + 1e-3f;
  const Scheme tensor_scheme = symmetric_scheme(8);
  const Scheme column_scheme = symmetric_scheme(8, Granularity::per_channel);
  try {
    const Tensor x = gpu(row).expand({kRows, kColumns}).contiguous();
    const auto all_rows = [](const Tensor& result, const Tensor& expected) {
      return (result == gpu(expected)).all().item<bool>();
    };
    EXPECT_TRUE(all_rows(quantize(x, gpu(scalar(0.7f)), std::nullopt, tensor_scheme),
                         quantize(row, scalar(0.7f), std::nullopt, tensor_scheme)));
    EXPECT_TRUE(all_rows(quantize(x, gpu(column_scale), std::nullopt, column_scheme, 1),
                         quantize(row, column_scale, std::nullopt, column_scheme, 1)));
    const auto [codes, scale] = quantize_per_token(x, tensor_scheme);
    const auto [row_codes, row_scale] = quantize_per_token(row, tensor_scheme);
    EXPECT_TRUE(all_rows(codes, row_codes));
    EXPECT_TRUE(all_rows(scale, row_scale));
    const HistogramTensors one = vernier::histogram(row), many = vernier::histogram(x);
    EXPECT_TRUE(same(one.counts * kRows, many.counts));
    EXPECT_TRUE(same(one.tallies.slice(0, 1) * kRows, many.tallies.slice(0, 1)));
    EXPECT_TRUE(same(one.range, many.range));
    EXPECT_TRUE(same(channel_range(row), channel_range(x)));
  } catch (const c10::OutOfMemoryError&) {
    GTEST_SKIP() << "the GPU has too little free memory";
  }
}

// ---- INT8 products ------------------------------------------------------------------------------

Tensor random_codes(at::IntArrayRef sizes) { return at::randint(-128, 128, sizes, at::kChar); }

void expect_same_product(const Tensor& codes, const Tensor& weight) {
  SCOPED_TRACE(concat("codes ", codes.sizes(), ", weight ", weight.sizes()));
  const Tensor expected = int8_matmul(codes, weight);
  const Tensor a = gpu(codes), b = gpu(weight);
  EXPECT_TRUE(same(expected, int8_matmul(a, b))) << "fast path";
  Tensor reference = at::full_like(gpu(expected), -1);
  cuda::int8_matmul_reference(a.const_data_ptr<int8_t>(), b.const_data_ptr<int8_t>(), a.size(0),
                              b.size(0), a.size(1), reference.data_ptr<int32_t>(), nullptr);
  EXPECT_TRUE(same(expected, reference)) << "reference";
}

TEST_F(KernelsGpuTest, ProductsOfEveryShape) {
  for (const int64_t m : {1, 2, 3, 16, 17, 64, 129}) {
    for (const int64_t n : {1, 3, 4, 16, 19, 100, 256}) {
      for (const int64_t k : {1, 3, 4, 15, 16, 17, 64, 111, 1024})
        expect_same_product(random_codes({m, k}), random_codes({n, k}));
    }
    if (HasFailure()) return;
  }
  expect_same_product(random_codes({512, 768}), random_codes({3072, 768}));
  expect_same_product(random_codes({989, 999}), random_codes({1001, 999}));
  expect_same_product(random_codes({33, 11008}), random_codes({515, 11008}));
}

TEST_F(KernelsGpuTest, ProductsOfExtremeCodes) {
  for (const int64_t k : {39999, 40000}) {
    for (const int a : {-128, -127, 127}) {
      for (const int b : {-128, -127, 127})
        expect_same_product(at::full({17, k}, a, at::kChar), at::full({19, k}, b, at::kChar));
    }
    expect_same_product(random_codes({33, k}), random_codes({48, k}));
  }
  for (const int a : {-127, 127})
    expect_same_product(at::full({3, kMaxInt8GemmK}, a, at::kChar),
                        at::full({32, kMaxInt8GemmK}, 127, at::kChar));
}

TEST_F(KernelsGpuTest, ProductsOfUnalignedOperands) {
  for (const int64_t offset : {1, 4, 8, 16}) {
    const auto view = [&](const Tensor& t) {
      return t.flatten().narrow(0, offset, 64 * 128).view({64, 128});
    };
    const Tensor codes = random_codes({65, 128}), weight = random_codes({65, 128});
    EXPECT_TRUE(same(int8_matmul(view(codes), view(weight)),
                     int8_matmul(view(gpu(codes)), view(gpu(weight)))));
    EXPECT_TRUE(same(int8_matmul(codes, weight.t().contiguous().t()),
                     int8_matmul(gpu(codes), gpu(weight.t().contiguous()).t())));
  }
}

TEST_F(KernelsGpuTest, ProductsFromSeveralThreads) {
  const Tensor codes = random_codes({64, 320}), weight = random_codes({96, 320});
  std::vector<Tensor> results(64);
  std::vector<std::thread> threads;
  const Tensor a = gpu(codes), b = gpu(weight);
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 8; ++i)
        results[8 * t + i] = int8_matmul(a.narrow(0, 0, 8 * t + i / 4 + 1), b);
    });
  }
  for (std::thread& thread : threads) thread.join();
  const Tensor expected = int8_matmul(codes, weight);
  for (const Tensor& result : results)
    EXPECT_TRUE(same(expected.narrow(0, 0, result.size(0)), result));
}

TEST_F(KernelsGpuTest, LinearLayers) {
  const int64_t sizes[][3] = {
      {1, 16, 64}, {3, 19, 99}, {111, 1, 989}, {17, 100, 111}, {128, 256, 512}};
  for (const auto& [m, n, k] : sizes) {
    const Tensor codes = random_codes({m, k}), weight = at::randint(-127, 128, {n, k}, at::kChar);
    const Tensor sum = weight.sum(1, false, at::kInt), zero_point = at::full({1}, -37, at::kInt);
    for (int variant = 0; variant < 16; ++variant) {
      const bool per_token = variant & 1, per_channel = variant & 2, with_bias = variant & 4,
                 asymmetric = variant & 8;
      const Tensor input_scale = at::rand({per_token ? m : 1}, at::kFloat) * 0.05f;
      const Tensor weight_scale = at::rand({per_channel ? n : 1}, at::kFloat) * 0.01f;
      const OptionalTensor bias =
          with_bias ? OptionalTensor(at::randn({n}, at::kFloat)) : std::nullopt;
      const OptionalTensor z = asymmetric ? OptionalTensor(zero_point) : std::nullopt;
      const OptionalTensor s = asymmetric ? OptionalTensor(sum) : std::nullopt;
      for (const at::ScalarType type : kElementTypes) {
        SCOPED_TRACE(concat(m, "x", n, "x", k, ", variant ", variant, ", ", c10::toString(type)));
        EXPECT_TRUE(same(int8_linear(codes, weight, input_scale, weight_scale, bias, z, s, type),
                         int8_linear(gpu(codes), gpu(weight), gpu(input_scale), gpu(weight_scale),
                                     gpu(bias), gpu(z), gpu(s), type)));
      }
    }
    if (HasFailure()) return;
  }
}

// ---- Bad input ----------------------------------------------------------------------------------

TEST_F(KernelsGpuTest, BadInputThrowsAndLeavesTheGpuUsable) {
  const Scheme scheme = symmetric_scheme(8), asymmetric = asymmetric_scheme(8);
  const Tensor x = at::randn({19, 99}, at::kFloat), x_gpu = gpu(x), scale = gpu(scalar(0.1f));
  const Tensor codes = gpu(random_codes({4, 32})), weight = gpu(random_codes({8, 32}));
  const std::vector<std::function<void()>> bad_calls = {
      [&] { quantize(x_gpu, scalar(0.1f), std::nullopt, scheme); },
      [&] { quantize(x, scale, std::nullopt, scheme); },
      [&] { quantize(x_gpu, scale.to(at::kDouble), std::nullopt, scheme); },
      [&] { quantize(x_gpu, gpu(at::ones({2}, at::kFloat)), std::nullopt, scheme); },
      [&] { quantize(x_gpu.to(at::kInt), scale, std::nullopt, scheme); },
      [&] { quantize(x_gpu, scale, gpu(at::zeros({1}, at::kFloat)), asymmetric); },
      [&] { quantize(x_gpu, scale, at::zeros({1}, at::kInt), asymmetric); },
      [&] { fake_quantize(x_gpu, scalar(0.1f), std::nullopt, scheme); },
      [&] { fake_quantize(x_gpu.to(at::kDouble), scale, std::nullopt, scheme); },
      [&] { dequantize(x_gpu, scale, std::nullopt, scheme); },
      [&] { quantize_per_token(x_gpu.to(at::kLong), scheme); },
      [&] { vernier::histogram(x_gpu.to(at::kDouble)); },
      [&] { vernier::histogram(x_gpu, 1000); },
      [&] { channel_range(x_gpu.to(at::kInt)); },
      [&] { int8_matmul(codes, weight.cpu()); },
      [&] { int8_matmul(codes.to(at::kInt), weight); },
      [&] { int8_matmul(codes, weight.narrow(1, 0, 16)); },
      [&] {
        int8_matmul(at::zeros({1, kMaxInt8GemmK + 1}, codes.options()),
                    at::zeros({1, kMaxInt8GemmK + 1}, codes.options()));
      },
      [&] { int8_linear(codes, weight, scalar(1), scale, std::nullopt); },
      [&] { int8_linear(codes, weight, scale, gpu(at::ones({3}, at::kFloat)), std::nullopt); },
  };
  const Tensor expected = quantize(x, scalar(0.1f), std::nullopt, scheme);
  for (size_t i = 0; i < bad_calls.size(); ++i) {
    SCOPED_TRACE(concat("bad call ", i));
    EXPECT_THROW(bad_calls[i](), Error);
    EXPECT_TRUE(same(expected, quantize(x_gpu, scale, std::nullopt, scheme)));
  }
}

TEST_F(KernelsGpuTest, EmptyTensors) {
  const Scheme scheme = symmetric_scheme(8);
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{0}, {0, 5}, {5, 0}, {2, 0, 3}}) {
    SCOPED_TRACE(concat(at::IntArrayRef(shape)));
    const Tensor x = at::empty(shape, at::kFloat);
    expect_same_codes(x, scalar(1), std::nullopt, scheme);
    expect_same_codes(x, at::ones({x.size(0)}, at::kFloat), std::nullopt,
                      symmetric_scheme(8, Granularity::per_channel));
    const auto [codes, scale] = quantize_per_token(x, scheme);
    const auto [codes_gpu, scale_gpu] = quantize_per_token(gpu(x), scheme);
    EXPECT_TRUE(same(codes, codes_gpu));
    EXPECT_TRUE(same(scale, scale_gpu));
    EXPECT_TRUE(same(scale, per_token_scale(gpu(x), scheme)));
    expect_same_histogram(vernier::histogram(x), vernier::histogram(gpu(x)));
    EXPECT_TRUE(same(channel_range(x), channel_range(gpu(x))));
  }
  const int64_t sizes[][3] = {{0, 16, 16}, {16, 0, 16}, {3, 5, 0}};
  for (const auto& [m, n, k] : sizes) {
    const Tensor codes = random_codes({m, k}), weight = random_codes({n, k});
    EXPECT_TRUE(same(int8_matmul(codes, weight), int8_matmul(gpu(codes), gpu(weight))));
    EXPECT_TRUE(
        same(int8_linear(codes, weight, scalar(1), scalar(1), std::nullopt),
             int8_linear(gpu(codes), gpu(weight), gpu(scalar(1)), gpu(scalar(1)), std::nullopt)));
  }
}

}  // namespace
}  // namespace vernier
