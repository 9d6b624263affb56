#include <vernier/kernels/error.h>
#include <vernier/recipes/captured_step.h>

#ifdef VERNIER_WITH_CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>
#endif

namespace vernier {

// Libraries make their handles, workspaces and choices in the first runs.
constexpr int64_t kRunsBefore = 3;

#ifdef VERNIER_WITH_CUDA

struct CapturedStep::Recording {
  explicit Recording(torch::Device device)
      : stream(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device.index())),
        before(c10::cuda::getCurrentCUDAStream(device.index())),
        guard(stream) {
    before.synchronize();  // what the step reads was made there
  }
  ~Recording() {
    // Errors of the work itself were or will be seen elsewhere; a destructor cannot throw them.
    if (cudaStreamSynchronize(stream.stream()) != cudaSuccess) cudaGetLastError();
  }

  // What went wrong; "" if nothing did.
  std::string record(const std::function<void()>& step) {
    const c10::DeviceIndex device = stream.device_index();
    const auto pool = at::cuda::graph_pool_handle();
    stream.synchronize();
    auto made = std::make_unique<at::cuda::CUDAGraph>();
    std::string failure;
    made->capture_begin(pool);
    try {
      step();
      made->capture_end();
      graph = std::move(made);
      return "";
    } catch (const std::exception& error) {
      failure = error.what();
    }
    // Ends what was begun: the stream leaves the capture and the allocator the graph's pool.
    bool ended = true;
    try {
      made->pool();
    } catch (const c10::Error&) {
      ended = false;
    }
    if (!ended) {
      cudaGraph_t unfinished = nullptr;
      if (cudaStreamEndCapture(stream.stream(), &unfinished) == cudaSuccess && unfinished)
        cudaGraphDestroy(unfinished);
      c10::cuda::CUDACachingAllocator::endAllocateToPool(device, pool);
      c10::cuda::CUDACachingAllocator::releasePool(device, pool);
    }
    cudaGetLastError();
    return failure.substr(0, failure.find('\n'));
  }

  c10::cuda::CUDAStream stream, before;
  c10::cuda::CUDAStreamGuard guard;
  std::unique_ptr<at::cuda::CUDAGraph> graph;
};

CapturedStep::CapturedStep(torch::Device device, bool capture) : wanted_(capture) {
  if (device.is_cuda()) recording_ = std::make_unique<Recording>(device);
}

bool CapturedStep::captured() const { return recording_ && recording_->graph; }

void CapturedStep::run(const std::function<void()>& step) {
  if (captured()) {
    recording_->graph->replay();
    return;
  }
  if (recording_ && wanted_ && refusal_.empty() && runs_ >= kRunsBefore) {
    refusal_ = recording_->record(step);
    if (refusal_.empty()) {
      recording_->graph->replay();
      return;
    }
  }
  step();
  ++runs_;
}

void CapturedStep::synchronize() const {
  if (recording_) recording_->stream.synchronize();
}

#else

struct CapturedStep::Recording {};

CapturedStep::CapturedStep(torch::Device device, bool capture) : wanted_(capture) {
  VERNIER_CHECK(device.is_cpu(), "this library was built without CUDA");
}

bool CapturedStep::captured() const { return false; }

void CapturedStep::run(const std::function<void()>& step) {
  step();
  ++runs_;
}

void CapturedStep::synchronize() const {}

#endif

CapturedStep::~CapturedStep() = default;

}  // namespace vernier
