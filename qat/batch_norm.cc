#include <torch/nn/functional/batchnorm.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torch/serialize/archive.h>
#include <vernier/kernels/error.h>
#include <vernier/qat/batch_norm.h>

namespace vernier {

using torch::Tensor;

BatchNormImpl::BatchNormImpl(const torch::nn::BatchNormOptions& batch_norm_options)
    : options(batch_norm_options) {
  BatchNormImpl::reset();
}

BatchNormImpl::BatchNormImpl(const torch::nn::BatchNormOptions& batch_norm_options,
                             const torch::nn::Module& source)
    : options(batch_norm_options) {
  VERNIER_CHECK(options.track_running_stats(),
                "a batch norm without running statistics cannot be folded: make it with "
                "track_running_stats(true)");
  take(source);
}

void BatchNormImpl::reset() { take(torch::nn::BatchNorm1dImpl(options)); }

void BatchNormImpl::take(const torch::nn::Module& source) {
  weight = bias = Tensor();
  for (const auto& item : source.named_parameters(/*recurse=*/false))
    (item.key() == "weight" ? weight : bias) =
        register_parameter(item.key(), item.value(), item.value().requires_grad());
  for (const auto& item : source.named_buffers(/*recurse=*/false)) {
    const Tensor buffer = register_buffer(item.key(), item.value());
    if (item.key() == "running_mean") running_mean = buffer;
    if (item.key() == "running_var") running_var = buffer;
    if (item.key() == "num_batches_tracked") num_batches_tracked = buffer;
  }
  train(source.is_training());
}

void BatchNormImpl::save(torch::serialize::OutputArchive& archive) const {
  torch::nn::Module::save(archive);
  archive.write("frozen", c10::IValue(frozen_));
}

void BatchNormImpl::load(torch::serialize::InputArchive& archive) {
  torch::nn::Module::load(archive);
  c10::IValue frozen;
  frozen_ = archive.try_read("frozen", frozen) && frozen.toBool();
}

Tensor BatchNormImpl::forward(const Tensor& input) {
  double momentum = options.momentum().value_or(0.0);
  if (uses_batch()) {
    num_batches_tracked += 1;
    if (!options.momentum()) momentum = 1.0 / num_batches_tracked.item<double>();
  }
  return torch::nn::functional::batch_norm(input, running_mean, running_var,
                                           torch::nn::functional::BatchNormFuncOptions()
                                               .weight(weight)
                                               .bias(bias)
                                               .training(uses_batch())
                                               .momentum(momentum)
                                               .eps(options.eps()));
}

Tensor BatchNormImpl::factor(const Tensor& variance) const {
  const Tensor deviation = (variance.to(torch::kFloat) + options.eps()).sqrt();
  return weight.defined() ? weight.to(torch::kFloat) / deviation : deviation.reciprocal();
}

Tensor BatchNormImpl::shift(const Tensor& mean, const Tensor& factor,
                            const Tensor& layer_bias) const {
  Tensor offset = -mean.to(torch::kFloat);
  if (layer_bias.defined()) offset = layer_bias.to(torch::kFloat) + offset;
  offset = offset * factor;
  return bias.defined() ? bias.to(torch::kFloat) + offset : offset;
}

std::shared_ptr<BatchNormImpl> batch_norm_from(const torch::nn::Module& module) {
  const auto from = [](const auto* source) {
    return source ? std::make_shared<BatchNormImpl>(source->options, *source) : nullptr;
  };
  if (auto made = from(dynamic_cast<const torch::nn::BatchNorm1dImpl*>(&module))) return made;
  if (auto made = from(dynamic_cast<const torch::nn::BatchNorm2dImpl*>(&module))) return made;
  return from(dynamic_cast<const torch::nn::BatchNorm3dImpl*>(&module));
}

namespace {

void fold_in(torch::nn::SequentialImpl& sequence, const std::string& prefix,
             std::vector<std::string>& folded) {
  const auto children = sequence.named_children();
  for (size_t i = 0; i + 1 < children.size(); ++i) {
    auto* layer = dynamic_cast<FoldsBatchNorm*>(children[i].value().get());
    const auto* quantized = dynamic_cast<const QuantizedLayer*>(children[i].value().get());
    if (!layer || !quantized->quantized()) continue;
    const std::string name = prefix + children[i].key();
    try {
      const auto following = batch_norm_from(*children[i + 1].value());
      if (!following) continue;
      layer->fold(BatchNorm(following));
    } catch (const Error& error) {
      throw Error(concat("layer '", name, "': ", error.what()));
    }
    const torch::nn::Identity nothing;
    *(sequence.begin() + static_cast<std::ptrdiff_t>(i) + 1) = torch::nn::AnyModule(nothing);
    sequence.replace_module(children[i + 1].key(), nothing);
    folded.push_back(name);
  }
}

}  // namespace

std::vector<std::string> fold_batch_norms(torch::nn::Module& model) {
  std::vector<std::string> folded;
  const auto visit = [&](torch::nn::Module& module, const std::string& name) {
    if (auto* sequence = dynamic_cast<torch::nn::SequentialImpl*>(&module))
      fold_in(*sequence, name.empty() ? "" : name + ".", folded);
  };
  visit(model, "");
  for (const auto& item : model.named_modules(std::string(), /*include_self=*/false))
    visit(*item.value(), item.key());
  return folded;
}

void freeze_batch_norms(const torch::nn::Module& model, bool frozen) {
  for (const auto& item : quantized_layers(model)) item.layer->set_batch_norm_frozen(frozen);
}

void merge_batch_norms(const torch::nn::Module& model) {
  for (const auto& [name, layer] : quantized_layers(model)) {
    auto* folding = dynamic_cast<FoldsBatchNorm*>(layer.get());
    if (!folding || !folding->batch_norm) continue;
    VERNIER_CHECK(!folding->batch_norm->is_training(), "layer '", name,
                  "': a batch norm is merged into the layer after training: model.eval() first");
    folding->merge_batch_norm();
  }
}

}  // namespace vernier
