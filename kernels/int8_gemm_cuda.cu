#include <vernier/kernels/cublaslt.h>
#include <vernier/kernels/int8_gemm_choice.h>
#include <vernier/kernels/int8_gemm_device.h>
#include <vernier/kernels/int8_gemm_sm90.h>
#include <vernier/kernels/launch.h>
#include <vernier/kernels/stopwatch.h>

#include <atomic>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <string_view>
#include <tuple>

namespace vernier::cuda {
namespace {

constexpr const char* kName = "int8_gemm";
constexpr int kThreads = 256;

// ---- Reference ----------------------------------------------------------------------------------

// A block computes kTile x kTile accumulators, a thread 4 x 4 of them, kDepth words of four codes
// at a time.
constexpr int kTile = 64;
constexpr int kDepth = 8;

/// Words of `source` [rows, k], transposed to tile[word][row]; zero outside the matrix.
template <bool kWords>
__device__ void load_tile(const int8_t* source, int64_t rows, int64_t k, int64_t first_row,
                          int64_t first_k, int32_t (*tile)[kTile + 1]) {
  for (int i = threadIdx.x; i < kTile * kDepth; i += kThreads) {
    const int word = i % kDepth, local_row = i / kDepth;
    const int64_t row = first_row + local_row, column = first_k + word * 4;
    uint32_t packed = 0;
    if (row < rows) {
      const int8_t* p = source + row * k + column;
      if constexpr (kWords) {
        if (column < k) packed = *reinterpret_cast<const uint32_t*>(p);
      } else {
        for (int j = 0; j < 4; ++j)
          if (column + j < k) packed |= uint32_t{static_cast<uint8_t>(p[j])} << (8 * j);
      }
    }
    tile[word][local_row] = static_cast<int32_t>(packed);
  }
}

template <bool kWords>
__global__ void __launch_bounds__(kThreads)
    reference_kernel(const int8_t* codes, const int8_t* weight, int64_t m, int64_t n, int64_t k,
                     int32_t* accumulators) {
  // The padding spreads the transposed stores over the banks.
  __shared__ int32_t a[kDepth][kTile + 1], b[kDepth][kTile + 1];
  const int64_t tiles_n = (n + kTile - 1) / kTile;
  const int64_t tiles = (m + kTile - 1) / kTile * tiles_n;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first_m = tile / tiles_n * kTile, first_n = tile % tiles_n * kTile;
    int32_t sums[4][4] = {};
    for (int64_t first_k = 0; first_k < k; first_k += kDepth * 4) {
      load_tile<kWords>(codes, m, k, first_m, first_k, a);
      load_tile<kWords>(weight, n, k, first_n, first_k, b);
      __syncthreads();
#pragma unroll
      for (int d = 0; d < kDepth; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            sums[i][j] = __dp4a(a[d][ty + 16 * i], b[d][tx + 16 * j], sums[i][j]);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = first_m + ty + 16 * i;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t column = first_n + tx + 16 * j;
        if (row < m && column < n) accumulators[row * n + column] = sums[i][j];
      }
    }
  }
}

// ---- Padding ------------------------------------------------------------------------------------

// Copies [rows, columns] into [padded_rows, padded_columns], zero-filled; padded_columns is a
// multiple of 16.
__global__ void __launch_bounds__(kThreads)
    pad_kernel(const int8_t* source, int64_t rows, int64_t columns, int8_t* target,
               int64_t padded_rows, Divider vectors_per_row) {
  const int64_t per_row = vectors_per_row.divisor();
  for (int64_t v = int64_t{blockIdx.x} * kThreads + threadIdx.x; v < padded_rows * per_row;
       v += int64_t{gridDim.x} * kThreads) {
    const int64_t row = vectors_per_row.divide(v);
    const int64_t first = (v - row * per_row) * 16;
    Vector<int8_t, 16> out;
#pragma unroll
    for (int j = 0; j < 16; ++j)
      out[j] = row < rows && first + j < columns ? source[row * columns + first + j] : int8_t{0};
    store_vector(target + v * 16, out);
  }
}

// The first `columns` of each row of [rows, padded_columns].
__global__ void __launch_bounds__(kThreads)
    unpad_kernel(const int32_t* source, int64_t padded_columns, int64_t rows, Divider columns,
                 int32_t* target) {
  const int64_t per_row = columns.divisor();
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < rows * per_row;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = columns.divide(i);
    target[i] = source[row * padded_columns + i - row * per_row];
  }
}

// cuBLASLt's int8 kernels read rows of 16 bytes.
constexpr int64_t kPad = 16;
constexpr int64_t padded(int64_t size) { return (size + kPad - 1) / kPad * kPad; }

// Pieces of the caller's workspace; of the stream's memory pool once that is spent, which happens
// only for operands that are not aligned.
class Scratch {
 public:
  Scratch(void* workspace, int64_t bytes, cudaStream_t stream)
      : next_(static_cast<char*>(workspace)), left_(bytes), stream_(stream) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    for (int i = 0; i < allocated_; ++i) cudaFreeAsync(allocations_[i], stream_);
  }

  static constexpr int64_t rounded(int64_t bytes) { return (bytes + 255) / 256 * 256; }

  /// 256-byte aligned, valid until the work enqueued before this object ends is done.
  template <typename T>
  T* take(int64_t count) {
    const int64_t bytes = rounded(count * sizeof(T));
    if (bytes <= left_) {
      void* const piece = next_;
      next_ += bytes;
      left_ -= bytes;
      return static_cast<T*>(piece);
    }
    VERNIER_CHECK(allocated_ < kMost, "int8_gemm: too many temporary buffers");
    void* piece = nullptr;
    check(cudaMallocAsync(&piece, bytes, stream_), "allocating a temporary buffer for int8_gemm");
    allocations_[allocated_++] = piece;
    return static_cast<T*>(piece);
  }

 private:
  static constexpr int kMost = 5;  // the library's own, two operands, a result and its padded form
  char* next_;
  int64_t left_;
  cudaStream_t stream_;
  void* allocations_[kMost] = {};
  int allocated_ = 0;
};

// ---- cuBLASLt -----------------------------------------------------------------------------------

constexpr int64_t kLibraryWorkspace = int64_t{32} << 20;

// Our row-major accumulators [m, n] = codes [m, k] * weight [n, k]^T are, read by columns, the [n,
// m] product of the weight's transpose and the codes: the "TN" form, the one that int8 tensor cores
// are offered in.
struct Problem {
  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t weight, codes, result;

  // False where the library refuses.
  bool init(int64_t m, int64_t n, int64_t k) {
    const cublasOperation_t transpose = CUBLAS_OP_T;
    const auto ok = [](cublasStatus_t status) { return status == CUBLAS_STATUS_SUCCESS; };
    return ok(cublasLtMatmulDescInit(&operation, CUBLAS_COMPUTE_32I, CUDA_R_32I)) &&
           ok(cublasLtMatmulDescSetAttribute(&operation, CUBLASLT_MATMUL_DESC_TRANSA, &transpose,
                                             sizeof transpose)) &&
           ok(cublasLtMatrixLayoutInit(&weight, CUDA_R_8I, k, n, k)) &&
           ok(cublasLtMatrixLayoutInit(&codes, CUDA_R_8I, k, m, k)) &&
           ok(cublasLtMatrixLayoutInit(&result, CUDA_R_32I, n, m, n));
  }
};

using ShapeKey =
    std::tuple<int, int64_t, int64_t, int64_t, uint32_t>;  // device, m, n, k, alignment

using AlgorithmCache = CublasLtAlgorithmCache<ShapeKey>;

AlgorithmCache& algorithm_cache() {
  static auto& cache = *new AlgorithmCache;
  return cache;
}

CublasLtAlgorithm choose_algorithm(cublasLtHandle_t handle, Problem& problem, uint32_t alignment) {
  cublasLtMatmulPreferenceOpaque_t preference;
  bool ok = cublasLtMatmulPreferenceInit(&preference) == CUBLAS_STATUS_SUCCESS;
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    ok = ok && cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof value) ==
                   CUBLAS_STATUS_SUCCESS;
  };
  const uint64_t workspace = kLibraryWorkspace;
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment);
  if (!ok) return {};
  cublasLtMatmulHeuristicResult_t result = {};
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      handle, &problem.operation, &problem.weight, &problem.codes, &problem.result, &problem.result,
      &preference, 1, &result, &found);
  if (status != CUBLAS_STATUS_SUCCESS || found == 0 || result.state != CUBLAS_STATUS_SUCCESS)
    return {};
  return {true, result.algo};
}

/// Enqueues the product with cuBLASLt; false, with nothing enqueued, where it cannot. Sizes and
/// pointers are multiples of 16, except m.
bool library_matmul(const int8_t* codes, const int8_t* weight, int64_t m, int64_t n, int64_t k,
                    int32_t* result, void* workspace, cudaStream_t stream) {
  const int device = current_device();
  const cublasLtHandle_t handle = cublaslt_handle(device);
  Problem problem;
  if (!handle || !problem.init(m, n, k)) return false;
  const bool aligned = is_aligned(codes, 256) && is_aligned(weight, 256) && is_aligned(result, 256);
  const uint32_t alignment = aligned ? 256 : 16;

  const ShapeKey key{device, m, n, k, alignment};
  const CublasLtAlgorithm algorithm =
      algorithm_cache().get(key, [&] { return choose_algorithm(handle, problem, alignment); });
  if (!algorithm.usable) return false;

  const int32_t alpha = 1, beta = 0;
  const cublasStatus_t status =
      cublasLtMatmul(handle, &problem.operation, &alpha, weight, &problem.weight, codes,
                     &problem.codes, &beta, result, &problem.result, result, &problem.result,
                     &algorithm.algorithm, workspace, kLibraryWorkspace, stream);
  if (status == CUBLAS_STATUS_SUCCESS) return true;
  cudaGetLastError();  // the fallback's launch must not be blamed
  algorithm_cache().put(key, {});
  return false;
}

void pad(const int8_t* source, int64_t rows, int64_t columns, int8_t* target, int64_t padded_rows,
         void* stream) {
  const Divider vectors_per_row(padded(columns) / 16);
  const int64_t tiles = divide_up(padded_rows * vectors_per_row.divisor(), kThreads);
  launch(kName, pad_kernel, grid_size(tiles, 32), kThreads, stream, source, rows, columns, target,
         padded_rows, vectors_per_row);
}

// ---- Epilogue -----------------------------------------------------------------------------------

template <int V>
__device__ Vector<float, V> filled_vector(float value) {
  Vector<float, V> vector;
#pragma unroll
  for (int j = 0; j < V; ++j) vector[j] = value;
  return vector;
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    epilogue_kernel(const int32_t* accumulators, const EpilogueArguments a,
                    Divider vectors_per_row) {
  const int64_t per_row = vectors_per_row.divisor();
  const int32_t zero_point = a.input_zero_point ? *a.input_zero_point : 0;
  const int32_t output_zero_point = a.output_zero_point ? *a.output_zero_point : 0;
  T* output = static_cast<T*>(a.output);
  for (int64_t v = int64_t{blockIdx.x} * kThreads + threadIdx.x; v < a.rows * per_row;
       v += int64_t{gridDim.x} * kThreads) {
    const int64_t row = vectors_per_row.divide(v);
    const int64_t column = (v - row * per_row) * V;
    Vector<int32_t, V> acc = load_vector<V>(accumulators + v * V);
    if (a.input_zero_point) {
      const Vector<int32_t, V> sums = load_vector<V>(a.weight_sum + column);
#pragma unroll
      for (int j = 0; j < V; ++j) acc[j] -= zero_point * sums[j];
    }
    const float input_scale = a.input_scale[a.input_scale_per_row ? row : 0];
    const auto scales = a.weight_scale_per_column ? load_vector<V>(a.weight_scale + column)
                                                  : filled_vector<V>(*a.weight_scale);
    const auto bias = a.bias ? load_vector<V>(a.bias + column) : filled_vector<V>(0.0f);
    Vector<T, V> out;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float y =
          activate(a.activation, epilogue_value(acc[j], input_scale, scales[j], bias[j]));
      if constexpr (std::is_same_v<T, int8_t>) {
        out[j] = static_cast<int8_t>(
            quantize_value(y, *a.output_scale, output_zero_point, a.qmin, a.qmax));
      } else {
        out[j] = from_float<T>(y);
      }
    }
    store_vector(output + v * V, out);
  }
}

template <typename T, int V>
void run_epilogue(const int32_t* accumulators, const EpilogueArguments& a, void* stream) {
  const Divider vectors_per_row(a.columns / V);
  const int64_t tiles = divide_up(a.rows * vectors_per_row.divisor(), kThreads);
  launch(kName, epilogue_kernel<T, V>, grid_size(tiles, 32), kThreads, stream, accumulators, a,
         vectors_per_row);
}

// ---- Choice -------------------------------------------------------------------------------------

std::atomic<bool>& autotune() {
  static std::atomic<bool> on = [] {
    const char* const value = std::getenv("VERNIER_AUTOTUNE");
    return value && std::string_view(value) == "1";
  }();
  return on;
}

// One cache a device, of its model's file.
GemmTuningCache& tuning_cache() {
  static std::mutex mutex;
  static auto& caches = *new std::map<int, GemmTuningCache>;
  const std::lock_guard lock(mutex);
  const int device = current_device();
  const auto found = caches.find(device);
  if (found != caches.end()) return found->second;
  cudaDeviceProp properties = {};
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  return caches.try_emplace(device, gemm_tuning_file(properties.name)).first->second;
}

/// The configuration that computes this very product fastest; the output is written many times.
int fastest_configuration(const int8_t* codes, const int8_t* weight, int64_t k,
                          const EpilogueArguments& e, void* stream) {
  constexpr int kRuns = 5;
  Stopwatch stopwatch(stream, kName);
  int best = 0;
  float least = std::numeric_limits<float>::infinity();
  for (int i = 0; i < static_cast<int>(gemm_configurations().size()); ++i) {
    for (int run = -1; run < kRuns; ++run) {  // the first does not count
      const float time =
          stopwatch.milliseconds([&] { sm90::int8_gemm(i, codes, weight, k, e, stream); });
      if (run < 0 || time >= least) continue;
      least = time;
      best = i;
    }
  }
  return best;
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(as_stream(stream), &status), kName);
  return status != cudaStreamCaptureStatusNone;
}

int configuration_for(const int8_t* codes, const int8_t* weight, int64_t k,
                      const EpilogueArguments& e, void* stream) {
  const int64_t m = e.rows, n = e.columns;
  if (const auto known = tuning_cache().find(m, n, k)) return *known;
  if (!autotune() || is_capturing(stream))
    return choose_configuration(m, n, k, multiprocessors()).index;
  const int fastest = fastest_configuration(codes, weight, k, e, stream);
  tuning_cache().store(m, n, k, fastest);
  return fastest;
}

// ---- The paths ----------------------------------------------------------------------------------

/// The operand itself, or a copy with rows of whole 16-byte vectors where it has none.
const int8_t* addressable(const int8_t* operand, int64_t rows, int64_t k, int64_t padded_rows,
                          Scratch& scratch, void* stream) {
  if (padded(k) == k && padded_rows == rows && is_aligned(operand, 16)) return operand;
  int8_t* const copy = scratch.take<int8_t>(padded_rows * padded(k));
  pad(operand, rows, k, copy, padded_rows, stream);
  return copy;
}

/// cuBLASLt's accumulators, or those of plain instructions where it has no algorithm.
void library_accumulators(const int8_t* codes, const int8_t* weight, int64_t m, int64_t n,
                          int64_t k, int32_t* accumulators, Scratch& scratch, void* stream) {
  void* const library_workspace = scratch.take<char>(kLibraryWorkspace);
  const int64_t padded_n = padded(n);
  const int8_t* const a = addressable(codes, m, k, m, scratch, stream);
  const int8_t* const b = addressable(weight, n, k, padded_n, scratch, stream);
  const bool direct = padded_n == n && is_aligned(accumulators, 16);
  int32_t* const result = direct ? accumulators : scratch.take<int32_t>(m * padded_n);
  if (!library_matmul(a, b, m, padded_n, padded(k), result, library_workspace, as_stream(stream)))
    return int8_matmul_reference(codes, weight, m, n, k, accumulators, stream);
  if (direct) return;
  launch(kName, unpad_kernel, grid_size(divide_up(m * n, kThreads), 32), kThreads, stream,
         static_cast<const int32_t*>(result), padded_n, m, Divider(n), accumulators);
}

}  // namespace

void int8_matmul_reference(const int8_t* codes, const int8_t* weight, int64_t m, int64_t n,
                           int64_t k, int32_t* accumulators, void* stream) {
  if (m <= 0 || n <= 0) return;
  const int64_t tiles = divide_up(m, kTile) * divide_up(n, kTile);
  const bool words = k % 4 == 0 && is_aligned(codes, 4) && is_aligned(weight, 4);
  launch("int8_matmul_reference", words ? reference_kernel<true> : reference_kernel<false>,
         grid_size(tiles, 1024), kThreads, stream, codes, weight, m, n, k, accumulators);
}

void int8_epilogue(const int32_t* accumulators, const EpilogueArguments& a, void* stream) {
  if (a.rows <= 0 || a.columns <= 0) return;
  constexpr int V = 4;
  const bool vectors = a.columns % V == 0 && is_aligned(accumulators, 16) &&
                       (!a.weight_scale_per_column || is_aligned(a.weight_scale, 16)) &&
                       is_aligned(a.bias, 16) && is_aligned(a.weight_sum, 16) &&
                       is_aligned(a.output, 16);
  const auto run = [&]<typename T>(T*) {
    if (vectors) {
      run_epilogue<T, V>(accumulators, a, stream);
    } else {
      run_epilogue<T, 1>(accumulators, a, stream);
    }
  };
  switch (a.output_type) {
    case GemmOutput::i8:
      return run(static_cast<int8_t*>(nullptr));
    case GemmOutput::f32:
      return with_element_type(ElementType::f32, run);
    case GemmOutput::f16:
      return with_element_type(ElementType::f16, run);
    case GemmOutput::bf16:
      return with_element_type(ElementType::bf16, run);
    case GemmOutput::i32:
      break;
  }
}

int64_t int8_gemm_workspace_bytes(int64_t m, int64_t n, int64_t k, GemmOutput output) {
  const bool own = sm90::is_available();
  int64_t bytes = 0;
  if (k % kPad != 0) bytes += Scratch::rounded(m * padded(k));
  if (k % kPad != 0 || (!own && n % kPad != 0))
    bytes += Scratch::rounded((own ? n : padded(n)) * padded(k));
  if (own) return bytes;
  bytes += kLibraryWorkspace;
  if (n % kPad != 0) bytes += Scratch::rounded(m * padded(n) * sizeof(int32_t));
  if (output != GemmOutput::i32) bytes += Scratch::rounded(m * n * sizeof(int32_t));
  return bytes;
}

void int8_gemm(const int8_t* codes, const int8_t* weight, int64_t k, const EpilogueArguments& e,
               void* workspace, int64_t workspace_bytes, void* stream) {
  const int64_t m = e.rows, n = e.columns;
  if (m <= 0 || n <= 0 || k <= 0) return;
  Scratch scratch(workspace, workspace_bytes, as_stream(stream));
  if (sm90::is_available()) {
    const int8_t* const a = addressable(codes, m, k, m, scratch, stream);
    const int8_t* const b = addressable(weight, n, k, n, scratch, stream);
    const int configuration = configuration_for(a, b, padded(k), e, stream);
    return sm90::int8_gemm(configuration, a, b, padded(k), e, stream);
  }
  if (e.output_type == GemmOutput::i32)
    return library_accumulators(codes, weight, m, n, k, static_cast<int32_t*>(e.output), scratch,
                                stream);
  int32_t* const accumulators = scratch.take<int32_t>(m * n);
  library_accumulators(codes, weight, m, n, k, accumulators, scratch, stream);
  int8_epilogue(accumulators, e, stream);
}

std::pair<std::string, std::string> int8_gemm_kernel(int64_t m, int64_t n, int64_t k) {
  if (!sm90::is_available())
    return {"cublasLt_i8i8i32", "Vernier's own kernels are for compute capability 9.0"};
  if (const auto known = tuning_cache().find(m, n, padded(k)))
    return {gemm_configurations()[*known].name, "the fastest when it was timed on this GPU"};
  const GemmChoice choice = choose_configuration(m, n, padded(k), multiprocessors());
  return {gemm_configurations()[choice.index].name, choice.reason()};
}

void set_int8_gemm_autotune(bool on) { autotune() = on; }

}  // namespace vernier::cuda
