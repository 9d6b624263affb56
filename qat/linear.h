// vernier::nn::Linear: torch::nn::Linear with quantizers.
#pragma once

#include <torch/nn/modules/linear.h>
#include <vernier/qat/layer.h>

namespace vernier::nn {

/// Drop-in for torch::nn::Linear: same options, parameter names and initialization, same result bit
/// for bit in mode full. Input float32, float16 or bfloat16 [..., in], output [..., out] in the
/// input's dtype.
///
/// Quantizers start as W8A8: weight int8 per output channel, input int8 per tensor, both min/max; a
/// recipe changes them before calibration.
class LinearImpl : public torch::nn::LinearImpl, public QuantizedLayer {
 public:
  LinearImpl(int64_t in_features, int64_t out_features)
      : LinearImpl(torch::nn::LinearOptions(in_features, out_features)) {}
  explicit LinearImpl(const torch::nn::LinearOptions& linear_options);

  /// By mode. Throws Error in fake_quant and integer mode when the input's last size is not
  /// in_features.
  torch::Tensor forward(const torch::Tensor& input);

  torch::Tensor& float_weight() override { return weight; }
  const torch::Tensor& float_bias() const override { return bias; }
  torch::Tensor integer_forward(const torch::Tensor& input) const override;

 private:
  void check_input(const torch::Tensor& input) const;
};

TORCH_MODULE(Linear);

}  // namespace vernier::nn
