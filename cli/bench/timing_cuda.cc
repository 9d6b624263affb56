#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>
#include <cuda_runtime.h>
#include <vernier/cli/bench/timing.h>
#include <vernier/kernels/error.h>

#include <algorithm>
#include <cmath>

namespace vernier::bench {
namespace {

namespace allocator = c10::cuda::CUDACachingAllocator;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that it does not surface elsewhere
  throw Error(concat(what, " failed on the GPU: ", cudaGetErrorString(status)));
}

class Event {
 public:
  Event() { check(cudaEventCreate(&event_), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream) { check(cudaEventRecord(event_, stream), "cudaEventRecord"); }
  /// Microseconds since another one, once this one is reached.
  double since(const Event& other) const {
    check(cudaEventSynchronize(event_), "a timed kernel");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, other.event_, event_), "cudaEventElapsedTime");
    return double{ms} * 1e3;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

/// A stretch of memory of the caching allocator that belongs to one graph: what the captured calls
/// allocate keeps its address.
class GraphMemory {
 public:
  GraphMemory(c10::DeviceIndex device, cudaStream_t stream)
      : device_(device), id_(at::cuda::graph_pool_handle()) {
    allocator::beginAllocateToPool(device_, id_, [stream](cudaStream_t s) { return s == stream; });
  }
  ~GraphMemory() {
    close();
    allocator::releasePool(device_, id_);
  }
  GraphMemory(const GraphMemory&) = delete;
  GraphMemory& operator=(const GraphMemory&) = delete;

  /// Allocations come from elsewhere from here on.
  void close() {
    if (open_) allocator::endAllocateToPool(device_, id_);
    open_ = false;
  }

 private:
  c10::DeviceIndex device_;
  c10::MempoolId_t id_;
  bool open_ = true;
};

class TimedGraph final : public Timed {
 public:
  TimedGraph(const Run& run, int64_t sets, double target_us)
      : stream_(c10::cuda::getCurrentCUDAStream()) {
    const double pass_us = time_a_pass(run, sets);
    constexpr int64_t kMostCalls = 2048;
    const int64_t passes = std::clamp<int64_t>(std::llround(target_us / pass_us), 1,
                                               std::max<int64_t>(1, kMostCalls / sets));
    calls_ = passes * sets;
    memory_ = std::make_unique<GraphMemory>(stream_.device_index(), stream_.stream());
    capture(run, sets, passes);
    memory_->close();
  }

  ~TimedGraph() override {
    cudaStreamSynchronize(stream_.stream());
    if (executable_) cudaGraphExecDestroy(executable_);
    if (graph_) cudaGraphDestroy(graph_);
  }

  double replay() override {
    // The replay in front is not timed: it keeps the GPU busy while the host enqueues the timed one
    // and leaves the caches as the calls themselves do.
    launch();
    start_.record(stream_.stream());
    launch();
    end_.record(stream_.stream());
    return end_.since(start_) / static_cast<double>(calls_);
  }

 private:
  void launch() { check(cudaGraphLaunch(executable_, stream_.stream()), "cudaGraphLaunch"); }

  double time_a_pass(const Run& run, int64_t sets) {
    start_.record(stream_.stream());
    for (int64_t set = 0; set < sets; ++set) run(set);
    end_.record(stream_.stream());
    return end_.since(start_);
  }

  void capture(const Run& run, int64_t sets, int64_t passes) {
    // Outputs live until their set comes round again, so that they rotate as the inputs do.
    std::vector<Tensors> outputs(static_cast<size_t>(sets));
    check(cudaStreamBeginCapture(stream_.stream(), cudaStreamCaptureModeThreadLocal),
          "cudaStreamBeginCapture");
    try {
      for (int64_t pass = 0; pass < passes; ++pass)
        for (int64_t set = 0; set < sets; ++set) outputs[static_cast<size_t>(set)] = run(set);
    } catch (...) {
      cudaStreamEndCapture(stream_.stream(), &graph_);
      cudaGetLastError();
      throw;
    }
    check(cudaStreamEndCapture(stream_.stream(), &graph_), "capturing a CUDA graph");
    check(cudaGraphInstantiate(&executable_, graph_, 0), "cudaGraphInstantiate");
  }

  c10::cuda::CUDAStream stream_;
  Event start_, end_;
  int64_t calls_ = 0;
  std::unique_ptr<GraphMemory> memory_;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

// The same calls, enqueued one by one: for what cannot be captured, or is not meant to be.
class TimedCalls final : public Timed {
 public:
  TimedCalls(Run run, int64_t sets, double target_us)
      : stream_(c10::cuda::getCurrentCUDAStream()), run_(std::move(run)), sets_(sets) {
    passes_ =
        std::max<int64_t>(1, std::llround(target_us / (replay() * static_cast<double>(sets))));
  }

  double replay() override {
    launch();
    start_.record(stream_.stream());
    launch();
    end_.record(stream_.stream());
    return end_.since(start_) / static_cast<double>(passes_ * sets_);
  }
  bool captured() const override { return false; }

 private:
  void launch() {
    for (int64_t pass = 0; pass < passes_; ++pass)
      for (int64_t set = 0; set < sets_; ++set) run_(set);
  }

  c10::cuda::CUDAStream stream_;
  Event start_, end_;
  Run run_;
  int64_t sets_;
  int64_t passes_ = 1;
};

}  // namespace

std::unique_ptr<Timed> make_timed_cuda(const Run& run, int64_t sets, double target_us) {
  for (int64_t set = 0; set < sets; ++set) run(set);  // what fails here fails in either way
  try {
    return std::make_unique<TimedGraph>(run, sets, target_us);
  } catch (const c10::OutOfMemoryError&) {
    throw;
  } catch (const std::exception&) {
    return std::make_unique<TimedCalls>(run, sets, target_us);
  }
}

std::unique_ptr<Timed> make_launched_cuda(const Run& run, int64_t sets, double target_us) {
  for (int64_t set = 0; set < sets; ++set) run(set);
  return std::make_unique<TimedCalls>(run, sets, target_us);
}

}  // namespace vernier::bench
