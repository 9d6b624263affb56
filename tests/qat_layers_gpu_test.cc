// The layers' integer mode on the GPU: proved against fake-quantization there, and the same bits as
// on the CPU.
#include <torch/torch.h>
#include <vernier/export/validate.h>
#include <vernier/qat/convolution.h>
#include <vernier/qat/elementwise.h>
#include <vernier/qat/embedding.h>
#include <vernier/qat/linear.h>
#include <vernier/qat/matmul.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/gpu_compare.h>

#include <functional>

namespace vernier {
namespace {

using testing::gpu;
using testing::message_of;
using testing::same;
using torch::Tensor;

class QatLayersGpuTest : public testing::GpuTest {};

/// A tree around one layer, calibrated by `run` on the CPU.
std::shared_ptr<torch::nn::Module> calibrated(const std::shared_ptr<torch::nn::Module>& layer,
                                              const Scheme& inputs,
                                              const std::function<Tensor()>& run) {
  const torch::NoGradGuard no_grad;
  auto root = std::make_shared<torch::nn::Module>();
  root->register_module("layer", layer);
  for (const auto& item : quantized_layers(*root))
    if (item.layer->input_quantizer) item.layer->input_quantizer->set_settings({inputs, {}});
  set_mode(*root, Mode::observe);
  run();
  set_mode(*root, Mode::full);
  calibrate_from_observers(*root);
  return root;
}

/// `run(device)` runs the layer on operands that are there.
template <typename Layer>
void expect_same_on_both(const std::shared_ptr<Layer>& layer,
                         const std::function<Tensor(Layer&, torch::Device)>& run,
                         double tolerance = 1e-2) {
  for (const Scheme& inputs : {symmetric_scheme(8), asymmetric_scheme(8), symmetric_scheme(4)}) {
    SCOPED_TRACE(to_string(inputs));
    const auto root = calibrated(layer, inputs, [&] { return run(*layer, torch::kCPU); });
    const torch::NoGradGuard no_grad;
    layer->set_mode(Mode::integer);
    const Tensor expected = run(*layer, torch::kCPU);
    auto copy = std::dynamic_pointer_cast<Layer>(layer->clone(torch::Device(torch::kCUDA, 0)));
    EXPECT_TRUE(same(expected, run(*copy, torch::kCUDA)));
    layer->set_mode(Mode::full);

    auto moved = std::make_shared<torch::nn::Module>();
    moved->register_module("layer", copy);
    Validator validator(*moved);
    validator.add([&] { return run(*copy, torch::kCUDA); });
    for (const LayerValidation& result : validator.report().layers) {
      EXPECT_EQ(result.code_mismatches, 0);
      EXPECT_EQ(result.weight_code_mismatches, 0);
      EXPECT_EQ(result.accumulator_mismatches, 0);
    }
    EXPECT_LE(validator.report().relative_output_error(), tolerance);
  }
}

template <typename Layer>
void expect_same_on_both(const Layer& layer, const Tensor& x) {
  using Impl = typename Layer::ContainedType;
  expect_same_on_both<Impl>(layer.ptr(), [x](Impl& module, torch::Device device) {
    return module.forward(x.to(device));
  });
}

TEST_F(QatLayersGpuTest, Convolutions) {
  expect_same_on_both(nn::Conv1d(torch::nn::Conv1dOptions(6, 8, 3).padding(1)),
                      torch::randn({4, 6, 20}));
  expect_same_on_both(nn::Conv2d(torch::nn::Conv2dOptions(16, 24, 3).padding(1).stride(2)),
                      torch::randn({4, 16, 15, 18}));
  expect_same_on_both(nn::Conv2d(torch::nn::Conv2dOptions(8, 8, 3).groups(8).padding(1)),
                      torch::randn({2, 8, 9, 9}).contiguous(torch::MemoryFormat::ChannelsLast));
  expect_same_on_both(
      nn::Conv2d(torch::nn::Conv2dOptions(4, 6, {2, 3}).padding(1).padding_mode(torch::kReflect)),
      torch::randn({2, 4, 9, 9}));
  expect_same_on_both(nn::Conv3d(torch::nn::Conv3dOptions(4, 4, 2)), torch::randn({2, 4, 5, 6, 7}));
  expect_same_on_both(nn::ConvTranspose2d(torch::nn::ConvTranspose2dOptions(6, 8, 4).stride(2)),
                      torch::randn({2, 6, 5, 6}));
}

TEST_F(QatLayersGpuTest, Embeddings) {
  const Tensor indices = torch::randint(20, {4, 7}, torch::kLong);
  expect_same_on_both<nn::EmbeddingImpl>(
      std::make_shared<nn::EmbeddingImpl>(20, 6),
      [&](auto& layer, torch::Device device) { return layer.forward(indices.to(device)); });
  const auto bag = std::make_shared<nn::EmbeddingBagImpl>(
      torch::nn::EmbeddingBagOptions(20, 6).mode(torch::kMax).padding_idx(3));
  expect_same_on_both<nn::EmbeddingBagImpl>(
      bag, [&](auto& layer, torch::Device device) { return layer.forward(indices.to(device)); });
}

TEST_F(QatLayersGpuTest, ProductsSumsAndConcatenations) {
  const Tensor a = torch::randn({2, 3, 33, 16}), b = torch::randn({2, 3, 16, 20});
  expect_same_on_both<nn::MatMulImpl>(
      std::make_shared<nn::MatMulImpl>(),
      [&](auto& layer, torch::Device device) { return layer.forward(a.to(device), b.to(device)); });
  expect_same_on_both<nn::AddImpl>(
      std::make_shared<nn::AddImpl>(),
      [&](auto& layer, torch::Device device) { return layer.forward(a.to(device), a.to(device)); });
  expect_same_on_both<nn::ConcatImpl>(
      std::make_shared<nn::ConcatImpl>(), [&](auto& layer, torch::Device device) {
        return layer.forward(std::vector<Tensor>{a.to(device), a.to(device)});
      });
}

TEST_F(QatLayersGpuTest, AttentionAndFoldedBatchNormsTrain) {
  nn::ScaledDotProductAttention attention;
  const Tensor q = torch::randn({2, 3, 9, 8}), k = torch::randn({2, 3, 7, 8});
  const auto root = calibrated(attention.ptr(), asymmetric_scheme(8),
                               [&] { return attention->forward(q, k, k); });
  attention->to(torch::kCUDA);
  set_mode(*root, Mode::fake_quant);
  const Tensor query = gpu(q).requires_grad_();
  attention->forward(query, gpu(k), gpu(k)).sum().backward();
  EXPECT_TRUE(query.grad().isfinite().all().item<bool>());

  torch::nn::Sequential model(nn::Conv2d(torch::nn::Conv2dOptions(3, 8, 3).bias(false)),
                              torch::nn::BatchNorm2d(8));
  fold_batch_norms(*model);
  const Tensor x = torch::randn({4, 3, 9, 9});
  set_mode(*model, Mode::observe);
  model->forward(x);
  set_mode(*model, Mode::full);
  calibrate_from_observers(*model);
  set_mode(*model, Mode::fake_quant);
  const auto moved = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(
      model->clone(torch::Device(torch::kCUDA, 0)));
  const Tensor expected = model->forward(x), y = moved->forward(gpu(x));
  EXPECT_TRUE(torch::allclose(y.cpu(), expected, 1e-2, 1e-2));
  y.sum().backward();
  for (const auto& parameter : moved->parameters())
    EXPECT_TRUE(parameter.grad().isfinite().all().item<bool>());
}

TEST_F(QatLayersGpuTest, MixedDevicesAreSaid) {
  nn::Conv2d layer(torch::nn::Conv2dOptions(3, 4, 3));
  const Tensor x = torch::randn({2, 3, 8, 8});
  const auto root = calibrated(layer.ptr(), symmetric_scheme(8), [&] { return layer->forward(x); });
  for (const Mode mode : {Mode::fake_quant, Mode::integer}) {
    set_mode(*root, mode);
    EXPECT_CONTAINS(message_of([&] { layer->forward(gpu(x)); }), "layer 'layer'");
    EXPECT_CONTAINS(message_of([&] { layer->forward(gpu(x)); }), "move one of them");
  }
}

}  // namespace
}  // namespace vernier
