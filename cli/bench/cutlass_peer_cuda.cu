#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <vernier/cli/bench/cutlass_peer.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/launch.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

namespace vernier::bench {
namespace {

namespace fusion = cutlass::epilogue::fusion;
using cute::_0, cute::_1, cute::_2, cute::_64, cute::_128;
using Raster = cutlass::gemm::kernel::detail::RasterOrderOptions;

template <typename Tile, typename Cluster>
struct Kernel {
  using Output = cutlass::bfloat16_t;
  static constexpr auto kNearest = cutlass::FloatRoundStyle::round_to_nearest;
  using PerColumn = fusion::Sm90RowBroadcast<0, Tile, float, float, cute::Stride<_0, _1, _0>>;
  using PerRow = fusion::Sm90ColBroadcast<0, Tile, float, float, cute::Stride<_1, _0, _0>>;
  using Times = fusion::Sm90Compute<cutlass::multiplies, float, float, kNearest>;
  using Plus = fusion::Sm90Compute<cutlass::plus, Output, float, kNearest>;
  using Scales = fusion::Sm90EVT<Times, PerRow, PerColumn>;
  using Scaled = fusion::Sm90EVT<Times, Scales, fusion::Sm90AccFetch>;
  using Visitors = fusion::Sm90EVT<Plus, Scaled, PerColumn>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, void,
      cutlass::layout::RowMajor, 8, Output, cutlass::layout::RowMajor, 8,
      cutlass::epilogue::TmaWarpSpecialized, Visitors>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, cutlass::layout::RowMajor, 16,
      int8_t, cutlass::layout::ColumnMajor, 16, int32_t, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Gemm = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop,
                                                    Epilogue, cutlass::gemm::PersistentScheduler>;
  using Adapter = cutlass::gemm::device::GemmUniversalAdapter<Gemm>;

  static void run(const CutlassProduct& p, Raster raster, cudaStream_t stream) {
    const auto packed = [](auto stride, int rows, int columns) {
      return cutlass::make_cute_packed_stride(stride, {rows, columns, 1});
    };
    typename Adapter::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                          {p.m, p.n, p.k, 1},
                                          {p.a, packed(typename Gemm::StrideA{}, p.m, p.k), p.b,
                                           packed(typename Gemm::StrideB{}, p.n, p.k)},
                                          {{},
                                           nullptr,
                                           {},
                                           static_cast<Output*>(p.output),
                                           packed(typename Gemm::StrideD{}, p.m, p.n)}};
    const typename Scales::Arguments scales{{p.row_scale}, {p.column_scale}, {}};
    const typename Scaled::Arguments scaled{scales, {}, {}};
    arguments.epilogue.thread = {scaled, {p.bias}, {}};
    arguments.scheduler.raster_order = raster;
    arguments.hw_info.sm_count = cuda::multiprocessors();
    Adapter gemm;
    VERNIER_CHECK(Adapter::can_implement(arguments) == cutlass::Status::kSuccess,
                  "CUTLASS does not take ", p.m, "x", p.k, "x", p.n);
    cutlass::Status status = gemm.initialize(arguments, nullptr, stream);
    if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
    VERNIER_CHECK(status == cutlass::Status::kSuccess, "CUTLASS: ", cutlassGetStatusString(status));
  }
};

struct Choice {
  const char* name;
  void (*run)(const CutlassProduct&, Raster, cudaStream_t);
  Raster raster;
};

template <int kClusterM, int kClusterN, typename TileM = _128>
constexpr auto kRun = Kernel<cute::Shape<TileM, _128, _128>,
                             cute::Shape<cute::Int<kClusterM>, cute::Int<kClusterN>, _1>>::run;

constexpr Choice kChoices[] = {
    {"128x128x128, cluster 2x1, along M", kRun<2, 1>, Raster::AlongM},
    {"128x128x128, cluster 2x1, along N", kRun<2, 1>, Raster::AlongN},
    {"128x128x128, cluster 1x2, along M", kRun<1, 2>, Raster::AlongM},
    {"128x128x128, cluster 1x2, along N", kRun<1, 2>, Raster::AlongN},
    {"64x128x128, cluster 1x2, along N", kRun<1, 2, _64>, Raster::AlongN},
};

}  // namespace

std::vector<std::string> cutlass_kernels() {
  std::vector<std::string> names;
  for (const Choice& choice : kChoices) names.emplace_back(choice.name);
  return names;
}

void run_cutlass(int kernel, const CutlassProduct& product, void* stream) {
  const Choice& choice = kChoices[kernel];
  choice.run(product, choice.raster, static_cast<cudaStream_t>(stream));
}

}  // namespace vernier::bench
