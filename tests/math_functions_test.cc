// Vernier's own activation functions against double precision, over all exponents.
#include <gtest/gtest.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/math_functions.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>

namespace vernier {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kUnit = 0x1p-24;

double exact_gelu(double x) { return 0.5 * x * std::erfc(-x / std::numbers::sqrt2); }
double exact_sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double exact_silu(double x) { return x * exact_sigmoid(x); }
double exact_gelu_tanh(double x) {
  const double slope = 2 * std::sqrt(2 / std::numbers::pi);
  return x * exact_sigmoid(slope * (x + 0.044715 * x * x * x));
}

/// Calls f(x) for floats of either sign: densely between 2^-20 and 2^9, where the functions bend,
/// thinly elsewhere.
template <typename F>
void for_sample(const F& f) {
  const auto bits_of = [](float x) { return std::bit_cast<uint32_t>(x); };
  for (uint32_t bits = 0; bits < bits_of(kInfinity);
       bits += bits >= bits_of(0x1p-20f) && bits < bits_of(0x1p9f) ? 97 : 99'991) {
    f(std::bit_cast<float>(bits));
    f(-std::bit_cast<float>(bits));
  }
}

/// The largest |y(x) - exact(x)| / (unit(x) 2^-24) over the sample, and where.
template <typename Y, typename Exact, typename Unit>
void expect_error_below(double bound, const Y& y, const Exact& exact, const Unit& unit) {
  double worst = 0;
  float where = 0;
  for_sample([&](float x) {
    if (std::fabs(x) < 0x1p-100f) return;  // denormals on the way
    const double error = std::fabs(y(x) - exact(x)) / (unit(x) * kUnit);
    if (error > worst) {
      worst = error;
      where = x;
    }
  });
  EXPECT_LE(worst, bound) << "at " << where;
  EXPECT_GT(worst, bound / 8);  // the sample is there, and the bound says something
}

TEST(MathFunctions, GeluError) {
  expect_error_below(5, gelu, exact_gelu, [](double x) { return std::fabs(x); });
}

TEST(MathFunctions, GeluTanhError) {
  expect_error_below(5, gelu_tanh, exact_gelu_tanh, [](double x) { return std::fabs(x); });
}

TEST(MathFunctions, SiluError) {
  const auto unit = [](double x) {
    if (x < -87) return std::fabs(exact_silu(-87)) / kUnit;  // zero
    return std::fabs(exact_silu(x)) * (x < -16 ? 3 : 1);
  };
  expect_error_below(8, silu, exact_silu, unit);
}

TEST(MathFunctions, ExponentialError) {
  for (float x = -87; x <= 87; x += 0.0003f) {
    const double exact = std::exp(static_cast<double>(x));
    ASSERT_LE(std::fabs(math::exponential(x) - exact), (3 + std::fabs(x) / 3) * kUnit * exact) << x;
  }
  EXPECT_EQ(math::exponential(0), 1.0f);
}

TEST(MathFunctions, SpecialValues) {
  for (float (*f)(float) : {gelu, gelu_tanh, silu, relu}) {
    EXPECT_TRUE(std::isnan(f(kNaN)));
    EXPECT_EQ(f(kInfinity), kInfinity);
    EXPECT_EQ(f(-kInfinity), 0.0f);
    EXPECT_EQ(f(0.0f), 0.0f);
    EXPECT_EQ(f(-0.0f), 0.0f);
    for (const float large : {20.0f, 88.5f, 1e4f, 3e38f}) {
      EXPECT_EQ(f(large), large);
      EXPECT_NEAR(f(-large), 0.0f, 5e-8f);
    }
  }
  EXPECT_EQ(gelu(-9.0f), 0.0f);
  EXPECT_EQ(gelu_tanh(-7.0f), 0.0f);
  EXPECT_EQ(silu(-87.5f), 0.0f);
  EXPECT_EQ(relu(-2.0f), 0.0f);
  EXPECT_EQ(relu(3.5f), 3.5f);
  EXPECT_FALSE(std::signbit(relu(-0.0f)));
}

TEST(MathFunctions, FinitePositiveAndMonotoneWhereItShouldBe) {
  // Above 1 all three rise: no polynomial's end or exponent's step shows by more than its error.
  for (float (*f)(float) : {gelu, gelu_tanh, silu}) {
    float last = f(1.0f);
    for (float x = 1; x < 100; x += 0.0005f) {
      const float y = f(x);
      ASSERT_GE(y, last) << x;
      ASSERT_LE(y, x);
      last = y;
    }
  }
}

}  // namespace
}  // namespace vernier
