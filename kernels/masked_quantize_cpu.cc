#include <vernier/kernels/masked_quantize_device.h>
#include <vernier/kernels/quantize_cpu.h>

#include <cmath>

namespace vernier::cpu {
namespace {

// Real values (codes less the zero point, times the scale) or codes, as float, and 1 where the code
// was clipped. The clamp may come after the rounding: its bounds are integers.
VERNIER_SIMD void masked_run(const float* x, int64_t n, const RunScales& s, bool codes, float* out,
                             uint8_t* clipped) {
  const auto element = [&](int64_t i, float scale, int32_t zero_point) {
    const auto low = static_cast<float>(s.qmin - zero_point);
    const auto high = static_cast<float>(s.qmax - zero_point);
    const float rounded = std::nearbyintf(x[i] / scale);
    float code = rounded > low ? rounded : low;
    code = code < high ? code : high;
    clipped[i] = !(rounded >= low && rounded <= high);
    // Through an integer, in which zero has no sign.
    const auto integer = static_cast<float>(static_cast<int32_t>(code));
    out[i] = codes ? integer + static_cast<float>(zero_point) : integer * scale;
  };
  if (s.step == 0) {
    const float scale = *s.scale;
    const int32_t zero_point = s.zero_point_at(0);
    for (int64_t i = 0; i < n; ++i) element(i, scale, zero_point);
  } else {
    for (int64_t i = 0; i < n; ++i) element(i, s.scale[i], s.zero_point_at(i));
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
        masked_run(load_block(input + i, n, in_block), n, scales, std::is_same_v<O, int8_t>,
                   output_block(out + i, out_block), flags.data() + (i - start));
        store_block(out_block, n, out + i);
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
