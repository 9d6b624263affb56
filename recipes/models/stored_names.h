// Names of tensors in Hugging Face folders.
#pragma once

#include <vernier/recipes/models/text_model.h>

#include <string>

namespace vernier {

/// The parameter that a tensor of a folder of the model's architecture is, whichever head the
/// folder was written with; of an output layer's that is tied, the embedding's; "" where it is
/// none.
std::string parameter_of(const TextModel& model, const std::string& stored);

}  // namespace vernier
