// Hugging Face folders whose weights are quantized already, in the format of compressed-tensors.
#pragma once

#include <vernier/export/safetensors.h>
#include <vernier/qat/layer.h>
#include <vernier/recipes/models/text_model.h>
#include <nlohmann/json.hpp>

#include <map>
#include <optional>
#include <string>

namespace vernier {

/// What a configuration says of its folder's quantization, and the tensors that go with it.
class QuantizedFolder {
 public:
  /// Nothing where the configuration has no `quantization_config`. Throws Error, naming the field,
  /// for what is not implemented: another method than compressed-tensors, another format than
  /// `int-quantized` and `float-quantized`, caches and outputs that are quantized.
  static std::optional<QuantizedFolder> of(const nlohmann::json& config);

  /// Whether a stored tensor is a scale or a zero point: no parameter of the model.
  static bool is_scale(const std::string& stored);

  /// Gives a layer of the model the codes of the stored tensor `weight` and the scales beside it,
  /// and leaves it calibrated. Throws Error when scales are missing, of another shape than the
  /// layer's group says, or none, or the group is not implemented.
  void load_layer(const TextModel& model, const std::string& name, QuantizedLayer& layer,
                  const SafetensorsFolder& folder, const std::string& weight) const;

 private:
  struct Group {
    std::vector<std::string> targets;
    nlohmann::json weights, inputs;
  };
  const Group& group_of(const std::string& layer) const;

  std::vector<Group> groups_;
};

}  // namespace vernier
