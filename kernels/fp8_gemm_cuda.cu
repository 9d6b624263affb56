#include <vernier/kernels/cublaslt.h>
#include <vernier/kernels/fp8_device.h>
#include <vernier/kernels/stopwatch.h>

#include <array>
#include <limits>
#include <tuple>

namespace vernier::cuda {
namespace {

constexpr const char* kName = "fp8_linear";
// Algorithms that the library is asked for, best first.
constexpr int kCandidates = 16;

cudaDataType_t data_type(NumberFormat format) {
  return format == NumberFormat::e4m3 ? CUDA_R_8F_E4M3 : CUDA_R_8F_E5M2;
}

cudaDataType_t data_type(ElementType type) {
  switch (type) {
    case ElementType::f16:
      return CUDA_R_16F;
    case ElementType::bf16:
      return CUDA_R_16BF;
    default:
      return CUDA_R_32F;
  }
}

// Our row-major result [m, n] = codes [m, k] * weight [n, k]^T is, read by columns, the [n, m]
// product of the weight's transpose and the codes: the "TN" form, the only one of FP8.
struct Problem {
  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t weight, codes, result;
  bool usable;

  explicit Problem(const Fp8GemmArguments& a) {
    CublasLtStatus status;
    const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
      status.then([&] {
        return cublasLtMatmulDescSetAttribute(&operation, attribute, &value, sizeof value);
      });
    };
    status.then([&] { return cublasLtMatmulDescInit(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F); });
    set(CUBLASLT_MATMUL_DESC_TRANSA, cublasOperation_t{CUBLAS_OP_T});
    set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, static_cast<int8_t>(a.fast_accumulation));
    if (a.weight_scale) {
      set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, static_cast<const void*>(a.weight_scale));
      set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, static_cast<const void*>(a.input_scale));
    }
    if (a.vector_scales) {
      const cublasLtMatmulMatrixScale_t mode = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
      set(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, mode);
      set(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, mode);
    }
    if (a.bias) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE, cublasLtEpilogue_t{CUBLASLT_EPILOGUE_BIAS});
      set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, a.bias);
      set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, data_type(a.output_type));
    }
    status
        .then([&] {
          return cublasLtMatrixLayoutInit(&weight, data_type(a.weight_format), a.k, a.n, a.k);
        })
        .then([&] {
          return cublasLtMatrixLayoutInit(&codes, data_type(a.codes_format), a.k, a.m, a.k);
        })
        .then([&] {
          return cublasLtMatrixLayoutInit(&result, data_type(a.output_type), a.n, a.m, a.n);
        });
    usable = status.ok();
  }
};

// The algorithms that the library offers for a problem, best first.
struct Algorithms {
  std::array<cublasLtMatmulAlgo_t, kCandidates> candidates;
  int count = 0;
};

// What the matrices are aligned to, in bytes, as far as it matters to the library.
uint32_t alignment_of(const Fp8GemmArguments& a) {
  const bool aligned =
      is_aligned(a.codes, 256) && is_aligned(a.weight, 256) && is_aligned(a.output, 256);
  return aligned ? 256 : 16;
}

Algorithms find_algorithms(cublasLtHandle_t handle, Problem& problem, const Fp8GemmArguments& a) {
  cublasLtMatmulPreferenceOpaque_t preference;
  CublasLtStatus status;
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    status.then([&] {
      return cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof value);
    });
  };
  status.then([&] { return cublasLtMatmulPreferenceInit(&preference); });
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(a.workspace_bytes));
  const uint32_t alignment = alignment_of(a);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment);

  std::array<cublasLtMatmulHeuristicResult_t, kCandidates> results = {};
  int found = 0;
  status.then([&] {
    return cublasLtMatmulAlgoGetHeuristic(handle, &problem.operation, &problem.weight,
                                          &problem.codes, &problem.result, &problem.result,
                                          &preference, kCandidates, results.data(), &found);
  });
  Algorithms algorithms;
  if (!status.ok()) return algorithms;
  for (int i = 0; i < found; ++i)
    if (results[i].state == CUBLAS_STATUS_SUCCESS)
      algorithms.candidates[algorithms.count++] = results[i].algo;
  return algorithms;
}

// Device, m, n, k, formats, output, vector scales, bias, scaled, fast accumulation, workspace,
// alignment.
using ShapeKey = std::tuple<int, int64_t, int64_t, int64_t, NumberFormat, NumberFormat, ElementType,
                            bool, bool, bool, bool, int64_t, uint32_t>;

using AlgorithmCache = CublasLtAlgorithmCache<ShapeKey>;

AlgorithmCache& algorithm_cache() {
  static auto& cache = *new AlgorithmCache;
  return cache;
}

ShapeKey key_of(const Fp8GemmArguments& a, int device) {
  return {device,
          a.m,
          a.n,
          a.k,
          a.codes_format,
          a.weight_format,
          a.output_type,
          a.vector_scales,
          a.bias != nullptr,
          a.weight_scale != nullptr,
          a.fast_accumulation,
          a.workspace_bytes,
          alignment_of(a)};
}

bool multiply(cublasLtHandle_t handle, Problem& problem, const Fp8GemmArguments& a,
              const cublasLtMatmulAlgo_t& algorithm, void* stream) {
  const float alpha = 1, beta = 0;
  const cublasStatus_t status = cublasLtMatmul(
      handle, &problem.operation, &alpha, a.weight, &problem.weight, a.codes, &problem.codes, &beta,
      a.output, &problem.result, a.output, &problem.result, &algorithm, a.workspace,
      static_cast<size_t>(a.workspace_bytes), as_stream(stream));
  if (status == CUBLAS_STATUS_SUCCESS) return true;
  cudaGetLastError();  // the fallback's launch must not be blamed
  return false;
}

}  // namespace

bool fp8_matmul(const Fp8GemmArguments& a, void* stream) {
  const int device = current_device();
  const cublasLtHandle_t handle = cublaslt_handle(device);
  Problem problem(a);
  if (!handle || !problem.usable) return false;
  const ShapeKey key = key_of(a, device);
  bool done = false;
  const auto entry = algorithm_cache().get(key, [&]() -> CublasLtAlgorithm {
    // The first that runs: some that the heuristic offers are refused.
    const Algorithms algorithms = find_algorithms(handle, problem, a);
    for (int i = 0; i < algorithms.count && !done; ++i)
      if ((done = multiply(handle, problem, a, algorithms.candidates[i], stream)))
        return {true, algorithms.candidates[i]};
    return {};
  });
  if (done || !entry.usable) return done;
  return multiply(handle, problem, a, entry.algorithm, stream);
}

bool tune_fp8_matmul(const Fp8GemmArguments& a, void* stream) {
  const int device = current_device();
  const cublasLtHandle_t handle = cublaslt_handle(device);
  Problem problem(a);
  if (!handle || !problem.usable) return false;
  const Algorithms algorithms = find_algorithms(handle, problem, a);
  constexpr int kRounds = 5, kRepeats = 8;
  Stopwatch stopwatch(stream, kName);
  std::array<float, kCandidates> least;
  least.fill(std::numeric_limits<float>::infinity());
  std::array<bool, kCandidates> runs = {};
  for (int i = 0; i < algorithms.count; ++i)
    runs[i] = multiply(handle, problem, a, algorithms.candidates[i], stream);
  // Round about, so that a change of clocks meets all of them.
  for (int round = 0; round < kRounds; ++round) {
    for (int i = 0; i < algorithms.count; ++i) {
      if (!runs[i]) continue;
      const float time = stopwatch.milliseconds([&] {
        for (int repeat = 0; repeat < kRepeats; ++repeat)
          runs[i] = runs[i] && multiply(handle, problem, a, algorithms.candidates[i], stream);
      });
      least[i] = std::min(least[i], time);
    }
  }
  int best = -1;
  for (int i = 0; i < algorithms.count; ++i)
    if (runs[i] && (best < 0 || least[i] < least[best])) best = i;
  if (best < 0) return false;
  algorithm_cache().put(key_of(a, device), {true, algorithms.candidates[best]});
  return true;
}

}  // namespace vernier::cuda
