#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <torch/serialize/archive.h>
#include <vernier/kernels/error.h>
#include <vernier/recipes/captured_step.h>
#include <vernier/recipes/fine_tuning.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <numbers>
#include <random>

namespace vernier {
namespace {

using torch::Tensor;
using torch::serialize::InputArchive;
using torch::serialize::OutputArchive;

// Logits are made and compared this many at a time: 256 MiB in float32.
constexpr int64_t kLogits = int64_t{1} << 26;
// As much as the reference's hidden states may take, and how many tokens they are computed for at a
// time.
constexpr int64_t kKnownBytesCpu = int64_t{2} << 30, kKnownBytesGpu = int64_t{8} << 30;
constexpr int64_t kReferenceTokens = 8192;
constexpr int64_t kReadSamples = 256;

// ---- What holds while a training runs -----------------------------------------------------------

// The products of float32 operands in TF32, and operations whose results do not depend on the order
// in which threads come.
class Numerics {
 public:
  explicit Numerics(bool tf32)
      : tf32_(at::globalContext().allowTF32CuBLAS()),
        deterministic_(at::globalContext().deterministicAlgorithms()),
        warn_only_(at::globalContext().deterministicAlgorithmsWarnOnly()),
        fill_(at::globalContext().deterministicFillUninitializedMemory()) {
    at::globalContext().setAllowTF32CuBLAS(tf32);
    at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
    at::globalContext().setDeterministicFillUninitializedMemory(false);
  }
  ~Numerics() {
    at::globalContext().setAllowTF32CuBLAS(tf32_);
    at::globalContext().setDeterministicAlgorithms(deterministic_, warn_only_);
    at::globalContext().setDeterministicFillUninitializedMemory(fill_);
  }
  Numerics(const Numerics&) = delete;
  Numerics& operator=(const Numerics&) = delete;

 private:
  bool tf32_, deterministic_, warn_only_, fill_;
};

// Products in bfloat16. Without autocast's cache, whose casts would outlive a recorded step.
class Autocast {
 public:
  Autocast(torch::Device device, bool enabled) : type_(device.type()), enabled_(enabled) {
    if (!enabled_) return;
    cache_ = at::autocast::is_autocast_cache_enabled();
    before_ = at::autocast::is_autocast_enabled(type_);
    dtype_ = at::autocast::get_autocast_dtype(type_);
    at::autocast::set_autocast_cache_enabled(false);
    at::autocast::set_autocast_dtype(type_, torch::kBFloat16);
    at::autocast::set_autocast_enabled(type_, true);
  }
  ~Autocast() {
    if (!enabled_) return;
    at::autocast::set_autocast_enabled(type_, before_);
    at::autocast::set_autocast_dtype(type_, dtype_);
    at::autocast::set_autocast_cache_enabled(cache_);
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;

 private:
  at::DeviceType type_;
  bool enabled_, cache_ = false, before_ = false;
  at::ScalarType dtype_ = torch::kFloat;
};

TrainingPrecision precision_on(torch::Device device, TrainingPrecision wanted) {
  if (wanted != TrainingPrecision::automatic) return wanted;
  return device.is_cpu() ? TrainingPrecision::float32 : TrainingPrecision::bf16;
}

// ---- Data ---------------------------------------------------------------------------------------

// `count` places of data of `size`, every one once before one comes again. The same on every
// machine, as distributions of the standard library are not.
std::vector<int64_t> shuffled_order(int64_t size, int64_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto below = [&](uint64_t n) {
    const uint64_t limit = std::numeric_limits<uint64_t>::max() / n * n;
    uint64_t value = random();
    while (value >= limit) value = random();
    return value % n;
  };
  std::vector<int64_t> order, epoch(size);
  for (int64_t i = 0; i < size; ++i) epoch[i] = i;
  while (static_cast<int64_t>(order.size()) < count) {
    const int64_t wanted = std::min(size, count - static_cast<int64_t>(order.size()));
    for (int64_t i = 0; i < wanted; ++i)
      std::swap(epoch[i], epoch[i + static_cast<int64_t>(below(size - i))]);
    order.insert(order.end(), epoch.begin(), epoch.begin() + wanted);
  }
  return order;
}

}  // namespace

FineTuner::FineTuner(TextModel& model, TextModel& reference, const TokenDataset& data,
                     const FineTuningSettings& settings)
    : model_(model),
      reference_(reference),
      causal_(dynamic_cast<CausalLanguageModel*>(&model)),
      causal_reference_(dynamic_cast<CausalLanguageModel*>(&reference)),
      settings_(settings),
      device_(model.parameters().front().device()) {
  settings_.check();
  const torch::Device other = reference.parameters().front().device();
  VERNIER_CHECK(&model != &reference && other == device_, "the model is on ", device_,
                " and its reference on ", other, ": give two models on one device");
  VERNIER_CHECK(model.vocabulary() == reference.vocabulary() && !causal_ == !causal_reference_,
                "the reference has a vocabulary of ", reference.vocabulary(),
                " tokens and the model one of ", model.vocabulary(),
                ", or only one of them is causal: give the float model it was made from");
  if (!causal_) {
    settings_.logits_weight = 0;
    if (settings_.hidden_weight == 0) settings_.hidden_weight = 1;
  }
  VERNIER_CHECK(settings_.logits_weight + settings_.hidden_weight > 0,
                "logits_weight and hidden_weight are both 0: there is nothing to learn");
  set_mode(reference_, Mode::full);
  reference_.eval();
  read_data(data);

  SessionSettings session;
  session.calibration_batches = 0;
  session.check_every = std::numeric_limits<int64_t>::max();  // run() looks itself
  session_ = std::make_unique<TrainingSession>(model_, session);
  for (const auto& [name, layer] : quantized_layers(model_)) {
    auto* linear = dynamic_cast<nn::LinearImpl*>(layer.get());
    if (linear && layer->quantized() && !layer->is_fp8())
      linear->trained_product = settings_.product;
  }
  optimizer_ = std::make_unique<FusedAdamW>(model_, settings_.adamw);
  make_schedule();
}

FineTuner::~FineTuner() = default;

void FineTuner::read_data(const TokenDataset& data) {
  data_fingerprint_ = data.fingerprint();
  order_ = shuffled_order(data.size(), settings_.steps * sequences_a_step(), settings_.seed);
  std::vector<int64_t> used = order_;  // in the data's order
  std::sort(used.begin(), used.end());
  used.erase(std::unique(used.begin(), used.end()), used.end());
  for (int64_t& sample : order_)
    sample = std::lower_bound(used.begin(), used.end(), sample) - used.begin();
  std::vector<int64_t> all;
  for (size_t i = 0; i < used.size();) {
    const int64_t block = used[i];
    const auto samples = data.read(block, std::min(kReadSamples, data.size() - block),
                                   model_.vocabulary(), model_.max_length());
    for (; i < used.size() && used[i] < block + static_cast<int64_t>(samples.size()); ++i) {
      const auto& sample = samples[used[i] - block];
      first_.push_back(static_cast<int64_t>(all.size()));
      lengths_.push_back(static_cast<int64_t>(sample.size()));
      all.insert(all.end(), sample.begin(), sample.end());
    }
  }
  tokens_ = torch::tensor(all, torch::kLong).to(device_);
  equal_ = std::all_of(lengths_.begin(), lengths_.end(),
                       [&](int64_t length) { return length == lengths_.front(); });
  rows_a_step_ = static_cast<double>(lengths_.front() * sequences_a_step());
}

void FineTuner::make_schedule() {
  const auto steps = static_cast<double>(settings_.steps);
  std::vector<float> rates, range_rates;
  for (int64_t i = 0; i < settings_.steps; ++i) {
    const double cosine = 0.5 * (1 + std::cos(std::numbers::pi * static_cast<double>(i) / steps));
    const double rise =
        std::min(1.0, static_cast<double>(i + 1) /
                          static_cast<double>(std::max<int64_t>(settings_.warmup, 1)));
    const double share = rise * (settings_.final_rate + (1 - settings_.final_rate) * cosine);
    rates.push_back(static_cast<float>(settings_.rate * share));
    range_rates.push_back(static_cast<float>(settings_.range_rate * share));
  }
  rates_ = torch::tensor(rates).to(device_);
  range_rates_ = torch::tensor(range_rates).to(device_);
  device_order_ = torch::tensor(order_, torch::kLong).to(device_);
  within_ = torch::arange(settings_.batch_size, torch::kLong).to(device_);
  device_step_ = torch::zeros({1}, torch::dtype(torch::kLong).device(device_));
  loss_sum_ = torch::zeros({}, torch::dtype(torch::kDouble).device(device_));
}

// ---- The reference ------------------------------------------------------------------------------

Tensor FineTuner::reference_hidden(const TokenBatch& batch) {
  const torch::NoGradGuard no_grad;
  return reference_.forward(batch).to(torch::kFloat);
}

// The places of sequences' tokens among all.
Tensor FineTuner::rows_of(const std::vector<int64_t>& sequences) const {
  std::vector<int64_t> rows;
  for (const int64_t s : sequences)
    for (int64_t i = 0; i < lengths_[s]; ++i) rows.push_back(first_[s] + i);
  return torch::tensor(rows, torch::kLong).to(device_);
}

// Hidden states of all sequences, where each comes at least twice and they fit; the mean square of
// some of them where it is needed.
void FineTuner::remember_reference() {
  const Numerics exact(/*tf32=*/false);
  const auto count = static_cast<int64_t>(lengths_.size());
  const auto forward = [&](int64_t begin, int64_t end) {
    TokenBatch batch;
    batch.lengths.assign(lengths_.begin() + begin, lengths_.begin() + end);
    const int64_t from = first_[begin], to = end < count ? first_[end] : tokens_.size(0);
    batch.tokens = tokens_.narrow(0, from, to - from);
    return reference_hidden(batch);
  };
  const auto end_of = [&](int64_t begin) {
    int64_t end = begin + 1;
    while (end < count && first_[end] + lengths_[end] - first_[begin] <= kReferenceTokens &&
           lengths_[end] == lengths_[begin])
      ++end;
    return end;
  };
  const Tensor some = forward(0, end_of(0));
  mean_square_ = some.square().mean().item<double>();
  VERNIER_CHECK(std::isfinite(mean_square_) && mean_square_ > 0,
                "the reference's hidden states are zero or not finite: check the model");
  const int64_t bytes = tokens_.size(0) * some.size(1) * static_cast<int64_t>(sizeof(float));
  if (bytes > (device_.is_cpu() ? kKnownBytesCpu : kKnownBytesGpu) ||
      static_cast<int64_t>(order_.size()) < 2 * count)
    return;
  known_ = torch::empty({tokens_.size(0), some.size(1)}, some.options());
  for (int64_t begin = 0; begin < count;) {
    const int64_t end = end_of(begin);
    const Tensor hidden = forward(begin, end);
    known_.narrow(0, first_[begin], hidden.size(0)).copy_(hidden);
    begin = end;
  }
}

// ---- A step -------------------------------------------------------------------------------------

FineTuner::Batch FineTuner::batch(int64_t part) {
  Batch result;
  const int64_t size = settings_.batch_size;
  const auto begin = order_.begin() + step_ * sequences_a_step() + part * size;
  if (equal_) {
    // By the step that is counted on the device, where a recording finds it.
    const Tensor place = within_ + (device_step_ * sequences_a_step() + part * size);
    const Tensor chosen = device_order_.index_select(0, place);
    const int64_t length = lengths_.front();
    const auto take = [&](const Tensor& all, int64_t width) {
      return all.view({-1, length * width}).index_select(0, chosen);
    };
    result.tokens.lengths.assign(size, length);
    result.tokens.tokens = take(tokens_, 1).view(-1);
    if (known_.defined())
      result.reference = take(known_, known_.size(1)).view({-1, known_.size(1)});
  } else {
    const std::vector<int64_t> chosen(begin, begin + size);
    for (const int64_t s : chosen) result.tokens.lengths.push_back(lengths_[s]);
    const Tensor rows = rows_of(chosen);
    result.tokens.tokens = tokens_.index_select(0, rows);
    if (known_.defined()) result.reference = known_.index_select(0, rows);
  }
  if (!result.reference.defined()) result.reference = reference_hidden(result.tokens);
  return result;
}

// Adds the loss of some hidden states, of `rows` in the step, and its gradient to `gradient`; the
// gradients of what makes logits of them go where the parameters' are.
void FineTuner::add_logits_gradient(const Tensor& hidden, const Tensor& reference, double rows,
                                    Tensor& gradient) {
  const int64_t total = hidden.size(0);
  const int64_t at_once = std::clamp<int64_t>(kLogits / model_.vocabulary(), 1, total);
  const double weight = settings_.logits_weight / rows;
  for (int64_t begin = 0; begin < total; begin += at_once) {
    const int64_t count = std::min(at_once, total - begin);
    const Tensor part = hidden.detach().narrow(0, begin, count).to(torch::kFloat);
    part.requires_grad_();
    Tensor logits = causal_->logits(part);
    Tensor logits_gradient;
    {
      const torch::NoGradGuard no_grad;
      const Tensor wanted =
          torch::log_softmax(causal_reference_->logits(reference.narrow(0, begin, count)), -1);
      const Tensor found = torch::log_softmax(logits, -1);
      const Tensor probability = wanted.exp();
      loss_sum_.add_((wanted - found).mul_(probability).sum(), weight);
      logits_gradient = found.exp().sub_(probability).mul_(weight);
    }
    torch::autograd::backward({logits}, {logits_gradient});
    const torch::NoGradGuard no_grad;
    gradient.narrow(0, begin, count).add_(part.grad());
  }
}

void FineTuner::learn_from(const Batch& batch, double rows) {
  Tensor hidden;
  {
    const Autocast autocast(device_,
                            precision_on(device_, settings_.precision) == TrainingPrecision::bf16);
    hidden = model_.forward(batch.tokens);
  }
  Tensor gradient;
  {
    const torch::NoGradGuard no_grad;
    gradient = torch::zeros(hidden.sizes(), hidden.options().dtype(torch::kFloat));
    if (settings_.hidden_weight > 0) {
      const double weight =
          settings_.hidden_weight / (rows * static_cast<double>(hidden.size(1)) * mean_square_);
      const Tensor difference = hidden.detach().to(torch::kFloat) - batch.reference;
      loss_sum_.add_(difference.square().sum(), weight);
      gradient.add_(difference, 2 * weight);
    }
  }
  if (settings_.logits_weight > 0) add_logits_gradient(hidden, batch.reference, rows, gradient);
  torch::autograd::backward({hidden}, {gradient.to(hidden.scalar_type())});
}

void FineTuner::train_step() {
  optimizer_->clear_gradients();
  double rows = rows_a_step_;
  if (!equal_) {
    rows = 0;
    for (int64_t i = 0; i < sequences_a_step(); ++i)
      rows += static_cast<double>(lengths_[order_[step_ * sequences_a_step() + i]]);
  }
  for (int64_t part = 0; part < settings_.accumulate; ++part) learn_from(batch(part), rows);
  const torch::NoGradGuard no_grad;
  optimizer_->step(rates_.index_select(0, device_step_).squeeze(0),
                   range_rates_.index_select(0, device_step_).squeeze(0));
  device_step_.add_(1);
}

// ---- The run ------------------------------------------------------------------------------------

// Lengths must be equal, and ranges stay in their memory: those that are averaged, and those that
// an input brings, get new memory in every step.
bool FineTuner::can_be_captured() const {
  if (!equal_) return false;
  for (const auto& [name, layer] : quantized_layers(model_)) {
    if (!layer->quantized()) continue;
    for (const auto& [what, quantizer] : layer->quantizers()) {
      const RangePolicy policy = quantizer->settings().policy;
      if (policy == RangePolicy::moving_average ||
          (policy == RangePolicy::following && quantizer->operand() == Operand::activation))
        return false;
    }
  }
  return true;
}

// Steps that were recorded leave the scales that follow weights in memory that later steps use for
// other things.
void FineTuner::refresh_following() const {
  const torch::NoGradGuard no_grad;
  for (const auto& [name, layer] : quantized_layers(model_)) {
    if (!layer->quantized() || !layer->weight_quantizer) continue;
    if (layer->weight_quantizer->settings().policy == RangePolicy::following)
      layer->weight_quantizer->codes(layer->float_weight().detach());
  }
}

FineTuningProgress FineTuner::look(double seconds, int64_t steps) {
  FineTuningProgress progress;
  progress.step = step_;
  progress.steps = settings_.steps;
  progress.loss = loss_sum_.item<double>() / static_cast<double>(steps);
  loss_sum_.zero_();
  VERNIER_CHECK(
      std::isfinite(progress.loss), "the loss became ", std::abs(progress.loss), " in steps ",
      step_ - steps + 1, " to ", step_,
      ": lower the learning rates, or clip gradients, and go back to the last checkpoint");
  for (const auto& [name, layer] : quantized_layers(model_)) {
    if (!layer->quantized()) continue;
    for (const auto& [what, quantizer] : layer->quantizers()) {
      try {
        quantizer->check_learned();
      } catch (const Error& error) {
        throw Error(concat("layer '", name, "' (", what, ") at step ", step_, ": ", error.what()));
      }
    }
  }
  double tokens = rows_a_step_ * static_cast<double>(steps);
  if (!equal_) {
    tokens = 0;
    for (int64_t i = (step_ - steps) * sequences_a_step(); i < step_ * sequences_a_step(); ++i)
      tokens += static_cast<double>(lengths_[order_[i]]);
  }
  progress.tokens_per_second = tokens / std::max(seconds, 1e-9);
  return progress;
}

void FineTuner::run(const std::function<bool(const FineTuningProgress&)>& report) {
  using Clock = std::chrono::steady_clock;
  if (!known_.defined()) remember_reference();
  const TrainingPrecision precision = precision_on(device_, settings_.precision);
  const Numerics numerics(precision == TrainingPrecision::bf16 ||
                          precision == TrainingPrecision::tf32);
  device_step_.fill_(step_);
  loss_sum_.zero_();
  session_->train();
  {
    CapturedStep work(device_, settings_.capture && can_be_captured());
    auto start = Clock::now();
    int64_t since = 0;
    bool wanted = true;
    while (wanted && step_ < settings_.steps) {
      work.run([this] { train_step(); });
      ++step_;
      ++since;
      if (step_ % settings_.report_every != 0 && step_ != settings_.steps) continue;
      work.synchronize();
      FineTuningProgress progress =
          look(std::chrono::duration<double>(Clock::now() - start).count(), since);
      progress.captured = work.captured();
      refusal_ = work.refusal();
      if (progress.captured) refresh_following();
      if (report) wanted = report(progress);
      work.synchronize();
      start = Clock::now();
      since = 0;
    }
  }
  model_.eval();
}

// ---- Saving and resuming ------------------------------------------------------------------------

std::map<std::string, std::string> FineTuner::identity() const {
  std::map<std::string, std::string> all = settings_.described();
  all["data"] = data_fingerprint_;
  all["model"] = reference_.info.fingerprint;
  return all;
}

void FineTuner::save(const std::filesystem::path& path) const {
  session_->save(path, nullptr, [this](OutputArchive& archive) {
    for (const auto& [key, value] : identity()) archive.write("is_" + key, c10::IValue(value));
    archive.write("steps_done", c10::IValue(step_));
    OutputArchive optimizer(archive.compilation_unit());
    optimizer_->save(optimizer);
    archive.write("adamw", optimizer);
  });
}

void FineTuner::load(const std::filesystem::path& path) {
  int64_t done = 0;
  InputArchive optimizer;
  session_->load(path, nullptr, [&](InputArchive& archive) {
    c10::IValue value;
    VERNIER_CHECK(archive.try_read("steps_done", value) && value.isInt() &&
                      archive.try_read("adamw", optimizer),
                  "it is a session, but none of fine-tuning");
    done = value.toInt();
    VERNIER_CHECK(done >= 0 && done <= settings_.steps, "its position ", done, " is not within ",
                  settings_.steps, " steps");
    for (const auto& [key, mine] : identity()) {
      VERNIER_CHECK(archive.try_read("is_" + key, value) && value.isString(),
                    "it does not say its ", key);
      VERNIER_CHECK(value.toStringRef() == mine, "the training was begun with another ", key, ": ",
                    value.toStringRef(), " where this one has ", mine);
    }
  });
  optimizer_->load(optimizer);
  step_ = done;
}

}  // namespace vernier
