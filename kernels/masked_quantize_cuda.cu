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

// One tensor's part of a launch: `blocks` of them, 0 for none.
template <typename T, typename O>
struct TileJob {
  const T* input;
  O* output;
  uint8_t* clipped;
  int64_t numel;
  Tiles tiles;
  DeviceMap map;
  unsigned blocks;

  explicit TileJob(const MaskedJob& job)
      : input(static_cast<const T*>(job.arguments.input)),
        output(static_cast<O*>(job.output.values)),
        clipped(job.output.clipped),
        numel(job.arguments.numel),
        tiles(numel, job.arguments.map, kByte, kWarp),
        map(job.arguments),
        blocks(grid_size(divide_up(tiles.count, kQuantizeWarps), kQuantizeBlocks)) {}

  // Vectors that do not straddle scales, of aligned operands.
  static bool fits(const MaskedJob& job) {
    const QuantizeArguments& a = job.arguments;
    return (a.map.count == 1 || a.map.inner % kByte == 0) &&
           is_aligned(a.input, sizeof(T) * kByte) &&
           is_aligned(job.output.values, sizeof(O) * kByte);
  }

  __device__ void run(unsigned block) const {
    const int lane = threadIdx.x % kWarp;
    for (int64_t t = int64_t{block} * kQuantizeWarps + threadIdx.x / kWarp; t < tiles.count;
         t += int64_t{blocks} * kQuantizeWarps) {
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
    if (block == 0 && threadIdx.x == 0 && numel % kByte != 0)
      masked_byte(input, output, clipped, numel / kByte, numel, map);
  }
};

// Blocks of two tensors in one launch: a layer quantizes its input and its weight at once.
template <typename T, typename O>
__global__ void __launch_bounds__(kQuantizeThreads, sizeof(T) == 2 && sizeof(O) == 1 ? 5 : 4)
    masked_tiles_kernel(const __grid_constant__ TileJob<T, O> first,
                        const __grid_constant__ TileJob<T, O> second) {
  if (blockIdx.x < first.blocks) {
    first.run(blockIdx.x);
  } else {
    second.run(blockIdx.x - first.blocks);
  }
}

template <typename T, typename O>
__global__ void __launch_bounds__(kQuantizeThreads)
    masked_byte_kernel(const T* input, O* output, uint8_t* clipped, int64_t numel, DeviceMap map) {
  const int64_t step = int64_t{gridDim.x} * kQuantizeThreads;
  for (int64_t byte = int64_t{blockIdx.x} * kQuantizeThreads + threadIdx.x; byte * kByte < numel;
       byte += step)
    masked_byte(input, output, clipped, byte, numel, map);
}

constexpr const char* kQuantizeName = "quantize_masked";

template <typename T, typename O>
void run_bytes(const MaskedJob& job, void* stream) {
  const QuantizeArguments& a = job.arguments;
  const int64_t blocks = divide_up(divide_up(a.numel, kByte), kQuantizeThreads);
  launch(kQuantizeName, masked_byte_kernel<T, O>, grid_size(blocks, kQuantizeBlocks),
         kQuantizeThreads, stream, static_cast<const T*>(a.input),
         static_cast<O*>(job.output.values), job.output.clipped, a.numel, DeviceMap(a));
}

template <typename T, typename O>
void run(const MaskedJob& first, const MaskedJob* second, void* stream) {
  using Job = TileJob<T, O>;
  if (!Job::fits(first) || (second && !Job::fits(*second))) {
    for (const MaskedJob* job : {&first, second}) {
      if (!job) continue;
      if (Job::fits(*job)) {
        run<T, O>(*job, nullptr, stream);
      } else {
        run_bytes<T, O>(*job, stream);
      }
    }
    return;
  }
  const Job a(first);
  Job b = second ? Job(*second) : a;
  if (!second) b.blocks = 0;
  launch(kQuantizeName, masked_tiles_kernel<T, O>, a.blocks + b.blocks, kQuantizeThreads, stream, a,
         b);
}

// ---- Gradients ----------------------------------------------------------------------------------

// Elements are taken as integers of their size: the zero of each type has no bit set.
template <typename Element>
struct ZeroJob {
  static constexpr int kQuad = 16;  // bytes of the mask that a thread loads at a time
  // Elements of a warp's quads, 4096 in all, from which on it is cheaper to rewrite whole vectors.
  static constexpr unsigned kMany = 96;

  const uint8_t* clipped;
  int64_t numel;
  Element* gradient;
  int64_t quads;  // whole ones of aligned operands; the rest goes byte by byte
  unsigned blocks;

  explicit ZeroJob(const ClippedGradient& job)
      : clipped(job.clipped),
        numel(job.numel),
        gradient(static_cast<Element*>(job.gradient)),
        quads(is_aligned(clipped, kQuad) && is_aligned(gradient, sizeof(Element) * kByte)
                  ? numel / (kByte * kQuad)
                  : 0) {
    const int64_t loads = quads > 0 ? quads : divide_up(numel, kByte);
    blocks = grid_size(divide_up(loads, kQuantizeThreads), kQuantizeBlocks);
  }

  __device__ void zero(uint32_t bits, int64_t first) const {
    for (; bits != 0; bits &= bits - 1) gradient[first + __ffs(static_cast<int>(bits)) - 1] = 0;
  }

  // The quads of a warp, from number `base` on.
  __device__ void run_quads(int64_t base, int lane) const {
    const int64_t quad = base + lane;
    uint4 bits = {};
    if (quad < quads) bits = reinterpret_cast<const uint4*>(clipped)[quad];
    const int mine = __popc(bits.x) + __popc(bits.y) + __popc(bits.z) + __popc(bits.w);
    const unsigned all = __reduce_add_sync(kFullWarp, static_cast<unsigned>(mine));
    if (all >= kMany) {
      const int64_t end = min(quads - base, int64_t{kWarp}) * kQuad;
#pragma unroll 4
      for (int64_t byte = lane; byte < end; byte += kWarp) {
        const uint32_t eight = clipped[base * kQuad + byte];
        if (eight == 0) continue;
        Element* const g = gradient + (base * kQuad + byte) * kByte;
        store_pack(g, passed_gradient<Element, kByte>(
                          load_pack<kByte>(g), [&](int j) { return (eight >> j & 1) == 0; }));
      }
    } else if (mine > 0) {
      const int64_t first = quad * (kByte * kQuad);
      zero(bits.x, first);
      zero(bits.y, first + 32);
      zero(bits.z, first + 64);
      zero(bits.w, first + 96);
    }
  }

  __device__ void run(unsigned block) const {
    const int64_t thread = int64_t{block} * kQuantizeThreads + threadIdx.x;
    const int64_t step = int64_t{blocks} * kQuantizeThreads;
    const int lane = threadIdx.x % kWarp;
    for (int64_t base = thread - lane; base < quads; base += step) run_quads(base, lane);
    for (int64_t byte = quads * kQuad + thread; byte * kByte < numel; byte += step) {
      uint32_t bits = clipped[byte];
      // Whatever the mask holds behind the last element, nothing is written there.
      const int64_t left = numel - byte * kByte;
      if (left < kByte) bits &= (1u << static_cast<int>(left)) - 1;
      zero(bits, byte * kByte);
    }
  }
};

template <typename Element>
__global__ void __launch_bounds__(kQuantizeThreads)
    zero_clipped_kernel(const __grid_constant__ ZeroJob<Element> first,
                        const __grid_constant__ ZeroJob<Element> second) {
  if (blockIdx.x < first.blocks) {
    first.run(blockIdx.x);
  } else {
    second.run(blockIdx.x - first.blocks);
  }
}

template <typename Element>
void run_zero(const ClippedGradient& first, const ClippedGradient* second, void* stream) {
  using Job = ZeroJob<Element>;
  const Job a(first);
  Job b = second ? Job(*second) : a;
  if (!second) b.blocks = 0;
  launch("zero_clipped_", zero_clipped_kernel<Element>, a.blocks + b.blocks, kQuantizeThreads,
         stream, a, b);
}

}  // namespace

void quantize_masked(const MaskedJob& first, const MaskedJob* second, void* stream) {
  if (second && second->arguments.numel == 0) second = nullptr;
  if (first.arguments.numel == 0) {
    if (second) quantize_masked(*second, nullptr, stream);
    return;
  }
  const bool alike = !second || (second->arguments.input_type == first.arguments.input_type &&
                                 second->output.type == first.output.type);
  if (!alike) {
    quantize_masked(first, nullptr, stream);
    return quantize_masked(*second, nullptr, stream);
  }
  with_element_type(first.arguments.input_type, [&]<typename T>(T*) {
    if (!first.output.type) return run<T, int8_t>(first, second, stream);
    with_element_type(*first.output.type,
                      [&]<typename O>(O*) { run<T, O>(first, second, stream); });
  });
}

void zero_clipped(const ClippedGradient& first, const ClippedGradient* second, void* stream) {
  if (second && second->numel == 0) second = nullptr;
  if (first.numel == 0) {
    if (second) zero_clipped(*second, nullptr, stream);
    return;
  }
  const auto is_wide = [](const ClippedGradient& job) { return job.type == ElementType::f32; };
  if (second && is_wide(first) != is_wide(*second)) {
    zero_clipped(first, nullptr, stream);
    return zero_clipped(*second, nullptr, stream);
  }
  if (is_wide(first)) {
    run_zero<uint32_t>(first, second, stream);
  } else {
    run_zero<uint16_t>(first, second, stream);
  }
}

}  // namespace vernier::cuda
