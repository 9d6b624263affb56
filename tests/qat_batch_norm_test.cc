// Batch norms folded into the layers before them.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/export/validate.h>
#include <vernier/qat/convolution.h>
#include <vernier/qat/linear.h>
#include <vernier/tests/expect_error.h>

#include <sstream>

namespace vernier {
namespace {

using testing::message_of;
using torch::Tensor;

class QatBatchNorm : public ::testing::Test {
 protected:
  QatBatchNorm() { torch::manual_seed(11); }
};

torch::nn::BatchNorm2dImpl& plain_norm(const torch::nn::Sequential& model, size_t index) {
  return *std::dynamic_pointer_cast<torch::nn::BatchNorm2dImpl>(model->ptr(index));
}

/// As a model has them, with statistics and parameters that are not the initial ones.
torch::nn::Sequential conv_model(bool bias = false) {
  torch::nn::Sequential model(
      nn::Conv2d(torch::nn::Conv2dOptions(3, 4, 3).padding(1).bias(bias)),
      torch::nn::BatchNorm2d(4), torch::nn::ReLU(), nn::Conv2d(4, 5, 3),
      torch::nn::BatchNorm2d(torch::nn::BatchNormOptions(5).momentum(std::nullopt)));
  const torch::NoGradGuard no_grad;
  for (const size_t i : {size_t{1}, size_t{4}}) {
    auto& norm = plain_norm(model, i);
    norm.weight.normal_(1, 0.3);
    norm.weight[1] = -0.7;
    norm.weight[2] = 0;
    norm.bias.normal_();
  }
  for (int i = 0; i < 3; ++i) model->forward(torch::randn({6, 3, 7, 7}) * 2 + 1);
  return model;
}

torch::nn::Sequential copy_of(const torch::nn::Sequential& model) {
  return torch::nn::Sequential(
      std::dynamic_pointer_cast<torch::nn::SequentialImpl>(model->clone()));
}

void calibrate(torch::nn::Sequential& model, const Tensor& x) {
  const torch::NoGradGuard no_grad;
  model->eval();
  set_mode(*model, Mode::observe);
  model->forward(x);
  set_mode(*model, Mode::full);
  calibrate_from_observers(*model);
  model->train();
}

Tensor relative_error(const Tensor& a, const Tensor& b) {
  return (a - b).norm() / b.norm().clamp_min(1e-20);
}

TEST_F(QatBatchNorm, FoldingChangesNothingInModeFull) {
  torch::nn::Sequential plain = conv_model(), folded = copy_of(plain);
  EXPECT_EQ(fold_batch_norms(*folded), (std::vector<std::string>{"0", "3"}));
  EXPECT_EQ(folded->size(), plain->size());
  EXPECT_TRUE(fold_batch_norms(*folded).empty());
  const Tensor x = torch::randn({6, 3, 7, 7});
  for (int step = 0; step < 3; ++step)
    EXPECT_TRUE(torch::equal(folded->forward(x), plain->forward(x)));
  plain->eval();
  folded->eval();
  EXPECT_TRUE(torch::equal(folded->forward(x), plain->forward(x)));
  for (const auto& [layer, norm] : {std::pair<size_t, size_t>{0, 1}, {3, 4}}) {
    const auto& ours = *folded->at<nn::Conv2dImpl>(layer).batch_norm;
    const auto& theirs = plain_norm(plain, norm);
    EXPECT_TRUE(torch::equal(ours.running_mean, theirs.running_mean));
    EXPECT_TRUE(torch::equal(ours.running_var, theirs.running_var));
    EXPECT_TRUE(torch::equal(ours.num_batches_tracked, theirs.num_batches_tracked));
  }
}

// With 8 bits quantization is so fine that training follows the float model's outputs, statistics
// and gradients.
TEST_F(QatBatchNorm, TrainingIsThatOfTheFloatModelButForQuantization) {
  for (const bool bias : {false, true}) {
    torch::nn::Sequential plain = conv_model(bias), folded = copy_of(plain);
    fold_batch_norms(*folded);
    for (const auto& item : quantized_layers(*folded))
      item.layer->weight_quantizer->set_policy(RangePolicy::following);
    calibrate(folded, torch::randn({16, 3, 7, 7}) * 2);
    set_mode(*folded, Mode::fake_quant);
    for (int step = 0; step < 2; ++step) {
      const Tensor x = torch::randn({6, 3, 7, 7});
      const Tensor expected = plain->forward(x), y = folded->forward(x);
      EXPECT_LT(relative_error(y, expected).item<float>(), 0.05);
      const Tensor gradient = torch::randn_like(y);
      plain->zero_grad();
      folded->zero_grad();
      expected.backward(gradient);
      y.backward(gradient);
      const auto theirs = plain->named_parameters();
      for (const auto& [ours, name] : {std::pair("0.weight", "0.weight"),
                                       {"3.weight", "3.weight"},
                                       {"0.batch_norm.weight", "1.weight"},
                                       {"3.batch_norm.weight", "4.weight"},
                                       {"3.batch_norm.bias", "4.bias"}})
        EXPECT_LT(relative_error(folded->named_parameters()[ours].grad(), theirs[name].grad())
                      .item<float>(),
                  0.1)
            << ours;
    }
    const auto& ours = *folded->at<nn::Conv2dImpl>(3).batch_norm;
    const auto& theirs = plain_norm(plain, 4);
    EXPECT_LT(relative_error(ours.running_mean, theirs.running_mean).item<float>(), 0.05);
    EXPECT_LT(relative_error(ours.running_var, theirs.running_var).item<float>(), 0.05);
    EXPECT_TRUE(torch::equal(ours.num_batches_tracked, theirs.num_batches_tracked));
  }
}

// One layer in few bits against the formula and its gradients, in float64, and torch::nn's running
// statistics of the same convolution.
TEST_F(QatBatchNorm, TheCorrectionIsTheFormula) {
  torch::nn::Sequential model = conv_model(true);
  fold_batch_norms(*model);
  auto& layer = model->at<nn::Conv2dImpl>(0);
  layer.weight_quantizer->set_settings({.scheme = symmetric_scheme(3, Granularity::per_channel),
                                        .calibrator = {},
                                        .policy = RangePolicy::following});
  calibrate(model, torch::randn({16, 3, 7, 7}));
  layer.set_mode(Mode::fake_quant);
  const Tensor x = torch::randn({6, 3, 7, 7});
  const Tensor qx = layer.input_quantizer->forward(x).to(torch::kDouble);
  BatchNormImpl& norm = *layer.batch_norm;
  torch::nn::BatchNorm2d reference(4);
  reference->running_mean.copy_(norm.running_mean);
  reference->running_var.copy_(norm.running_var);
  reference->forward(torch::conv2d(qx.to(torch::kFloat), layer.weight, layer.bias, 1, 1));
  const Tensor y = layer.forward(x), gradient = torch::randn_like(y);
  EXPECT_TRUE(torch::equal(norm.running_mean, reference->running_mean));
  EXPECT_TRUE(torch::equal(norm.running_var, reference->running_var));

  const auto leaf = [](const Tensor& values) {
    return values.detach().to(torch::kDouble).requires_grad_();
  };
  const Tensor weight = leaf(layer.weight), bias = leaf(layer.bias), gamma = leaf(norm.weight),
               beta = leaf(norm.bias);
  const Tensor plain = torch::conv2d(qx, weight, bias, 1, 1);
  const Tensor mean = plain.mean({0, 2, 3}), variance = plain.var({0, 2, 3}, false);
  const Tensor deviation = (norm.running_var.to(torch::kDouble) + 1e-5).sqrt();
  const Tensor batch_deviation = (variance + 1e-5).sqrt();
  const Tensor folded = weight * (gamma / deviation).view({-1, 1, 1, 1});
  const Tensor codes = layer.weight_quantizer->forward(folded.detach().to(torch::kFloat));
  const Tensor quantized = folded + (codes.to(torch::kDouble) - folded).detach();
  const Tensor expected =
      torch::conv2d(qx, quantized, {}, 1, 1) * (deviation / batch_deviation).view({1, -1, 1, 1}) +
      (beta + (bias - mean) * gamma / batch_deviation).view({1, -1, 1, 1});
  EXPECT_TRUE(torch::allclose(y.to(torch::kDouble), expected, 1e-4, 1e-5));
  // And it is not the float layer.
  const Tensor unquantized = torch::batch_norm(plain.detach(), gamma.detach(), beta.detach(), {},
                                               {}, true, 0.0, 1e-5, false);
  EXPECT_GT(relative_error(y.to(torch::kDouble), unquantized).item<double>(), 0.02);

  y.backward(gradient);
  expected.backward(gradient.to(torch::kDouble));
  for (const auto& [ours, theirs] : {std::pair(layer.weight, weight),
                                     {layer.bias, bias},
                                     {norm.weight, gamma},
                                     {norm.bias, beta}})
    EXPECT_TRUE(torch::allclose(ours.grad().to(torch::kDouble), theirs.grad(), 1e-3, 1e-4));
}

TEST_F(QatBatchNorm, EvaluationAndMergingGiveTheSame) {
  torch::nn::Sequential model = conv_model();
  const Tensor x = torch::randn({6, 3, 7, 7});
  fold_batch_norms(*model);
  calibrate(model, x);
  const torch::NoGradGuard no_grad;
  EXPECT_CONTAINS(message_of([&] { merge_batch_norms(*model); }), "model.eval() first");
  model->eval();
  const Tensor full = model->forward(x);
  set_mode(*model, Mode::fake_quant);
  const Tensor fake = model->forward(x);
  set_mode(*model, Mode::integer);
  const Tensor integer = model->forward(x);
  {
    Validator validator(*model);
    validator.add([&] { return model->forward(x); });
    EXPECT_TRUE(validator.report().passed(1e-3));
  }
  merge_batch_norms(*model);
  for (const auto& item : quantized_layers(*model)) {
    EXPECT_EQ(item.layer->mode(), Mode::integer);
    EXPECT_TRUE(item.layer->float_bias().defined());
  }
  EXPECT_FALSE(model->at<nn::Conv2dImpl>(0).batch_norm);
  EXPECT_TRUE(torch::equal(model->forward(x), integer));
  set_mode(*model, Mode::fake_quant);
  EXPECT_TRUE(torch::equal(model->forward(x), fake));
  set_mode(*model, Mode::full);
  EXPECT_TRUE(torch::allclose(model->forward(x), full, 1e-4, 1e-5));
  EXPECT_NO_THROW(copy_of(model)->forward(x));
}

TEST_F(QatBatchNorm, FrozenStatisticsStay) {
  torch::nn::Sequential model = conv_model();
  fold_batch_norms(*model);
  const Tensor x = torch::randn({6, 3, 7, 7}) + 3;
  calibrate(model, x);
  for (const Mode mode : {Mode::full, Mode::fake_quant}) {
    set_mode(*model, mode);
    freeze_batch_norms(*model);
    auto& norm = *model->at<nn::Conv2dImpl>(0).batch_norm;
    const Tensor mean = norm.running_mean.clone();
    const Tensor training = model->forward(x);
    EXPECT_TRUE(torch::equal(norm.running_mean, mean));
    model->eval();
    EXPECT_TRUE(torch::equal(model->forward(x), training));
    model->train();
    training.sum().backward();
    EXPECT_TRUE(norm.weight.grad().defined());
    freeze_batch_norms(*model, false);
    model->forward(x);
    EXPECT_FALSE(torch::equal(norm.running_mean, mean));
  }
}

TEST_F(QatBatchNorm, LinearLayersFoldToo) {
  torch::nn::Sequential model(nn::Linear(6, 4), torch::nn::BatchNorm1d(4));
  fold_batch_norms(*model);
  const Tensor x = torch::randn({12, 6});
  for (int i = 0; i < 5; ++i) model->forward(x);
  calibrate(model, x);
  set_mode(*model, Mode::fake_quant);
  EXPECT_EQ(model->forward(x).sizes(), (std::vector<int64_t>{12, 4}));
  const Tensor mean = model->at<nn::LinearImpl>(0).batch_norm->running_mean.clone();
  EXPECT_EQ(model->forward(x.slice(0, 0, 0)).sizes(), (std::vector<int64_t>{0, 4}));
  EXPECT_TRUE(torch::equal(model->at<nn::LinearImpl>(0).batch_norm->running_mean, mean));
  EXPECT_CONTAINS(message_of([&] { model->forward(x.slice(0, 0, 1)); }), "a batch of one");
  model->eval();
  EXPECT_EQ(model->forward(x.slice(0, 0, 1)).sizes(), (std::vector<int64_t>{1, 4}));
  Validator validator(*model);
  validator.add([&] { return model->forward(x); });
  EXPECT_TRUE(validator.report().passed(1e-3));
}

TEST_F(QatBatchNorm, CopiesAndArchivesKeepThem) {
  torch::nn::Sequential model = conv_model();
  fold_batch_norms(*model);
  const Tensor x = torch::randn({6, 3, 7, 7});
  calibrate(model, x);
  freeze_batch_norms(*model);
  set_mode(*model, Mode::fake_quant);
  const torch::NoGradGuard no_grad;
  const Tensor expected = model->forward(x);
  EXPECT_TRUE(torch::equal(copy_of(model)->forward(x), expected));
  std::stringstream bytes;
  torch::save(model, bytes);
  torch::nn::Sequential read = conv_model();
  EXPECT_CONTAINS(message_of([&] {
                    std::stringstream again(bytes.str());
                    torch::load(read, again);
                  }),
                  "fold_batch_norms() before loading it");
  fold_batch_norms(*read);
  torch::load(read, bytes);
  set_mode(*read, Mode::fake_quant);
  EXPECT_TRUE(torch::equal(read->forward(x), expected));
  EXPECT_TRUE(read->at<nn::Conv2dImpl>(0).batch_norm->frozen());
}

TEST_F(QatBatchNorm, WhatCannotBeFoldedIsSaid) {
  torch::nn::Sequential without(
      nn::Conv2d(3, 4, 3),
      torch::nn::BatchNorm2d(torch::nn::BatchNormOptions(4).track_running_stats(false)));
  EXPECT_CONTAINS(message_of([&] { fold_batch_norms(*without); }),
                  "layer '0': a batch norm without running statistics");
  torch::nn::Sequential other(nn::Conv2d(3, 4, 3), torch::nn::BatchNorm2d(5));
  EXPECT_CONTAINS(message_of([&] { fold_batch_norms(*other); }), "a batch norm of 5 channels");
  // Not behind a layer: left as it is.
  torch::nn::Sequential apart(nn::Conv2d(3, 4, 3), torch::nn::ReLU(), torch::nn::BatchNorm2d(4));
  EXPECT_TRUE(fold_batch_norms(*apart).empty());
}

}  // namespace
}  // namespace vernier
