// vernier::nn::Conv1d, Conv2d, Conv3d and ConvTranspose1d, 2d, 3d: those of torch::nn with
// quantizers.
#pragma once

#include <torch/nn/modules/conv.h>
#include <vernier/kernels/convolution.h>
#include <vernier/qat/batch_norm.h>

#include <iosfwd>
#include <optional>
#include <type_traits>
#include <vector>

namespace vernier::nn {

/// Drop-in for the convolution `Plain` of torch::nn over D axes: same options, parameter names and
/// initialization, same result bit for bit in mode full. Input float32, float16 or bfloat16
/// [N, C, spatial...] or [C, spatial...] in any memory format, output in the input's dtype and
/// memory format.
///
/// Quantizers start as W8A8: weight int8 per output channel, input int8 per tensor, both min/max.
/// Mode integer runs INT8 with one scale for the input (kernels/convolution.h); padding is exact,
/// whatever its mode. LibTorch's transposed convolution of float16 on the CPU, by which mode
/// fake_quant computes, rounds partial sums to float16: there the two modes are further apart than
/// the roundings of one product explain.
template <size_t D, typename Derived, typename Plain>
class ConvolutionNd : public Foldable<Derived, Plain> {
 public:
  static constexpr bool kTransposed =
      std::is_base_of_v<torch::nn::ConvTransposeNdImpl<D, Plain>, Plain>;
  using UserOptions = std::conditional_t<kTransposed, torch::nn::ConvTransposeOptions<D>,
                                         torch::nn::ConvOptions<D>>;

  ConvolutionNd(int64_t in_channels, int64_t out_channels, torch::ExpandingArray<D> kernel_size)
      : ConvolutionNd(UserOptions(in_channels, out_channels, kernel_size)) {}
  explicit ConvolutionNd(const UserOptions& user_options);
  /// Takes over the layer's parameters: the same tensors, so that an optimizer goes on with them.
  explicit ConvolutionNd(const Plain& plain_layer);

  void pretty_print(std::ostream& stream) const override;

  torch::Tensor compute(at::TensorList inputs, const torch::Tensor& convolution_weight,
                        const torch::Tensor& convolution_bias) const override;
  torch::Tensor accumulators(at::TensorList codes) const override;
  int64_t accumulation_length(at::TensorList inputs = {}) const override;
  /// A scale a token becomes one for the tensor.
  QuantizerSettings fitting(const std::string& quantizer,
                            const QuantizerSettings& wanted) const override;

 protected:
  std::shared_ptr<Plain> plain() const override;
  void make_quantizers() override;
  int64_t out_channels() const override { return this->options.out_channels(); }
  void check_inputs(at::TensorList inputs) const override;
  void prepare_integer() override;
  void weight_codes_changed() override;
  torch::Tensor integer_compute(at::TensorList inputs) const override;

 private:
  struct Padding;
  Padding padding() const;
  torch::Tensor pad_codes(const torch::Tensor& input) const;
  ConvolutionSettings settings(at::TensorList inputs) const;

  torch::Tensor kernel_codes_;  // the weight's codes as the kernels read them
  torch::Tensor kernel_sum_;    // int32 [out_channels]: their sums, for asymmetric inputs
};

#define VERNIER_CONVOLUTION(Name, D)                                              \
  class Name##Impl : public ConvolutionNd<D, Name##Impl, torch::nn::Name##Impl> { \
   public:                                                                        \
    using ConvolutionNd::ConvolutionNd;                                           \
    torch::Tensor forward(const torch::Tensor& input) { return run(input); }      \
  };                                                                              \
  TORCH_MODULE(Name)

VERNIER_CONVOLUTION(Conv1d, 1);
VERNIER_CONVOLUTION(Conv2d, 2);
VERNIER_CONVOLUTION(Conv3d, 3);
#undef VERNIER_CONVOLUTION

/// With an output_size, as torch::nn's, the output's spatial sizes are those.
#define VERNIER_CONVOLUTION(Name, D)                                                          \
  class Name##Impl : public ConvolutionNd<D, Name##Impl, torch::nn::Name##Impl> {             \
   public:                                                                                    \
    using ConvolutionNd::ConvolutionNd;                                                       \
    torch::Tensor forward(const torch::Tensor& input,                                         \
                          const std::optional<at::IntArrayRef>& output_size = std::nullopt) { \
      if (!output_size) return run(input);                                                    \
      return run({input, torch::tensor(*output_size)});                                       \
    }                                                                                         \
                                                                                              \
   protected:                                                                                 \
    FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(std::optional<at::IntArrayRef>())})      \
  };                                                                                          \
  TORCH_MODULE(Name)

VERNIER_CONVOLUTION(ConvTranspose1d, 1);
VERNIER_CONVOLUTION(ConvTranspose2d, 2);
VERNIER_CONVOLUTION(ConvTranspose3d, 3);
#undef VERNIER_CONVOLUTION

}  // namespace vernier::nn
