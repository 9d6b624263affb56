// Factors of many groups in one model: set, changed and taken off again without a trace.
#pragma once

#include <torch/nn/module.h>
#include <vernier/qat/layer.h>
#include <vernier/smoothquant/groups.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace vernier {

/// Smoothing groups of a model and the factors that stand in their weights. Every change is made
/// from the weights as they were, in the order of the groups: what the model holds depends on the
/// factors alone and not on the way to them, and without factors it is what it was, bit for bit.
/// Keeps a copy of the weights concerned. While it lives, nothing else changes them or moves the
/// model; when it goes, the factors stay.
class FoldedFactors {
 public:
  /// Every value has to be finite in `storage`, where the weights will be saved, and in float16 not
  /// to vanish; absent: their own dtype. Throws Error, naming the group, when a reader is no
  /// quantized layer with a weight [out, in], sizes do not fit, a group's tensors are the model's
  /// under another name too (tied weights), or a reader without producer takes no factors.
  FoldedFactors(torch::nn::Module& model, std::vector<SmoothingGroup> groups,
                std::optional<torch::Dtype> storage = std::nullopt);

  size_t size() const { return groups_.size(); }
  const SmoothingGroup& group(size_t index) const { return groups_[index].declared; }
  const std::vector<std::shared_ptr<QuantizedLayer>>& readers(size_t index) const {
    return groups_[index].readers;
  }
  /// Channels of the producer, each with a factor of its own.
  int64_t channels(size_t index) const { return groups_[index].channels; }

  /// Maxima of the readers' input channels as those of the producer's: the largest of those that
  /// share one.
  torch::Tensor to_producer(size_t index, const torch::Tensor& amax) const;
  /// Factors [channels()] as the readers' input channels take them.
  torch::Tensor to_reader(size_t index, const torch::Tensor& factors) const;
  /// smoothing_factors() of a group from the maxima of its readers' input channels and its weights
  /// as they were: float32 [channels()].
  torch::Tensor factors(size_t index, const torch::Tensor& activation_amax, double alpha) const;
  /// A reader's weight as it was.
  torch::Tensor original_weight(size_t index, size_t reader) const;

  /// Gives a group factors [channels()], positive and finite, in place of those it has: the
  /// producer's tensors are divided by them and the readers' columns multiplied, or their inputs'
  /// pre_scale divides. An undefined tensor takes them off. Scales of weights are not made anew.
  /// Throws Error, naming tensor and group, when a value leaves `storage`; then nothing has
  /// changed.
  void set(size_t index, const torch::Tensor& factors);
  const torch::Tensor& current(size_t index) const { return groups_[index].factors; }

 private:
  struct Operation {
    torch::Tensor tensor;
    bool divides;      // rows, by the factors; else columns are multiplied
    std::string name;  // for messages
    size_t storage;
  };
  struct Group {
    SmoothingGroup declared;
    std::vector<std::shared_ptr<QuantizedLayer>> readers;
    int64_t channels = 0;
    torch::Tensor source;       // int64 [in], on the model's device; undefined: the same channels
    torch::Tensor weight_amax;  // of the readers' weights as they were, [channels]
    std::vector<Operation> operations;
    torch::Tensor factors;
  };
  // Memory that groups change, whole: views of it may be several groups'.
  struct Storage {
    torch::Tensor flat;
    torch::Tensor original;
  };

  static torch::Tensor to_producer_of(const Group& group, const torch::Tensor& amax);
  size_t storage_of(const torch::Tensor& tensor);
  void check_not_tied(const torch::nn::Module& model) const;
  void rebuild(const std::vector<size_t>& storages);
  void apply(const Operation& operation, const Group& group) const;

  std::vector<Group> groups_;
  std::vector<Storage> storages_;
  std::optional<torch::Dtype> dtype_;
};

}  // namespace vernier
