#include <vernier/kernels/element_cpu.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/int8_gemm_device.h>
#include <vernier/kernels/parallel.h>

namespace vernier::cpu {
namespace {

// Four rows of the weight against one of the codes: enough reuse to keep the loads from dominating.
VERNIER_SIMD void dot4(const int8_t* a, const int8_t* b0, const int8_t* b1, const int8_t* b2,
                       const int8_t* b3, int64_t k, int32_t* out) {
  int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  for (int64_t i = 0; i < k; ++i) {
    // Sixteen-bit products of eight-bit factors are exact, and compilers turn their sum into
    // pmaddwd.
    const auto x = static_cast<int16_t>(a[i]);
    s0 += x * static_cast<int16_t>(b0[i]);
    s1 += x * static_cast<int16_t>(b1[i]);
    s2 += x * static_cast<int16_t>(b2[i]);
    s3 += x * static_cast<int16_t>(b3[i]);
  }
  out[0] = s0;
  out[1] = s1;
  out[2] = s2;
  out[3] = s3;
}

VERNIER_SIMD void epilogue_run(const int32_t* acc, int64_t n, float input_scale,
                               const float* weight_scale, const float* bias, float* out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = epilogue_value(acc[i], input_scale, weight_scale[i], bias[i]);
}

}  // namespace

void int8_matmul(const int8_t* codes, const int8_t* weight, int64_t m, int64_t n, int64_t k,
                 int32_t* accumulators) {
  // Rows of the weight outermost: four of them stay in the first-level cache while the codes stream
  // past.
  const int64_t quads = (n + 3) / 4;
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 18) / std::max<int64_t>(1, m * k));
  parallel_for(quads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t quad = begin; quad < end; ++quad) {
      const int64_t column = quad * 4, width = std::min<int64_t>(4, n - column);
      const int8_t* b = weight + column * k;
      const auto row_of = [&](int64_t j) { return b + std::min(j, width - 1) * k; };
      for (int64_t row = 0; row < m; ++row) {
        int32_t sums[4];
        dot4(codes + row * k, b, row_of(1), row_of(2), row_of(3), k, sums);
        std::copy_n(sums, width, accumulators + row * n + column);
      }
    }
  });
}

namespace {

// Calls f with a null pointer of the C++ type of an output of the epilogue.
template <typename F>
void with_output_type(GemmOutput type, const F& f) {
  switch (type) {
    case GemmOutput::i8:
      return f(static_cast<int8_t*>(nullptr));
    case GemmOutput::f32:
      return with_element_type(ElementType::f32, f);
    case GemmOutput::f16:
      return with_element_type(ElementType::f16, f);
    case GemmOutput::bf16:
      return with_element_type(ElementType::bf16, f);
    case GemmOutput::i32:
      break;
  }
  throw Error("int8_epilogue: int32 is no output of it");
}

void requantize_run(const float* values, int64_t n, const EpilogueArguments& a, int8_t* codes) {
  const int32_t zero_point = a.output_zero_point ? *a.output_zero_point : 0;
  for (int64_t i = 0; i < n; ++i)
    codes[i] =
        static_cast<int8_t>(quantize_value(values[i], *a.output_scale, zero_point, a.qmin, a.qmax));
}

}  // namespace

void int8_epilogue(const int32_t* accumulators, const EpilogueArguments& a) {
  with_output_type(a.output_type, [&]<typename T>(T*) {
    T* output = static_cast<T*>(a.output);
    const int64_t grain = std::max<int64_t>(1, 16 * kBlock / std::max<int64_t>(a.columns, 1));
    parallel_for(a.rows, grain, [&](int64_t begin, int64_t end) {
      FloatBlock block, scales, biases;
      std::array<int32_t, kBlock> corrected;
      for (int64_t c = 0; c < a.columns; c += kBlock) {
        const int64_t n = std::min(kBlock, a.columns - c);
        // Absent or shared operands become whole blocks once, so that the inner loop has one form.
        const float* weight_scale = a.weight_scale + c;
        if (!a.weight_scale_per_column)
          weight_scale = std::fill_n(scales.data(), n, *a.weight_scale) - n;
        const float* bias = a.bias ? a.bias + c : std::fill_n(biases.data(), n, 0.0f) - n;
        for (int64_t row = begin; row < end; ++row) {
          const int32_t* acc = accumulators + row * a.columns + c;
          if (a.input_zero_point) {
            for (int64_t i = 0; i < n; ++i)
              corrected[i] = acc[i] - *a.input_zero_point * a.weight_sum[c + i];
            acc = corrected.data();
          }
          T* out = output + row * a.columns + c;
          float* values = block.data();
          if constexpr (!std::is_same_v<T, int8_t>) values = output_block(out, block);
          epilogue_run(acc, n, a.input_scale[a.input_scale_per_row ? row : 0], weight_scale, bias,
                       values);
          if (a.activation != Activation::none)
            for (int64_t i = 0; i < n; ++i) values[i] = activate(a.activation, values[i]);
          if constexpr (std::is_same_v<T, int8_t>) {
            requantize_run(values, n, a, out);
          } else {
            store_block(block, n, out);
          }
        }
      }
    });
  });
}

}  // namespace vernier::cpu
