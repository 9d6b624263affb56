// The drop-in layers besides Linear: like those of torch::nn in mode full and in archives, exact in
// mode integer.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/export/validate.h>
#include <vernier/qat/convolution.h>
#include <vernier/qat/elementwise.h>
#include <vernier/qat/embedding.h>
#include <vernier/qat/matmul.h>
#include <vernier/tests/expect_error.h>

#include <functional>
#include <sstream>
#include <string>

namespace vernier {
namespace {

using testing::message_of;
using torch::Tensor;

const Scheme kSymmetric = symmetric_scheme(8);
const Scheme kAsymmetric = asymmetric_scheme(8);
const Scheme kFourBits = symmetric_scheme(4);

/// A tree around one layer, under the name "layer".
std::shared_ptr<torch::nn::Module> around(const std::shared_ptr<torch::nn::Module>& layer) {
  auto root = std::make_shared<torch::nn::Module>();
  root->register_module("layer", layer);
  return root;
}

/// Statistics of what `run` runs, then ranges.
void calibrate(torch::nn::Module& model, const std::function<Tensor()>& run) {
  const torch::NoGradGuard no_grad;
  set_mode(model, Mode::observe);
  run();
  set_mode(model, Mode::full);
  calibrate_from_observers(model);
}

void set_activations(const QuantizedLayer& layer, const Scheme& scheme) {
  for (const auto& [name, quantizer] : layer.quantizers())
    if (quantizer->operand() == Operand::activation && name != "other")
      quantizer->set_settings({scheme, {}});
}

void expect_valid(torch::nn::Module& model, const std::function<Tensor()>& run,
                  double tolerance = 1e-3) {
  Validator validator(model);
  validator.add(run);
  const ValidationReport& report = validator.report();
  EXPECT_TRUE(report.passed(tolerance));
  for (const LayerValidation& layer : report.layers) {
    SCOPED_TRACE(layer.name);
    EXPECT_EQ(layer.code_mismatches, 0);
    EXPECT_EQ(layer.weight_code_mismatches, 0);
    EXPECT_EQ(layer.accumulator_mismatches, 0);
    EXPECT_EQ(layer.outside_bound, 0) << layer.worst_of_bound;
    EXPECT_GT(layer.outputs, 0);
  }
}

template <typename From, typename To>
void through_an_archive(const std::shared_ptr<From>& from, const std::shared_ptr<To>& to) {
  std::stringstream bytes;
  torch::save(std::static_pointer_cast<torch::nn::Module>(from), bytes);
  std::shared_ptr<torch::nn::Module> target = to;
  torch::load(target, bytes);
}

template <typename A, typename B>
void expect_same_parameters(const A& a, const B& b) {
  const auto theirs = a.named_parameters(), ours = b.named_parameters();
  ASSERT_EQ(ours.keys(), theirs.keys());
  for (const auto& item : ours) EXPECT_TRUE(torch::equal(item.value(), theirs[item.key()]));
}

/// What holds for every drop-in. `forward(layer)` runs a layer of either kind on the same input.
template <typename Ours, typename Plain, typename Options, typename Forward>
void expect_drop_in(const Options& options, const Forward& forward,
                    const std::vector<torch::Dtype>& dtypes = {torch::kHalf, torch::kBFloat16}) {
  torch::manual_seed(1);
  const auto plain = std::make_shared<Plain>(options);
  torch::manual_seed(1);
  const auto ours = std::make_shared<Ours>(options);
  expect_same_parameters(*plain, *ours);
  EXPECT_TRUE(torch::equal(forward(*ours), forward(*plain)));

  const auto taken = std::make_shared<Ours>(*plain);
  for (const auto& item : taken->named_parameters(false))
    EXPECT_TRUE(item.value().is_same(plain->named_parameters()[item.key()]));
  EXPECT_TRUE(torch::equal(forward(*taken), forward(*plain)));

  const auto other = std::make_shared<Ours>(options);
  through_an_archive(plain, other);
  expect_same_parameters(*plain, *other);
  const auto back = std::make_shared<Plain>(options);
  through_an_archive(other, back);
  expect_same_parameters(*plain, *back);

  for (const Scheme& inputs : {kSymmetric, kAsymmetric, kFourBits}) {
    SCOPED_TRACE(to_string(inputs));
    set_activations(*ours, inputs);
    const auto root = around(ours);
    const auto run = [&] { return forward(*ours); };
    calibrate(*root, run);
    expect_valid(*root, run);

    ours->set_mode(Mode::integer);
    const torch::NoGradGuard no_grad;
    const Tensor expected = run();
    const auto copy = std::dynamic_pointer_cast<Ours>(ours->clone());
    EXPECT_TRUE(torch::equal(forward(*copy), expected));
    const auto read = std::make_shared<Ours>(options);
    through_an_archive(ours, read);
    read->set_mode(Mode::integer);
    EXPECT_TRUE(torch::equal(forward(*read), expected));
    EXPECT_GT(expected.numel(), 0);
    EXPECT_FALSE(torch::equal(expected, forward(*plain)));
    ours->set_mode(Mode::full);
    EXPECT_TRUE(torch::equal(run(), forward(*plain)));
  }

  for (const torch::Dtype dtype : dtypes) {
    SCOPED_TRACE(c10::toString(dtype));
    ours->to(dtype);
    plain->to(dtype);
    EXPECT_TRUE(torch::equal(forward(*ours), forward(*plain)));
    const auto root = around(ours);
    const auto run = [&] { return forward(*ours); };
    calibrate(*root, run);
    expect_valid(*root, run, 0.02);
    ours->set_mode(Mode::integer);
    EXPECT_EQ(run().scalar_type(), dtype);
    ours->set_mode(Mode::full);
  }
}

/// Forwards `x` in the dtype of a layer's weight.
const auto of = [](const Tensor& x) {
  return [x](auto& layer) { return layer.forward(x.to(layer.weight.scalar_type())); };
};

TEST(QatLayers, Conv1d) {
  using Options = torch::nn::Conv1dOptions;
  const auto check = [](const Options& options, const Tensor& x) {
    expect_drop_in<nn::Conv1dImpl, torch::nn::Conv1dImpl>(options, of(x));
  };
  check(Options(6, 8, 3), torch::randn({4, 6, 20}));
  check(Options(6, 8, 4).padding(torch::kSame).bias(false), torch::randn({4, 6, 20}));
  check(Options(6, 9, 3).groups(3).stride(2).padding(2).padding_mode(torch::kCircular),
        torch::randn({2, 6, 11}));
}

TEST(QatLayers, Conv2d) {
  using Options = torch::nn::Conv2dOptions;
  const auto check = [](const Options& options, const Tensor& x) {
    expect_drop_in<nn::Conv2dImpl, torch::nn::Conv2dImpl>(options, of(x));
  };
  check(Options(3, 8, 3).padding(1), torch::randn({2, 3, 9, 11}) + 0.5);
  check(Options(4, 8, {2, 3}).stride({2, 1}).padding({0, 2}).dilation({1, 2}),
        torch::randn({2, 4, 9, 11}));
  check(Options(8, 8, 3).groups(8).padding(1), torch::randn({2, 8, 7, 7}));
  check(Options(4, 6, {2, 4}).padding(torch::kSame), torch::randn({2, 4, 8, 8}));
  check(Options(4, 6, {3, 4}).padding(torch::kSame).padding_mode(torch::kReplicate),
        torch::randn({2, 4, 8, 8}));
  check(Options(4, 6, 3).padding(torch::kValid), torch::randn({2, 4, 8, 8}));
  check(Options(4, 6, 3).padding({1, 2}).padding_mode(torch::kReflect), torch::randn({2, 4, 8, 8}));
  check(Options(5, 6, 1), torch::randn({5, 8, 8}));  // without a batch
}

TEST(QatLayers, Conv3d) {
  using Options = torch::nn::Conv3dOptions;
  expect_drop_in<nn::Conv3dImpl, torch::nn::Conv3dImpl>(
      Options(3, 4, {2, 3, 3}).padding({1, 1, 0}).stride({1, 2, 1}),
      of(torch::randn({2, 3, 5, 6, 7})));
}

TEST(QatLayers, ConvTranspose) {
  const std::vector<torch::Dtype> dtypes = {torch::kBFloat16};  // float16: see convolution.h
  expect_drop_in<nn::ConvTranspose1dImpl, torch::nn::ConvTranspose1dImpl>(
      torch::nn::ConvTranspose1dOptions(6, 4, 3).stride(2).padding(1).output_padding(1),
      of(torch::randn({3, 6, 9})), dtypes);
  expect_drop_in<nn::ConvTranspose2dImpl, torch::nn::ConvTranspose2dImpl>(
      torch::nn::ConvTranspose2dOptions(6, 8, 4).stride(2).padding(1).groups(2),
      of(torch::randn({2, 6, 5, 6})), dtypes);
  const Tensor x = torch::randn({2, 6, 5, 6});
  const auto sized = [&](auto& layer) {
    const std::vector<int64_t> wanted = {10, 11};
    return layer.forward(x.to(layer.weight.scalar_type()), at::IntArrayRef(wanted));
  };
  expect_drop_in<nn::ConvTranspose2dImpl, torch::nn::ConvTranspose2dImpl>(
      torch::nn::ConvTranspose2dOptions(6, 4, 3).stride(2).padding(1), sized, dtypes);
  expect_drop_in<nn::ConvTranspose3dImpl, torch::nn::ConvTranspose3dImpl>(
      torch::nn::ConvTranspose3dOptions(3, 4, 2).stride(2), of(torch::randn({1, 3, 3, 4, 2})),
      dtypes);
}

TEST(QatLayers, Embedding) {
  const Tensor indices = torch::randint(20, {4, 7}, torch::kLong);
  const auto forward = [&](auto& layer) { return layer.forward(indices); };
  using Options = torch::nn::EmbeddingOptions;
  expect_drop_in<nn::EmbeddingImpl, torch::nn::EmbeddingImpl>(Options(20, 6), forward);
  expect_drop_in<nn::EmbeddingImpl, torch::nn::EmbeddingImpl>(Options(20, 6).padding_idx(-3),
                                                              forward);
}

TEST(QatLayers, EmbeddingBag) {
  const Tensor table = torch::randint(20, {4, 7}, torch::kLong);
  const Tensor flat = torch::randint(20, {12}, torch::kLong);
  const Tensor offsets = torch::tensor({0, 3, 3, 10}, torch::kLong);
  using Options = torch::nn::EmbeddingBagOptions;
  const auto check = [&](const Options& options, const auto& forward) {
    expect_drop_in<nn::EmbeddingBagImpl, torch::nn::EmbeddingBagImpl>(options, forward);
  };
  const auto of_table = [&](auto& layer) { return layer.forward(table); };
  const auto of_flat = [&](auto& layer) { return layer.forward(flat, offsets); };
  check(Options(20, 6).mode(torch::kSum), of_table);
  check(Options(20, 6).mode(torch::kMean), of_flat);
  check(Options(20, 6).mode(torch::kMax), of_flat);
  check(Options(20, 6).mode(torch::kMean).padding_idx(5), of_flat);
  check(Options(20, 6).mode(torch::kSum), [&](auto& layer) {
    const Tensor weights = torch::linspace(0, 1, 12).to(layer.weight.scalar_type());
    return layer.forward(flat, offsets, weights);
  });
}

TEST(QatLayers, EmbeddingsOfPretrainedTables) {
  const Tensor table = torch::randn({9, 4});
  const auto frozen = nn::Embedding::from_pretrained(table);
  EXPECT_FALSE(frozen->weight.requires_grad());
  EXPECT_TRUE(torch::equal(frozen->weight, table));
  EXPECT_TRUE(torch::equal(nn::EmbeddingBag::from_pretrained(table)->weight, table));
  // A copy's table is its own.
  const auto copy = std::dynamic_pointer_cast<nn::EmbeddingImpl>(frozen->clone());
  copy->weight.data().zero_();
  EXPECT_TRUE(torch::equal(frozen->weight, table));
  EXPECT_GT(table.abs().sum().item<float>(), 0);
}

TEST(QatLayers, EmbeddingsTrainThroughTheQuantizedTable) {
  nn::Embedding layer(torch::nn::EmbeddingOptions(10, 4).sparse(true).max_norm(1.5));
  const Tensor indices = torch::tensor({1, 4, 4}, torch::kLong);
  calibrate(*around(layer.ptr()), [&] { return layer->forward(indices); });
  layer->set_mode(Mode::fake_quant);
  const Tensor gradient = torch::randn({3, 4});
  layer->forward(indices).backward(gradient);
  Tensor expected = torch::zeros({10, 4});
  expected.index_add_(0, indices, gradient);
  EXPECT_TRUE(torch::allclose(layer->weight.grad().to_dense(), expected));
  EXPECT_LE(layer->weight.norm(2, 1)[4].item<float>(), 1.5001f);
}

// ---- Products of activations --------------------------------------------------------------------

TEST(QatLayers, MatMul) {
  torch::manual_seed(2);
  const std::pair<std::vector<int64_t>, std::vector<int64_t>> shapes[] = {
      {{5, 8}, {8, 6}},
      {{3, 5, 8}, {8, 6}},
      {{2, 3, 5, 8}, {2, 3, 8, 6}},
      {{2, 1, 5, 8}, {3, 8, 6}}};
  for (const auto& [a_shape, b_shape] : shapes) {
    for (const bool transposed : {false, true}) {
      for (const Scheme& inputs : {kSymmetric, kAsymmetric, kFourBits}) {
        SCOPED_TRACE(concat(at::IntArrayRef(a_shape), at::IntArrayRef(b_shape), transposed));
        nn::MatMul layer(nn::MatMulOptions().transpose_other(transposed));
        const Tensor a = torch::randn(a_shape) + 0.5, matrix = torch::randn(b_shape);
        const Tensor b = transposed ? matrix.transpose(-2, -1).contiguous() : matrix;
        EXPECT_TRUE(torch::equal(layer->forward(a, b),
                                 torch::matmul(a, transposed ? b.transpose(-2, -1) : b)));
        set_activations(*layer, inputs);
        const auto root = around(layer.ptr());
        const auto run = [&] { return layer->forward(a, b); };
        calibrate(*root, run);
        expect_valid(*root, run);
      }
    }
  }
}

TEST(QatLayers, MatMulOfTokensWithTheirOwnScales) {
  const Scheme per_token = {.granularity = Granularity::per_token, .dynamic = true};
  nn::MatMul layer(nn::MatMulOptions().transpose_other(true));
  for (const auto& item : layer->quantizers()) item.quantizer->set_settings({per_token, {}});
  const Tensor a = torch::randn({2, 5, 8}), b = torch::randn({2, 7, 8});
  const auto root = around(layer.ptr());
  expect_valid(*root, [&] { return layer->forward(a, b); });
  nn::MatMul plain;
  plain->other_quantizer->set_settings({per_token, {}});
  EXPECT_CONTAINS(message_of([&] {
                    plain->input_quantizer->set_ranges({{-1, 1}}, torch::kCPU);
                    plain->set_mode(Mode::integer);
                  }),
                  "the second operand has one scale");
}

TEST(QatLayers, Attention) {
  torch::manual_seed(3);
  nn::ScaledDotProductAttention attention;
  const Tensor q = torch::randn({2, 3, 5, 8}), k = torch::randn({2, 3, 7, 8}),
               v = torch::randn({2, 3, 7, 6});
  const Tensor allowed = torch::rand({5, 7}).gt(0.4), added = torch::randn({5, 7});
  const auto same = [&](const Tensor& a, const Tensor& b) {
    return torch::allclose(a, b, 1e-4, 1e-5);
  };
  const auto plain = [&](const Tensor& mask, bool causal, std::optional<double> scale) {
    return torch::scaled_dot_product_attention(
        q, k, v, mask.defined() ? std::optional(mask) : std::nullopt, 0.0, causal, scale);
  };
  const std::tuple<Tensor, bool, std::optional<double>> variants[] = {
      {{}, false, std::nullopt},
      {{}, true, std::nullopt},
      {{}, false, 0.2},
      {allowed, false, std::nullopt},
      {added, false, std::nullopt}};
  for (const auto& [mask, causal, scale] : variants) {
    const auto run = [&, &mask = mask, &causal = causal, &scale = scale] {
      return attention->forward(q, k, v, mask, 0.0, causal, scale);
    };
    set_mode(*attention, Mode::full);
    EXPECT_TRUE(torch::equal(run(), plain(mask, causal, scale)));
    set_mode(*attention, Mode::observe);
    EXPECT_TRUE(same(run(), plain(mask, causal, scale)));
  }
  set_mode(*attention, Mode::full);
  calibrate_from_observers(*attention);
  for (const auto& [mask, causal, scale] : variants)
    expect_valid(
        *attention,
        [&, &mask = mask, &causal = causal, &scale = scale] {
          return attention->forward(q, k, v, mask, 0.0, causal, scale);
        },
        0.01);
  set_mode(*attention, Mode::integer);
  EXPECT_TRUE(
      torch::allclose(attention->forward(q, k, v), plain({}, false, std::nullopt), 0.1, 0.05));
  EXPECT_CONTAINS(message_of([&] { attention->forward(q, k, v, allowed, 0.0, true); }),
                  "a mask or is_causal");
  const auto copy =
      std::dynamic_pointer_cast<nn::ScaledDotProductAttentionImpl>(attention->clone());
  EXPECT_TRUE(torch::equal(copy->forward(q, k, v), attention->forward(q, k, v)));
}

// ---- Branches -----------------------------------------------------------------------------------

TEST(QatLayers, AddAndConcatShareAScale) {
  torch::manual_seed(4);
  const Tensor a = torch::randn({3, 4, 5}) * 2, b = torch::randn({3, 4, 5}) + 1;
  for (const Scheme& scheme : {kSymmetric, kAsymmetric, kFourBits}) {
    for (const bool quantized_output : {false, true}) {
      nn::Add add;
      nn::Concat concat_layer(1);
      const auto sum = [&] { return add->forward(a, b); };
      const auto joined = [&] { return concat_layer->forward({a, b, a}); };
      EXPECT_TRUE(torch::equal(sum(), a + b));
      EXPECT_TRUE(torch::equal(joined(), torch::cat({a, b, a}, 1)));
      set_activations(*add, scheme);
      set_activations(*concat_layer, scheme);
      if (quantized_output) {
        add->quantize_output({kSymmetric, {}});
        concat_layer->quantize_output({kAsymmetric, {}});
      }
      const auto one = around(add.ptr()), other = around(concat_layer.ptr());
      calibrate(*one, sum);
      calibrate(*other, joined);
      EXPECT_EQ(add->quantizers().size(), quantized_output ? 2u : 1u);
      expect_valid(*one, sum);
      expect_valid(*other, joined);
      add->set_mode(Mode::integer);
      concat_layer->set_mode(Mode::integer);
      const Tensor integer_sum = sum(), integer_joined = joined();
      add->set_mode(Mode::fake_quant);
      concat_layer->set_mode(Mode::fake_quant);
      EXPECT_TRUE(torch::equal(sum(), integer_sum));
      EXPECT_TRUE(torch::equal(joined(), integer_joined));
      add->set_mode(Mode::full);
      concat_layer->set_mode(Mode::full);
    }
  }
}

// ---- Training -----------------------------------------------------------------------------------

// Nothing is clipped, so that gradients are those of the plain layer at the quantized operands.
TEST(QatLayers, GradientsOfConvolutions) {
  torch::manual_seed(5);
  nn::Conv2d layer(torch::nn::Conv2dOptions(3, 4, 3).padding(1).stride(2));
  const Tensor data = torch::randn({2, 3, 8, 8});
  calibrate(*around(layer.ptr()), [&] { return layer->forward(data); });
  layer->set_mode(Mode::fake_quant);
  const Tensor x = data.clone().requires_grad_();
  const Tensor y = layer->forward(x), gradient = torch::randn_like(y);
  y.backward(gradient);

  const auto exact = [](const Tensor& values) {
    return values.detach().to(torch::kDouble).requires_grad_();
  };
  const Tensor qx = exact(layer->input_quantizer->forward(data));
  const Tensor qw = exact(layer->weight_quantizer->forward(layer->weight)), b = exact(layer->bias);
  torch::conv2d(qx, qw, b, {2, 2}, {1, 1}).backward(gradient.to(torch::kDouble));
  const auto near = [](const Tensor& ours, const Tensor& reference) {
    return torch::allclose(ours.to(torch::kDouble), reference, 1e-5, 1e-5);
  };
  EXPECT_TRUE(near(x.grad(), qx.grad()));
  EXPECT_TRUE(near(layer->weight.grad(), qw.grad()));
  EXPECT_TRUE(near(layer->bias.grad(), b.grad()));
}

TEST(QatLayers, LearnedScalesTrain) {
  nn::Conv2d layer(torch::nn::Conv2dOptions(3, 4, 3));
  const Tensor x = torch::randn({2, 3, 8, 8});
  calibrate(*around(layer.ptr()), [&] { return layer->forward(x); });
  for (const auto& item : layer->quantizers()) item.quantizer->set_policy(RangePolicy::learned);
  layer->set_mode(Mode::fake_quant);
  layer->forward(x).square().sum().backward();
  EXPECT_TRUE(layer->input_quantizer->scale().grad().defined());
  EXPECT_EQ(layer->weight_quantizer->scale().grad().numel(), 4);
  expect_valid(*around(layer.ptr()), [&] { return layer->forward(x); });
}

// ---- Chains of codes ----------------------------------------------------------------------------

TEST(QatLayers, CodesGoFromLayerToLayer) {
  torch::manual_seed(6);
  torch::nn::Sequential model(
      nn::Conv2d(torch::nn::Conv2dOptions(3, 8, 3).padding(1)), torch::nn::ReLU(),
      nn::Conv2d(torch::nn::Conv2dOptions(8, 8, {2, 3}).padding(torch::kSame)),
      nn::ConvTranspose2d(torch::nn::ConvTranspose2dOptions(8, 4, 2).stride(2)));
  chain(*model, "0", "2");
  chain(*model, "2", "3");
  const Tensor x = torch::randn({2, 3, 8, 8});
  const auto run = [&] { return model->forward(x); };
  calibrate(*model, run);
  expect_valid(*model, run);
  set_mode(*model, Mode::integer);
  const Tensor codes = model->ptr<nn::Conv2dImpl>(0)->forward(x);
  EXPECT_EQ(codes.scalar_type(), torch::kChar);
  EXPECT_EQ(codes.sizes(), (std::vector<int64_t>{2, 8, 8, 8}));
  EXPECT_EQ(run().scalar_type(), torch::kFloat);
}

// ---- Shapes and mistakes ------------------------------------------------------------------------

nn::Conv2d calibrated_conv(bool asymmetric = false) {
  nn::Conv2d layer(torch::nn::Conv2dOptions(3, 4, 3).padding(1));
  if (asymmetric) set_activations(*layer, kAsymmetric);
  calibrate(*around(layer.ptr()), [&] { return layer->forward(torch::randn({2, 3, 8, 8})); });
  return layer;
}

TEST(QatLayers, BatchesOfAnySize) {
  const torch::NoGradGuard no_grad;
  for (const bool asymmetric : {false, true}) {
    nn::Conv2d layer = calibrated_conv(asymmetric);
    for (const Mode mode : {Mode::full, Mode::fake_quant, Mode::integer}) {
      layer->set_mode(mode);
      const Tensor x = torch::randn({4, 3, 8, 8});
      const Tensor y = layer->forward(x);
      EXPECT_TRUE(torch::allclose(layer->forward(x.slice(0, 0, 1)), y.slice(0, 0, 1), 1e-5, 1e-6));
      EXPECT_TRUE(torch::allclose(layer->forward(x[1]), y[1], 1e-5, 1e-6));
      EXPECT_EQ(layer->forward(x.slice(0, 0, 0)).sizes(), (std::vector<int64_t>{0, 4, 8, 8}));
      EXPECT_EQ(layer->forward(torch::randn({1, 3, 5, 20})).sizes(),
                (std::vector<int64_t>{1, 4, 5, 20}));
    }
  }
}

TEST(QatLayers, MemoryFormatsStay) {
  const torch::NoGradGuard no_grad;
  nn::Conv2d layer = calibrated_conv();
  const Tensor x = torch::randn({2, 3, 8, 8});
  const Tensor channels_last = x.contiguous(torch::MemoryFormat::ChannelsLast);
  for (const Mode mode : {Mode::fake_quant, Mode::integer}) {
    layer->set_mode(mode);
    const Tensor y = layer->forward(x), z = layer->forward(channels_last);
    EXPECT_TRUE(y.is_contiguous());
    EXPECT_TRUE(z.is_contiguous(torch::MemoryFormat::ChannelsLast));
    EXPECT_TRUE(torch::allclose(y, z, 1e-5, 1e-6));
    EXPECT_TRUE(mode != Mode::integer || torch::equal(y, z));
  }
}

TEST(QatLayers, WhatDoesNotFitIsRefused) {
  nn::Conv2d layer = calibrated_conv();
  layer->set_mode(Mode::fake_quant);
  EXPECT_CONTAINS(message_of([&] {
                    layer->forward(torch::randn({2, 4, 8, 8}));
                  }),
                  "but the layer takes [N, 3]");
  EXPECT_CONTAINS(message_of([&] { layer->forward(torch::randn({2, 3, 8})); }), "2 spatial axes");
  const Tensor elsewhere = torch::randn({2, 3, 8, 8}).to(torch::kMeta);
  EXPECT_CONTAINS(message_of([&] { layer->forward(elsewhere); }), "move one of them");
  layer->set_mode(Mode::integer);
  EXPECT_CONTAINS(message_of([&] { layer->forward(elsewhere); }), "move one of them");
  EXPECT_CONTAINS(message_of([&] {
                    layer->forward(torch::zeros({2, 3, 8, 8}, torch::kChar));
                  }),
                  "no chain says of which scale");

  nn::Conv2d fresh(torch::nn::Conv2dOptions(3, 4, 3));
  EXPECT_CONTAINS(message_of([&] { fresh->set_mode(Mode::fake_quant); }), "has no scale");
  set_activations(*fresh, {.granularity = Granularity::per_token, .dynamic = true});
  fresh->weight_quantizer->calibrate(fresh->weight);
  EXPECT_CONTAINS(message_of([&] { fresh->set_mode(Mode::integer); }), "has one scale");

  nn::Embedding table(9, 4);
  table->weight_quantizer->calibrate(table->weight);
  table->set_mode(Mode::integer);
  EXPECT_CONTAINS(message_of([&] { table->forward(torch::full({1}, 9, torch::kLong)); }),
                  "index 9 is outside a table of 9 rows");
  EXPECT_CONTAINS(message_of([&] { table->forward(torch::zeros({1})); }), "must be int64 or int32");

  nn::MatMul product;
  calibrate(*around(product.ptr()), [&] {
    return product->forward(torch::randn({2, 3}), torch::randn({3, 2}));
  });
  product->set_mode(Mode::fake_quant);
  EXPECT_CONTAINS(message_of([&] {
                    product->forward(torch::randn({2, 3}), torch::randn({2, 3}));
                  }),
                  "have no matrix product");
  product->other_quantizer->set_settings({kAsymmetric, {}});
  product->other_quantizer->set_ranges({{-1, 2}}, torch::kCPU);
  EXPECT_CONTAINS(message_of([&] { product->set_mode(Mode::integer); }), "is symmetric, not");

  nn::Add add;
  set_activations(*add, {.granularity = Granularity::per_token, .dynamic = true});
  EXPECT_CONTAINS(message_of([&] { add->set_mode(Mode::integer); }), "share one static scale");
}

}  // namespace
}  // namespace vernier
