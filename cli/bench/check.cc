#include <torch/torch.h>
#include <vernier/cli/bench/check.h>
#include <vernier/kernels/error.h>

namespace vernier::bench {

std::string check_equal(const torch::Tensor& output, const torch::Tensor& expected) {
  if (!output.sizes().equals(expected.sizes()) || output.dtype() != expected.dtype())
    return concat("the output is ", output.dtype(), " ", output.sizes(), ", not ", expected.dtype(),
                  " ", expected.sizes());
  const int64_t different = output.ne(expected).sum().item<int64_t>();
  if (different == 0) return "";
  return concat(different, " of ", output.numel(), " elements differ from the reference");
}

std::string check_close(const torch::Tensor& output, const torch::Tensor& expected, double relative,
                        double absolute) {
  if (!output.sizes().equals(expected.sizes()))
    return concat("the output is ", output.sizes(), ", not ", expected.sizes());
  // A slice of rows at a time: float64 copies of the largest outputs would not fit beside the data.
  const int64_t rows =
      std::max<int64_t>(1, (int64_t{1} << 26) / std::max<int64_t>(expected[0].numel(), 1));
  for (int64_t row = 0; row < expected.size(0); row += rows) {
    const int64_t end = std::min(expected.size(0), row + rows);
    const torch::Tensor y = output.slice(0, row, end).to(torch::kDouble);
    const torch::Tensor e = expected.slice(0, row, end).to(torch::kDouble);
    const torch::Tensor bound = e.abs().mul_(relative).add_(absolute);
    const torch::Tensor wrong = (y - e).abs().le(bound).logical_not_();
    const int64_t count = wrong.sum().item<int64_t>();
    if (count == 0) continue;
    const int64_t index = wrong.flatten().to(torch::kByte).argmax().item<int64_t>();
    return concat(count, " of ", y.numel(), " elements from row ", row,
                  " on are outside the bound; ", "the first is ", y.flatten()[index].item<double>(),
                  ", the reference ", e.flatten()[index].item<double>());
  }
  return "";
}

torch::Tensor exact_product(const torch::Tensor& codes, const torch::Tensor& weight) {
  return torch::mm(codes.to(torch::kDouble), weight.to(torch::kDouble).t());
}

}  // namespace vernier::bench
