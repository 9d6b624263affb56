#include <vernier/kernels/convolution_device.h>
#include <vernier/kernels/packed.h>

#include <algorithm>
#include <initializer_list>

namespace vernier::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 8;

/// An output position: image and place on each axis.
struct Position {
  int64_t image;
  int32_t z, y, x;
};

/// From the number of an output position to its place.
class Positions {
 public:
  explicit Positions(const ConvolutionShape& s)
      : outputs_(s.outputs()), y_(s.axes[1].output), x_(s.axes[2].output) {}

  __device__ Position operator()(int64_t row) const {
    Position p;
    p.image = outputs_.divide(row);
    const auto rest = static_cast<uint32_t>(row - p.image * outputs_.divisor());
    const uint32_t line = x_.divide(rest);
    p.x = static_cast<int32_t>(x_.remainder(rest));
    p.y = static_cast<int32_t>(y_.remainder(line));
    p.z = static_cast<int32_t>(y_.divide(line));
    return p;
  }

 private:
  Divider outputs_;
  Divider32 y_, x_;
};

/// The channels of the element at input place z, y, x.
__device__ const int8_t* element_at(const int8_t* codes, const ConvolutionShape& s, int64_t image,
                                    int32_t z, int32_t y, int32_t x) {
  const int64_t line = (image * s.axes[0].input + z) * s.axes[1].input + y;
  return codes + (line * s.axes[2].input + x) * s.channels;
}

struct Im2colMap {
  Divider width;       // vectors of a row of patches
  Divider32 channels;  // vectors of an element's channels
  Divider32 kernel_y, kernel_x;
};

// A thread moves V channels of an element at a time.
template <int V>
__global__ void __launch_bounds__(kThreads)
    im2col_kernel(const int8_t* __restrict__ codes, const ConvolutionShape shape,
                  const Positions positions, const Im2colMap map,
                  const int32_t* __restrict__ zero_point, int64_t first, int64_t vectors,
                  int8_t* __restrict__ patches) {
  using Codes = Pack<int8_t, V>;
  const auto zero = static_cast<uint8_t>(zero_point ? *zero_point : 0);
  Codes padding;
#pragma unroll
  for (int i = 0; i < Codes::kWords; ++i)
    padding.words[i] = static_cast<typename Codes::Word>(zero * 0x01010101u);
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t v = blockIdx.x * int64_t{kThreads} + threadIdx.x; v < vectors; v += step) {
    const int64_t row = map.width.divide(v);
    const auto column = static_cast<uint32_t>(v - row * map.width.divisor());
    const uint32_t tap = map.channels.divide(column);
    const uint32_t tap_line = map.kernel_x.divide(tap);
    const Position p = positions(first + row);
    const bool transposed = shape.transposed;
    const int32_t z = shape.axes[0].source(p.z, map.kernel_y.divide(tap_line), transposed);
    const int32_t y = shape.axes[1].source(p.y, map.kernel_y.remainder(tap_line), transposed);
    const int32_t x = shape.axes[2].source(p.x, map.kernel_x.remainder(tap), transposed);
    const bool inside = (z | y | x) >= 0;
    const int64_t channel = int64_t{map.channels.remainder(column)} * V;
    store_pack(
        patches + v * V,
        inside ? load_pack<V>(element_at(codes, shape, p.image, z, y, x) + channel) : padding);
  }
}

// A thread has an output element; its neighbours have the next channels of its position. V channels
// of a group at a time: 4, whose products one instruction adds, or 1.
template <int V>
__global__ void __launch_bounds__(kThreads)
    direct_kernel(const int8_t* __restrict__ codes, const int8_t* __restrict__ weight,
                  const ConvolutionShape shape, const Positions positions,
                  const Divider out_channels, const Divider32 group_outputs, int32_t depth,
                  const int32_t* __restrict__ zero_point, int64_t first, int64_t elements,
                  int32_t* __restrict__ accumulators) {
  const int32_t zero = zero_point ? *zero_point : 0;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t e = blockIdx.x * int64_t{kThreads} + threadIdx.x; e < elements; e += step) {
    const int64_t row = out_channels.divide(e);
    const auto channel = static_cast<uint32_t>(e - row * out_channels.divisor());
    const int64_t group_offset = int64_t{group_outputs.divide(channel)} * depth;
    const int8_t* w = weight + channel * (shape.taps() * depth);
    const Position p = positions(first + row);
    int32_t sum = 0;
    for (int32_t kz = 0; kz < shape.axes[0].kernel; ++kz) {
      const int32_t z = shape.axes[0].source(p.z, kz, shape.transposed);
      for (int32_t ky = 0; ky < shape.axes[1].kernel; ++ky) {
        const int32_t y = shape.axes[1].source(p.y, ky, shape.transposed);
        for (int32_t kx = 0; kx < shape.axes[2].kernel; ++kx, w += depth) {
          const int32_t x = shape.axes[2].source(p.x, kx, shape.transposed);
          if ((z | y | x) < 0) continue;
          const int8_t* source = element_at(codes, shape, p.image, z, y, x) + group_offset;
          for (int32_t c = 0; c < depth; c += V) {
            if constexpr (V == 4) {
              const int a = *reinterpret_cast<const int*>(source + c);
              const int b = *reinterpret_cast<const int*>(w + c);
              sum = __dp4a(a, b, sum) - zero * __dp4a(b, 0x01010101, 0);
            } else {
              sum += (source[c] - zero) * w[c];
            }
          }
        }
      }
    }
    accumulators[e] = sum;
  }
}

// The most elements, 16, 4 or 1, that divide `size` and that all pointers are aligned to.
int vector_length(int64_t size, std::initializer_list<const void*> pointers) {
  for (const int length : {16, 4}) {
    const bool aligned = std::all_of(pointers.begin(), pointers.end(),
                                     [&](const void* p) { return is_aligned(p, length); });
    if (size % length == 0 && aligned) return length;
  }
  return 1;
}

unsigned grid_of(int64_t threads) {
  return grid_size(divide_up(threads, kThreads), kBlocksPerMultiprocessor);
}

template <int V>
void launch_im2col(const int8_t* codes, const ConvolutionShape& s, const int32_t* zero_point,
                   int64_t first, int64_t count, int8_t* patches, void* stream) {
  const int64_t width = s.taps() * s.channels / V;
  const Im2colMap map = {Divider(width), Divider32(s.channels / V), Divider32(s.axes[1].kernel),
                         Divider32(s.axes[2].kernel)};
  launch("im2col", im2col_kernel<V>, grid_of(count * width), kThreads, stream, codes, s,
         Positions(s), map, zero_point, first, count * width, patches);
}

template <int V>
void launch_direct(const int8_t* codes, const int8_t* weight, const ConvolutionShape& s,
                   const int32_t* zero_point, int64_t first, int64_t count, int32_t* accumulators,
                   void* stream) {
  const int64_t elements = count * s.out_channels;
  launch("direct_convolution", direct_kernel<V>, grid_of(elements), kThreads, stream, codes, weight,
         s, Positions(s), Divider(s.out_channels), Divider32(s.out_channels / s.groups),
         static_cast<int32_t>(s.group_channels()), zero_point, first, elements, accumulators);
}

}  // namespace

void im2col(const int8_t* codes, const ConvolutionShape& s, const int32_t* zero_point,
            int64_t first, int64_t count, int8_t* patches, void* stream) {
  if (count == 0) return;
  switch (vector_length(s.channels, {codes, patches})) {
    case 16:
      return launch_im2col<16>(codes, s, zero_point, first, count, patches, stream);
    case 4:
      return launch_im2col<4>(codes, s, zero_point, first, count, patches, stream);
    default:
      return launch_im2col<1>(codes, s, zero_point, first, count, patches, stream);
  }
}

void direct_convolution(const int8_t* codes, const int8_t* weight, const ConvolutionShape& s,
                        const int32_t* zero_point, int64_t first, int64_t count,
                        int32_t* accumulators, void* stream) {
  if (count == 0) return;
  if (vector_length(s.group_channels(), {codes, weight}) >= 4) {
    launch_direct<4>(codes, weight, s, zero_point, first, count, accumulators, stream);
  } else {
    launch_direct<1>(codes, weight, s, zero_point, first, count, accumulators, stream);
  }
}

}  // namespace vernier::cuda
