// Statistics that merge without loss, the calibrators that read them, and their file.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include <vernier/calibration/calibrators.h>
#include <vernier/calibration/hdf5.h>
#include <vernier/calibration/statistics_file.h>
#include <vernier/kernels/statistics.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/temporary_folder.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

using namespace vernier;

namespace {

namespace fs = std::filesystem;
using at::Tensor;
using vernier::testing::message_of;
using vernier::testing::read_bytes;
using vernier::testing::TemporaryFolder;
using vernier::testing::write_bytes;
using Values = std::vector<float>;
using Counts = std::vector<int64_t>;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kDenormal = std::numeric_limits<float>::denorm_min();
constexpr float kLargest = std::numeric_limits<float>::max();
const Scheme kInt8 = symmetric_scheme(8), kAsymmetric = asymmetric_scheme(8);

/// Else threads spin at their barriers, for seconds where others keep the cores busy.
[[maybe_unused]] const bool kOneThread = (at::set_num_threads(1), true);

#define EXPECT_MESSAGE(action, part) EXPECT_CONTAINS(message_of([&] { action; }), part)

std::pair<float, float> ends(Range range) { return {range.min, range.max}; }
Counts list(std::span<const int64_t> counts) { return {counts.begin(), counts.end()}; }

Histogram histogram_of(const Values& values, int64_t bins = kHistogramBins) {
  Histogram histogram(bins);
  histogram.add(values);
  return histogram;
}

Values normal(size_t n) {
  std::mt19937_64 random(1);
  std::normal_distribution<float> distribution;
  Values values(n);
  std::generate(values.begin(), values.end(), [&] { return distribution(random); });
  return values;
}

Values mapped(Values values, const std::function<float(float)>& map) {
  std::transform(values.begin(), values.end(), values.begin(), map);
  return values;
}

Values joined(Values values, const Values& more) {
  values.insert(values.end(), more.begin(), more.end());
  return values;
}

/// Every magnitude of float32, both signs, and what stands apart.
Values wild(size_t n) {
  std::mt19937_64 random(2);
  std::uniform_real_distribution<float> exponent(-150, 128);
  Values values = {kLargest, -kLargest, kDenormal, -kDenormal, kNaN, kInf, -kInf, 0.0f, -0.0f};
  while (values.size() < n)
    values.push_back(std::exp2(exponent(random)) * (random() % 2 ? 1.0f : -1.0f));
  return values;
}

TEST(HistogramTest, CountsByHand) {
  const Histogram histogram = histogram_of({1, 2.5f, -3, 0, -0.0f, kNaN, kInf, -kInf, 0.5f}, 4);
  EXPECT_EQ(list(histogram.negative()), Counts({0, 0, 0, 1}));
  EXPECT_EQ(list(histogram.positive()), Counts({1, 1, 1, 0}));
  EXPECT_EQ(ends(histogram.range()), std::pair(-3.0f, 2.5f));
  EXPECT_EQ(histogram.amax(), 3);
  const Counts apart = {histogram.zeros(), histogram.nans(), histogram.infinities()};
  EXPECT_EQ(apart, Counts({2, 1, 2}));
  EXPECT_EQ(histogram.total() - histogram.finite(), 3);
}

TEST(HistogramTest, WidthIsTheSmallestPowerOfTwo) {
  const std::tuple<int64_t, float, int, int> cases[] = {
      {4, 3, 0, 3},  // bins, value; exponent, bin
      {4, 4, 1, 2},
      {4096, 1, -11, 2048},
      {4096, std::nextafter(1.0f, 0.0f), -12, 4095},
      {4096, kLargest, 116, 4095},
      {1 << 20, kLargest, 108, (1 << 20) - 1},
      {4096, kDenormal, -126, 0}};
  for (const auto& [bins, magnitude, exponent, bin] : cases) {
    for (const float value : {magnitude, -magnitude}) {
      SCOPED_TRACE(concat(value, " in ", bins, " bins"));
      const Histogram histogram = histogram_of({value}, bins);
      EXPECT_EQ(histogram.exponent(), exponent);
      EXPECT_EQ((value > 0 ? histogram.positive() : histogram.negative())[bin], 1);
      EXPECT_EQ(ends(histogram.range()), std::pair(value, value));
    }
  }
  for (const int64_t bins : {-4, 0, 2, 3, 1000, 1 << 21})
    EXPECT_MESSAGE(Histogram{bins}, concat("not ", bins));
}

TEST(HistogramTest, StateIsAFunctionOfTheMultiset) {
  Values values = wild(5000);
  const auto magnitude = [](float x) { return std::isnan(x) ? kInf : std::fabs(x); };
  const std::function<void()> orders[] = {
      [&] { std::ranges::sort(values, {}, magnitude); }, [&] { std::ranges::reverse(values); },
      [&] { std::ranges::shuffle(values, std::mt19937_64(3)); }};
  for (const int64_t bins : {4, 64, 4096}) {
    const Histogram expected = histogram_of(values, bins);
    for (const auto& order : orders) {
      order();
      for (const size_t chunk : {1, 7, 999, 5000}) {
        SCOPED_TRACE(concat(bins, " bins, ", chunk, " at a time"));
        Histogram added(bins), merged(bins);
        std::vector<Histogram> tree(32, Histogram(bins));
        for (size_t i = 0; i < values.size(); i += chunk) {
          const auto end = std::min(i + chunk, values.size());
          const Values part(&values[i], &values[0] + end);
          added.add(part);
          merged.merge(histogram_of(part, bins));
          tree[i % 32].merge(histogram_of(part, bins));
        }
        for (; tree.size() > 1; tree.pop_back()) tree[tree.size() / 2 - 1].merge(tree.back());
        EXPECT_EQ(added, expected);
        EXPECT_EQ(merged, expected);
        EXPECT_EQ(tree[0], expected);
      }
    }
  }
}

TEST(HistogramTest, CountsByDefinitionInEveryType) {
  for (const at::ScalarType type : {at::kFloat, at::kHalf, at::kBFloat16}) {
    const Tensor x = at::tensor(wild(20000)).to(type), wide = x.to(at::kDouble);
    Observer observer;
    observer.observe(x);
    const Histogram actual = observer.statistics().histogram;
    const Tensor counted = wide.masked_select(at::logical_and(at::isfinite(wide), wide != 0));
    const Tensor bin = (counted.abs() / actual.bin_width()).floor().to(at::kLong);
    const Tensor counts = at::bincount(bin + (counted > 0).to(at::kLong) * 4096, {}, 8192);
    EXPECT_EQ(list(actual.counts()), list({counts.const_data_ptr<int64_t>(), 8192}));
    EXPECT_EQ(actual.zeros(), (wide == 0).sum().item<int64_t>());
    EXPECT_EQ(actual.nans(), at::isnan(wide).sum().item<int64_t>());
    EXPECT_EQ(actual.infinities(), at::isinf(wide).sum().item<int64_t>());
    // The operator, on which observers of GPU tensors build, says the same.
    EXPECT_TRUE(at::equal(vernier::histogram(x).counts.flatten(), counts));
  }
}

TEST(HistogramTest, CountsBeyondFloatPrecision) {
  const Values block(1 << 20, -0.7f);
  Histogram histogram = histogram_of({-0.7f});
  for (int i = 0; i < 17; ++i) histogram.add(block);
  const auto count = [&] { return *std::ranges::max_element(histogram.negative()); };
  EXPECT_EQ(count(), (17 << 20) + 1);  // float32 would stop at 2^24
  for (int i = 0; i < 35; ++i) histogram.merge(Histogram(histogram));
  EXPECT_EQ(count(), int64_t{(17 << 20) + 1} << 35);  // and float64 round beyond 2^53
  EXPECT_EQ(histogram.finite(), count());
}

TEST(HistogramTest, NothingZerosAndTinyValuesFirst) {
  const Values values = {-2, 3}, tiny = mapped(normal(1000), [](float x) { return x * 1e-6f; });
  const Histogram expected = histogram_of(values);
  EXPECT_EQ(Histogram(), histogram_of(Values{}));
  for (const Values& before : {Values{}, Values{kNaN, kInf, -kInf}, Values(100, 0.0f), tiny}) {
    const Histogram first = histogram_of(before);
    Histogram added = first, merged = expected;
    const int64_t* const memory = added.counts().data();
    added.add(values);
    merged.merge(first);
    EXPECT_EQ(added, merged);
    EXPECT_EQ(added.counts().data(), memory);  // growing takes no memory
    EXPECT_EQ(added.counts().size(), 8192);
    EXPECT_EQ(added.exponent(), expected.exponent());
    EXPECT_EQ(ends(added.range()), std::pair(-2.0f, 3.0f));
  }
  for (const float more : {3.0f, 0.0f, -1.0f, 4.0f, kNaN, kInf})
    EXPECT_FALSE(histogram_of({-2, 3, more}) == expected) << more;
  EXPECT_FALSE(histogram_of({-2, std::nextafter(3.0f, 4.0f)}) == expected);
  EXPECT_EQ(histogram_of({0, 5}).range().min, 0);  // zeros are values
  Histogram five = histogram_of({5});              // NaNs are none
  five.merge(histogram_of({kNaN}));
  EXPECT_EQ(five.range().min, 5);
  EXPECT_MESSAGE(Histogram(64).merge(Histogram(128)), "64 and 128");
}

TEST(HistogramTest, RestoresWhatAgreesAndRefusesTheRest) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  const auto restore = [](const Counts& counts, int exponent = 0, Range range = {-2.5f, 1},
                          int64_t zeros = 1, int64_t nans = 1, int64_t infinities = 1) {
    return Histogram(counts, exponent, range, zeros, nans, infinities);
  };
  const Counts good = {0, 0, 1, 0, 0, 1, 0, 0};
  EXPECT_EQ(restore(good), histogram_of({1, -2.5f, 0, kNaN, kInf}, 4));
  EXPECT_EQ(restore(good).total(), 5);
  EXPECT_MESSAGE(restore({0, 0, 1, -1, 0, 1, 0, 0}), "contradict");
  EXPECT_MESSAGE(restore({0, 0, 1, kMost, 0, 1, 0, 0}), "contradict");  // their sum overflows
  EXPECT_MESSAGE(restore(good, 1), "contradict");
  EXPECT_MESSAGE(restore(good, -1), "contradict");
  EXPECT_MESSAGE(restore(good, 0, {-5, 1}), "contradict");  // outside the bins
  EXPECT_MESSAGE(restore(good, 0, {2, 1}), "contradict");
  EXPECT_MESSAGE(restore(good, 0, {kNaN, 1}), "contradict");
  EXPECT_MESSAGE(restore(good, 0, {0, 0}), "contradict");
  EXPECT_MESSAGE(restore(good, 0, {-2.5f, 1}, -1), "contradict");
  EXPECT_MESSAGE(restore(good, 0, {-2.5f, 1}, 1, 1, kMost), "contradict");
  EXPECT_MESSAGE(restore(Counts(12, 1)), "power of two");
  EXPECT_NE(message_of([&] { restore({0, 0, 1, 0, 0, 1, 0, 0, 0}); }), "");  // four bins and a half
}

TEST(ObserverTest, GathersHistogramAndChannels) {
  Observer observer;
  observer.observe(at::empty({0, 3}));
  EXPECT_TRUE(observer.statistics().channels.empty());
  observer.observe(at::tensor({1.0f, kNaN, -0.0f, -2.0f, kInf, 0.0f}).view({2, 1, 3}));
  SiteStatistics statistics = observer.statistics();
  ASSERT_EQ(statistics.channels.size(), 3);
  EXPECT_EQ(ends(statistics.channels[0]), std::pair(-2.0f, 1.0f));
  EXPECT_EQ(ends(statistics.channels[1]), std::pair(kInf, -kInf));  // nothing finite yet
  EXPECT_FALSE(std::signbit(statistics.channels[2].min));
  EXPECT_EQ(statistics.histogram, histogram_of({1, -2, 0, 0, kNaN, kInf}));
  observer.observe(at::tensor({5.0f, 6.0f, 7.0f}).to(at::kBFloat16));
  statistics = observer.statistics();
  EXPECT_EQ(ends(statistics.channels[0]), std::pair(-2.0f, 5.0f));
  EXPECT_EQ(ends(statistics.channels[1]), std::pair(6.0f, 6.0f));
  EXPECT_MESSAGE(observer.observe(at::ones({2, 4})), "3 and 4 channels");
  EXPECT_MESSAGE(observer.observe(at::ones({2, 3}, at::kInt)), "must be float32");
  EXPECT_EQ(observer.statistics(), statistics);  // as before the errors
  observer.reset();
  EXPECT_EQ(observer.statistics(), SiteStatistics());
}

TEST(ObserverTest, KnowsNoThreadsAndNoOrder) {
  std::vector<Tensor> batches;
  for (int i = 0; i < 24; ++i) {
    batches.push_back(at::randn({5, 17, 33}) * std::exp2(static_cast<float>(7 * i % 24 - 12)));
    batches[i].select(2, 4).fill_(kNaN);
    if (i % 3 == 0) batches[i] = batches[i].to(at::kHalf);
  }
  Observer alone, shared;
  SiteStatistics merged;
  for (const Tensor& batch : batches) {
    Observer shard;
    shard.observe(batch);
    merged.merge(shard.statistics());
    alone.observe(batch);
  }
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (size_t i = t; i < batches.size(); i += 4) shared.observe(batches[i]);
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(shared.statistics(), alone.statistics());
  EXPECT_EQ(merged, alone.statistics());
  EXPECT_EQ(merged.channels[4].min, kInf);
}

constexpr CalibrationMethod kMethods[] = {CalibrationMethod::min_max, CalibrationMethod::percentile,
                                          CalibrationMethod::mse, CalibrationMethod::entropy};

std::vector<std::pair<std::string, Values>> distributions() {
  const Values gaussian = normal(40007);
  const auto gelu = [](float x) { return x * 0.5f * (1 + std::erf(x / std::sqrt(2.0f))); };
  return {{"gaussian", gaussian},
          {"outliers", joined(gaussian, {30, -25, 60, 41.5f})},
          {"ReLU", mapped(gaussian, [](float x) { return std::max(x, 0.0f); })},
          {"GELU", mapped(gaussian, gelu)},
          {"heavy tails", mapped(gaussian, [](float x) { return x * x * x; })},
          {"constant", Values(1000, -0.37f)},
          {"two values", joined(Values(900, 0.11f), Values(100, -2.5f))},
          {"one value", {1234.5f}},
          {"all zero", Values(50, 0.0f)}};
}

TEST(Calibrators, MinMaxIsExact) {
  const std::tuple<Values, Range, Range> cases[] = {
      {{-0.3f, 1.7f}, {-1.7f, 1.7f}, {-0.3f, 1.7f}},
      {{-2, -3, kNaN, kInf}, {-3, 3}, {-3, 0}},
      {{-kLargest, kDenormal}, {-kLargest, kLargest}, {-kLargest, kDenormal}},
      {{kNaN}, {0, 0}, {0, 0}}};
  for (const auto& [values, symmetric, asymmetric] : cases) {
    EXPECT_EQ(ends(min_max_range(histogram_of(values), kInt8)), ends(symmetric));
    EXPECT_EQ(ends(min_max_range(histogram_of(values), kAsymmetric)), ends(asymmetric));
  }
}

TEST(Calibrators, HaveNames) {
  for (const CalibrationMethod method : kMethods)
    EXPECT_EQ(calibration_method_from_string(to_string(method)), method);
  EXPECT_EQ(calibration_method_from_string("kl"), CalibrationMethod::entropy);
  EXPECT_MESSAGE(calibration_method_from_string("max"), "'max'");
}

/// The smallest bound that leaves at most `allowed` of the values above it.
float bound_by_sorting(Values values, double allowed) {
  std::sort(values.begin(), values.end(), std::greater<>());
  const auto outside = static_cast<size_t>(allowed);
  return outside < values.size() ? std::max(values[outside], 0.0f) : 0.0f;
}

TEST(Calibrators, PercentileAgreesWithSorting) {
  for (const auto& [name, values] : distributions()) {
    const Histogram histogram = histogram_of(values);
    const auto expect_edge = [&](float edge, double allowed, const auto& map) {
      const float exact = bound_by_sorting(mapped(values, map), allowed);
      EXPECT_GE(edge, exact);
      EXPECT_LE(edge, exact > 0 ? exact + histogram.bin_width() : 0);
    };
    for (const double percentile : {50.0, 90.0, 99.0, 99.9, 99.99, 100.0}) {
      SCOPED_TRACE(concat(name, ", ", percentile));
      const double cut = std::round((100 - percentile) * 1e4) * values.size() / 1e6;
      const Range symmetric = percentile_range(histogram, kInt8, percentile);
      const Range asymmetric = percentile_range(histogram, kAsymmetric, percentile);
      EXPECT_EQ(symmetric.min, -symmetric.max);
      expect_edge(symmetric.max, cut, [](float x) { return std::fabs(x); });
      expect_edge(asymmetric.max, cut / 2, [](float x) { return x; });
      expect_edge(-asymmetric.min, cut / 2, [](float x) { return -x; });
    }
  }
  for (const double bad : {0.0, -1.0, 100.01, std::nan("")})
    EXPECT_MESSAGE(percentile_range(Histogram(), kInt8, bad), "percentile must be in (0, 100]");
}

/// The least error(low, high) over bin edges inside the extremes: symmetric over all of them,
/// asymmetric by ever finer grids.
template <typename Error>
double least(const Error& error, int64_t lows, int64_t highs, bool symmetric) {
  std::tuple<double, int64_t, int64_t> best = {error(0, 0), 0, 0};
  const auto consider = [&](int64_t low, int64_t high) {
    best = std::min(best, {error(low, high), low, high});
  };
  for (int64_t a = 0; symmetric && a <= std::max(lows, highs); ++a) consider(a, a);
  for (int64_t step = 64, reach = 4096; !symmetric && step > 0; reach = step, step /= 8) {
    const auto [_, l, h] = best;
    for (auto low = std::max(l - reach, 0L); low <= std::min(l + reach, lows); low += step)
      for (auto high = std::max(h - reach, 0L); high <= std::min(h + reach, highs); high += step)
        consider(low, high);
  }
  return std::get<0>(best);
}

void expect_least_error(const Histogram& histogram, const Scheme& scheme) {
  const double width = histogram.bin_width();
  const Tensor centre = (at::arange(histogram.bins(), at::kDouble) + 0.5) * width;
  const Tensor values = at::cat({-centre, centre});
  const Tensor counts = at::tensor(list(histogram.counts())).to(at::kDouble);
  const auto error = [&](Range range) {
    const auto [scale, zero] = scale_from_range(range, scheme);
    const Tensor q = values / static_cast<double>(scale);
    const Tensor code = q.clamp(scheme.qmin() - zero, scheme.qmax() - zero).round_();
    return code.sub_(q).square_().dot(counts).item<double>() * scale * scale;
  };
  const auto edge = [&](float end) { return std::max(0L, std::lround(std::ceil(end / width))); };
  const auto edge_error = [&](int64_t low, int64_t high) {
    return error({static_cast<float>(-width * low), static_cast<float>(width * high)});
  };
  const Range extremes = histogram.range(), range = mse_range(histogram, scheme);
  const double optimum =
      least(edge_error, edge(-extremes.min), edge(extremes.max), scheme.symmetric);
  EXPECT_LE(error(range), optimum * 1.01) << range.min << " to " << range.max;
}

TEST(Calibrators, MseFindsTheLeastError) {
  for (const auto& [name, values] : distributions()) {
    for (const int bits : {8, 4, 2}) {
      SCOPED_TRACE(concat(name, ", ", bits, " bits"));
      expect_least_error(histogram_of(values), symmetric_scheme(bits));
      expect_least_error(histogram_of(values), asymmetric_scheme(bits));
    }
  }
}

TEST(Calibrators, EntropyKeepsTheBulkAndClipsOutliers) {
  const Values gaussian = normal(200000), positive = mapped(gaussian, fabsf);
  for (const int bits : {8, 7, 6}) {
    const float a = entropy_range(histogram_of(gaussian), symmetric_scheme(bits)).max;
    EXPECT_GT(a, histogram_of(gaussian).amax() / 2);
    EXPECT_GT(std::ranges::count_if(positive, [&](float x) { return x <= a; }), 198000);
  }
  const float clipped = entropy_range(histogram_of(joined(gaussian, {50})), kInt8).max;
  EXPECT_TRUE(clipped > 2.5f && clipped < 25) << clipped;
  const Range asymmetric = entropy_range(histogram_of(positive), kAsymmetric);
  EXPECT_TRUE(asymmetric.min == 0 && asymmetric.max > 2.5f) << asymmetric.max;
  // The formula by other means, in Python: the least divergence on four levels is that of five
  // bins.
  Counts small = {1, 0, 5, 0, 60, 60, 60, 20, 2, 0, 60, 0, 20, 20, 0, 60};
  small.resize(32);
  const Histogram sixteen(small, 0, {-15.5f, -0.5f}, 0, 0, 0);
  EXPECT_EQ(entropy_range(sixteen, symmetric_scheme(3)).max, 5);
  const float constant = entropy_range(histogram_of(Values(1000, -0.37f)), kInt8).max;
  EXPECT_TRUE(constant >= 0.37f && constant < 0.371f) << constant;
}

TEST(Calibrators, RangesFitTheSchemeAtEveryWidth) {
  auto cases = distributions();
  cases.push_back({"huge", {kLargest, -kLargest, 1}});
  cases.push_back({"denormal", {kDenormal, -1e-40f}});
  cases.push_back({"nothing finite", {kNaN, kInf}});
  for (const auto& [name, values] : cases) {
    const Histogram histogram = histogram_of(values);
    Histogram shards;
    for (size_t i = 0; i < values.size(); i += 777)
      shards.merge(histogram_of({&values[i], &values[0] + std::min(i + 777, values.size())}));
    for (int i = 0; i < 7 * 2 * 4; ++i) {
      const int bits = 2 + i / 8;
      const Scheme scheme = i % 2 ? symmetric_scheme(bits) : asymmetric_scheme(bits);
      const CalibrationMethod method = kMethods[i / 2 % 4];
      SCOPED_TRACE(concat(name, ", ", to_string(scheme), ", ", to_string(method)));
      const Range range = calibrate(histogram, scheme, {method});
      EXPECT_EQ(ends(range), ends(calibrate(shards, scheme, {method})));
      const float scale = scale_from_range(range, scheme).scale;
      EXPECT_TRUE(range.min <= 0 && range.max >= 0);
      EXPECT_TRUE(!scheme.symmetric || range.min == -range.max);
      EXPECT_LE(std::max(-range.min, range.max), histogram.amax() + histogram.bin_width());
      EXPECT_TRUE(std::isfinite(scale) && scale > 0);
      EXPECT_TRUE(histogram.amax() > 0 || (range.max == range.min && scale == 1));
    }
  }
}

/// Statistics of rows [first, first + samples) of one and the same data.
ModelStatistics run_over(int64_t first, int64_t samples) {
  at::manual_seed(11);
  const Tensor data = at::randn({64, 3, 5}) * at::exp2(at::randn({64, 1, 1}) * 4);
  data.select(2, 2).fill_(kNaN);
  const Tensor rows = data.narrow(0, first, samples);
  Observer observer;
  observer.observe(rows);
  ModelStatistics run{"model-1", "data-1", samples, first, samples, {}};
  run.sites["layer.0.query"] = observer.statistics();
  run.sites["unused"];
  return run;
}

void expect_equal(const ModelStatistics& a, const ModelStatistics& b) {
  EXPECT_EQ(std::tie(a.fingerprint, a.data), std::tie(b.fingerprint, b.data));
  EXPECT_EQ(std::tie(a.samples, a.first_sample, a.planned),
            std::tie(b.samples, b.first_sample, b.planned));
  EXPECT_TRUE(a.sites == b.sites);
}

TEST(StatisticsFile, RoundTripAndStructure) {
  const TemporaryFolder folder;
  ModelStatistics statistics = run_over(5, 20);
  statistics.planned = 64;  // interrupted
  save_statistics(statistics, folder / "s.h5");
  expect_equal(load_statistics(folder / "s.h5"), statistics);
  const hdf5::File file = hdf5::File::open(folder / "s.h5");
  EXPECT_EQ(file.attribute_string("/", "format"), "vernier-statistics");
  EXPECT_EQ(file.attribute_int("/", "planned_samples"), 64);
  EXPECT_EQ(file.children("sites").size(), 2);
  EXPECT_EQ(file.info("sites/layer.0.query/counts").shape, Counts({2, kHistogramBins}));
  EXPECT_EQ(file.info("sites/layer.0.query/channel_range").shape, Counts({2, 5}));
  EXPECT_EQ(file.read<float>("sites/layer.0.query/channel_range")[2], kInf);
  EXPECT_EQ(file.attribute_int("sites/layer.0.query", "nans"), 60);
  save_statistics({}, folder / "s.h5");
  expect_equal(load_statistics(folder / "s.h5"), {});
  EXPECT_EQ(folder.entries(), 1);
}

TEST(StatisticsFile, MergeEqualsOneRun) {
  ModelStatistics first = run_over(0, 10), second = run_over(10, 30), third = run_over(40, 24);
  third.merge(first);
  third.merge(second);
  expect_equal(third, run_over(0, 64));
  second.data = "data-2";
  first.merge(second);
  EXPECT_EQ(first.data, "");
}

TEST(StatisticsFile, MergeRefusesWhatDoesNotBelongTogether) {
  const std::pair<std::function<void(ModelStatistics&)>, const char*> cases[] = {
      {[](auto& s) { s.fingerprint = "model-2"; }, "model-2"},
      {[](auto& s) { s.samples = 3; }, "after 3 of 10 samples"},
      {[](auto& s) { s.sites.erase("unused"); }, "layers"},
      {[](auto& s) { s.sites.erase("unused"), s.sites["used"]; }, "'used'"},
      {[](auto& s) { s.sites["layer.0.query"].channels.resize(7); }, "5 and 7 channels"},
      {[](auto& s) { s.sites["unused"].histogram = Histogram(64); }, "4096 and 64"}};
  for (const auto& [change, part] : cases) {
    ModelStatistics mine = run_over(0, 10), other = run_over(10, 10);
    change(other);
    EXPECT_MESSAGE(mine.merge(other), part);
    EXPECT_NE(message_of([&] { other.merge(mine); }), "");
  }
}

TEST(StatisticsFile, NoSampleIsCountedTwice) {
  const TemporaryFolder folder;
  const auto stored = [&](const ModelStatistics& statistics) {  // what a file keeps of them
    save_statistics(statistics, folder / "s.h5");
    return load_statistics(folder / "s.h5");
  };
  const auto sum_of = [&](ModelStatistics sum, const ModelStatistics& other) {
    sum.merge(other);
    return stored(sum);
  };
  const auto expect_apart = [&](const ModelStatistics& a, const ModelStatistics& b,
                                const char* shared) {
    for (const auto& [into, from] : {std::pair(a, b), std::pair(b, a)})
      EXPECT_MESSAGE(sum_of(into, from), shared);
  };
  expect_apart(run_over(0, 10), run_over(0, 10), "samples 0 to 9 of the data data-1");
  expect_apart(run_over(0, 10), run_over(9, 5), "samples 9 to 9 of the data data-1");
  expect_apart(run_over(0, 64), run_over(3, 4), "samples 3 to 6 of the data data-1");
  const ModelStatistics touching = sum_of(run_over(10, 10), run_over(0, 10));
  expect_equal(touching, run_over(0, 20));
  expect_apart(touching, run_over(5, 10), "samples 5 to 14");
  const ModelStatistics gap = sum_of(run_over(40, 10), run_over(0, 10));
  EXPECT_EQ(gap.merged, (std::vector<SampleRange>{{"data-1", 0, 10}, {"data-1", 40, 10}}));
  expect_apart(gap, run_over(45, 1), "samples 45 to 45");
  expect_equal(sum_of(gap, run_over(10, 30)), run_over(0, 50));

  ModelStatistics other = run_over(0, 10);
  other.data = "data-2";
  const ModelStatistics both = sum_of(run_over(0, 10), other);
  EXPECT_EQ(both.data, "");
  EXPECT_EQ(both.samples, 20);
  expect_apart(both, run_over(0, 10), "samples 0 to 9 of the data data-1");
  expect_apart(both, other, "samples 0 to 9 of the data data-2");
  EXPECT_EQ(sum_of(both, run_over(10, 5)).ranges(),
            (std::vector<SampleRange>{{"data-1", 0, 15}, {"data-2", 0, 10}}));
}

TEST(StatisticsFile, MergedRangesThatContradictAreRefused) {
  const TemporaryFolder folder;
  const fs::path path = folder / "s.h5";
  const auto write = [&](const std::vector<std::pair<int64_t, int64_t>>& ranges) {
    hdf5::File file = hdf5::File::create(path);
    file.set_attribute("/", "format", "vernier-statistics");
    for (const char* name : {"model_fingerprint", "data_fingerprint"})
      file.set_attribute("/", name, "x");
    for (const char* name : {"version", "first_sample"}) file.set_attribute("/", name, 1);
    for (const char* name : {"samples", "planned_samples"}) file.set_attribute("/", name, 4);
    file.create_group("sites");
    for (size_t i = 0; i < ranges.size(); ++i) {
      const std::string group = "ranges/" + std::to_string(i);
      file.create_group(group);
      file.set_attribute(group, "data_fingerprint", "x");
      file.set_attribute(group, "first_sample", ranges[i].first);
      file.set_attribute(group, "samples", ranges[i].second);
    }
    file.close();
  };
  write({{1, 2}, {5, 2}});
  EXPECT_EQ(load_statistics(path).ranges().size(), 2u);
  write({});
  EXPECT_EQ(load_statistics(path).ranges(), (std::vector<SampleRange>{{"x", 1, 4}}));
  const std::vector<std::pair<int64_t, int64_t>> wrong[] = {
      {{1, 2}, {5, 1}}, {{2, 2}, {5, 2}},  {{1, 5}, {7, -1}},
      {{1, 2}, {2, 2}}, {{-1, 2}, {5, 2}}, {{1, 3}, {std::numeric_limits<int64_t>::max(), 1}}};
  for (const auto& ranges : wrong) {
    write(ranges);
    EXPECT_MESSAGE(load_statistics(path), "s.h5");
  }
}

/// Adds a site to a file: two values of 3 in four bins, where nothing is wrong.
void add_site(hdf5::File& file, const Counts& counts, const Counts& shape = {2, 4},
              const Counts& channels_shape = {2, 1}) {
  const Values channels(at::multiply_integers(channels_shape), 3.0f);
  file.write("sites/a/counts", counts, shape);
  file.write("sites/a/channel_range", channels, channels_shape);
  for (const char* name : {"exponent", "zeros", "nans", "infinities"})
    file.set_attribute("sites/a", name, 0);
  for (const char* name : {"min", "max"}) file.set_attribute("sites/a", name, 3.0);
}

void write_file(const fs::path& path, const std::function<void(hdf5::File&)>& add) {
  hdf5::File file = hdf5::File::create(path);
  file.set_attribute("/", "format", "vernier-statistics");
  for (const char* name : {"model_fingerprint", "data_fingerprint"})
    file.set_attribute("/", name, "x");
  for (const char* name : {"version", "samples", "first_sample", "planned_samples"})
    file.set_attribute("/", name, 1);
  file.create_group("sites");
  add(file);
  file.close();
}

TEST(StatisticsFile, RefusesContentsThatAreWrong) {
  const TemporaryFolder folder;
  const fs::path path = folder / "s.h5";
  const Counts good = {0, 0, 0, 0, 0, 0, 0, 2}, shape = {2, 4}, columns = {4, 2}, flat = {8},
               six = {2, 6};
  write_file(path, [&](auto& file) { add_site(file, good); });
  EXPECT_EQ(load_statistics(path).sites.at("a").histogram, histogram_of({3, 3}, 4));
  const auto set = [&](const char* group, const char* name, const auto& value) {
    return [=](auto& file) { add_site(file, good), file.set_attribute(group, name, value); };
  };
  const std::pair<std::function<void(hdf5::File&)>, const char*> cases[] = {
      {set("/", "format", "vernier-checkpoint"), "not a statistics file"},
      {set("/", "version", 2), "version 2"},
      {set("/", "samples", 2), "sample counts"},
      {set("/", "first_sample", -1), "sample counts"},
      {set("sites/a", "exponent", 1), "site 'a'"},
      {set("sites/a", "exponent", int64_t{1} << 40), "exponent 1099511627776"},
      {set("sites/a", "nans", -1), "site 'a'"},
      {set("sites/a", "max", 1e300), "site 'a'"},
      {set("sites/a", "min", std::nan("")), "site 'a'"},
      {[&](auto& file) { file.create_group("sites/a"); }, "sites/a/counts"},
      {[&](auto& file) { file.write("sites/a/counts", good, columns); }, "sites/a/channel_range"},
      {[&](auto& file) { add_site(file, Counts(8, -1)); }, "site 'a'"},
      {[&](auto& file) { add_site(file, Counts(12, 1), six); }, "power of two"},
      {[&](auto& file) { add_site(file, good, flat); }, "'a' has datasets of the wrong shape"},
      {[&](auto& file) { add_site(file, good, columns); }, "'a' has datasets of the wrong shape"},
      {[&](auto& file) { add_site(file, good, shape, flat); }, "datasets of the wrong shape"},
      {[&](auto& file) { add_site(file, good, shape, columns); }, "datasets of the wrong shape"}};
  for (const auto& [add, part] : cases) {
    write_file(path, add);
    EXPECT_MESSAGE(load_statistics(path), part);
    EXPECT_MESSAGE(load_statistics(path), "s.h5");
  }
}

TEST(StatisticsFile, RefusesWhatIsNoWholeFile) {
  const TemporaryFolder folder;
  const fs::path path = folder / "s.h5";
  EXPECT_MESSAGE(load_statistics(path), "s.h5");  // missing
  EXPECT_MESSAGE(load_statistics(folder.path()), folder.path().string());
  hdf5::File foreign = hdf5::File::create(path);
  foreign.write("input_ids", Counts{1, 2}, {1, 2});
  foreign.close();
  EXPECT_MESSAGE(load_statistics(path), "not a statistics file");
  save_statistics(run_over(0, 4), path);
  const std::string whole = read_bytes(path);
  for (size_t i = 0; i < 32; ++i) {
    write_bytes(path, whole.substr(0, whole.size() * i / 32));
    EXPECT_MESSAGE(load_statistics(path), "s.h5") << i << "/32 of the file";
  }
}

TEST(StatisticsFile, AFailedSaveLeavesTheOldFile) {
  const TemporaryFolder folder;
  const ModelStatistics old = run_over(0, 4), next = run_over(0, 64);
  save_statistics(old, folder / "s.h5");
  const auto clear = [&] {
    return message_of([&] { save_statistics(next, folder / "s.h5"); }).find("s.h5") !=
           std::string::npos;
  };
  const auto done = ::testing::ExitedWithCode(0);
  const rlimit small{10000, 10000};  // a full disk
  EXPECT_EXIT(_exit(signal(SIGXFSZ, SIG_IGN) == SIG_ERR || setrlimit(RLIMIT_FSIZE, &small) != 0 ||
                    !clear()),
              done, "");
  ASSERT_EQ(chmod(folder.path().c_str(), 0555), 0);  // root, who may write anywhere, steps down
  EXPECT_EXIT(_exit((geteuid() == 0 && setuid(65534) != 0) || !clear()), done, "");
  ASSERT_EQ(chmod(folder.path().c_str(), 0755), 0);
  expect_equal(load_statistics(folder / "s.h5"), old);
  EXPECT_EQ(folder.entries(), 1);
  EXPECT_MESSAGE(save_statistics(next, folder / "missing/s.h5"), "missing");
}

}  // namespace
