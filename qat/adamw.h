// The optimizer of quantization-aware fine-tuning: AdamW in fused kernels, with learned ranges that
// move by a share of themselves.
#pragma once

#include <torch/nn/module.h>
#include <torch/serialize/archive.h>

#include <vector>

namespace vernier {

/// The rates are given with every step.
struct AdamWSettings {
  double beta1 = 0.9;
  double beta2 = 0.98;
  double epsilon = 1e-8;
  double weight_decay = 0;  ///< of tensors of two and more dimensions, never of ranges
  double clip_norm = 1.0;   ///< the gradient of all weights together is at most this long; 0: as is

  bool operator==(const AdamWSettings&) const = default;
};

/// AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over the parameters of a model that require
/// gradients, all float32 and on one device.
///
/// Learned scales are trained by their logarithm: Adam moves a parameter by about its rate whatever
/// its gradient, so that a step multiplies a scale by about exp(+-range_rate), be it one of 8 bits
/// or of 2, and it stays positive. Learned zero points move in units of half the codes, so that a
/// range's edges move as they do by its scale. Ranges are neither decayed nor do they count when
/// gradients are clipped.
///
/// Gradients live in memory that is laid out once and given to the parameters: what accumulates
/// into them and what steps are recorded (CUDA graphs) finds them where they were. No call makes
/// the host wait for a GPU.
class FusedAdamW {
 public:
  /// After calibration: ranges without a value, as layers in full precision have them, are left
  /// out. Throws Error when a parameter is not float32 or on another device.
  FusedAdamW(const torch::nn::Module& model, const AdamWSettings& settings = {});

  /// Makes all gradients zero.
  void clear_gradients();
  /// One step from what the gradients hold, which are changed by it. Rates are float32 tensors of
  /// one element on the parameters' device; `range_rate` is that of learned ranges.
  void step(const torch::Tensor& rate, const torch::Tensor& range_rate);

  /// The moments, the ranges' own variables and the number of steps.
  void save(torch::serialize::OutputArchive& archive) const;
  /// Takes them back, after the model took back its parameters. Throws Error when they are of
  /// another model, and leaves all as it is then.
  void load(torch::serialize::InputArchive& archive);

 private:
  // Tensors that lie one behind the other in one.
  struct Flat {
    torch::Tensor all;
    std::vector<torch::Tensor> views;
  };
  struct Group {
    std::vector<torch::Tensor> parameters;  // what steps: the model's, or the ranges' variables
    std::vector<torch::Tensor> gradients;   // views, one a parameter
    Flat first, second;                     // moments
    double weight_decay = 0;
    double epsilon = 0;
  };

  static Flat flat_zeros(const std::vector<torch::Tensor>& like);
  void add_group(std::vector<torch::Tensor> parameters, std::vector<torch::Tensor> gradients,
                 double weight_decay, double epsilon);
  void attach_gradients();
  void set_ranges();
  void update(Group& group, const torch::Tensor& rate,
              const std::optional<torch::Tensor>& divide_by);

  AdamWSettings settings_;
  std::vector<torch::Tensor> weights_;  // matrices, then the rest
  std::vector<torch::Tensor> scales_, zero_points_;
  std::vector<double> half_codes_;  // of each zero point: half the distance between qmin and qmax
  Flat weight_gradients_, range_gradients_;
  Flat variables_;  // of the ranges: logarithms of scales, then zero points in units of half_codes_
  std::vector<Group> groups_;  // matrices, other weights, ranges
  torch::Tensor steps_;        // float32, as the kernels take it
};

}  // namespace vernier
