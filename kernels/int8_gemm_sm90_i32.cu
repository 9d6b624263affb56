#include <vernier/kernels/int8_gemm_sm90.cuh>

namespace vernier::cuda::sm90 {

template void run<int32_t>(int, const Operands&, const EpilogueArguments&, void*);

}  // namespace vernier::cuda::sm90
