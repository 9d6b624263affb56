// The device functions behind masked_quantize.h; internal. cpu:: in masked_quantize_cpu.cc, cuda::
// in masked_quantize_cuda.cu.
#pragma once

#include <vernier/kernels/element_type.h>

#include <optional>

namespace vernier {

/// What quantize_masked writes.
struct MaskedOutput {
  void* values = nullptr;           ///< [numel] of `type`, or int8 codes where it has none
  std::optional<ElementType> type;  ///< absent: int8 codes
  uint8_t* clipped = nullptr;       ///< [ceil(numel / 8)] or null: not wanted
};

}  // namespace vernier

namespace vernier::cpu {

void quantize_masked(const QuantizeArguments& arguments, const MaskedOutput& output);
void zero_clipped(const uint8_t* clipped, int64_t numel, ElementType type, void* gradient);

}  // namespace vernier::cpu

namespace vernier::cuda {

/// `stream` is a cudaStream_t. Each call only enqueues work; a launch that fails throws Error.
void quantize_masked(const QuantizeArguments& arguments, const MaskedOutput& output, void* stream);
void zero_clipped(const uint8_t* clipped, int64_t numel, ElementType type, void* gradient,
                  void* stream);

}  // namespace vernier::cuda
