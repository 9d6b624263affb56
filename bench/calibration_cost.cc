// What a calibration pass costs over the plain float forward of the same samples: both send each
// sample through by itself, in turn on the same threads. Argument: tokens a sample. The counter
// `ratio` of the observing run is the figure.

#include <benchmark/benchmark.h>
#include <torch/torch.h>
#include <vernier/qat/layer.h>
#include <vernier/recipes/models/bert.h>
#include <vernier/recipes/token_dataset.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>

namespace {

using namespace vernier;

// The shape of all-MiniLM-L6-v2, with random weights.
std::shared_ptr<TextModel> minilm_shape() {
  return make_bert({{"vocab_size", 30522},
                    {"hidden_size", 384},
                    {"num_hidden_layers", 6},
                    {"num_attention_heads", 12},
                    {"intermediate_size", 1536},
                    {"max_position_embeddings", 512}});
}

double seconds(const auto& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void CalibrationCost(benchmark::State& state) {
  const torch::NoGradGuard no_grad;
  const auto model = minilm_shape();
  std::vector<TokenBatch> samples;
  for (int i = 0; i < 32; ++i) {
    const torch::Tensor ids = torch::randint(30522, {state.range(0)}, torch::kLong);
    const int64_t* id = ids.const_data_ptr<int64_t>();
    samples.push_back(make_batch({{id, id + ids.numel()}}, torch::kCPU));
  }
  const auto forward_all = [&](Mode mode) {
    const ModeGuard guard(*model, mode);
    at::parallel_for(0, static_cast<int64_t>(samples.size()), 1, [&](int64_t begin, int64_t end) {
      const torch::NoGradGuard worker_no_grad;
      for (int64_t i = begin; i < end; ++i) model->forward(samples[i]);
    });
  };
  forward_all(Mode::full);
  std::vector<double> ratios;
  for (auto _ : state) {
    const double plain = seconds([&] { forward_all(Mode::full); });
    const double observing = seconds([&] { forward_all(Mode::observe); });
    ratios.push_back(observing / plain);
    state.SetIterationTime(observing);
  }
  std::nth_element(ratios.begin(), ratios.begin() + ratios.size() / 2, ratios.end());
  state.counters["ratio"] = ratios[ratios.size() / 2];
}
BENCHMARK(CalibrationCost)
    ->Arg(16)
    ->Arg(64)
    ->Arg(256)
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);

}  // namespace

BENCHMARK_MAIN();
