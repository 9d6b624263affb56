#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <vernier/kernels/convolution.h>
#include <vernier/kernels/convolution_device.h>
#include <vernier/kernels/int8_gemm_dispatch.h>
#include <vernier/kernels/quantize_dispatch.h>

#include <limits>

namespace vernier {
namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// Bytes of the matrix that a band of output positions becomes.
constexpr int64_t kBandBytes = int64_t{64} << 20;

/// The settings as they travel through an operator's schema.
struct Settings {
  IntArrayRef stride, padding, dilation, output_padding;
  int64_t groups;
  bool transposed;
};

int32_t to_int32(int64_t value) {
  VERNIER_CHECK(value <= std::numeric_limits<int32_t>::max(), "a convolution over ", value,
                " positions of an axis is not supported: they must fit 31 bits");
  return static_cast<int32_t>(value);
}

ConvolutionShape shape_of(const Tensor& codes, const Tensor& weight, const Settings& s) {
  const int64_t axes = codes.dim() - 2;
  VERNIER_CHECK(axes >= 1 && axes <= 3 && weight.dim() == codes.dim(),
                "codes must be [N, C, spatial...] and weight [O, kernel..., C / groups], of one to "
                "three spatial axes, not ",
                codes.sizes(), " and ", weight.sizes());
  const auto count = static_cast<size_t>(axes);
  VERNIER_CHECK(s.stride.size() == count && s.padding.size() == count &&
                    s.dilation.size() == count &&
                    (s.output_padding.empty() || s.output_padding.size() == count),
                "stride, padding, dilation and output_padding need a value for each of the ", axes,
                " spatial axes");
  ConvolutionShape shape;
  shape.batch = codes.size(0);
  shape.channels = codes.size(1);
  shape.out_channels = weight.size(0);
  shape.groups = s.groups;
  shape.transposed = s.transposed;
  VERNIER_CHECK(s.groups >= 1 && shape.channels > 0 && shape.out_channels > 0 &&
                    shape.channels % s.groups == 0 && shape.out_channels % s.groups == 0 &&
                    weight.size(-1) == shape.channels / s.groups,
                "codes of ", shape.channels, " channels do not fit a weight of shape ",
                weight.sizes(), " [O, kernel..., C / groups] in ", s.groups, " groups");
  for (int64_t i = 0; i < axes; ++i) {
    const int64_t input = codes.size(2 + i), kernel = weight.size(1 + i);
    const int64_t stride = s.stride[i], padding = s.padding[i], dilation = s.dilation[i];
    const int64_t output_padding = s.output_padding.empty() ? 0 : s.output_padding[i];
    VERNIER_CHECK(kernel >= 1 && stride >= 1 && dilation >= 1 && padding >= 0 &&
                      output_padding >= 0 && (s.transposed || output_padding == 0),
                  "kernel, stride and dilation of a convolution must be positive, padding not "
                  "negative, output_padding 0 unless transposed");
    const int64_t reach = dilation * (kernel - 1) + 1;
    const int64_t output = s.transposed
                               ? (input - 1) * stride - 2 * padding + reach + output_padding
                               : (input + 2 * padding - reach) / stride + 1;
    const bool fits = s.transposed ? output >= 1 : input + 2 * padding >= reach;
    VERNIER_CHECK(fits && input >= 1, "the kernel of ", kernel, " reaches over ", reach,
                  " elements of an input of ", input, " padded by ", padding,
                  ": there is no output");
    to_int32(std::max(input, output) * stride + padding + reach);
    shape.axes[3 - axes + i] = {to_int32(input),  to_int32(output),  to_int32(kernel),
                                to_int32(stride), to_int32(padding), to_int32(dilation)};
  }
  to_int32(shape.outputs());
  return shape;
}

std::vector<int64_t> output_sizes(const ConvolutionShape& shape, int64_t axes) {
  std::vector<int64_t> sizes = {shape.batch};
  for (int64_t i = 3 - axes; i < 3; ++i) sizes.push_back(shape.axes[i].output);
  sizes.push_back(shape.out_channels);
  return sizes;
}

/// A convolution whose operands are checked and in the order that the kernels read.
class PreparedConvolution {
 public:
  PreparedConvolution(const Tensor& codes, const Tensor& weight, const OptionalTensor& zero_point,
                      const OptionalTensor& weight_sum, const Settings& settings)
      : shape_(shape_of(codes, weight, settings)), axes_(codes.dim() - 2) {
    check_tensor(codes, "codes", at::kChar, codes);
    check_tensor(weight, "weight", at::kChar, codes);
    VERNIER_CHECK(zero_point.has_value() == weight_sum.has_value(),
                  "input_zero_point and weight_sum go together: give both or neither");
    if (zero_point) {
      check_tensor(*zero_point, "input_zero_point", at::kInt, codes);
      check_tensor(*weight_sum, "weight_sum", at::kInt, codes);
      VERNIER_CHECK(zero_point->numel() == 1 && weight_sum->numel() == shape_.out_channels,
                    "input_zero_point must have 1 element and weight_sum ", shape_.out_channels,
                    ", not ", zero_point->numel(), " and ", weight_sum->numel());
    }
    const int64_t limit = zero_point ? kMaxInt8GemmKAsymmetric : kMaxInt8GemmK;
    VERNIER_CHECK(shape_.depth() <= limit, "the ", shape_.depth(),
                  " products of a sum could overflow the int32 accumulators: the limit is ", limit);
    codes_ = codes.movedim(1, -1).contiguous();
    weight_ = weight.contiguous();
    zero_point_ = zero_point;
    weight_sum_ = weight_sum;
  }

  Tensor accumulators() const {
    Tensor output = new_output(at::kInt);
    for_each_band([&](int64_t first, int64_t count) {
      Tensor sums = rows_of_output(output, first, count);
      if (is_direct()) return direct(first, sums);
      sums.copy_(int8_matmul(patches(first, count), matrix_of_weight()));
      if (zero_point_) sums.sub_(zero_point_->mul(*weight_sum_));
    });
    return output.movedim(-1, 1);
  }

  Tensor run(const Int8LinearOperands& epilogue,
             const std::optional<Requantization>& requantization, at::ScalarType dtype) const {
    VERNIER_CHECK(epilogue.input_scale.numel() == 1, "input_scale has ",
                  epilogue.input_scale.numel(), " elements: a convolution's input has one scale");
    Tensor output = new_output(requantization ? at::kChar : dtype);
    Int8LinearOperands operands = epilogue;
    if (is_direct()) {  // whose sums have the zero point in them
      operands.input_zero_point.reset();
      operands.weight_sum.reset();
    } else {
      operands.weight = matrix_of_weight();
    }
    for_each_band([&](int64_t first, int64_t count) {
      const Tensor rows = rows_of_output(output, first, count);
      if (is_direct()) {
        const Tensor sums = at::empty(rows.sizes(), rows.options().dtype(at::kInt));
        direct(first, sums);
        return int8_epilogue_into(sums, operands, requantization, rows);
      }
      operands.codes = patches(first, count);
      int8_linear_into(operands, requantization, rows);
    });
    return output.movedim(-1, 1);
  }

 private:
  bool is_direct() const { return shape_.groups > 1; }

  /// Whether the codes are the matrix of patches as they lie.
  bool is_pointwise() const {
    bool pointwise = true;
    for (const ConvolutionAxis& axis : shape_.axes)
      pointwise &=
          axis.kernel == 1 && axis.stride == 1 && axis.padding == 0 && axis.input == axis.output;
    return pointwise;
  }

  Tensor new_output(at::ScalarType dtype) const {
    return at::empty(output_sizes(shape_, axes_), codes_.options().dtype(dtype));
  }
  Tensor rows_of_output(const Tensor& output, int64_t first, int64_t count) const {
    return output.view({shape_.rows(), shape_.out_channels}).narrow(0, first, count);
  }
  Tensor matrix_of_weight() const { return weight_.view({shape_.out_channels, shape_.depth()}); }
  const int32_t* zero_point() const {
    return zero_point_ ? zero_point_->const_data_ptr<int32_t>() : nullptr;
  }

  /// Calls f(first, count) for bands of output positions that bound what is needed besides.
  template <typename F>
  void for_each_band(const F& f) const {
    const int64_t bytes =
        is_direct() ? shape_.out_channels * int64_t{sizeof(int32_t)} : shape_.depth();
    const int64_t rows = shape_.rows();
    const int64_t most =
        is_pointwise() && !is_direct() ? rows : std::max<int64_t>(1, kBandBytes / bytes);
    for (int64_t first = 0; first < rows; first += most) f(first, std::min(most, rows - first));
  }

  Tensor patches(int64_t first, int64_t count) const {
    if (is_pointwise()) return codes_.view({shape_.rows(), shape_.channels});
    Tensor matrix = at::empty({count, shape_.depth()}, codes_.options());
    const int8_t* codes = codes_.const_data_ptr<int8_t>();
    int8_t* out = matrix.data_ptr<int8_t>();
    on_device_of(
        codes_, [&] { cpu::im2col(codes, shape_, zero_point(), first, count, out); },
        [&](void* stream) {
          cuda::im2col(codes, shape_, zero_point(), first, count, out, stream);
        });
    return matrix;
  }

  void direct(int64_t first, const Tensor& sums) const {
    const int8_t* codes = codes_.const_data_ptr<int8_t>();
    const int8_t* weight = weight_.const_data_ptr<int8_t>();
    int32_t* out = sums.data_ptr<int32_t>();
    const int64_t count = sums.size(0);
    on_device_of(
        codes_,
        [&] { cpu::direct_convolution(codes, weight, shape_, zero_point(), first, count, out); },
        [&](void* stream) {
          cuda::direct_convolution(codes, weight, shape_, zero_point(), first, count, out, stream);
        });
  }

  ConvolutionShape shape_;
  int64_t axes_;
  Tensor codes_, weight_;  // channels last
  OptionalTensor zero_point_, weight_sum_;
};

Tensor accumulators_kernel(const Tensor& codes, const Tensor& weight,
                           const OptionalTensor& input_zero_point, const OptionalTensor& weight_sum,
                           IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                           IntArrayRef output_padding, int64_t groups, bool transposed) {
  return PreparedConvolution(codes, weight, input_zero_point, weight_sum,
                             {stride, padding, dilation, output_padding, groups, transposed})
      .accumulators();
}

Tensor convolution_kernel(const Tensor& codes, const Tensor& weight, const Tensor& input_scale,
                          const Tensor& weight_scale, const OptionalTensor& bias,
                          const OptionalTensor& input_zero_point, const OptionalTensor& weight_sum,
                          IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                          IntArrayRef output_padding, int64_t groups, bool transposed,
                          at::ScalarType dtype, std::string_view activation) {
  element_type_of(dtype, "dtype");
  return PreparedConvolution(codes, weight, input_zero_point, weight_sum,
                             {stride, padding, dilation, output_padding, groups, transposed})
      .run({codes, weight, input_scale, weight_scale, bias, input_zero_point, weight_sum,
            activation_from_string(activation)},
           std::nullopt, dtype);
}

Tensor requantize_kernel(const Tensor& codes, const Tensor& weight, const Tensor& input_scale,
                         const Tensor& weight_scale, const OptionalTensor& bias,
                         const OptionalTensor& input_zero_point, const OptionalTensor& weight_sum,
                         IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                         IntArrayRef output_padding, int64_t groups, bool transposed,
                         const Tensor& output_scale, const OptionalTensor& output_zero_point,
                         int64_t bits, bool narrow_range, std::string_view activation) {
  const Scheme scheme =
      scheme_from_arguments(!output_zero_point, bits, "per_tensor", 0, narrow_range);
  return PreparedConvolution(codes, weight, input_zero_point, weight_sum,
                             {stride, padding, dilation, output_padding, groups, transposed})
      .run({codes, weight, input_scale, weight_scale, bias, input_zero_point, weight_sum,
            activation_from_string(activation)},
           Requantization{output_scale, output_zero_point, scheme}, at::kChar);
}

// Shapes and dtypes without data, for tracing.
Tensor meta(const Tensor& codes, const Tensor& weight, const Settings& settings,
            at::ScalarType dtype) {
  check_meta(codes);
  const ConvolutionShape shape = shape_of(codes, weight, settings);
  return at::empty(output_sizes(shape, codes.dim() - 2), codes.options().dtype(dtype))
      .movedim(-1, 1);
}
Tensor accumulators_meta(const Tensor& codes, const Tensor& weight, const OptionalTensor&,
                         const OptionalTensor&, IntArrayRef stride, IntArrayRef padding,
                         IntArrayRef dilation, IntArrayRef output_padding, int64_t groups,
                         bool transposed) {
  return meta(codes, weight, {stride, padding, dilation, output_padding, groups, transposed},
              at::kInt);
}
Tensor convolution_meta(const Tensor& codes, const Tensor& weight, const Tensor&, const Tensor&,
                        const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                        IntArrayRef output_padding, int64_t groups, bool transposed,
                        at::ScalarType dtype, std::string_view) {
  return meta(codes, weight, {stride, padding, dilation, output_padding, groups, transposed},
              dtype);
}
Tensor requantize_meta(const Tensor& codes, const Tensor& weight, const Tensor&, const Tensor&,
                       const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                       IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                       IntArrayRef output_padding, int64_t groups, bool transposed, const Tensor&,
                       const OptionalTensor&, int64_t, bool, std::string_view) {
  return meta(codes, weight, {stride, padding, dilation, output_padding, groups, transposed},
              at::kChar);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vernier, m) {
  const std::string operands =
      "Tensor codes, Tensor weight, Tensor input_scale, Tensor weight_scale, Tensor? bias=None, "
      "Tensor? input_zero_point=None, Tensor? weight_sum=None";
  const std::string settings =
      ", *, int[] stride, int[] padding, int[] dilation, int[] output_padding=[], int groups=1, "
      "bool transposed=False";
  m.def(("int8_convolution_accumulators(Tensor codes, Tensor weight, Tensor? "
         "input_zero_point=None, Tensor? weight_sum=None" +
         settings + ") -> Tensor")
            .c_str());
  m.def(("int8_convolution(" + operands + settings +
         ", ScalarType dtype=float, str activation=\"none\") -> Tensor")
            .c_str());
  m.def(("int8_convolution_requantize(" + operands + settings +
         ", Tensor output_scale, Tensor? output_zero_point=None, int bits=8, bool "
         "narrow_range=True, str activation=\"none\") -> Tensor")
            .c_str());
}

#define VERNIER_REGISTER_CONVOLUTION(m)                                   \
  m.impl("int8_convolution_accumulators", TORCH_FN(accumulators_kernel)); \
  m.impl("int8_convolution", TORCH_FN(convolution_kernel));               \
  m.impl("int8_convolution_requantize", TORCH_FN(requantize_kernel))

TORCH_LIBRARY_IMPL(vernier, CPU, m) { VERNIER_REGISTER_CONVOLUTION(m); }
#ifdef VERNIER_WITH_CUDA
TORCH_LIBRARY_IMPL(vernier, CUDA, m) { VERNIER_REGISTER_CONVOLUTION(m); }
#endif
TORCH_LIBRARY_IMPL(vernier, Meta, m) {
  m.impl("int8_convolution_accumulators", TORCH_FN(accumulators_meta));
  m.impl("int8_convolution", TORCH_FN(convolution_meta));
  m.impl("int8_convolution_requantize", TORCH_FN(requantize_meta));
}

Tensor convolution_weight(const Tensor& weight, int64_t groups, bool transposed) {
  VERNIER_CHECK(weight.dim() >= 3 && weight.dim() <= 5,
                "a convolution's weight has one to three spatial axes, not shape ", weight.sizes());
  if (!transposed) return weight.movedim(1, -1).contiguous();
  VERNIER_CHECK(groups >= 1 && weight.size(0) % groups == 0, groups,
                " groups do not divide the channels of a weight of shape ", weight.sizes());
  // [groups, C / groups, O / groups, kernel...] with the second axis last and the groups beside O.
  return weight.unflatten(0, {groups, weight.size(0) / groups})
      .movedim(1, -1)
      .flatten(0, 1)
      .contiguous();
}

Tensor int8_convolution_accumulators(const Tensor& codes, const Tensor& weight,
                                     const OptionalTensor& input_zero_point,
                                     const OptionalTensor& weight_sum,
                                     const ConvolutionSettings& s) {
  static const auto op =
      operator_handle<decltype(accumulators_kernel)>("vernier::int8_convolution_accumulators");
  return op.call(codes, weight, input_zero_point, weight_sum, s.stride, s.padding, s.dilation,
                 s.output_padding, s.groups, s.transposed);
}

Tensor int8_convolution(const Int8LinearOperands& o, const ConvolutionSettings& s,
                        at::ScalarType dtype) {
  static const auto op = operator_handle<decltype(convolution_kernel)>("vernier::int8_convolution");
  return op.call(o.codes, o.weight, o.input_scale, o.weight_scale, o.bias, o.input_zero_point,
                 o.weight_sum, s.stride, s.padding, s.dilation, s.output_padding, s.groups,
                 s.transposed, dtype, to_string(o.activation));
}

Tensor int8_convolution_requantize(const Int8LinearOperands& o, const ConvolutionSettings& s,
                                   const Tensor& output_scale,
                                   const OptionalTensor& output_zero_point, const Scheme& scheme) {
  static const auto op =
      operator_handle<decltype(requantize_kernel)>("vernier::int8_convolution_requantize");
  Requantization{output_scale, output_zero_point, scheme}.check();
  return op.call(o.codes, o.weight, o.input_scale, o.weight_scale, o.bias, o.input_zero_point,
                 o.weight_sum, s.stride, s.padding, s.dilation, s.output_padding, s.groups,
                 s.transposed, output_scale, output_zero_point, scheme.bits, scheme.narrow_range,
                 to_string(o.activation));
}

}  // namespace vernier
