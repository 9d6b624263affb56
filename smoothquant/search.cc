#include <torch/nn/functional/activation.h>
#include <torch/optim/adam.h>
#include <vernier/kernels/error.h>
#include <vernier/kernels/fake_quantize.h>
#include <vernier/kernels/quantize.h>
#include <vernier/kernels/statistics.h>
#include <vernier/smoothquant/folding.h>
#include <vernier/smoothquant/search.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numbers>
#include <set>
#include <utility>

namespace vernier {
namespace {

using nlohmann::json;
using torch::Tensor;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Losses that differ by less say nothing about which candidate is better: the milder is taken.
constexpr double kTie = 2e-4;
constexpr int64_t kChunkLogits = int64_t{1} << 24;  // 64 MiB of float32
constexpr int64_t kRefineEvery = 4, kRefinePatience = 5, kRefineWarmUp = 10;

const std::vector<double> kAlphas = {0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0};
const std::vector<double> kKeeps = {1, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1};

// ---- How far a model is from the float model ----------------------------------------------------

class Objective {
 public:
  Objective(const SearchedModel& model, int64_t cache_bytes)
      : model_(model), cache_bytes_(cache_bytes) {}

  /// The float model's output of the next batch.
  void add_reference(const Tensor& output) {
    VERNIER_CHECK(output.dim() == 2 && output.isfinite().all().item<bool>(),
                  "the float model's output on batch ", references_.size(),
                  " holds NaN or infinite values: check the data and the model");
    references_.push_back(output.detach());
    weights_.push_back(model_.logits ? static_cast<double>(output.size(0))
                                     : output.to(torch::kDouble).square().sum().item<double>());
    if (!model_.logits || output.size(0) == 0) return;
    if (vocabulary_ == 0) vocabulary_ = model_.logits(output.narrow(0, 0, 1)).size(1);
    cached_bytes_ += output.size(0) * vocabulary_ * 4;
    caches_.emplace_back();
    if (cached_bytes_ > cache_bytes_) return;
    std::vector<Tensor> parts;
    for_each_chunk(output.size(0), [&](int64_t first, int64_t count) {
      parts.push_back(log_probabilities(output.narrow(0, first, count)));
    });
    caches_.back() = torch::cat(parts);
  }

  double weight(int64_t batch) const { return weights_.at(batch); }

  /// Distance of an output of a batch, a sum of which weight() is the denominator; with `gradient`
  /// also its derivative by the output.
  double distance(const Tensor& output, int64_t batch, Tensor* gradient = nullptr) const {
    const Tensor& reference = references_.at(batch);
    if (!model_.logits) {
      const Tensor difference = output.detach() - reference;
      if (gradient) *gradient = 2 * difference;
      return difference.to(torch::kDouble).square().sum().item<double>();
    }
    if (gradient) *gradient = torch::zeros_like(output);
    Tensor sum = torch::zeros({}, output.options().dtype(torch::kDouble).requires_grad(false));
    for_each_chunk(output.size(0), [&](int64_t first, int64_t count) {
      const Tensor exact = caches_.at(batch).defined()
                               ? caches_[batch].narrow(0, first, count)
                               : log_probabilities(reference.narrow(0, first, count));
      const torch::AutoGradMode mode(gradient != nullptr);
      Tensor rows = output.detach().narrow(0, first, count);
      if (gradient) rows = rows.clone().requires_grad_(true);
      const Tensor found = model_.logits(rows).to(torch::kFloat).log_softmax(-1);
      // A token that both rule out (log 0 - log 0) adds nothing.
      const Tensor terms = torch::where(exact.isneginf(), 0, exact.exp() * (exact - found));
      const Tensor divergence = terms.sum(-1).sum(torch::kDouble);
      sum += divergence.detach();
      if (!gradient) return;
      divergence.backward();
      gradient->narrow(0, first, count).copy_(rows.grad());
    });
    return sum.item<double>();
  }

 private:
  template <typename F>
  void for_each_chunk(int64_t rows, const F& f) const {
    const int64_t chunk = std::max<int64_t>(1, kChunkLogits / std::max<int64_t>(1, vocabulary_));
    for (int64_t first = 0; first < rows; first += chunk) f(first, std::min(chunk, rows - first));
  }
  Tensor log_probabilities(const Tensor& rows) const {
    return model_.logits(rows).to(torch::kFloat).log_softmax(-1);
  }

  const SearchedModel& model_;
  int64_t cache_bytes_, cached_bytes_ = 0, vocabulary_ = 0;
  std::vector<Tensor> references_, caches_;
  std::vector<double> weights_;
};

// ---- A group under search -----------------------------------------------------------------------

QuantizerSettings frozen(QuantizerSettings settings) {
  settings.policy = RangePolicy::frozen;
  return settings;
}

// A quantized layer of a group, which computes on `input` and `weight` while it is searched.
struct Reader {
  std::shared_ptr<QuantizedLayer> layer;
  QuantizerSettings weights;
  Tensor original;
  Quantizer input{nullptr};
  Tensor weight;  // quantize-dequantized

  Tensor forward(const Tensor& x) const {
    return layer->compute({input.ptr()->forward(x)}, weight, layer->float_bias());
  }
};

struct Group {
  size_t index = 0;  // among FoldedFactors'
  std::string name;
  std::vector<Reader> readers;
  bool ranged = false;  // static scales, which clipping changes
  bool symmetric = false;
  Tensor low, high;        // extremes of each input channel, float32 [in]
  Tensor rows;             // of its input, float32 [n, in]
  Tensor row_weight;       // how many rows each stands for, float32 [n]
  SmoothingChoice choice;  // where the factors were refined, what they went out from
  Tensor factors;          // [channels]; undefined: none
  std::set<std::vector<double>> tried;

  Tensor amax() const { return torch::maximum(-low, high).clamp_min(0); }
};

std::vector<double> key_of(const SmoothingChoice& choice) {
  return {choice.alpha.value_or(-1), choice.keep_low, choice.keep_high};
}

// More of it moves the model further from its float self where the samples do not look.
double severity(const SmoothingChoice& choice) {
  return choice.alpha.value_or(0) + (1 - choice.keep_low) + (1 - choice.keep_high);
}

// The weight as its quantizer makes it, calibrated as the recipe says.
Tensor quantized_weight(const QuantizerSettings& settings, const Tensor& weight) {
  Quantizer quantizer(frozen(settings), /*axis=*/0, Operand::weight);
  quantizer->to(weight.device());
  const Scheme& scheme = settings.scheme;
  const bool by_rows = scheme.symmetric && scheme.granularity == Granularity::per_channel &&
                       settings.calibrator == Calibrator{};
  if (by_rows) {
    quantizer->set_scale(per_token_scale(weight.to(torch::kFloat), scheme), std::nullopt);
  } else {
    quantizer->calibrate(weight);
  }
  return quantizer->forward(weight);
}

// The range of the smoothed activation, whole: `inverse` are the reciprocal factors, or undefined.
Range smoothed_extremes(const Group& group, const Tensor& inverse) {
  const Tensor low = inverse.defined() ? group.low * inverse : group.low;
  const Tensor high = inverse.defined() ? group.high * inverse : group.high;
  // Dead channels say {+inf, -inf}.
  return {std::min(0.0f, low.min().item<float>()), std::max(0.0f, high.max().item<float>())};
}

Range kept(const Range& extremes, const SmoothingChoice& choice) {
  return {static_cast<float>(extremes.min * choice.keep_low),
          static_cast<float>(extremes.max * choice.keep_high)};
}

json to_json(const SmoothingChoice& choice) {
  return {{"alpha", choice.alpha ? json(*choice.alpha) : json()},
          {"keep_low", choice.keep_low},
          {"keep_high", choice.keep_high}};
}

SmoothingChoice choice_from(const json& value) {
  SmoothingChoice choice;
  if (!value.at("alpha").is_null()) choice.alpha = value.at("alpha").get<double>();
  choice.keep_low = value.at("keep_low").get<double>();
  choice.keep_high = value.at("keep_high").get<double>();
  return choice;
}

// A name without the numbers of layers.
std::string kind_of(const std::string& name) {
  std::string kind;
  for (const char c : name)
    if (c < '0' || c > '9') kind += c;
  return kind;
}

// Takes probes and stand-ins off and gives modes back.
class LayersGuard {
 public:
  explicit LayersGuard(const torch::nn::Module& model) {
    for (const NamedLayer& item : quantized_layers(model))
      layers_.emplace_back(item.layer, item.layer->mode());
    for (const Tensor& parameter : model.parameters()) {
      if (!parameter.requires_grad()) continue;
      trained_.push_back(parameter);
      parameter.set_requires_grad(false);
    }
  }
  ~LayersGuard() {
    for (const auto& [layer, mode] : layers_) {
      layer->set_probe(nullptr);
      layer->set_stand_in(nullptr);
      if (layer->mode() != Mode::full) layer->set_mode(Mode::full);
    }
    for (const Tensor& parameter : trained_) parameter.set_requires_grad(true);
  }
  LayersGuard(const LayersGuard&) = delete;
  LayersGuard& operator=(const LayersGuard&) = delete;

 private:
  std::vector<std::pair<std::shared_ptr<QuantizedLayer>, Mode>> layers_;
  std::vector<Tensor> trained_;
};

// ---- The search ---------------------------------------------------------------------------------

class Search {
 public:
  Search(const SearchedModel& model, std::vector<SmoothingGroup> groups,
         const SearchOptions& options)
      : model_(model),
        options_(options),
        guard_(model.module),
        folded_(model.module, std::move(groups), options.storage),
        objective_(model, options.cache_bytes) {
    VERNIER_CHECK(model.proposing >= 1 && model.deciding >= 1,
                  "the search needs samples on both sides, to propose and to decide: give it at "
                  "least two");
    VERNIER_CHECK(options.refine_average >= 0 && options.refine_average < 1,
                  "refine_average must be in [0, 1), not ", options.refine_average);
    VERNIER_CHECK(folded_.size() > 0, "the model has no smoothing group with a quantized layer");
    for (size_t i = 0; i < folded_.size(); ++i) make_group(i);
  }

  SmoothingResult run() {
    record();
    for (Group& group : groups_) {
      group.choice = starting_choice(group);
      install(group);
    }
    if (options_.resume) {
      load(*options_.resume);
    } else {
      current_ = {loss(false), loss(true)};
      VERNIER_CHECK(std::isfinite(current_.proposing) && std::isfinite(current_.held_out),
                    "the quantized model's output holds NaN or infinite values before smoothing: "
                    "check the recipe");
      before_ = current_;
    }
    const SmoothingLoss started = before_;
    steps();
    const bool refined = refine();
    return finish(started, refined);
  }

 private:
  using Change = std::vector<std::pair<size_t, SmoothingChoice>>;

  // ---- Preparation ----

  void make_group(size_t index) {
    Group group;
    group.index = index;
    group.name = folded_.group(index).name;
    for (const auto& layer : folded_.readers(index)) {
      if (!layer->quantized()) continue;
      VERNIER_CHECK(
          layer->weight_quantizer && layer->input_from().empty() && !layer->output_quantizer,
          "smoothing group '", group.name,
          "': layers in a chain, or with quantized outputs, cannot be searched");
      Reader reader;
      reader.layer = layer;
      reader.weights = layer->weight_quantizer->settings();
      reader.original = layer->float_weight().detach();
      reader.input = Quantizer(frozen(layer->input_quantizer->settings()));
      reader.input->to(reader.original.device());
      group.readers.push_back(std::move(reader));
    }
    VERNIER_CHECK(!group.readers.empty(), "smoothing group '", group.name,
                  "' has no reader that is quantized");
    const QuantizerSettings& inputs = group.readers.front().layer->input_quantizer->settings();
    group.ranged = !inputs.scheme.dynamic && inputs.policy != RangePolicy::following;
    group.symmetric = inputs.scheme.symmetric;
    groups_.push_back(std::move(group));
  }

  // One pass of the float model: its outputs, the groups' inputs, and scales for layers that are in
  // no group.
  void record() {
    const torch::NoGradGuard no_grad;
    set_mode(model_.module, Mode::full);
    std::set<const QuantizedLayer*> grouped;
    bool proposing = true;
    int64_t batch = 0;
    for (Group& group : groups_) {
      for (const Reader& reader : group.readers) grouped.insert(reader.layer.get());
      group.readers.front().layer->set_probe(
          [this, &group, &proposing](const std::vector<Tensor>& inputs, const Tensor&) {
            see(group, inputs.at(0), proposing);
          });
    }
    std::vector<NamedLayer> others;
    for (const NamedLayer& item : quantized_layers(model_.module)) {
      if (!item.layer->quantized() || grouped.count(item.layer.get())) continue;
      for (const auto& quantizer : item.layer->quantizers())
        quantizer.quantizer->observer().reset();
      item.layer->set_mode(Mode::observe);
      others.push_back(item);
    }
    for (; batch < model_.proposing + model_.deciding; ++batch) {
      proposing = batch < model_.proposing;
      objective_.add_reference(model_.run(batch));
    }
    ++passes_;
    for (Group& group : groups_) {
      group.readers.front().layer->set_probe(nullptr);
      VERNIER_CHECK(group.low.defined() && !seen_rows_[group.index].empty(), "smoothing group '",
                    group.name, "' was never reached by the data: use data that reaches it");
      group.rows = torch::cat(seen_rows_[group.index]);
      group.row_weight = torch::cat(seen_weights_[group.index]);
    }
    seen_rows_.clear();
    seen_weights_.clear();
    for (const NamedLayer& item : others) {
      for (const auto& [what, quantizer] : item.layer->quantizers()) {
        if (quantizer->operand() == Operand::weight) {
          quantizer->calibrate(item.layer->float_weight());
        } else if (!quantizer->calibrated()) {
          const SiteStatistics seen = quantizer->observer().statistics();
          VERNIER_CHECK(seen.histogram.total() > 0, "layer '", item.name,
                        "' was never reached by the data: use data that reaches it, or skip it");
          quantizer->calibrate(seen);
        }
      }
      item.layer->set_mode(Mode::fake_quant);
    }
    for (Group& group : groups_)
      for (Reader& reader : group.readers)
        reader.layer->set_stand_in(
            [&reader](at::TensorList inputs) { return reader.forward(inputs[0]); });
  }

  // Extremes of a group's input, and rows of it: those with the largest values, each for itself,
  // and others at equal distances, which stand for the rest.
  void see(Group& group, const Tensor& input, bool proposing) {
    const Tensor x = input.detach().reshape({-1, input.size(-1)}).to(torch::kFloat);
    if (x.size(0) == 0) return;
    const Tensor range = channel_range(x);
    group.low = group.low.defined() ? torch::minimum(group.low, range[0]) : range[0];
    group.high = group.high.defined() ? torch::maximum(group.high, range[1]) : range[1];
    if (!proposing) return;
    const int64_t count = x.size(0);
    const int64_t wanted =
        std::min(count, std::max<int64_t>(4, options_.sample_rows / model_.proposing));
    const int64_t top = wanted / 4, others = wanted - top;
    const Tensor order = x.abs().amax(1).argsort(/*dim=*/0, /*descending=*/true);
    const Tensor large = order.narrow(0, 0, top);
    const Tensor rest = std::get<0>(order.narrow(0, top, count - top).sort());
    const Tensor place = ((torch::arange(others, torch::kDouble) + 0.5) *
                          (static_cast<double>(count - top) / static_cast<double>(others)))
                             .floor()
                             .to(torch::kLong)
                             .to(x.device());
    seen_rows_[group.index].push_back(
        x.index_select(0, torch::cat({large, rest.index_select(0, place)})));
    Tensor weight = torch::ones({wanted}, x.options());
    weight.narrow(0, top, others)
        .fill_(static_cast<double>(count - top) / static_cast<double>(others));
    seen_weights_[group.index].push_back(weight);
  }

  // Without factors, the range that the recipe's calibrator finds on the sampled rows.
  SmoothingChoice starting_choice(const Group& group) {
    return calibrated_choice(group, std::nullopt, group.rows, Tensor());
  }

  SmoothingChoice calibrated_choice(const Group& group, const std::optional<double>& alpha,
                                    const Tensor& rows, const Tensor& inverse) {
    SmoothingChoice choice{alpha};
    const QuantizerSettings& settings = group.readers.front().input->settings();
    if (!group.ranged || settings.calibrator == Calibrator{}) return choice;
    Histogram histogram;
    const Tensor values = (inverse.defined() ? rows * inverse : rows).cpu().contiguous();
    histogram.add({values.const_data_ptr<float>(), static_cast<size_t>(values.numel())});
    const Range found = calibrate(histogram, settings.scheme, settings.calibrator);
    const Range whole = smoothed_extremes(group, inverse);
    const auto share = [](float part, float all) {
      return all == 0 ? 1.0 : std::clamp(static_cast<double>(part) / all, 1e-3, 1.0);
    };
    if (group.symmetric) {
      choice.keep_low = choice.keep_high = share(found.max, std::max(-whole.min, whole.max));
    } else {
      choice.keep_low = share(found.min, whole.min);
      choice.keep_high = share(found.max, whole.max);
    }
    return choice;
  }

  // ---- What stands in the model ----

  Tensor factors_of(const Group& group, const std::optional<double>& alpha) const {
    return alpha ? folded_.factors(group.index, group.amax(), *alpha) : Tensor();
  }

  Tensor inverse_of(const Group& group, const Tensor& factors) const {
    return factors.defined() ? folded_.to_reader(group.index, factors).reciprocal() : Tensor();
  }

  // Makes the readers compute as the group's choice and factors say.
  void install(Group& group) {
    const torch::NoGradGuard no_grad;
    const Tensor inverse = inverse_of(group, group.factors);
    const Tensor columns =
        group.factors.defined() ? folded_.to_reader(group.index, group.factors) : Tensor();
    std::optional<Range> range;
    if (group.ranged) range = kept(smoothed_extremes(group, inverse), group.choice);
    for (Reader& reader : group.readers) {
      reader.weight = quantized_weight(
          reader.weights, columns.defined() ? reader.original * columns : reader.original);
      reader.input->set_pre_scale(inverse.defined() ? inverse
                                                    : torch::empty({0}, group.low.options()));
      if (range) reader.input->set_ranges({*range}, reader.original.device());
    }
  }

  void choose(size_t index, const SmoothingChoice& choice) {
    Group& group = groups_[index];
    if (choice.alpha != group.choice.alpha) group.factors = factors_of(group, choice.alpha);
    group.choice = choice;
    install(group);
  }

  // Whether the weights stay finite where they are to be saved.
  bool storable(const Group& group, const Tensor& factors) {
    if (options_.storage.value_or(torch::kFloat) != torch::kHalf || !factors.defined()) return true;
    try {
      folded_.set(group.index, factors);
      folded_.set(group.index, Tensor());
    } catch (const Error&) {
      return false;
    }
    return true;
  }

  /// Mean loss on one half; beyond `bound`, as soon as that is certain, something above it.
  double loss(bool held_out, double bound = kInfinity) {
    const torch::NoGradGuard no_grad;
    const int64_t first = held_out ? model_.proposing : 0;
    const int64_t count = held_out ? model_.deciding : model_.proposing;
    double total = 0, sum = 0;
    for (int64_t i = first; i < first + count; ++i) total += objective_.weight(i);
    if (total == 0) return 0;
    for (int64_t i = first; i < first + count; ++i) {
      sum += objective_.distance(model_.run(i), i);
      passes_ += 1.0 / static_cast<double>(model_.proposing + model_.deciding);
      if (std::isnan(sum)) return kInfinity;
      if (sum / total > bound) break;  // distances are not negative
    }
    return sum / total;
  }

  // ---- Candidates ----

  struct Candidate {
    SmoothingChoice choice;
    double squared = 0;   // error of the outputs, as a share of their energy
    double relative = 0;  // the same, each row as a share of its own
  };

  std::vector<Tensor> reference_outputs(const Group& group) const {
    std::vector<Tensor> outputs;
    for (const Reader& reader : group.readers)
      outputs.push_back(reader.layer->compute({group.rows}, reader.original, Tensor()));
    return outputs;
  }

  void measure(const Group& group, const std::vector<Tensor>& references, const Tensor& factors,
               const std::vector<Candidate*>& candidates) const {
    const Tensor inverse = inverse_of(group, factors);
    const Tensor columns = factors.defined() ? folded_.to_reader(group.index, factors) : Tensor();
    const Range extremes = smoothed_extremes(group, inverse);
    for (size_t r = 0; r < group.readers.size(); ++r) {
      const Reader& reader = group.readers[r];
      const Tensor weight = quantized_weight(
          reader.weights, columns.defined() ? reader.original * columns : reader.original);
      const Tensor energy = references[r].square().sum(1);
      const Tensor total = (energy * group.row_weight).sum();
      const Tensor mean = total / group.row_weight.sum();
      Quantizer input(reader.input->settings());
      input->to(reader.original.device());
      if (inverse.defined()) input->set_pre_scale(inverse);
      std::vector<Tensor> errors;
      for (const Candidate* candidate : candidates) {
        if (group.ranged)
          input->set_ranges({kept(extremes, candidate->choice)}, reader.original.device());
        const Tensor error =
            (reader.layer->compute({input->forward(group.rows)}, weight, Tensor()) - references[r])
                .square()
                .sum(1);
        errors.push_back(
            torch::stack({(error * group.row_weight).sum() / total.clamp_min(1e-30f),
                          (error * group.row_weight / (energy + mean).clamp_min(1e-30f)).sum() /
                              group.row_weight.sum()}));
      }
      const Tensor found = torch::stack(errors).cpu().to(torch::kDouble);
      for (size_t i = 0; i < candidates.size(); ++i) {
        candidates[i]->squared += found[i][0].item<double>() / group.readers.size();
        candidates[i]->relative += found[i][1].item<double>() / group.readers.size();
      }
    }
  }

  // Candidates of a group with their own layers' error, for the given alphas; the clippings are
  // `keeps` of both ends, and where they differ of each alone.
  std::vector<Candidate> candidates(const Group& group,
                                    const std::vector<std::optional<double>>& alphas,
                                    const std::vector<SmoothingChoice>& keeps) {
    const torch::NoGradGuard no_grad;
    const std::vector<Tensor> references = reference_outputs(group);
    std::vector<Candidate> all;
    for (const std::optional<double>& alpha : alphas) {
      const Tensor factors = factors_of(group, alpha);
      if (!storable(group, factors)) continue;
      std::vector<Candidate> mine;
      const auto add = [&](SmoothingChoice choice) {
        choice.alpha = alpha;
        for (const Candidate& other : mine)
          if (other.choice == choice) return;
        mine.push_back({choice});
      };
      add(calibrated_choice(group, alpha, group.rows, inverse_of(group, factors)));
      if (group.ranged)
        for (const SmoothingChoice& keep : keeps) add(keep);
      std::vector<Candidate*> pointers;
      for (Candidate& candidate : mine) pointers.push_back(&candidate);
      measure(group, references, factors, pointers);
      all.insert(all.end(), mine.begin(), mine.end());
    }
    return all;
  }

  std::vector<SmoothingChoice> all_keeps(const Group& group) const {
    std::vector<SmoothingChoice> keeps;
    for (const double keep : kKeeps) {
      keeps.push_back({std::nullopt, keep, keep});
      if (group.symmetric || keep == 1) continue;
      keeps.push_back({std::nullopt, keep, 1});
      keeps.push_back({std::nullopt, 1, keep});
    }
    return keeps;
  }

  std::vector<SmoothingChoice> near_keeps(const Group& group) const {
    const SmoothingChoice& now = group.choice;
    std::vector<SmoothingChoice> keeps;
    const auto add = [&](double low, double high) {
      keeps.push_back({std::nullopt, std::clamp(now.keep_low * low, 0.02, 1.0),
                       std::clamp(now.keep_high * high, 0.02, 1.0)});
    };
    for (const double factor : {1.0, 0.97, 1.03, 0.93, 1.07, 0.85, 1.15, 0.7, 1.4}) {
      add(factor, factor);
      if (group.symmetric || factor == 1) continue;
      add(factor, 1);
      add(1, factor);
    }
    return keeps;
  }

  // What is worth a look at the loss: the best by either error, and the nearest steps.
  std::vector<Change> proposals(size_t index, bool everywhere) {
    Group& group = groups_[index];
    std::vector<std::optional<double>> alphas;
    std::vector<SmoothingChoice> keeps;
    const std::optional<double> now = group.choice.alpha;
    const auto near_alpha = [&](double step) -> std::optional<double> {
      const double alpha = now.value_or(0.5) + step;
      if (alpha < 0 || alpha > 1.0 + 1e-9) return now;
      return std::round(alpha * 1000) / 1000;
    };
    if (everywhere) {
      alphas.push_back(std::nullopt);
      for (const double alpha : kAlphas) alphas.emplace_back(alpha);
      keeps = all_keeps(group);
    } else {
      for (const double step : {0.0, 0.025, -0.025, 0.05, -0.05, 0.1, -0.1}) {
        const std::optional<double> alpha = step == 0 ? now : near_alpha(step);
        if (std::find(alphas.begin(), alphas.end(), alpha) == alphas.end()) alphas.push_back(alpha);
      }
      keeps = near_keeps(group);
    }
    std::vector<Candidate> ranked = candidates(group, alphas, keeps);
    std::vector<Change> changes;
    const auto take = [&](const SmoothingChoice& choice) {
      if (choice == group.choice || !group.tried.insert(key_of(choice)).second) return false;
      changes.push_back({{index, choice}});
      return true;
    };
    for (double Candidate::*error : {&Candidate::squared, &Candidate::relative}) {
      std::stable_sort(ranked.begin(), ranked.end(),
                       [&](const Candidate& a, const Candidate& b) { return a.*error < b.*error; });
      int taken = 0;
      for (const Candidate& candidate : ranked)
        if (taken < 2 && take(candidate.choice)) ++taken;
    }
    const double step = everywhere ? 0.1 : 0.05;
    for (const double direction : {step, -step}) {
      SmoothingChoice choice = group.choice;
      choice.alpha = near_alpha(direction);
      if (storable(group, factors_of(group, choice.alpha))) take(choice);
    }
    if (group.ranged) {
      for (const double factor : {everywhere ? 0.8 : 0.9, everywhere ? 1.25 : 1.1}) {
        SmoothingChoice choice = group.choice;
        choice.keep_low = std::min(1.0, choice.keep_low * factor);
        choice.keep_high = std::min(1.0, choice.keep_high * factor);
        take(choice);
      }
    }
    return changes;
  }

  // ---- Decisions ----

  // Tries changes of the same groups and keeps the one that lowers the loss of both halves most, if
  // one does. `losses` get that of each change.
  bool decide(const std::vector<Change>& changes, std::vector<double>* losses = nullptr) {
    if (changes.empty()) return false;
    Change before;
    std::vector<Tensor> factors;
    for (const auto& [index, choice] : changes.front()) {
      before.emplace_back(index, groups_[index].choice);
      factors.push_back(groups_[index].factors);
    }
    const double bound = current_.proposing * (1 - options_.least_gain);
    struct Tried {
      size_t change;
      double loss;
      double severity;
    };
    std::vector<Tried> good;
    double least = bound;
    for (size_t i = 0; i < changes.size(); ++i) {
      double severe = 0;
      for (const auto& [index, choice] : changes[i]) {
        choose(index, choice);
        severe += severity(choice);
      }
      const double found = loss(false, losses ? kInfinity : least * (1 + kTie));
      if (losses) losses->push_back(found);
      if (found < bound) good.push_back({i, found, severe});
      least = std::min(least, found);
    }
    std::sort(good.begin(), good.end(), [&](const Tried& a, const Tried& b) {
      const bool a_ties = a.loss <= least * (1 + kTie), b_ties = b.loss <= least * (1 + kTie);
      if (a_ties && b_ties) return a.severity < b.severity;
      return a.loss < b.loss;
    });
    if (good.size() > 2) good.resize(2);
    for (const Tried& tried : good) {
      for (const auto& [index, choice] : changes[tried.change]) choose(index, choice);
      const double held_out = loss(true, current_.held_out);
      if (held_out >= current_.held_out) continue;
      current_ = {tried.loss, held_out};
      return true;
    }
    for (size_t i = 0; i < before.size(); ++i) {
      Group& group = groups_[before[i].first];
      group.choice = before[i].second;
      group.factors = factors[i];
      install(group);
    }
    return false;
  }

  Change change_all(const std::vector<size_t>& members,
                    const std::function<void(const Group&, SmoothingChoice&)>& f) const {
    Change change;
    for (const size_t index : members) {
      SmoothingChoice choice = groups_[index].choice;
      f(groups_[index], choice);
      change.emplace_back(index, choice);
    }
    return change;
  }

  // One alpha, then one clipping, for several groups.
  bool decide_together(const std::vector<size_t>& members, const std::vector<double>& alphas,
                       bool curve) {
    std::vector<Change> changes;
    std::vector<double> used;
    for (const double alpha : alphas) {
      bool fits = true;
      for (const size_t index : members)
        fits = fits && storable(groups_[index], factors_of(groups_[index], alpha));
      if (!fits) continue;
      used.push_back(alpha);
      changes.push_back(change_all(members, [&](const Group& group, SmoothingChoice& choice) {
        const Tensor inverse = inverse_of(group, factors_of(group, alpha));
        // The recipe's calibrator finds another range for every alpha.
        if (curve) choice = calibrated_choice(group, alpha, group.rows, inverse);
        choice.alpha = alpha;
      }));
    }
    std::vector<double> losses;
    bool changed = decide(changes, curve ? &losses : nullptr);
    for (size_t i = 0; i < losses.size(); ++i) curve_.push_back({used[i], losses[i]});
    bool ranged = false;
    for (const size_t index : members) ranged = ranged || groups_[index].ranged;
    if (!ranged) return changed;
    changes.clear();
    for (const double factor : {0.95, 0.9, 0.8, 0.65, 0.5})
      changes.push_back(change_all(members, [&](const Group& group, SmoothingChoice& choice) {
        if (!group.ranged) return;
        choice.keep_low *= factor;
        choice.keep_high *= factor;
      }));
    changed = decide(changes) || changed;
    return changed;
  }

  void steps() {
    std::vector<size_t> all(groups_.size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = i;
    step("one alpha for all groups", [&] { decide_together(all, kAlphas, /*curve=*/true); });
    if (!options_.per_group) return;
    std::vector<std::pair<std::string, std::vector<size_t>>> kinds;
    for (const size_t i : all) {
      const std::string kind = kind_of(groups_[i].name);
      const auto found = std::find_if(kinds.begin(), kinds.end(),
                                      [&](const auto& item) { return item.first == kind; });
      if (found == kinds.end()) {
        kinds.push_back({kind, {i}});
      } else {
        found->second.push_back(i);
      }
    }
    if (kinds.size() > 1)
      for (const auto& [kind, members] : kinds)
        step(concat("one alpha for '", groups_[members.front()].name, "' and its like"), [&] {
          const double now = groups_[members.front()].choice.alpha.value_or(0.5);
          std::vector<double> alphas;
          for (const double move : {0.05, -0.05, 0.1, -0.1, 0.2, -0.2})
            if (const double alpha = std::round((now + move) * 100) / 100; alpha >= 0 && alpha <= 1)
              alphas.push_back(alpha);
          decide_together(members, alphas, /*curve=*/false);
        });
    const double most = options_.passes_per_group * static_cast<double>(groups_.size());
    for (int64_t round = 0; round < options_.rounds; ++round) {
      for (const size_t i : all)
        step(concat("round ", round + 1, ", '", groups_[i].name, "'"), [&] {
          if (i == 0) changed_ = false;
          if (passes_ < most) changed_ = decide(proposals(i, round == 0)) || changed_;
        });
      if (position_ < done_) continue;  // an earlier run went on after this round
      if (!changed_ || passes_ >= most) break;
    }
  }

  // Does a step unless it was done before the search was interrupted.
  void step(const std::string& what, const std::function<void()>& work) {
    if (position_++ < done_) return;
    work();
    done_ = position_;
    if (options_.save) options_.save(state());
    if (options_.progress) {
      const double rounds = options_.per_group ? 2.0 : 0.0;  // about as many change something
      const double planned = 1 + rounds * static_cast<double>(groups_.size());
      options_.progress(
          concat(what, ": loss ", current_.proposing, ", held out ", current_.held_out),
          std::min(0.95, static_cast<double>(done_) / planned));
    }
  }

  // ---- Refinement ----

  // Whether gradients reach the factors through every quantizer.
  bool refinable() const {
    for (const Group& group : groups_) {
      for (const Reader& reader : group.readers) {
        const Scheme &inputs = reader.input->scheme(), &weights = reader.weights.scheme;
        const bool rows = weights.granularity == Granularity::per_channel ||
                          weights.granularity == Granularity::per_tensor;
        const bool columns = inputs.granularity == Granularity::per_token ||
                             inputs.granularity == Granularity::per_tensor;
        if (inputs.is_fp8() || weights.is_fp8() || !weights.symmetric || !rows || !columns)
          return false;
      }
    }
    return true;
  }

  // A group's parameters and what a step computes with them.
  struct Trained {
    Tensor log_factors, log_keep;    // [channels]; of both ends, or [1] symmetric; static only
    Tensor mean_factors, mean_keep;  // of the logarithms, over steps
    Tensor alive;                    // channels that have something to migrate
    Tensor inverse, scale, zero_point;
    std::vector<Tensor> weights;
  };

  static Tensor quantized_with_gradient(const Tensor& weight, const Scheme& scheme) {
    const bool rows = scheme.granularity == Granularity::per_channel;
    const Tensor amax = rows ? weight.abs().amax(1) : weight.abs().amax().reshape({1});
    const Tensor scale = amax.clamp_min(1e-30) / static_cast<double>(scheme.qmax());
    return fake_quantize_learned(weight, scale, std::nullopt, scheme);
  }

  void build(const Group& group, Trained& trained) const {
    const Tensor factors = folded_.to_reader(group.index, trained.log_factors.exp());
    trained.inverse = factors.reciprocal();
    trained.weights.clear();
    for (const Reader& reader : group.readers)
      trained.weights.push_back(quantized_with_gradient(reader.original.to(torch::kFloat) * factors,
                                                        reader.weights.scheme));
    if (!group.ranged) return;
    const Scheme& scheme = group.readers.front().input->scheme();
    // Of dead channels {+inf, -inf}, which must not meet a gradient.
    const Tensor low = torch::where(group.low.isfinite(), group.low, 0.0).clamp_max(0);
    const Tensor high = torch::where(group.high.isfinite(), group.high, 0.0).clamp_min(0);
    const Tensor keep = trained.log_keep.exp();
    const Tensor least = (low * trained.inverse).amin() * keep[0];
    const Tensor most = (high * trained.inverse).amax() * keep[-1];
    const auto qmax = static_cast<double>(scheme.qmax()), qmin = static_cast<double>(scheme.qmin());
    if (group.symmetric) {
      trained.scale = torch::maximum(-least, most).clamp_min(1e-30).reshape({1}) / qmax;
    } else {
      trained.scale = (most - least).clamp_min(1e-30).reshape({1}) / (qmax - qmin);
      trained.zero_point = qmin - least / trained.scale;
    }
  }

  static Tensor trained_forward(const Reader& reader, const Tensor& weight, const Group& group,
                                const Trained& trained, const Tensor& input) {
    const Scheme& scheme = reader.input->scheme();
    const Tensor x = input.to(torch::kFloat) * trained.inverse;
    Tensor quantized;
    if (group.ranged) {
      std::optional<Tensor> zero_point;
      if (!group.symmetric) zero_point = trained.zero_point;
      quantized = fake_quantize_learned(x, trained.scale, zero_point, scheme);
    } else {
      // The scale of each row follows the factors, too.
      Scheme by_row = scheme;
      by_row.granularity = Granularity::per_channel;
      by_row.dynamic = false;
      const bool per_token = scheme.granularity == Granularity::per_token;
      const Tensor rows = per_token ? x.reshape({-1, x.size(-1)}) : x.reshape({1, -1});
      const Tensor scale = rows.abs().amax(1).clamp_min(1e-30) / static_cast<double>(scheme.qmax());
      quantized = fake_quantize_learned(rows, scale, std::nullopt, by_row).view(x.sizes());
    }
    return reader.layer->compute({quantized.to(input.scalar_type())},
                                 weight.to(input.scalar_type()), reader.layer->float_bias());
  }

  // What a refinement may have to go back to.
  struct Kept {
    std::vector<Tensor> factors;
    std::vector<SmoothingChoice> choices;
  };
  Kept keep() const {
    Kept kept;
    for (const Group& group : groups_) {
      kept.factors.push_back(group.factors);
      kept.choices.push_back(group.choice);
    }
    return kept;
  }
  void put_back(const Kept& kept) {
    for (size_t i = 0; i < groups_.size(); ++i) {
      groups_[i].factors = kept.factors[i];
      groups_[i].choice = kept.choices[i];
      install(groups_[i]);
    }
  }

  void set_stand_ins(std::vector<Trained>* trained) {
    for (size_t g = 0; g < groups_.size(); ++g) {
      Group& group = groups_[g];
      for (size_t r = 0; r < group.readers.size(); ++r) {
        Reader& reader = group.readers[r];
        if (!trained) {
          reader.layer->set_stand_in(
              [&reader](at::TensorList inputs) { return reader.forward(inputs[0]); });
          continue;
        }
        reader.layer->set_stand_in(
            [&reader, &group, &mine = (*trained)[g], r](at::TensorList inputs) {
              return trained_forward(reader, mine.weights[r], group, mine, inputs[0]);
            });
      }
    }
  }

  // Takes the trained values over as the groups'.
  void take_over(const std::vector<Trained>& trained) {
    const torch::NoGradGuard no_grad;
    for (size_t g = 0; g < groups_.size(); ++g) {
      Group& group = groups_[g];
      group.factors = trained[g].mean_factors.exp();
      if (group.ranged) {
        const Tensor keep = trained[g].mean_keep.exp().cpu();
        group.choice.keep_low = std::min(1.0, keep[0].item<double>());
        group.choice.keep_high = std::min(1.0, keep[-1].item<double>());
      }
      install(group);
    }
  }

  bool refine() {
    if (!options_.per_group || options_.refine_steps <= 0 || !refinable()) return false;
    std::vector<Trained> trained;
    std::vector<Tensor> parameters;
    for (const Group& group : groups_) {
      Trained mine;
      const Tensor start = group.factors.defined()
                               ? group.factors
                               : torch::ones({folded_.channels(group.index)}, group.low.options());
      mine.log_factors = start.log().detach().clone().requires_grad_(true);
      parameters.push_back(mine.log_factors);
      // Where factors_of() keeps 1 whatever alpha is, there is nothing to migrate.
      mine.alive = torch::logical_or(factors_of(group, 0.3).ne(1), factors_of(group, 0.7).ne(1))
                       .to(torch::kFloat);
      if (group.ranged) {
        std::vector<float> keep = {static_cast<float>(std::log(group.choice.keep_low)),
                                   static_cast<float>(std::log(group.choice.keep_high))};
        if (group.symmetric) keep.pop_back();
        mine.log_keep = torch::tensor(keep, group.low.options()).requires_grad_(true);
        parameters.push_back(mine.log_keep);
      }
      trained.push_back(std::move(mine));
    }
    torch::optim::Adam adam(parameters,
                            torch::optim::AdamOptions(options_.refine_rate).betas({0.9, 0.98}));
    const Kept before = keep();
    Kept best = before;
    SmoothingLoss least = current_;
    bool better = false;
    int64_t stale = 0;
    for (int64_t step = 0; step < options_.refine_steps; ++step) {
      const int64_t batch = step % model_.proposing;
      if (!refine_step(trained, adam, step, batch)) break;
      const bool last = step + 1 == options_.refine_steps;
      if ((step + 1) % kRefineEvery != 0 && !last) continue;
      set_stand_ins(nullptr);
      take_over(trained);
      const double held_out = loss(true, least.held_out);
      const bool storable_now = std::all_of(groups_.begin(), groups_.end(),
                                            [&](const Group& g) { return storable(g, g.factors); });
      if (held_out < least.held_out && storable_now) {
        least = {loss(false), held_out};
        best = keep();
        better = true;
        stale = 0;
      } else {
        ++stale;
      }
      if (options_.progress)
        options_.progress(concat("refining, step ", step + 1, ": loss held out ", held_out),
                          0.95 + 0.05 * static_cast<double>(step + 1) /
                                     static_cast<double>(options_.refine_steps));
      if (stale >= kRefinePatience) break;
    }
    set_stand_ins(nullptr);
    put_back(best);
    if (better) current_ = least;
    return better;
  }

  // One step on a batch; false where the gradient is lost.
  bool refine_step(std::vector<Trained>& trained, torch::optim::Adam& adam, int64_t step,
                   int64_t batch) {
    const double warm = std::min(1.0, static_cast<double>(step + 1) / kRefineWarmUp);
    const double share = static_cast<double>(step) / static_cast<double>(options_.refine_steps);
    const double rate =
        options_.refine_rate * warm * 0.5 * (1 + std::cos(std::numbers::pi * share));
    for (auto& parameters : adam.param_groups())
      static_cast<torch::optim::AdamOptions&>(parameters.options()).lr(rate);
    adam.zero_grad();
    {
      const torch::AutoGradMode with_gradients(true);
      for (size_t g = 0; g < groups_.size(); ++g) build(groups_[g], trained[g]);
      set_stand_ins(&trained);
      const Tensor output = model_.run(batch);
      Tensor gradient;
      const double distance = objective_.distance(output, batch, &gradient);
      passes_ += 3.0 / static_cast<double>(model_.proposing + model_.deciding);
      if (!std::isfinite(distance)) return false;
      output.backward(gradient / std::max(objective_.weight(batch), 1e-30));
    }
    for (Trained& mine : trained) {
      mine.inverse = mine.scale = mine.zero_point = Tensor();
      mine.weights.clear();
      if (mine.log_factors.grad().defined()) mine.log_factors.mutable_grad() *= mine.alive;
    }
    adam.step();
    const torch::NoGradGuard no_grad;
    // Bits that go to and fro between two codes would decide about a single step.
    const double decay = options_.refine_average;
    const double newest = (1 - decay) / (1 - std::pow(decay, static_cast<double>(step + 1)));
    const auto average = [&](Tensor& mean, const Tensor& now) {
      mean = mean.defined() ? mean + newest * (now.detach() - mean) : now.detach().clone();
    };
    for (Trained& mine : trained) {
      average(mine.mean_factors, mine.log_factors);
      if (!mine.log_keep.defined()) continue;
      mine.log_keep.clamp_(std::log(0.02), 0.0);
      average(mine.mean_keep, mine.log_keep);
    }
    return true;
  }

  // ---- State and result ----

  json state() const {
    json choices = json::array(), tried = json::array(), curve = json::array();
    for (const Group& group : groups_) {
      choices.push_back(to_json(group.choice));
      tried.push_back(group.tried);
    }
    for (const auto& point : curve_) curve.push_back({point.alpha, point.loss});
    return {{"done", done_},
            {"changed", changed_},
            {"passes", passes_},
            {"before", {before_.proposing, before_.held_out}},
            {"current", {current_.proposing, current_.held_out}},
            {"choices", choices},
            {"tried", tried},
            {"curve", curve}};
  }

  void load(const json& state) {
    try {
      const json& choices = state.at("choices");
      VERNIER_CHECK(choices.size() == groups_.size() && state.at("tried").size() == groups_.size(),
                    "the state is of a search over ", choices.size(), " groups, not ",
                    groups_.size(), ": remove it to start anew");
      for (size_t i = 0; i < groups_.size(); ++i) {
        choose(i, choice_from(choices.at(i)));
        groups_[i].tried = state.at("tried").at(i).get<std::set<std::vector<double>>>();
      }
      done_ = state.at("done").get<int64_t>();
      changed_ = state.at("changed").get<bool>();
      passes_ = state.at("passes").get<double>();
      before_ = {state.at("before").at(0).get<double>(), state.at("before").at(1).get<double>()};
      current_ = {state.at("current").at(0).get<double>(), state.at("current").at(1).get<double>()};
      for (const json& point : state.at("curve"))
        curve_.push_back({point.at(0).get<double>(), point.at(1).get<double>()});
    } catch (const json::exception& error) {
      throw Error(concat("the state of the search is damaged (", error.what(),
                         "): remove it to start anew"));
    }
  }

  SmoothingResult finish(const SmoothingLoss& started, bool refined) {
    const torch::NoGradGuard no_grad;
    SmoothingResult result;
    result.metric = model_.logits ? "kl" : "output";
    result.before = started;
    result.after = current_;
    result.curve = curve_;
    result.passes = passes_;
    result.refined = refined;
    for (Group& group : groups_) {
      const std::vector<Tensor> references = reference_outputs(group);
      Candidate plain{starting_choice(group)}, chosen{group.choice};
      measure(group, references, Tensor(), {&plain});
      measure(group, references, group.factors, {&chosen});
      const SmoothingGroup& declared = folded_.group(group.index);
      result.groups.push_back({declared.name, declared.readers, declared.producer.has_value(),
                               group.choice, plain.squared, chosen.squared});
    }
    for (Group& group : groups_) {
      for (Reader& reader : group.readers) reader.layer->set_stand_in(nullptr);
      folded_.set(group.index, group.factors);
      for (Reader& reader : group.readers) {
        if (!group.ranged) continue;
        QuantizerSettings settings = reader.layer->input_quantizer->settings();
        settings.calibrator = Calibrator{};
        settings.calibrator.keep_low = group.choice.keep_low;
        settings.calibrator.keep_high = group.choice.keep_high;
        reader.layer->input_quantizer->set_settings(settings);
      }
    }
    return result;
  }

  const SearchedModel& model_;
  const SearchOptions& options_;
  LayersGuard guard_;
  FoldedFactors folded_;
  Objective objective_;
  std::vector<Group> groups_;
  std::map<size_t, std::vector<Tensor>> seen_rows_, seen_weights_;
  SmoothingLoss before_, current_;
  std::vector<SmoothingResult::Point> curve_;
  double passes_ = 0;
  int64_t position_ = 0, done_ = 0;  // steps: met, and done in this or an earlier run
  bool changed_ = false;             // in the present round
};

}  // namespace

std::vector<SmoothingGroup> quantized_groups(const torch::nn::Module& model,
                                             std::vector<SmoothingGroup> groups) {
  std::set<std::string> quantized;
  for (const NamedLayer& item : quantized_layers(model))
    if (item.layer->quantized()) quantized.insert(item.name);
  std::vector<SmoothingGroup> kept;
  for (SmoothingGroup& group : groups) {
    const auto is_quantized = [&](const std::string& name) { return quantized.count(name) > 0; };
    if (!group.producer)
      std::erase_if(group.readers, [&](const auto& n) { return !is_quantized(n); });
    if (std::any_of(group.readers.begin(), group.readers.end(), is_quantized))
      kept.push_back(std::move(group));
  }
  return kept;
}

SmoothingResult search_smoothing(const SearchedModel& model, std::vector<SmoothingGroup> groups,
                                 const SearchOptions& options) {
  return Search(model, quantized_groups(model.module, std::move(groups)), options).run();
}

void to_json(json& value, const SmoothingResult& result) {
  value = {
      {"method", result.method},
      {"metric", result.metric},
      {"before", {{"proposing", result.before.proposing}, {"held_out", result.before.held_out}}},
      {"after", {{"proposing", result.after.proposing}, {"held_out", result.after.held_out}}},
      {"refined", result.refined},
      {"passes", result.passes}};
  value["groups"] = json::array();
  for (const SmoothedGroup& group : result.groups) {
    json item = to_json(group.choice);
    item["name"] = group.name;
    item["readers"] = group.readers;
    item["folded"] = group.folded;
    item["error_before"] = group.error_before;
    item["error_after"] = group.error_after;
    value["groups"].push_back(item);
  }
  value["curve"] = json::array();
  for (const auto& point : result.curve)
    value["curve"].push_back({{"alpha", point.alpha}, {"loss", point.loss}});
}

void from_json(const json& value, SmoothingResult& result) {
  value.at("method").get_to(result.method);
  value.at("metric").get_to(result.metric);
  const auto loss = [&](const char* name) {
    return SmoothingLoss{value.at(name).at("proposing").get<double>(),
                         value.at(name).at("held_out").get<double>()};
  };
  result.before = loss("before");
  result.after = loss("after");
  value.at("refined").get_to(result.refined);
  value.at("passes").get_to(result.passes);
  result.groups.clear();
  for (const json& item : value.at("groups"))
    result.groups.push_back(
        {item.at("name").get<std::string>(), item.at("readers").get<std::vector<std::string>>(),
         item.at("folded").get<bool>(), choice_from(item), item.at("error_before").get<double>(),
         item.at("error_after").get<double>()});
  result.curve.clear();
  for (const json& point : value.at("curve"))
    result.curve.push_back({point.at("alpha").get<double>(), point.at("loss").get<double>()});
}

}  // namespace vernier
