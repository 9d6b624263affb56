// Quantizers and training sessions on the GPU: as on the CPU, and without making the host wait.
#include <c10/cuda/CUDAFunctions.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/qat/linear.h>
#include <vernier/qat/prepare.h>
#include <vernier/qat/session.h>
#include <vernier/recipes/recipe.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/gpu_compare.h>
#include <vernier/tests/temporary_folder.h>

#include <limits>
#include <memory>
#include <string>
#include <vector>

namespace vernier {
namespace {

using testing::gpu;
using testing::message_of;
using testing::same;
using torch::Tensor;

class QatGpuTest : public testing::GpuTest {};

/// While it lives, whatever makes the host wait for the GPU throws.
class NoSynchronization {
 public:
  NoSynchronization() { set(c10::cuda::SyncDebugMode::L_ERROR); }
  ~NoSynchronization() { set(c10::cuda::SyncDebugMode::L_DISABLED); }
  NoSynchronization(const NoSynchronization&) = delete;
  NoSynchronization& operator=(const NoSynchronization&) = delete;

 private:
  static void set(c10::cuda::SyncDebugMode mode) {
    c10::cuda::warning_state().set_sync_debug_mode(mode);
  }
};

std::vector<QuantizerSettings> changing_settings() {
  std::vector<QuantizerSettings> all;
  for (const Scheme& scheme :
       {symmetric_scheme(8), asymmetric_scheme(8), symmetric_scheme(4, Granularity::per_channel),
        asymmetric_scheme(3, Granularity::per_channel)}) {
    all.push_back({scheme, {}, RangePolicy::moving_average, 0.3});
    all.push_back({scheme, {}, RangePolicy::learned});
    if (scheme.symmetric) all.push_back({scheme, {}, RangePolicy::following});
  }
  return all;
}

TEST_F(QatGpuTest, RangesMoveAsOnTheCpu) {
  for (const QuantizerSettings& settings : changing_settings()) {
    for (const torch::Dtype dtype : {torch::kFloat, torch::kHalf, torch::kBFloat16}) {
      SCOPED_TRACE(to_string(settings.scheme) + " " + to_string(settings.policy));
      Quantizer host(settings);
      const Tensor x = torch::randn({64, 100}).to(dtype);
      host->calibrate(x);
      Quantizer device(std::dynamic_pointer_cast<QuantizerImpl>(host->clone(torch::kCUDA)));
      for (const double factor : {1.0, 2.0, 0.1, 30.0}) {
        const Tensor values = (factor * x).to(dtype), values_there = gpu(values);
        Tensor output;
        {
          const NoSynchronization guard;
          output = device->forward(values_there);
        }
        EXPECT_TRUE(same(host->forward(values), output));
        EXPECT_TRUE(same(host->scale(), device->scale()));
        if (!settings.scheme.symmetric) {
          EXPECT_TRUE(same(*host->zero_point(), *device->zero_point()));
        }
      }
    }
  }
}

TEST_F(QatGpuTest, LearnedGradientsAreTheCpusWithinTheBound) {
  for (const Scheme& scheme :
       {symmetric_scheme(4), asymmetric_scheme(4, Granularity::per_channel)}) {
    Quantizer host(QuantizerSettings{scheme, {}, RangePolicy::learned}, 0, Operand::weight);
    const Tensor values = torch::randn({128, 512});
    host->calibrate(0.7 * values);
    Quantizer device(std::dynamic_pointer_cast<QuantizerImpl>(host->clone(torch::kCUDA)));
    Tensor x = values.clone().requires_grad_(), x_there = gpu(values).requires_grad_();
    const Tensor gradient = torch::randn({128, 512});
    host->forward(x).backward(gradient);
    device->forward(x_there).backward(gpu(gradient));
    EXPECT_TRUE(same(x.grad(), x_there.grad()));
    for (const auto& item : host->named_parameters()) {
      const Tensor there = device->named_parameters()[item.key()].grad().cpu();
      EXPECT_TRUE(torch::allclose(item.value().grad(), there, 1e-3, 1e-3)) << item.key();
    }
  }
}

struct Net : torch::nn::Cloneable<Net> {
  Net() { Net::reset(); }
  void reset() override {
    first = register_module("first", nn::Linear(64, 96));
    norm = register_module("norm", torch::nn::BatchNorm1d(96));
    dropout = register_module("dropout", torch::nn::Dropout(0.1));
    second = register_module("second", nn::Linear(96, 32));
  }
  Tensor forward(const Tensor& x) { return second(dropout(torch::relu(norm(first(x))))); }
  nn::Linear first{nullptr}, second{nullptr};
  torch::nn::BatchNorm1d norm{nullptr};
  torch::nn::Dropout dropout{nullptr};
};

struct Program {
  explicit Program(const std::string& recipe, int64_t check_every = 4)
      : model(std::make_shared<Net>()) {
    model->to(torch::kCUDA);
    prepare(*model, load_recipe(recipe));
    optimizer = std::make_unique<torch::optim::SGD>(model->parameters(),
                                                    torch::optim::SGDOptions(1e-3).momentum(0.9));
    SessionSettings settings;
    settings.calibration_batches = 2;
    settings.freeze_observers_at = 6;
    settings.freeze_batch_norm_at = 8;
    settings.check_every = check_every;
    session = std::make_unique<TrainingSession>(*model, settings);
    model->train();
  }
  void step(int64_t i) {
    const Tensor x =
        gpu(torch::linspace(-1, 1, 48 * 64).reshape({48, 64}) * static_cast<double>(1 + i % 3));
    step_on(x);
  }
  void step_on(const Tensor& x) {
    optimizer->zero_grad();
    const Tensor loss = (model->forward(x) - x.slice(1, 0, 32)).square().mean();
    loss.backward();
    optimizer->step();
    session->step(loss);
  }

  std::shared_ptr<Net> model;
  std::unique_ptr<torch::optim::SGD> optimizer;
  std::unique_ptr<TrainingSession> session;
};

TEST_F(QatGpuTest, StepsBetweenChecksDoNotWait) {
  for (const char* recipe : {"qat-w8a8", "qat-w4a4"}) {
    Program program(recipe, /*check_every=*/100);
    for (int64_t i = 0; i < 4; ++i) program.step(i);
    const Tensor x = gpu(torch::randn({48, 64}));
    const NoSynchronization guard;
    for (int64_t i = 4; i < 10; ++i) EXPECT_NO_THROW(program.step_on(x)) << recipe;
  }
}

TEST_F(QatGpuTest, ResumedTrainingIsUninterruptedTrainingBitForBit) {
  const testing::TemporaryFolder folder;
  for (const int64_t stop : {1, 4, 7, 9}) {
    SCOPED_TRACE(stop);
    Program whole("qat-w8a8");
    for (int64_t i = 0; i < stop; ++i) whole.step(i);
    whole.session->save(folder.path() / "session.pt", whole.optimizer.get());
    for (int64_t i = stop; i < 12; ++i) whole.step(i);
    Program resumed("qat-w8a8");
    resumed.session->load(folder.path() / "session.pt", resumed.optimizer.get());
    for (int64_t i = stop; i < 12; ++i) resumed.step(i);
    const auto expected = whole.model->named_parameters(),
               actual = resumed.model->named_parameters();
    for (const auto& item : expected)
      EXPECT_TRUE(torch::equal(item.value(), actual[item.key()])) << item.key();
  }
}

TEST_F(QatGpuTest, ChecksNameTheLayer) {
  Program program("qat-w4a4", /*check_every=*/1);
  for (int64_t i = 0; i < 3; ++i) program.step(i);
  Tensor x = gpu(torch::randn({48, 64}));
  x[3][40] = std::numeric_limits<float>::quiet_NaN();  // not in what the loss compares with
  EXPECT_CONTAINS(message_of([&] { program.step_on(x); }), "layer 'first' was given NaN");

  Program other("qat-w4a4", /*check_every=*/1);
  for (int64_t i = 0; i < 3; ++i) other.step(i);
  {
    const torch::NoGradGuard no_grad;
    other.model->second->weight_quantizer->scale()[0] = -1.0f;
  }
  EXPECT_CONTAINS(message_of([&] { other.step(5); }), "layer 'second' (weight)");
}

TEST_F(QatGpuTest, IntegerModeAndChainsAsTrained) {
  torch::nn::Sequential model(nn::Linear(64, 128), torch::nn::ReLU(), nn::Linear(128, 32));
  model->to(torch::kCUDA);
  QuantizationRules rules;
  rules.weights = {symmetric_scheme(8, Granularity::per_channel), {}, RangePolicy::following};
  apply_rules(*model, rules);
  chain(*model, "0", "2");
  const torch::NoGradGuard no_grad;
  const Tensor x = gpu(torch::randn({80, 64}));
  set_mode(*model, Mode::observe);
  model->forward(x);
  calibrate_from_observers(*model);
  set_mode(*model, Mode::fake_quant);
  model->eval();
  const Tensor fake = model->forward(x);
  convert(model);
  EXPECT_LT(((model->forward(x) - fake).norm() / fake.norm()).item<double>(), 2e-3);
  EXPECT_CONTAINS(message_of([&] { model->forward(x.cpu()); }), "no weight codes there");
}

}  // namespace
}  // namespace vernier
