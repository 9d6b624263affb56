#include <vernier/kernels/activation_quantize_device.h>
#include <vernier/kernels/row_codes_cpu.h>

namespace vernier::cpu {
namespace {

// In place; not a template, which could not have clones.
VERNIER_SIMD void activate_row(Activation activation, float* x, int64_t n) {
  with_activation(
      activation, [&]<Activation kActivation>() __attribute__((always_inline)) {
        for (int64_t c = 0; c < n; ++c) x[c] = activate(kActivation, x[c]);
      });
}

}  // namespace

void activation_quantize(const ActivationQuantizeArguments& a) {
  const int64_t columns = a.codes.columns;
  with_element_type(a.codes.type, [&]<typename T>(T*) {
    parallel_for(a.codes.rows, row_grain(a.codes), [&](int64_t begin, int64_t end) {
      std::vector<float> y(columns);
      for (int64_t row = begin; row < end; ++row) {
        const T* input = static_cast<const T*>(a.input) + row * a.row_stride;
        for (int64_t c = 0; c < columns; ++c) y[c] = static_cast<float>(input[c]);
        activate_row(a.activation, y.data(), columns);
        if (a.up) {
          const T* up = static_cast<const T*>(a.up) + row * a.row_stride;
          for (int64_t c = 0; c < columns; ++c) y[c] *= static_cast<float>(up[c]);
        }
        finish_row(a.codes, row, y.data());
      }
    });
  });
}

}  // namespace vernier::cpu
