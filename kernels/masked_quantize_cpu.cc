#include <vernier/kernels/masked_quantize_device.h>
#include <vernier/kernels/quantize_cpu.h>

#include <cstring>

namespace vernier::cpu {
namespace {

VERNIER_SIMD void codes_run(const float* x, int64_t n, const RunScales& s, int8_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t j = i * s.step;
    out[i] =
        static_cast<int8_t>(quantize_value(x[i], s.scale[j], s.zero_point_at(j), s.qmin, s.qmax));
  }
}

VERNIER_SIMD void clipped_run(const float* x, int64_t n, const RunScales& s, uint8_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t j = i * s.step;
    out[i] = !passes_gradient(x[i], s.scale[j], s.zero_point_at(j), s.qmin, s.qmax);
  }
}

template <typename T, typename O>
void run(const QuantizeArguments& a, O* out, uint8_t* clipped) {
  const T* const input = static_cast<const T*>(a.input);
  // Threads share out whole bytes of the mask.
  parallel_for((a.numel + 7) / 8, kQuantizeGrain / 8, [&](int64_t first, int64_t last) {
    if (clipped) std::memset(clipped + first, 0, static_cast<size_t>(last - first));
    FloatBlock in_block;
    std::array<int8_t, kBlock> codes;
    std::array<uint8_t, kBlock> flags;
    const int64_t end = std::min(last * 8, a.numel);
    for_each_run(a, first * 8, end, [&](int64_t i, int64_t n, const RunScales& scales) {
      const float* const x = load_block(input + i, n, in_block);
      codes_run(x, n, scales, codes.data());
      for (int64_t k = 0; k < n; ++k) {
        if constexpr (std::is_same_v<O, int8_t>) {
          out[i + k] = codes[k];
        } else {
          const int64_t j = k * scales.step;
          out[i + k] =
              static_cast<O>(dequantize_value(codes[k], scales.scale[j], scales.zero_point_at(j)));
        }
      }
      if (!clipped) return;
      clipped_run(x, n, scales, flags.data());
      for (int64_t k = 0; k < n; ++k)
        clipped[(i + k) / 8] |= static_cast<uint8_t>(flags[k] << ((i + k) % 8));
    });
  });
}

}  // namespace

void quantize_masked(const QuantizeArguments& a, const MaskedOutput& output) {
  with_element_type(a.input_type, [&]<typename T>(T*) {
    if (!output.type) return run<T>(a, static_cast<int8_t*>(output.values), output.clipped);
    with_element_type(*output.type, [&]<typename O>(O*) {
      run<T>(a, static_cast<O*>(output.values), output.clipped);
    });
  });
}

void zero_clipped(const uint8_t* clipped, int64_t numel, ElementType type, void* gradient) {
  with_element_type(type, [&]<typename T>(T*) {
    T* const g = static_cast<T*>(gradient);
    parallel_for((numel + 7) / 8, kQuantizeGrain / 8, [&](int64_t first, int64_t last) {
      for (int64_t byte = first; byte < last; ++byte) {
        if (clipped[byte] == 0) continue;
        for (int64_t i = byte * 8; i < std::min(byte * 8 + 8, numel); ++i)
          if (clipped[byte] >> (i % 8) & 1) g[i] = T(0.0f);
      }
    });
  });
}

}  // namespace vernier::cpu
