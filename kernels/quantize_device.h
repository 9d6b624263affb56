// The device functions behind quantize.h; internal. cpu:: in quantize_cpu.cc, cuda:: in
// quantize_cuda.cu.
#pragma once

#include <vernier/kernels/element_type.h>

namespace vernier::cpu {

void quantize(const QuantizeArguments& arguments, int8_t* codes);
/// `arguments.input` holds int8 codes; its type names the output.
void dequantize(const QuantizeArguments& arguments, void* output);
void per_token_scale(const void* input, ElementType type, int64_t rows, int64_t columns,
                     int32_t qmax, float* scale);
void quantize_per_token(const void* input, ElementType type, int64_t rows, int64_t columns,
                        int32_t qmin, int32_t qmax, int8_t* codes, float* scale);

}  // namespace vernier::cpu

namespace vernier::cuda {

/// `stream` is a cudaStream_t. Each call only enqueues work; a launch that fails throws Error.
void quantize(const QuantizeArguments& arguments, int8_t* codes, void* stream);
void dequantize(const QuantizeArguments& arguments, void* output, void* stream);
void per_token_scale(const void* input, ElementType type, int64_t rows, int64_t columns,
                     int32_t qmax, float* scale, void* stream);
void quantize_per_token(const void* input, ElementType type, int64_t rows, int64_t columns,
                        int32_t qmin, int32_t qmax, int8_t* codes, float* scale, void* stream);

}  // namespace vernier::cuda
