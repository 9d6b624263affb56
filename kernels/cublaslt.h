// What the files that call cuBLASLt share; internal, for .cu files only.
#pragma once

#include <cublasLt.h>
#include <vernier/kernels/launch.h>

#include <map>
#include <mutex>

namespace vernier::cuda {

/// One handle a device, made at its first use; null where that fails. They live as long as the
/// process: at exit the CUDA runtime may be gone before static objects are.
inline cublasLtHandle_t cublaslt_handle(int device) {
  static std::mutex mutex;
  static auto& handles = *new std::map<int, cublasLtHandle_t>;
  const std::lock_guard lock(mutex);
  cublasLtHandle_t& handle = handles[device];
  if (!handle && cublasLtCreate(&handle) != CUBLAS_STATUS_SUCCESS) handle = nullptr;
  return handle;
}

/// A chain of calls, of which the first that fails makes the rest do nothing.
class CublasLtStatus {
 public:
  template <typename Call>
  CublasLtStatus& then(const Call& call) {
    ok_ = ok_ && call() == CUBLAS_STATUS_SUCCESS;
    return *this;
  }
  bool ok() const { return ok_; }

 private:
  bool ok_ = true;
};

}  // namespace vernier::cuda
