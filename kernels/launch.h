// What the CUDA files share: checked launches, grid sizes, element conversions, vector access,
// exact division by constants; internal, for .cu files only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <vernier/kernels/element_type.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/histogram_bins.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace vernier::cuda {

// ---- Host side ----------------------------------------------------------------------------------

/// Throws Error naming the operation unless it succeeded. The error is cleared first: one that is
/// not sticky must not surface in whatever the process does next.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) [[likely]]
    return;
  cudaGetLastError();
  throw Error(concat(what, " failed on the GPU: ", cudaGetErrorString(status)));
}

inline cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

/// Enqueues kernel<<<grid, block, memory, stream>>>(arguments...). Throws Error when the launch
/// fails.
template <typename... Parameters, typename... Arguments>
void launch_with_memory(const char* what, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                        int memory, void* stream, Arguments&&... arguments) {
  // A block gets 48 KiB without asking, of which its static shared memory takes a part.
  constexpr int kWithoutAsking = 32 * 1024;
  if (memory > kWithoutAsking)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, memory), what);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = memory;
  config.stream = as_stream(stream);
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), what);
}

/// The same without dynamic shared memory.
template <typename... Parameters, typename... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream,
            Arguments&&... arguments) {
  launch_with_memory(what, kernel, grid, block, 0, stream, std::forward<Arguments>(arguments)...);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

inline int multiprocessors() {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, current_device()),
        "cudaDeviceGetAttribute");
  return count;
}

/// Blocks of a grid-stride kernel: one per tile of work, at most `per_multiprocessor` on each
/// multiprocessor.
inline unsigned grid_size(int64_t tiles, int per_multiprocessor) {
  const int64_t most = int64_t{multiprocessors()} * per_multiprocessor;
  return static_cast<unsigned>(std::clamp<int64_t>(tiles, 1, most));
}

inline bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

/// Calls f with a null pointer of the device type of an element type.
template <typename F>
void with_element_type(ElementType type, const F& f) {
  switch (type) {
    case ElementType::f32:
      f(static_cast<float*>(nullptr));
      break;
    case ElementType::f16:
      f(static_cast<__half*>(nullptr));
      break;
    case ElementType::bf16:
      f(static_cast<__nv_bfloat16*>(nullptr));
      break;
  }
}

/// Calls f with std::true_type or std::false_type: a run-time choice between two instantiations.
template <typename F>
void with_flag(bool flag, const F& f) {
  if (flag) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

/// Division of 0 <= n < 2^63 by a divisor fixed before the launch: a product and a correction in
/// place of the hundred instructions of a 64-bit division.
class Divider {
 public:
  explicit Divider(int64_t divisor)
      : divisor_(static_cast<uint64_t>(divisor)), reciprocal_(~uint64_t{0} / divisor_) {}

  __device__ int64_t divide(int64_t n) const {
    // reciprocal >= 2^64 / d - 1, so that the product is short of n / d by less than 1: the floor
    // by at most 1.
    const uint64_t value = static_cast<uint64_t>(n);
    uint64_t quotient = __umul64hi(value, reciprocal_);
    if (value - quotient * divisor_ >= divisor_) ++quotient;
    return static_cast<int64_t>(quotient);
  }

  __host__ __device__ int64_t divisor() const { return static_cast<int64_t>(divisor_); }

 private:
  uint64_t divisor_;
  uint64_t reciprocal_;
};

/// The same for 0 <= n < 2^31, at a tenth of the cost.
class Divider32 {
 public:
  /// 0 < divisor < 2^31.
  explicit Divider32(int64_t divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    while ((uint64_t{1} << shift_) < divisor_) ++shift_;
    // Above 2^(31 + shift) / d by less than d / d <= 2^shift / d, so that for n < 2^31 the product
    // is above n / d by less than 1 / d: never as far as the next integer.
    multiplier_ = static_cast<uint32_t>(((uint64_t{1} << (31 + shift_)) + divisor_ - 1) / divisor_);
  }

  __device__ uint32_t divide(uint32_t n) const { return __umulhi(n << 1, multiplier_) >> shift_; }
  __device__ uint32_t remainder(uint32_t n) const { return n - divide(n) * divisor_; }

 private:
  uint32_t divisor_;
  uint32_t multiplier_;
  int shift_ = 0;
};

// ---- Device side --------------------------------------------------------------------------------

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

/// Rounds to nearest, ties to even.
template <typename T>
__device__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

/// N elements that one instruction moves.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];

  __device__ T& operator[](int i) { return values[i]; }
  __device__ const T& operator[](int i) const { return values[i]; }
};

template <int N, typename T>
__device__ Vector<T, N> load_vector(const T* source) {
  return *reinterpret_cast<const Vector<T, N>*>(source);
}

template <typename T, int N>
__device__ void store_vector(T* target, const Vector<T, N>& vector) {
  *reinterpret_cast<Vector<T, N>*>(target) = vector;
}

/// Elements of type T in a 16-byte vector.
template <typename T>
inline constexpr int kVectorSize = 16 / sizeof(T);

/// Vectors that a thread of a streaming kernel has in flight.
inline constexpr int kUnroll = 4;

/// Calls f(element) for every element of `input`, the work shared by the grid; V elements a load.
template <int V, typename T, typename F>
__device__ void for_each_element(const T* input, int64_t numel, const F& f) {
  const int64_t vectors = numel / V;
  const int64_t tile = int64_t{blockDim.x} * kUnroll;
  for (int64_t base = blockIdx.x * tile; base < vectors; base += gridDim.x * tile) {
    Vector<T, V> x[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t v = base + u * blockDim.x + threadIdx.x;
      if (v < vectors) x[u] = load_vector<V>(input + v * V);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (base + u * blockDim.x + threadIdx.x >= vectors) break;
#pragma unroll
      for (int j = 0; j < V; ++j) f(x[u][j]);
    }
  }
  if (const int64_t i = vectors * V + threadIdx.x; blockIdx.x == 0 && i < numel) f(input[i]);
}

inline constexpr uint32_t kSignBit = 0x80000000u;
inline constexpr uint32_t kInfinityBits = 0x7f800000u;
inline constexpr unsigned kFullWarp = 0xffffffffu;
inline constexpr int kWarp = 32;

/// The bits of |x|, which order magnitudes as integers; 0 for NaN and infinity, which enter no
/// statistic.
__device__ inline uint32_t finite_magnitude_bits(float x) {
  const uint32_t magnitude = __float_as_uint(x) & ~kSignBit;
  return magnitude < kInfinityBits ? magnitude : 0;
}

/// The largest `value` among groups of kThreads consecutive threads, known to all of them. kThreads
/// is kWarp or the block's size; in the latter case every thread of the block has to call.
template <int kThreads>
__device__ uint32_t group_max(uint32_t value) {
  value = __reduce_max_sync(kFullWarp, value);
  if constexpr (kThreads > kWarp) {
    __shared__ uint32_t warps[kThreads / kWarp];
    const int lane = threadIdx.x % kWarp;
    __syncthreads();  // the previous call's readers are done
    if (lane == 0) warps[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = __reduce_max_sync(kFullWarp, lane < kThreads / kWarp ? warps[lane] : 0);
  }
  return value;
}

}  // namespace vernier::cuda
