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

struct MaskedJob {
  QuantizeArguments arguments;
  MaskedOutput output;
};

/// A gradient and the mask of what becomes zero.
struct ClippedGradient {
  const uint8_t* clipped = nullptr;  ///< [ceil(numel / 8)]
  int64_t numel = 0;
  ElementType type = ElementType::f32;
  void* gradient = nullptr;
};

}  // namespace vernier

namespace vernier::cpu {

void quantize_masked(const MaskedJob& job);
void zero_clipped(const ClippedGradient& job);

}  // namespace vernier::cpu

namespace vernier::cuda {

/// `stream` is a cudaStream_t. Each call only enqueues work; a launch that fails throws Error.
/// A second job that is null or empty is none.
void quantize_masked(const MaskedJob& first, const MaskedJob* second, void* stream);
void zero_clipped(const ClippedGradient& first, const ClippedGradient* second, void* stream);

}  // namespace vernier::cuda
