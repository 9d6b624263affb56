// The BERT family: post-norm encoders (Devlin 2019, arXiv 1810.04805), sentence-transformers'
// MiniLM among them.
#pragma once

#include <vernier/recipes/models/text_model.h>
#include <nlohmann/json_fwd.hpp>

namespace vernier {

/// An empty BertModel of a configuration; its parameters are to be loaded. Throws Error for fields
/// it does not implement.
std::shared_ptr<TextModel> make_bert(const nlohmann::json& config);

/// Holds the configuration's sizes against the shapes of a BertModel's tensors, before a model is
/// made of it. Throws Error, naming field and tensor, where they contradict each other or a tensor
/// is missing.
void check_bert(const nlohmann::json& config, const TensorShapes& shapes);

}  // namespace vernier
