// The integer linear layer against the float one on the CPU, quantization and epilogue included.
// Arguments: M, K, N.

#include <benchmark/benchmark.h>
#include <torch/torch.h>
#include <vernier/qat/linear.h>

namespace {

using namespace vernier;

void Linear(benchmark::State& state, Mode mode, bool dynamic) {
  const torch::NoGradGuard no_grad;
  torch::manual_seed(0);
  const int64_t m = state.range(0), k = state.range(1), n = state.range(2);
  nn::Linear layer(k, n);
  const torch::Tensor x = torch::randn({m, k});
  if (dynamic) {
    QuantizerSettings per_token;
    per_token.scheme = symmetric_scheme(8, Granularity::per_token);
    per_token.scheme.dynamic = true;
    layer->input_quantizer->set_settings(per_token);
  } else {
    layer->input_quantizer->calibrate(x);
  }
  layer->weight_quantizer->calibrate(layer->weight);
  layer->set_mode(mode);
  for (auto _ : state) benchmark::DoNotOptimize(layer(x).const_data_ptr());
  state.counters["GOPS"] =
      benchmark::Counter(2.0 * m * n * k * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
}

void Shapes(benchmark::internal::Benchmark* benchmark) {
  benchmark->Args({16, 384, 384})->Args({512, 384, 1536})->Args({2048, 1536, 384})->UseRealTime();
}
BENCHMARK_CAPTURE(Linear, full, Mode::full, false)->Apply(Shapes);
BENCHMARK_CAPTURE(Linear, integer_static, Mode::integer, false)->Apply(Shapes);
BENCHMARK_CAPTURE(Linear, integer_per_token, Mode::integer, true)->Apply(Shapes);

}  // namespace

BENCHMARK_MAIN();
