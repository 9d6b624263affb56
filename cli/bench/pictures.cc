#include <vernier/calibration/atomic_file.h>
#include <vernier/cli/bench/report.h>
#include <vernier/cli/charts.h>
#include <vernier/cli/console.h>
#include <vernier/kernels/error.h>

#include <algorithm>
#include <map>

namespace vernier::bench {

using cli::GroupedBars;
using cli::Reference;
using cli::StackedBars;

namespace {

std::string where_and_when(const Report& report) {
  const auto& versions = report.machine.versions;
  std::string text = report.machine.name;
  if (versions["cuda"].is_string())
    text += concat(", CUDA ", versions["cuda"].get<std::string>(), ", cuBLAS ",
                   versions["cublas"].get<std::string>());
  return concat(text, ", LibTorch ", versions["torch"].get<std::string>(), ", ",
                report.date.substr(0, 10));
}

// Adds a name to a list of names in the order of their first use; returns where it stands.
size_t place_of(std::vector<std::string>& names, const std::string& name) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) names.push_back(name);
  return static_cast<size_t>(std::find(names.begin(), names.end(), name) - names.begin());
}

// "8192x8192 static" as a label: the variant on a line of its own.
std::string shape_label(const Row& row) {
  std::string label = row.shape;
  std::replace(label.begin(), label.end(), ' ', '\n');
  return label;
}

using Value = std::function<std::optional<double>(const Row&)>;

// One group for each value of group_of(row), one series for each value of series_of(row); rows with
// an empty group are left out. What is ours comes first, in the colours that are looked for.
void fill(GroupedBars& chart, const std::vector<Row>& rows,
          const std::function<std::string(const Row&)>& group_of,
          const std::function<std::string(const Row&)>& series_of, const Value& value_of) {
  std::vector<std::string> names;
  for (const Row& row : rows)
    if (!group_of(row).empty() && row.implementation == kVernier) place_of(names, series_of(row));
  for (const Row& row : rows)
    if (!group_of(row).empty()) {
      place_of(chart.groups, group_of(row));
      place_of(names, series_of(row));
    }
  for (const std::string& name : names)
    chart.series.push_back({name, std::vector<std::optional<double>>(chart.groups.size())});
  for (const Row& row : rows)
    if (!group_of(row).empty())
      chart.series[place_of(names, series_of(row))].values[place_of(chart.groups, group_of(row))] =
          value_of(row);
}

// The name of the implementation that the speed-up of a work is over: its first row.
std::string baseline_of(const Report& report, const std::string& work) {
  for (const Row& row : report.rows)
    if (row.work == work) return row.implementation;
  return "";
}

GroupedBars speedup_chart(const Report& report, const std::string& work) {
  GroupedBars chart;
  const std::string baseline = baseline_of(report, work);
  chart.title = concat(work, ": speed-up over ", baseline);
  chart.subtitle = where_and_when(report);
  chart.unit = "times as fast";
  chart.references = {{1, baseline}};
  fill(
      chart, report.rows,
      [&](const Row& row) {
        const bool shown = row.work == work && row.implementation != baseline && row.speedup;
        return shown ? shape_label(row) : std::string();
      },
      [](const Row& row) { return row.implementation; },
      [](const Row& row) { return row.speedup; });
  return chart;
}

// Where the time of quantize_gemm goes, in units of the bf16 product of the same shape, since the
// shapes' times differ by a factor of hundreds.
StackedBars breakdown_chart(const Report& report) {
  StackedBars chart;
  const std::string baseline = baseline_of(report, "quantize_gemm");
  chart.title = "quantize_gemm: where the time goes";
  chart.subtitle = where_and_when(report);
  chart.unit = concat("time of each step by itself; 1 = ", baseline, " of the same shape");
  chart.reference = Reference{1, baseline};
  for (const Row& row : report.rows)
    for (const auto& step : row.steps) place_of(chart.parts, step.first);
  for (const Row& row : report.rows) {
    if (row.steps.empty() || !row.speedup) continue;
    const double unit = row.us * *row.speedup;
    if (chart.groups.empty() || chart.groups.back().name != row.shape)
      chart.groups.push_back({row.shape, {}});
    StackedBars::Bar bar;
    bar.name = row.implementation;
    bar.parts.resize(chart.parts.size());
    for (const auto& [name, us] : row.steps) bar.parts[place_of(chart.parts, name)] = us / unit;
    bar.label = concat(cli::fixed(row.us, 1), " us in all");
    chart.groups.back().bars.push_back(std::move(bar));
  }
  return chart;
}

GroupedBars tops_chart(const Report& report) {
  GroupedBars chart;
  const Roof& roof = report.machine.roof;
  chart.title = "Matrix products: operations a second";
  chart.subtitle = where_and_when(report);
  if (roof.int8_tops > 0) {
    chart.references = {{roof.int8_tops, "INT8 and FP8 peak"}, {roof.bf16_tops, "bf16 peak"}};
    chart.subtitle += concat("; peak: ", roof.how.substr(roof.how.find("; ") + 2));
  }
  chart.unit = "TOPS";
  fill(
      chart, report.rows,
      [&](const Row& row) {
        const bool ours = row.implementation == kVernier;
        const bool shown =
            row.tops && (ours || (row.work == "w8a8_gemm" &&
                                  row.implementation == baseline_of(report, row.work)));
        return shown ? row.shape : std::string();
      },
      [](const Row& row) { return row.implementation == kVernier ? row.work : row.implementation; },
      [](const Row& row) { return row.tops; });
  return chart;
}

// What steps of a model need of the GPU's memory, in units of the plain layers' step.
GroupedBars memory_chart(const Report& report) {
  GroupedBars chart;
  chart.title = "Steps of a model: memory needed at most";
  chart.subtitle = where_and_when(report);
  chart.unit = "times the plain step's";
  std::map<std::string, double> plain;  // by work and shape
  const auto key = [](const Row& row) { return concat(row.work, "\n", shape_label(row)); };
  for (const Row& row : report.rows)
    if (row.peak_mib && row.implementation == baseline_of(report, row.work))
      plain[key(row)] = *row.peak_mib;
  if (!plain.empty()) chart.references = {{1, "the plain step"}};
  fill(
      chart, report.rows,
      [&](const Row& row) {
        const bool shown = row.peak_mib && plain.contains(key(row)) &&
                           row.implementation != baseline_of(report, row.work);
        return shown ? key(row) : std::string();
      },
      [](const Row& row) { return row.implementation; },
      [&](const Row& row) { return std::optional(*row.peak_mib / plain.at(key(row))); });
  return chart;
}

GroupedBars bandwidth_chart(const Report& report) {
  GroupedBars chart;
  const Roof& roof = report.machine.roof;
  chart.title = "Works bound by memory: bytes that must move, a second";
  chart.subtitle = where_and_when(report);
  if (roof.gbs > 0) {
    chart.references = {{roof.gbs, "memory's peak"}};
    chart.subtitle += concat("; peak: ", roof.how.substr(0, roof.how.find(';')));
  }
  chart.unit = "GB/s";
  fill(
      chart, report.rows,
      [&](const Row& row) {
        const bool shown =
            row.gbs && (row.implementation == kVernier || row.implementation == "copy" ||
                        row.implementation == baseline_of(report, row.work));
        return shown ? concat(row.work, "\n", shape_label(row)) : std::string();
      },
      [](const Row& row) { return row.implementation; }, [](const Row& row) { return row.gbs; });
  return chart;
}

}  // namespace

std::vector<std::string> write_pictures(const Report& report, const std::filesystem::path& folder) {
  std::vector<std::string> names;
  const auto write = [&](const std::string& name, const auto& chart) {
    if (chart.groups.empty()) return;
    write_text_atomically(folder / name, to_svg(chart));
    names.push_back(name);
  };
  std::vector<std::string> measured;
  for (const Row& row : report.rows) place_of(measured, row.work);
  for (const std::string& work : measured)
    write(concat("speedup_", work, ".svg"), speedup_chart(report, work));
  write("breakdown.svg", breakdown_chart(report));
  write("tops.svg", tops_chart(report));
  write("bandwidth.svg", bandwidth_chart(report));
  write("memory.svg", memory_chart(report));
  return names;
}

}  // namespace vernier::bench
