// CUTLASS's int8 products with an epilogue of visitors: what a library of templates gives to those
// who assemble it. No torch header: nvcc compiles the kernels.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace vernier::bench {

/// int8 a [m, k] times b [n, k] transposed to bfloat16 [m, n], times row_scale [m] and column_scale
/// [n], plus bias [n]; all row-major and contiguous.
struct CutlassProduct {
  const int8_t* a;
  const int8_t* b;
  const float* row_scale;
  const float* column_scale;
  const float* bias;
  void* output;
  int m, n, k;
};

/// What a product can be computed with: tiles, clusters, orders of the tiles.
std::vector<std::string> cutlass_kernels();

/// Enqueues it with the kernel of this number. Throws Error where the kernel does not take it.
void run_cutlass(int kernel, const CutlassProduct& product, void* stream);

}  // namespace vernier::bench
