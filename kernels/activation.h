// The activation functions that kernels fuse, by name; the functions themselves are in
// math_functions.h.
#pragma once

#include <vernier/kernels/math_functions.h>

#include <string>
#include <string_view>

namespace vernier {

/// What is applied to a value before it is written or quantized.
enum class Activation {
  none,
  relu,
  gelu,       ///< x Phi(x), torch's gelu(approximate="none")
  gelu_tanh,  ///< torch's gelu(approximate="tanh")
  silu
};

/// "none", "relu", "gelu", "gelu_tanh", "silu".
std::string to_string(Activation activation);
/// Throws Error for an unknown name.
Activation activation_from_string(std::string_view name);

/// The same bits on the CPU and the GPU.
VERNIER_HOST_DEVICE inline float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::relu:
      return relu(x);
    case Activation::gelu:
      return gelu(x);
    case Activation::gelu_tanh:
      return gelu_tanh(x);
    case Activation::silu:
      return silu(x);
    case Activation::none:
      break;
  }
  return x;
}

}  // namespace vernier
