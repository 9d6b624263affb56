// vernier::nn::Embedding and EmbeddingBag: those of torch::nn with a quantized table.
#pragma once

#include <torch/nn/modules/embedding.h>
#include <vernier/qat/drop_in.h>

#include <iosfwd>

namespace vernier::nn {

/// What the two have in common: a table [num_embeddings, embedding_dim], quantized int8 with a
/// scale a row to begin with, and no input to quantize. In mode fake_quant the whole table is
/// quantized and its gradient is dense, whatever options.sparse(); max_norm is applied to the float
/// table before. Mode integer reads codes and returns real values in the table's dtype.
template <typename Derived, typename Plain, typename PlainOptions>
class Table : public DropIn<Derived, Plain, PlainOptions> {
 public:
  explicit Table(const PlainOptions& plain_options);
  /// Takes over the table: the same tensor, so that an optimizer goes on with it.
  explicit Table(const Plain& plain_table);

  void reset() override;
  bool has_accumulators() const override { return false; }
  /// A row is read, not summed.
  int64_t accumulation_length(at::TensorList = {}) const override { return 1; }

 protected:
  std::shared_ptr<Plain> plain() const override { return std::make_shared<Plain>(this->options); }
  void make_quantizers() override { this->register_weight_quantizer(/*axis=*/0); }
  void check_inputs(at::TensorList inputs) const override;
  torch::Tensor fake_quant_forward(at::TensorList inputs) override;
  /// Rows of the codes, in the table's dtype.
  torch::Tensor rows(const torch::Tensor& indices) const;
};

/// Drop-in for torch::nn::Embedding: same options, parameter name and initialization, same result
/// bit for bit in mode full.
class EmbeddingImpl
    : public Table<EmbeddingImpl, torch::nn::EmbeddingImpl, torch::nn::EmbeddingOptions> {
 public:
  using Table::Table;
  EmbeddingImpl(int64_t num_embeddings, int64_t embedding_dim)
      : EmbeddingImpl(torch::nn::EmbeddingOptions(num_embeddings, embedding_dim)) {}

  void pretty_print(std::ostream& stream) const override;

  /// Indices int64 or int32 of any shape; returns [..., embedding_dim]. Throws Error in modes
  /// fake_quant and integer when their dtype or device does not fit.
  torch::Tensor forward(const torch::Tensor& indices) { return run(indices); }

  torch::Tensor compute(at::TensorList inputs, const torch::Tensor& table,
                        const torch::Tensor& bias) const override;

 protected:
  torch::Tensor integer_compute(at::TensorList inputs) const override;
};

class Embedding : public torch::nn::ModuleHolder<EmbeddingImpl> {
 public:
  using torch::nn::ModuleHolder<EmbeddingImpl>::ModuleHolder;
  static Embedding from_pretrained(const torch::Tensor& embeddings,
                                   const torch::nn::EmbeddingFromPretrainedOptions& options = {});
};

/// Drop-in for torch::nn::EmbeddingBag: same options, parameter name and initialization, same
/// result bit for bit in mode full. Sums, means and maxima are torch's own, of the rows that the
/// codes stand for.
class EmbeddingBagImpl
    : public Table<EmbeddingBagImpl, torch::nn::EmbeddingBagImpl, torch::nn::EmbeddingBagOptions> {
 public:
  using Table::Table;
  EmbeddingBagImpl(int64_t num_embeddings, int64_t embedding_dim)
      : EmbeddingBagImpl(torch::nn::EmbeddingBagOptions(num_embeddings, embedding_dim)) {}

  void pretty_print(std::ostream& stream) const override;

  /// As torch::nn::EmbeddingBag: indices [bags, length], or [n] with offsets [bags].
  torch::Tensor forward(const torch::Tensor& indices, const torch::Tensor& offsets = {},
                        const torch::Tensor& per_sample_weights = {}) {
    return run({indices, offsets, per_sample_weights});
  }

  torch::Tensor compute(at::TensorList inputs, const torch::Tensor& table,
                        const torch::Tensor& bias) const override;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(torch::Tensor())},
                           {2, torch::nn::AnyValue(torch::Tensor())})

  torch::Tensor integer_compute(at::TensorList inputs) const override;
};

class EmbeddingBag : public torch::nn::ModuleHolder<EmbeddingBagImpl> {
 public:
  using torch::nn::ModuleHolder<EmbeddingBagImpl>::ModuleHolder;
  static EmbeddingBag from_pretrained(
      const torch::Tensor& embeddings,
      const torch::nn::EmbeddingBagFromPretrainedOptions& options = {});
};

}  // namespace vernier::nn
