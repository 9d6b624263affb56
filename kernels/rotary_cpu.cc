#include <vernier/kernels/element_cpu.h>
#include <vernier/kernels/parallel.h>
#include <vernier/kernels/rotary_device.h>

namespace vernier::cpu {

void rotary_embedding(const RotaryArguments& a) {
  with_element_type(a.type, [&]<typename T>(T*) {
    const int64_t grain =
        std::max<int64_t>(1, 16 * kBlock / std::max<int64_t>(a.heads * a.size, 1));
    parallel_for(a.tokens, grain, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const float* cosine = a.cosine + token % a.table_rows * a.half;
        const float* sine = a.sine + token % a.table_rows * a.half;
        for (int64_t head = 0; head < a.heads; ++head) {
          const T* x =
              static_cast<const T*>(a.input) + token * a.token_stride + head * a.head_stride;
          T* y = static_cast<T*>(a.output) + (token * a.heads + head) * a.size;
          for (int64_t i = 0; i < a.half; ++i) {
            const float first = static_cast<float>(x[i]),
                        second = static_cast<float>(x[i + a.half]);
            y[i] = static_cast<T>(first * cosine[i] - second * sine[i]);
            y[i + a.half] = static_cast<T>(second * cosine[i] + first * sine[i]);
          }
          for (int64_t i = 2 * a.half; i < a.size; ++i) y[i] = x[i];
        }
      }
    });
  });
}

}  // namespace vernier::cpu
