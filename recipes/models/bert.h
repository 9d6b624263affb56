// The BERT family: post-norm encoders (Devlin 2019, arXiv 1810.04805), sentence-transformers'
// MiniLM among them.
#pragma once

#include <vernier/recipes/models/family.h>

namespace vernier {

/// An empty BertModel of a configuration; its parameters are to be loaded. Throws Error for fields
/// it does not implement.
std::shared_ptr<TextModel> make_bert(const nlohmann::json& config);

Family bert_family();

}  // namespace vernier
