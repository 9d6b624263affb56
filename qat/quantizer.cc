#include <torch/serialize/archive.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/fake_quantize.h>
#include <vernier/kernels/quantize.h>
#include <vernier/kernels/statistics.h>
#include <vernier/qat/quantizer.h>

#include <algorithm>
#include <array>

namespace vernier {

using torch::Tensor;

namespace {

constexpr std::array<const char*, 4> kPolicyNames = {"frozen", "moving_average", "following",
                                                     "learned"};

// A tensor as a matrix whose rows share a scale each.
Tensor rows_by_scale(const Tensor& values, const Scheme& scheme, int64_t axis) {
  switch (scheme.granularity) {
    case Granularity::per_tensor:
      return values.reshape({1, values.numel()});
    case Granularity::per_channel:
      return values.movedim(axis, 0).reshape(
          {values.size(axis), values.size(axis) ? values.numel() / values.size(axis) : 0});
    case Granularity::per_group:
      VERNIER_CHECK(values.dim() > 0 && values.size(-1) % scheme.group_size == 0, "group_size ",
                    scheme.group_size, " does not divide the last axis of ", values.sizes());
      return values.reshape({values.numel() / scheme.group_size, scheme.group_size});
    case Granularity::per_token:
      return values.reshape({-1, values.size(-1)});
  }
  throw Error("unknown granularity");
}

// Extremes over the finite values of a whole tensor, [2]; {+inf, -inf} where there is none.
Tensor whole_range(const Tensor& values) {
  const Tensor flat = values.is_non_overlapping_and_dense()
                          ? values.as_strided({values.numel()}, {1})
                          : values.reshape({-1});
  // In columns that are wide enough for the kernels, which tell them apart.
  int64_t columns = 1;
  for (const int64_t width : {1024, 512, 128, 32, 8})
    if (columns == 1 && flat.numel() % width == 0) columns = width;
  const Tensor channels = channel_range(flat.view({-1, columns}));
  return torch::stack({channels[0].amin(), channels[1].amax()});
}

// The scales of a tensor from its own absolute maxima, in number as the granularity says.
Tensor own_scale(const Tensor& values, const Scheme& scheme, int64_t axis) {
  if (scheme.granularity == Granularity::per_token) return per_token_scale(values, scheme);
  return per_token_scale(rows_by_scale(values, scheme, axis), scheme);
}

}  // namespace

std::string to_string(RangePolicy policy) { return kPolicyNames[static_cast<size_t>(policy)]; }

RangePolicy range_policy_from_string(const std::string& name) {
  const auto found = std::find(kPolicyNames.begin(), kPolicyNames.end(), name);
  VERNIER_CHECK(found != kPolicyNames.end(), "unknown range policy '", name,
                "': use frozen, moving_average, following or learned");
  return static_cast<RangePolicy>(found - kPolicyNames.begin());
}

void QuantizerSettings::check() const {
  scheme.check();
  if (policy == RangePolicy::frozen) return;
  if (scheme.dynamic && policy == RangePolicy::learned) {
    VERNIER_CHECK(scheme.granularity == Granularity::per_token && !scheme.is_fp8(),
                  "what is learned of dynamic scales is a clip of integers per_token, not of ",
                  to_string(scheme));
    return;
  }
  VERNIER_CHECK(!scheme.dynamic, "ranges that are ", to_string(policy),
                " need a static scheme, not ", to_string(scheme), ": leave them frozen");
  VERNIER_CHECK(scheme.granularity != Granularity::per_token,
                "per_token scales are dynamic: ranges cannot be ", to_string(policy));
  if (policy == RangePolicy::learned) {
    VERNIER_CHECK(!scheme.is_fp8(), "scales of ", to_string(scheme.format),
                  " cannot be learned: use frozen, moving_average or following ranges");
  } else if (policy == RangePolicy::following) {
    VERNIER_CHECK(scheme.symmetric && calibrator.method == CalibrationMethod::min_max,
                  "following ranges are symmetric and found by min_max, not ", to_string(scheme),
                  " found by ", to_string(calibrator.method),
                  ": use learned or moving_average ranges");
  } else {
    VERNIER_CHECK(scheme.granularity != Granularity::per_group,
                  "moving averages are per_tensor or per_channel, not per_group");
    VERNIER_CHECK(averaging > 0 && averaging <= 1, "averaging must be in (0, 1], not ", averaging);
  }
}

QuantizerSettings for_whole_tensor(QuantizerSettings settings) {
  if (settings.scheme.granularity == Granularity::per_token)
    settings.scheme.granularity = Granularity::per_tensor;
  return settings;
}

QuantizerImpl::QuantizerImpl(const QuantizerSettings& settings, int64_t axis, Operand operand)
    : settings_(settings), axis_(axis), operand_(operand) {
  settings_.check();
  QuantizerImpl::reset();
}

void QuantizerImpl::reset() {
  // Empty until calibrated: what is registered can change its data but not become undefined.
  scale_ = register_buffer("scale", torch::empty({0}, torch::kFloat));
  zero_point_ = register_buffer("zero_point", torch::empty({0}, torch::kInt));
  average_ = register_buffer("average", torch::empty({0}, torch::kFloat));
  pre_scale_ = register_buffer("pre_scale", torch::empty({0}, torch::kFloat));
  register_learned();
  clear();
  observer_ = std::make_shared<Observer>();
}

void QuantizerImpl::register_learned() {
  const auto keep = [&](const char* name, Tensor& tensor, bool wanted) {
    const bool there = parameters_.contains(name);
    if (there && !wanted) {
      parameters_.erase(name);
      tensor = Tensor();
    } else if (!there && wanted) {
      tensor = register_parameter(name, torch::empty({0}, scale_.options()));
    }
  };
  keep("learned_scale", learned_scale_, learns());
  keep("learned_zero_point", learned_zero_point_, learns() && !settings_.scheme.symmetric);
}

void QuantizerImpl::clear() {
  for (const Tensor* tensor : {&scale_, &zero_point_, &average_})
    tensor->set_data(tensor->new_empty({0}));
  for (Tensor* tensor : {&learned_scale_, &learned_zero_point_}) {
    if (!tensor->defined()) continue;
    tensor->mutable_grad() = Tensor();
    tensor->set_data(scale_.new_empty({0}));
  }
  // The factor of dynamic scales is there from the start.
  if (learns() && settings_.scheme.dynamic) learned_scale_.set_data(scale_.new_ones({1}));
}

void QuantizerImpl::save(torch::serialize::OutputArchive& archive) const {
  torch::nn::Module::save(archive);
  const Scheme& scheme = settings_.scheme;
  archive.write("format", c10::IValue(to_string(scheme.format)));
  archive.write("bits", c10::IValue(int64_t{scheme.bits}));
  archive.write("granularity", c10::IValue(to_string(scheme.granularity)));
  archive.write("group_size", c10::IValue(scheme.group_size));
  archive.write("symmetric", c10::IValue(scheme.symmetric));
  archive.write("narrow_range", c10::IValue(scheme.narrow_range));
  archive.write("dynamic", c10::IValue(scheme.dynamic));
  archive.write("policy", c10::IValue(to_string(settings_.policy)));
  archive.write("averaging", c10::IValue(settings_.averaging));
}

void QuantizerImpl::load(torch::serialize::InputArchive& archive) {
  QuantizerSettings settings = settings_;
  settings.policy = RangePolicy::frozen;
  Scheme& scheme = settings.scheme;
  c10::IValue value;
  if (archive.try_read("bits", value)) {  // older archives hold scales alone
    const int64_t bits = value.toInt();
    VERNIER_CHECK(bits >= 2 && bits <= 8, "the archive holds a quantizer of ", bits,
                  " bits, not 2 to 8");
    scheme.bits = static_cast<int>(bits);
    const auto read = [&](const char* name) -> const c10::IValue& {
      archive.read(name, value);
      return value;
    };
    scheme.granularity = granularity_from_string(read("granularity").toStringRef());
    scheme.group_size = read("group_size").toInt();
    scheme.symmetric = read("symmetric").toBool();
    scheme.narrow_range = read("narrow_range").toBool();
    scheme.dynamic = read("dynamic").toBool();
    if (archive.try_read("format", value))  // nor did all of those that hold the scheme
      scheme.format = number_format_from_string(value.toStringRef());
    if (archive.try_read("policy", value)) {
      settings.policy = range_policy_from_string(value.toStringRef());
      settings.averaging = read("averaging").toDouble();
    }
  }
  const bool learned = settings.policy == RangePolicy::learned;
  Tensor scale, zero_point, average;
  archive.read(learned ? "learned_scale" : "scale", scale, /*is_buffer=*/!learned);
  const bool learned_zero_point = learned && !scheme.symmetric;
  archive.read(learned_zero_point ? "learned_zero_point" : "zero_point", zero_point,
               /*is_buffer=*/!learned_zero_point);
  Tensor factors;  // absent from older archives
  if (!archive.try_read("pre_scale", factors, /*is_buffer=*/true))
    factors = pre_scale_.new_empty(0);
  const bool asymmetric = zero_point.numel() > 0;
  const bool calibrated = scale.numel() > 0;
  VERNIER_CHECK(scheme.dynamic ? scale.numel() <= 1 && !asymmetric
                               : (calibrated ? asymmetric == !scheme.symmetric
                                             : !asymmetric && factors.numel() > 0),
                "the archive's scale and zero point do not go with the scheme ", to_string(scheme));
  const torch::Device device = scale_.device();
  set_settings(settings);
  set_pre_scale(factors.to(device));
  if (!calibrated) return;
  if (learned) {
    // Exactly as trained, between integers too.
    VERNIER_CHECK(scale.scalar_type() == torch::kFloat &&
                      (!asymmetric || zero_point.scalar_type() == torch::kFloat),
                  "the archive's learned scale and zero point are not float32");
    store(scale.to(device),
          asymmetric ? std::optional<Tensor>(zero_point.to(device)) : std::nullopt);
    check_learned();
    return;
  }
  set_scale(scale.to(device),
            asymmetric ? std::optional<Tensor>(zero_point.to(device)) : std::nullopt);
  if (archive.try_read("average", average, /*is_buffer=*/true) && average.numel() > 0) {
    VERNIER_CHECK(average.scalar_type() == torch::kFloat &&
                      average.sizes() == torch::IntArrayRef({2, scale.numel()}),
                  "the archive's moving average does not go with its ", scale.numel(), " scales");
    average_.set_data(average.to(device).clone());
  }
}

void QuantizerImpl::to(torch::Device device, torch::Dtype, bool non_blocking) {
  torch::nn::Module::to(device, non_blocking);
}

void QuantizerImpl::to(torch::Dtype, bool) {}

void QuantizerImpl::set_settings(const QuantizerSettings& settings) {
  settings.check();
  settings_ = settings;
  register_learned();
  clear();
}

void QuantizerImpl::set_policy(RangePolicy policy) {
  QuantizerSettings settings = settings_;
  settings.policy = policy;
  settings.check();
  const Tensor scale = this->scale().detach().clone(), average = average_.clone();
  std::optional<Tensor> zero_point = this->zero_point();
  if (zero_point) zero_point = zero_point->clone();
  settings_ = settings;
  register_learned();
  clear();
  if (scale.numel() == 0) return;
  store(scale, zero_point);
  if (policy != RangePolicy::learned) average_.set_data(average);
}

void QuantizerImpl::set_pre_scale(const Tensor& factors) {
  VERNIER_CHECK(factors.scalar_type() == torch::kFloat && factors.dim() == 1 &&
                    factors.isfinite().all().item<bool>() && factors.gt(0).all().item<bool>(),
                "a pre_scale must be float32 with one dimension, finite and positive");
  VERNIER_CHECK(factors.numel() == 0 || operand_ == Operand::activation,
                "a pre_scale is for activations: a weight takes its factors itself");
  pre_scale_.set_data(factors.detach().clone());
}

Tensor QuantizerImpl::pre_scaled(const Tensor& values) const {
  if (pre_scale_.numel() == 0) return values;
  VERNIER_CHECK(values.dim() > 0 && values.size(-1) == pre_scale_.numel(), "the pre_scale has ",
                pre_scale_.numel(), " channels and the values are ", values.sizes());
  return values.to(torch::kFloat) * pre_scale_;
}

std::optional<Tensor> QuantizerImpl::zero_point() const {
  const Scheme& scheme = settings_.scheme;
  if (scheme.symmetric) return std::nullopt;
  if (!learns()) return zero_point_;
  return learned_zero_point_.detach().round().clamp(scheme.qmin(), scheme.qmax()).to(torch::kInt);
}

void QuantizerImpl::check_learned() const {
  if (!learns()) return;
  const Tensor scale = learned_scale_.detach();
  const Tensor wrong = scale.gt(0).logical_and(scale.isfinite()).logical_not();
  if (wrong.any().item<bool>()) {
    const auto index = wrong.flatten().nonzero()[0].item<int64_t>();
    throw Error(concat("a learned scale became ", scale.flatten()[index].item<float>(),
                       " while training (number ", index, " of ", scale.numel(),
                       "): scales must stay positive. Give them a smaller learning rate in a "
                       "parameter group of their own, without weight decay, and go back to the "
                       "last checkpoint"));
  }
  VERNIER_CHECK(
      !learned_zero_point_.defined() || learned_zero_point_.detach().isfinite().all().item<bool>(),
      "a learned zero point became NaN or infinite while training: give it a smaller "
      "learning rate and go back to the last checkpoint");
}

void QuantizerImpl::set_ranges(const std::vector<Range>& ranges, torch::Device device) {
  const auto count = static_cast<int64_t>(ranges.size());
  Tensor scale = torch::empty({count}, torch::kFloat);
  Tensor zero_point = torch::empty({count}, torch::kInt);
  for (int64_t i = 0; i < count; ++i) {
    const ScaleAndZeroPoint chosen = scale_from_range(ranges[i], settings_.scheme);
    scale.data_ptr<float>()[i] = chosen.scale;
    zero_point.data_ptr<int32_t>()[i] = chosen.zero_point;
  }
  set_scale(scale.to(device), settings_.scheme.symmetric
                                  ? std::nullopt
                                  : std::optional<Tensor>(zero_point.to(device)));
}

void QuantizerImpl::set_scale(const Tensor& scale, const std::optional<Tensor>& zero_point) {
  const Scheme& scheme = settings_.scheme;
  VERNIER_CHECK(!scheme.dynamic || scale.numel() == 1,
                "a dynamic quantizer takes one factor on its scales, not ", scale.numel());
  VERNIER_CHECK(scale.scalar_type() == torch::kFloat && scale.isfinite().all().item<bool>() &&
                    scale.gt(0).all().item<bool>(),
                "a scale must be float32, finite and positive");
  VERNIER_CHECK(scheme.symmetric != zero_point.has_value(),
                "a zero point goes with asymmetric schemes and only with them");
  if (zero_point) {
    VERNIER_CHECK(zero_point->scalar_type() == torch::kInt &&
                      zero_point->numel() == scale.numel() &&
                      zero_point->ge(scheme.qmin()).all().item<bool>() &&
                      zero_point->le(scheme.qmax()).all().item<bool>(),
                  "zero points must be int32, one a scale, within [", scheme.qmin(), ", ",
                  scheme.qmax(), "]");
  }
  average_.set_data(average_.new_empty({0}));
  store(scale, zero_point);
}

void QuantizerImpl::store(const Tensor& scale, const std::optional<Tensor>& zero_point) {
  const auto put = [](const Tensor& into, const Tensor& value, torch::Dtype dtype) {
    // An accumulated gradient of another shape would be in the way.
    if (into.grad().defined() && into.sizes() != value.sizes()) into.mutable_grad() = Tensor();
    into.set_data(value.detach().to(dtype, /*non_blocking=*/false, /*copy=*/true));
  };
  put(learns() ? learned_scale_ : scale_, scale, torch::kFloat);
  if (!zero_point) return;
  if (learns()) {
    put(learned_zero_point_, *zero_point, torch::kFloat);
  } else {
    put(zero_point_, *zero_point, torch::kInt);
  }
}

void QuantizerImpl::calibrate(const Tensor& values) {
  const Scheme& scheme = settings_.scheme;
  VERNIER_CHECK(scheme.granularity != Granularity::per_token,
                "per_token scales are dynamic: a weight cannot be calibrated with them");
  const Tensor rows =
      rows_by_scale(values.detach().to(torch::kCPU, torch::kFloat), scheme, axis_).contiguous();
  std::vector<Range> ranges(rows.size(0));
  for (int64_t row = 0; row < rows.size(0); ++row) {
    Histogram histogram;
    histogram.add(
        {rows.const_data_ptr<float>() + row * rows.size(1), static_cast<size_t>(rows.size(1))});
    VERNIER_CHECK(histogram.nans() + histogram.infinities() == 0, "the weight holds ",
                  histogram.nans(), " NaN and ", histogram.infinities(), " infinite values in row ",
                  row, ": repair the checkpoint");
    ranges[row] = vernier::calibrate(histogram, scheme, settings_.calibrator);
  }
  set_ranges(ranges, values.device());
}

void QuantizerImpl::calibrate(const SiteStatistics& statistics) {
  VERNIER_CHECK(settings_.scheme.granularity == Granularity::per_tensor,
                "static activation scales are per_tensor, not ",
                to_string(settings_.scheme.granularity));
  set_ranges({vernier::calibrate(statistics.histogram, settings_.scheme, settings_.calibrator)},
             scale_.device());
}

void QuantizerImpl::check_calibrated() const {
  VERNIER_CHECK(calibrated(),
                "the quantizer has no scale yet: calibrate the model before quantizing with it");
}

void QuantizerImpl::update_average(const Tensor& values) {
  if (values.numel() == 0) return;
  const torch::NoGradGuard no_grad;
  const Scheme& scheme = settings_.scheme;
  const auto qmin = static_cast<double>(scheme.qmin()), qmax = static_cast<double>(scheme.qmax());
  Tensor batch;  // [2, scales]: extremes over finite values
  if (scheme.granularity == Granularity::per_channel) {
    batch = channel_range(values.detach().movedim(axis_, -1));
  } else {
    batch = whole_range(values.detach()).unsqueeze(1);
  }
  Tensor average = average_;
  if (average.numel() == 0) {
    // From where calibration left it.
    const Tensor zero =
        scheme.symmetric ? torch::zeros_like(scale_) : zero_point_.to(torch::kFloat);
    average = torch::stack({(qmin - zero) * scale_, (qmax - zero) * scale_});
  }
  const Tensor moved = average + settings_.averaging * (batch - average);
  average = torch::where(batch.isfinite(), moved, average);
  const Tensor low = average[0].clamp_max(0), high = average[1].clamp_min(0);
  Tensor scale;  // as scale_from_range. Division by a number would be a product on a GPU
  if (scheme.symmetric) {
    scale = torch::maximum(-low, high) / torch::full_like(low, qmax);
    scale = torch::where(scale.gt(0), scale, 1.0);
  } else {
    scale = (high - low) / torch::full_like(low, qmax - qmin);
    scale = torch::where(scale.gt(0), scale, 1.0);
    zero_point_.set_data((qmin - (low / scale).round()).clamp(qmin, qmax).to(torch::kInt));
  }
  // New memory, not new values in the old: a backward to come still needs those.
  average_.set_data(average);
  scale_.set_data(scale);
}

double QuantizerImpl::gradient_scale(const Tensor& values) const {
  int64_t elements = values.numel() / std::max<int64_t>(learned_scale_.numel(), 1);
  if (operand_ == Operand::activation && values.dim() > 1 && values.size(0) > 0)
    elements /= values.size(0);
  return learned_gradient_scale(std::max<int64_t>(elements, 1), settings_.scheme);
}

TrainedOperand QuantizerImpl::operand(const Tensor& values) {
  check_calibrated();
  TrainedOperand operand{settings_.scheme};
  if (finds() && !clips()) return operand;
  const bool asymmetric = !settings_.scheme.symmetric;
  if (learns()) {
    if (values.is_cpu()) check_learned();
    operand.scale = clips() ? clipped_scale(values) : learned_scale_;
    if (asymmetric) operand.zero_point = learned_zero_point_;
    operand.gradient_scale = gradient_scale(values);
    return operand;
  }
  if (settings_.policy == RangePolicy::moving_average && is_training()) update_average(values);
  operand.scale = clips() ? clipped_scale(values) : scale_;
  if (asymmetric) operand.zero_point = zero_point_;
  return operand;
}

Tensor QuantizerImpl::clipped_scale(const Tensor& values) const {
  return per_token_scale(values.detach(), settings_.scheme) * scale();
}

void QuantizerImpl::found(const Tensor& scale) {
  if (!settings_.scheme.dynamic) scale_.set_data(scale.detach());
}

Tensor QuantizerImpl::forward(const Tensor& values) {
  // The product is not rounded to half precision before it is quantized.
  return fake_quantized(pre_scaled(values)).to(values.scalar_type());
}

Tensor QuantizerImpl::fake_quantized(const Tensor& values) {
  const TrainedOperand used = operand(values);
  const Scheme& scheme = settings_.scheme;
  if (used.gradient_scale)
    return fake_quantize_learned(values, *used.scale, used.zero_point, scheme, axis_,
                                 *used.gradient_scale);
  if (used.scale) {
    // Their own handles, which keep what this forward used.
    std::optional<Tensor> zero_point;
    if (used.zero_point) zero_point = used.zero_point->detach();
    return fake_quantize(values, used.scale->detach(), zero_point, scheme, axis_);
  }
  // The scale follows the data but is a constant to the gradient, as everywhere with dynamic
  // quantization.
  Tensor output, scale;
  if (scheme.is_fp8()) {
    scale = own_scale(values.detach(), scheme, axis_);
    output = fake_quantize(values, scale, std::nullopt, scheme, axis_);
  } else {
    std::tie(output, scale) = fake_quantize_dynamic(values, scheme, axis_);
  }
  found(scale);
  return output;
}

QuantizerImpl::Codes QuantizerImpl::codes(const Tensor& given) const {
  check_calibrated();
  const Tensor values = pre_scaled(given);
  const Scheme& scheme = settings_.scheme;
  if (clips()) {
    const Tensor scale = clipped_scale(values).detach();
    return {quantize(values, scale, std::nullopt, scheme, axis_), scale};
  }
  if (scheme.dynamic && scheme.granularity == Granularity::per_token) {
    auto [codes, scale] = quantize_per_token(values, scheme);
    return {codes, scale};
  }
  const Tensor scale = finds() ? own_scale(values.detach(), scheme, axis_) : this->scale().detach();
  if (finds() && !scheme.dynamic) scale_.set_data(scale);
  return {quantize(values, scale, zero_point(), scheme, axis_), scale};
}

Tensor QuantizerImpl::dequantize(const Tensor& codes, torch::Dtype dtype) const {
  VERNIER_CHECK(!settings_.scheme.dynamic,
                "codes of a dynamic scheme stand for nothing without "
                "their scales");
  return vernier::dequantize(codes, scale().detach(), zero_point(), settings_.scheme, axis_, dtype);
}

}  // namespace vernier
