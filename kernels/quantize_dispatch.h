// What quantize.cc and fake_quantize.cc share: a scheme as it travels through an operator's schema,
// and checked operands; internal.
#pragma once

#include <vernier/kernels/dispatch.h>

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>

namespace vernier {

/// The scheme's part of an operator's schema. Symmetric means: no zero point.
inline constexpr const char* kSchemeArguments =
    "int bits=8, str granularity=\"per_tensor\", int axis=0, int group_size=0, bool "
    "narrow_range=True";

inline Scheme scheme_from_arguments(bool symmetric, int64_t bits, std::string_view granularity,
                                    int64_t group_size, bool narrow_range) {
  Scheme scheme;
  VERNIER_CHECK(bits >= 2 && bits <= 8, "bits must be 2 to 8, not ", bits);
  scheme.bits = static_cast<int>(bits);
  scheme.granularity = granularity_from_string(std::string(granularity));
  scheme.group_size = group_size;
  scheme.symmetric = symmetric;
  scheme.narrow_range = narrow_range;
  scheme.check();
  return scheme;
}

/// Throws Error unless scale and zero_point are there, in number as `map` says, beside the input.
inline void check_scale(const at::Tensor& input, const at::Tensor& scale,
                        const std::optional<at::Tensor>& zero_point, const Scheme& scheme,
                        const ScaleMap& map) {
  check_tensor(scale, "scale", at::kFloat, input);
  VERNIER_CHECK(scale.numel() == map.count, "scale has ", scale.numel(), " elements but ",
                to_string(scheme.granularity), " needs ", map.count, " for a tensor of shape ",
                input.sizes());
  if (zero_point) {
    check_tensor(*zero_point, "zero_point", at::kInt, input);
    VERNIER_CHECK(zero_point->numel() == map.count, "zero_point has ", zero_point->numel(),
                  " elements and scale ", map.count, ": they must agree");
  }
}

/// Contiguous operands, kept alive beside the raw arguments that point into them.
struct Prepared {
  at::Tensor input, scale, zero_point;
  QuantizeArguments arguments;

  Prepared(const at::Tensor& x, ElementType type, const at::Tensor& s,
           const std::optional<at::Tensor>& z, const Scheme& scheme, int64_t axis)
      : input(x.contiguous()), scale(s.contiguous()) {
    if (z) zero_point = z->contiguous();
    arguments.map = scale_map_of(x, scheme, axis);
    check_scale(x, s, z, scheme, arguments.map);
    arguments.input = input.const_data_ptr();
    arguments.input_type = type;
    arguments.numel = input.numel();
    arguments.scale = scale.const_data_ptr<float>();
    arguments.zero_point = z ? zero_point.const_data_ptr<int32_t>() : nullptr;
    arguments.qmin = scheme.qmin();
    arguments.qmax = scheme.qmax();
  }
};

/// The zero point that is used of one that is learned: float32, rounded and clamped to the codes'
/// range. An int32 one is used as it is.
inline std::optional<at::Tensor> integer_zero_point(const std::optional<at::Tensor>& zero_point,
                                                    const Scheme& scheme) {
  if (!zero_point || zero_point->scalar_type() == at::kInt) return zero_point;
  VERNIER_CHECK(zero_point->scalar_type() == at::kFloat,
                "zero_point must be int32, or float32 to be learned, not ",
                c10::toString(zero_point->scalar_type()));
  return zero_point->round().clamp(scheme.qmin(), scheme.qmax()).to(at::kInt);
}

/// A scheme has zero points if and only if it is asymmetric, so that qmin and qmax agree with the
/// operator's view.
inline void check_zero_point(const Scheme& scheme, const std::optional<at::Tensor>& zero_point) {
  VERNIER_CHECK(scheme.symmetric != zero_point.has_value(),
                scheme.symmetric ? "a symmetric scheme takes no zero_point"
                                 : "an asymmetric scheme needs a zero_point");
}

}  // namespace vernier
