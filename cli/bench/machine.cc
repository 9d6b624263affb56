#include <torch/version.h>
#include <vernier/cli/bench/machine.h>
#include <vernier/cli/console.h>
#include <vernier/kernels/error.h>

#include <fstream>

#ifdef VERNIER_WITH_CUDA
#include <cublasLt.h>
#include <cuda_runtime.h>
#endif

namespace vernier::bench {
namespace {

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "CPU";
}

#ifdef VERNIER_WITH_CUDA
int attribute(cudaDeviceAttr which, const Place& place) {
  int value = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&value, which, place.device.index());
  VERNIER_CHECK(status == cudaSuccess, "the GPU does not answer: ", cudaGetErrorString(status));
  return value;
}

std::string cuda_version(int version) { return concat(version / 1000, ".", version % 1000 / 10); }

std::string driver_version() {
  std::ifstream file("/sys/module/nvidia/version");
  if (std::string version; std::getline(file, version)) return version;
  int version = 0;
  cudaDriverGetVersion(&version);
  return "for CUDA " + cuda_version(version);
}

std::string cublas_version() {
  const size_t version = cublasLtGetVersion();
  return concat(version / 10000, ".", version % 10000 / 100, ".", version % 100);
}

Roof roof_of(const Place& place) {
  Roof roof;
  const double clock_ghz = attribute(cudaDevAttrClockRate, place) * 1e-6;
  const int units = attribute(cudaDevAttrMultiProcessorCount, place);
  const double memory_ghz = attribute(cudaDevAttrMemoryClockRate, place) * 1e-6;
  const int bus_bits = attribute(cudaDevAttrGlobalMemoryBusWidth, place);
  roof.gbs = 2 * memory_ghz * bus_bits / 8;  // both edges of the clock
  roof.how = concat(bus_bits, " bits x ", cli::fixed(memory_ghz, 2), " GHz x 2");
  if (attribute(cudaDevAttrComputeCapabilityMajor, place) == 9) {
    constexpr double kInt8Operations = 8192;  // a clock and multiprocessor of Hopper, dense
    roof.int8_tops = units * clock_ghz * kInt8Operations * 1e-3;
    roof.bf16_tops = roof.int8_tops / 2;
    roof.how += concat("; ", units, " multiprocessors x ", cli::fixed(clock_ghz, 2),
                       " GHz x 8192 INT8 operations");
  }
  return roof;
}
#endif

}  // namespace

Machine describe([[maybe_unused]] const Place& place) {
  Machine machine;
  machine.versions = {{"cuda", nullptr},
                      {"driver", nullptr},
                      {"cublas", nullptr},
                      {"torch", TORCH_VERSION},
                      {"vernier", VERNIER_VERSION}};
#ifdef VERNIER_WITH_CUDA
  if (place.cuda()) {
    cudaDeviceProp properties{};
    const cudaError_t status = cudaGetDeviceProperties(&properties, place.device.index());
    VERNIER_CHECK(status == cudaSuccess, "the GPU does not answer: ", cudaGetErrorString(status));
    machine.name = properties.name;
    int runtime = 0;
    cudaRuntimeGetVersion(&runtime);
    machine.versions["cuda"] = cuda_version(runtime);
    machine.versions["driver"] = driver_version();
    machine.versions["cublas"] = cublas_version();
    machine.roof = roof_of(place);
    return machine;
  }
#endif
  machine.name = cpu_name();
  return machine;
}

Place place_on(torch::Device device) {
  Place place;
  place.device = device;
#ifdef VERNIER_WITH_CUDA
  if (place.cuda()) place.cache_bytes = attribute(cudaDevAttrL2CacheSize, place);
#endif
  return place;
}

}  // namespace vernier::bench
