#include <vernier/calibration/hdf5.h>
#include <vernier/calibration/statistics_file.h>
#include <vernier/kernels/error.h>

#include <algorithm>
#include <array>
#include <limits>
#include <tuple>
#include <utility>

namespace vernier {
namespace {

constexpr const char* kFormat = "vernier-statistics";
constexpr int64_t kVersion = 1;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

void write_statistics(const ModelStatistics& statistics, hdf5::File& file) {
  file.set_attribute("/", "format", kFormat);
  file.set_attribute("/", "version", kVersion);
  file.set_attribute("/", "model_fingerprint", statistics.fingerprint);
  file.set_attribute("/", "data_fingerprint", statistics.data);
  file.set_attribute("/", "samples", statistics.samples);
  file.set_attribute("/", "first_sample", statistics.first_sample);
  file.set_attribute("/", "planned_samples", statistics.planned);
  for (size_t i = 0; i < statistics.merged.size(); ++i) {
    const std::string group = concat("ranges/", i);
    file.create_group(group);
    file.set_attribute(group, "data_fingerprint", statistics.merged[i].data);
    file.set_attribute(group, "first_sample", statistics.merged[i].first);
    file.set_attribute(group, "samples", statistics.merged[i].count);
  }
  file.create_group("sites");
  for (const auto& [name, site] : statistics.sites) {
    const std::string group = "sites/" + name;
    const Histogram& histogram = site.histogram;
    file.write<int64_t>(group + "/counts", histogram.counts(),
                        std::array<int64_t, 2>{2, histogram.bins()});
    std::vector<float> channels;
    for (const Range& channel : site.channels) channels.push_back(channel.min);
    for (const Range& channel : site.channels) channels.push_back(channel.max);
    file.write(group + "/channel_range", channels, {2, static_cast<int64_t>(site.channels.size())});
    file.set_attribute(group, "exponent", int64_t{histogram.exponent()});
    file.set_attribute(group, "min", static_cast<double>(histogram.range().min));
    file.set_attribute(group, "max", static_cast<double>(histogram.range().max));
    file.set_attribute(group, "zeros", histogram.zeros());
    file.set_attribute(group, "nans", histogram.nans());
    file.set_attribute(group, "infinities", histogram.infinities());
  }
}

// The ranges in order, those that touch made one. Throws Error where two of the same data overlap;
// of data that is not known nothing can be said.
std::vector<SampleRange> united(std::vector<SampleRange> ranges) {
  std::sort(ranges.begin(), ranges.end(), [](const SampleRange& a, const SampleRange& b) {
    return std::tie(a.data, a.first, a.count) < std::tie(b.data, b.first, b.count);
  });
  std::vector<SampleRange> result;
  for (const SampleRange& range : ranges) {
    if (range.count == 0) continue;
    if (result.empty() || result.back().data != range.data || range.data.empty()) {
      result.push_back(range);
      continue;
    }
    SampleRange& last = result.back();
    const int64_t end = last.first + last.count;
    VERNIER_CHECK(end <= range.first, "samples ", range.first, " to ",
                  std::min(end, range.first + range.count) - 1, " of the data ", range.data,
                  " are in both: merge runs that share no sample");
    if (end == range.first) {
      last.count += range.count;
    } else {
      result.push_back(range);
    }
  }
  return result;
}

// The ranges of a merged file, as write_statistics leaves them.
std::vector<SampleRange> read_ranges(const hdf5::File& file, const ModelStatistics& statistics) {
  std::vector<SampleRange> ranges;
  int64_t samples = 0, first = std::numeric_limits<int64_t>::max();
  bool sound = true;
  for (const std::string& name : file.children("ranges")) {
    const std::string group = "ranges/" + name;
    SampleRange range{file.attribute_string(group, "data_fingerprint"),
                      file.attribute_int(group, "first_sample"),
                      file.attribute_int(group, "samples")};
    sound = sound && range.first >= 0 && range.count > 0 &&
            range.count <= std::numeric_limits<int64_t>::max() - range.first &&
            !__builtin_add_overflow(samples, range.count, &samples);
    first = std::min(first, range.first);
    ranges.push_back(std::move(range));
  }
  VERNIER_CHECK(sound && samples == statistics.samples && first == statistics.first_sample,
                "the merged ranges contradict the sample counts; the file is damaged");
  return united(std::move(ranges));
}

}  // namespace

std::vector<SampleRange> ModelStatistics::ranges() const {
  if (!merged.empty()) return merged;
  return {{data, first_sample, samples}};
}

void ModelStatistics::merge(const ModelStatistics& other) {
  VERNIER_CHECK(fingerprint == other.fingerprint,
                "the statistics are of different models (fingerprints ", fingerprint, " and ",
                other.fingerprint, "): merge only runs over the same one");
  for (const ModelStatistics* run : {static_cast<const ModelStatistics*>(this), &other})
    VERNIER_CHECK(run->samples == run->planned, "a run stopped after ", run->samples, " of ",
                  run->planned, " samples: finish it with --resume before merging");
  VERNIER_CHECK(sites.size() == other.sites.size(), "the statistics cover ", sites.size(), " and ",
                other.sites.size(), " layers: merge only runs over the same ones");
  std::vector<SampleRange> both = ranges();
  for (const SampleRange& range : other.ranges()) both.push_back(range);
  both = united(std::move(both));
  auto sum = sites;  // whole or not at all
  for (const auto& [name, site] : other.sites) {
    const auto mine = sum.find(name);
    VERNIER_CHECK(mine != sum.end(), "layer '", name,
                  "' is in only one of the statistics: merge only runs over the same layers");
    mine->second.merge(site);
  }
  sites = std::move(sum);
  if (data != other.data) data.clear();
  first_sample = std::min(first_sample, other.first_sample);
  samples += other.samples;
  planned += other.planned;
  merged.clear();
  if (both.size() > 1) merged = std::move(both);
}

void save_statistics(const ModelStatistics& statistics, const std::filesystem::path& path) {
  hdf5::write_atomically(path, [&](hdf5::File& file) { write_statistics(statistics, file); });
}

ModelStatistics load_statistics(const std::filesystem::path& path) {
  const hdf5::File file = hdf5::File::open(path);
  VERNIER_CHECK(file.has_attribute("/", "format") &&
                    file.attribute_string("/", "format") == kFormat && file.is_group("sites"),
                path.string(), " is not a statistics file: make one with `vernier calibrate`");
  const int64_t version = file.attribute_int("/", "version");
  VERNIER_CHECK(version == kVersion, path.string(), " has version ", version,
                " of the statistics format and this program reads version ", kVersion);
  ModelStatistics statistics;
  statistics.fingerprint = file.attribute_string("/", "model_fingerprint");
  statistics.data = file.attribute_string("/", "data_fingerprint");
  statistics.samples = file.attribute_int("/", "samples");
  statistics.first_sample = file.attribute_int("/", "first_sample");
  statistics.planned = file.attribute_int("/", "planned_samples");
  VERNIER_CHECK(
      statistics.first_sample >= 0 && statistics.samples >= 0 &&
          statistics.samples <= statistics.planned &&
          statistics.planned <= std::numeric_limits<int64_t>::max() - statistics.first_sample,
      path.string(), ": the sample counts contradict each other; the file is damaged");
  if (file.exists("ranges")) {
    try {
      statistics.merged = read_ranges(file, statistics);
    } catch (const Error& error) {
      throw Error(concat(path.string(), ": ", error.what()));
    }
  }
  for (const std::string& name : file.children("sites")) {
    const std::string group = "sites/" + name;
    const std::vector<int64_t> shape = file.info(group + "/counts").shape;
    const std::vector<int64_t> channel_shape = file.info(group + "/channel_range").shape;
    VERNIER_CHECK(
        shape.size() == 2 && shape[0] == 2 && channel_shape.size() == 2 && channel_shape[0] == 2,
        path.string(), ": site '", name, "' has datasets of the wrong shape");
    const int64_t exponent = file.attribute_int(group, "exponent");
    VERNIER_CHECK(exponent >= kSmallestExponent && exponent <= 127, path.string(), ": site '", name,
                  "' has the exponent ", exponent, "; the file is damaged");
    SiteStatistics site;
    try {
      site.histogram =
          Histogram(file.read<int64_t>(group + "/counts"), static_cast<int32_t>(exponent),
                    {static_cast<float>(file.attribute_double(group, "min")),
                     static_cast<float>(file.attribute_double(group, "max"))},
                    file.attribute_int(group, "zeros"), file.attribute_int(group, "nans"),
                    file.attribute_int(group, "infinities"));
    } catch (const Error& error) {
      throw Error(concat(path.string(), ": site '", name, "': ", error.what()));
    }
    const std::vector<float> bounds = file.read<float>(group + "/channel_range");
    const size_t channels = bounds.size() / 2;
    for (size_t c = 0; c < channels; ++c) {
      const bool empty = bounds[c] == kInfinity && bounds[channels + c] == -kInfinity;
      const bool ordered = std::isfinite(bounds[c]) && std::isfinite(bounds[channels + c]) &&
                           bounds[c] <= bounds[channels + c];
      VERNIER_CHECK(empty || ordered, path.string(), ": site '", name,
                    "' has a damaged range of channel ", c);
      site.channels.push_back({bounds[c], bounds[channels + c]});
    }
    statistics.sites.emplace(name, std::move(site));
  }
  return statistics;
}

}  // namespace vernier
