// What quantize_cpu.cc, fake_quantize_cpu.cc and masked_quantize_cpu.cc share: a tensor cut into
// runs that share a scale, and what is made of a run; internal.
#pragma once

#include <vernier/kernels/element_cpu.h>
#include <vernier/kernels/parallel.h>

#include <algorithm>

namespace vernier::cpu {

inline constexpr int64_t kQuantizeGrain = 16 * kBlock;

/// The scales of one run of elements: either one for all of them (step 0) or one each (step 1).
struct RunScales {
  const float* scale;
  const int32_t* zero_point;  // null: all zero
  int64_t step;
  int32_t qmin;
  int32_t qmax;

  int32_t zero_point_at(int64_t i) const { return zero_point ? zero_point[i] : 0; }
};

/// Cuts [begin, end) into runs of at most kBlock elements whose scales are one value or consecutive
/// values: f(first element, length, scales).
template <typename F>
void for_each_run(const QuantizeArguments& a, int64_t begin, int64_t end, const F& f) {
  const bool one_each = a.map.inner == 1 && a.map.count > 1;
  for (int64_t i = begin; i < end;) {
    const int64_t first = a.map.index(i);
    const int64_t until = one_each ? i + a.map.count - first : (i / a.map.inner + 1) * a.map.inner;
    const int64_t n = std::min({kBlock, end - i, a.map.count == 1 ? kBlock : until - i});
    f(i, n,
      RunScales{a.scale + first, a.zero_point ? a.zero_point + first : nullptr, one_each ? 1 : 0,
                a.qmin, a.qmax});
    i += n;
  }
}

/// The codes of a run; in quantize_cpu.cc.
void quantize_run(const float* x, int64_t n, const RunScales& s, int8_t* codes);
/// The real values of its codes; in fake_quantize_cpu.cc.
void fake_quantize_run(const float* x, int64_t n, const RunScales& s, float* out);

}  // namespace vernier::cpu
