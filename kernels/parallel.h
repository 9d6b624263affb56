// Threads of the CPU kernels: OpenMP, the pool that LibTorch uses, so that at::set_num_threads
// holds here too.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace vernier {

/// Calls f(begin, end) over [0, n) on as many threads as LibTorch would use, each range at least
/// `grain` long. Inside another parallel region it runs on the calling thread. f must not throw.
template <typename F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  const int64_t wanted = std::min<int64_t>(omp_get_max_threads(), n / std::max<int64_t>(grain, 1));
  if (wanted <= 1 || omp_in_parallel()) {
    if (n > 0) f(int64_t{0}, n);
    return;
  }
  // The whole team every time, some of it idle: libgomp ends and starts threads when the size of
  // the team changes.
#pragma omp parallel
  {
    const int64_t sharers = std::min<int64_t>(wanted, omp_get_num_threads());
    const int64_t share = (n + sharers - 1) / sharers;
    const int64_t begin = std::min(n, share * omp_get_thread_num());
    const int64_t end = std::min(n, begin + share);
    if (begin < end) f(begin, end);
  }
}

}  // namespace vernier

/// Compiles a function for several instruction sets and picks one at load time. Results are the
/// same in each: contraction is off and every operation is correctly rounded. Off under sanitizers,
/// whose runtime is not up yet when the loader picks.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__clang__)
#define VERNIER_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VERNIER_SIMD
#endif
