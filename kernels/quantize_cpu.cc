#include <vernier/kernels/quantize_cpu.h>
#include <vernier/kernels/quantize_device.h>

namespace vernier::cpu {

VERNIER_SIMD void quantize_run(const float* x, int64_t n, const RunScales& s, int8_t* codes) {
  if (s.step == 0) {
    const float scale = *s.scale;
    const int32_t zero_point = s.zero_point_at(0);
    const int32_t qmin = s.qmin, qmax = s.qmax;
    for (int64_t i = 0; i < n; ++i)
      codes[i] = static_cast<int8_t>(quantize_value(x[i], scale, zero_point, qmin, qmax));
  } else {
    for (int64_t i = 0; i < n; ++i)
      codes[i] =
          static_cast<int8_t>(quantize_value(x[i], s.scale[i], s.zero_point_at(i), s.qmin, s.qmax));
  }
}

namespace {

VERNIER_SIMD void dequantize_run(const int8_t* codes, int64_t n, const RunScales& s, float* out) {
  if (s.step == 0) {
    const float scale = *s.scale;
    const int32_t zero_point = s.zero_point_at(0);
    for (int64_t i = 0; i < n; ++i) out[i] = dequantize_value(codes[i], scale, zero_point);
  } else {
    for (int64_t i = 0; i < n; ++i)
      out[i] = dequantize_value(codes[i], s.scale[i], s.zero_point_at(i));
  }
}

VERNIER_SIMD float finite_amax(const float* x, int64_t n) {
  // Integer maxima of the bits order non-negative floats and, unlike float maxima, vectorize
  // without fast math.
  uint32_t best = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x[i], sizeof bits);
    bits &= 0x7fffffffu;
    bits = bits < 0x7f800000u ? bits : 0;  // NaN and infinities do not count
    best = bits > best ? bits : best;
  }
  float amax;
  __builtin_memcpy(&amax, &best, sizeof amax);
  return amax;
}

}  // namespace

void quantize(const QuantizeArguments& a, int8_t* codes) {
  with_element_type(a.input_type, [&]<typename T>(T*) {
    const T* input = static_cast<const T*>(a.input);
    parallel_for(a.numel, kQuantizeGrain, [&](int64_t begin, int64_t end) {
      FloatBlock block;
      for_each_run(a, begin, end, [&](int64_t i, int64_t n, const RunScales& scales) {
        quantize_run(load_block(input + i, n, block), n, scales, codes + i);
      });
    });
  });
}

void dequantize(const QuantizeArguments& a, void* output) {
  with_element_type(a.input_type, [&]<typename T>(T*) {
    const int8_t* codes = static_cast<const int8_t*>(a.input);
    T* out = static_cast<T*>(output);
    parallel_for(a.numel, kQuantizeGrain, [&](int64_t begin, int64_t end) {
      FloatBlock block;
      for_each_run(a, begin, end, [&](int64_t i, int64_t n, const RunScales& scales) {
        dequantize_run(codes + i, n, scales, output_block(out + i, block));
        store_block(block, n, out + i);
      });
    });
  });
}

namespace {

// Calls f(row, block-wise amax of the row) for rows in parallel.
template <typename T, typename F>
void for_each_row_amax(const T* input, int64_t rows, int64_t columns, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kQuantizeGrain / std::max<int64_t>(columns, 1));
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
    FloatBlock block;
    for (int64_t row = begin; row < end; ++row) {
      float amax = 0;
      for (int64_t c = 0; c < columns; c += kBlock) {
        const int64_t n = std::min(kBlock, columns - c);
        amax = std::max(amax, finite_amax(load_block(input + row * columns + c, n, block), n));
      }
      f(row, amax);
    }
  });
}

}  // namespace

void per_token_scale(const void* input, ElementType type, int64_t rows, int64_t columns,
                     int32_t qmax, float* scale) {
  with_element_type(type, [&]<typename T>(T*) {
    for_each_row_amax(static_cast<const T*>(input), rows, columns,
                      [&](int64_t row, float amax) { scale[row] = scale_from_amax(amax, qmax); });
  });
}

void quantize_per_token(const void* input, ElementType type, int64_t rows, int64_t columns,
                        int32_t qmin, int32_t qmax, int8_t* codes, float* scale) {
  with_element_type(type, [&]<typename T>(T*) {
    const T* x = static_cast<const T*>(input);
    for_each_row_amax(x, rows, columns, [&](int64_t row, float amax) {
      scale[row] = scale_from_amax(amax, qmax);
      const RunScales scales{scale + row, nullptr, 0, qmin, qmax};
      FloatBlock block;
      for (int64_t c = 0; c < columns; c += kBlock) {
        const int64_t n = std::min(kBlock, columns - c);
        const int64_t i = row * columns + c;
        quantize_run(load_block(x + i, n, block), n, scales, codes + i);
      }
    });
  });
}

}  // namespace vernier::cpu
