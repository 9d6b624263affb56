#include <vernier/kernels/int8_gemm_sm90.cuh>

namespace vernier::cuda::sm90 {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found through the runtime: programs do not link the driver.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                           cudaEnableDefault, &result),
          "looking for cuTensorMapEncodeTiled");
    VERNIER_CHECK(result == cudaDriverEntryPointSuccess && found,
                  "the GPU driver has no cuTensorMapEncodeTiled: install a driver of CUDA 12 or "
                  "later");
    return reinterpret_cast<EncodeTiled>(found);
  }();
  return function;
}

}  // namespace

CUtensorMap tensor_map(const int8_t* operand, int64_t rows, int64_t k, int box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(k)};
  const cuuint32_t box[2] = {kTileK, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t element_strides[2] = {1, 1};
  const auto encode = [&] {
    return encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<int8_t*>(operand),
                          sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
                          CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult status = encode();
  if (status == CUDA_ERROR_INVALID_CONTEXT) {
    // The first call of this thread: the runtime makes its context the driver's when it is told the
    // device.
    check(cudaSetDevice(current_device()), "cudaSetDevice");
    status = encode();
  }
  VERNIER_CHECK(status == CUDA_SUCCESS, "int8_gemm: no tensor map for int8 [", rows, ", ", k,
                "] (driver error ", static_cast<int>(status), ")");
  return map;
}

void allow_shared_memory(const void* kernel, int bytes, std::atomic<uint64_t>& devices) {
  const int device = current_device();
  const uint64_t bit = uint64_t{1} << (device % 64);
  if (device < 64 && (devices.load() & bit)) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "int8_gemm");
  devices |= bit;
}

bool is_available() {
#ifdef VERNIER_WITH_SM90A
  int major = 0, minor = 0;
  const int device = current_device();
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "int8_gemm");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "int8_gemm");
  return major == 9 && minor == 0;
#else
  return false;
#endif
}

void int8_gemm(int configuration, const int8_t* codes, const int8_t* weight, int64_t k,
               const EpilogueArguments& epilogue, void* stream) {
  // The copy engine's coordinates and the numbers of tiles are 32-bit.
  constexpr int64_t kMostRows = int64_t{1} << 30, kMostOutputs = int64_t{1} << 40;
  VERNIER_CHECK(epilogue.rows <= kMostRows && epilogue.columns <= kMostRows &&
                    epilogue.rows * epilogue.columns <= kMostOutputs,
                "int8_gemm: an output of ", epilogue.rows, " x ", epilogue.columns,
                " is too large for one product: split the batch");
  const Operands operands{codes, weight, k};
  switch (epilogue.output_type) {
    case GemmOutput::i32:
      return run<int32_t>(configuration, operands, epilogue, stream);
    case GemmOutput::f32:
      return run<float>(configuration, operands, epilogue, stream);
    case GemmOutput::f16:
      return run<__half>(configuration, operands, epilogue, stream);
    case GemmOutput::bf16:
      return run<__nv_bfloat16>(configuration, operands, epilogue, stream);
    case GemmOutput::i8:
      return run<int8_t>(configuration, operands, epilogue, stream);
  }
}

}  // namespace vernier::cuda::sm90
