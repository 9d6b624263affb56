#include <vernier/kernels/quantize_device.h>
#include <vernier/kernels/quantize_launch.h>

namespace vernier::cuda {
namespace {

template <typename T>
struct Dequantize {
  using Input = int8_t;
  using Output = T;
  static constexpr bool kUsesGradient = false;
  static constexpr const char* kName = "dequantize";

  template <int V, typename Grids>
  __device__ Pack<T, V> operator()(const Pack<int8_t, V>& packed, const Pack<int8_t, V>&,
                                   const Grids& grids) const {
    const Vector<int8_t, V> codes = unpack(packed);
    Vector<float, V> y;
#pragma unroll
    for (int j = 0; j < V; ++j)
      y[j] = dequantize_value(codes[j], grids[j].division.scale(), grids[j].zero_point);
    return from_floats<T>(y);
  }

  __device__ T element(int8_t code, int8_t, float scale, int32_t zero, int32_t, int32_t) const {
    return from_float<T>(dequantize_value(code, scale, zero));
  }
};

}  // namespace

void quantize(const QuantizeArguments& a, int8_t* codes, void* stream) {
  with_element_type(a.input_type, [&]<typename T>(T*) {
    run_elementwise<Quantize<T>>(a, nullptr, codes, stream);
  });
}

void dequantize(const QuantizeArguments& a, void* output, void* stream) {
  with_element_type(a.input_type, [&]<typename T>(T*) {
    run_elementwise<Dequantize<T>>(a, nullptr, output, stream);
  });
}

void per_token_scale(const void* input, ElementType type, int64_t rows, int64_t columns,
                     int32_t qmax, float* scale, void* stream) {
  with_element_type(type, [&]<typename T>(T*) {
    run_rows<ScaleOnly<T>>("per_token_scale", input, type, rows, columns, 0, qmax, nullptr, scale,
                           stream);
  });
}

void quantize_per_token(const void* input, ElementType type, int64_t rows, int64_t columns,
                        int32_t qmin, int32_t qmax, int8_t* codes, float* scale, void* stream) {
  with_element_type(type, [&]<typename T>(T*) {
    run_rows<Quantize<T>>("quantize_per_token", input, type, rows, columns, qmin, qmax, codes,
                          scale, stream);
  });
}

}  // namespace vernier::cuda
