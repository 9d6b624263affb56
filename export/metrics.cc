#include <vernier/export/metrics.h>
#include <vernier/kernels/error.h>

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace vernier {
namespace {

Eigen::ArrayXd ranks_of(const std::vector<double>& values) {
  std::vector<size_t> order(values.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t i, size_t j) { return values[i] < values[j]; });
  Eigen::ArrayXd ranks(static_cast<Eigen::Index>(values.size()));
  for (size_t first = 0; first < order.size();) {
    size_t last = first;
    while (last < order.size() && values[order[last]] == values[order[first]]) ++last;
    const double mean_rank = 0.5 * static_cast<double>(first + last - 1);
    for (size_t i = first; i < last; ++i) ranks[static_cast<Eigen::Index>(order[i])] = mean_rank;
    first = last;
  }
  return ranks;
}

}  // namespace

double spearman(const std::vector<double>& a, const std::vector<double>& b) {
  VERNIER_CHECK(a.size() == b.size() && a.size() >= 2,
                "rank correlation needs two lists of at least two values, not ", a.size(), " and ",
                b.size());
  const auto is_nan = [](double value) { return std::isnan(value); };
  if (std::any_of(a.begin(), a.end(), is_nan) || std::any_of(b.begin(), b.end(), is_nan))
    return std::numeric_limits<double>::quiet_NaN();  // NaN has no rank
  const auto centred = [](const std::vector<double>& values) -> Eigen::ArrayXd {
    const Eigen::ArrayXd ranks = ranks_of(values);
    return ranks - ranks.mean();
  };
  const Eigen::ArrayXd x = centred(a), y = centred(b);
  return (x * y).sum() / std::sqrt(x.square().sum() * y.square().sum());
}

double mean_absolute_error(const std::vector<double>& a, const std::vector<double>& b) {
  VERNIER_CHECK(a.size() == b.size() && !a.empty(),
                "the mean error needs two lists of equal size, not ", a.size(), " and ", b.size());
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += std::fabs(a[i] - b[i]);
  return sum / static_cast<double>(a.size());
}

double sqnr_db(double signal, double noise) {
  if (std::isnan(signal) || std::isnan(noise)) return std::numeric_limits<double>::quiet_NaN();
  return noise > 0 ? 10 * std::log10(signal / noise) : std::numeric_limits<double>::infinity();
}

}  // namespace vernier
