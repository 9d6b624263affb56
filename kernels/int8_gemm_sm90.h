// INT8 products on Hopper's tensor cores, epilogue fused; internal. The device functions of
// int8_gemm_cuda.cu's dispatcher for GPUs of compute capability 9.0.
#pragma once

#include <vernier/kernels/int8_gemm_device.h>

namespace vernier::cuda::sm90 {

/// Whether this build holds the kernels and the current device can run them.
bool is_available();

/// Enqueues output = epilogue(codes [m, k] * weight [n, k]^T) with a configuration of
/// gemm_configurations().
/// k is a multiple of 16 and both operands are 16-byte aligned; m, n, k >= 1.
void int8_gemm(int configuration, const int8_t* codes, const int8_t* weight, int64_t k,
               const EpilogueArguments& epilogue, void* stream);

}  // namespace vernier::cuda::sm90
