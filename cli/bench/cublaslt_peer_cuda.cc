#include <c10/cuda/CUDAStream.h>
#include <cublasLt.h>
#include <torch/torch.h>
#include <vernier/cli/bench/cublaslt_peer.h>
#include <vernier/kernels/error.h>

#include <algorithm>
#include <limits>
#include <utility>

namespace vernier::bench {
namespace {

void check(cublasStatus_t status, const char* what) {
  VERNIER_CHECK(status == CUBLAS_STATUS_SUCCESS, what, ": ", cublasLtGetStatusString(status));
}

// A handle of the library that is destroyed with its owner.
template <typename T, cublasStatus_t (*kDestroy)(T)>
class Owned {
 public:
  Owned() = default;
  ~Owned() {
    if (handle_) kDestroy(handle_);
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  T get() const { return handle_; }
  T* out() { return &handle_; }

 private:
  T handle_ = nullptr;
};

constexpr int kMostAlgorithms = 48;
constexpr int64_t kWorkspaceBytes = int64_t{64} << 20;

struct Types {
  cudaDataType operand, output;
  cublasComputeType_t compute;
  cudaDataType scale;
  torch::ScalarType torch_output;
};

Types types_of(LtProduct product) {
  switch (product) {
    case LtProduct::i8i8i32:
      return {CUDA_R_8I, CUDA_R_32I, CUBLAS_COMPUTE_32I, CUDA_R_32I, torch::kInt};
    case LtProduct::i8i8i8:
      return {CUDA_R_8I, CUDA_R_8I, CUBLAS_COMPUTE_32I, CUDA_R_32F, torch::kChar};
    default:
      return {CUDA_R_16BF, CUDA_R_16BF, CUBLAS_COMPUTE_32F, CUDA_R_32F, torch::kBFloat16};
  }
}

}  // namespace

// Row-major [M, N] is column-major [N, M]: the library is asked for weight * activations^T, with
// the weight as its first, transposed operand.
struct CublasLtProduct::State {
  Owned<cublasLtHandle_t, cublasLtDestroy> library;
  Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy> operation;
  Owned<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy> weight, activations, output;
  Owned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy> preference;
  cublasLtMatmulAlgo_t algorithm{};
  Types types{};
  float scale = 1;
  Tensors a, b;
  int64_t m = 0, n = 0;
  torch::Tensor workspace;

  torch::Tensor run(const torch::Tensor& x, const torch::Tensor& w,
                    const cublasLtMatmulAlgo_t& chosen) const {
    torch::Tensor y = torch::empty({m, n}, x.options().dtype(types.torch_output));
    const int32_t integer_one = 1, integer_zero = 0;
    const float zero = 0;
    const bool integer = types.scale == CUDA_R_32I;
    const void* alpha = integer ? static_cast<const void*>(&integer_one) : &scale;
    const void* beta = integer ? static_cast<const void*>(&integer_zero) : &zero;
    check(cublasLtMatmul(library.get(), operation.get(), alpha, w.const_data_ptr(), weight.get(),
                         x.const_data_ptr(), activations.get(), beta, y.data_ptr(), output.get(),
                         y.data_ptr(), output.get(), &chosen, workspace.data_ptr(),
                         static_cast<size_t>(workspace.numel()),
                         c10::cuda::getCurrentCUDAStream().stream()),
          "cublasLtMatmul");
    return y;
  }
};

CublasLtProduct::CublasLtProduct(const Place& place, LtProduct product, Tensors a, Tensors b,
                                 float scale)
    : state_(std::make_unique<State>()) {
  State& s = *state_;
  s.types = types_of(product);
  s.scale = scale;
  s.a = std::move(a);
  s.b = std::move(b);
  s.m = s.a.front().size(0);
  s.n = s.b.front().size(0);
  const int64_t k = s.a.front().size(1);
  s.workspace = torch::empty({kWorkspaceBytes}, s.a.front().options().dtype(torch::kByte));

  check(cublasLtCreate(s.library.out()), "cublasLtCreate");
  check(cublasLtMatmulDescCreate(s.operation.out(), s.types.compute, s.types.scale),
        "cublasLtMatmulDescCreate");
  const cublasOperation_t transposed = CUBLAS_OP_T;
  check(cublasLtMatmulDescSetAttribute(s.operation.get(), CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                       sizeof transposed),
        "cublasLtMatmulDescSetAttribute");
  const auto layout = [](auto& handle, cudaDataType type, int64_t rows, int64_t columns) {
    check(cublasLtMatrixLayoutCreate(handle.out(), type, static_cast<uint64_t>(rows),
                                     static_cast<uint64_t>(columns), rows),
          "cublasLtMatrixLayoutCreate");
  };
  layout(s.weight, s.types.operand, k, s.n);
  layout(s.activations, s.types.operand, k, s.m);
  layout(s.output, s.types.output, s.n, s.m);
  check(cublasLtMatmulPreferenceCreate(s.preference.out()), "cublasLtMatmulPreferenceCreate");
  const auto workspace_bytes = static_cast<uint64_t>(kWorkspaceBytes);
  check(cublasLtMatmulPreferenceSetAttribute(s.preference.get(),
                                             CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                             &workspace_bytes, sizeof workspace_bytes),
        "cublasLtMatmulPreferenceSetAttribute");

  std::vector<cublasLtMatmulHeuristicResult_t> found(kMostAlgorithms);
  int count = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      s.library.get(), s.operation.get(), s.weight.get(), s.activations.get(), s.output.get(),
      s.output.get(), s.preference.get(), kMostAlgorithms, found.data(), &count);
  VERNIER_CHECK(status == CUBLAS_STATUS_SUCCESS && count > 0,
                "cuBLASLt has no algorithm for this shape");

  // All of them for a moment, then the best few for longer.
  const auto sets = static_cast<int64_t>(s.a.size());
  using Ranked = std::pair<double, const cublasLtMatmulAlgo_t*>;
  const auto time = [&](const cublasLtMatmulAlgo_t* algorithm, double target_us, int replays) {
    try {
      const auto timed = make_timed(
          place,
          [&](int64_t set) {
            const auto i = static_cast<size_t>(set);
            return Tensors{s.run(s.a[i], s.b[i], *algorithm)};
          },
          sets, target_us);
      double us = timed->replay();
      for (int i = 1; i < replays; ++i) us = std::min(us, timed->replay());
      return us;
    } catch (const Error&) {  // proposed, but refused when called
      return std::numeric_limits<double>::infinity();
    }
  };
  std::vector<Ranked> ranked;
  for (int i = 0; i < count; ++i) {
    const cublasLtMatmulAlgo_t* algorithm = &found[static_cast<size_t>(i)].algo;
    ranked.emplace_back(time(algorithm, 200, 3), algorithm);
  }
  std::sort(ranked.begin(), ranked.end());
  ranked.resize(std::min<size_t>(ranked.size(), 4));
  for (auto& [us, algorithm] : ranked) us = time(algorithm, 2000, 5);
  const Ranked best = *std::min_element(ranked.begin(), ranked.end());
  VERNIER_CHECK(best.first < std::numeric_limits<double>::infinity(),
                "cuBLASLt refused every algorithm that it proposed for this shape");
  s.algorithm = *best.second;
}

CublasLtProduct::~CublasLtProduct() = default;

torch::Tensor CublasLtProduct::run(int64_t set) const {
  const auto i = static_cast<size_t>(set);
  return run(state_->a[i], state_->b[i]);
}

torch::Tensor CublasLtProduct::run(const torch::Tensor& x, const torch::Tensor& w) const {
  return state_->run(x, w, state_->algorithm);
}

}  // namespace vernier::bench
