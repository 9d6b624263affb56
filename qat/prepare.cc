#include <fnmatch.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/container/moduledict.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/container/sequential.h>
#include <vernier/kernels/error.h>
#include <vernier/qat/batch_norm.h>
#include <vernier/qat/convolution.h>
#include <vernier/qat/embedding.h>
#include <vernier/qat/linear.h>
#include <vernier/qat/prepare.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <ostream>
#include <set>
#include <typeinfo>

namespace vernier {
namespace {

using torch::nn::AnyModule;
using torch::nn::Module;

// ---- Which layer becomes which ------------------------------------------------------------------

/// A type of torch::nn that has a drop-in.
struct DropInType {
  const char* name;
  /// Whether a module is of exactly that type: a class derived from it has a forward() of its own.
  bool (*is)(const Module& module);
  /// The drop-in with the module's parameters.
  AnyModule (*make)(const Module& plain);
};

template <typename DropIn, typename Plain>
constexpr DropInType drop_in(const char* name) {
  return {name, [](const Module& module) { return typeid(module) == typeid(Plain); },
          [](const Module& plain) {
            return AnyModule(std::make_shared<DropIn>(dynamic_cast<const Plain&>(plain)));
          }};
}

constexpr std::array kDropIns = {
    drop_in<nn::LinearImpl, torch::nn::LinearImpl>("Linear"),
    drop_in<nn::Conv1dImpl, torch::nn::Conv1dImpl>("Conv1d"),
    drop_in<nn::Conv2dImpl, torch::nn::Conv2dImpl>("Conv2d"),
    drop_in<nn::Conv3dImpl, torch::nn::Conv3dImpl>("Conv3d"),
    drop_in<nn::ConvTranspose1dImpl, torch::nn::ConvTranspose1dImpl>("ConvTranspose1d"),
    drop_in<nn::ConvTranspose2dImpl, torch::nn::ConvTranspose2dImpl>("ConvTranspose2d"),
    drop_in<nn::ConvTranspose3dImpl, torch::nn::ConvTranspose3dImpl>("ConvTranspose3d"),
    drop_in<nn::EmbeddingImpl, torch::nn::EmbeddingImpl>("Embedding"),
    drop_in<nn::EmbeddingBagImpl, torch::nn::EmbeddingBagImpl>("EmbeddingBag"),
};

const DropInType* drop_in_of(const Module& module) {
  for (const DropInType& candidate : kDropIns)
    if (candidate.is(module)) return &candidate;
  return nullptr;
}

bool matches(const std::string& pattern, const std::string& name) {
  return fnmatch(pattern.c_str(), name.c_str(), 0) == 0;
}

bool matches_any(const std::vector<std::string>& patterns, const std::string& name) {
  return std::any_of(patterns.begin(), patterns.end(),
                     [&](const std::string& pattern) { return matches(pattern, name); });
}

const LayerRule* rule_of(const QuantizationRules& rules, const std::string& name,
                         const std::string& type) {
  for (const LayerRule& rule : rules.rules)
    if (matches(rule.match, name) && (rule.type.empty() || rule.type == type)) return &rule;
  return nullptr;
}

bool stays_full(const QuantizationRules& rules, const std::string& name, const std::string& type) {
  if (matches_any(rules.skip, name)) return true;
  const LayerRule* rule = rule_of(rules, name, type);
  return rule && !rule->quantize;
}

const Module& module_of(const QuantizedLayer& layer) { return dynamic_cast<const Module&>(layer); }

QuantizerSettings at_8_bits(QuantizerSettings settings) {
  Scheme& scheme = settings.scheme;
  if (scheme.is_fp8() || scheme.bits >= 8) return settings;
  scheme.bits = 8;
  scheme.narrow_range = scheme.symmetric;
  return settings;
}

// ---- What every layer gets ----------------------------------------------------------------------

struct Assignment {
  NamedLayer item;
  bool quantize = true;
  QuantizerSettings weights;
  QuantizerSettings activations;

  QuantizerSettings settings_of(const NamedQuantizer& quantizer) const {
    return item.layer->fitting(
        quantizer.name, quantizer.quantizer->operand() == Operand::weight ? weights : activations);
  }
};

std::vector<Assignment> assignments(const Module& model, const QuantizationRules& rules) {
  std::vector<Assignment> all;
  std::vector<size_t> quantized, ruled;
  for (const NamedLayer& item : quantized_layers(model)) {
    const std::string type = type_name(module_of(*item.layer));
    Assignment mine{item, !stays_full(rules, item.name, type), rules.weights, rules.activations};
    if (mine.quantize) {
      quantized.push_back(all.size());
      if (const LayerRule* rule = rule_of(rules, item.name, type)) {
        ruled.push_back(all.size());
        mine.weights = rule->weights.value_or(mine.weights);
        mine.activations = rule->activations.value_or(mine.activations);
      }
    }
    all.push_back(std::move(mine));
  }
  if (rules.first_last == EndLayers::as_others || quantized.empty()) return all;
  for (const size_t end : {quantized.front(), quantized.back()}) {
    if (std::find(ruled.begin(), ruled.end(), end) != ruled.end()) continue;
    if (rules.first_last == EndLayers::full) {
      all[end].quantize = false;
    } else {
      all[end].weights = at_8_bits(all[end].weights);
      all[end].activations = at_8_bits(all[end].activations);
    }
  }
  return all;
}

// Every pattern of a recipe means some layer, or it is misspelt.
void check_patterns(const std::vector<NamedLayer>& layers, const QuantizationRules& rules,
                    const PrepareReport* report) {
  const auto check = [&](const std::string& what, const auto& fits) {
    for (const NamedLayer& item : layers)
      if (fits(item.name, type_name(module_of(*item.layer)))) return;
    if (report) {
      for (const auto& item : report->unreachable)
        if (fits(item.name, item.type)) return;
      for (const std::string& name : report->skipped)
        if (fits(name, "")) return;
    }
    throw Error(concat(what, " matches no layer; layers are named like '",
                       layers.empty() ? "" : layers.front().name, "'"));
  };
  for (const std::string& pattern : rules.skip)
    check(concat("skip '", pattern, "'"),
          [&](const std::string& name, const std::string&) { return matches(pattern, name); });
  for (const LayerRule& rule : rules.rules)
    check(
        concat("the rule for '", rule.match, "'", rule.type.empty() ? "" : " of type ", rule.type),
        [&](const std::string& name, const std::string& type) {
          return matches(rule.match, name) &&
                 (rule.type.empty() || type.empty() || rule.type == type);
        });
}

void assign(const Assignment& assignment) {
  QuantizedLayer& layer = *assignment.item.layer;
  layer.set_layer_name(assignment.item.name);
  layer.set_mode(Mode::full);
  layer.set_quantized(assignment.quantize);
  for (const auto& item : layer.quantizers())
    item.quantizer->set_settings(assignment.settings_of(item));
}

// ---- Swapping -----------------------------------------------------------------------------------

/// One registration of a module under a parent.
struct Place {
  std::shared_ptr<Module> parent;  // null: the model itself
  std::string key;
};

/// A module and all places where it is registered.
struct Candidate {
  std::string name;
  std::shared_ptr<Module> module;
  std::vector<Place> places;
};

bool is_container(const Module& module) {
  return dynamic_cast<const torch::nn::SequentialImpl*>(&module) ||
         dynamic_cast<const torch::nn::ModuleListImpl*>(&module) ||
         dynamic_cast<const torch::nn::ModuleDictImpl*>(&module);
}

// Puts a module where another was: among the parent's children and, in a container, in its list.
void put(Module& parent, const std::string& key, const std::shared_ptr<Module>& old,
         const AnyModule& replacement) {
  parent.replace_module(key, replacement.ptr());
  if (auto* sequential = dynamic_cast<torch::nn::SequentialImpl*>(&parent)) {
    for (AnyModule& item : *sequential)
      if (item.ptr() == old) item = replacement;
  } else if (auto* list = dynamic_cast<torch::nn::ModuleListImpl*>(&parent)) {
    for (std::shared_ptr<Module>& item : *list)
      if (item == old) item = replacement.ptr();
  } else if (auto* dictionary = dynamic_cast<torch::nn::ModuleDictImpl*>(&parent)) {
    for (auto& item : *dictionary)
      if (item.value() == old) item.value() = replacement.ptr();
  }
}

// All modules below a parent that are not inside a quantized layer, each once.
void collect(Module& parent, const std::shared_ptr<Module>& shared, const std::string& prefix,
             std::vector<Candidate>& candidates, std::map<const Module*, size_t>& seen) {
  for (const auto& child : parent.named_children()) {
    const std::string name = prefix + child.key();
    const auto [found, added] = seen.emplace(child.value().get(), candidates.size());
    if (added) candidates.push_back({name, child.value(), {}});
    candidates[found->second].places.push_back({shared, child.key()});
    if (added && !std::dynamic_pointer_cast<QuantizedLayer>(child.value()))
      collect(*child.value(), child.value(), name + ".", candidates, seen);
  }
}

bool holds_matrix(const Module& module) {
  const auto parameters = module.named_parameters(/*recurse=*/false);
  return std::any_of(parameters.begin(), parameters.end(),
                     [](const auto& item) { return item.value().dim() >= 2; });
}

std::string known_types() {
  std::string names;
  for (const DropInType& type : kDropIns) names += concat(names.empty() ? "" : ", ", type.name);
  return names;
}

// Swaps one layer wherever it is registered; says whether something else still holds the old one.
bool swap(Module& model, Candidate& candidate, const AnyModule& replacement) {
  const std::shared_ptr<Module> old = candidate.module;
  candidate.module.reset();
  bool in_container = false;
  for (const Place& place : candidate.places) {
    Module& parent = place.parent ? *place.parent : model;
    in_container = in_container || is_container(parent);
    put(parent, place.key, old, replacement);
  }
  // A container calls what is in it, whoever else knows the module.
  if (in_container || old.use_count() == 1) return true;
  for (const Place& place : candidate.places)
    (place.parent ? *place.parent : model).replace_module(place.key, old);
  candidate.module = old;
  return false;
}

}  // namespace

std::string type_name(const Module& module) {
  std::string name = module.name();
  if (const size_t template_arguments = name.find('<'); template_arguments != std::string::npos)
    name.resize(template_arguments);
  if (const size_t colon = name.rfind(':'); colon != std::string::npos) name.erase(0, colon + 1);
  if (name.ends_with("Impl")) name.resize(name.size() - 4);
  return name;
}

void apply_rules(const Module& model, const QuantizationRules& rules) {
  check_patterns(quantized_layers(model), rules, nullptr);
  for (const Assignment& assignment : assignments(model, rules)) assign(assignment);
}

PrepareReport prepare(Module& model, const QuantizationRules& rules) {
  PrepareReport report;
  VERNIER_CHECK(!drop_in_of(model) && !dynamic_cast<QuantizedLayer*>(&model),
                "the model is itself a ", type_name(model),
                ": make it a vernier::nn::", type_name(model),
                " and put it into a torch::nn::Sequential");
  std::set<std::string> replaced;
  {
    std::vector<Candidate> candidates;
    std::map<const Module*, size_t> seen;
    collect(model, nullptr, "", candidates, seen);
    for (Candidate& candidate : candidates) {
      const Module& module = *candidate.module;
      if (dynamic_cast<const QuantizedLayer*>(&module)) continue;
      const std::string type = type_name(module), name = candidate.name;
      const DropInType* drop_in_type = drop_in_of(module);
      if (stays_full(rules, name, type)) {
        if (drop_in_type) report.skipped.push_back(name);
        continue;
      }
      if (!drop_in_type) {
        if (holds_matrix(module))
          report.unreachable.push_back({name, type,
                                        concat("there is no vernier::nn::", type, " (there are ",
                                               known_types(), "); skip it to silence this")});
        continue;
      }
      if (swap(model, candidate, drop_in_type->make(module))) {
        replaced.insert(name);
        continue;
      }
      report.unreachable.push_back(
          {name, type,
           concat("a member of the class around it, or a variable, holds it: declare that as "
                  "vernier::nn::",
                  type, " in place of torch::nn::", type)});
    }
  }
  check_patterns(quantized_layers(model), rules, &report);
  const std::vector<Assignment> all = assignments(model, rules);
  for (const Assignment& assignment : all) {
    const auto& [name, layer] = assignment.item;
    (replaced.count(name) ? report.replaced : report.already).push_back(name);
    if (!assignment.quantize) report.skipped.push_back(name);
  }
  // Nothing is changed before it is known that nothing is lost.
  const auto has_scales = [](const QuantizedLayer& layer) {
    const auto quantizers = layer.quantizers();
    return std::any_of(quantizers.begin(), quantizers.end(),
                       [](const auto& item) { return item.quantizer->scale().numel() > 0; });
  };
  const auto as_assigned = [](const Assignment& assignment) {
    const QuantizedLayer& layer = *assignment.item.layer;
    if (layer.quantized() != assignment.quantize) return false;
    for (const auto& item : layer.quantizers()) {
      QuantizerSettings wanted = assignment.settings_of(item);
      const QuantizerSettings& settings = item.quantizer->settings();
      // A training session freezes averages.
      if (wanted.policy == RangePolicy::moving_average) wanted.policy = settings.policy;
      if (!(wanted == settings)) return false;
    }
    return true;
  };
  for (const Assignment& assignment : all)
    VERNIER_CHECK(!has_scales(*assignment.item.layer) || as_assigned(assignment), "layer '",
                  assignment.item.name,
                  "': it was prepared with other settings and has its scales: prepare a new model, "
                  "or apply the recipe, which forgets them");
  for (const Assignment& assignment : all)
    if (!has_scales(*assignment.item.layer)) assign(assignment);
  report.folded = fold_batch_norms(model);
  return report;
}

void convert(Module& model) {
  const auto layers = quantized_layers(model);
  VERNIER_CHECK(!model.is_training(),
                "the model is in training mode: call eval() before converting it to integers");
  std::string uncalibrated;
  bool any = false;
  for (const auto& [name, layer] : layers) {
    if (!layer->quantized()) continue;
    any = true;
    VERNIER_CHECK(!module_of(*layer).is_training(), "layer '", name,
                  "' is in training mode: call eval() on the whole model before converting it");
    for (const auto& [what, quantizer] : layer->quantizers())
      if (!quantizer->calibrated())
        uncalibrated += concat(uncalibrated.empty() ? "" : ", ", "'", name, "' (", what, ")");
  }
  VERNIER_CHECK(any, "the model has no quantized layer: prepare it, and train or calibrate it");
  VERNIER_CHECK(uncalibrated.empty(), "layers without scales: ", uncalibrated,
                ": train or calibrate the model with data that uses them, or skip them");
  merge_batch_norms(model);
  set_mode(model, Mode::integer);
}

std::ostream& operator<<(std::ostream& stream, const PrepareReport& report) {
  const auto line = [&](const char* what, const std::vector<std::string>& names) {
    if (names.empty()) return;
    stream << names.size() << ' ' << what << ':';
    for (const std::string& name : names) stream << ' ' << name;
    stream << '\n';
  };
  line("replaced", report.replaced);
  line("quantized layers already", report.already);
  line("left in full precision", report.skipped);
  line("with the batch norm behind it folded in", report.folded);
  for (const auto& [name, type, remedy] : report.unreachable)
    stream << "not reached: " << name << " (" << type << "): " << remedy << '\n';
  return stream;
}

}  // namespace vernier
