// Causal families on the GPU: the logits of transformers, caches, half precision, integers.
#include <torch/torch.h>
#include <vernier/qat/layer.h>
#include <vernier/recipes/recipe.h>
#include <vernier/tests/family_fixtures.h>
#include <vernier/tests/gpu_compare.h>

namespace vernier {
namespace {

using testing::Expected;
using testing::kFamilies;
using testing::logits_of;
using testing::relative_error;
using torch::Tensor;

class FamiliesGpuTest : public testing::GpuTest {
 protected:
  /// Every fixture with its model and tokens on the GPU.
  template <typename F>
  void for_each_family(const F& test) {
    const torch::NoGradGuard no_grad;
    for (const char* name : kFamilies) {
      SCOPED_TRACE(name);
      Expected expected(name);
      expected.model->to(torch::kCUDA);
      expected.batch.tokens = expected.batch.tokens.cuda();
      test(expected);
    }
  }
};

TEST_F(FamiliesGpuTest, LogitsEqualThoseOfTransformers) {
  for_each_family([](Expected& expected) {
    EXPECT_LT(relative_error(logits_of(*expected.model, expected.batch).cpu(), expected.logits),
              1e-4);
  });
}

TEST_F(FamiliesGpuTest, CachesChangeNothing) {
  for_each_family([](Expected& expected) {
    for (const auto dtype : {torch::kFloat, torch::kBFloat16}) {
      expected.model->to(dtype);
      const double bound = dtype == torch::kFloat ? 1e-4 : 0.05;
      const Tensor whole = logits_of(*expected.model, expected.part(10, 24));
      const auto cache = expected.model->make_cache(1, 24);
      int64_t first = 0;
      for (const int64_t length : {10, 1, 1, 12}) {
        const Tensor next =
            logits_of(*expected.model, expected.part(10 + first, length), cache.get());
        EXPECT_LT(relative_error(next.to(torch::kFloat),
                                 whole.narrow(0, first, length).to(torch::kFloat)),
                  bound)
            << first;
        first += length;
      }
    }
  });
}

TEST_F(FamiliesGpuTest, HalfPrecisionIsNear) {
  for_each_family([](Expected& expected) {
    for (const auto dtype : {torch::kBFloat16, torch::kHalf}) {
      expected.model->to(dtype);
      const Tensor half = logits_of(*expected.model, expected.batch).to(torch::kFloat).cpu();
      EXPECT_LT(((half - expected.logits).norm() / expected.logits.norm()).item<double>(),
                dtype == torch::kHalf ? 0.02 : 0.1);
    }
  });
}

TEST_F(FamiliesGpuTest, IntegersAreNearThoseOfTheCpu) {
  for_each_family([](Expected& expected) {
    expected.model->to(torch::kCPU);
    expected.batch.tokens = expected.batch.tokens.cpu();
    apply_recipe(*expected.model, load_recipe("w8a8-dynamic"));
    calibrate_layers(*expected.model, {});
    set_mode(*expected.model, Mode::integer);
    const Tensor on_cpu = logits_of(*expected.model, expected.batch);
    set_mode(*expected.model, Mode::full);
    expected.model->to(torch::kCUDA);
    expected.batch.tokens = expected.batch.tokens.cuda();
    set_mode(*expected.model, Mode::integer);
    // A code that rounds the other way in one layer spreads over those behind it.
    const Tensor on_gpu = logits_of(*expected.model, expected.batch).cpu();
    EXPECT_LT(((on_gpu - on_cpu).norm() / on_cpu.norm()).item<double>(), 0.02);
  });
}

}  // namespace
}  // namespace vernier
