// Copies of layers: clones and archives keep what calibration found.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/qat/linear.h>
#include <vernier/tests/expect_error.h>

#include <sstream>
#include <string>

namespace vernier {
namespace {

using testing::message_of;
using torch::Tensor;

constexpr int64_t kIn = 12, kOut = 7;
const Scheme kSymmetric = symmetric_scheme(8);
const Scheme kAsymmetric = asymmetric_scheme(8);
const Scheme kPerToken = {.granularity = Granularity::per_token, .dynamic = true};
const Scheme kInputs[] = {kSymmetric, kAsymmetric, kPerToken};

class QatCopies : public ::testing::Test {
 protected:
  QatCopies() { torch::manual_seed(5); }
};

void calibrate(nn::LinearImpl& layer, const Scheme& inputs, int weight_bits = 8) {
  QuantizerSettings settings = layer.input_quantizer->settings();
  settings.scheme = inputs;
  layer.input_quantizer->set_settings(settings);
  settings = layer.weight_quantizer->settings();
  settings.scheme = symmetric_scheme(weight_bits, Granularity::per_channel);
  layer.weight_quantizer->set_settings(settings);
  layer.weight_quantizer->calibrate(layer.weight);
  if (!inputs.dynamic) layer.input_quantizer->set_ranges({{-2, 3}}, torch::kCPU);
}

nn::Linear calibrated(const Scheme& inputs, bool bias = true) {
  nn::Linear layer(torch::nn::LinearOptions(kIn, kOut).bias(bias));
  calibrate(*layer, inputs);
  return layer;
}

/// Both give the same in every mode, and what they were made of is the same.
void expect_same(nn::LinearImpl& a, nn::LinearImpl& b) {
  const torch::NoGradGuard no_grad;
  EXPECT_EQ(a.input_quantizer->scheme(), b.input_quantizer->scheme());
  EXPECT_EQ(a.weight_quantizer->scheme(), b.weight_quantizer->scheme());
  EXPECT_TRUE(torch::equal(a.weight_quantizer->scale(), b.weight_quantizer->scale()));
  const Tensor x = torch::randn({5, a.options.in_features()});
  for (const Mode mode : {Mode::full, Mode::fake_quant, Mode::integer}) {
    a.set_mode(mode);
    b.set_mode(mode);
    EXPECT_TRUE(torch::equal(a.forward(x), b.forward(x))) << to_string(mode);
  }
}

template <typename From, typename To>
void through_an_archive(const From& from, To& to) {
  std::stringstream bytes;
  torch::save(from, bytes);
  torch::load(to, bytes);
}

// ---- Clones -------------------------------------------------------------------------------------

TEST_F(QatCopies, ClonesStayInTrainingOrEvaluation) {
  nn::Linear layer = calibrated(kAsymmetric);
  for (const bool training : {false, true}) {
    layer->train(training);
    const auto copy = layer->clone();
    EXPECT_EQ(copy->is_training(), training);
    for (const auto& child : copy->children()) EXPECT_EQ(child->is_training(), training);
  }
}

TEST_F(QatCopies, ClonesAreWholeLayersOfTheirOwn) {
  for (const Scheme& inputs : kInputs) {
    for (const bool bias : {true, false}) {
      nn::Linear layer = calibrated(inputs, bias);
      layer->set_mode(Mode::integer);
      const auto copy = std::dynamic_pointer_cast<nn::LinearImpl>(layer->clone());
      ASSERT_NE(copy, nullptr);
      EXPECT_EQ(copy->mode(), Mode::integer);
      EXPECT_EQ(copy->named_parameters().keys(), layer->named_parameters().keys());
      EXPECT_EQ(copy->named_buffers().keys(), layer->named_buffers().keys());
      EXPECT_EQ(copy->children()[0].get(), copy->input_quantizer.get());
      EXPECT_EQ(copy->children()[1].get(), copy->weight_quantizer.get());
      expect_same(*layer, *copy);

      const torch::NoGradGuard no_grad;
      copy->set_mode(Mode::integer);
      layer->set_mode(Mode::integer);
      const Tensor codes = layer->weight_codes().clone(), weight = layer->weight.clone();
      const Tensor scale = layer->weight_quantizer->scale().clone();
      copy->weight_codes().zero_();
      copy->weight.zero_();
      copy->weight_quantizer->scale().zero_();
      EXPECT_TRUE(torch::equal(layer->weight_codes(), codes));
      EXPECT_TRUE(torch::equal(layer->weight, weight));
      EXPECT_TRUE(torch::equal(layer->weight_quantizer->scale(), scale));
    }
  }
}

TEST_F(QatCopies, ClonesLeaveTheProbeAndWhatWasObserved) {
  nn::Linear layer = calibrated(kSymmetric);
  int calls = 0;
  layer->set_probe([&](const std::vector<Tensor>&, const Tensor&) { ++calls; });
  layer->set_mode(Mode::observe);
  layer->forward(torch::randn({2, kIn}));
  const auto copy = std::dynamic_pointer_cast<nn::LinearImpl>(layer->clone());
  copy->forward(torch::randn({3, kIn}));
  EXPECT_EQ(calls, 1);
  EXPECT_EQ(layer->input_quantizer->observer().statistics().histogram.total(), 2 * kIn);
  EXPECT_EQ(copy->input_quantizer->observer().statistics().histogram.total(), 3 * kIn);

  layer->set_quantized(false);
  EXPECT_FALSE(std::dynamic_pointer_cast<nn::LinearImpl>(layer->clone())->quantized());
}

struct Pair : torch::nn::Cloneable<Pair> {
  Pair() { Pair::reset(); }
  void reset() override {
    first = register_module("first", nn::Linear(kIn, kOut));
    second = register_module("second", nn::Linear(kOut, kIn));
  }
  nn::Linear first{nullptr}, second{nullptr};
};

TEST_F(QatCopies, ModelsOfLayersAreCloned) {
  const auto model = std::make_shared<Pair>();
  calibrate(*model->first, kAsymmetric);
  model->first->set_mode(Mode::fake_quant);
  const auto copy = std::dynamic_pointer_cast<Pair>(model->clone());
  ASSERT_NE(copy, nullptr);
  EXPECT_EQ(copy->first->mode(), Mode::fake_quant);
  EXPECT_EQ(quantized_layers(*copy).size(), 2u);
  EXPECT_NE(copy->first.get(), model->first.get());
  EXPECT_EQ(copy->named_buffers()["first.weight_quantizer.scale"].data_ptr(),
            copy->first->weight_quantizer->scale().data_ptr());
  expect_same(*model->first, *copy->first);
  EXPECT_FALSE(copy->second->weight_quantizer->calibrated());

  torch::nn::Sequential chain(calibrated(kSymmetric), torch::nn::ReLU());
  const auto chain_copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(chain->clone());
  expect_same(chain->at<nn::LinearImpl>(0), chain_copy->at<nn::LinearImpl>(0));
}

// ---- Archives -----------------------------------------------------------------------------------

TEST_F(QatCopies, ArchivesRestoreCalibratedLayers) {
  for (const Scheme& inputs : kInputs) {
    nn::Linear saved(kIn, kOut), loaded(kIn, kOut);
    calibrate(*saved, inputs, /*weight_bits=*/4);
    through_an_archive(saved, loaded);
    expect_same(*saved, *loaded);

    const auto model = std::make_shared<Pair>();
    auto whole = std::make_shared<Pair>();
    calibrate(*model->second, inputs);
    through_an_archive(model, whole);
    expect_same(*model->second, *whole->second);
    EXPECT_FALSE(whole->first->weight_quantizer->calibrated());
  }
}

TEST_F(QatCopies, ModesSurviveLoadingWhereTheyCan) {
  const torch::NoGradGuard no_grad;
  nn::Linear saved = calibrated(kSymmetric), loaded = calibrated(kAsymmetric);
  loaded->set_mode(Mode::integer);
  through_an_archive(saved, loaded);
  EXPECT_EQ(loaded->mode(), Mode::integer);
  saved->set_mode(Mode::integer);
  const Tensor x = torch::randn({5, kIn});
  EXPECT_TRUE(torch::equal(loaded->forward(x), saved->forward(x)));  // codes of the new weight

  const torch::nn::Linear plain(kIn, kOut);
  through_an_archive(plain, loaded);
  EXPECT_EQ(loaded->mode(), Mode::full);
}

TEST_F(QatCopies, ArchivesInterchangeWithTorchsWhateverTheCalibration) {
  const torch::NoGradGuard no_grad;
  const Tensor x = torch::randn({5, kIn});
  for (const Scheme& inputs : kInputs) {
    nn::Linear ours = calibrated(inputs);
    torch::nn::Linear theirs(kIn, kOut);
    through_an_archive(ours, theirs);
    EXPECT_TRUE(torch::equal(theirs->forward(x), ours->forward(x)));

    const torch::nn::Linear fresh(kIn, kOut);
    through_an_archive(fresh, ours);
    EXPECT_TRUE(torch::equal(fresh->weight, ours->weight));
    EXPECT_FALSE(ours->weight_quantizer->calibrated());  // the scales were of another weight
    EXPECT_EQ(ours->input_quantizer->scheme(), inputs);
    calibrate(*ours, inputs);
    ours->set_mode(Mode::integer);
  }
}

TEST_F(QatCopies, ArchivesThatContradictThemselvesAreRefused) {
  const auto load = [](const Scheme& scheme, const Tensor& scale, const Tensor& zero_point) {
    torch::serialize::OutputArchive out;
    out.write("scale", scale, /*is_buffer=*/true);
    out.write("zero_point", zero_point, /*is_buffer=*/true);
    out.write("bits", c10::IValue(int64_t{scheme.bits}));
    out.write("granularity", c10::IValue(to_string(scheme.granularity)));
    out.write("group_size", c10::IValue(scheme.group_size));
    out.write("symmetric", c10::IValue(scheme.symmetric));
    out.write("narrow_range", c10::IValue(scheme.narrow_range));
    out.write("dynamic", c10::IValue(scheme.dynamic));
    std::stringstream bytes;
    out.save_to(bytes);
    torch::serialize::InputArchive in;
    in.load_from(bytes);
    Quantizer quantizer;
    quantizer->load(in);
  };
  const Tensor one = torch::ones({1}), zero = torch::zeros({1}, torch::kInt),
               none = torch::empty({0}), no_zero = torch::empty({0}, torch::kInt);
  const auto refusal = [&](const Scheme& scheme, const Tensor& scale, const Tensor& zero_point) {
    return message_of([&] { load(scheme, scale, zero_point); });
  };
  EXPECT_EQ(refusal(kSymmetric, one, no_zero), "");
  EXPECT_EQ(refusal(kAsymmetric, one, zero), "");
  EXPECT_EQ(refusal(kPerToken, none, no_zero), "");
  EXPECT_CONTAINS(refusal(kSymmetric, one, zero), "do not go with the scheme");
  EXPECT_CONTAINS(refusal(kAsymmetric, one, no_zero), "do not go with the scheme");
  EXPECT_CONTAINS(refusal(kSymmetric, none, no_zero), "do not go with the scheme");
  EXPECT_EQ(refusal(kPerToken, one, no_zero), "");  // a factor that clips
  EXPECT_CONTAINS(refusal(kPerToken, torch::ones({2}), no_zero), "do not go with the scheme");
  EXPECT_CONTAINS(refusal(kPerToken, one, zero), "do not go with the scheme");
  EXPECT_CONTAINS(refusal(kSymmetric, -one, no_zero), "finite and positive");
  Scheme wide = kSymmetric;
  wide.bits = 9;
  EXPECT_CONTAINS(refusal(wide, one, no_zero), "9 bits");
}

}  // namespace
}  // namespace vernier
