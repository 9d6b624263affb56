// Elements in the words that loads and stores move; internal, for .cu files only.
#pragma once

#include <vernier/kernels/launch.h>

namespace vernier::cuda {

template <typename T>
inline constexpr bool kIsBfloat16 = std::is_same_v<T, __nv_bfloat16>;
template <typename T>
inline constexpr bool kIsHalf = std::is_same_v<T, __half>;

/// V elements as the words that loads and stores move. Two 16-bit elements stay in one register,
/// where a Vector's would each take their own.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  using Word = std::conditional_t<(sizeof(T) * V >= 4), uint32_t,
                                  std::conditional_t<sizeof(T) * V == 2, uint16_t, uint8_t>>;
  static constexpr int kWords = sizeof(T) * V / sizeof(Word);
  Word words[kWords];
};

template <int V, typename T>
__device__ Pack<T, V> load_pack(const T* source) {
  return *reinterpret_cast<const Pack<T, V>*>(source);
}

/// Calls f(pack) for the packs at `source` + row * `pitch` of rows first, first + step and so on
/// below `rows`; kUnroll * 2 loads are under way at a time.
template <int V, typename T, typename F>
__device__ void for_each_row_pack(const T* source, int64_t pitch, int64_t first, int64_t rows,
                                  int64_t step, const F& f) {
  constexpr int kAtOnce = 2 * kUnroll;
  int64_t row = first;
  for (; row + (kAtOnce - 1) * step < rows; row += kAtOnce * step) {
    Pack<T, V> packs[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) packs[u] = load_pack<V>(source + (row + u * step) * pitch);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) f(packs[u]);
  }
#pragma unroll 1
  for (; row < rows; row += step) f(load_pack<V>(source + row * pitch));
}

template <typename T, int V>
__device__ void store_pack(T* target, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(target) = pack;
}

template <typename T, int V>
__device__ Vector<T, V> unpack(const Pack<T, V>& pack) {
  Vector<T, V> elements;
  __builtin_memcpy(&elements, &pack, sizeof elements);
  return elements;
}

template <typename T, int V>
__device__ Pack<T, V> pack(const Vector<T, V>& elements) {
  Pack<T, V> result;
  __builtin_memcpy(&result, &elements, sizeof result);
  return result;
}

template <typename T, int V>
__device__ Vector<float, V> to_floats(const Pack<T, V>& x) {
  Vector<float, V> y;
#pragma unroll
  for (int w = 0; w < Pack<T, V>::kWords; ++w) {
    const auto word = x.words[w];
    if constexpr (sizeof(T) == 4) {
      y[w] = __uint_as_float(word);
    } else if constexpr (kIsBfloat16<T>) {  // the upper half of a float
      y[2 * w] = __uint_as_float(uint32_t{word} << 16);
      if constexpr (V > 1) y[2 * w + 1] = __uint_as_float(word & 0xffff0000u);
    } else if constexpr (V > 1) {
      __half2 pair;
      __builtin_memcpy(&pair, &word, sizeof pair);
      const float2 both = __half22float2(pair);
      y[2 * w] = both.x;
      y[2 * w + 1] = both.y;
    } else {
      y[w] = __half2float(__ushort_as_half(word));
    }
  }
  return y;
}

/// Rounds to nearest, ties to even.
template <typename T, int V>
__device__ Pack<T, V> from_floats(const Vector<float, V>& x) {
  Pack<T, V> y;
#pragma unroll
  for (int w = 0; w < Pack<T, V>::kWords; ++w) {
    if constexpr (sizeof(T) == 2 && V > 1) {
      std::conditional_t<kIsBfloat16<T>, __nv_bfloat162, __half2> pair;
      if constexpr (kIsBfloat16<T>) {
        pair = __floats2bfloat162_rn(x[2 * w], x[2 * w + 1]);
      } else {
        pair = __floats2half2_rn(x[2 * w], x[2 * w + 1]);
      }
      __builtin_memcpy(&y.words[w], &pair, sizeof pair);
    } else {
      const T value = from_float<T>(x[w]);
      __builtin_memcpy(&y.words[w], &value, sizeof value);
    }
  }
  return y;
}

}  // namespace vernier::cuda
