#include <vernier/kernels/math_functions.h>
#include <vernier/kernels/norm_quantize_device.h>
#include <vernier/kernels/row_codes_cpu.h>

#include <array>

namespace vernier::cpu {
namespace {

/// The sum of f(element) in the contract's order; `add(sum, element)` gives the sum with it.
template <typename Add>
inline float sum_in_lanes(const float* values, int64_t n, const Add& add) {
  constexpr int kWarp = 32;
  const int lanes = norm_lanes(n);
  std::array<float, kMostNormLanes* kNormWays> sums = {};
  for (int64_t begin = 0; begin < n; begin += kNormChunk) {
    float* const lane = &sums[begin / kNormChunk % lanes * kNormWays];
    const int64_t end = std::min(n, begin + kNormChunk);
    for (int64_t c = begin; c < end; ++c) lane[c % kNormWays] = add(lane[c % kNormWays], values[c]);
  }
  std::array<float, kMostNormLanes> lane;
  for (int i = 0; i < lanes; ++i) {
    const float* ways = &sums[i * kNormWays];
    lane[i] = (ways[0] + ways[2]) + (ways[1] + ways[3]);
  }
  for (int half = kWarp / 2; half > 0; half /= 2)
    for (int first = 0; first < lanes; first += kWarp)
      for (int i = first; i < first + half; ++i) lane[i] += lane[i + half];
  for (int half = lanes / 2; half >= kWarp; half /= 2)
    for (int i = 0; i < half; i += kWarp) lane[i] += lane[i + half];
  return lane[0];
}

/// Normalizes a row in place. `weight` and `bias` may be null; `bias` is unless `centered`.
VERNIER_SIMD void normalize(float* x, int64_t n, bool centered, float inverse_n, float epsilon,
                            const float* weight, const float* bias) {
  if (centered) {
    const float mean =
        sum_in_lanes(x, n, [](float sum, float value) { return sum + value; }) * inverse_n;
    for (int64_t c = 0; c < n; ++c) x[c] -= mean;
  }
  const float mean_square =
      sum_in_lanes(x, n, [](float sum, float d) { return math::fused_multiply_add(d, d, sum); }) *
      inverse_n;
  const float factor = 1.0f / std::sqrt(mean_square + epsilon);
  if (!centered) {
    for (int64_t c = 0; c < n; ++c) x[c] = (weight ? x[c] * weight[c] : x[c]) * factor;
    return;
  }
  for (int64_t c = 0; c < n; ++c) {
    float y = x[c] * factor;
    if (weight && bias) {
      y = math::fused_multiply_add(y, weight[c], bias[c]);
    } else if (weight) {
      y *= weight[c];
    } else if (bias) {
      y += bias[c];
    }
    x[c] = y;
  }
}

/// A vector as floats; empty for null.
std::vector<float> floats(const void* source, ElementType type, int64_t n) {
  std::vector<float> out;
  if (!source) return out;
  out.resize(n);
  with_element_type(type, [&]<typename T>(T*) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(static_cast<const T*>(source)[i]);
  });
  return out;
}

}  // namespace

void norm_quantize(const NormQuantizeArguments& a) {
  const int64_t columns = a.codes.columns;
  const std::vector<float> weight = floats(a.weight, a.weight_type, columns);
  const std::vector<float> bias = floats(a.bias, a.weight_type, columns);
  with_element_type(a.codes.type, [&]<typename T>(T*) {
    parallel_for(a.codes.rows, row_grain(a.codes), [&](int64_t begin, int64_t end) {
      std::vector<float> x(columns);
      for (int64_t row = begin; row < end; ++row) {
        const T* input = static_cast<const T*>(a.input) + row * columns;
        for (int64_t c = 0; c < columns; ++c) x[c] = static_cast<float>(input[c]);
        if (a.residual) {
          const T* residual = static_cast<const T*>(a.residual) + row * columns;
          T* sum = static_cast<T*>(a.sum) + row * columns;
          for (int64_t c = 0; c < columns; ++c) {
            sum[c] = static_cast<T>(x[c] + static_cast<float>(residual[c]));
            x[c] = static_cast<float>(sum[c]);
          }
        }
        normalize(x.data(), columns, a.centered, a.inverse_columns(), a.epsilon,
                  weight.empty() ? nullptr : weight.data(), bias.empty() ? nullptr : bias.data());
        finish_row(a.codes, row, x.data());
      }
    });
  });
}

}  // namespace vernier::cpu
