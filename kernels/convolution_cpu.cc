#include <vernier/kernels/convolution_device.h>
#include <vernier/kernels/parallel.h>

#include <algorithm>

namespace vernier::cpu {
namespace {

// Calls f(tap, channels of the element that it reads, or null) for every tap of an output position.
template <typename F>
void for_each_tap(const int8_t* codes, const ConvolutionShape& s, int64_t row, const F& f) {
  const auto& [d, h, w] = s.axes;
  const int64_t x = row % w.output, y = row / w.output % h.output;
  const int64_t z = row / w.output / h.output % d.output, image = row / s.outputs();
  int64_t tap = 0;
  for (int32_t kz = 0; kz < d.kernel; ++kz) {
    const int64_t iz = d.source(static_cast<int32_t>(z), kz, s.transposed);
    for (int32_t ky = 0; ky < h.kernel; ++ky) {
      const int64_t iy = h.source(static_cast<int32_t>(y), ky, s.transposed);
      for (int32_t kx = 0; kx < w.kernel; ++kx) {
        const int64_t ix = w.source(static_cast<int32_t>(x), kx, s.transposed);
        const int64_t element = ((image * d.input + iz) * h.input + iy) * w.input + ix;
        f(tap++, iz < 0 || iy < 0 || ix < 0 ? nullptr : codes + element * s.channels);
      }
    }
  }
}

int64_t grain_of(int64_t work_per_row) {
  return std::max<int64_t>(1, (int64_t{1} << 16) / std::max<int64_t>(1, work_per_row));
}

}  // namespace

void im2col(const int8_t* codes, const ConvolutionShape& shape, const int32_t* zero_point,
            int64_t first, int64_t count, int8_t* patches) {
  const int64_t width = shape.taps() * shape.channels;
  const auto padding = static_cast<int8_t>(zero_point ? *zero_point : 0);
  parallel_for(count, grain_of(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for_each_tap(codes, shape, first + row, [&](int64_t tap, const int8_t* source) {
        int8_t* target = patches + row * width + tap * shape.channels;
        if (source) {
          std::copy_n(source, shape.channels, target);
        } else {
          std::fill_n(target, shape.channels, padding);
        }
      });
    }
  });
}

void direct_convolution(const int8_t* codes, const int8_t* weight, const ConvolutionShape& shape,
                        const int32_t* zero_point, int64_t first, int64_t count,
                        int32_t* accumulators) {
  const int64_t depth = shape.group_channels(), taps = shape.taps();
  const int64_t outputs = shape.out_channels / shape.groups;
  const int32_t zero = zero_point ? *zero_point : 0;
  parallel_for(count, grain_of(shape.out_channels * shape.depth()),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) {
                   int32_t* sums = accumulators + row * shape.out_channels;
                   std::fill_n(sums, shape.out_channels, 0);
                   for_each_tap(codes, shape, first + row, [&](int64_t tap, const int8_t* source) {
                     if (!source) return;
                     for (int64_t o = 0; o < shape.out_channels; ++o) {
                       const int8_t* x = source + o / outputs * depth;
                       const int8_t* w = weight + (o * taps + tap) * depth;
                       for (int64_t c = 0; c < depth; ++c) sums[o] += (x[c] - zero) * w[c];
                     }
                   });
                 }
               });
}

}  // namespace vernier::cpu
