// The activation functions by name. Host and device code share this header.
#pragma once

#include <vernier/kernels/math_functions.h>

#include <string>
#include <string_view>

namespace vernier {

/// What is applied to a value before it is written or quantized.
enum class Activation { none, relu, gelu, gelu_tanh, silu };

std::string to_string(Activation activation);
/// Throws Error for an unknown name.
Activation activation_from_string(std::string_view name);

/// The function of math_functions.h that an activation names.
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

/// Calls f.template operator()<activation>(): a run-time choice among instantiations.
template <typename F>
void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::none:
      return f.template operator()<Activation::none>();
    case Activation::relu:
      return f.template operator()<Activation::relu>();
    case Activation::gelu:
      return f.template operator()<Activation::gelu>();
    case Activation::gelu_tanh:
      return f.template operator()<Activation::gelu_tanh>();
    case Activation::silu:
      return f.template operator()<Activation::silu>();
  }
}

}  // namespace vernier
