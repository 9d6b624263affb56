// From a model of torch::nn to one that trains quantized, and from that to integers.
#pragma once

#include <torch/nn/module.h>
#include <vernier/qat/layer.h>

#include <iosfwd>
#include <optional>
#include <string>
#include <vector>

namespace vernier {

/// An exception from the settings that all layers get. Of several rules that match a layer the
/// first counts.
struct LayerRule {
  std::string match = "*";  ///< the layer's name; * and ? as in a shell
  std::string type;         ///< the layer's type without namespace ("Linear"); empty: any
  std::optional<QuantizerSettings> weights;
  std::optional<QuantizerSettings> activations;
  bool quantize = true;  ///< false: stays in full precision
};

/// What the first and the last layer get: they are the most sensitive (Choi 2018, arXiv 1805.06085,
/// section 6; Esser 2020 keeps them at 8 bits).
enum class EndLayers { as_others, bits8, full };

/// How the layers of a model are quantized. A recipe (recipes/recipe.h) is this with a name.
struct QuantizationRules {
  QuantizerSettings weights;
  QuantizerSettings activations;  ///< of inputs, and of outputs where they are quantized
  std::vector<std::string> skip;  ///< names that stay in full precision, * and ? as in a shell
  std::vector<LayerRule> rules;
  EndLayers first_last = EndLayers::as_others;  ///< in the tree's order, after skipping; rules that
                                                ///< match such a layer go before
};

/// The type of a module without namespace and "Impl": "Linear".
std::string type_name(const torch::nn::Module& module);

/// Gives every quantized layer of a model its settings, forgetting scales, and sets mode full;
/// skipped ones stay in full precision. Throws Error when a pattern of `skip` or a rule matches no
/// layer.
void apply_rules(const torch::nn::Module& model, const QuantizationRules& rules);

/// What prepare() did.
struct PrepareReport {
  struct Unreachable {
    std::string name;
    std::string type;
    std::string remedy;  ///< what to change in the program
  };
  std::vector<std::string> replaced;  ///< layers of torch::nn that became vernier::nn's
  std::vector<std::string> already;   ///< layers that were vernier::nn's
  std::vector<std::string> skipped;   ///< of both, those that stay in full precision
  std::vector<std::string> folded;    ///< layers that a batch norm was folded into
  std::vector<Unreachable>
      unreachable;  ///< stay in full precision because of how the model is made
};
/// A line for every kind, and one for every layer that could not be reached.
std::ostream& operator<<(std::ostream& stream, const PrepareReport& report);

/// Makes a model ready for quantization-aware training: layers of torch::nn that vernier::nn has a
/// drop-in for are swapped for it in Sequential, ModuleList, ModuleDict and among registered
/// children, wherever they are registered; then all quantized layers get their settings, as near as
/// each can follow them (QuantizedLayer::fitting), and batch norms that directly follow one in a
/// Sequential are folded into it (batch_norm.h). The
/// drop-ins take over the parameters, the same tensors, so that nothing is drawn anew and an
/// optimizer that is there goes on; learned scales are new parameters, though: make the optimizer
/// after this.
///
/// A layer that a member of the module's class holds (`torch::nn::Linear fc{nullptr}`) cannot be
/// swapped from outside, since the class's forward() would go on calling the old one. The report
/// names it with the change to make: declare the member as vernier::nn::Linear. So it does with
/// layers of other types that hold a matrix.
///
/// A model that is prepared already is left as it is, scales and modes too. Throws Error, naming
/// the layer, when it was prepared with other settings and has its scales; and as apply_rules().
PrepareReport prepare(torch::nn::Module& model, const QuantizationRules& rules);
template <typename Contained>
PrepareReport prepare(const torch::nn::ModuleHolder<Contained>& model,
                      const QuantizationRules& rules) {
  return prepare(*model.ptr(), rules);
}

/// Puts a trained model into mode integer, after merging the batch norms that were folded
/// (merge_batch_norms): training ends here. Throws Error when it is in training mode, has no
/// quantized layer, or one without scales (names them all), and as set_mode().
void convert(torch::nn::Module& model);
template <typename Contained>
void convert(const torch::nn::ModuleHolder<Contained>& model) {
  convert(*model.ptr());
}

}  // namespace vernier
