// The device functions behind activation_quantize.h; internal. cpu:: in activation_quantize_cpu.cc,
// cuda:: in activation_quantize_cuda.cu.
#pragma once

#include <vernier/kernels/activation.h>
#include <vernier/kernels/row_codes.h>

namespace vernier {

/// Raw arguments. The columns of a row are contiguous.
struct ActivationQuantizeArguments {
  RowCodes codes;
  Activation activation = Activation::relu;
  const void* input = nullptr;  ///< [rows, columns] of codes.type
  const void* up = nullptr;     ///< likewise, or null: not gated
  int64_t row_stride = 0;       ///< elements from a row to the next, of input and up
};

namespace cpu {
void activation_quantize(const ActivationQuantizeArguments& arguments);
}

namespace cuda {
/// `stream` is a cudaStream_t. Only enqueues work; a launch that fails throws Error.
void activation_quantize(const ActivationQuantizeArguments& arguments, void* stream);
}  // namespace cuda

}  // namespace vernier
