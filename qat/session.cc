#include <ATen/Context.h>
#include <torch/nn/functional/activation.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/serialize/archive.h>
#include <vernier/calibration/atomic_file.h>
#include <vernier/kernels/error.h>
#include <vernier/qat/prepare.h>
#include <vernier/qat/session.h>

#include <algorithm>
#include <cmath>
#include <set>

namespace vernier {
namespace {

using torch::Tensor;
using torch::nn::Module;
using torch::serialize::InputArchive;
using torch::serialize::OutputArchive;

constexpr const char* kFormat = "vernier-training-session";
constexpr int64_t kVersion = 1;
constexpr int64_t kGpuCheckEvery = 50;

torch::Device device_of(const Module& model) {
  for (const Tensor& parameter : model.parameters())
    if (!parameter.is_cpu()) return parameter.device();
  return torch::kCPU;
}

// Parameters of quantizers, by their names in the model.
std::set<std::string> names_of_ranges(const Module& model) {
  std::set<std::string> names;
  for (const auto& item : model.named_modules(std::string(), /*include_self=*/false))
    if (std::dynamic_pointer_cast<QuantizerImpl>(item.value()))
      for (const auto& tensor : item.value()->named_parameters(false))
        names.insert(item.key() + "." + tensor.key());
  return names;
}

std::vector<std::string> architecture_of(const Module& model) {
  const std::set<std::string> ranges = names_of_ranges(model);
  std::vector<std::string> lines;
  for (const auto& item : model.named_parameters())
    if (!ranges.count(item.key()))
      lines.push_back(concat("tensor '", item.key(), "' ", item.value().sizes(), " ",
                             c10::toString(item.value().scalar_type())));
  for (const auto& [name, layer] : quantized_layers(model))
    lines.push_back(concat(
        "layer '", name, "' ", type_name(dynamic_cast<const Module&>(*layer)),
        layer->input_from().empty() ? "" : concat(" chained to '", layer->input_from(), "'")));
  return lines;
}

std::vector<std::string> recipe_of(const Module& model) {
  std::vector<std::string> lines;
  for (const auto& [name, layer] : quantized_layers(model)) {
    if (!layer->quantized()) {
      lines.push_back(concat("layer '", name, "' in full precision"));
      continue;
    }
    for (const auto& [what, quantizer] : layer->quantizers()) {
      const QuantizerSettings& settings = quantizer->settings();
      lines.push_back(concat("layer '", name, "' ", what, " ", to_string(settings.scheme),
                             ", calibrator ", to_string(settings.calibrator.method), " ",
                             settings.calibrator.percentile, ", ranges ",
                             to_string(settings.policy), " ", settings.averaging));
    }
  }
  return lines;
}

// Freezing changes a policy on the way, so sessions compare what they began with.
void check_same(const std::vector<std::string>& saved, const std::vector<std::string>& mine,
                const char* what) {
  const auto [theirs, ours] = std::mismatch(saved.begin(), saved.end(), mine.begin(), mine.end());
  if (theirs == saved.end() && ours == mine.end()) return;
  throw Error(concat("the session was saved with another ", what, ": it has ",
                     theirs == saved.end() ? "nothing more" : *theirs, " where this model has ",
                     ours == mine.end() ? "nothing more" : *ours,
                     ": make and prepare the model as before"));
}

std::string joined(const std::vector<std::string>& lines) {
  std::string text;
  for (const std::string& line : lines) text += line + "\n";
  return text;
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> lines;
  for (size_t begin = 0, end; (end = text.find('\n', begin)) != std::string::npos; begin = end + 1)
    lines.push_back(text.substr(begin, end - begin));
  return lines;
}

std::string read_string(InputArchive& archive, const std::string& key) {
  c10::IValue value;
  archive.read(key, value);
  return value.toStringRef();
}

int64_t read_int(InputArchive& archive, const std::string& key) {
  c10::IValue value;
  archive.read(key, value);
  return value.toInt();
}

// ---- Observers ----------------------------------------------------------------------------------

Tensor tensor_of(const std::vector<int64_t>& values) { return torch::tensor(values, torch::kLong); }

void write_statistics(OutputArchive& archive, const SiteStatistics& statistics) {
  const Histogram& histogram = statistics.histogram;
  const auto counts = histogram.counts();
  archive.write("counts", tensor_of({counts.begin(), counts.end()}));
  archive.write("tallies", tensor_of({histogram.exponent(), histogram.zeros(), histogram.nans(),
                                      histogram.infinities()}));
  std::vector<float> bounds{histogram.range().min, histogram.range().max};
  for (const Range& channel : statistics.channels) {
    bounds.push_back(channel.min);
    bounds.push_back(channel.max);
  }
  archive.write("bounds", torch::tensor(bounds));
}

SiteStatistics read_statistics(InputArchive& archive) {
  Tensor counts, tallies, bounds;
  archive.read("counts", counts);
  archive.read("tallies", tallies);
  archive.read("bounds", bounds);
  counts = counts.cpu();
  tallies = tallies.cpu();
  bounds = bounds.cpu();
  VERNIER_CHECK(counts.scalar_type() == torch::kLong && tallies.scalar_type() == torch::kLong &&
                    tallies.numel() == 4 && bounds.scalar_type() == torch::kFloat &&
                    bounds.numel() >= 2 && bounds.numel() % 2 == 0,
                "an observer's statistics are damaged");
  const int64_t* count = counts.const_data_ptr<int64_t>();
  const int64_t* tally = tallies.const_data_ptr<int64_t>();
  const float* bound = bounds.const_data_ptr<float>();
  SiteStatistics statistics;
  statistics.histogram = Histogram({count, count + counts.numel()}, static_cast<int32_t>(tally[0]),
                                   {bound[0], bound[1]}, tally[1], tally[2], tally[3]);
  for (int64_t i = 2; i < bounds.numel(); i += 2)
    statistics.channels.push_back({bound[i], bound[i + 1]});
  return statistics;
}

// Calls f with a module as the batch norm it is; false where it is none.
template <typename F>
bool with_batch_norm(Module& module, const F& f) {
  if (auto* norm = dynamic_cast<torch::nn::BatchNorm1dImpl*>(&module)) return f(*norm), true;
  if (auto* norm = dynamic_cast<torch::nn::BatchNorm2dImpl*>(&module)) return f(*norm), true;
  if (auto* norm = dynamic_cast<torch::nn::BatchNorm3dImpl*>(&module)) return f(*norm), true;
  return false;
}

// ---- Random generators --------------------------------------------------------------------------

std::vector<std::pair<std::string, torch::Device>> generators_of(const Module& model) {
  std::vector<std::pair<std::string, torch::Device>> all{{"cpu_generator", torch::kCPU}};
  const torch::Device device = device_of(model);
  if (!device.is_cpu()) all.emplace_back("device_generator", device);
  return all;
}

}  // namespace

TrainingSession::TrainingSession(Module& model, const SessionSettings& settings)
    : model_(model), settings_(settings), layers_(quantized_layers(model)) {
  std::erase_if(layers_, [](const NamedLayer& item) { return !item.layer->quantized(); });
  VERNIER_CHECK(!layers_.empty(),
                "the model has no quantized layer: prepare it before the session is made");
  VERNIER_CHECK(settings.calibration_batches >= 0 && settings.check_every >= 0,
                "calibration_batches and check_every cannot be negative: they are ",
                settings.calibration_batches, " and ", settings.check_every);
  if (settings.keep_twin) {
    try {
      twin_ = model.clone();
    } catch (const c10::Error&) {
      throw Error(concat("the model's class ", model.name(),
                         " cannot be cloned: derive it from torch::nn::Cloneable and register its "
                         "layers in reset(), or keep no twin"));
    }
    set_mode(*twin_, Mode::full);
    twin_->eval();
    for (Tensor& parameter : twin_->parameters()) parameter.set_requires_grad(false);
  }
  for (const auto& item : layers_)
    for (const auto& named : item.layer->quantizers())
      initial_settings_.emplace_back(named.quantizer, named.quantizer->settings());
  for (const auto& module : model.modules(/*include_self=*/false)) {
    std::optional<double> momentum;
    if (with_batch_norm(*module, [&](auto& norm) { momentum = norm.options.momentum(); }))
      batch_norms_.push_back({module, momentum});
  }
  architecture_ = architecture_of(model);
  recipe_ = recipe_of(model);
  begin();
}

TrainingSession::~TrainingSession() { unwatch(); }

void TrainingSession::begin() {
  check_every_ = settings_.check_every > 0    ? settings_.check_every
                 : device_of(model_).is_cpu() ? 1
                                              : kGpuCheckEvery;
  set_mode(model_, calibrating() ? Mode::observe : Mode::fake_quant);
  if (frozen(settings_.freeze_observers_at)) freeze_observers();
  if (frozen(settings_.freeze_batch_norm_at)) set_batch_norm_frozen(true);
  watch();
}

void TrainingSession::step(const Tensor& loss) {
  ++steps_;
  if (checks_after(steps_)) check(loss);
  if (steps_ == settings_.calibration_batches) start_fake_quant();
  if (steps_ == settings_.freeze_observers_at) freeze_observers();
  if (frozen(settings_.freeze_batch_norm_at)) set_batch_norm_frozen(true);
  watch();
}

void TrainingSession::start_fake_quant() {
  calibrate_from_observers(model_);
  for (const auto& item : layers_)
    for (const auto& named : item.layer->quantizers()) named.quantizer->observer().reset();
  set_mode(model_, Mode::fake_quant);
}

void TrainingSession::freeze_observers() {
  for (const auto& item : layers_)
    for (const auto& [what, quantizer] : item.layer->quantizers())
      if (quantizer->settings().policy == RangePolicy::moving_average)
        quantizer->set_policy(RangePolicy::frozen);
}

void TrainingSession::set_batch_norm_frozen(bool frozen) {
  for (const auto& item : layers_) item.layer->set_batch_norm_frozen(frozen);
  for (const auto& [module, momentum] : batch_norms_)
    with_batch_norm(*module, [&, &momentum = momentum](auto& norm) {
      norm.train(!frozen && model_.is_training());
      // Were it put into training mode for one batch, its statistics would not move.
      norm.options.momentum(frozen ? std::optional<double>(0.0) : momentum);
    });
}

void TrainingSession::train() {
  model_.train();
  if (frozen(settings_.freeze_batch_norm_at)) set_batch_norm_frozen(true);
}

void TrainingSession::watch() {
  const std::lock_guard lock(watched_mutex_);
  watched_.clear();
  const bool wanted = checks_after(steps_ + 1);
  for (const auto& item : layers_) {
    if (!wanted) {
      item.layer->set_probe(nullptr);
      continue;
    }
    item.layer->set_probe(
        [this, name = item.name](const std::vector<Tensor>& inputs, const Tensor& output) {
          // NaN and infinities survive a sum: one number for a tensor, and no waiting for it.
          const torch::NoGradGuard no_grad;
          const auto add = [](Tensor& sum, const Tensor& values) {
            if (!values.defined() || !values.is_floating_point()) return;
            const Tensor mine = values.sum(torch::kFloat);
            sum = sum.defined() ? sum + mine : mine;
          };
          Watched record{name, {}, {}};
          for (const Tensor& input : inputs) add(record.inputs, input);
          add(record.outputs, output);
          const std::lock_guard probe_lock(watched_mutex_);
          watched_.push_back(std::move(record));
        });
  }
}

void TrainingSession::unwatch() {
  for (const auto& item : layers_) item.layer->set_probe(nullptr);
}

void TrainingSession::check(const Tensor& loss) {
  std::vector<Watched> watched;
  {
    const std::lock_guard lock(watched_mutex_);
    watched.swap(watched_);
  }
  const auto value_of = [](const Tensor& sum) { return sum.defined() ? sum.item<float>() : 0.0f; };
  if (loss.defined() && !loss.detach().isfinite().all().item<bool>()) {
    const std::string value =
        concat("the loss is ", std::abs(loss.detach().sum().item<double>()), " at step ", steps_);
    for (const Watched& layer : watched)
      VERNIER_CHECK(std::isfinite(value_of(layer.outputs)), value, ": layer '", layer.layer,
                    "' was the first whose output was not finite: check the batch and what comes "
                    "before the layer, lower the learning rate or clip gradients, and go back to "
                    "the last checkpoint");
    throw Error(concat(value,
                       ": the outputs of all quantized layers were finite: look at what "
                       "comes after them, and at the loss function"));
  }
  for (const Watched& layer : watched)
    VERNIER_CHECK(!std::isnan(value_of(layer.inputs)), "layer '", layer.layer,
                  "' was given NaN at step ", steps_,
                  ", which quantization hides from the loss: check the batch and what comes before "
                  "the layer, and go back to the last checkpoint");
  for (const auto& [name, layer] : layers_) {
    for (const auto& [what, quantizer] : layer->quantizers()) {
      if (!quantizer->calibrated()) continue;
      try {
        quantizer->check_learned();
      } catch (const Error& error) {
        throw Error(concat("layer '", name, "' (", what, ") at step ", steps_, ": ", error.what()));
      }
    }
  }
}

Module& TrainingSession::twin_module() {
  VERNIER_CHECK(twin_, "the session keeps no twin: set keep_twin in its settings");
  return *twin_;
}

void TrainingSession::check_twin_type(bool fits) {
  VERNIER_CHECK(fits, "the twin is of another class than was asked for: ask for the model's");
}

// ---- Saving and resuming ------------------------------------------------------------------------

void TrainingSession::save(const std::filesystem::path& path,
                           const torch::optim::Optimizer* optimizer,
                           const std::function<void(OutputArchive&)>& more) const {
  OutputArchive archive;
  write(archive, optimizer);
  if (more) {
    OutputArchive nested(archive.compilation_unit());
    more(nested);
    archive.write("more", nested);
  }
  AtomicFile file(path);
  archive.save_to([&](const void* data, size_t bytes) {
    file.write(data, bytes);
    return bytes;
  });
  file.commit();
}

void TrainingSession::write(OutputArchive& archive,
                            const torch::optim::Optimizer* optimizer) const {
  archive.write("format", c10::IValue(kFormat));
  archive.write("version", c10::IValue(kVersion));
  archive.write("architecture", c10::IValue(joined(architecture_)));
  archive.write("recipe", c10::IValue(joined(recipe_)));
  archive.write("schedule",
                tensor_of({steps_, settings_.calibration_batches, settings_.freeze_observers_at,
                           settings_.freeze_batch_norm_at, settings_.check_every}));
  const auto nest = [&](const std::string& key, const auto& write_into) {
    OutputArchive nested(archive.compilation_unit());
    write_into(nested);
    archive.write(key, nested);
  };
  nest("model", [&](OutputArchive& nested) { model_.save(nested); });
  if (twin_) nest("twin", [&](OutputArchive& nested) { twin_->save(nested); });
  if (optimizer) nest("optimizer", [&](OutputArchive& nested) { optimizer->save(nested); });
  for (size_t i = 0; i < layers_.size(); ++i) {
    for (const auto& [what, quantizer] : layers_[i].layer->quantizers()) {
      const std::string key = concat("quantizer_", i, "_", what);
      if (quantizer->is_serializable())
        nest(key, [&, &quantizer = quantizer](OutputArchive& nested) { quantizer->save(nested); });
      const SiteStatistics seen = quantizer->observer().statistics();
      if (seen.histogram.total() > 0)
        nest("observer_" + key, [&](OutputArchive& nested) { write_statistics(nested, seen); });
    }
  }
  for (const auto& [key, device] : generators_of(model_)) {
    at::Generator generator = at::globalContext().defaultGenerator(device);
    const std::lock_guard lock(generator.mutex());
    archive.write(key, generator.get_state());
  }
}

void TrainingSession::load(const std::filesystem::path& path, torch::optim::Optimizer* optimizer,
                           const std::function<void(InputArchive&)>& more) {
  const std::string where = path.string();
  VERNIER_CHECK(std::filesystem::exists(path), where,
                " does not exist: save a session there first");
  try {
    InputArchive archive;
    archive.load_from(where, device_of(model_));
    read(archive, optimizer, more);
  } catch (const Error& error) {
    throw Error(concat(where, ": ", error.what()));
  } catch (const c10::Error& error) {
    throw Error(concat(
        where, " is no session of this program, or damaged: ", error.what_without_backtrace()));
  }
}

void TrainingSession::read(InputArchive& archive, torch::optim::Optimizer* optimizer,
                           const std::function<void(InputArchive&)>& more) {
  c10::IValue value;
  VERNIER_CHECK(
      archive.try_read("format", value) && value.isString() && value.toStringRef() == kFormat,
      "it is no training session: save one with TrainingSession::save");
  const int64_t version = read_int(archive, "version");
  VERNIER_CHECK(version == kVersion, "it has version ", version, " and this program reads version ",
                kVersion);
  check_same(split(read_string(archive, "architecture")), architecture_, "architecture");
  check_same(split(read_string(archive, "recipe")), recipe_, "recipe");
  InputArchive twin, optimizer_state;
  const bool has_twin = archive.try_read("twin", twin);
  VERNIER_CHECK(has_twin == (twin_ != nullptr), "it ", has_twin ? "holds a" : "holds no",
                " twin and this session keeps ", has_twin ? "none" : "one",
                ": set keep_twin as it was");
  const bool has_optimizer = archive.try_read("optimizer", optimizer_state);
  VERNIER_CHECK(has_optimizer == (optimizer != nullptr), "it ", has_optimizer ? "holds" : "lacks",
                " the state of an optimizer: load it ", has_optimizer ? "with" : "without", " one");
  Tensor schedule;
  archive.read("schedule", schedule);
  schedule = schedule.cpu();
  VERNIER_CHECK(schedule.scalar_type() == torch::kLong && schedule.numel() == 5,
                "its schedule is damaged");
  const int64_t* saved = schedule.const_data_ptr<int64_t>();
  VERNIER_CHECK(saved[0] >= 0 && saved[1] >= 0 && saved[4] >= 0, "its schedule is damaged");
  if (more) {
    InputArchive nested;
    VERNIER_CHECK(archive.try_read("more", nested), "it holds nothing besides a session");
    more(nested);
  }

  unwatch();
  set_mode(model_, Mode::full);
  if (frozen(settings_.freeze_batch_norm_at)) set_batch_norm_frozen(false);
  // Without scales, so that the archive's are all there is.
  for (const auto& [quantizer, settings] : initial_settings_) {
    quantizer->set_settings(settings);
    quantizer->observer().reset();
  }
  const auto read_nested = [&](const std::string& key, const auto& take) {
    InputArchive nested;
    archive.read(key, nested);
    take(nested);
  };
  read_nested("model", [&](InputArchive& nested) { model_.load(nested); });
  if (twin_) twin_->load(twin);
  for (size_t i = 0; i < layers_.size(); ++i) {
    for (const auto& [what, quantizer] : layers_[i].layer->quantizers()) {
      const std::string key = concat("quantizer_", i, "_", what);
      InputArchive nested, observer;
      if (archive.try_read(key, nested)) quantizer->load(nested);
      if (archive.try_read("observer_" + key, observer))
        quantizer->observer().add(read_statistics(observer));
    }
  }
  if (optimizer) {
    optimizer->state().clear();  // loading adds to what is there
    optimizer->load(optimizer_state);
  }
  steps_ = saved[0];
  settings_.calibration_batches = saved[1];
  settings_.freeze_observers_at = saved[2];
  settings_.freeze_batch_norm_at = saved[3];
  settings_.check_every = saved[4];
  begin();
  for (const auto& [key, device] : generators_of(model_)) {
    Tensor state;
    if (!archive.try_read(key, state)) continue;  // saved on another kind of device
    at::Generator generator = at::globalContext().defaultGenerator(device);
    const std::lock_guard lock(generator.mutex());
    generator.set_state(state.cpu());
  }
}

Tensor distillation_loss(const Tensor& student, const Tensor& teacher, double temperature) {
  VERNIER_CHECK(student.sizes() == teacher.sizes() && student.dim() >= 1,
                "the student's logits have shape ", student.sizes(), " and the teacher's ",
                teacher.sizes());
  VERNIER_CHECK(temperature > 0, "the temperature must be positive, not ", temperature);
  namespace F = torch::nn::functional;
  const Tensor log_student = F::log_softmax(student / temperature, -1);
  const Tensor log_teacher = F::log_softmax(teacher.detach() / temperature, -1);
  const Tensor divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-1);
  return divergence.mean() * (temperature * temperature);
}

std::vector<Tensor> learned_ranges(const Module& model) {
  const std::set<std::string> names = names_of_ranges(model);
  std::vector<Tensor> tensors;
  for (const auto& item : model.named_parameters())
    if (names.count(item.key())) tensors.push_back(item.value());
  return tensors;
}

std::vector<Tensor> parameters_without_ranges(const Module& model) {
  const std::set<std::string> names = names_of_ranges(model);
  std::vector<Tensor> tensors;
  for (const auto& item : model.named_parameters())
    if (!names.count(item.key())) tensors.push_back(item.value());
  return tensors;
}

}  // namespace vernier
