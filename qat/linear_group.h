// Linear layers that read one activation, run as one product on codes which the operation in front
// of them makes: how transformer blocks are fast in mode integer.
#pragma once

#include <vernier/kernels/activation.h>
#include <vernier/qat/linear.h>

#include <memory>
#include <vector>

namespace vernier {

/// A norm over the last axis: LayerNorm where `centered`, else RMSNorm (kernels/norm_quantize.h).
struct Norm {
  torch::Tensor weight;  ///< [C]; undefined: ones
  torch::Tensor bias;    ///< [C]; undefined: zeros, as always unless `centered`
  double epsilon = 1e-5;
  bool centered = false;
};

/// The norm in torch's own operations, differentiable.
torch::Tensor normalize(const torch::Tensor& x, const Norm& norm);

/// The activation in torch's own operations, differentiable.
torch::Tensor activated(const torch::Tensor& x, Activation activation);

/// Layers that read one activation, such as query, key and value; or a single layer and what stands
/// in front of it.
///
/// In mode integer the codes of the activation come straight from the operation that makes it, and
/// all layers multiply them at once: that needs layers that take one input with one scale, integer
/// schemes (static per_tensor or dynamic per_token), no output quantizer, no chain, no folded batch
/// norm, no probe and no stand-in. Where that is not so, one layer runs after the other, and in
/// every other mode as well. Both ways the codes are those of the float32 values of the operation
/// in front and the outputs the same bits. Outputs of the fused way are slices of one matrix.
///
/// Codes are joined at the first forward after the mode was set, which makes the host wait; then
/// nothing does. Safe to call from several threads. Copies share what was joined.
class LinearGroup {
 public:
  LinearGroup() = default;
  /// Throws Error where there is no layer, or two take inputs of different sizes.
  explicit LinearGroup(const std::vector<nn::Linear>& layers);

  /// The layers' outputs for x [..., in], in their order: [..., out] each, in x's dtype.
  std::vector<torch::Tensor> forward(const torch::Tensor& x) const;

  /// A stream x, or x + added where `added` is defined, and the layers' outputs for the norm of it.
  struct OfStream {
    torch::Tensor stream;
    std::vector<torch::Tensor> outputs;
  };
  OfStream of_norm(const Norm& norm, const torch::Tensor& x, const torch::Tensor& added = {}) const;

  /// Of activation(x).
  std::vector<torch::Tensor> of_activation(const torch::Tensor& x, Activation activation) const;
  /// Of activation(gate) * up.
  std::vector<torch::Tensor> of_gated(const torch::Tensor& gate, const torch::Tensor& up,
                                      Activation activation) const;

  /// Whether a forward would take the fused way on a device.
  bool fuses(torch::Device device) const { return joint(device) != nullptr; }

 private:
  using Layers = std::vector<std::shared_ptr<nn::LinearImpl>>;
  struct Joint;
  struct State;

  std::shared_ptr<const Joint> joint(torch::Device device) const;
  std::shared_ptr<const Joint> join() const;
  std::vector<torch::Tensor> multiply(const Joint& joint, const torch::Tensor& codes,
                                      const torch::Tensor& scale, torch::Dtype dtype) const;
  bool any_integer() const;
  std::vector<torch::Tensor> one_by_one(const torch::Tensor& x) const;
  std::vector<torch::Tensor> one_by_one(const torch::Tensor& values, torch::Dtype dtype) const;

  Layers layers_;
  std::shared_ptr<State> state_;
};

}  // namespace vernier
