#include <vernier/kernels/activation.h>
#include <vernier/kernels/error.h>

#include <algorithm>
#include <array>

namespace vernier {
namespace {

constexpr std::array<const char*, 5> kActivationNames = {"none", "relu", "gelu", "gelu_tanh",
                                                         "silu"};

}  // namespace

std::string to_string(Activation activation) {
  return kActivationNames[static_cast<size_t>(activation)];
}

Activation activation_from_string(std::string_view name) {
  const auto found = std::find(kActivationNames.begin(), kActivationNames.end(), name);
  VERNIER_CHECK(found != kActivationNames.end(), "unknown activation '", name,
                "': use none, relu, gelu, gelu_tanh or silu");
  return static_cast<Activation>(found - kActivationNames.begin());
}

}  // namespace vernier
