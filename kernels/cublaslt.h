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

/// What the library chose for a shape, if anything.
struct CublasLtAlgorithm {
  bool usable = false;
  cublasLtMatmulAlgo_t algorithm = {};
};

/// The algorithm of each shape, by whatever tells shapes apart. Safe to use from several threads.
template <typename Key>
class CublasLtAlgorithmCache {
 public:
  /// The entry kept for the key; choose()'s where there is none yet.
  template <typename F>
  CublasLtAlgorithm get(const Key& key, const F& choose) {
    const std::lock_guard lock(mutex_);
    const auto found = entries_.find(key);
    if (found != entries_.end()) return found->second;
    // Text of every length brings a new m: forgetting all of them now and then is cheap and bounds
    // the memory.
    if (entries_.size() >= kMost) entries_.clear();
    return entries_[key] = choose();
  }
  /// An entry that is not usable keeps the library from being asked again.
  void put(const Key& key, const CublasLtAlgorithm& entry) {
    const std::lock_guard lock(mutex_);
    entries_[key] = entry;
  }

 private:
  static constexpr size_t kMost = 4096;
  std::mutex mutex_;
  std::map<Key, CublasLtAlgorithm> entries_;
};

}  // namespace vernier::cuda
