#include <vernier/kernels/masked_quantize_device.h>
#include <vernier/kernels/quantize_cpu.h>

namespace vernier::cpu {
namespace {

// 1 where the code was clipped.
VERNIER_SIMD void clipped_run(const float* x, int64_t n, const RunScales& s, uint8_t* clipped) {
  if (s.step == 0) {
    const float scale = *s.scale;
    const int32_t zero_point = s.zero_point_at(0);
    const int32_t qmin = s.qmin, qmax = s.qmax;
    for (int64_t i = 0; i < n; ++i)
      clipped[i] = !passes_gradient(x[i], scale, zero_point, qmin, qmax);
  } else {
    for (int64_t i = 0; i < n; ++i)
      clipped[i] = !passes_gradient(x[i], s.scale[i], s.zero_point_at(i), s.qmin, s.qmax);
  }
}

VERNIER_SIMD void pack_bits(const uint8_t* flags, int64_t bytes, uint8_t* out) {
  for (int64_t byte = 0; byte < bytes; ++byte) {
    int bits = 0;
    for (int j = 0; j < 8; ++j) bits |= flags[8 * byte + j] << j;
    out[byte] = static_cast<uint8_t>(bits);
  }
}

template <typename T, typename O>
void run(const QuantizeArguments& a, O* out, uint8_t* clipped) {
  const T* const input = static_cast<const T*>(a.input);
  // Threads share out whole bytes of the mask.
  parallel_for((a.numel + 7) / 8, kQuantizeGrain / 8, [&](int64_t first, int64_t last) {
    FloatBlock in_block, out_block;
    std::array<uint8_t, kBlock> flags;
    for (int64_t byte = first; byte < last; byte += kBlock / 8) {
      const int64_t start = byte * 8, end = std::min({start + kBlock, last * 8, a.numel});
      for_each_run(a, start, end, [&](int64_t i, int64_t n, const RunScales& scales) {
        const float* const x = load_block(input + i, n, in_block);
        if constexpr (std::is_same_v<O, int8_t>) {
          quantize_run(x, n, scales, out + i);
        } else {
          fake_quantize_run(x, n, scales, output_block(out + i, out_block));
          store_block(out_block, n, out + i);
        }
        if (clipped) clipped_run(x, n, scales, flags.data() + (i - start));
      });
      if (!clipped) continue;
      const int64_t bytes = (end - start + 7) / 8;
      std::fill(flags.begin() + (end - start), flags.begin() + bytes * 8, uint8_t{0});
      pack_bits(flags.data(), bytes, clipped + byte);
    }
  });
}

}  // namespace

void quantize_masked(const MaskedJob& job) {
  const MaskedOutput& output = job.output;
  with_element_type(job.arguments.input_type, [&]<typename T>(T*) {
    if (!output.type)
      return run<T>(job.arguments, static_cast<int8_t*>(output.values), output.clipped);
    with_element_type(*output.type, [&]<typename O>(O*) {
      run<T>(job.arguments, static_cast<O*>(output.values), output.clipped);
    });
  });
}

void zero_clipped(const ClippedGradient& job) {
  with_element_type(job.type, [&]<typename T>(T*) {
    T* const g = static_cast<T*>(job.gradient);
    parallel_for((job.numel + 7) / 8, kQuantizeGrain / 8, [&](int64_t first, int64_t last) {
      for (int64_t byte = first; byte < last; ++byte) {
        if (job.clipped[byte] == 0) continue;
        for (int64_t i = byte * 8; i < std::min(byte * 8 + 8, job.numel); ++i)
          if (job.clipped[byte] >> (i % 8) & 1) g[i] = T(0.0f);
      }
    });
  });
}

}  // namespace vernier::cpu
