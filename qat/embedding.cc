#include <torch/nn/functional/embedding.h>
#include <vernier/kernels/code_tensor.h>
#include <vernier/kernels/error.h>
#include <vernier/qat/embedding.h>

#include <ostream>

namespace vernier::nn {

using torch::Tensor;
namespace F = torch::nn::functional;

template <typename Derived, typename Plain, typename PlainOptions>
Table<Derived, Plain, PlainOptions>::Table(const PlainOptions& plain_options)
    : DropIn<Derived, Plain, PlainOptions>(plain_options) {
  Table::reset();
}

template <typename Derived, typename Plain, typename PlainOptions>
Table<Derived, Plain, PlainOptions>::Table(const Plain& plain_table)
    : DropIn<Derived, Plain, PlainOptions>(plain_table.options) {
  this->options._weight({});
  this->take(plain_table);
}

template <typename Derived, typename Plain, typename PlainOptions>
void Table<Derived, Plain, PlainOptions>::reset() {
  const auto fresh = plain();
  this->take(*fresh);
  // torch::nn's reset() counts a negative padding_idx from the end. A table that was given is the
  // parameter now: a copy must not share it.
  this->options = fresh->options;
  this->options._weight({});
}

template <typename Derived, typename Plain, typename PlainOptions>
void Table<Derived, Plain, PlainOptions>::check_inputs(at::TensorList inputs) const {
  for (const Tensor& input : inputs) {
    VERNIER_CHECK(!input.defined() || input.device() == this->weight.device(), "an input is on ",
                  input.device(), " but the table is on ", this->weight.device(),
                  ": move one of them");
  }
  const torch::Dtype dtype = inputs[0].scalar_type();
  VERNIER_CHECK(dtype == torch::kLong || dtype == torch::kInt,
                "indices must be int64 or int32, not ", c10::toString(dtype));
}

template <typename Derived, typename Plain, typename PlainOptions>
Tensor Table<Derived, Plain, PlainOptions>::fake_quant_forward(at::TensorList inputs) {
  const auto& o = this->options;
  if (o.max_norm()) {
    const torch::NoGradGuard no_grad;
    torch::embedding_renorm_(this->weight, inputs[0].contiguous(), *o.max_norm(), o.norm_type());
  }
  return QuantizedLayer::fake_quant_forward(inputs);
}

template <typename Derived, typename Plain, typename PlainOptions>
Tensor Table<Derived, Plain, PlainOptions>::rows(const Tensor& indices) const {
  const CodeTensor table{this->weight_codes(), this->weight_quantizer->code_scale()};
  return embedding_of_codes(table, indices, this->weight.scalar_type());
}

template class Table<EmbeddingImpl, torch::nn::EmbeddingImpl, torch::nn::EmbeddingOptions>;
template class Table<EmbeddingBagImpl, torch::nn::EmbeddingBagImpl, torch::nn::EmbeddingBagOptions>;

void EmbeddingImpl::pretty_print(std::ostream& stream) const {
  stream << "vernier::nn::Embedding(num_embeddings=" << options.num_embeddings()
         << ", embedding_dim=" << options.embedding_dim() << ")";
}

Tensor EmbeddingImpl::compute(at::TensorList inputs, const Tensor& table, const Tensor&) const {
  // A quantized table is no parameter to be changed, and its gradient is that of a dense tensor.
  const bool own = table.is_same(weight);
  F::EmbeddingFuncOptions how;
  how.padding_idx(options.padding_idx()).norm_type(options.norm_type());
  how.scale_grad_by_freq(options.scale_grad_by_freq()).sparse(own && options.sparse());
  if (own) how.max_norm(options.max_norm());
  return F::embedding(inputs[0], table, how);
}

Tensor EmbeddingImpl::integer_compute(at::TensorList inputs) const {
  return finish(rows(inputs[0]));
}

Embedding Embedding::from_pretrained(const Tensor& embeddings,
                                     const torch::nn::EmbeddingFromPretrainedOptions& options) {
  return Embedding(*torch::nn::Embedding::from_pretrained(embeddings, options));
}

void EmbeddingBagImpl::pretty_print(std::ostream& stream) const {
  stream << "vernier::nn::EmbeddingBag(num_embeddings=" << options.num_embeddings()
         << ", embedding_dim=" << options.embedding_dim() << ")";
}

Tensor EmbeddingBagImpl::compute(at::TensorList inputs, const Tensor& table, const Tensor&) const {
  const bool own = table.is_same(weight);
  F::EmbeddingBagFuncOptions how;
  how.offsets(inputs[1]).mode(options.mode());
  if (inputs[2].defined())
    how.per_sample_weights(own ? inputs[2] : inputs[2].to(table.scalar_type()));
  how.norm_type(options.norm_type()).scale_grad_by_freq(options.scale_grad_by_freq());
  how.sparse(own && options.sparse()).include_last_offset(options.include_last_offset());
  how.padding_idx(options.padding_idx());
  if (own) how.max_norm(options.max_norm());
  return F::embedding_bag(inputs[0], table, how);
}

Tensor EmbeddingBagImpl::integer_compute(at::TensorList inputs) const {
  // The rows of the indices, one after the other, are a table of their own.
  const Tensor& indices = inputs[0];
  Tensor table = rows(indices.flatten());
  Tensor places = torch::arange(indices.numel(), indices.options()).view(indices.sizes());
  F::EmbeddingBagFuncOptions how;
  how.offsets(inputs[1]).mode(options.mode()).include_last_offset(options.include_last_offset());
  if (inputs[2].defined()) how.per_sample_weights(inputs[2]);
  if (options.padding_idx()) {  // one more row, which is left out
    places = places.masked_fill(indices.eq(*options.padding_idx()), indices.numel());
    table = torch::cat({table, table.new_zeros({1, table.size(1)})});
    how.padding_idx(indices.numel());
  }
  return finish(F::embedding_bag(places, table, how));
}

EmbeddingBag EmbeddingBag::from_pretrained(
    const Tensor& embeddings, const torch::nn::EmbeddingBagFromPretrainedOptions& options) {
  return EmbeddingBag(*torch::nn::EmbeddingBag::from_pretrained(embeddings, options));
}

}  // namespace vernier::nn
