// vernier::nn::Linear: torch::nn::Linear with quantizers.
#pragma once

#include <torch/nn/modules/linear.h>
#include <vernier/qat/batch_norm.h>

#include <iosfwd>

namespace vernier::nn {

/// Drop-in for torch::nn::Linear: same options, parameter names and initialization, same result bit
/// for bit in mode full. Input float32, float16 or bfloat16 [..., in], output [..., out] in the
/// input's dtype.
///
/// Quantizers start as W8A8: weight int8 per output channel, input int8 per tensor, both min/max; a
/// recipe changes them before calibration.
class LinearImpl : public Foldable<LinearImpl, torch::nn::LinearImpl> {
 public:
  LinearImpl(int64_t in_features, int64_t out_features)
      : LinearImpl(torch::nn::LinearOptions(in_features, out_features)) {}
  explicit LinearImpl(const torch::nn::LinearOptions& linear_options);
  /// Takes over the layer's parameters: the same tensors, so that an optimizer goes on with them.
  explicit LinearImpl(const torch::nn::LinearImpl& linear);

  void pretty_print(std::ostream& stream) const override;

  /// By mode. Throws Error in fake_quant and integer mode when the input's last size is not
  /// in_features.
  torch::Tensor forward(const torch::Tensor& input) { return run(input); }

  /// What mode fake_quant multiplies: dequantized operands, or int8 codes as mode integer does,
  /// with its output bit for bit, faster and with less memory on a GPU. Codes need schemes that
  /// mode integer takes, of integers.
  TrainedProduct trained_product = TrainedProduct::real;

  torch::Tensor compute(at::TensorList inputs, const torch::Tensor& linear_weight,
                        const torch::Tensor& linear_bias) const override;
  torch::Tensor accumulators(at::TensorList codes) const override;
  std::optional<int64_t> input_channels() const override { return options.in_features(); }
  void set_pre_scale(const torch::Tensor& factors) override;

 protected:
  std::shared_ptr<torch::nn::LinearImpl> plain() const override;
  int64_t out_channels() const override { return options.out_features(); }
  void check_inputs(at::TensorList inputs) const override;
  torch::Tensor integer_compute(at::TensorList inputs) const override;
  torch::Tensor fake_quant_forward(at::TensorList inputs) override;
};

TORCH_MODULE(Linear);

/// While it lives, linear layers that the thread makes have parameters in memory that nobody wrote
/// to, with these options (dtype, device): for large models whose parameters are to be loaded, or
/// drawn elsewhere.
class Uninitialized {
 public:
  explicit Uninitialized(const torch::TensorOptions& options = torch::kFloat);
  ~Uninitialized();
  Uninitialized(const Uninitialized&) = delete;
  Uninitialized& operator=(const Uninitialized&) = delete;

  /// The options of the one that lives on this thread; absent where none does.
  static const std::optional<torch::TensorOptions>& options();

 private:
  std::optional<torch::TensorOptions> before_;
};

}  // namespace vernier::nn
