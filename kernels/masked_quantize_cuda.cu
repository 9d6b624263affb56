#include <vernier/kernels/masked_quantize_device.h>
#include <vernier/kernels/quantize_launch.h>

namespace vernier::cuda {
namespace {

// Elements that a byte of the mask stands for, and a thread takes at a time.
constexpr int kByte = 8;

// What a vector becomes, codes or real values, and which of its elements were clipped.
template <typename T, typename O>
__device__ Pack<O, kByte> masked(const Pack<T, kByte>& x, const CodeGrid& grid, uint32_t& clipped) {
  const Vector<float, kByte> rounded = Rounded<kByte>(to_floats(x), grid).code;
  Vector<float, kByte> code;
  clipped = 0;
#pragma unroll
  for (int j = 0; j < kByte; ++j) {
    code[j] = fminf(fmaxf(rounded[j], grid.low), grid.high);  // NaN: low
    if (code[j] != rounded[j]) clipped |= 1u << j;
  }
  if constexpr (std::is_same_v<O, int8_t>) {
    return pack_codes(code, grid);
  } else {
#pragma unroll
    for (int j = 0; j < kByte; ++j) code[j] = __fmul_rn(code[j], grid.division.scale());
    return from_floats<O>(code);
  }
}

// The same one by one, for elements that do not make a vector or do not share a scale: those of one
// byte of the mask.
template <typename T, typename O>
__device__ void masked_byte(const T* input, O* output, uint8_t* clipped, int64_t byte,
                            int64_t numel, const DeviceMap& map) {
  uint32_t bits = 0;
  Place place(byte * kByte, map);
  const int count = static_cast<int>(min(numel - byte * kByte, int64_t{kByte}));
#pragma unroll 1
  for (int j = 0; j < count; ++j) {
    const int64_t i = byte * kByte + j;
    const float x = to_float(input[i]), scale = map.scale_at(place.index);
    const int32_t zero_point = map.zero_point_at(place.index);
    const int32_t code = quantize_value(x, scale, zero_point, map.qmin, map.qmax);
    if constexpr (std::is_same_v<O, int8_t>) {
      output[i] = static_cast<int8_t>(code);
    } else {
      output[i] = from_float<O>(dequantize_value(code, scale, zero_point));
    }
    if (!passes_gradient(x, scale, zero_point, map.qmin, map.qmax)) bits |= 1u << j;
    place.advance(map);
  }
  if (clipped) clipped[byte] = static_cast<uint8_t>(bits);
}

template <typename T, typename O>
__global__ void __launch_bounds__(kQuantizeThreads, 4)
    masked_tile_kernel(const T* input, O* output, uint8_t* clipped, int64_t numel, Tiles tiles,
                       DeviceMap map) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t t = int64_t{blockIdx.x} * kQuantizeWarps + threadIdx.x / kWarp; t < tiles.count;
       t += int64_t{gridDim.x} * kQuantizeWarps) {
    const Tile tile(t, tiles);
    Pack<T, kByte> x[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (lane + u * kWarp >= tile.vectors) break;
      x[u] = load_pack<kByte>(input + (tile.first + lane + u * kWarp) * kByte);
    }
    const CodeGrid grid = map.at(map.index_of_run(tile.run));
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (lane + u * kWarp >= tile.vectors) break;
      const int64_t v = tile.first + lane + u * kWarp;
      uint32_t bits;
      store_pack(output + v * kByte, masked<T, O>(x[u], grid, bits));
      if (clipped) clipped[v] = static_cast<uint8_t>(bits);
    }
  }
  // What is left behind the last whole vector, where all share one scale.
  if (blockIdx.x == 0 && threadIdx.x == 0 && numel % kByte != 0)
    masked_byte(input, output, clipped, numel / kByte, numel, map);
}

template <typename T, typename O>
__global__ void __launch_bounds__(kQuantizeThreads)
    masked_byte_kernel(const T* input, O* output, uint8_t* clipped, int64_t numel, DeviceMap map) {
  const int64_t step = int64_t{gridDim.x} * kQuantizeThreads;
  for (int64_t byte = int64_t{blockIdx.x} * kQuantizeThreads + threadIdx.x; byte * kByte < numel;
       byte += step)
    masked_byte(input, output, clipped, byte, numel, map);
}

template <typename T, typename O>
void run(const QuantizeArguments& a, O* output, uint8_t* clipped, void* stream) {
  constexpr const char* kName = "quantize_masked";
  if (a.numel == 0) return;
  const auto* const input = static_cast<const T*>(a.input);
  const DeviceMap map(a);
  const bool vectors = (a.map.count == 1 || a.map.inner % kByte == 0) &&
                       is_aligned(input, sizeof(T) * kByte) &&
                       is_aligned(output, sizeof(O) * kByte);
  if (vectors) {
    const Tiles tiles(a.numel, a.map, kByte, kWarp);
    launch(kName, masked_tile_kernel<T, O>,
           grid_size(divide_up(tiles.count, kQuantizeWarps), kQuantizeBlocks), kQuantizeThreads,
           stream, input, output, clipped, a.numel, tiles, map);
    return;
  }
  const int64_t blocks = divide_up(divide_up(a.numel, kByte), kQuantizeThreads);
  launch(kName, masked_byte_kernel<T, O>, grid_size(blocks, kQuantizeBlocks), kQuantizeThreads,
         stream, input, output, clipped, a.numel, map);
}

// Elements are taken as integers of their size: the zero of each type has no bit set. Bits is what
// a thread loads of the mask at a time.
template <typename Element, typename Bits>
__global__ void __launch_bounds__(kQuantizeThreads)
    zero_clipped_kernel(const uint8_t* clipped, int64_t numel, Element* gradient) {
  constexpr int kBits = 8 * sizeof(Bits);
  const auto zero = [&](uint32_t bits, int64_t first) {
    // Whatever the mask holds behind the last element, nothing is written there.
    if (numel - first < 32) bits &= (1u << static_cast<int>(numel - first)) - 1;
    for (; bits != 0; bits &= bits - 1) gradient[first + __ffs(static_cast<int>(bits)) - 1] = 0;
  };
  const int64_t thread = int64_t{blockIdx.x} * kQuantizeThreads + threadIdx.x;
  const int64_t bytes = (numel + 7) / 8, words = bytes / static_cast<int64_t>(sizeof(Bits));
  for (int64_t w = thread; w < words; w += int64_t{gridDim.x} * kQuantizeThreads)
    zero(reinterpret_cast<const Bits*>(clipped)[w], w * kBits);
  if (const int64_t byte = words * static_cast<int64_t>(sizeof(Bits)) + thread; byte < bytes)
    zero(clipped[byte], byte * 8);
}

}  // namespace

void quantize_masked(const QuantizeArguments& a, const MaskedOutput& output, void* stream) {
  with_element_type(a.input_type, [&]<typename T>(T*) {
    if (!output.type) return run<T>(a, static_cast<int8_t*>(output.values), output.clipped, stream);
    with_element_type(*output.type, [&]<typename O>(O*) {
      run<T>(a, static_cast<O*>(output.values), output.clipped, stream);
    });
  });
}

void zero_clipped(const uint8_t* clipped, int64_t numel, ElementType type, void* gradient,
                  void* stream) {
  constexpr const char* kName = "zero_clipped_";
  if (numel == 0) return;
  with_flag(is_aligned(clipped, sizeof(uint32_t)), [&](auto words) {
    using Bits = std::conditional_t<words.value, uint32_t, uint8_t>;
    const int64_t tiles = divide_up(divide_up(numel, 8 * sizeof(Bits)), kQuantizeThreads);
    const auto start = [&]<typename Element>(Element* elements) {
      launch(kName, zero_clipped_kernel<Element, Bits>, grid_size(tiles, kQuantizeBlocks),
             kQuantizeThreads, stream, clipped, numel, elements);
    };
    if (type == ElementType::f32) {
      start(static_cast<uint32_t*>(gradient));
    } else {
      start(static_cast<uint16_t*>(gradient));
    }
  });
}

}  // namespace vernier::cuda
