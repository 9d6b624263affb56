#include <torch/serialize/archive.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/fake_quantize.h>
#include <vernier/kernels/quantize.h>
#include <vernier/qat/quantizer.h>

namespace vernier {

using torch::Tensor;

QuantizerImpl::QuantizerImpl(const QuantizerSettings& settings, int64_t axis)
    : settings_(settings), axis_(axis) {
  settings_.scheme.check();
  QuantizerImpl::reset();
}

void QuantizerImpl::reset() {
  // Empty until calibrated: a registered buffer can change its data but not become undefined.
  scale_ = register_buffer("scale", torch::empty({0}, torch::kFloat));
  zero_point_ = register_buffer("zero_point", torch::empty({0}, torch::kInt));
  observer_ = std::make_shared<Observer>();
}

void QuantizerImpl::save(torch::serialize::OutputArchive& archive) const {
  torch::nn::Module::save(archive);
  const Scheme& scheme = settings_.scheme;
  archive.write("bits", c10::IValue(int64_t{scheme.bits}));
  archive.write("granularity", c10::IValue(to_string(scheme.granularity)));
  archive.write("group_size", c10::IValue(scheme.group_size));
  archive.write("symmetric", c10::IValue(scheme.symmetric));
  archive.write("narrow_range", c10::IValue(scheme.narrow_range));
  archive.write("dynamic", c10::IValue(scheme.dynamic));
}

void QuantizerImpl::load(torch::serialize::InputArchive& archive) {
  QuantizerSettings settings = settings_;
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
  }
  Tensor scale, zero_point;
  archive.read("scale", scale, /*is_buffer=*/true);
  archive.read("zero_point", zero_point, /*is_buffer=*/true);
  const bool asymmetric = zero_point.numel() > 0;
  VERNIER_CHECK(
      scheme.dynamic ? scale.numel() == 0 : scale.numel() > 0 && asymmetric == !scheme.symmetric,
      "the archive's scale and zero point do not go with the scheme ", to_string(scheme));
  const torch::Device device = scale_.device();
  set_settings(settings);
  if (scheme.dynamic) return;
  set_scale(scale.to(device),
            asymmetric ? std::optional<Tensor>(zero_point.to(device)) : std::nullopt);
}

void QuantizerImpl::to(torch::Device device, torch::Dtype, bool non_blocking) {
  torch::nn::Module::to(device, non_blocking);
}

void QuantizerImpl::to(torch::Dtype, bool) {}

void QuantizerImpl::set_settings(const QuantizerSettings& settings) {
  settings.scheme.check();
  settings_ = settings;
  scale_.set_data(scale_.new_empty({0}));
  zero_point_.set_data(zero_point_.new_empty({0}));
}

std::optional<Tensor> QuantizerImpl::zero_point() const {
  return settings_.scheme.symmetric ? std::nullopt : std::optional<Tensor>(zero_point_);
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
  VERNIER_CHECK(!scheme.dynamic, "a dynamic quantizer takes no scale");
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
    zero_point_.set_data(zero_point->detach().clone());
  }
  scale_.set_data(scale.detach().clone());
}

void QuantizerImpl::calibrate(const Tensor& values) {
  const Scheme& scheme = settings_.scheme;
  Tensor rows = values.detach().to(torch::kCPU, torch::kFloat);
  switch (scheme.granularity) {
    case Granularity::per_tensor:
      rows = rows.reshape({1, -1});
      break;
    case Granularity::per_channel:
      rows = rows.movedim(axis_, 0).flatten(1);
      break;
    case Granularity::per_group:
      VERNIER_CHECK(values.size(-1) % scheme.group_size == 0, "group_size ", scheme.group_size,
                    " does not divide the last axis of ", values.sizes());
      rows = rows.reshape({-1, scheme.group_size});
      break;
    case Granularity::per_token:
      throw Error("per_token scales are dynamic: a weight cannot be calibrated with them");
  }
  rows = rows.contiguous();
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

Tensor QuantizerImpl::forward(const Tensor& values) {
  check_calibrated();
  if (!settings_.scheme.dynamic)
    return fake_quantize(values, scale_, zero_point(), settings_.scheme, axis_);
  Tensor scale;
  {
    // The scale follows the data but is a constant to the gradient, as everywhere with dynamic
    // quantization.
    const torch::NoGradGuard no_grad;
    scale = per_token_scale(values, settings_.scheme);
  }
  return fake_quantize(values, scale, std::nullopt, settings_.scheme, axis_);
}

QuantizerImpl::Codes QuantizerImpl::codes(const Tensor& values) const {
  check_calibrated();
  if (!settings_.scheme.dynamic)
    return {quantize(values, scale_, zero_point(), settings_.scheme, axis_), scale_};
  auto [codes, scale] = quantize_per_token(values, settings_.scheme);
  return {codes, scale};
}

}  // namespace vernier
