// Runs the program and looks at how it ended, and the files that its tests share.
#pragma once

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/tiny_bert.h>
#include <nlohmann/json.hpp>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace vernier::testing {

namespace fs = std::filesystem;
using Json = nlohmann::json;

// ---- Running it ---------------------------------------------------------------------------------

using Arguments = std::vector<std::string>;

/// How a run ended and what it printed.
struct Outcome {
  int status = -1;  // as of wait()
  std::string out, err;
  int64_t peak_bytes = 0;  // resident

  int code() const { return WIFEXITED(status) ? WEXITSTATUS(status) : -1; }
};

/// A run of the program, begun by the constructor.
class Program {
 public:
  explicit Program(const Arguments& arguments, rlim_t largest_file = RLIM_INFINITY) {
    std::vector<char*> words = {const_cast<char*>(VERNIER_PROGRAM)};
    for (const std::string& argument : arguments)
      words.push_back(const_cast<char*>(argument.c_str()));
    words.push_back(nullptr);
    process_ = fork();
    if (process_ != 0) return;
    dup2(fileno(out_.get()), STDOUT_FILENO);
    dup2(fileno(err_.get()), STDERR_FILENO);
    if (largest_file != RLIM_INFINITY) {
      const rlimit limit = {largest_file, largest_file};
      setrlimit(RLIMIT_FSIZE, &limit);
    }
    // Threads that spin while they wait take seconds where others keep the cores busy.
    setenv("OMP_WAIT_POLICY", "passive", 0);
    execv(VERNIER_PROGRAM, words.data());
    _exit(127);
  }

  void kill() { ::kill(process_, SIGKILL); }

  Outcome wait() {
    Outcome outcome;
    rusage usage{};
    if (wait4(process_, &outcome.status, 0, &usage) != process_)
      throw std::runtime_error("the program is not there");
    outcome.peak_bytes = int64_t{usage.ru_maxrss} * 1024;
    outcome.out = text_of(*out_);
    outcome.err = text_of(*err_);
    return outcome;
  }

 private:
  using File = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

  static std::string text_of(std::FILE& file) {
    std::string text;
    std::rewind(&file);
    for (int c = std::fgetc(&file); c != EOF; c = std::fgetc(&file)) text += static_cast<char>(c);
    return text;
  }

  File out_{std::tmpfile(), std::fclose}, err_{std::tmpfile(), std::fclose};
  pid_t process_ = -1;
};

inline Outcome run(const Arguments& arguments) { return Program(arguments).wait(); }

inline Arguments operator+(Arguments left, const Arguments& right) {
  left.insert(left.end(), right.begin(), right.end());
  return left;
}

/// Runs a command with --json, which must end well (or as `code` says), and parses what it prints.
inline Json run_json(const Arguments& arguments, int code = 0) {
  const Outcome outcome = run(arguments + Arguments{"--json"});
  EXPECT_EQ(outcome.code(), code) << outcome.err;
  const Json json = Json::parse(outcome.out, nullptr, /*allow_exceptions=*/false);
  EXPECT_TRUE(json.is_object()) << outcome.out;
  return json;
}

inline void expect_done(const Arguments& arguments) {
  const Outcome outcome = run(arguments);
  ASSERT_EQ(outcome.code(), 0) << outcome.err;
}

/// Exit code 2, nothing on stdout and one line on stderr that contains `part`.
inline void expect_refused(const Outcome& outcome, const std::string& part) {
  EXPECT_EQ(outcome.code(), 2);
  EXPECT_EQ(outcome.out, "");
  EXPECT_EQ(outcome.err.find('\n') + 1, outcome.err.size()) << "not one line: " << outcome.err;
  EXPECT_CONTAINS(outcome.err, part);
}

// ---- Files of all tests -------------------------------------------------------------------------

inline constexpr int64_t kPairs = 30;

class CliTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    shared_ = std::make_unique<TemporaryFolder>();
    write_bert(path("model"));
    write_bert(path("other"), 2);
    write_pairs(path("pairs.h5"), kPairs);
    write_tokens(path("tokens.h5"), random_rows(40));
    expect_done({"calibrate", "--model", path("model"), "--data", path("tokens.h5"), "--out",
                 path("stats.h5"), "--device", "cpu"});
    expect_done({"export", "--model", path("model"), "--stats", path("stats.h5"), "--out",
                 path("model.h5")});
  }
  static void TearDownTestSuite() { shared_.reset(); }

  /// Of a file that all tests share.
  static std::string path(const std::string& name) { return *shared_ / name; }
  /// Of a file of this test.
  std::string own(const std::string& name) const { return own_ / name; }

  static Arguments calibrate(const std::string& data, const std::string& out,
                             const Arguments& more = {}) {
    return Arguments{"calibrate", "--model", path("model"), "--data", data,
                     "--out",     out,       "--device",    "cpu"} +
           more;
  }
  static Arguments quantize(const std::string& recipe, const std::string& out,
                            const Arguments& more = {}) {
    return Arguments{"quantize", "--model", path("model"), "--recipe", recipe,
                     "--out",    out,       "--device",    "cpu"} +
           more;
  }
  static Arguments validate(const Arguments& more = {}) {
    return Arguments{"validate", "--model", path("model.h5"), "--data", path("pairs.h5"),
                     "--device", "cpu"} +
           more;
  }
  static Arguments eval(const std::string& model, const std::string& metric,
                        const Arguments& more = {}) {
    return Arguments{"eval",     "--model", model,      "--data", path("pairs.h5"),
                     "--metric", metric,    "--device", "cpu"} +
           more;
  }
  static Arguments export_to(const std::string& out, const Arguments& more = {}) {
    return Arguments{"export", "--model", path("model"), "--out", out} + more;
  }

  static inline std::unique_ptr<TemporaryFolder> shared_;
  TemporaryFolder own_;
};

}  // namespace vernier::testing
