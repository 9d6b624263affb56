// Which layers read one activation, and what emits it: the places where per-channel factors can go.
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace vernier {

/// What emits an activation: dividing its tensors by factors divides the activation.
struct Producer {
  std::string name;  ///< for messages and tables: `model.layers.0.input_layernorm`
  /// The tensors to divide, whose first dimension is the channel: a norm's weight and bias, a
  /// linear's weight [channels, in] and bias (views of their rows where one matrix holds several
  /// projections). Asked anew each time, since moving a module may swap its tensors.
  std::function<std::vector<torch::Tensor>()> tensors;
};

/// Layers that read one activation and therefore share its factors. Families declare them; only
/// positively homogeneous functions of each channel may stand between producer and readers
/// (identity, ReLU, a product with other values, attention's weighted sums).
struct SmoothingGroup {
  std::string name;  ///< of the first reader
  /// None: the factors go into the readers' input quantizers (QuantizerImpl::pre_scale).
  std::optional<Producer> producer;
  std::vector<std::string> readers;  ///< names of the quantized layers, all of the same input width
  /// Reader's input channel j is channel source[j] of the producer, so that several of the reader's
  /// may share a factor (grouped heads); empty: they are the same.
  std::vector<int64_t> source;
};

}  // namespace vernier
