// Element types that kernels read and write, and the map from an element to its scale: what the
// dispatch files hand to the device files in place of tensors.
#pragma once

#include <vernier/kernels/scheme.h>

#include <cstdint>

namespace vernier {

enum class ElementType { f32, f16, bf16 };

/// Element i of a contiguous tensor uses scale (i / inner) % count. One rule covers every
/// granularity: per_tensor inner = numel; per_channel inner = product of the sizes behind the axis;
/// per_token inner = last size; per_group inner = group_size.
struct ScaleMap {
  int64_t inner = 1;
  int64_t count = 1;

  VERNIER_HOST_DEVICE int64_t index(int64_t element) const { return (element / inner) % count; }
};

/// Raw arguments of the element-wise quantization kernels. Pointers are on the kernel's device.
struct QuantizeArguments {
  const void* input = nullptr;  ///< [numel] of input_type
  ElementType input_type = ElementType::f32;
  int64_t numel = 0;
  const float* scale = nullptr;         ///< [map.count]
  const int32_t* zero_point = nullptr;  ///< [map.count] or null: all zero
  ScaleMap map;
  int32_t qmin = -127;
  int32_t qmax = 127;
};

}  // namespace vernier
