// The Llama family: pre-norm decoders with RMSNorm, rotary embeddings, grouped heads and a gated
// feed-forward layer (Touvron et al. 2023, arXiv 2307.09288; Grattafiori et al. 2024, arXiv
// 2407.21783), and those that differ from it in a bias or a norm: Mistral (arXiv 2310.06825), Qwen2
// (arXiv 2407.10671), Qwen3 (arXiv 2505.09388).
#pragma once

#include <vernier/recipes/models/family.h>

#include <vector>

namespace vernier {

std::vector<Family> llama_families();

}  // namespace vernier
