// Factors in whole models: the same function, nothing left behind, and nothing changed where they
// do not fit.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/smoothquant/folding.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/family_fixtures.h>
#include <vernier/tests/smoothquant_toy.h>
#include <vernier/tests/tiny_bert.h>

#include <limits>
#include <map>

namespace vernier {
namespace {

using testing::message_of;
using testing::Toy;
using torch::Tensor;

std::map<std::string, Tensor> copies(const torch::nn::Module& model) {
  std::map<std::string, Tensor> tensors;
  for (const auto& item : model.named_parameters())
    tensors.emplace(item.key(), item.value().detach().clone());
  return tensors;
}

bool unchanged(const torch::nn::Module& model, const std::map<std::string, Tensor>& before) {
  for (const auto& item : model.named_parameters())
    if (!item.value().equal(before.at(item.key()))) return false;
  return true;
}

// Factors of 1/4 to 4 for every group.
void fold_random(FoldedFactors& folded) {
  auto generator = at::detail::createCPUGenerator(11);
  for (size_t i = 0; i < folded.size(); ++i)
    folded.set(i, torch::exp2(4 * torch::rand({folded.channels(i)}, generator) - 2));
}

TEST(SmoothquantFolding, FactorsLeaveTheToyTheSameAndGoWithoutATrace) {
  const torch::NoGradGuard no_grad;
  Toy toy;
  toy.plant_outliers();
  const Tensor tokens = torch::arange(Toy::kVocabulary);
  const Tensor expected = toy.forward(tokens);
  const auto before = copies(toy);
  FoldedFactors folded(toy, toy.groups());
  EXPECT_EQ(folded.channels(1), 2 * Toy::kHead);  // of the producer
  fold_random(folded);
  EXPECT_FALSE(unchanged(toy, before));
  EXPECT_EQ(toy.last->input_quantizer->pre_scale().numel(), Toy::kWidth);
  EXPECT_LT(testing::relative_error(toy.forward(tokens), expected), 1e-5);
  EXPECT_TRUE(folded.original_weight(1, 0).equal(before.at("o.weight")));

  // What is in the model depends on the factors, not on the way to them.
  const auto first_way = copies(toy);
  const Tensor factors = folded.current(0).clone();
  folded.set(0, torch::full({Toy::kWidth}, 3.0f));
  folded.set(0, factors);
  EXPECT_TRUE(unchanged(toy, first_way));
  for (size_t i = 0; i < folded.size(); ++i) folded.set(i, Tensor());
  EXPECT_TRUE(unchanged(toy, before));
  EXPECT_EQ(toy.last->input_quantizer->pre_scale().numel(), 0);
}

class SmoothquantFamilies : public ::testing::TestWithParam<const char*> {};

INSTANTIATE_TEST_SUITE_P(Fixtures, SmoothquantFamilies, ::testing::ValuesIn(testing::kFamilies),
                         [](const auto& which) {
                           std::string name = which.param;
                           std::erase(name, '-');
                           return name;
                         });

TEST_P(SmoothquantFamilies, FactorsLeaveTheLogitsTheSame) {
  const torch::NoGradGuard no_grad;
  const testing::Expected expected{GetParam()};
  CausalLanguageModel& model = *expected.model;
  FoldedFactors folded(model, model.smoothing_groups());
  EXPECT_GT(folded.size(), 0u);
  fold_random(folded);
  EXPECT_LT(testing::relative_error(testing::logits_of(model, expected.batch), expected.logits),
            5e-5);
}

TEST(SmoothquantFolding, BertIsTheSameThroughItsInputs) {
  const torch::NoGradGuard no_grad;
  const testing::TemporaryFolder folder;
  testing::write_bert(folder / "bert");
  const auto model = load_text_model(folder / "bert");
  const TokenBatch batch{torch::arange(12), {5, 7}};
  const Tensor expected = model->forward(batch);
  FoldedFactors folded(*model, model->smoothing_groups());
  fold_random(folded);
  EXPECT_LT(testing::relative_error(model->forward(batch), expected), 1e-5);
}

TEST(SmoothquantFolding, SharedChannelsGetTheLargestMaximum) {
  Toy toy;
  const FoldedFactors folded(toy, toy.groups());
  Tensor amax = torch::arange(1, 17).to(torch::kFloat);
  const Tensor producer = folded.to_producer(1, amax);
  EXPECT_TRUE(producer.equal(torch::tensor({5.0f, 6.0f, 7.0f, 8.0f, 13.0f, 14.0f, 15.0f, 16.0f})));
  const Tensor back = folded.to_reader(1, producer);
  EXPECT_EQ(back[0].item<float>(), 5);
  EXPECT_EQ(back[15].item<float>(), 16);
  // Dead channels keep factor 1: all of them where a norm's weights are zero.
  EXPECT_TRUE(folded.factors(1, torch::zeros({16}), 0.5).equal(torch::ones({8})));
}

TEST(SmoothquantFolding, WhatDoesNotFitIsRefusedAndChangesNothing) {
  const torch::NoGradGuard no_grad;
  Toy toy;
  const auto before = copies(toy);
  {
    FoldedFactors folded(toy, toy.groups(), torch::kHalf);
    folded.set(2, torch::full({32}, 2.0f));
    const auto smoothed = copies(toy);
    Tensor factors = torch::ones({32});
    factors[4] = 1e7f;
    EXPECT_CONTAINS(message_of([&] { folded.set(2, factors); }),
                    "smoothing group 'down': the factors make 'up' vanish in Half");
    factors[4] = 1e-7f;
    EXPECT_CONTAINS(message_of([&] { folded.set(2, factors); }), "overflow Half");
    EXPECT_TRUE(unchanged(toy, smoothed));
    for (const Tensor& wrong : {torch::ones({3}), torch::zeros({32}), -torch::ones({32})})
      EXPECT_CONTAINS(message_of([&] { folded.set(2, wrong); }), "takes 32 finite, positive");
    EXPECT_CONTAINS(message_of([&] { folded.set(3, torch::full({16}, 1e-45f)); }), "reciprocal");
    folded.set(2, Tensor());
    EXPECT_TRUE(unchanged(toy, before));
    EXPECT_CONTAINS(message_of([&] { folded.factors(0, torch::ones({16}), 1.5); }),
                    "alpha must be in [0, 1]");
    EXPECT_CONTAINS(message_of([&] { folded.factors(0, torch::ones({3}), 0.5); }),
                    "input channels");
  }
  auto groups = toy.groups();
  groups[0].readers.push_back("nothing");
  EXPECT_CONTAINS(message_of([&] { FoldedFactors(toy, groups); }), "no quantized layer 'nothing'");
  groups = toy.groups();
  groups[0].readers.push_back("down");
  EXPECT_CONTAINS(message_of([&] { FoldedFactors(toy, groups); }), "layer 'down'");
  groups = toy.groups();
  groups[1].source.pop_back();
  EXPECT_CONTAINS(message_of([&] { FoldedFactors(toy, groups); }), "sources");

  toy.up->weight.set_data(toy.embedding->weight.detach());
  EXPECT_CONTAINS(message_of([&] {
                    FoldedFactors(toy, {{"up", std::nullopt, {"up"}, {}}});
                  }),
                  "are tied");
  EXPECT_FALSE(toy.last->input_quantizer->pre_scale().numel());
}

}  // namespace
}  // namespace vernier
