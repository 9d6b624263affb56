#include <vernier/kernels/error.h>
#include <vernier/qat/batch_norm.h>
#include <vernier/smoothquant/folding.h>
#include <vernier/smoothquant/smoothing.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

namespace vernier {

using torch::Tensor;

namespace {

const void* memory_of(const Tensor& tensor) { return tensor.storage().data(); }

std::shared_ptr<QuantizedLayer> reader_of(const std::map<std::string, NamedLayer>& layers,
                                          const SmoothingGroup& group, const std::string& name) {
  const auto found = layers.find(name);
  VERNIER_CHECK(found != layers.end(), "smoothing group '", group.name,
                "': the model has no quantized layer '", name, "'");
  return found->second.layer;
}

// The largest error that rounding to a dtype leaves in any channel, as a share of the channel's
// largest value; 1 where a channel vanishes.
double worst_channel_error(const Tensor& values, const Tensor& rounded, bool channels_are_rows) {
  const auto by_channel = [&](const Tensor& magnitudes) {
    if (magnitudes.dim() < 2) return magnitudes;
    const Tensor matrix = magnitudes.flatten(1);
    return channels_are_rows ? matrix.amax(1) : matrix.amax(0);
  };
  if (values.numel() == 0) return 0;
  const Tensor largest = by_channel(values.abs());
  const Tensor share = by_channel((rounded - values).abs()) / largest;
  return torch::where(largest > 0, share, torch::zeros_like(share)).max().item<double>();
}

}  // namespace

FoldedFactors::FoldedFactors(torch::nn::Module& model, std::vector<SmoothingGroup> groups,
                             std::optional<torch::Dtype> storage)
    : dtype_(storage) {
  const torch::NoGradGuard no_grad;
  std::map<std::string, NamedLayer> layers;
  for (const NamedLayer& item : quantized_layers(model)) {
    item.layer->set_layer_name(item.name);
    layers.emplace(item.name, item);
  }
  for (SmoothingGroup& declared : groups) {
    Group group;
    VERNIER_CHECK(!declared.readers.empty(), "smoothing group '", declared.name,
                  "' has no layer that reads it");
    std::vector<Tensor> weights;
    for (const std::string& name : declared.readers) {
      auto reader = reader_of(layers, declared, name);
      const Tensor weight = reader->float_weight();
      VERNIER_CHECK(weight.defined() && weight.dim() == 2 && reader->input_quantizer,
                    "smoothing group '", declared.name, "': layer '", name,
                    "' has no weight [out, in] that could take factors");
      const auto* folding = dynamic_cast<const FoldsBatchNorm*>(reader.get());
      VERNIER_CHECK(!folding || !folding->batch_norm, "smoothing group '", declared.name,
                    "': layer '", name, "' has a batch norm folded in: merge_batch_norms() first");
      VERNIER_CHECK(reader->mode() != Mode::integer, "smoothing group '", declared.name,
                    "': layer '", name, "' runs on codes already: smooth the float model");
      VERNIER_CHECK(reader->input_quantizer->pre_scale().numel() == 0, "smoothing group '",
                    declared.name, "': layer '", name, "' has factors already: smooth once");
      const std::optional<int64_t> inputs = reader->input_channels();
      VERNIER_CHECK(inputs && *inputs == weight.size(1) &&
                        (weights.empty() || weights.front().size(1) == weight.size(1)),
                    "smoothing group '", declared.name, "': layer '", name, "' has weight ",
                    weight.sizes(), ", which does not read what the others do");
      if (!declared.producer) {  // throws where the layer takes none
        reader->set_pre_scale(torch::ones({weight.size(1)}));
        reader->set_pre_scale(torch::empty({0}));
      }
      weights.push_back(weight);
      group.readers.push_back(std::move(reader));
    }
    const int64_t inputs = weights.front().size(1);
    group.channels = inputs;
    if (!declared.source.empty()) {
      const auto [least, most] =
          std::minmax_element(declared.source.begin(), declared.source.end());
      VERNIER_CHECK(static_cast<int64_t>(declared.source.size()) == inputs && *least >= 0,
                    "smoothing group '", declared.name, "': its sources are not ", inputs,
                    " channels of the producer");
      group.channels = *most + 1;
      group.source = torch::tensor(declared.source, torch::kLong).to(weights.front().device());
    }
    if (declared.producer) {
      for (const Tensor& tensor : declared.producer->tensors()) {
        if (!tensor.defined()) continue;  // no bias
        if (group.operations.empty() && group.source.defined())
          group.channels = std::max(group.channels, tensor.size(0));
        VERNIER_CHECK(tensor.dim() >= 1 && tensor.size(0) == group.channels, "smoothing group '",
                      declared.name, "': '", declared.producer->name, "' has a tensor ",
                      tensor.sizes(), " where ", group.channels, " channels are read");
        group.operations.push_back(
            {tensor.detach(), true, declared.producer->name, storage_of(tensor)});
      }
      VERNIER_CHECK(!group.operations.empty(), "smoothing group '", declared.name, "': '",
                    declared.producer->name, "' has no tensor to divide");
    }
    for (size_t i = 0; i < weights.size(); ++i)
      group.operations.push_back(
          {weights[i].detach(), false, declared.readers[i], storage_of(weights[i])});
    group.declared = std::move(declared);
    group.weight_amax = to_producer_of(group, input_channel_amax(weights));
    groups_.push_back(std::move(group));
  }
  check_not_tied(model);
}

size_t FoldedFactors::storage_of(const Tensor& tensor) {
  for (size_t i = 0; i < storages_.size(); ++i)
    if (memory_of(storages_[i].flat) == memory_of(tensor)) return i;
  const auto elements =
      static_cast<int64_t>(tensor.storage().nbytes() / static_cast<size_t>(tensor.element_size()));
  const Tensor flat =
      torch::empty({0}, tensor.options()).set_(tensor.storage(), 0, {elements}, {1});
  storages_.push_back({flat, flat.clone()});
  return storages_.size() - 1;
}

void FoldedFactors::check_not_tied(const torch::nn::Module& model) const {
  std::map<const void*, std::string> owner;
  for (const auto& item : model.named_parameters()) {
    const auto [found, added] = owner.emplace(memory_of(item.value()), item.key());
    if (added) continue;
    for (const Group& group : groups_)
      for (const Operation& operation : group.operations)
        VERNIER_CHECK(memory_of(operation.tensor) != memory_of(item.value()), "smoothing group '",
                      group.declared.name, "': '", item.key(), "' and '", found->second,
                      "' are tied: factors in one would change the other; untie them, or leave "
                      "the group out");
  }
}

Tensor FoldedFactors::to_producer_of(const Group& group, const Tensor& amax) {
  if (!group.source.defined()) return amax;
  return torch::zeros({group.channels}, amax.options())
      .scatter_reduce(0, group.source.to(amax.device()), amax, "amax");
}

Tensor FoldedFactors::to_producer(size_t index, const Tensor& amax) const {
  const Group& group = groups_.at(index);
  const int64_t inputs = group.readers.front()->float_weight().size(1);
  VERNIER_CHECK(amax.dim() == 1 && amax.size(0) == inputs, "smoothing group '", group.declared.name,
                "': maxima ", amax.sizes(), " are not those of its ", inputs, " input channels");
  return to_producer_of(group, amax);
}

Tensor FoldedFactors::to_reader(size_t index, const Tensor& factors) const {
  const Group& group = groups_.at(index);
  return group.source.defined() ? factors.index_select(0, group.source.to(factors.device()))
                                : factors;
}

Tensor FoldedFactors::factors(size_t index, const Tensor& activation_amax, double alpha) const {
  const Tensor& weight_amax = groups_.at(index).weight_amax;
  return smoothing_factors(to_producer(index, activation_amax.to(weight_amax.device())),
                           weight_amax, alpha);
}

Tensor FoldedFactors::original_weight(size_t index, size_t reader) const {
  const Tensor weight = groups_.at(index).readers.at(reader)->float_weight();
  for (const Storage& storage : storages_)
    if (memory_of(storage.flat) == memory_of(weight))
      return storage.original.as_strided(weight.sizes(), weight.strides(), weight.storage_offset());
  throw Error(concat("smoothing group '", group(index).name,
                     "': a weight was replaced while its factors were being chosen"));
}

void FoldedFactors::apply(const Operation& operation, const Group& group) const {
  const Tensor& factors = group.factors;
  if (!factors.defined()) return;
  Tensor tensor = operation.tensor;
  const Tensor old = tensor.to(torch::kFloat);
  Tensor changed;
  if (operation.divides) {
    std::vector<int64_t> shape(tensor.dim(), 1);
    shape[0] = -1;
    changed = old / factors.view(shape);
  } else {
    changed = old * (group.source.defined() ? factors.index_select(0, group.source) : factors);
  }
  const torch::Dtype dtype = dtype_.value_or(tensor.scalar_type());
  const Tensor stored = changed.to(dtype).to(torch::kFloat);
  const auto refuse = [&](const char* what) {
    throw Error(concat("smoothing group '", group.declared.name, "': the factors make '",
                       operation.name, "' ", what, " ", c10::toString(dtype),
                       ": use a smaller alpha, or store the model in a wider dtype"));
  };
  if (!stored.isfinite().all().item<bool>()) refuse("overflow");
  // Rounding leaves 2^-11 in float16; more says that values have become too small for it.
  if (dtype == torch::kHalf &&
      worst_channel_error(changed, stored, operation.divides) > std::ldexp(1.0, -8))
    refuse("vanish in");
  tensor.copy_(changed);
}

void FoldedFactors::rebuild(const std::vector<size_t>& storages) {
  for (const size_t i : storages) storages_[i].flat.copy_(storages_[i].original);
  for (const Group& group : groups_)
    for (const Operation& operation : group.operations)
      if (std::find(storages.begin(), storages.end(), operation.storage) != storages.end())
        apply(operation, group);
}

void FoldedFactors::set(size_t index, const Tensor& factors) {
  const torch::NoGradGuard no_grad;
  Group& group = groups_.at(index);
  Tensor wanted;
  if (factors.defined()) {
    VERNIER_CHECK(factors.dim() == 1 && factors.size(0) == group.channels &&
                      factors.isfinite().all().item<bool>() && factors.gt(0).all().item<bool>(),
                  "smoothing group '", group.declared.name, "' takes ", group.channels,
                  " finite, positive factors");
    wanted = factors.detach().to(group.weight_amax.device(), torch::kFloat).clone();
  }
  std::vector<size_t> storages;
  for (const Operation& operation : group.operations)
    if (std::find(storages.begin(), storages.end(), operation.storage) == storages.end())
      storages.push_back(operation.storage);
  Tensor inverse = torch::empty({0}, torch::kFloat);  // of the readers' inputs, without a producer
  if (!group.declared.producer && wanted.defined()) {
    inverse = to_reader(index, wanted).reciprocal();
    VERNIER_CHECK(inverse.isfinite().all().item<bool>() && inverse.gt(0).all().item<bool>(),
                  "smoothing group '", group.declared.name,
                  "': a factor has no reciprocal in float32: use a smaller alpha");
  }
  const Tensor before = group.factors;
  group.factors = wanted;
  try {
    rebuild(storages);
  } catch (...) {
    group.factors = before;
    rebuild(storages);
    throw;
  }
  if (group.declared.producer) return;
  for (const auto& reader : group.readers) reader->set_pre_scale(inverse);
}

}  // namespace vernier
