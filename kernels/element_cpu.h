// How CPU kernels read and write half precision: in blocks, through float32; internal.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <vernier/kernels/element_type.h>

#include <array>
#include <type_traits>

namespace vernier::cpu {

/// Elements that a kernel handles at a time: small enough for the first-level cache, long enough
/// for vectors.
inline constexpr int64_t kBlock = 1024;

using FloatBlock = std::array<float, kBlock>;

/// The `count` elements at `source` as float: the source itself where it is float, else converted
/// into `block`.
template <typename T>
const float* load_block(const T* source, int64_t count, FloatBlock& block) {
  if constexpr (std::is_same_v<T, float>) {
    return source;
  } else {
    for (int64_t i = 0; i < count; ++i) block[i] = static_cast<float>(source[i]);
    return block.data();
  }
}

/// Where a kernel writes `count` float results meant for `target`: the target itself where it is
/// float, else `block`, to be passed on by store_block.
template <typename T>
float* output_block(T* target, FloatBlock& block) {
  if constexpr (std::is_same_v<T, float>) {
    return target;
  } else {
    return block.data();
  }
}

template <typename T>
void store_block(const FloatBlock& block, int64_t count, T* target) {
  if constexpr (!std::is_same_v<T, float>) {
    for (int64_t i = 0; i < count; ++i) target[i] = static_cast<T>(block[i]);
  }
}

/// Calls f with a null pointer of the C++ type of an element type.
template <typename F>
void with_element_type(ElementType type, const F& f) {
  switch (type) {
    case ElementType::f32:
      f(static_cast<float*>(nullptr));
      break;
    case ElementType::f16:
      f(static_cast<c10::Half*>(nullptr));
      break;
    case ElementType::bf16:
      f(static_cast<c10::BFloat16*>(nullptr));
      break;
  }
}

}  // namespace vernier::cpu
