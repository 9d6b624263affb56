// Batch norms folded into the layer before them: what is quantized is the weight that runs.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/options/batchnorm.h>
#include <torch/nn/pimpl.h>
#include <vernier/kernels/error.h>
#include <vernier/qat/drop_in.h>

#include <memory>
#include <string>
#include <vector>

namespace vernier {

/// A batch norm of any number of axes, channels on axis 1: parameters, buffers and running
/// statistics are those of torch::nn::BatchNorm1d, 2d and 3d, bit for bit.
class BatchNormImpl : public torch::nn::Cloneable<BatchNormImpl> {
 public:
  explicit BatchNormImpl(const torch::nn::BatchNormOptions& batch_norm_options);
  /// Takes over the tensors of a torch::nn::BatchNorm. Throws Error where it keeps no running
  /// statistics, without which nothing can be folded.
  BatchNormImpl(const torch::nn::BatchNormOptions& batch_norm_options,
                const torch::nn::Module& source);

  void reset() override;
  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

  /// As torch::nn::BatchNorm's; frozen it normalizes by the running statistics in training too.
  torch::Tensor forward(const torch::Tensor& input);

  /// Whether a forward takes the batch's statistics and adds them to the running ones.
  bool uses_batch() const { return is_training() && !frozen_; }
  void set_frozen(bool frozen) { frozen_ = frozen; }
  bool frozen() const { return frozen_; }

  /// What a channel is multiplied by, weight / sqrt(variance + eps), and what is added,
  /// bias + (layer_bias - mean) * factor: float32 [channels]. `layer_bias` may be undefined.
  torch::Tensor factor(const torch::Tensor& variance) const;
  torch::Tensor shift(const torch::Tensor& mean, const torch::Tensor& factor,
                      const torch::Tensor& layer_bias) const;

  torch::nn::BatchNormOptions options;
  torch::Tensor weight, bias;               ///< undefined unless options.affine()
  torch::Tensor running_mean, running_var;  ///< [channels]
  torch::Tensor num_batches_tracked;

 private:
  void take(const torch::nn::Module& source);

  bool frozen_ = false;
};

TORCH_MODULE(BatchNorm);

/// The batch norm as vernier's, with the very same tensors; null unless `module` is a
/// torch::nn::BatchNorm1d, 2d or 3d.
std::shared_ptr<BatchNormImpl> batch_norm_from(const torch::nn::Module& module);

/// The face of layers that a batch norm can be folded into.
class FoldsBatchNorm {
 public:
  virtual ~FoldsBatchNorm() = default;

  /// The batch norm behind the layer, which from now on is a part of it; null where there is none.
  BatchNorm batch_norm{nullptr};

  /// Makes a batch norm a part of the layer. In modes full and observe it follows the layer, as
  /// before. In mode fake_quant the weight that is quantized is the folded one,
  ///     weight * gamma / sqrt(running variance + eps),
  /// and while training the output is corrected to the statistics of the batch, which come from the
  /// unquantized weight (Jacob 2018, arXiv 1712.05877, section 3.2; the correction that keeps the
  /// quantized weight from following every batch: Krishnamoorthi 2018, arXiv 1806.08342, section
  /// 3.2.2):
  ///     y = conv(x, quantized) * sqrt(running variance + eps) / sqrt(batch variance + eps)
  ///         + beta + (bias - batch mean) * gamma / sqrt(batch variance + eps).
  /// In evaluation, frozen, and in mode integer the running statistics stand for the batch's, and
  /// the correction is gone. Throws Error when there is one already, or channels do not agree.
  virtual void fold(BatchNorm following) = 0;

  /// Folds for good: weight and bias become the folded ones and the batch norm goes. Exact but for
  /// the roundings of the product.
  virtual void merge_batch_norm() = 0;
};

/// Folds every batch norm that directly follows a quantized Linear or convolution in a Sequential
/// into it and leaves an Identity in its place; prepare() does it. Returns the names of the layers
/// that have one now.
std::vector<std::string> fold_batch_norms(torch::nn::Module& model);

/// Freezes the running statistics of all folded batch norms, or lets them go on. TrainingSession
/// does it by its schedule.
void freeze_batch_norms(const torch::nn::Module& model, bool frozen = true);

/// merge_batch_norm() of all layers; convert() does it. Training ends there: optimizers hold
/// parameters that are gone. Throws Error in training mode.
void merge_batch_norms(const torch::nn::Module& model);

namespace nn {

/// Base of the drop-in layers with a weight and one output channel an index of its axis: DropIn,
/// and a batch norm where one was folded in.
template <typename Derived, typename Plain>
class Foldable : public DropIn<Derived, Plain>, public FoldsBatchNorm {
 public:
  using DropIn<Derived, Plain>::DropIn;

  void fold(BatchNorm following) override {
    VERNIER_CHECK(!batch_norm, "a batch norm is folded into the layer already");
    VERNIER_CHECK(following->options.num_features() == out_channels(), "a batch norm of ",
                  following->options.num_features(), " channels cannot be folded into a layer of ",
                  out_channels());
    this->set_mode(Mode::full);
    batch_norm = this->register_module("batch_norm", following);
  }

  void merge_batch_norm() override {
    if (!batch_norm) return;
    const torch::NoGradGuard no_grad;
    const Mode before = this->mode();
    this->set_mode(Mode::full);
    const torch::Tensor merged_weight = float_weight(), merged_bias = float_bias();
    this->weight.set_data(merged_weight);
    if (this->bias.defined()) {
      this->bias.set_data(merged_bias);
    } else {
      this->bias = this->register_parameter("bias", merged_bias, this->weight.requires_grad());
      this->options.bias(true);
    }
    this->unregister_module("batch_norm");
    batch_norm = nullptr;
    this->set_mode(before);
  }

  /// With a batch norm the folded ones, by the running statistics.
  torch::Tensor float_weight() const override {
    return batch_norm ? folded(batch_norm->factor(batch_norm->running_var)) : this->weight;
  }
  torch::Tensor float_bias() const override {
    if (!batch_norm) return this->bias;
    return batch_norm
        ->shift(batch_norm->running_mean, batch_norm->factor(batch_norm->running_var), this->bias)
        .to(this->weight.scalar_type());
  }
  void set_batch_norm_frozen(bool frozen) override {
    if (batch_norm) batch_norm->set_frozen(frozen);
  }
  void load_weight_codes(const torch::Tensor& codes) override {
    VERNIER_CHECK(
        !batch_norm,
        "the layer has a batch norm, which codes hold already: merge_batch_norms() first");
    QuantizedLayer::load_weight_codes(codes);
  }

  void load(torch::serialize::InputArchive& archive) override {
    torch::serialize::InputArchive saved;
    const bool there = archive.try_read("batch_norm", saved);
    VERNIER_CHECK(there == static_cast<bool>(batch_norm),
                  there ? "the archive has a batch norm folded into the layer and the model does "
                          "not: fold_batch_norms() before loading it"
                        : "the archive has no batch norm folded into the layer: load it before "
                          "fold_batch_norms()");
    if (there) batch_norm->load(saved);
    DropIn<Derived, Plain>::load(archive);
  }

 protected:
  virtual int64_t out_channels() const = 0;

  void make_quantizers() override {
    DropIn<Derived, Plain>::make_quantizers();
    if (batch_norm)
      batch_norm = this->register_module("batch_norm", BatchNorm(batch_norm->options));
  }

  torch::Tensor full_forward(at::TensorList inputs) override {
    const torch::Tensor output = this->compute(inputs, this->weight, this->bias);
    return batch_norm ? batch_norm->forward(output) : output;
  }

  torch::Tensor fake_quant_forward(at::TensorList inputs) override {
    if (!batch_norm || !batch_norm->uses_batch()) return QuantizedLayer::fake_quant_forward(inputs);
    const auto quantized = this->fake_quantized(inputs);
    const torch::Tensor plain = this->compute(quantized, this->weight, this->bias);
    if (plain.numel() == 0) return QuantizedLayer::fake_quant_forward(inputs);
    VERNIER_CHECK(plain.dim() > 2 || plain.size(0) > 1,
                  "batch statistics of a batch of one are no statistics: train with more samples, "
                  "or freeze_batch_norms()");
    {
      const torch::NoGradGuard no_grad;
      batch_norm->forward(plain);  // for the running statistics
    }
    const torch::Tensor values = plain.to(torch::kFloat);
    std::vector<int64_t> axes;
    for (int64_t i = 0; i < values.dim(); ++i)
      if (i != 1) axes.push_back(i);
    const auto [variance, mean] = torch::var_mean(values, axes, /*unbiased=*/false);
    const torch::Tensor running = batch_norm->factor(batch_norm->running_var);
    const torch::Tensor factor = batch_norm->factor(variance);
    const torch::Tensor shift = batch_norm->shift(mean, factor, this->bias);
    const double eps = batch_norm->options.eps();
    const torch::Tensor correction =
        ((batch_norm->running_var.to(torch::kFloat) + eps) / (variance + eps)).sqrt();
    const torch::Tensor output =
        this->compute(quantized, this->weight_quantizer->forward(folded(running)), torch::Tensor());
    std::vector<int64_t> channels(values.dim(), 1);
    channels[1] = -1;
    const torch::Tensor corrected =
        (output * correction.view(channels) + shift.view(channels)).to(plain.scalar_type());
    return this->output_quantizer ? this->output_quantizer->forward(corrected) : corrected;
  }

 private:
  torch::Tensor folded(const torch::Tensor& factor) const {
    std::vector<int64_t> channels(this->weight.dim(), 1);
    channels[this->weight_quantizer->axis()] = -1;
    return (this->weight * factor.view(channels)).to(this->weight.scalar_type());
  }
};

}  // namespace nn
}  // namespace vernier
