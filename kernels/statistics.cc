#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <vernier/kernels/dispatch.h>
#include <vernier/kernels/statistics.h>
#include <vernier/kernels/statistics_device.h>

#include <bit>

namespace vernier {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor> histogram_kernel(const Tensor& input, int64_t bins) {
  VERNIER_CHECK(
      bins >= 4 && bins <= (int64_t{1} << 20) && std::has_single_bit(static_cast<uint64_t>(bins)),
      "bins must be a power of two from 4 to 1048576, not ", bins);
  const ElementType type = element_type_of(input.scalar_type(), "input");
  const Tensor x = input.contiguous();
  const auto int64 = input.options().dtype(at::kLong);
  Tensor counts = at::empty({2, bins}, int64);
  Tensor range = at::empty({2}, input.options().dtype(at::kFloat));
  Tensor tallies = at::empty({4}, int64);
  int64_t* counts_out = counts.data_ptr<int64_t>();
  int64_t* tallies_out = tallies.data_ptr<int64_t>();
  float* range_out = range.data_ptr<float>();
  const int64_t numel = x.numel();
  on_device_of(
      x,
      [&] {
        cpu::histogram(x.const_data_ptr(), type, numel, bins, counts_out, range_out, tallies_out);
      },
      [&](void* stream) {
        Tensor scratch =
            at::empty({cuda::histogram_scratch(numel, bins)}, input.options().dtype(at::kByte));
        cuda::histogram(x.const_data_ptr(), type, numel, bins, counts_out, range_out, tallies_out,
                        scratch.data_ptr(), stream);
      });
  return {counts, range, tallies};
}

Tensor channel_range_kernel(const Tensor& input) {
  const ElementType type = element_type_of(input.scalar_type(), "input");
  const Tensor x = input.contiguous();
  const int64_t rows = rows_of(x), columns = columns_of(x);
  Tensor range = at::empty({2, columns}, input.options().dtype(at::kFloat));
  float* out = range.data_ptr<float>();
  on_device_of(
      x, [&] { cpu::channel_range(x.const_data_ptr(), type, rows, columns, out); },
      [&](void* stream) {
        cuda::channel_range(x.const_data_ptr(), type, rows, columns, out, stream);
      });
  return range;
}

std::tuple<Tensor, Tensor, Tensor> histogram_meta(const Tensor& input, int64_t bins) {
  const auto int64 = input.options().dtype(at::kLong);
  return {at::empty({2, bins}, int64), at::empty({2}, input.options().dtype(at::kFloat)),
          at::empty({4}, int64)};
}

Tensor channel_range_meta(const Tensor& input) {
  const auto sizes = input.sym_sizes();
  const c10::SymInt columns = sizes.empty() ? c10::SymInt(1) : sizes.back();
  return at::empty_symint({2, columns}, input.options().dtype(at::kFloat));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vernier, m) {
  m.def("histogram(Tensor input, int bins=4096) -> (Tensor counts, Tensor range, Tensor tallies)");
  m.def("channel_range(Tensor input) -> Tensor");
}
TORCH_LIBRARY_IMPL(vernier, CPU, m) {
  m.impl("histogram", TORCH_FN(histogram_kernel));
  m.impl("channel_range", TORCH_FN(channel_range_kernel));
}
#ifdef VERNIER_WITH_CUDA
TORCH_LIBRARY_IMPL(vernier, CUDA, m) {
  m.impl("histogram", TORCH_FN(histogram_kernel));
  m.impl("channel_range", TORCH_FN(channel_range_kernel));
}
#endif
TORCH_LIBRARY_IMPL(vernier, Meta, m) {
  m.impl("histogram", TORCH_FN(histogram_meta));
  m.impl("channel_range", TORCH_FN(channel_range_meta));
}

HistogramTensors histogram(const Tensor& input, int64_t bins) {
  static const auto op = operator_handle<decltype(histogram_kernel)>("vernier::histogram");
  auto [counts, range, tallies] = op.call(input, bins);
  return {std::move(counts), std::move(range), std::move(tallies)};
}

Tensor channel_range(const Tensor& input) {
  static const auto op = operator_handle<decltype(channel_range_kernel)>("vernier::channel_range");
  return op.call(input);
}

}  // namespace vernier
