#include <c10/util/Exception.h>
#include <malloc.h>
#include <vernier/cli/commands.h>
#include <vernier/cli/console.h>
#include <vernier/kernels/error.h>

#include <csignal>
#include <new>

namespace {

// The first line of a message of another library, which may carry a stack trace.
std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

}  // namespace

int main(int argc, char** argv) {
  using namespace vernier::cli;
  // A file that grows beyond the limit is an error of its write, not the end of the program.
  std::signal(SIGXFSZ, SIG_IGN);
  // Activations are freed and allocated again all the time: kept in the heap, their pages need no
  // clearing by the kernel.
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  CLI::App app{"Quantization-aware training and calibration: what was trained is what runs."};
  app.set_version_flag("--version", "vernier " VERNIER_VERSION);
  app.require_subcommand(1);
  Action action;
  add_quantize(app, action);
  add_train(app, action);
  add_calibrate(app, action);
  add_smoothquant(app, action);
  add_export(app, action);
  add_validate(app, action);
  add_eval(app, action);
  add_generate(app, action);
  add_inspect(app, action);
  add_bench(app, action);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    const bool unknown = app.get_subcommands().empty() && argc > 1 && argv[1][0] != '-';
    note(vernier::concat(
        "vernier: ", unknown ? "unknown command '" + std::string(argv[1]) + "'" : error.what(),
        ": see vernier --help"));
    return kWrongUse;
  }
  try {
    return action();
  } catch (const vernier::Error& error) {
    note(std::string("vernier: ") + error.what());
  } catch (const c10::Error& error) {
    note("vernier: " + first_line(error.what_without_backtrace()));
  } catch (const std::bad_alloc&) {
    note("vernier: out of memory: use a smaller batch, or a machine with more");
  } catch (const std::exception& error) {
    note("vernier: " + first_line(error.what()));
  }
  return kWrongUse;
}
