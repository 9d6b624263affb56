#include <torch/torch.h>
#include <vernier/calibration/atomic_file.h>
#include <vernier/cli/bench/report.h>
#include <vernier/cli/commands.h>
#include <vernier/cli/console.h>
#include <vernier/kernels/error.h>

#include <algorithm>

namespace vernier::cli {
namespace {

using bench::Shape;
using bench::Work;

struct Options {
  CommonOptions common;
  std::vector<std::string> works, shapes;
  std::string plot;
  bool quick = false;
  double seconds = 0.2;
};

// A name is that of a work, or what the names of several begin with: qat for qat_linear and
// qat_block.
bool is_named(const Work& work, const std::string& name) {
  return work.name == name || work.name.starts_with(name + "_");
}

std::string names_of_works() {
  std::string names;
  for (const Work& work : bench::works())
    if (work.variant.empty()) names += (names.empty() ? "" : ", ") + work.name;
  return names;
}

struct Task {
  const Work* work;
  Shape shape;
};

std::vector<Task> tasks(const Options& options, const bench::Place& place) {
  for (const std::string& name : options.works) {
    const auto& works = bench::works();
    VERNIER_CHECK(std::any_of(works.begin(), works.end(),
                              [&](const Work& work) { return is_named(work, name); }),
                  "unknown work '", name, "': use ", names_of_works());
  }
  std::vector<Shape> asked;
  for (const std::string& text : options.shapes) asked.push_back(bench::parse_shape(text));
  std::vector<Task> tasks;
  for (const Work& work : bench::works()) {
    const bool named = std::any_of(options.works.begin(), options.works.end(),
                                   [&](const std::string& name) { return is_named(work, name); });
    if (!named && !options.works.empty()) continue;
    if (work.needs_cuda && !place.cuda()) {
      VERNIER_CHECK(!named, work.name, " needs a GPU: use --device cuda");
      continue;
    }
    if (asked.empty()) {
      for (const Shape shape : work.default_shapes(place, options.quick))
        tasks.push_back({&work, shape});
    }
    for (const Shape shape : asked) {
      // Shapes of the other kind are for the other works, unless one was named.
      const bool fits = (shape.n > 0) == work.is_gemm();
      VERNIER_CHECK(fits || !named, work.name, " takes --shape ", work.is_gemm() ? "MxKxN" : "MxK",
                    ", not ", shape.str());
      if (fits) tasks.push_back({&work, shape});
    }
  }
  return tasks;
}

int run(const Options& options) {
  VERNIER_CHECK(options.seconds >= 0 && options.seconds <= 3600,
                "--seconds must be between 0 and 3600, not ", options.seconds);
  const bench::Place place = bench::place_on(options.common.chosen_device());
  const std::vector<Task> todo = tasks(options, place);
  if (!options.plot.empty()) {
    std::error_code failed;
    std::filesystem::create_directories(options.plot, failed);
    VERNIER_CHECK(!failed, "--plot ", options.plot, ": ", failed.message());
    const AtomicFile writable(std::filesystem::path(options.plot) / "bandwidth.svg");
  }

  const torch::NoGradGuard no_grad;
  const bench::WorkStream stream(place);
  bench::Effort effort;
  effort.seconds = options.quick ? std::min(options.seconds, 0.02) : options.seconds;
  bench::Report report;
  report.machine = bench::describe(place);
  report.date = bench::utc_now();
  for (const Task& task : todo) bench::run_case(place, *task.work, task.shape, effort, report);

  if (!options.plot.empty())
    for (const std::string& name : bench::write_pictures(report, options.plot))
      note((std::filesystem::path(options.plot) / name).string());
  if (options.common.json) {
    print_json(bench::to_json(report));
  } else {
    bench::print(report);
  }
  return report.failures.empty() ? kDone : kBoundNotMet;
}

}  // namespace

void add_bench(CLI::App& app, Action& action) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("bench", "the kernels on this machine beside cuBLAS, cuBLASLt and torch");
  command->add_option("work", options->works,
                      "what to measure (default: all): " + names_of_works());
  command
      ->add_option("--shape", options->shapes,
                   "MxKxN for matrix products, MxK for works on one tensor (prefill: sequences x "
                   "tokens), in place of the default ones; may be given more than once")
      ->allow_extra_args(false);
  command->add_option("--plot", options->plot, "write SVG pictures into this folder");
  command->add_flag("--quick", options->quick, "fewer shapes, and the fewest repetitions");
  command
      ->add_option("--seconds", options->seconds,
                   "measure each implementation for so long at least")
      ->capture_default_str();
  options->common.add_to(*command);
  command->callback([options, &action] { action = [options] { return run(*options); }; });
}

}  // namespace vernier::cli
