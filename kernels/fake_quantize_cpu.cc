#include <vernier/kernels/fake_quantize_device.h>
#include <vernier/kernels/quantize_cpu.h>
#include <vernier/kernels/quantize_device.h>

#include <vector>

namespace vernier::cpu {

VERNIER_SIMD void fake_quantize_run(const float* x, int64_t n, const RunScales& s, float* out) {
  if (s.step == 0) {
    const float scale = *s.scale;
    const int32_t zero_point = s.zero_point_at(0);
    const int32_t qmin = s.qmin, qmax = s.qmax;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t code = quantize_value(x[i], scale, zero_point, qmin, qmax);
      out[i] = dequantize_value(code, scale, zero_point);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const int32_t zero_point = s.zero_point_at(i);
      const int32_t code = quantize_value(x[i], s.scale[i], zero_point, s.qmin, s.qmax);
      out[i] = dequantize_value(code, s.scale[i], zero_point);
    }
  }
}

namespace {

VERNIER_SIMD void backward_run(const float* x, const float* gradient, int64_t n, const RunScales& s,
                               float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t j = i * s.step;
    out[i] =
        passes_gradient(x[i], s.scale[j], s.zero_point_at(j), s.qmin, s.qmax) ? gradient[i] : 0.0f;
  }
}

}  // namespace

void fake_quantize(const QuantizeArguments& a, void* output) {
  with_element_type(a.input_type, [&]<typename T>(T*) {
    const T* input = static_cast<const T*>(a.input);
    T* out = static_cast<T*>(output);
    parallel_for(a.numel, kQuantizeGrain, [&](int64_t begin, int64_t end) {
      FloatBlock in_block, out_block;
      for_each_run(a, begin, end, [&](int64_t i, int64_t n, const RunScales& scales) {
        fake_quantize_run(load_block(input + i, n, in_block), n, scales,
                          output_block(out + i, out_block));
        store_block(out_block, n, out + i);
      });
    });
  });
}

void fake_quantize_backward(const QuantizeArguments& a, const void* gradient, void* output) {
  with_element_type(a.input_type, [&]<typename T>(T*) {
    const T* input = static_cast<const T*>(a.input);
    const T* grad = static_cast<const T*>(gradient);
    T* out = static_cast<T*>(output);
    parallel_for(a.numel, kQuantizeGrain, [&](int64_t begin, int64_t end) {
      FloatBlock in_block, gradient_block, out_block;
      for_each_run(a, begin, end, [&](int64_t i, int64_t n, const RunScales& scales) {
        backward_run(load_block(input + i, n, in_block), load_block(grad + i, n, gradient_block), n,
                     scales, output_block(out + i, out_block));
        store_block(out_block, n, out + i);
      });
    });
  });
}

namespace {

// Scales whose elements lie apart, [outer, count, inner]: threads share out the scales.
template <typename T>
void strided_scales(const QuantizeArguments& a, const T* input, float* scale) {
  const int64_t count = a.map.count, inner = a.map.inner, outer = a.numel / (count * inner);
  const int64_t grain = std::max<int64_t>(1, kQuantizeGrain / (outer * inner));
  parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    std::fill(scale + begin, scale + end, 0.0f);
    for (int64_t o = 0; o < outer; ++o) {
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t i = 0; i < inner; ++i) {
          const float magnitude = std::fabs(static_cast<float>(input[(o * count + c) * inner + i]));
          if (std::isfinite(magnitude)) scale[c] = std::max(scale[c], magnitude);
        }
      }
    }
    for (int64_t c = begin; c < end; ++c) scale[c] = scale_from_amax(scale[c], a.qmax);
  });
}

}  // namespace

void fake_quantize_dynamic(const QuantizeArguments& a, void* output, float* scale) {
  if (a.map.count <= 0) return;
  if (a.numel == a.map.inner * a.map.count || a.numel == 0) {
    per_token_scale(a.input, a.input_type, a.map.count, a.numel / a.map.count, a.qmax, scale);
  } else {
    with_element_type(a.input_type, [&]<typename T>(T*) {
      strided_scales(a, static_cast<const T*>(a.input), scale);
    });
  }
  QuantizeArguments with_scale = a;
  with_scale.scale = scale;
  fake_quantize(with_scale, output);
}

namespace {

// The terms of a learned scale's gradient, added up in double.
struct LearnedSums {
  double scale = 0;
  double clipped = 0;

  void add(float x, float gradient, float s, int32_t zero_point, int32_t qmin, int32_t qmax) {
    const bool passes = passes_gradient(x, s, zero_point, qmin, qmax);
    const auto code = static_cast<float>(quantize_value(x, s, zero_point, qmin, qmax) - zero_point);
    scale += static_cast<double>(gradient) * (passes ? code - x / s : code);
    if (!passes) clipped += gradient;
  }

  void add(const LearnedSums& other) {
    scale += other.scale;
    clipped += other.clipped;
  }
};

// Elements of a run that are added up at a time, where a scale has one run only.
constexpr int64_t kPiece = 64 * kBlock;

template <typename T>
void learned_sums(const QuantizeArguments& a, const T* input, const T* gradient,
                  const LearnedGradients& gradients) {
  const int64_t count = a.map.count, inner = a.map.inner;
  const int64_t outer = a.numel / (count * inner);
  const auto sum_of = [&](int64_t c, int64_t begin, int64_t end) {
    LearnedSums sums;
    const int32_t zero_point = a.zero_point ? a.zero_point[c] : 0;
    for (int64_t i = begin; i < end; ++i)
      sums.add(static_cast<float>(input[i]), static_cast<float>(gradient[i]), a.scale[c],
               zero_point, a.qmin, a.qmax);
    return sums;
  };
  // Threads share out pieces of runs, or scales where these have many runs; the order of additions
  // does not depend on their number.
  std::vector<LearnedSums> total(count);
  if (outer == 1) {
    const int64_t pieces = (inner + kPiece - 1) / kPiece;
    std::vector<LearnedSums> parts(count * pieces);
    parallel_for(count * pieces, std::max<int64_t>(1, kQuantizeGrain / std::min(inner, kPiece)),
                 [&](int64_t first, int64_t last) {
                   for (int64_t p = first; p < last; ++p) {
                     const int64_t c = p / pieces, begin = (p % pieces) * kPiece;
                     parts[p] =
                         sum_of(c, c * inner + begin, c * inner + std::min(begin + kPiece, inner));
                   }
                 });
    for (int64_t p = 0; p < count * pieces; ++p) total[p / pieces].add(parts[p]);
  } else {
    parallel_for(count, std::max<int64_t>(1, kQuantizeGrain / std::max<int64_t>(1, outer * inner)),
                 [&](int64_t first, int64_t last) {
                   for (int64_t o = 0; o < outer; ++o) {
                     for (int64_t c = first; c < last; ++c) {
                       const int64_t begin = (o * count + c) * inner;
                       total[c].add(sum_of(c, begin, begin + inner));
                     }
                   }
                 });
  }
  for (int64_t c = 0; c < count; ++c) {
    gradients.scale[c] = static_cast<float>(total[c].scale * gradients.gradient_scale);
    if (gradients.zero_point)
      gradients.zero_point[c] = static_cast<float>(-static_cast<double>(a.scale[c]) *
                                                   total[c].clipped * gradients.gradient_scale);
  }
}

}  // namespace

void fake_quantize_learned_backward(const QuantizeArguments& a, const void* gradient, void* output,
                                    const LearnedGradients& gradients) {
  if (a.map.count <= 0) return;
  // The sums first: the output may take the gradient's place.
  with_element_type(a.input_type, [&]<typename T>(T*) {
    learned_sums(a, static_cast<const T*>(a.input), static_cast<const T*>(gradient), gradients);
  });
  fake_quantize_backward(a, gradient, output);
}

}  // namespace vernier::cpu
