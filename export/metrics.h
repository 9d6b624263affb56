// Numbers by which models are compared.
#pragma once

#include <vector>

namespace vernier {

/// Spearman's rank correlation in [-1, 1]; equal values share the mean of their ranks. NaN where
/// one side is constant. Throws Error when the sizes differ or there are fewer than two values.
double spearman(const std::vector<double>& a, const std::vector<double>& b);

/// Mean of |a[i] - b[i]|. Throws Error when the sizes differ or there is nothing.
double mean_absolute_error(const std::vector<double>& a, const std::vector<double>& b);

/// Signal to quantization noise ratio in dB: 10 log10(sum a^2 / sum (a - b)^2) of accumulated sums;
/// infinite where there is no noise, NaN where either sum is.
double sqnr_db(double signal, double noise);

}  // namespace vernier
