// The training session: its schedule, what it finds wrong, and training that goes on where it
// stopped.
#include <ATen/CPUGeneratorImpl.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/qat/linear.h>
#include <vernier/qat/prepare.h>
#include <vernier/qat/session.h>
#include <vernier/recipes/recipe.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/temporary_folder.h>

#include <fstream>
#include <limits>
#include <string>
#include <vector>

namespace vernier {
namespace {

using testing::message_of;
using testing::TemporaryFolder;
using torch::Tensor;
namespace tnn = torch::nn;

constexpr int64_t kIn = 6, kHidden = 10, kOut = 3, kBatch = 8;

struct Net : tnn::Cloneable<Net> {
  explicit Net(int64_t hidden_size = kHidden) : hidden(hidden_size) { Net::reset(); }
  void reset() override {
    first = register_module("first", nn::Linear(kIn, hidden));
    norm = register_module("norm", tnn::BatchNorm1d(hidden));
    dropout = register_module("dropout", tnn::Dropout(0.2));
    second = register_module("second", nn::Linear(hidden, kOut));
  }
  Tensor forward(const Tensor& x) { return second(dropout(torch::relu(norm(first(x))))); }
  int64_t hidden;
  nn::Linear first{nullptr}, second{nullptr};
  tnn::BatchNorm1d norm{nullptr};
  tnn::Dropout dropout{nullptr};
};

Recipe recipe_of(const std::string& activations = "ranges: moving_average, symmetric: false") {
  return parse_recipe(
      "name: x\nweights: {bits: 4, ranges: learned}\nactivations: {" + activations + "}", "test");
}

/// A program that trains: everything that a loop has.
struct Program {
  explicit Program(const Recipe& recipe = recipe_of(), const SessionSettings& settings = schedule(),
                   int64_t hidden = kHidden)
      : model(std::make_shared<Net>(hidden)) {
    prepare(*model, recipe);
    auto for_ranges = std::make_unique<torch::optim::AdamWOptions>(1e-4);
    for_ranges->weight_decay(0);
    optimizer = std::make_unique<torch::optim::AdamW>(
        std::vector<torch::optim::OptimizerParamGroup>{
            {parameters_without_ranges(*model)}, {learned_ranges(*model), std::move(for_ranges)}},
        torch::optim::AdamWOptions(2e-3));
    session = std::make_unique<TrainingSession>(*model, settings);
    model->train();
  }
  static SessionSettings schedule() {
    SessionSettings settings;
    settings.calibration_batches = 3;
    settings.freeze_observers_at = 8;
    settings.freeze_batch_norm_at = 10;
    settings.keep_twin = true;
    return settings;
  }
  /// Batch number i is always the same.
  double step(int64_t i) {
    auto generator = at::make_generator<at::CPUGeneratorImpl>(100 + i);
    const Tensor x = torch::randn({kBatch, kIn}, generator) + 0.3;
    optimizer->zero_grad();
    const Tensor y = model->forward(x);
    Tensor loss = (y - x.slice(1, 0, kOut).tanh()).square().mean();
    if (session->settings().keep_twin)
      loss = loss + 0.1 * distillation_loss(y, session->twin<Net>().forward(x), 2.0);
    loss.backward();
    optimizer->step();
    session->step(loss);
    return loss.item<double>();
  }
  void steps(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) step(i);
  }
  std::map<std::string, Tensor> state() const {
    std::map<std::string, Tensor> all;
    for (const auto& item : model->named_parameters())
      all[item.key()] = item.value().detach().clone();
    for (const auto& item : model->named_buffers()) all[item.key()] = item.value().clone();
    return all;
  }

  std::shared_ptr<Net> model;
  std::unique_ptr<torch::optim::AdamW> optimizer;
  std::unique_ptr<TrainingSession> session;
};

void expect_same(const Program& a, const Program& b) {
  const auto mine = a.state(), theirs = b.state();
  ASSERT_EQ(mine.size(), theirs.size());
  for (const auto& [name, tensor] : mine)
    EXPECT_TRUE(torch::equal(tensor, theirs.at(name))) << name;
  EXPECT_EQ(a.session->steps(), b.session->steps());
}

class QatSession : public ::testing::Test {
 protected:
  QatSession() { torch::manual_seed(29); }
  TemporaryFolder folder_;
};

// ---- The schedule -------------------------------------------------------------------------------

TEST_F(QatSession, CalibratesQuantizesAndFreezesInTurn) {
  Program program;
  nn::Linear& layer = program.model->second;
  const auto mode = [&] { return layer->mode(); };
  EXPECT_EQ(mode(), Mode::observe);
  EXPECT_TRUE(program.session->calibrating());
  program.steps(0, 2);
  EXPECT_EQ(mode(), Mode::observe);
  EXPECT_FALSE(layer->weight_quantizer->calibrated());
  program.steps(2, 3);
  EXPECT_EQ(mode(), Mode::fake_quant);
  EXPECT_FALSE(program.session->calibrating());
  EXPECT_EQ(layer->input_quantizer->observer().statistics().histogram.total(), 0);

  const Tensor scale = layer->input_quantizer->scale().clone();
  program.steps(3, 8);
  const Tensor moved = layer->input_quantizer->scale().clone();
  EXPECT_FALSE(torch::equal(scale, moved));
  EXPECT_EQ(layer->input_quantizer->settings().policy, RangePolicy::frozen);
  const Tensor weight_scale = layer->weight_quantizer->scale().detach().clone();
  program.steps(8, 10);
  EXPECT_TRUE(torch::equal(layer->input_quantizer->scale(), moved));
  EXPECT_FALSE(torch::equal(layer->weight_quantizer->scale(), weight_scale));  // goes on learning

  const Tensor mean = program.model->norm->running_mean.clone();
  EXPECT_FALSE(program.model->norm->is_training());
  program.model->train();  // as at the beginning of an epoch
  program.steps(10, 12);
  EXPECT_TRUE(torch::equal(program.model->norm->running_mean, mean));
  EXPECT_FALSE(program.model->norm->is_training());
  EXPECT_TRUE(program.model->dropout->is_training());
  program.model->eval();
  program.session->train();
  EXPECT_FALSE(program.model->norm->is_training());
  EXPECT_TRUE(program.model->dropout->is_training());
}

TEST_F(QatSession, TrainingAtFewBitsLearns) {
  SessionSettings settings;
  settings.calibration_batches = 4;
  Program program(recipe_of(), settings);
  program.model->dropout->options.p(0);
  double first = 0, last = 0;
  for (int i = 0; i < 300; ++i) {
    const double loss = program.step(i % 20);
    if (i >= 4 && i < 24) first += loss;
    if (i >= 280) last += loss;
  }
  EXPECT_LT(last, 0.5 * first);
  program.model->eval();
  const torch::NoGradGuard no_grad;
  const Tensor x = torch::randn({16, kIn}), fake = program.model->forward(x);
  convert(*program.model);
  EXPECT_TRUE(torch::allclose(program.model->forward(x), fake, 1e-4, 1e-4));
}

TEST_F(QatSession, CalibratedModelsNeedNoBatches) {
  SessionSettings none;
  none.calibration_batches = 0;
  EXPECT_CONTAINS(message_of([&] { Program program(recipe_of(), none); }),
                  "layer 'first': the input has no scale");
  Program calibrated;
  calibrated.steps(0, 4);
  calibrated.session = std::make_unique<TrainingSession>(*calibrated.model, none);
  EXPECT_EQ(calibrated.model->first->mode(), Mode::fake_quant);
  // Ranges that need no calibration.
  const Recipe dynamic = parse_recipe(
      "name: x\nweights: {ranges: following}\nactivations: {granularity: per_token}", "test");
  Program free(dynamic, none);
  free.steps(0, 2);
}

// ---- What goes wrong ----------------------------------------------------------------------------

TEST_F(QatSession, LossesThatAreNoNumbersNameTheLayer) {
  for (const int64_t when : {1, 6}) {  // while calibrating, and after
    Program program;
    program.steps(0, when);
    {
      const torch::NoGradGuard no_grad;
      program.model->norm->bias[2] = std::numeric_limits<float>::quiet_NaN();
    }
    std::string message = message_of([&] { program.step(when); });
    EXPECT_CONTAINS(message, "at step " + std::to_string(when + 1));
    // A quantizer makes a code of NaN, and the loss looks well.
    EXPECT_CONTAINS(message, when == 1 ? "the loss is nan" : "hides from the loss");
    EXPECT_CONTAINS(message,
                    when == 1 ? "layer 'second' was the first" : "layer 'second' was given NaN");
    {
      const torch::NoGradGuard no_grad;
      for (Tensor& parameter : program.model->parameters())
        parameter.nan_to_num_(0.01).clamp_min_(0.01);
      program.model->second->bias[0] = std::numeric_limits<float>::infinity();
    }
    message = message_of([&] { program.step(when + 1); });
    EXPECT_CONTAINS(message, "the loss is ");
    EXPECT_CONTAINS(message, "layer 'second' was the first");
  }
  Program program;
  program.model->forward(torch::randn({4, kIn}));
  EXPECT_CONTAINS(message_of([&] {
                    program.session->step(torch::tensor(std::numeric_limits<float>::infinity()));
                  }),
                  "loss function");
}

TEST_F(QatSession, ScalesThatBecameNoneAreNamed) {
  Program program;
  program.steps(0, 5);
  {
    const torch::NoGradGuard no_grad;
    program.model->second->weight_quantizer->scale()[1] = -0.1;
  }
  EXPECT_CONTAINS(message_of([&] { program.session->step(); }),
                  "layer 'second' (weight) at step 6");
}

TEST_F(QatSession, LayersThatCalibrationDidNotReachAreNamed) {
  Program program;
  const Tensor x = torch::randn({4, kIn});
  program.model->first(x);
  program.session->step();
  program.session->step();
  EXPECT_CONTAINS(message_of([&] { program.session->step(); }),
                  "layer 'second': the input was never reached");
}

TEST_F(QatSession, ModelsThatCannotTrainAreRefused) {
  tnn::Sequential plain(tnn::Linear(2, 2));
  EXPECT_CONTAINS(message_of([&] { TrainingSession session(*plain); }), "no quantized layer");
  struct NoClone : tnn::Module {
    NoClone() { layer = register_module("layer", nn::Linear(2, 2)); }
    nn::Linear layer{nullptr};
  } model;
  SessionSettings settings;
  settings.keep_twin = true;
  EXPECT_CONTAINS(message_of([&] { TrainingSession session(model, settings); }), "Cloneable");
  settings.keep_twin = false;
  settings.calibration_batches = -1;
  EXPECT_CONTAINS(message_of([&] { TrainingSession session(model, settings); }), "negative");
  settings.calibration_batches = 1;
  TrainingSession session(model, settings);
  EXPECT_CONTAINS(message_of([&] { session.twin<NoClone>(); }), "keeps no twin");
}

// ---- Resuming -----------------------------------------------------------------------------------

TEST_F(QatSession, ResumedTrainingIsUninterruptedTrainingBitForBit) {
  constexpr int64_t kEnd = 14;
  // While it calibrates, right after, while averages move, after they and the norms are frozen.
  for (const int64_t stop : {0, 2, 3, 6, 9, 12}) {
    SCOPED_TRACE(stop);
    torch::manual_seed(31);
    Program whole;
    whole.steps(0, stop);
    const auto path = folder_.path() / "session.pt";
    whole.session->save(path, whole.optimizer.get());
    whole.steps(stop, kEnd);

    torch::manual_seed(77);  // another process: other initial weights and random numbers
    Program resumed;
    resumed.session->load(path, resumed.optimizer.get());
    EXPECT_EQ(resumed.session->steps(), stop);
    resumed.steps(stop, kEnd);
    expect_same(whole, resumed);

    // And once more in the same process, back from the end.
    whole.session->load(path, whole.optimizer.get());
    whole.session->train();
    whole.steps(stop, kEnd);
    expect_same(resumed, whole);
  }
}

TEST_F(QatSession, WhatWasSavedIsSavedAgain) {
  Program program;
  program.steps(0, 5);
  program.session->save(folder_.path() / "a.pt");
  Program other;
  other.session->load(folder_.path() / "a.pt");
  expect_same(program, other);
  other.session->save(folder_.path() / "b.pt");
  Program third;
  third.session->load(folder_.path() / "b.pt");
  expect_same(program, third);
}

TEST_F(QatSession, SessionsOfOtherModelsAreRefused) {
  const auto path = folder_.path() / "session.pt";
  Program program;
  program.steps(0, 4);
  program.session->save(path, program.optimizer.get());
  const auto refusal = [&](Program& other, bool with_optimizer = true) {
    const auto before = other.state();
    const std::string message = message_of(
        [&] { other.session->load(path, with_optimizer ? other.optimizer.get() : nullptr); });
    for (const auto& [name, tensor] : other.state())
      EXPECT_TRUE(torch::equal(tensor, before.at(name))) << name;  // as it was
    EXPECT_EQ(other.session->steps(), 0);
    return message;
  };
  Program wide(recipe_of(), Program::schedule(), kHidden + 1);
  EXPECT_CONTAINS(refusal(wide), "another architecture");
  EXPECT_CONTAINS(refusal(wide), "'first.weight' [10, 6]");
  Program symmetric(recipe_of("ranges: moving_average"));
  EXPECT_CONTAINS(refusal(symmetric), "another recipe");
  EXPECT_CONTAINS(refusal(symmetric), "layer 'first' input");
  SessionSettings alone = Program::schedule();
  alone.keep_twin = false;
  Program no_twin(recipe_of(), alone);
  EXPECT_CONTAINS(refusal(no_twin), "twin");
  Program no_optimizer;
  EXPECT_CONTAINS(refusal(no_optimizer, false), "optimizer");
  EXPECT_CONTAINS(message_of([&] { program.session->load(folder_.path() / "none.pt"); }),
                  "does not exist");
  torch::save(torch::ones({3}), (folder_.path() / "tensor.pt").string());
  EXPECT_CONTAINS(message_of([&] { program.session->load(folder_.path() / "tensor.pt"); }),
                  "no training session");
  std::ofstream(folder_.path() / "text.pt") << "text";
  EXPECT_CONTAINS(message_of([&] { program.session->load(folder_.path() / "text.pt"); }),
                  "damaged");
}

// ---- Distillation, parameter groups -------------------------------------------------------------

TEST_F(QatSession, TwinsStayInFullPrecisionAsTheyWere) {
  Program program;
  const Tensor x = torch::randn({4, kIn});
  Net& twin = program.session->twin<Net>();
  const Tensor before = twin.forward(x);
  program.steps(0, 6);
  EXPECT_TRUE(torch::equal(twin.forward(x), before));
  EXPECT_FALSE(before.requires_grad());
  EXPECT_EQ(twin.first->mode(), Mode::full);
  EXPECT_CONTAINS(message_of([&] { program.session->twin<tnn::LinearImpl>(); }), "another class");
}

TEST_F(QatSession, DistillationLossIsTheDivergence) {
  const Tensor student = torch::randn({5, 7}, torch::kDouble).requires_grad_();
  const Tensor teacher = torch::randn({5, 7}, torch::kDouble).requires_grad_();
  const double t = 3;
  const Tensor loss = distillation_loss(student, teacher, t);
  const Tensor p = torch::softmax(teacher / t, -1), q = torch::softmax(student / t, -1);
  EXPECT_NEAR(loss.item<double>(), (p * (p / q).log()).sum().item<double>() / 5 * t * t, 1e-12);
  loss.backward();
  EXPECT_FALSE(teacher.grad().defined());
  EXPECT_TRUE(torch::allclose(student.grad(), t * (q - p).detach() / 5));
  EXPECT_NEAR(distillation_loss(student, student).item<double>(), 0, 1e-12);
  EXPECT_CONTAINS(message_of([&] { distillation_loss(student, teacher.t()); }), "shape");
  EXPECT_CONTAINS(message_of([&] { distillation_loss(student, teacher, 0); }), "positive");
}

TEST_F(QatSession, LearnedRangesAreAGroupOfTheirOwn) {
  Program program;
  EXPECT_EQ(learned_ranges(*program.model).size(), 2u);
  EXPECT_EQ(parameters_without_ranges(*program.model).size(), 6u);
  EXPECT_EQ(program.model->parameters().size(), 8u);
}

}  // namespace
}  // namespace vernier
