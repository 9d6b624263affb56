// The proof: integer kernels compute what fake-quantization trained.
#pragma once

#include <torch/types.h>
#include <vernier/qat/layer.h>

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace vernier {

/// What was compared at one layer. The first three blocks give the layer the same float input in
/// both modes, taken from the fake-quant run; `moved_codes` compares two whole runs.
struct LayerValidation {
  std::string name;
  int64_t codes = 0;            ///< input codes compared
  int64_t code_mismatches = 0;  ///< of them different
  int64_t weight_codes = 0;
  int64_t weight_code_mismatches = 0;

  /// int32 accumulators compared with exact sums of fake-quant codes; none in FP8 layers
  int64_t accumulators = 0;
  int64_t accumulator_mismatches = 0;  ///< of them different

  int64_t outputs = 0;        ///< layer outputs compared
  int64_t outside_bound = 0;  ///< of them further apart than rounding explains, or NaN
  double worst_of_bound = 0;  ///< largest difference as a share of its bound; NaN where one was
  double max_difference = 0;  ///< largest difference; NaN where one was

  int64_t moved_codes = 0;  ///< codes that differ between the two whole runs
};

struct ValidationReport {
  std::vector<LayerValidation> layers;
  int64_t runs = 0;
  double output_signal = 0;          ///< sum of squares of the fake-quant run's outputs
  double output_noise = 0;           ///< sum of squared differences of the integer run's
  double max_output_difference = 0;  ///< largest difference of whole-run outputs; NaN where one was
  double max_output = 0;  ///< largest magnitude of the fake-quant run's outputs; NaN where one was

  int64_t total(int64_t LayerValidation::*member) const;
  /// Of all layers; NaN where one layer's is.
  double worst_of_bound() const;
  /// Whether nothing differs that must not: all codes, all accumulators, all outputs within their
  /// bounds, and the whole runs' outputs with a relative error sqrt(noise / signal) of at most
  /// `output_tolerance`.
  bool passed(double output_tolerance) const;
  double relative_output_error() const;
};

/// Compares a calibrated model's integer mode with its fake-quant mode, batch by batch.
///
/// Per layer, on the fake-quant run's inputs: the codes that fake-quantization implies (its output
/// divided by the scale) against those of the integer kernels; exact sums of products of the
/// fake-quant codes (float64, exact below 2^53) against int32 accumulators; and the two float
/// outputs y, y' against
///   |y - y'| <= (K + 8) 2^-24 (scale_x scale_w sum |x||w| + |bias|),
/// the bound of float32 summation in any order (Higham 2002, eq. 3.5) plus the epilogue's
/// roundings. FP8 layers have no exact accumulators: there the codes are compared bit for bit, and
/// the outputs against the same bound, to which a GPU's FP8 tensor cores add kFp8TensorCoreError
/// (kernels/fp8.h) of sum |x||w|. Over the whole model: how many codes the two runs, each on its
/// own activations, disagree in, and how far the outputs are apart.
class Validator {
 public:
  /// Throws Error when a layer that is to be quantized is not calibrated.
  explicit Validator(torch::nn::Module& model);

  /// `run` computes the model's output for one batch in whatever mode the model is. Modes are set
  /// back afterwards.
  void add(const std::function<torch::Tensor()>& run);

  const ValidationReport& report() const { return report_; }

 private:
  void compare_weight(QuantizedLayer& layer, LayerValidation& result);
  // One call of a layer in the fake-quant run, and the codes of its inputs in the integer run from
  // number `seen` on.
  void compare_layer(QuantizedLayer& layer, const std::vector<torch::Tensor>& inputs,
                     const torch::Tensor& output, LayerValidation& result,
                     const std::vector<torch::Tensor>& other_run, size_t& seen);

  torch::nn::Module& model_;
  std::vector<NamedLayer> layers_;
  ValidationReport report_;
};

}  // namespace vernier
