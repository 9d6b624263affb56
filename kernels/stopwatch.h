// The time that enqueued work takes; internal, for .cu files only.
#pragma once

#include <vernier/kernels/launch.h>

namespace vernier::cuda {

/// A pair of events that take the time of what is enqueued between them. `what` names the operation
/// in errors.
class Stopwatch {
 public:
  Stopwatch(void* stream, const char* what) : stream_(as_stream(stream)), what_(what) {
    check(cudaEventCreate(&begin_), "cudaEventCreate");
    const cudaError_t status = cudaEventCreate(&end_);
    if (status != cudaSuccess) cudaEventDestroy(begin_);
    check(status, "cudaEventCreate");
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;
  ~Stopwatch() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }

  /// Enqueues work() and waits for it.
  template <typename F>
  float milliseconds(const F& work) {
    check(cudaEventRecord(begin_, stream_), what_);
    work();
    check(cudaEventRecord(end_, stream_), what_);
    check(cudaEventSynchronize(end_), what_);
    float elapsed = 0;
    check(cudaEventElapsedTime(&elapsed, begin_, end_), what_);
    return elapsed;
  }

 private:
  cudaStream_t stream_;
  const char* what_;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

}  // namespace vernier::cuda
