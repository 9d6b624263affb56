// The device functions behind layout.h; internal. cpu:: in layout_cpu.cc, cuda:: in layout_cuda.cu.
#pragma once

#include <vernier/kernels/layout_address.h>

namespace vernier {

/// Shapes of one matrix before and after; pointers on the kernel's device, elements of 1 or 4
/// bytes.
struct ConvertLayoutArguments {
  const void* input = nullptr;
  LayoutShape from;
  void* output = nullptr;
  LayoutShape to;
  int element_bytes = 1;
};

namespace cpu {

void convert_layout(const ConvertLayoutArguments& arguments);

}  // namespace cpu

namespace cuda {

/// `stream` is a cudaStream_t. Only enqueues work; a launch that fails throws Error.
void convert_layout(const ConvertLayoutArguments& arguments, void* stream);

}  // namespace cuda
}  // namespace vernier
