// What the dispatch files (quantize.cc, statistics.cc, int8_gemm.cc, fp8.cc) share: from at::Tensor
// to raw arguments; internal.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <vernier/kernels/element_type.h>
#include <vernier/kernels/error.h>

#include <algorithm>

#ifdef VERNIER_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace vernier {

/// Throws Error unless the tensor is float32, float16 or bfloat16; `what` names it in the message.
inline ElementType element_type_of(at::ScalarType type, const char* what) {
  switch (type) {
    case at::kFloat:
      return ElementType::f32;
    case at::kHalf:
      return ElementType::f16;
    case at::kBFloat16:
      return ElementType::bf16;
    default:
      throw Error(concat(what, " must be float32, float16 or bfloat16, not ", c10::toString(type)));
  }
}

/// Throws Error unless the tensor has the dtype and lies on the device of `other`.
inline void check_tensor(const at::Tensor& tensor, const char* what, at::ScalarType dtype,
                         const at::Tensor& other) {
  VERNIER_CHECK(tensor.scalar_type() == dtype, what, " must be ", c10::toString(dtype), ", not ",
                c10::toString(tensor.scalar_type()));
  VERNIER_CHECK(tensor.device() == other.device(), what, " is on ", tensor.device(),
                " but the input is on ", other.device(), ": move one of them");
}

/// Product of all sizes but the last; 1 for a scalar.
inline int64_t rows_of(const at::Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) rows *= tensor.size(i);
  return rows;
}

/// Size of the last axis; 1 for a scalar.
inline int64_t columns_of(const at::Tensor& tensor) { return tensor.dim() ? tensor.size(-1) : 1; }

/// Which scale each element of `input` has under a scheme. Throws Error when the group size or the
/// axis do not fit the tensor.
inline ScaleMap scale_map_of(const at::Tensor& input, const Scheme& scheme, int64_t axis) {
  const int64_t numel = input.numel(), columns = columns_of(input), dim = input.dim();
  switch (scheme.granularity) {
    case Granularity::per_tensor:
      return {std::max<int64_t>(numel, 1), 1};
    case Granularity::per_token:
      return {std::max<int64_t>(columns, 1), rows_of(input)};
    case Granularity::per_group:
      VERNIER_CHECK(columns % scheme.group_size == 0, "group_size ", scheme.group_size,
                    " does not divide the last axis of ", input.sizes());
      return {scheme.group_size, numel / scheme.group_size};
    case Granularity::per_channel:
      break;
  }
  VERNIER_CHECK(axis >= -dim && axis < dim, "axis ", axis, " is outside a tensor of shape ",
                input.sizes());
  axis = axis < 0 ? axis + dim : axis;
  int64_t inner = 1;
  for (int64_t i = axis + 1; i < dim; ++i) inner *= input.size(i);
  return {std::max<int64_t>(inner, 1), input.size(axis)};
}

/// For the meta kernels, which know shapes and dtypes without data. A meta operand beside a real
/// input comes there, too.
inline void check_meta(const at::Tensor& input) {
  VERNIER_CHECK(input.is_meta(), "an operand is on meta but the input is on ", input.device(),
                ": move one of them");
}

/// Throws Error unless the gradient is one of `input`.
inline void check_gradient(const at::Tensor& gradient, const at::Tensor& input) {
  check_tensor(gradient, "gradient", input.scalar_type(), input);
  VERNIER_CHECK(gradient.sizes() == input.sizes(), "gradient has shape ", gradient.sizes(),
                " but the input has ", input.sizes());
}

/// The sizes of a tensor with one element a row: all but the last. They live as long as `tensor`.
inline c10::SymIntArrayRef row_sizes(const at::Tensor& tensor) {
  const auto sizes = tensor.sym_sizes();
  return sizes.slice(0, sizes.empty() ? 0 : sizes.size() - 1);
}

#ifdef VERNIER_WITH_CUDA
/// Makes a tensor's GPU current while it lives and names the stream to enqueue on.
class CudaScope {
 public:
  explicit CudaScope(const at::Tensor& tensor)
      : guard_(tensor.device()), stream_(c10::cuda::getCurrentCUDAStream(tensor.get_device())) {}
  void* stream() const { return stream_.stream(); }

 private:
  c10::cuda::CUDAGuard guard_;
  c10::cuda::CUDAStream stream_;
};
#endif

/// Runs cpu_call() or cuda_call(stream) by the device of `tensor`.
template <typename Cpu, typename Cuda>
void on_device_of(const at::Tensor& tensor, const Cpu& cpu_call,
                  [[maybe_unused]] const Cuda& cuda_call) {
  if (tensor.is_cpu()) return cpu_call();
#ifdef VERNIER_WITH_CUDA
  const CudaScope scope(tensor);
  cuda_call(scope.stream());
#endif
}

/// A typed handle of a registered operator, "vernier::name". Keep it in a function-local static.
template <typename Signature>
auto operator_handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace vernier
