// `vernier train`: from the model alone to a checkpoint, killed and resumed, and what it refuses.
#include <vernier/tests/cli_program.h>
#include <vernier/tests/tiny_llama.h>

#include <chrono>
#include <thread>

namespace vernier::testing {
namespace {

class CliTrain : public CliTest {
 protected:
  std::string llama() {
    const std::string folder = own("llama");
    if (!fs::exists(folder)) write_llama(folder);
    return folder;
  }
  Arguments train(const std::string& out, int64_t steps, const Arguments& more = {}) {
    return Arguments{"train",
                     "--device",
                     "cpu",
                     "--model",
                     llama(),
                     "--out",
                     out,
                     "--steps",
                     std::to_string(steps),
                     "--windows",
                     "8",
                     "--window-length",
                     "12",
                     "--batch-size",
                     "4",
                     "--report-every",
                     "2"} +
           more;
  }
};

TEST_F(CliTrain, FromTheModelAlone) {
  write_tokens(own("eval.h5"), random_rows(6, 1, 12, 12));
  const Json json = run_json(train(own("out.h5"), 40,
                                   {"--lr", "2e-3", "--eval-data", own("eval.h5"), "--float-out",
                                    own("float"), "--tolerance", "1"}));
  EXPECT_EQ(json["recipe"], "qat-lm-w4a8");
  EXPECT_EQ(json["steps"], 40);
  EXPECT_GT(json["tokens_per_second"], 0);
  EXPECT_EQ(json["code_mismatches"], 0);
  EXPECT_TRUE(fs::exists(fs::path(own("float")) / "model.safetensors"));
  expect_done({"inspect", own("out.h5")});

  // The folder's weights are the codes' real values.
  const auto quantized = load_text_model(own("out.h5"));
  const auto plain = load_text_model(own("float"));
  const std::string name = "model.layers.0.mlp.up_proj.weight";
  EXPECT_TRUE(torch::equal(quantized->named_parameters()[name], plain->named_parameters()[name]));
}

TEST_F(CliTrain, KilledTrainingsGoOnToTheByte) {
  const Arguments saving = {"--checkpoint-every", "2"};
  expect_done(train(own("whole.h5"), 300, saving));
  {
    Program program(train(own("out.h5"), 300, saving));
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(120);
    while (!fs::exists(own("out.h5.training")) && std::chrono::steady_clock::now() < deadline)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    program.kill();
    const Outcome killed = program.wait();
    ASSERT_TRUE(WIFSIGNALED(killed.status)) << "it ended before: " << killed.err;
  }
  EXPECT_FALSE(fs::exists(own("out.h5")));
  expect_refused(run(train(own("out.h5"), 301, {"--resume"})), "another steps");
  const Outcome resumed = run(train(own("out.h5"), 300, {"--resume"}));
  ASSERT_EQ(resumed.code(), 0) << resumed.err;
  EXPECT_CONTAINS(resumed.err, "going on after step");
  EXPECT_EQ(read_bytes(own("out.h5")), read_bytes(own("whole.h5")));
}

TEST_F(CliTrain, Mistakes) {
  expect_refused(run(train(own("out.h5"), 0)), "steps must be at least 1");
  expect_refused(run(train(own("out.h5"), 2, {"--resume"})), "does not exist");
  expect_refused(run(train(own("out.h5"), 2, {"--recipe", "no-such"})), "unknown recipe");
  expect_refused(run(train(own("out.h5"), 2, {"--precision", "int4"})), "unknown precision");
  expect_refused(run(train(own("none/out.h5"), 2)), "none");
  expect_refused(run({"train", "--device", "cpu", "--model", path("model"), "--out", own("out.h5"),
                      "--recipe", "qat-w4a8"}),
                 "--data");
  EXPECT_FALSE(fs::exists(own("out.h5")));
}

}  // namespace
}  // namespace vernier::testing
