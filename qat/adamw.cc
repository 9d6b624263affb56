#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/_foreach_exp.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <vernier/kernels/error.h>
#include <vernier/qat/adamw.h>
#include <vernier/qat/quantizer.h>

#include <set>

namespace vernier {
namespace {

using torch::Tensor;

// The share of a gradient below which Adam no longer sees it: learned scales have small gradients,
// and how small says nothing of them.
constexpr double kRangeEpsilon = 1e-15;
// Views begin at multiples of this many elements: 128 bytes, for wide loads.
constexpr int64_t kAlignment = 32;

const char* const kMoments[3] = {"matrices", "vectors", "ranges"};

}  // namespace

FusedAdamW::FusedAdamW(const torch::nn::Module& model, const AdamWSettings& settings)
    : settings_(settings) {
  std::set<const void*> ranges;
  for (const auto& module : model.modules(/*include_self=*/false)) {
    const auto quantizer = std::dynamic_pointer_cast<QuantizerImpl>(module);
    if (!quantizer) continue;
    for (const auto& item : quantizer->named_parameters(false)) {
      ranges.insert(item.value().unsafeGetTensorImpl());
      if (item.value().numel() == 0) continue;
      if (item.key() == "learned_scale") {
        scales_.push_back(item.value());
      } else {
        const Scheme& scheme = quantizer->scheme();
        zero_points_.push_back(item.value());
        half_codes_.push_back(0.5 * (scheme.qmax() - scheme.qmin()));
      }
    }
  }
  std::vector<Tensor> matrices, vectors;
  for (const auto& item : model.named_parameters()) {
    const Tensor& parameter = item.value();
    if (!parameter.requires_grad()) continue;
    VERNIER_CHECK(parameter.scalar_type() == torch::kFloat, "parameter '", item.key(), "' is ",
                  c10::toString(parameter.scalar_type()),
                  ": weights are trained in float32, whatever the products are computed in");
    VERNIER_CHECK(parameter.device() == model.parameters().front().device(), "parameter '",
                  item.key(), "' is on ", parameter.device(), " and others on ",
                  model.parameters().front().device(), ": move the model to one device");
    // Moments and gradients lie as their tensor does, element for element.
    if (!parameter.is_contiguous()) parameter.set_data(parameter.detach().contiguous());
    if (ranges.count(parameter.unsafeGetTensorImpl())) continue;
    (parameter.dim() >= 2 ? matrices : vectors).push_back(parameter);
  }
  VERNIER_CHECK(!matrices.empty() || !vectors.empty(), "the model has no parameter to train");
  const torch::NoGradGuard no_grad;
  weights_ = matrices;
  weights_.insert(weights_.end(), vectors.begin(), vectors.end());
  weight_gradients_ = flat_zeros(weights_);
  std::vector<Tensor> learned = scales_;
  learned.insert(learned.end(), zero_points_.begin(), zero_points_.end());
  range_gradients_ = flat_zeros(learned);
  variables_ = flat_zeros(learned);
  for (size_t i = 0; i < scales_.size(); ++i) variables_.views[i].copy_(scales_[i].log());
  for (size_t i = 0; i < zero_points_.size(); ++i)
    variables_.views[scales_.size() + i].copy_(zero_points_[i] / half_codes_[i]);
  const auto& views = weight_gradients_.views;
  const auto split = views.begin() + static_cast<int64_t>(matrices.size());
  add_group(matrices, {views.begin(), split}, settings_.weight_decay, settings_.epsilon);
  add_group(vectors, {split, views.end()}, 0, settings_.epsilon);
  add_group(variables_.views, range_gradients_.views, 0, kRangeEpsilon);
  steps_ = torch::zeros({}, weights_.front().options().requires_grad(false));
  attach_gradients();
  set_ranges();  // to what steps will make of them, so that the first step sees nothing else
}

FusedAdamW::Flat FusedAdamW::flat_zeros(const std::vector<Tensor>& like) {
  Flat flat;
  if (like.empty()) return flat;
  std::vector<int64_t> first;
  int64_t size = 0;
  for (const Tensor& tensor : like) {
    first.push_back(size);
    size += (tensor.numel() + kAlignment - 1) / kAlignment * kAlignment;
  }
  flat.all = torch::zeros({size}, like.front().options().requires_grad(false));
  for (size_t i = 0; i < like.size(); ++i)
    flat.views.push_back(flat.all.narrow(0, first[i], like[i].numel()).view(like[i].sizes()));
  return flat;
}

void FusedAdamW::add_group(std::vector<Tensor> parameters, std::vector<Tensor> gradients,
                           double weight_decay, double epsilon) {
  Group group;
  group.first = flat_zeros(parameters);
  group.second = flat_zeros(parameters);
  group.parameters = std::move(parameters);
  group.gradients = std::move(gradients);
  group.weight_decay = weight_decay;
  group.epsilon = epsilon;
  groups_.push_back(std::move(group));
}

void FusedAdamW::attach_gradients() {
  for (size_t i = 0; i < weights_.size(); ++i)
    weights_[i].mutable_grad() = weight_gradients_.views[i];
  for (size_t i = 0; i < scales_.size(); ++i) scales_[i].mutable_grad() = range_gradients_.views[i];
  for (size_t i = 0; i < zero_points_.size(); ++i)
    zero_points_[i].mutable_grad() = range_gradients_.views[scales_.size() + i];
}

void FusedAdamW::clear_gradients() {
  weight_gradients_.all.zero_();
  if (range_gradients_.all.defined()) range_gradients_.all.zero_();
}

void FusedAdamW::update(Group& group, const Tensor& rate, const std::optional<Tensor>& divide_by) {
  if (group.parameters.empty()) return;
  const std::vector<Tensor> steps(group.parameters.size(), steps_);
  at::_fused_adamw_(group.parameters, group.gradients, group.first.views, group.second.views, {},
                    steps, rate, settings_.beta1, settings_.beta2, group.weight_decay,
                    group.epsilon, /*amsgrad=*/false, /*maximize=*/false, divide_by);
}

void FusedAdamW::step(const Tensor& rate, const Tensor& range_rate) {
  const torch::NoGradGuard no_grad;
  steps_.add_(1);
  std::optional<Tensor> divide_by;
  if (settings_.clip_norm > 0)
    divide_by =
        at::linalg_vector_norm(weight_gradients_.all).div_(settings_.clip_norm).clamp_min_(1);
  update(groups_[0], rate, divide_by);
  update(groups_[1], rate, divide_by);
  if (variables_.views.empty()) return;
  // d/d log s = s d/ds.
  const auto& gradients = range_gradients_.views;
  const std::vector<Tensor> of_scales(gradients.begin(),
                                      gradients.begin() + static_cast<int64_t>(scales_.size()));
  if (!scales_.empty()) at::_foreach_mul_(of_scales, scales_);
  for (size_t i = 0; i < zero_points_.size(); ++i)
    range_gradients_.views[scales_.size() + i].mul_(half_codes_[i]);
  update(groups_[2], range_rate, std::nullopt);
  set_ranges();
}

void FusedAdamW::set_ranges() {
  const auto& views = variables_.views;
  if (!scales_.empty()) {
    const std::vector<Tensor> logarithms(views.begin(),
                                         views.begin() + static_cast<int64_t>(scales_.size()));
    at::_foreach_copy_(scales_, at::_foreach_exp(logarithms));
  }
  for (size_t i = 0; i < zero_points_.size(); ++i)
    zero_points_[i].copy_(views[scales_.size() + i] * half_codes_[i]);
}

void FusedAdamW::save(torch::serialize::OutputArchive& archive) const {
  for (size_t i = 0; i < groups_.size(); ++i) {
    if (groups_[i].parameters.empty()) continue;
    archive.write(concat("first_", kMoments[i]), groups_[i].first.all, /*is_buffer=*/true);
    archive.write(concat("second_", kMoments[i]), groups_[i].second.all, /*is_buffer=*/true);
  }
  if (variables_.all.defined()) archive.write("variables", variables_.all, /*is_buffer=*/true);
  archive.write("steps", steps_, /*is_buffer=*/true);
}

void FusedAdamW::load(torch::serialize::InputArchive& archive) {
  std::vector<std::pair<Tensor, Tensor>> pairs;  // from the archive, into
  const auto read = [&](const std::string& key, const Tensor& into) {
    Tensor saved;
    VERNIER_CHECK(archive.try_read(key, saved, /*is_buffer=*/true) &&
                      saved.sizes() == into.sizes() && saved.scalar_type() == into.scalar_type(),
                  "the state of the optimizer ('", key, "') is of another model or damaged");
    pairs.emplace_back(saved, into);
  };
  for (size_t i = 0; i < groups_.size(); ++i) {
    if (groups_[i].parameters.empty()) continue;
    read(concat("first_", kMoments[i]), groups_[i].first.all);
    read(concat("second_", kMoments[i]), groups_[i].second.all);
  }
  if (variables_.all.defined()) read("variables", variables_.all);
  read("steps", steps_);
  const torch::NoGradGuard no_grad;
  for (const auto& [saved, into] : pairs) into.copy_(saved);
  attach_gradients();
}

}  // namespace vernier
