#include <vernier/kernels/launch.h>
#include <vernier/kernels/layout_device.h>

namespace vernier::cuda {
namespace {

// A warp takes a tile of 32 x 32 elements through shared memory: reads it in the order of the
// source, 16 bytes a lane, and writes it in the order of the target. Every layout holds a tile in
// runs of at least 32 elements, so that whole sectors of 32 bytes move both ways.
constexpr int kTile = 32;
constexpr int kElements = kTile * kTile;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
// Blocks on a multiprocessor at once: 40 tiles on their way there.
constexpr int kBlocks = 5;

// Rows of a tile in shared memory are a word longer than the tile, so that columns spread over the
// banks.
template <typename T>
constexpr int kStride = kTile + 4 / sizeof(T);

// Consecutive columns that lie side by side in memory and in shared memory, moved as one word.
template <typename T, Layout kLayout>
constexpr int kRun = sizeof(T) == 1 && kLayout != Layout::col ? 4 : 1;

template <typename T, int kLength>
struct RunType {
  using Type = T;
};
template <>
struct RunType<int8_t, 4> {
  using Type = uint32_t;
};

struct Place {
  int row, column;
};

// The element at an offset of a tile, in the layout's order: LayoutShape::address the other way.
template <Layout kLayout>
__device__ __forceinline__ Place place_at(int offset) {
  if constexpr (kLayout == Layout::col) return {offset % 32, offset / 32};
  if constexpr (kLayout == Layout::col4_4r2_8c)
    return {offset / 256 * 8 + offset / 4 % 4 * 2 + offset / 128 % 2,
            offset / 16 % 8 * 4 + offset % 4};
  if constexpr (kLayout == Layout::col32_2r_4r4) {
    const int line = offset / 32;
    return {line / 2 % 4 * 8 + line / 8 * 2 + line % 2, offset % 32};
  }
  return {offset / 32, offset % 32};
}

// One side of the conversion: a matrix in a layout that is known when the kernel is compiled.
template <typename T, Layout kLayout>
struct Side {
  T* data;
  LayoutShape shape;
  bool vectors;  // whether runs of 16 bytes are aligned wherever a tile is whole

  // Where a tile's element at `offset` stands; the tile is whole or the layout padded.
  __device__ int64_t address(int64_t row, int64_t column, int offset) const {
    if constexpr (kLayout == Layout::row)
      return (row + offset / 32) * shape.leading + column + offset % 32;
    if constexpr (kLayout == Layout::col)
      return (column + offset / 32) * shape.leading + row + offset % 32;
    return column / kLayoutGroup * shape.leading + row * kLayoutGroup + offset;
  }

  __device__ bool contains(int64_t row, int64_t column) const {
    return row < shape.rows && column < shape.columns;
  }
};

// Whether padding follows the matrix in its groups, which then are written whole.
template <Layout kLayout>
constexpr bool kGrouped = kLayout != Layout::row&& kLayout != Layout::col;

template <typename T, Layout kLayout>
__device__ __forceinline__ void read_tile(const Side<const T, kLayout>& side, int64_t row,
                                          int64_t column, bool whole, int lane, T* tile) {
  constexpr int V = kVectorSize<T>;
  constexpr int kChunks = kElements / V / kWarp;
  if (whole && side.vectors) {
    using Run = typename RunType<T, kRun<T, kLayout>>::Type;
    constexpr int kRuns = 16 / sizeof(Run);
    Vector<Run, kRuns> x[kChunks];
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      const int offset = (u * kWarp + lane) * V;
      x[u] = load_vector<kRuns>(
          reinterpret_cast<const Run*>(side.data + side.address(row, column, offset)));
    }
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        const Place place = place_at<kLayout>((u * kWarp + lane) * V + i * kRun<T, kLayout>);
        *reinterpret_cast<Run*>(tile + place.row * kStride<T> + place.column) = x[u][i];
      }
    }
    return;
  }
  // At an edge, or not aligned: element by element, in the source's order too. What is outside is
  // zero, whatever the source's padding holds.
#pragma unroll 2
  for (int offset = lane; offset < kElements; offset += kWarp) {
    const Place place = place_at<kLayout>(offset);
    const int64_t r = row + place.row, c = column + place.column;
    tile[place.row * kStride<T> + place.column] =
        side.contains(r, c) ? side.data[side.shape.address(r, c)] : T{0};
  }
}

template <typename T, Layout kLayout>
__device__ __forceinline__ void write_tile(const Side<T, kLayout>& side, int64_t row,
                                           int64_t column, bool whole, int lane, const T* tile) {
  constexpr int V = kVectorSize<T>;
  constexpr int kChunks = kElements / V / kWarp;
  if ((whole || kGrouped<kLayout>)&&side.vectors) {
    using Run = typename RunType<T, kRun<T, kLayout>>::Type;
    constexpr int kRuns = 16 / sizeof(Run);
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      const int offset = (u * kWarp + lane) * V;
      // The last tile of a group may be longer than the group.
      if (kGrouped<kLayout> && row * kLayoutGroup + offset >= side.shape.leading) break;
      Vector<Run, kRuns> x;
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        const Place place = place_at<kLayout>(offset + i * kRun<T, kLayout>);
        x[i] = *reinterpret_cast<const Run*>(tile + place.row * kStride<T> + place.column);
      }
      store_vector(reinterpret_cast<Run*>(side.data + side.address(row, column, offset)), x);
    }
    return;
  }
#pragma unroll 2
  for (int offset = lane; offset < kElements; offset += kWarp) {
    const Place place = place_at<kLayout>(offset);
    const int64_t r = row + place.row, c = column + place.column;
    const T value = tile[place.row * kStride<T> + place.column];
    if constexpr (kGrouped<kLayout>) {
      if (row * kLayoutGroup + offset < side.shape.leading)
        side.data[side.address(row, column, offset)] = value;
    } else {
      if (side.contains(r, c)) side.data[side.shape.address(r, c)] = value;
    }
  }
}

template <typename T, Layout kFrom, Layout kTo>
__global__ void __launch_bounds__(kThreads, kBlocks)
    convert_layout_kernel(Side<const T, kFrom> from, Side<T, kTo> to, int64_t tiles,
                          Divider inner_tiles) {
  __shared__ alignas(16) T shared[kWarps][kTile * kStride<T>];
  const int lane = threadIdx.x % kWarp;
  T* tile = shared[threadIdx.x / kWarp];
  const int64_t step = int64_t{gridDim.x} * kWarps;
  for (int64_t t = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; t < tiles; t += step) {
    const int64_t outer = inner_tiles.divide(t), inner = t - outer * inner_tiles.divisor();
    // Neighbouring warps take neighbouring tiles of the side whose runs are short.
    constexpr bool kDown = kFrom == Layout::col || kTo == Layout::col;
    const int64_t row = (kDown ? inner : outer) * kTile, column = (kDown ? outer : inner) * kTile;
    const bool whole = row + kTile <= from.shape.rows && column + kTile <= from.shape.columns;
    read_tile<T, kFrom>(from, row, column, whole, lane, tile);
    __syncwarp();
    write_tile<T, kTo>(to, row, column, whole, lane, tile);
    __syncwarp();  // before the next tile overwrites this one
  }
}

template <typename T, Layout kLayout>
Side<T, kLayout> side_of(T* data, const LayoutShape& shape) {
  // Groups and their rows are multiples of 16 bytes long; a line of the others is what it is.
  const bool vectors =
      is_aligned(data, 16) && (kGrouped<kLayout> || shape.leading * sizeof(T) % 16 == 0);
  return {data, shape, vectors};
}

template <typename T, Layout kFrom, Layout kTo>
void start(const ConvertLayoutArguments& a, void* stream) {
  const int64_t down = divide_up(a.from.rows, kTile), across = divide_up(a.from.columns, kTile);
  constexpr bool kDown = kFrom == Layout::col || kTo == Layout::col;
  launch("convert_layout", convert_layout_kernel<T, kFrom, kTo>,
         grid_size(divide_up(down * across, kWarps), 32), kThreads, stream,
         side_of<const T, kFrom>(static_cast<const T*>(a.input), a.from),
         side_of<T, kTo>(static_cast<T*>(a.output), a.to), down * across,
         Divider(kDown ? down : across));
}

// Calls f with a std::integral_constant of the layout, among those of the element type.
template <typename T, typename F>
void with_layout(Layout layout, const F& f) {
  switch (layout) {
    case Layout::row:
      return f(std::integral_constant<Layout, Layout::row>{});
    case Layout::col:
      return f(std::integral_constant<Layout, Layout::col>{});
    case Layout::col32:
      return f(std::integral_constant<Layout, Layout::col32>{});
    default:
      break;
  }
  if constexpr (sizeof(T) == 1) {
    if (layout == Layout::col4_4r2_8c)
      return f(std::integral_constant<Layout, Layout::col4_4r2_8c>{});
    return f(std::integral_constant<Layout, Layout::col32_2r_4r4>{});
  }
}

template <typename T>
void convert(const ConvertLayoutArguments& a, void* stream) {
  with_layout<T>(a.from.layout, [&](auto from) {
    with_layout<T>(a.to.layout, [&](auto to) { start<T, from(), to()>(a, stream); });
  });
}

}  // namespace

void convert_layout(const ConvertLayoutArguments& arguments, void* stream) {
  if (arguments.element_bytes == 1) {
    convert<int8_t>(arguments, stream);
  } else {
    convert<int32_t>(arguments, stream);
  }
}

}  // namespace vernier::cuda
