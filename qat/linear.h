// vernier::nn::Linear: torch::nn::Linear with quantizers.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/options/linear.h>
#include <vernier/qat/layer.h>

#include <iosfwd>

namespace vernier::nn {

/// Drop-in for torch::nn::Linear: same options, parameter names and initialization, same result bit
/// for bit in mode full. Input float32, float16 or bfloat16 [..., in], output [..., out] in the
/// input's dtype.
///
/// Quantizers start as W8A8: weight int8 per output channel, input int8 per tensor, both min/max; a
/// recipe changes them before calibration.
class LinearImpl : public torch::nn::Cloneable<LinearImpl>, public QuantizedLayer {
 public:
  LinearImpl(int64_t in_features, int64_t out_features)
      : LinearImpl(torch::nn::LinearOptions(in_features, out_features)) {}
  explicit LinearImpl(const torch::nn::LinearOptions& linear_options);

  /// Makes parameters, as torch::nn::Linear draws them, and quantizers; for the constructor and
  /// clone().
  void reset() override;
  /// A copy of its own with quantizers, scales, mode and codes, but without the probe and what the
  /// quantizers observed.
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;
  /// Reads the archive of a vernier::nn::Linear, after which the quantizers are as they were saved,
  /// or of a torch::nn::Linear, which leaves them without scales, since those of the weights before
  /// do not belong to the new ones. A layer in mode fake_quant or integer stays in it if it can.
  void load(torch::serialize::InputArchive& archive) override;
  void pretty_print(std::ostream& stream) const override;

  /// By mode. Throws Error in fake_quant and integer mode when the input's last size is not
  /// in_features.
  torch::Tensor forward(const torch::Tensor& input);

  torch::Tensor& float_weight() override { return weight; }
  const torch::Tensor& float_bias() const override { return bias; }
  torch::Tensor integer_forward(const torch::Tensor& input) const override;

  torch::nn::LinearOptions options;
  torch::Tensor weight;  ///< [out, in]
  torch::Tensor bias;    ///< [out]; undefined where there is none

 private:
  void check_input(const torch::Tensor& input) const;
};

TORCH_MODULE(Linear);

}  // namespace vernier::nn
