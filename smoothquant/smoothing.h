// SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): per-channel factors that move outliers from
// activations into weights, and their exact folding into the layers around them.
#pragma once

#include <torch/types.h>
#include <vernier/calibration/observer.h>

#include <vector>

namespace vernier {

/// Largest magnitude of every channel of a site, float32 [channels]. Throws Error when the
/// statistics have no channels.
torch::Tensor channel_amax(const SiteStatistics& statistics);

/// Largest magnitude of every input channel over all weights [out, in] that read the same
/// activation, float32 [in]. Throws Error when there is none or their input sizes differ.
torch::Tensor input_channel_amax(const std::vector<torch::Tensor>& weights);

/// Equation 4 of the paper: s[j] = activation[j]^alpha / weight[j]^(1 - alpha), float32 like the
/// arguments. Channels that are dead on either side keep the factor 1: there is nothing to migrate.
/// Throws Error when alpha is outside [0, 1], the sizes differ, or an amax is negative, NaN or
/// infinite.
torch::Tensor smoothing_factors(const torch::Tensor& activation_amax,
                                const torch::Tensor& weight_amax, double alpha);

/// Divides what a producer emits by the factors: each output channel of its weight ([out] of a norm
/// or [out, in] of a linear) and of its bias (may be undefined), in place. Throws Error when shapes
/// do not fit or a result is not finite in the tensor's dtype; then nothing has changed.
void divide_outputs(torch::Tensor& weight, torch::Tensor& bias, const torch::Tensor& factors);

/// Multiplies the input channels of a reader's weight [out, in] by the factors, in place: together
/// with divide_outputs on everything that feeds it, the composed function is unchanged up to
/// rounding. Throws Error as divide_outputs.
void multiply_inputs(torch::Tensor& weight, const torch::Tensor& factors);

}  // namespace vernier
