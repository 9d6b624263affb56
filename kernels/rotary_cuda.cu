#include <vernier/kernels/packed.h>
#include <vernier/kernels/rotary_device.h>

namespace vernier::cuda {
namespace {

constexpr int kThreads = 128;

/// V float32 elements, sixteen bytes a load.
template <int V>
__device__ Vector<float, V> load_floats(const float* source) {
  Vector<float, V> x;
  if constexpr (V % 4 == 0) {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(source + i));
      x[i] = four.x;
      x[i + 1] = four.y;
      x[i + 2] = four.z;
      x[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = __ldg(source + i);
  }
  return x;
}

// A block for a token; an item of its work is V pairs of a head, or V dimensions that stay.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    rotary_kernel(const __grid_constant__ RotaryArguments a) {
  const auto half = static_cast<uint32_t>(a.half), size = static_cast<uint32_t>(a.size);
  const uint32_t pairs = half / V;                       // items of a head
  const uint32_t items = pairs + (size - 2 * half) / V;  // with those that stay
  const uint32_t total = static_cast<uint32_t>(a.heads) * items;
  for (int64_t token = blockIdx.x; token < a.tokens; token += gridDim.x) {
    const int64_t row = token % a.table_rows * a.half;
    const T* const input = static_cast<const T*>(a.input) + token * a.token_stride;
    T* const output = static_cast<T*>(a.output) + token * a.heads * a.size;
    for (uint32_t item = threadIdx.x; item < total; item += kThreads) {
      const uint32_t head = item / items, place = item % items;
      const T* const x = input + head * a.head_stride;
      T* const y = output + static_cast<int64_t>(head) * a.size;
      if (place >= pairs) {
        const uint32_t at = 2 * half + (place - pairs) * V;
        store_pack(y + at, load_pack<V>(x + at));
        continue;
      }
      const uint32_t at = place * V;
      const Pack<T, V> first_pack = load_pack<V>(x + at), second_pack = load_pack<V>(x + at + half);
      const Vector<float, V> cosine = load_floats<V>(a.cosine + row + at);
      const Vector<float, V> sine = load_floats<V>(a.sine + row + at);
      const Vector<float, V> first = to_floats(first_pack), second = to_floats(second_pack);
      Vector<float, V> turned, turned_half;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        turned[i] = __fsub_rn(__fmul_rn(first[i], cosine[i]), __fmul_rn(second[i], sine[i]));
        turned_half[i] = __fadd_rn(__fmul_rn(second[i], cosine[i]), __fmul_rn(first[i], sine[i]));
      }
      store_pack(y + at, from_floats<T>(turned));
      store_pack(y + at + half, from_floats<T>(turned_half));
    }
  }
}

template <typename T, int V>
void start(const RotaryArguments& a, void* stream) {
  constexpr int64_t kMostBlocks = int64_t{1} << 30;
  launch("rotary_embedding", rotary_kernel<T, V>,
         static_cast<unsigned>(std::min(a.tokens, kMostBlocks)), kThreads, stream, a);
}

template <typename T>
void run(const RotaryArguments& a, void* stream) {
  constexpr int kV = kVectorSize<T>;
  const bool whole = a.half % kV == 0 && a.size % kV == 0 && a.token_stride % kV == 0 &&
                     a.head_stride % kV == 0 && is_aligned(a.input, 16) &&
                     is_aligned(a.cosine, 16) && is_aligned(a.sine, 16) && is_aligned(a.output, 16);
  if (whole) return start<T, kV>(a, stream);
  start<T, 1>(a, stream);
}

}  // namespace

void rotary_embedding(const RotaryArguments& a, void* stream) {
  if (a.tokens <= 0 || a.heads <= 0 || a.size <= 0) return;
  with_element_type(a.type, [&]<typename T>(T*) { run<T>(a, stream); });
}

}  // namespace vernier::cuda
