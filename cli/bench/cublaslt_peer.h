// cuBLASLt's own matrix products with the algorithm that is fastest here: the strongest peer that a
// library offers.
#pragma once

#include <vernier/cli/bench/timing.h>

namespace vernier::bench {

enum class LtProduct {
  bf16,     ///< bfloat16 x bfloat16 -> bfloat16
  i8i8i32,  ///< int8 x int8 -> int32, no scale
  i8i8i8    ///< int8 x int8 -> int8 by one scale
};

/// a [M, K] times b [N, K] transposed, on the current stream.
class CublasLtProduct {
 public:
  /// Times every algorithm that the library's heuristic proposes, with 64 MB of workspace, on the
  /// operands a[i], b[i] in turn, and keeps the fastest. `scale` is that of i8i8i8. Throws Error
  /// where the library has no algorithm.
  CublasLtProduct(const Place& place, LtProduct product, Tensors a, Tensors b, float scale = 1);
  ~CublasLtProduct();
  CublasLtProduct(const CublasLtProduct&) = delete;
  CublasLtProduct& operator=(const CublasLtProduct&) = delete;

  /// The product of a[set] and b[set].
  torch::Tensor run(int64_t set) const;
  /// The product of other operands of the same sizes.
  torch::Tensor run(const torch::Tensor& x, const torch::Tensor& w) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace vernier::bench
