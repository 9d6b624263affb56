#include <vernier/cli/bench/timing.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <random>

#ifdef VERNIER_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace vernier::bench {
namespace {

class TimedOnCpu final : public Timed {
 public:
  TimedOnCpu(Run run, int64_t sets, double target_us) : run_(std::move(run)), sets_(sets) {
    replay();  // warm-up
    const double us = replay();
    passes_ =
        std::max<int64_t>(1, std::llround(target_us / (us * static_cast<double>(sets_) + 1e-3)));
  }

  double replay() override {
    using Clock = std::chrono::steady_clock;
    const Clock::time_point start = Clock::now();
    for (int64_t pass = 0; pass < passes_; ++pass)
      for (int64_t set = 0; set < sets_; ++set) run_(set);
    const std::chrono::duration<double, std::micro> us = Clock::now() - start;
    return us.count() / static_cast<double>(passes_ * sets_);
  }

 private:
  Run run_;
  int64_t sets_;
  int64_t passes_ = 1;
};

}  // namespace

std::unique_ptr<Timed> make_timed([[maybe_unused]] const Place& place, const Run& run, int64_t sets,
                                  double target_us) {
#ifdef VERNIER_WITH_CUDA
  if (place.cuda()) return make_timed_cuda(run, sets, target_us);
#endif
  return std::make_unique<TimedOnCpu>(run, sets, target_us);
}

std::unique_ptr<Timed> make_launched([[maybe_unused]] const Place& place, const Run& run,
                                     int64_t sets, double target_us) {
#ifdef VERNIER_WITH_CUDA
  if (place.cuda()) return make_launched_cuda(run, sets, target_us);
#endif
  return std::make_unique<TimedOnCpu>(run, sets, target_us);
}

std::vector<double> measure(const std::vector<std::unique_ptr<Timed>>& timed,
                            const Effort& effort) {
  using Clock = std::chrono::steady_clock;
  constexpr int kMostRounds = 1000;
  for (const auto& t : timed) t->replay();  // warm-up
  std::vector<std::vector<double>> us(timed.size());
  std::vector<size_t> order(timed.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::mt19937 random(0);
  const std::chrono::duration<double> budget(effort.seconds * static_cast<double>(timed.size()));
  const Clock::time_point start = Clock::now();
  for (int round = 0;
       round < kMostRounds && (round < effort.rounds || Clock::now() - start < budget); ++round) {
    // What ran before leaves a GPU warmer or cooler: in another order every time.
    std::shuffle(order.begin(), order.end(), random);
    for (const size_t i : order) us[i].push_back(timed[i]->replay());
  }
  std::vector<double> medians;
  for (std::vector<double>& samples : us) {
    const auto middle = samples.begin() + static_cast<std::ptrdiff_t>(samples.size() / 2);
    std::nth_element(samples.begin(), middle, samples.end());
    medians.push_back(*middle);
  }
  return medians;
}

struct WorkStream::Guard {
#ifdef VERNIER_WITH_CUDA
  explicit Guard(torch::Device device)
      : stream(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device.index())) {}
  c10::cuda::CUDAStreamGuard stream;
#endif
};

WorkStream::WorkStream([[maybe_unused]] const Place& place) {
#ifdef VERNIER_WITH_CUDA
  if (place.cuda()) guard_ = std::make_unique<Guard>(place.device);
#endif
}

WorkStream::~WorkStream() = default;

}  // namespace vernier::bench
