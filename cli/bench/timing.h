// Timing. On a GPU: CUDA graphs of several calls over rotating inputs, replayed and timed with
// events, so that neither the host nor the L2 takes part. On the CPU: the steady clock around the
// same calls.
#pragma once

#include <vernier/cli/bench/work.h>

#include <memory>

namespace vernier::bench {

/// Calls that are ready to be timed again and again.
class Timed {
 public:
  virtual ~Timed() = default;
  /// Runs them once and returns the microseconds of one call.
  virtual double replay() = 0;
  /// False where the calls could not become a CUDA graph: the host's share is then in the time.
  virtual bool captured() const { return true; }
};

/// Calls `run` on all sets as warm-up, then makes as many calls ready as take about `target_us`; at
/// least one on every set. Throws Error, or what the calls throw.
std::unique_ptr<Timed> make_timed(const Place& place, const Run& run, int64_t sets,
                                  double target_us);
/// The same as a program makes them, one by one and without a CUDA graph: the host takes part.
std::unique_ptr<Timed> make_launched(const Place& place, const Run& run, int64_t sets,
                                     double target_us);
#ifdef VERNIER_WITH_CUDA
std::unique_ptr<Timed> make_timed_cuda(const Run& run, int64_t sets, double target_us);
std::unique_ptr<Timed> make_launched_cuda(const Run& run, int64_t sets, double target_us);
#endif

/// How long to measure.
struct Effort {
  double seconds = 0.2;  ///< an implementation
  int rounds = 9;        ///< replays of it at least
};

/// Microseconds of one call of each, as the median over rounds. A round replays each once, so that
/// what the clock and the power limit do is shared by all.
std::vector<double> measure(const std::vector<std::unique_ptr<Timed>>& timed, const Effort& effort);

/// Makes its stream current while it lives, on a GPU: capturing needs another than the default one.
class WorkStream {
 public:
  explicit WorkStream(const Place& place);
  ~WorkStream();
  WorkStream(const WorkStream&) = delete;
  WorkStream& operator=(const WorkStream&) = delete;

 private:
  struct Guard;
  std::unique_ptr<Guard> guard_;
};

}  // namespace vernier::bench
