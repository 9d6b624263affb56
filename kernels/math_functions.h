// Activation functions in float32 from correctly rounded operations alone, so that the CPU and the
// GPU compute the same bits, which their own erff, expf and tanhf do not. Host and device code
// share this header; the order of the operations is part of the numeric contract
// (docs/numerics.md).
//
// Errors are measured against double over dense samples of the whole range. With u = 2^-24:
//   gelu, gelu_tanh  |y - exact| <= 5 u |x|, about what the textbook formula loses in 1 + erf(x)
//   silu             |y - exact| <= 8 u |exact| for x >= -16, 24 u |exact| down to -87, then zero
// for |x| > 2^-100. NaN gives NaN, infinity infinity, -infinity a zero; nothing overflows on the
// way.
#pragma once

#include <vernier/kernels/scheme.h>

#include <bit>
#include <cmath>
#include <cstdint>

namespace vernier {
namespace math {

/// a * b + c, rounded once.
VERNIER_HOST_DEVICE inline float fused_multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return std::fmaf(a, b, c);
#endif
}

VERNIER_HOST_DEVICE inline float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

/// The larger of x and a nonzero bound, or of x and +0.0; NaN where x is NaN.
VERNIER_HOST_DEVICE inline float at_least(float x, float bound) {
#ifdef __CUDA_ARCH__
  float result;  // one instruction; a comparison and a selection are two
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(bound));
  return result;
#else
  return x <= bound ? bound : x;
#endif
}

/// The smaller of x and a nonzero bound; the bound where x is NaN.
VERNIER_HOST_DEVICE inline float at_most(float x, float bound) {
#ifdef __CUDA_ARCH__
  return fminf(x, bound);
#else
  return x < bound ? x : bound;
#endif
}

/// x limited to [0, 1]. x is no NaN.
VERNIER_HOST_DEVICE inline float saturate(float x) {
#ifdef __CUDA_ARCH__
  return __saturatef(x);  // part of the instruction that computes x
#else
  const float low = x > 0.0f ? x : 0.0f;
  return low < 1.0f ? low : 1.0f;
#endif
}

/// 1 / y, correctly rounded, for 1 <= y <= 2^126.
VERNIER_HOST_DEVICE inline float reciprocal(float y) {
#ifdef __CUDA_ARCH__
  // One Newton step on the hardware's estimate: what __frcp_rn does where neither number is
  // denormal, without its test for that.
  float estimate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(y));
  return __fmaf_rn(estimate, -__fmaf_rn(y, estimate, -1.0f), estimate);
#else
  return 1.0f / y;
#endif
}

/// The polynomial with coefficients c[0] + c[1] x + ..., by Horner's rule.
template <int N>
VERNIER_HOST_DEVICE float polynomial(float x, const float (&c)[N]) {
  float sum = c[N - 1];
  for (int i = N - 2; i >= 0; --i) sum = fused_multiply_add(sum, x, c[i]);
  return sum;
}

/// e^x for -87 <= x <= 87, within (3 + |x| / 3) u of it relatively.
VERNIER_HOST_DEVICE inline float exponential(float x) {
  // x log2(e) = n + f, n an integer, which the sum with 1.5 * 2^23 leaves in the low bits.
  constexpr float kLog2E = 0x1.715476p+0f, kShift = 0x1.8p+23f;
  // Minimax for (2^f - 1) / f on [-0.5, 0.5], relative error 2^-23.4 of 2^f.
  const float c[] = {1.0f,           0x1.62e42ap-1f, 0x1.ebf9bcp-3f,
                     0x1.c6b754p-5f, 0x1.3cea9ep-7f, 0x1.5bb9fcp-10f};
  const float shifted = fused_multiply_add(x, kLog2E, kShift);
#ifdef __CUDA_ARCH__
  const float n = __fadd_rn(shifted, -kShift);
#else
  const float n = shifted - kShift;
#endif
  const float power = polynomial(fused_multiply_add(x, kLog2E, -n), c);
#ifdef __CUDA_ARCH__
  return __uint_as_float((__float_as_uint(shifted) << 23) + __float_as_uint(power));
#else
  return std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) +
                              std::bit_cast<uint32_t>(power));
#endif
}

/// max(x, 0) - a p(a)^8 / 2 with a = min(|x|, end): x Phi(x) for a symmetric distribution whose
/// tail 1 - Phi(a) is p(a)^8 / 2. The eighth root of a tail like exp(-a^2 / 2) is so flat that a
/// short polynomial gives it. p(end) <= 0 makes the tail end in zero.
template <int N>
VERNIER_HOST_DEVICE float times_distribution(float x, float end, const float (&c)[N]) {
  const float a = at_most(std::fabs(x), end);
  float p = saturate(polynomial(a, c));
  p = multiply(p, p);
  p = multiply(p, p);
  p = multiply(p, p);
  return fused_multiply_add(multiply(p, -0.5f), a, at_least(x, 0.0f));
}

}  // namespace math

/// max(x, 0); NaN stays NaN, -0.0 becomes 0.0.
VERNIER_HOST_DEVICE inline float relu(float x) { return math::at_least(x, 0.0f); }

/// x Phi(x), Phi the normal distribution's: x / 2 (1 + erf(x / sqrt(2))) (Hendrycks and Gimpel
/// 2016, arXiv 1606.08415).
VERNIER_HOST_DEVICE inline float gelu(float x) {
  const float c[] = {1.0f,
                     -0x1.98843ep-4f,
                     -0x1.1d36b0p-5f,
                     -0x1.81a18ep-11f,
                     0x1.aeaf8ap-10f,
                     0x1.2f7728p-15f,
                     -0x1.121bfap-14f,
                     0x1.0fc9dcp-17f,
                     -0x1.567944p-22f};
  return math::times_distribution(x, 8.4f, c);
}

/// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), the approximation of the same paper.
VERNIER_HOST_DEVICE inline float gelu_tanh(float x) {
  const float c[] = {1.0f,
                     -0x1.9884ccp-4f,
                     -0x1.1d2432p-5f,
                     -0x1.713206p-11f,
                     0x1.e4c9dap-10f,
                     -0x1.e85086p-13f,
                     0x1.8f32eap-13f,
                     -0x1.7b05aep-13f,
                     0x1.358902p-14f,
                     -0x1.011516p-16f,
                     0x1.b2a0f8p-20f,
                     -0x1.2b8aeep-24f};
  return math::times_distribution(x, 6.0f, c);
}

/// x / (1 + exp(-x)) (Elfwing 2017, arXiv 1702.03118; "swish").
VERNIER_HOST_DEVICE inline float silu(float x) {
  constexpr float kEnd = 87.0f;  // exp(kEnd) is far from overflow, silu(-kEnd) is -1e-36
  const float e = math::exponential(math::at_most(math::at_least(-x, -kEnd), kEnd));
#ifdef __CUDA_ARCH__
  const float y = __fmul_rn(x, math::reciprocal(__fadd_rn(1.0f, e)));
#else
  const float y = x * math::reciprocal(1.0f + e);
#endif
  return x < -kEnd ? 0.0f : y;
}

}  // namespace vernier
