// From the statistics of a site to the range its codes cover: pure functions.
#pragma once

#include <vernier/calibration/histogram.h>
#include <vernier/kernels/scheme.h>

#include <string>

namespace vernier {

/// How a range is chosen.
enum class CalibrationMethod {
  min_max,     ///< the extremes
  percentile,  ///< the smallest range that holds a share of the values
  mse,         ///< the least mean squared quantization error
  entropy,     ///< the least Kullback-Leibler divergence
  lsq          ///< where learned step sizes start
};

struct Calibrator {
  CalibrationMethod method = CalibrationMethod::min_max;
  double percentile = 99.99;  ///< percentile only, in (0, 100]
  /// What is kept of the range that the method finds, below and above zero, in (0, 1]: clipping
  /// that a search has found to pay (smoothquant/search.h). Symmetric schemes keep the larger.
  double keep_low = 1, keep_high = 1;

  bool operator==(const Calibrator&) const = default;
};

/// min_max, percentile, mse, entropy (also kl) or lsq. Throws Error for another name.
CalibrationMethod calibration_method_from_string(const std::string& name);
std::string to_string(CalibrationMethod method);

/// Every function below returns [-a, a] for a symmetric scheme and an interval that holds 0 for an
/// asymmetric one; {0, 0} where there is no finite value but zero. min_max gives the extremes to
/// the last bit and lsq a multiple of the mean; the others give edges of bins, so that they do not
/// move with the last bits of the values, which differ from one device to another. To them, values
/// inside a bin lie at its centre.

/// The exact extremes.
Range min_max_range(const Histogram& histogram, const Scheme& scheme);

/// The smallest a with at least `percentile` % of all finite values (zeros included) in [-a, a];
/// asymmetric: half of what is cut off on each side. Throws Error when percentile is outside (0,
/// 100].
Range percentile_range(const Histogram& histogram, const Scheme& scheme, double percentile);

/// Least sum of squared quantization errors (clipping and rounding), searched from the extremes
/// down in eighths of an octave and then closely around the best; for asymmetric schemes on a grid
/// of both sides first, then each side in turn.
Range mse_range(const Histogram& histogram, const Scheme& scheme);

/// Least KL divergence between the distribution of magnitudes clipped at a and its image on the
/// scheme's 2^(bits-1) levels (Migacz 2017, "8-bit inference with TensorRT"). Zeros have an exact
/// code and take no part. Asymmetric: [-a, a] cut back to the bins in use. Throws Error for e4m3
/// and e5m2, whose levels are not evenly spaced.
Range entropy_range(const Histogram& histogram, const Scheme& scheme);

/// Scale 2 mean |x| / sqrt(qmax), i.e. [-a, a] with a = 2 mean |x| sqrt(qmax) (learned step size
/// quantization, Esser 2020, arXiv 1902.08153, section 2.1); the mean is of values at their bins'
/// centres. Meant as the start of training at few bits. Throws Error for asymmetric schemes and for
/// e4m3 and e5m2.
Range lsq_range(const Histogram& histogram, const Scheme& scheme);

/// The range of a calibrator. Throws Error when what is to be kept is outside (0, 1].
Range calibrate(const Histogram& histogram, const Scheme& scheme, const Calibrator& calibrator);

}  // namespace vernier
