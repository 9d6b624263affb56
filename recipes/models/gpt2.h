// The GPT-2 family: decoders with learned positions, one matrix for queries, keys and values, and
// weights that are stored transposed (Radford et al. 2019, "Language Models are Unsupervised
// Multitask Learners").
#pragma once

#include <vernier/recipes/models/family.h>

namespace vernier {

Family gpt2_family();

}  // namespace vernier
