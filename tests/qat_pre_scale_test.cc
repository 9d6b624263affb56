// Factors on the channels of a layer's input: the same function in every mode, and nothing lost on
// the way through copies, archives and checkpoints.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/export/checkpoint.h>
#include <vernier/export/validate.h>
#include <vernier/kernels/quantize.h>
#include <vernier/qat/convolution.h>
#include <vernier/qat/linear.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/temporary_folder.h>

#include <sstream>

namespace vernier {
namespace {

using testing::message_of;
using torch::Tensor;

struct Model : torch::nn::Module {
  Model() { fc = register_module("fc", nn::Linear(16, 8)); }
  nn::Linear fc{nullptr};
};

Scheme per_token_scheme() {
  Scheme scheme = symmetric_scheme(8, Granularity::per_token);
  scheme.dynamic = true;
  return scheme;
}

class QatPreScale : public ::testing::Test {
 protected:
  QatPreScale() { torch::manual_seed(5); }

  void calibrate(Model& model) {
    set_mode(model, Mode::observe);
    const torch::NoGradGuard no_grad;
    model.fc(input);
    calibrate_from_observers(model);
  }

  Tensor input = torch::randn({32, 16});
  Tensor factors = torch::rand({16}) + 0.5;
};

TEST_F(QatPreScale, EveryModeComputesOnTheProduct) {
  const torch::NoGradGuard no_grad;
  for (const Scheme& scheme : {symmetric_scheme(8), asymmetric_scheme(8), per_token_scheme()}) {
    SCOPED_TRACE(to_string(scheme));
    Model scaled, plain;
    plain.fc->weight.copy_(scaled.fc->weight);
    plain.fc->bias.copy_(scaled.fc->bias);
    for (Model* model : {&scaled, &plain}) {
      QuantizerSettings settings;
      settings.scheme = scheme;
      model->fc->input_quantizer->set_settings(settings);
    }
    scaled.fc->set_pre_scale(factors);
    const Tensor product = input * factors;
    EXPECT_TRUE(scaled.fc(input).equal(plain.fc(product)));
    for (const auto& [model, values] : {std::pair(&scaled, input), std::pair(&plain, product)}) {
      set_mode(*model, Mode::observe);
      model->fc(values);
      calibrate_from_observers(*model);
      if (scheme.dynamic) model->fc->weight_quantizer->calibrate(model->fc->weight);
    }
    for (const Mode mode : {Mode::observe, Mode::fake_quant, Mode::integer}) {
      SCOPED_TRACE(to_string(mode));
      set_mode(scaled, mode);
      set_mode(plain, mode);
      EXPECT_TRUE(scaled.fc(input).equal(plain.fc(product)));
    }
    const auto codes = scaled.fc->input_codes(0, input);
    EXPECT_TRUE(codes.codes.equal(plain.fc->input_codes(0, product).codes));
    Validator validator(scaled);
    validator.add([&] { return scaled.fc(input); });
    EXPECT_TRUE(validator.report().passed(1e-3));
  }
}

TEST_F(QatPreScale, HalfPrecisionProductsAreQuantizedUnrounded) {
  const torch::NoGradGuard no_grad;
  Model model;
  model.fc->set_pre_scale(factors);
  calibrate(model);
  model.to(torch::kBFloat16);
  set_mode(model, Mode::full);
  set_mode(model, Mode::integer);
  const Tensor half = input.to(torch::kBFloat16);
  const QuantizerImpl& quantizer = *model.fc->input_quantizer;
  const Tensor expected = quantize(half.to(torch::kFloat) * factors, quantizer.scale(),
                                   std::nullopt, quantizer.scheme());
  EXPECT_TRUE(model.fc->input_codes(0, half).codes.equal(expected));
  EXPECT_EQ(model.fc(half).scalar_type(), torch::kBFloat16);
  set_mode(model, Mode::fake_quant);
  EXPECT_EQ(model.fc(half).scalar_type(), torch::kBFloat16);
}

TEST_F(QatPreScale, GradientsGoThroughTheProduct) {
  Model model;
  model.fc->set_pre_scale(factors);
  calibrate(model);
  for (const Mode mode : {Mode::full, Mode::fake_quant}) {
    set_mode(model, mode);
    Tensor x = (input / 4).detach().requires_grad_(true);  // inside the range: nothing is clipped
    model.fc(x).sum().backward();
    const Tensor weight = mode == Mode::full
                              ? model.fc->weight.detach()
                              : model.fc->weight_quantizer->forward(model.fc->weight).detach();
    const Tensor expected = (weight.sum(0) * factors).expand_as(x);
    EXPECT_LE((x.grad() - expected).abs().max().item<float>(), 1e-5f) << to_string(mode);
  }
}

TEST_F(QatPreScale, CopiesArchivesAndCheckpointsKeepIt) {
  const torch::NoGradGuard no_grad;
  Model model;
  model.fc->set_pre_scale(factors);
  const auto archived = [](Model& from, Model& to) {
    std::stringstream stream;
    torch::serialize::OutputArchive out;
    from.save(out);
    out.save_to(stream);
    torch::serialize::InputArchive in;
    in.load_from(stream);
    to.load(in);
  };
  Model early;  // before calibration
  archived(model, early);
  EXPECT_TRUE(early.fc->input_quantizer->pre_scale().equal(factors));
  EXPECT_TRUE(early.fc(input).equal(model.fc(input)));

  calibrate(model);
  set_mode(model, Mode::integer);
  const Tensor expected = model.fc(input);
  const auto copy = std::dynamic_pointer_cast<nn::LinearImpl>(model.fc->clone());
  EXPECT_TRUE(copy->forward(input).equal(expected));
  Model late;
  archived(model, late);
  set_mode(late, Mode::integer);
  EXPECT_TRUE(late.fc(input).equal(expected));

  const testing::TemporaryFolder folder;
  save_checkpoint(model, {}, folder / "model.h5");
  Model loaded;
  Checkpoint::open(folder / "model.h5").load_into(loaded);
  EXPECT_TRUE(loaded.fc(input).equal(expected));

  // Another recipe keeps it: it belongs to the weight.
  loaded.fc->input_quantizer->set_settings({});
  EXPECT_TRUE(loaded.fc->input_quantizer->pre_scale().equal(factors));
  // An archive of a layer without takes it off.
  Model bare;
  archived(bare, loaded);
  EXPECT_EQ(loaded.fc->input_quantizer->pre_scale().numel(), 0);
  EXPECT_TRUE(loaded.fc(input).equal(bare.fc(input)));

  model.fc->set_mode(Mode::full);
  model.fc->set_quantized(false);
  EXPECT_CONTAINS(message_of([&] { save_checkpoint(model, {}, folder / "full.h5"); }),
                  "layer 'fc' has factors on its input");
}

TEST_F(QatPreScale, WhatDoesNotFitIsRefused) {
  Model model;
  set_mode(model, Mode::full);  // names the layer
  EXPECT_EQ(message_of([&] { model.fc->set_pre_scale(torch::ones({3})); }),
            "layer 'fc' has 16 inputs and takes no 3 factors");
  for (const Tensor& wrong : {-factors, factors / 0, factors.to(torch::kDouble)})
    EXPECT_CONTAINS(message_of([&] { model.fc->set_pre_scale(wrong); }), "finite and positive");
  EXPECT_CONTAINS(message_of([&] { model.fc->weight_quantizer->set_pre_scale(factors); }),
                  "is for activations");
  nn::Conv2d convolution(torch::nn::Conv2dOptions(4, 4, 3));
  convolution->set_layer_name("conv");
  EXPECT_EQ(message_of([&] { convolution->set_pre_scale(torch::ones({4})); }),
            "layer 'conv' takes no factors on its input: only Linear does");
  // Taken off, the layer is what it was.
  const Tensor before = model.fc(input);
  model.fc->set_pre_scale(factors);
  model.fc->set_pre_scale(torch::empty({0}));
  EXPECT_TRUE(model.fc(input).equal(before));
}

}  // namespace
}  // namespace vernier
