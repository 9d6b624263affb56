// The OPT family: decoders with learned positions and a ReLU feed-forward layer, norms before (or,
// of one size, after) the residual (Zhang et al. 2022, arXiv 2205.01068).
#pragma once

#include <vernier/recipes/models/family.h>

namespace vernier {

Family opt_family();

}  // namespace vernier
