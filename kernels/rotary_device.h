// The device functions behind rotary.h; internal. cpu:: in rotary_cpu.cc, cuda:: in rotary_cuda.cu.
#pragma once

#include <vernier/kernels/element_type.h>

namespace vernier {

/// Raw arguments; strides are in elements.
struct RotaryArguments {
  ElementType type = ElementType::f32;
  int64_t tokens = 0;
  int64_t heads = 0;
  int64_t size = 0;             ///< D
  int64_t half = 0;             ///< R / 2
  int64_t table_rows = 1;       ///< tokens is a multiple
  const void* input = nullptr;  ///< element d of head h of token t at t * token + h * head + d
  int64_t token_stride = 0, head_stride = 0;
  const float* cosine = nullptr;  ///< [table_rows, half]
  const float* sine = nullptr;    ///< likewise
  void* output = nullptr;         ///< [tokens, heads, size]
};

namespace cpu {
void rotary_embedding(const RotaryArguments& arguments);
}

namespace cuda {
/// `stream` is a cudaStream_t. Only enqueues work; a launch that fails throws Error.
void rotary_embedding(const RotaryArguments& arguments, void* stream);
}  // namespace cuda

}  // namespace vernier
