// The device functions behind fake_quantize.h; internal. cpu:: in fake_quantize_cpu.cc, cuda:: in
// fake_quantize_cuda.cu.
#pragma once

#include <vernier/kernels/element_type.h>

namespace vernier {

/// What the backward of learned scales writes beside the input's gradient: float [map.count] each.
struct LearnedGradients {
  float* scale = nullptr;
  float* zero_point = nullptr;  ///< null: not wanted
  double gradient_scale = 1;    ///< factor of both
};

}  // namespace vernier

namespace vernier::cpu {

void fake_quantize(const QuantizeArguments& arguments, void* output);
/// Gradient where the code was not clipped, zero elsewhere; both of arguments.input_type.
void fake_quantize_backward(const QuantizeArguments& arguments, const void* gradient, void* output);
/// Symmetric scales from each scale's own finite absolute maximum: `arguments.scale` is not read,
/// `scale` float [map.count] and `output` are written.
void fake_quantize_dynamic(const QuantizeArguments& arguments, void* output, float* scale);
/// fake_quantize_backward, and the gradients of scale and zero point. `output` may be `gradient`.
void fake_quantize_learned_backward(const QuantizeArguments& arguments, const void* gradient,
                                    void* output, const LearnedGradients& gradients);

}  // namespace vernier::cpu

namespace vernier::cuda {

/// `stream` is a cudaStream_t. Each call only enqueues work; a launch that fails throws Error.
void fake_quantize(const QuantizeArguments& arguments, void* output, void* stream);
void fake_quantize_backward(const QuantizeArguments& arguments, const void* gradient, void* output,
                            void* stream);
void fake_quantize_dynamic(const QuantizeArguments& arguments, void* output, float* scale,
                           void* stream);
/// Doubles of `scratch` that fake_quantize_learned_backward needs.
int64_t learned_backward_scratch(const QuantizeArguments& arguments);
/// `output` may be `gradient`.
void fake_quantize_learned_backward(const QuantizeArguments& arguments, const void* gradient,
                                    void* output, const LearnedGradients& gradients,
                                    double* scratch, void* stream);

}  // namespace vernier::cuda
