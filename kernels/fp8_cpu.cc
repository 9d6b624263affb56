#include <vernier/kernels/element_cpu.h>
#include <vernier/kernels/fp8_device.h>
#include <vernier/kernels/fp8_format.h>
#include <vernier/kernels/parallel.h>

namespace vernier::cpu {
namespace {

constexpr int64_t kGrain = 16 * kBlock;

// Calls f(first element, count, scale) for runs of at most kBlock elements that share a scale.
template <typename F>
void for_each_run(const Fp8Arguments& a, const F& f) {
  parallel_for(a.numel, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t until = a.map.count == 1 ? end : (i / a.map.inner + 1) * a.map.inner;
      const int64_t n = std::min({kBlock, end - i, until - i});
      f(i, n, a.scale[a.map.index(i)]);
      i += n;
    }
  });
}

// Calls f with the format's constant and a null pointer of the element type.
template <typename F>
void with_types(const Fp8Arguments& a, const F& f) {
  with_fp8_format(a.format, [&](auto format) {
    with_element_type(a.type, [&](auto* type) { f(format, type); });
  });
}

}  // namespace

void quantize_fp8(const Fp8Arguments& a, uint8_t* codes) {
  with_types(a, [&]<typename T>(auto format, T*) {
    const T* input = static_cast<const T*>(a.input);
    for_each_run(a, [&](int64_t first, int64_t n, float scale) {
      for (int64_t i = first; i < first + n; ++i)
        codes[i] = fp8_code<format.value>(static_cast<float>(input[i]), scale);
    });
  });
}

void dequantize_fp8(const Fp8Arguments& a, void* output) {
  with_types(a, [&]<typename T>(auto format, T*) {
    const uint8_t* codes = static_cast<const uint8_t*>(a.input);
    T* out = static_cast<T*>(output);
    for_each_run(a, [&](int64_t first, int64_t n, float scale) {
      for (int64_t i = first; i < first + n; ++i)
        out[i] = static_cast<T>(fp8_value<format.value>(codes[i], scale));
    });
  });
}

void fake_quantize_fp8(const Fp8Arguments& a, void* output) {
  with_types(a, [&]<typename T>(auto format, T*) {
    const T* input = static_cast<const T*>(a.input);
    T* out = static_cast<T*>(output);
    for_each_run(a, [&](int64_t first, int64_t n, float scale) {
      for (int64_t i = first; i < first + n; ++i) {
        const uint8_t code = fp8_code<format.value>(static_cast<float>(input[i]), scale);
        out[i] = static_cast<T>(fp8_value<format.value>(code, scale));
      }
    });
  });
}

void fake_quantize_fp8_backward(const Fp8Arguments& a, const void* gradient, void* output) {
  with_types(a, [&]<typename T>(auto format, T*) {
    const T* input = static_cast<const T*>(a.input);
    const T* grad = static_cast<const T*>(gradient);
    T* out = static_cast<T*>(output);
    for_each_run(a, [&](int64_t first, int64_t n, float scale) {
      for (int64_t i = first; i < first + n; ++i) {
        const float quotient = divided(static_cast<float>(input[i]), scale);
        out[i] = Fp8<format.value>::passes_gradient(quotient) ? grad[i] : static_cast<T>(0.0f);
      }
    });
  });
}

void fp8_epilogue(const Fp8EpilogueArguments& a) {
  with_element_type(a.output_type, [&]<typename T>(T*) {
    T* output = static_cast<T*>(a.output);
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(a.columns, 1));
    parallel_for(a.rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t column = 0; column < a.columns; ++column) {
          float value = a.products[row * a.stride + column];
          if (a.weight_scale) value *= a.weight_scale[a.weight_scale_per_column ? column : 0];
          if (a.input_scale) value *= a.input_scale[a.input_scale_per_row ? row : 0];
          if (a.bias) value += a.bias[column];
          output[row * a.columns + column] = static_cast<T>(value);
        }
      }
    });
  });
}

}  // namespace vernier::cpu
