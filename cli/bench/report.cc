#include <torch/torch.h>
#include <vernier/cli/bench/report.h>
#include <vernier/cli/console.h>
#include <vernier/kernels/error.h>

#include <algorithm>
#include <cmath>
#include <ctime>

#ifdef VERNIER_WITH_CUDA
#include <c10/cuda/CUDACachingAllocator.h>
#endif

namespace vernier::bench {
namespace {

std::string first_line(const std::exception& error) {
  // c10 errors carry a backtrace in what().
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  const std::string text = torch_error ? torch_error->what_without_backtrace() : error.what();
  return text.substr(0, text.find('\n'));
}

constexpr double kReplayUs = 2000;
constexpr double kReplayUsOnCpu = 500;
// Of steps of a model: long enough for the GPU to settle at the clock that the power they need
// leaves it, whatever ran before.
constexpr double kLaunchedUs = 20000;

// What a call needs of the GPU's memory at most, beyond what was there before it and with its
// results, in MiB.
std::optional<double> peak_mib([[maybe_unused]] const Place& place,
                               [[maybe_unused]] const Run& run) {
#ifdef VERNIER_WITH_CUDA
  namespace allocator = c10::cuda::CUDACachingAllocator;
  if (!place.cuda()) return std::nullopt;
  const auto bytes = [&] {
    return allocator::getDeviceStats(place.device.index())
        .allocated_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
  };
  const int64_t before = bytes().current;
  allocator::resetPeakStats(place.device.index());
  run(0);
  return static_cast<double>(bytes().peak - before) / (1 << 20);
#else
  return std::nullopt;
#endif
}

}  // namespace

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text;
}

void run_case(const Place& place, const Work& work, Shape shape, const Effort& effort,
              Report& report) {
  const std::string shape_text = shape.str() + (work.variant.empty() ? "" : " " + work.variant);
  const std::string title = work.name + " " + shape_text;
  torch::manual_seed(0);
  Case c = work.prepare(place, shape);
  for (const std::string& reason : c.left_out) cli::note(concat(title, ": without ", reason));

  const double target_us = place.cuda() ? kReplayUs : kReplayUsOnCpu;
  std::vector<std::unique_ptr<Timed>> timed;
  std::vector<Implementation*> implementations;
  for (Implementation& implementation : c.implementations) {
    const std::string name = title + ", " + implementation.name;
    try {
      const std::string wrong = implementation.check(implementation.run(0));
      if (!wrong.empty()) {
        report.failures.push_back(concat(name, ": ", wrong));
        cli::note("WRONG: " + report.failures.back());
        continue;
      }
      implementation.check = nullptr;  // and the reference that it holds
      timed.push_back(c.launched ? make_launched(place, implementation.run, c.sets,
                                                 place.cuda() ? kLaunchedUs : target_us)
                                 : make_timed(place, implementation.run, c.sets, target_us));
      implementations.push_back(&implementation);
      if (!timed.back()->captured() && !c.launched)
        cli::note(name + ": timed without a CUDA graph");
    } catch (const std::exception& error) {
      // A peer may not be able to do everything. Ours has to, and so has the baseline.
      const bool peer = implementation.name != kVernier && &implementation != &c.implementations[0];
      if (peer) {
        cli::note(concat(title, ": without ", implementation.name, ": ", first_line(error)));
      } else {
        report.failures.push_back(concat(name, ": ", first_line(error)));
        cli::note("FAILED: " + report.failures.back());
      }
    }
  }

  const std::vector<double> us = measure(timed, effort);
  timed.clear();
  std::optional<double> baseline;
  for (size_t i = 0; i < us.size(); ++i)
    if (implementations[i] == &c.implementations[0]) baseline = us[i];
  std::optional<double> ours;
  for (size_t i = 0; i < us.size(); ++i) {
    Row row;
    row.work = work.name;
    row.shape = shape_text;
    row.implementation = implementations[i]->name;
    row.us = us[i];
    if (c.operations > 0) row.tops = c.operations / us[i] * 1e-6;
    if (c.bytes > 0) row.gbs = c.bytes / us[i] * 1e-3;
    if (c.tokens > 0) row.tokens_a_second = c.tokens / us[i] * 1e6;
    if (c.launched) row.peak_mib = peak_mib(place, implementations[i]->run);
    if (baseline) row.speedup = *baseline / us[i];
    if (row.implementation == kVernier) ours = row.speedup;
    std::vector<std::unique_ptr<Timed>> steps;
    for (const Step& step : implementations[i]->steps)
      steps.push_back(make_timed(place, step.run, c.sets, target_us));
    const std::vector<double> step_us = measure(steps, effort);
    for (size_t s = 0; s < step_us.size(); ++s)
      row.steps.emplace_back(implementations[i]->steps[s].name, step_us[s]);
    report.rows.push_back(std::move(row));
  }
  if (ours)
    cli::note(
        concat(title, ": ", cli::fixed(*ours, 2), " of the speed of ", c.implementations[0].name));
#ifdef VERNIER_WITH_CUDA
  c = Case();
  if (place.cuda()) c10::cuda::CUDACachingAllocator::emptyCache();
#endif
}

nlohmann::ordered_json to_json(const Report& report) {
  const auto rounded = [](double value) { return std::round(value * 1e3) / 1e3; };
  nlohmann::ordered_json json;
  json["device"] = report.machine.name;
  json["versions"] = report.machine.versions;
  json["date"] = report.date;
  const Roof& roof = report.machine.roof;
  if (roof.gbs > 0) {
    json["roof"] = {{"gbs", rounded(roof.gbs)}, {"how", roof.how}};
    if (roof.int8_tops > 0) json["roof"]["int8_tops"] = rounded(roof.int8_tops);
    if (roof.bf16_tops > 0) json["roof"]["bf16_tops"] = rounded(roof.bf16_tops);
  }
  json["rows"] = nlohmann::ordered_json::array();
  for (const Row& row : report.rows) {
    nlohmann::ordered_json item;
    item["work"] = row.work;
    item["shape"] = row.shape;
    item["implementation"] = row.implementation;
    item["us"] = rounded(row.us);
    if (row.tops) item["tops"] = rounded(*row.tops);
    if (row.gbs) item["gbs"] = rounded(*row.gbs);
    if (row.tokens_a_second) item["tokens_a_second"] = std::round(*row.tokens_a_second);
    if (row.peak_mib) item["peak_mib"] = rounded(*row.peak_mib);
    item["speedup"] = row.speedup ? nlohmann::ordered_json(rounded(*row.speedup)) : nullptr;
    for (const auto& [step, us] : row.steps) item["steps_us"][step] = rounded(us);
    json["rows"].push_back(std::move(item));
  }
  if (!report.failures.empty()) json["failures"] = report.failures;
  return json;
}

void print(const Report& report) {
  double largest = 1;
  for (const Row& row : report.rows) largest = std::max(largest, row.speedup.value_or(0));
  // Eighths of a character cell; padded, since the last column is aligned to the right.
  const auto bar = [&](double value) {
    static const char* const kEighths[] = {"", "▏", "▎", "▍", "▌", "▋", "▊", "▉"};
    constexpr int kCells = 24;
    const int eighths = static_cast<int>(std::lround(value / largest * kCells * 8));
    std::string text;
    for (int i = 0; i < eighths / 8; ++i) text += "█";
    text += kEighths[eighths % 8];
    return text + std::string(static_cast<size_t>(kCells - (eighths + 7) / 8), ' ');
  };
  std::vector<std::vector<std::string>> table;
  const bool reads = std::any_of(report.rows.begin(), report.rows.end(),
                                 [](const Row& row) { return row.tokens_a_second.has_value(); });
  const auto add = [&](std::vector<std::string> cells, const std::string& tokens) {
    if (reads) cells.insert(cells.begin() + 2, tokens);
    table.push_back(std::move(cells));
  };
  add({"work and implementation", "us", "TOPS", "GB/s", "peak MiB", "speed-up", ""}, "tokens/s");
  const Row* before = nullptr;
  for (const Row& row : report.rows) {
    if (!before || before->work != row.work || before->shape != row.shape)
      table.push_back({row.work + " " + row.shape});
    add({"  " + row.implementation, cli::fixed(row.us, row.us < 1000 ? 2 : 1),
         row.tops ? cli::fixed(*row.tops, *row.tops < 10 ? 2 : 1) : "",
         row.gbs ? cli::fixed(*row.gbs, *row.gbs < 100 ? 1 : 0) : "",
         row.peak_mib ? cli::fixed(*row.peak_mib, 1) : "",
         row.speedup ? cli::fixed(*row.speedup, 2) + "x" : "",
         row.speedup ? bar(*row.speedup) : ""},
        row.tokens_a_second ? cli::grouped(std::llround(*row.tokens_a_second)) : "");
    before = &row;
  }
  cli::print_table(table);
}

}  // namespace vernier::bench
