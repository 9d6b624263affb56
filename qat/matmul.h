// vernier::nn::MatMul and ScaledDotProductAttention: products of two activations, both quantized.
#pragma once

#include <torch/nn/pimpl.h>
#include <vernier/qat/drop_in.h>

#include <iosfwd>
#include <optional>

namespace vernier::nn {

struct MatMulOptions {
  TORCH_ARG(bool, transpose_other) = false;  ///< the second operand is [..., N, K]
};

/// torch::matmul with quantizers on both operands, in a model's tree. Operands [..., M, K] and
/// [..., K, N], float32, float16 or bfloat16, batches broadcast; result [..., M, N].
///
/// Quantizers, `input_quantizer` and `other_quantizer`, start as int8 per tensor, min/max. Mode
/// integer runs INT8 (kernels/int8_bmm.h): the first operand may be asymmetric and have a scale a
/// token, the second is symmetric and has one scale, or one a token where it is transposed, so that
/// scales stand along M and N.
class MatMulImpl : public DropIn<MatMulImpl, torch::nn::Module, MatMulOptions> {
 public:
  explicit MatMulImpl(const MatMulOptions& matmul_options = {});

  Quantizer other_quantizer{nullptr};

  void pretty_print(std::ostream& stream) const override;

  torch::Tensor forward(const torch::Tensor& input, const torch::Tensor& other) {
    return run({input, other});
  }

  std::vector<NamedQuantizer> quantizers() const override;
  QuantizerImpl* quantizer_of_input(size_t index) const override;
  /// The second operand becomes symmetric, and gets one scale where it is not transposed.
  QuantizerSettings fitting(const std::string& quantizer,
                            const QuantizerSettings& wanted) const override;
  torch::Tensor compute(at::TensorList inputs, const torch::Tensor& weight,
                        const torch::Tensor& bias) const override;
  torch::Tensor accumulators(at::TensorList codes) const override;
  int64_t accumulation_length(at::TensorList inputs = {}) const override;

 protected:
  std::shared_ptr<torch::nn::Module> plain() const override {
    return std::make_shared<torch::nn::Module>();
  }
  void make_quantizers() override;
  void check_inputs(at::TensorList inputs) const override;
  void prepare_integer() override;
  torch::Tensor integer_compute(at::TensorList inputs) const override;
};

TORCH_MODULE(MatMul);

/// torch::scaled_dot_product_attention with both products quantized: `scores` of queries and keys,
/// and `values` of probabilities and values, whose input starts asymmetric, since probabilities are
/// not negative. In mode full, both of them, it is torch's function bit for bit; otherwise the
/// formula that stands there, in the operands' dtype.
class ScaledDotProductAttentionImpl : public torch::nn::Cloneable<ScaledDotProductAttentionImpl> {
 public:
  ScaledDotProductAttentionImpl() { ScaledDotProductAttentionImpl::reset(); }

  void reset() override;

  /// query [..., L, E], key [..., S, E], value [..., S, V]; returns [..., L, V]. `mask`, which
  /// broadcasts to [..., L, S], is bool, true where a key takes part, or is added to the scores; it
  /// excludes `is_causal`. `scale` is 1 / sqrt(E) unless given. Rows without a key are zero.
  torch::Tensor forward(const torch::Tensor& query, const torch::Tensor& key,
                        const torch::Tensor& value, const torch::Tensor& mask = {},
                        double dropout = 0.0, bool is_causal = false,
                        std::optional<double> scale = std::nullopt);

  MatMul scores{nullptr}, values{nullptr};
};

TORCH_MODULE(ScaledDotProductAttention);

}  // namespace vernier::nn
