// Rotary embeddings in torch's operations, for the tests on both devices.
#pragma once

#include <torch/torch.h>

namespace vernier::testing {

/// Tables [rows, half] of cosines and sines.
inline std::pair<torch::Tensor, torch::Tensor> rotary_tables(int64_t rows, int64_t half) {
  const torch::Tensor angles = torch::rand({rows, half}) * 20;
  return {angles.cos(), angles.sin()};
}

/// rotary_embedding() in float32 operations.
inline torch::Tensor rotated(const torch::Tensor& x, const torch::Tensor& cosine,
                             const torch::Tensor& sine) {
  const int64_t half = cosine.size(1), copies = x.size(0) / cosine.size(0);
  const torch::Tensor wide = x.to(torch::kFloat), c = cosine.repeat({copies, 1}).unsqueeze(1),
                      s = sine.repeat({copies, 1}).unsqueeze(1);
  const torch::Tensor first = wide.narrow(2, 0, half), second = wide.narrow(2, half, half);
  return torch::cat({first * c - second * s, second * c + first * s,
                     wide.narrow(2, 2 * half, x.size(2) - 2 * half)},
                    2)
      .to(x.scalar_type());
}

}  // namespace vernier::testing
