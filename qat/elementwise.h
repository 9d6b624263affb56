// vernier::nn::Add and Concat: what joins branches, on codes of one shared scale.
#pragma once

#include <torch/nn/pimpl.h>
#include <vernier/qat/drop_in.h>

#include <iosfwd>
#include <vector>

namespace vernier::nn {

/// Base of operations whose inputs share `input_quantizer`, so that their codes can be added and
/// put side by side: static, int8 per tensor, min/max over all of them to begin with. Real values
/// of mode integer are those of mode fake_quant bit for bit.
template <typename Derived, typename Options>
class Joining : public DropIn<Derived, torch::nn::Module, Options> {
 public:
  explicit Joining(const Options& joining_options);

  QuantizerImpl* quantizer_of_input(size_t) const override {
    return this->input_quantizer.ptr().get();
  }

 protected:
  std::shared_ptr<torch::nn::Module> plain() const override {
    return std::make_shared<torch::nn::Module>();
  }
  void make_quantizers() override {
    this->register_input_quantizer("input_quantizer", this->input_quantizer);
  }
  void check_inputs(at::TensorList inputs) const override;
  void prepare_integer() override;
};

struct AddOptions {};

/// a + b, sizes broadcast.
class AddImpl : public Joining<AddImpl, AddOptions> {
 public:
  explicit AddImpl(const AddOptions& add_options = {}) : Joining(add_options) {}

  void pretty_print(std::ostream& stream) const override;

  torch::Tensor forward(const torch::Tensor& a, const torch::Tensor& b) { return run({a, b}); }

  torch::Tensor compute(at::TensorList inputs, const torch::Tensor& weight,
                        const torch::Tensor& bias) const override;
  torch::Tensor accumulators(at::TensorList codes) const override;
  int64_t accumulation_length(at::TensorList = {}) const override { return 2; }

 protected:
  torch::Tensor integer_compute(at::TensorList inputs) const override;
};

TORCH_MODULE(Add);

struct ConcatOptions {
  ConcatOptions(int64_t dim = 1) : dim_(dim) {}
  TORCH_ARG(int64_t, dim);
};

/// torch::cat of any number of tensors along `dim`.
class ConcatImpl : public Joining<ConcatImpl, ConcatOptions> {
 public:
  explicit ConcatImpl(const ConcatOptions& concat_options = {}) : Joining(concat_options) {}

  void pretty_print(std::ostream& stream) const override;

  torch::Tensor forward(const std::vector<torch::Tensor>& tensors) { return run(tensors); }

  torch::Tensor compute(at::TensorList inputs, const torch::Tensor& weight,
                        const torch::Tensor& bias) const override;
  torch::Tensor accumulators(at::TensorList codes) const override;
  int64_t accumulation_length(at::TensorList = {}) const override { return 1; }

 protected:
  torch::Tensor integer_compute(at::TensorList inputs) const override;
};

TORCH_MODULE(Concat);

}  // namespace vernier::nn
