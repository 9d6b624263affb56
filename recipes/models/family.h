// What the loader knows of a family, and how a configuration's sizes are held against tensors.
#pragma once

#include <vernier/recipes/models/text_model.h>
#include <nlohmann/json_fwd.hpp>

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace vernier {

/// A family of models: how one is made of a Hugging Face folder or a checkpoint. Throwing Error,
/// the functions need not say where.
struct Family {
  const char* architecture;
  /// An empty model of a configuration; its parameters are to be loaded. Throws Error for fields it
  /// does not implement.
  std::function<std::shared_ptr<TextModel>(const nlohmann::json& config)> make;
  /// Holds the configuration's sizes against the shapes of the model's tensors, before it is made.
  std::function<void(const nlohmann::json& config, const TensorShapes& shapes)> check;
  /// The parameter that a stored tensor is, whichever head its folder was written with.
  std::function<std::string(const std::string& stored)> parameter_name;
  /// Whether a tensor that is no parameter may be left over.
  std::function<bool(const std::string& name)> unused;
  /// Whether a parameter is stored transposed.
  std::function<bool(const std::string& name)> transposed;
  /// The output layer's weight, which may be there though it is tied, and what it is tied to.
  const char* output = nullptr;
  const char* embedding = nullptr;
};

/// One dimension of a tensor and the field that says it.
struct Dimension {
  std::string field;
  int64_t size;
};

/// Shapes that are there against those a configuration asks for. Throws Error, naming field and
/// tensor, where they contradict each other or a tensor is missing.
class ShapeCheck {
 public:
  explicit ShapeCheck(const TensorShapes& shapes) : shapes_(shapes) {}

  void tensor(const std::string& name, const std::vector<Dimension>& dimensions) const;
  void linear(const std::string& name, const Dimension& out, const Dimension& in,
              bool bias = true) const;
  void norm(const std::string& name, const Dimension& size, bool bias = true) const;
  /// That there are tensors PREFIX.N.* of as many layers as the field says.
  void layers(const std::string& prefix, const Dimension& count) const;

 private:
  const TensorShapes& shapes_;
};

}  // namespace vernier
