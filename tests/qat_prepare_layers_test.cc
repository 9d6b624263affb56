// A convolutional model of torch::nn from prepare() through training to integers.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/export/checkpoint.h>
#include <vernier/export/validate.h>
#include <vernier/qat/convolution.h>
#include <vernier/qat/elementwise.h>
#include <vernier/qat/embedding.h>
#include <vernier/qat/linear.h>
#include <vernier/qat/matmul.h>
#include <vernier/qat/prepare.h>
#include <vernier/qat/session.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/temporary_folder.h>

namespace vernier {
namespace {

using testing::message_of;
using testing::TemporaryFolder;
using torch::Tensor;
namespace tnn = torch::nn;

QuantizationRules rules_of(int bits, const Scheme& activations) {
  QuantizationRules rules;
  rules.weights = {symmetric_scheme(bits, Granularity::per_channel), {}, RangePolicy::following};
  rules.activations = {activations, {}, RangePolicy::moving_average};
  if (activations.dynamic) rules.activations.policy = RangePolicy::frozen;
  return rules;
}

tnn::Sequential small_network() {
  return tnn::Sequential(
      tnn::Conv2d(tnn::Conv2dOptions(1, 8, 3).padding(1).bias(false)), tnn::BatchNorm2d(8),
      tnn::ReLU(), tnn::Conv2d(tnn::Conv2dOptions(8, 8, 3).padding(1).groups(2).bias(false)),
      tnn::BatchNorm2d(8), tnn::ReLU(), tnn::ConvTranspose2d(tnn::ConvTranspose2dOptions(8, 4, 2)),
      tnn::Flatten(), tnn::Linear(4 * 9 * 9, 16), tnn::BatchNorm1d(16), tnn::ReLU(),
      tnn::Linear(16, 2));
}

/// Is there more on the left or on the right?
std::pair<Tensor, Tensor> task(int64_t samples) {
  const Tensor x = torch::rand({samples, 1, 8, 8});
  const Tensor left = x.slice(3, 0, 4).sum({1, 2, 3}), right = x.slice(3, 4).sum({1, 2, 3});
  return {x, left.gt(right).to(torch::kLong)};
}

double accuracy(tnn::Sequential& model, const std::pair<Tensor, Tensor>& data) {
  const torch::NoGradGuard no_grad;
  return model->forward(data.first)
      .argmax(1)
      .eq(data.second)
      .to(torch::kDouble)
      .mean()
      .item<double>();
}

void train(tnn::Sequential& model, int64_t steps, TrainingSession* session) {
  torch::optim::Adam optimizer(model->parameters(), torch::optim::AdamOptions(0.01));
  for (int64_t step = 0; step < steps; ++step) {
    const auto [x, target] = task(32);
    optimizer.zero_grad();
    const Tensor loss = torch::nn::functional::cross_entropy(model->forward(x), target);
    loss.backward();
    optimizer.step();
    if (session) session->step(loss);
  }
}

TEST(QatPrepareLayers, AConvolutionalModelTrainsQuantizedAndBecomesIntegers) {
  torch::manual_seed(21);
  tnn::Sequential model = small_network();
  train(model, 40, nullptr);
  const auto test = task(200);
  model->eval();
  const double in_float = accuracy(model, test);
  EXPECT_GT(in_float, 0.8);

  const PrepareReport report = prepare(model, rules_of(4, asymmetric_scheme(8)));
  EXPECT_EQ(report.replaced, (std::vector<std::string>{"0", "3", "6", "8", "11"}));
  EXPECT_EQ(report.folded, (std::vector<std::string>{"0", "3", "8"}));
  EXPECT_TRUE(report.unreachable.empty());
  EXPECT_TRUE(prepare(model, rules_of(4, asymmetric_scheme(8))).folded.empty());
  EXPECT_EQ(accuracy(model, test), in_float);

  model->train();
  TrainingSession session(
      *model, {.calibration_batches = 3, .freeze_observers_at = 12, .freeze_batch_norm_at = 16});
  train(model, 20, &session);
  EXPECT_TRUE(model->at<nn::Conv2dImpl>(0).batch_norm->frozen());
  model->eval();
  const double fake_quant = accuracy(model, test);
  EXPECT_GT(fake_quant, 0.8);
  const torch::NoGradGuard no_grad;
  const Tensor predicted = model->forward(test.first).argmax(1);
  const TemporaryFolder folder;
  const CheckpointInfo info = {"network", "{}", "qat", "0"};
  EXPECT_CONTAINS(message_of([&] { save_checkpoint(*model, info, folder / "model.h5"); }),
                  "layer '0' has a batch norm folded in");
  convert(model);
  EXPECT_FALSE(model->at<nn::Conv2dImpl>(0).batch_norm);
  EXPECT_TRUE(torch::equal(model->forward(test.first).argmax(1), predicted));
  Validator validator(*model);
  validator.add([&] { return model->forward(test.first); });
  EXPECT_TRUE(validator.report().passed(0.02));

  save_checkpoint(*model, info, folder / "model.h5");
  tnn::Sequential loaded = small_network();
  prepare(loaded, rules_of(4, asymmetric_scheme(8)));
  loaded->eval();
  merge_batch_norms(*loaded);
  Checkpoint::open(folder / "model.h5").load_into(*loaded);
  EXPECT_TRUE(torch::equal(loaded->forward(test.first), model->forward(test.first)));
}

TEST(QatPrepareLayers, RecipesReachEveryLayerAsItsKernelsTakeThem) {
  struct Net : tnn::Module {
    Net() {
      words = register_module("words", nn::Embedding(20, 8));
      bags = register_module("bags", nn::EmbeddingBag(20, 8));
      convolution =
          register_module("convolution", nn::Conv1d(tnn::Conv1dOptions(5, 5, 3).padding(1)));
      attention = register_module("attention", nn::ScaledDotProductAttention());
      product = register_module("product", nn::MatMul());
      add = register_module("add", nn::Add());
      concat_layer = register_module("concat", nn::Concat(-1));
    }
    Tensor forward(const Tensor& tokens) {
      const Tensor x = words->forward(tokens);
      const Tensor y = add->forward(convolution->forward(x), bags->forward(tokens).unsqueeze(1));
      const Tensor z = attention->forward(x, y, y);
      return product->forward(concat_layer->forward({z, x}), y.repeat({1, 4, 1}).slice(1, 0, 16));
    }
    nn::Embedding words{nullptr};
    nn::EmbeddingBag bags{nullptr};
    nn::Conv1d convolution{nullptr};
    nn::ScaledDotProductAttention attention{nullptr};
    nn::MatMul product{nullptr};
    nn::Add add{nullptr};
    nn::Concat concat_layer{nullptr};
  };
  const Tensor tokens = torch::randint(20, {3, 5}, torch::kLong);
  for (const Scheme& activations : {symmetric_scheme(8), asymmetric_scheme(8)}) {
    SCOPED_TRACE(to_string(activations));
    Net model;
    const PrepareReport report = prepare(model, rules_of(8, activations));
    EXPECT_EQ(report.already.size(), 8u);
    EXPECT_TRUE(model.product->other_quantizer->scheme().symmetric);
    const torch::NoGradGuard no_grad;
    set_mode(model, Mode::observe);
    model.forward(tokens);
    set_mode(model, Mode::full);
    calibrate_from_observers(model);
    model.eval();
    Validator validator(model);
    validator.add([&] { return model.forward(tokens); });
    EXPECT_TRUE(validator.report().passed(0.05));
    convert(model);
    const Tensor y = model.forward(tokens);
    EXPECT_EQ(y.sizes(), (std::vector<int64_t>{3, 5, 8}));
    const TemporaryFolder folder;
    save_checkpoint(model, {"network", "{}", "qat", "0"}, folder / "model.h5");
    Net loaded;
    Checkpoint::open(folder / "model.h5").load_into(loaded);
    EXPECT_TRUE(torch::equal(loaded.forward(tokens), y));
  }

  const Scheme per_token = {.granularity = Granularity::per_token, .dynamic = true};
  nn::Conv2d layer(tnn::Conv2dOptions(3, 4, 3));
  tnn::Sequential dynamic(layer);
  prepare(dynamic, rules_of(8, per_token));
  EXPECT_EQ(layer->input_quantizer->scheme().granularity, Granularity::per_tensor);
  EXPECT_TRUE(layer->input_quantizer->scheme().dynamic);
  const Tensor image = torch::randn({2, 3, 6, 6});
  dynamic->eval();
  Validator validator(*dynamic);
  validator.add([&] { return dynamic->forward(image); });
  EXPECT_TRUE(validator.report().passed(1e-3));
}

}  // namespace
}  // namespace vernier
