// The GPT-NeoX family (Black et al. 2022, arXiv 2204.06745; Pythia among them): decoders with
// LayerNorm, partial rotary embeddings, one matrix for queries, keys and values, and attention and
// feed-forward layer side by side.
#pragma once

#include <vernier/recipes/models/family.h>

namespace vernier {

Family gpt_neox_family();

}  // namespace vernier
