// Outputs of the program appear whole or not at all, whoever stops it; shards merge to the bit.
#include <vernier/calibration/statistics_file.h>
#include <vernier/kernels/error.h>
#include <vernier/tests/cli_program.h>

#include <chrono>
#include <thread>
#include <utility>

namespace vernier::testing {
namespace {

TEST_F(CliTest, MergedShardsAreTheWholeRunBitForBit) {
  const std::string data = path("pairs.h5");
  const int64_t samples = 2 * kPairs;
  const auto share = [&](const char* name, int64_t first, int64_t count) {
    expect_done(calibrate(data, own(name),
                          {"--first", std::to_string(first), "--samples", std::to_string(count)}));
    return own(name);
  };
  expect_done(calibrate(data, own("whole.h5")));
  const Arguments shards = {share("a.h5", 0, 17), share("b.h5", 17, 1),
                            share("c.h5", 18, samples - 18)};
  for (const Arguments& order : {shards, Arguments{shards[2], shards[0], shards[1]}}) {
    const Json json = run_json(Arguments{"calibrate", "--out", own("sum.h5"), "--merge"} + order);
    EXPECT_EQ(json["samples"], samples);
    EXPECT_EQ(read_bytes(own("sum.h5")), read_bytes(own("whole.h5")));
  }
  expect_done(calibrate(data, own("rest.h5"), {"--first", "18"}));
  EXPECT_EQ(read_bytes(own("rest.h5")), read_bytes(shards[2]));
}

/// Starts a calibration, kills it when it has saved something, and gives back how it ended.
Outcome killed_in_the_middle(const Arguments& arguments, const fs::path& partial) {
  Program program(arguments);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!fs::exists(partial) && std::chrono::steady_clock::now() < deadline)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  program.kill();
  return program.wait();
}

TEST_F(CliTest, KilledRunsLeaveNoOutputAndGoOn) {
  write_tokens(own("data.h5"), random_rows(4000, 1, 1, 4));
  const std::string whole = own("whole.h5"), out = own("out.h5"), partial = out + ".partial";
  expect_done(calibrate(own("data.h5"), whole, {"--resume"}));  // nothing to resume: from the start
  const Arguments command = calibrate(own("data.h5"), out, {"--save-every", "32"});

  for (const bool older : {false, true}) {
    SCOPED_TRACE(older ? "over an older output" : "without an output");
    if (older) write_bytes(out, read_bytes(path("stats.h5")));
    const Outcome killed = killed_in_the_middle(command, partial);
    ASSERT_TRUE(WIFSIGNALED(killed.status)) << "it ended before: " << killed.err;
    if (older) {
      EXPECT_EQ(read_bytes(out), read_bytes(path("stats.h5")));
    } else {
      EXPECT_FALSE(fs::exists(out));
    }
    const ModelStatistics left = load_statistics(partial);
    EXPECT_GT(left.samples, 0);
    EXPECT_LT(left.samples, left.planned);

    // Neither another share of the data nor a recipe takes it for whole.
    expect_refused(run(command + Arguments{"--resume", "--first", "1"}), "remove it to start anew");
    expect_refused(run(export_to(own("m.h5"), {"--stats", partial})), "was interrupted after");
    expect_refused(run({"calibrate", "--out", own("m.h5"), "--merge", partial}), "--resume");
    EXPECT_FALSE(fs::exists(own("m.h5")));

    const Outcome resumed = run(command + Arguments{"--resume"});
    EXPECT_EQ(resumed.code(), 0) << resumed.err;
    EXPECT_CONTAINS(resumed.err, "going on after " + std::to_string(left.samples) + " of 4000");
    EXPECT_EQ(read_bytes(out), read_bytes(whole));
    EXPECT_FALSE(fs::exists(partial));
    fs::remove(out);
  }
}

TEST_F(CliTest, MemoryOfCalibrationDoesNotGrowWithTheData) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "the sanitizer keeps freed memory";
#endif
  write_tokens(own("data.h5"), random_rows(20000, 1, 1, 4));
  const auto peak = [&](const char* samples) {
    const Outcome outcome =
        Program(calibrate(own("data.h5"), own("out.h5"), {"--samples", samples})).wait();
    EXPECT_EQ(outcome.code(), 0) << outcome.err;
    return outcome.peak_bytes;
  };
  const int64_t few = peak("2000"), many = peak("20000");
  EXPECT_GT(few, 50'000'000);  // it was measured
  EXPECT_LT(many - few, 20'000'000);
}

TEST_F(CliTest, AFullDiskLeavesTheOldOutput) {
  const std::string out = own("out.h5"), old = read_bytes(path("stats.h5"));
  const std::pair<const char*, Arguments> cases[] = {
      {"calibrate", calibrate(path("tokens.h5"), out)},
      {"calibrate, saving", calibrate(path("tokens.h5"), out, {"--save-every", "1"})},
      {"merge", {"calibrate", "--out", out, "--merge", path("stats.h5")}},
      {"export", export_to(out, {"--stats", path("stats.h5")})},
      {"quantize", quantize("w8a8-static", out, {"--data", path("tokens.h5")})}};
  for (const auto& [what, arguments] : cases) {
    for (const rlim_t limit : {1000, 20000}) {
      SCOPED_TRACE(concat(what, ", ", limit));
      write_bytes(out, old);
      expect_refused(Program(arguments, limit).wait(), "process's limit allows");
      EXPECT_EQ(read_bytes(out), old);
      EXPECT_EQ(own_.entries(), 1u);
    }
  }
}

}  // namespace
}  // namespace vernier::testing
