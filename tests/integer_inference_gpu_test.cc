// Fused integer inference on the GPU: groups of linear layers and rotary embeddings as on the CPU,
// without making the host wait.
#include <c10/cuda/CUDAFunctions.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <vernier/kernels/rotary.h>
#include <vernier/tests/gpu_compare.h>
#include <vernier/tests/linear_group_cases.h>
#include <vernier/tests/rotary_cases.h>

namespace vernier {
namespace {

using testing::gpu;
using testing::group_input_schemes;
using testing::group_layers;
using testing::group_uses;
using testing::GroupUse;
using testing::rotary_tables;
using testing::same;
using torch::Tensor;

constexpr torch::Dtype kDtypes[] = {torch::kFloat, torch::kHalf, torch::kBFloat16};

class IntegerInferenceGpuTest : public testing::GpuTest {};

TEST_F(IntegerInferenceGpuTest, FusedAsOneByOneAndWithoutWaiting) {
  for (const Scheme& scheme : group_input_schemes()) {
    for (const torch::Dtype dtype : kDtypes) {
      auto layers = group_layers(scheme, dtype, torch::kCUDA);
      const LinearGroup group(layers);
      for (const GroupUse& use : group_uses(dtype, torch::kCUDA)) {
        SCOPED_TRACE(to_string(scheme) + " " + c10::toString(dtype) + " " + use.name);
        ASSERT_TRUE(group.fuses(layers[0]->weight.device()));
        c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_ERROR);
        const std::vector<Tensor> fused = use.run(group);
        c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_DISABLED);
        layers[0]->set_probe([](const std::vector<Tensor>&, const Tensor&) {});
        ASSERT_FALSE(group.fuses(layers[0]->weight.device()));
        const std::vector<Tensor> single = use.run(group);
        layers[0]->set_probe(nullptr);
        for (size_t i = 0; i < fused.size(); ++i) EXPECT_TRUE(same(single[i].cpu(), fused[i]));
      }
    }
  }
}

TEST_F(IntegerInferenceGpuTest, RotaryAsOnTheCpu) {
  for (const torch::Dtype dtype : kDtypes) {
    for (const int64_t size : {64, 80, 24, 10}) {
      for (const int64_t half : {size / 2, size / 8, int64_t{0}}) {
        const auto [cosine, sine] = rotary_tables(19, half);
        const Tensor wide = torch::randn({57, 7 * size}).to(dtype);
        const Tensor x = wide.narrow(1, 2 * size, 5 * size).unflatten(1, {5, size});
        SCOPED_TRACE(c10::toString(dtype) + std::string(" ") + std::to_string(size) + " " +
                     std::to_string(half));
        const Tensor on_gpu = gpu(wide).narrow(1, 2 * size, 5 * size).unflatten(1, {5, size});
        EXPECT_TRUE(same(rotary_embedding(x, cosine, sine),
                         rotary_embedding(on_gpu, gpu(cosine), gpu(sine))));
        const Tensor odd = gpu(wide).narrow(1, 1, 5 * size).unflatten(1, {5, size});
        EXPECT_TRUE(same(rotary_embedding(odd.cpu(), cosine, sine),
                         rotary_embedding(odd, gpu(cosine), gpu(sine))));
      }
    }
  }
}

}  // namespace
}  // namespace vernier
