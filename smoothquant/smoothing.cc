#include <vernier/kernels/error.h>
#include <vernier/smoothquant/smoothing.h>

#include <algorithm>
#include <cmath>

namespace vernier {
namespace {

using torch::Tensor;

void check_amax(const Tensor& amax, const char* what) {
  VERNIER_CHECK(amax.dim() == 1 && amax.scalar_type() == torch::kFloat, what,
                " must be float32 with one dimension, not ", amax.sizes());
  VERNIER_CHECK(amax.isfinite().all().item<bool>() && amax.ge(0).all().item<bool>(), what,
                " holds a value that is negative, NaN or infinite");
}

// The new values in the old dtype, checked before anything is overwritten.
Tensor checked(const Tensor& values, const Tensor& original, const char* what) {
  const Tensor result = values.to(original.scalar_type());
  VERNIER_CHECK(result.isfinite().all().item<bool>(), "the smoothed ", what, " overflows ",
                c10::toString(original.scalar_type()), ": use a smaller alpha or a wider dtype");
  return result;
}

}  // namespace

Tensor channel_amax(const SiteStatistics& statistics) {
  VERNIER_CHECK(!statistics.channels.empty(),
                "the statistics hold no channel ranges: the site was never reached");
  Tensor amax = torch::empty({static_cast<int64_t>(statistics.channels.size())}, torch::kFloat);
  std::transform(statistics.channels.begin(), statistics.channels.end(), amax.data_ptr<float>(),
                 [](const Range& channel) {
                   // A channel without a finite value says {+inf, -inf} and counts as dead.
                   if (channel.min > channel.max) return 0.0f;
                   return std::max(std::fabs(channel.min), std::fabs(channel.max));
                 });
  return amax;
}

Tensor input_channel_amax(const std::vector<Tensor>& weights) {
  VERNIER_CHECK(!weights.empty(), "smoothing needs at least one weight that reads the activation");
  Tensor amax;
  for (const Tensor& weight : weights) {
    VERNIER_CHECK(weight.dim() == 2 && (!amax.defined() || weight.size(1) == amax.size(0)),
                  "weights that read one activation must be [out, in] of the same in, not ",
                  weight.sizes());
    const Tensor mine = weight.detach().to(torch::kFloat).abs().amax(0);
    amax = amax.defined() ? torch::maximum(amax, mine) : mine;
  }
  return amax;
}

Tensor smoothing_factors(const Tensor& activation_amax, const Tensor& weight_amax, double alpha) {
  VERNIER_CHECK(alpha >= 0 && alpha <= 1, "alpha must be in [0, 1], not ", alpha);
  check_amax(activation_amax, "activation_amax");
  check_amax(weight_amax, "weight_amax");
  VERNIER_CHECK(activation_amax.sizes() == weight_amax.sizes(), "activation_amax has ",
                activation_amax.size(0), " channels and weight_amax ", weight_amax.size(0));
  const Tensor activation = activation_amax.to(torch::kDouble);
  const Tensor weight = weight_amax.to(torch::kDouble);
  const Tensor factors = (activation.pow(alpha) / weight.pow(1 - alpha)).to(torch::kFloat);
  const Tensor alive = activation.gt(0) & weight.gt(0) & factors.isfinite() & factors.gt(0);
  return torch::where(alive, factors, torch::ones_like(factors));
}

void divide_outputs(Tensor& weight, Tensor& bias, const Tensor& factors) {
  VERNIER_CHECK(weight.dim() >= 1 && weight.size(0) == factors.numel() &&
                    (!bias.defined() || bias.numel() == factors.numel()),
                "a producer of ", weight.dim() ? weight.size(0) : 0, " channels does not take ",
                factors.numel(), " factors");
  const torch::NoGradGuard no_grad;
  std::vector<int64_t> shape(weight.dim(), 1);
  shape[0] = -1;
  const Tensor new_weight =
      checked(weight.to(torch::kFloat) / factors.view(shape), weight, "producer's weight");
  if (bias.defined())
    bias.copy_(checked(bias.to(torch::kFloat) / factors, bias, "producer's bias"));
  weight.copy_(new_weight);
}

void multiply_inputs(Tensor& weight, const Tensor& factors) {
  VERNIER_CHECK(weight.dim() == 2 && weight.size(1) == factors.numel(), "a reader with weight ",
                weight.sizes(), " does not take ", factors.numel(), " factors");
  const torch::NoGradGuard no_grad;
  weight.copy_(checked(weight.to(torch::kFloat) * factors, weight, "reader's weight"));
}

}  // namespace vernier
