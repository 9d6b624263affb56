#include <vernier/kernels/activation.h>
#include <vernier/kernels/error.h>

#include <array>
#include <utility>

namespace vernier {
namespace {

constexpr std::array<std::pair<Activation, const char*>, 5> kNames = {{
    {Activation::none, "none"},
    {Activation::relu, "relu"},
    {Activation::gelu, "gelu"},
    {Activation::gelu_tanh, "gelu_tanh"},
    {Activation::silu, "silu"},
}};

}  // namespace

std::string to_string(Activation activation) {
  for (const auto& [value, name] : kNames)
    if (value == activation) return name;
  return "unknown";
}

Activation activation_from_string(std::string_view name) {
  for (const auto& [value, known] : kNames)
    if (name == known) return value;
  throw Error(concat("unknown activation \"", name, "\": use none, relu, gelu, gelu_tanh or silu"));
}

}  // namespace vernier
