// Checkpoints, the validator and the metrics. That the validator can fail is shown here: with codes
// and scales altered behind its back, and with broken kernels.
#include <gtest/gtest.h>
#include <hdf5.h>
#include <torch/library.h>
#include <torch/torch.h>
#include <unistd.h>
#include <vernier/export/checkpoint.h>
#include <vernier/export/metrics.h>
#include <vernier/export/validate.h>
#include <vernier/kernels/quantize.h>
#include <vernier/qat/linear.h>
#include <vernier/recipes/models/text_model.h>
#include <vernier/recipes/recipe.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/tiny_bert.h>

#include <cmath>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace vernier {
namespace {

namespace fs = std::filesystem;
using testing::message_of;
using testing::read_bytes;
using testing::TemporaryFolder;
using testing::write_bytes;
using torch::Tensor;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kIn = 16, kHidden = 12, kOut = 5, kRows = 20;

const Scheme kAsymmetric = asymmetric_scheme(8);
const Scheme kPerToken = {.granularity = Granularity::per_token, .dynamic = true};
const Scheme kActivations[] = {symmetric_scheme(8), kAsymmetric, kPerToken};

/// A linear layer whose integer mode is wrong by `fault` in its first output.
struct FaultyLinear : nn::LinearImpl {
  using nn::LinearImpl::LinearImpl;
  Tensor integer_compute(at::TensorList inputs) const override {
    Tensor output = nn::LinearImpl::integer_compute(inputs);
    output.flatten()[0] += fault;
    return output;
  }
  double fault = 0;
};

/// Two layers with a norm between them, and buffers of other dtypes.
struct Chain : torch::nn::Module {
  Chain() {
    first = register_module("first", std::make_shared<FaultyLinear>(kIn, kHidden));
    norm = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({kHidden})));
    second = register_module("second", nn::Linear(kHidden, kOut));
    register_buffer("steps", torch::tensor({1, 2, 3}, torch::kLong));
    register_buffer("table", torch::randn({2, 2}, torch::kDouble));
  }
  Tensor forward(const Tensor& x) { return second(norm(first->forward(x))); }

  std::shared_ptr<FaultyLinear> first;
  torch::nn::LayerNorm norm{nullptr};
  nn::Linear second{nullptr};
};

using ChainPointer = std::shared_ptr<Chain>;

Recipe recipe_of(const Scheme& activations, const std::vector<std::string>& skip = {}) {
  Recipe recipe;
  recipe.name = "test";
  recipe.weights.scheme = symmetric_scheme(8, Granularity::per_channel);
  recipe.activations.scheme = activations;
  recipe.skip = skip;
  return recipe;
}

Tensor sample_input(torch::Dtype dtype = torch::kFloat) {
  return (torch::randn({kRows, kIn}) + 0.3).to(dtype);
}

ChainPointer calibrated_chain(const Scheme& activations = kAsymmetric,
                              torch::Dtype dtype = torch::kFloat,
                              const std::vector<std::string>& skip = {}) {
  const torch::NoGradGuard no_grad;
  auto model = std::make_shared<Chain>();
  model->to(dtype);
  apply_recipe(*model, recipe_of(activations, skip));
  ModelStatistics statistics;
  const ModeGuard observing(*model, Mode::observe);
  model->forward(sample_input(dtype));
  for (const auto& [name, layer] : quantized_layers(*model))
    statistics.sites[name] = layer->input_quantizer->observer().statistics();
  calibrate_layers(*model, statistics);
  return model;
}

Tensor output_in(Chain& model, Mode mode, const Tensor& x) {
  const torch::NoGradGuard no_grad;
  const ModeGuard guard(model, mode);
  return model.forward(x);
}

CheckpointInfo chain_info() {
  return {"Chain", "{\"text\": \"\u00e4\\n\", \"n\": 1}", "test", "0123456789abcdef"};
}

class ExportTest : public ::testing::Test {
 protected:
  ExportTest() { torch::manual_seed(5); }

  fs::path save(const torch::nn::Module& model, const std::string& name = "model.h5") {
    save_checkpoint(model, chain_info(), folder_ / name);
    return folder_ / name;
  }

  TemporaryFolder folder_;
};

// ---- Checkpoints --------------------------------------------------------------------------------

void expect_same_quantizer(QuantizerImpl& expected, QuantizerImpl& actual) {
  EXPECT_EQ(actual.scheme(), expected.scheme());
  EXPECT_TRUE(torch::equal(actual.scale(), expected.scale()));
  ASSERT_EQ(actual.zero_point().has_value(), expected.zero_point().has_value());
  if (expected.zero_point()) {
    EXPECT_TRUE(torch::equal(*actual.zero_point(), *expected.zero_point()));
  }
}

void expect_same_tensors(const Chain& expected, const Chain& actual) {
  const auto compare = [&](const auto& theirs, const auto& ours) {
    for (const auto& item : theirs) {
      const Tensor* found = ours.find(item.key());
      ASSERT_NE(found, nullptr) << item.key();
      EXPECT_EQ(found->scalar_type(), item.value().scalar_type()) << item.key();
      EXPECT_TRUE(torch::equal(*found, item.value())) << item.key();
    }
  };
  compare(expected.named_buffers(), actual.named_buffers());
  compare(expected.norm->named_parameters(), actual.norm->named_parameters());
  EXPECT_TRUE(torch::equal(actual.first->bias, expected.first->bias));
  EXPECT_TRUE(torch::equal(actual.second->bias, expected.second->bias));
}

TEST_F(ExportTest, CheckpointsRoundTrip) {
  for (const Scheme& scheme : kActivations) {
    for (const torch::Dtype dtype : {torch::kFloat, torch::kHalf, torch::kBFloat16}) {
      for (const std::vector<std::string>& skip :
           {std::vector<std::string>{}, std::vector<std::string>{"sec*"}}) {
        SCOPED_TRACE(
            concat(to_string(scheme), ", ", c10::toString(dtype), ", skipped ", skip.size()));
        const auto model = calibrated_chain(scheme, dtype, skip);
        const fs::path path = save(*model);
        EXPECT_TRUE(Checkpoint::is_checkpoint(path));
        const auto loaded = std::make_shared<Chain>();
        loaded->to(dtype);
        const Checkpoint checkpoint = Checkpoint::open(path);
        EXPECT_EQ(checkpoint.info().architecture, chain_info().architecture);
        EXPECT_EQ(checkpoint.info().config, chain_info().config);
        EXPECT_EQ(checkpoint.info().recipe, chain_info().recipe);
        EXPECT_EQ(checkpoint.info().fingerprint, chain_info().fingerprint);
        checkpoint.load_into(*loaded);

        expect_same_tensors(*model, *loaded);
        set_mode(*model, Mode::integer);
        const auto expected = quantized_layers(*model), actual = quantized_layers(*loaded);
        for (size_t i = 0; i < expected.size(); ++i) {
          SCOPED_TRACE(expected[i].name);
          QuantizedLayer &theirs = *expected[i].layer, &ours = *actual[i].layer;
          EXPECT_EQ(ours.quantized(), theirs.quantized());
          EXPECT_EQ(ours.mode(), theirs.mode());
          EXPECT_EQ(ours.float_weight().scalar_type(), dtype);
          if (!theirs.quantized()) {
            EXPECT_TRUE(torch::equal(ours.float_weight(), theirs.float_weight()));
            continue;
          }
          EXPECT_TRUE(torch::equal(ours.weight_codes(), theirs.weight_codes()));
          expect_same_quantizer(*theirs.input_quantizer, *ours.input_quantizer);
          expect_same_quantizer(*theirs.weight_quantizer, *ours.weight_quantizer);
        }
        const Tensor x = sample_input(dtype);
        EXPECT_TRUE(torch::equal(output_in(*loaded, Mode::integer, x),
                                 output_in(*model, Mode::integer, x)));
        // The float weights are what the codes stand for, so that the codes made of them are the
        // same.
        set_mode(*loaded, Mode::full);
        EXPECT_TRUE(torch::equal(output_in(*loaded, Mode::integer, x),
                                 output_in(*model, Mode::integer, x)));
      }
    }
  }
}

TEST_F(ExportTest, EqualModelsGiveEqualFiles) {
  const auto model = calibrated_chain();
  EXPECT_EQ(read_bytes(save(*model, "a.h5")), read_bytes(save(*model, "b.h5")));
}

TEST_F(ExportTest, FailedWritesLeaveTheOldFile) {
  const auto good = calibrated_chain();
  const fs::path path = save(*good);
  const std::string old = read_bytes(path);

  const auto uncalibrated = std::make_shared<Chain>();
  EXPECT_CONTAINS(message_of([&] { save(*uncalibrated); }), "layer 'first' is not calibrated");
  good->register_buffer("flags", torch::ones({2}, torch::kBool));
  EXPECT_CONTAINS(message_of([&] { save(*good); }), "flags");
  EXPECT_CONTAINS(message_of([&] { save(*good, "missing/model.h5"); }), "does not exist");
  EXPECT_EQ(read_bytes(path), old);
  EXPECT_EQ(folder_.entries(), 1u);
}

/// Changes an HDF5 file in place.
class Editor {
 public:
  explicit Editor(const fs::path& path) : file_(H5Fopen(path.c_str(), H5F_ACC_RDWR, H5P_DEFAULT)) {
    check(file_);
  }
  Editor(const Editor&) = delete;
  Editor& operator=(const Editor&) = delete;
  ~Editor() { H5Fclose(file_); }

  void remove(const char* path) { check(H5Ldelete(file_, path, H5P_DEFAULT)); }

  void group(const char* path) {
    check(H5Gclose(H5Gcreate2(file_, path, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT)));
  }

  /// Puts a dataset in place of what was there.
  void put(const char* path, const Tensor& values) {
    if (H5Lexists(file_, path, H5P_DEFAULT) > 0) remove(path);
    const std::vector<hsize_t> shape(values.sizes().begin(), values.sizes().end());
    const hid_t space = H5Screate_simple(static_cast<int>(shape.size()), shape.data(), nullptr);
    const hid_t type = type_of(values.scalar_type());
    const hid_t dataset =
        H5Dcreate2(file_, path, type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    check(H5Dwrite(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT,
                   values.contiguous().const_data_ptr()));
    H5Dclose(dataset);
    H5Sclose(space);
  }

  void remove_attribute(const char* object, const char* name) {
    check(H5Adelete_by_name(file_, object, name, H5P_DEFAULT));
  }

  void attribute(const char* object, const char* name, int64_t value) {
    replace(object, name, H5T_NATIVE_INT64, &value);
  }

  void attribute(const char* object, const char* name, const std::string& value) {
    const hid_t type = H5Tcopy(H5T_C_S1);
    check(H5Tset_size(type, value.size()));
    replace(object, name, type, value.data());
    H5Tclose(type);
  }

 private:
  static void check(int64_t result) {
    if (result < 0) throw std::logic_error("the test cannot edit its file");
  }

  static hid_t type_of(torch::Dtype dtype) {
    const std::map<torch::Dtype, hid_t> types = {{torch::kFloat, H5T_NATIVE_FLOAT},
                                                 {torch::kDouble, H5T_NATIVE_DOUBLE},
                                                 {torch::kChar, H5T_NATIVE_INT8},
                                                 {torch::kShort, H5T_NATIVE_INT16},
                                                 {torch::kInt, H5T_NATIVE_INT32}};
    return types.at(dtype);
  }

  void replace(const char* object, const char* name, hid_t type, const void* value) {
    remove_attribute(object, name);
    const hid_t space = H5Screate(H5S_SCALAR);
    const hid_t attribute =
        H5Acreate_by_name(file_, object, name, type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    check(H5Awrite(attribute, type, value));
    H5Aclose(attribute);
    H5Sclose(space);
  }

  hid_t file_;
};

/// The message with which a checkpoint of a Chain is refused after `edit`.
std::string refusal(const fs::path& good, const fs::path& path,
                    const std::function<void(Editor&)>& edit) {
  write_bytes(path, read_bytes(good));
  {
    Editor editor(path);
    edit(editor);
  }
  return message_of([&] {
    Chain model;
    Checkpoint::open(path).load_into(model);
  });
}

TEST_F(ExportTest, DamagedCheckpointsAreRefused) {
  using Edit = std::function<void(Editor&)>;
  const auto removed = [](const char* path) -> Edit { return [=](Editor& e) { e.remove(path); }; };
  const auto put = [](const char* path, const Tensor& values) -> Edit {
    return [=](Editor& e) { e.put(path, values); };
  };
  const auto attribute = [](const char* object, const char* name, const auto& value) -> Edit {
    return [=](Editor& e) { e.attribute(object, name, value); };
  };
  const auto one = [](double value) { return torch::full({1}, value, torch::kFloat); };
  const Tensor codes = torch::zeros({kHidden, kIn}, torch::kChar);
  Tensor low_code = codes.clone();
  low_code[3][4] = -128;
  const struct {
    const char* what;
    Edit edit;
    const char* part;
  } cases[] = {
      {"layer missing", removed("layers/first"), "tensor 'first.weight' is missing"},
      {"tensor missing", removed("tensors/norm.weight"), "tensor 'norm.weight' is missing"},
      {"codes missing", removed("layers/first/weight_codes"), "layer 'first'"},
      {"scale missing", removed("layers/first/input_scale"), "layer 'first'"},
      {"zero point missing", removed("layers/first/input_zero_point"), "layer 'first'"},
      {"config missing", removed("config"), "config"},
      {"layers missing", removed("layers"), "not a vernier checkpoint"},
      {"tensors missing", removed("tensors"), "not a vernier checkpoint"},
      {"another layer", [](Editor& e) { e.group("layers/third"); }, "no layer 'third'"},
      {"another tensor", put("tensors/other", one(1)), "no tensor 'other'"},
      {"group for a tensor",
       [](Editor& e) {
         e.remove("tensors/norm.weight");
         e.group("tensors/norm.weight");
       },
       "norm.weight"},
      {"scale NaN", put("layers/first/input_scale", one(kNaN)), "finite and positive"},
      {"scale 0", put("layers/second/weight_scale", torch::zeros({kOut})), "finite and positive"},
      {"scale negative", put("layers/first/input_scale", one(-1)), "finite and positive"},
      {"scale float64", put("layers/first/input_scale", one(1).to(torch::kDouble)), "float32"},
      {"two scales for one tensor",
       [](Editor& e) {
         e.put("layers/first/input_scale", torch::ones({2}));
         e.put("layers/first/input_zero_point", torch::zeros({2}, torch::kInt));
       },
       "layer 'first'"},
      {"scales of another shape", put("layers/first/weight_scale", torch::ones({kHidden - 1})),
       "layer 'first'"},
      {"no scale", put("layers/second/weight_scale", torch::ones({0})), "layer 'second'"},
      {"zero point outside",
       put("layers/first/input_zero_point", torch::full({1}, 128, torch::kInt)), "[-128, 127]"},
      {"zero point float", put("layers/first/input_zero_point", one(0)), "int32"},
      {"code outside", put("layers/first/weight_codes", low_code), "[-127, 127]"},
      {"codes int16", put("layers/first/weight_codes", codes.to(torch::kShort)), "int16"},
      {"codes int32", put("layers/first/weight_codes", codes.to(torch::kInt)), "int8"},
      {"codes transposed", put("layers/first/weight_codes", codes.t()), "shape"},
      {"tensor of another shape", put("tensors/norm.weight", torch::ones({kHidden + 1})), "shape"},
      {"tensor of another dtype", put("tensors/norm.weight", torch::ones({kHidden}, torch::kChar)),
       "norm.weight"},
      {"tensor of another width",
       put("tensors/norm.weight", torch::ones({kHidden}, torch::kDouble)), "norm.weight"},
      {"newer version", attribute("/", "version", int64_t{2}), "version 2"},
      {"another format", attribute("/", "format", std::string("vernier-other")),
       "not a vernier checkpoint"},
      {"no version", [](Editor& e) { e.remove_attribute("/", "version"); }, "version"},
      {"no architecture", [](Editor& e) { e.remove_attribute("/", "architecture"); },
       "architecture"},
      {"9 bits", attribute("layers/first", "input_bits", int64_t{9}), "input_bits is 9"},
      {"2^32 + 8 bits", attribute("layers/first", "weight_bits", (int64_t{1} << 32) + 8),
       "weight_bits"},
      {"granularity", attribute("layers/first", "input_granularity", std::string("per_row")),
       "per_row"},
      {"input per channel",
       attribute("layers/first", "input_granularity", std::string("per_channel")), "layer 'first'"},
      {"group size", attribute("layers/first", "weight_group_size", int64_t{4}), "group_size 4"},
  };
  const fs::path good = save(*calibrated_chain()), path = folder_ / "damaged.h5";
  EXPECT_EQ(refusal(good, path, [](Editor&) {}), "");
  for (const auto& [what, edit, part] : cases) {
    SCOPED_TRACE(what);
    const std::string message = refusal(good, path, edit);
    EXPECT_CONTAINS(message, part);
    EXPECT_CONTAINS(message, path.string());
  }
}

TEST_F(ExportTest, TruncatedCheckpointsAreRefused) {
  const std::string whole = read_bytes(save(*calibrated_chain()));
  const fs::path path = folder_ / "truncated.h5";
  for (size_t size = 0; size < whole.size(); size += 1 + whole.size() / 50) {
    write_bytes(path, whole.substr(0, size));
    EXPECT_FALSE(Checkpoint::is_checkpoint(path)) << size;
    EXPECT_CONTAINS(message_of([&] { Checkpoint::open(path); }), path.string());
  }
}

TEST_F(ExportTest, OtherFilesAreNoCheckpoints) {
  EXPECT_FALSE(Checkpoint::is_checkpoint(folder_ / "missing.h5"));
  EXPECT_CONTAINS(message_of([&] { Checkpoint::open(folder_ / "missing.h5"); }), "missing.h5");
  testing::write_tokens(folder_ / "tokens.h5", testing::random_rows(2));
  EXPECT_FALSE(Checkpoint::is_checkpoint(folder_ / "tokens.h5"));
  EXPECT_CONTAINS(message_of([&] { Checkpoint::open(folder_ / "tokens.h5"); }),
                  "not a vernier checkpoint");
}

TEST_F(ExportTest, CheckpointsOfAnotherArchitectureAreRefused) {
  const fs::path path = save(*calibrated_chain());
  EXPECT_CONTAINS(message_of([&] { load_text_model(path); }),
                  "'Chain' is not supported; supported are: BertModel");
  Editor(path).attribute("/", "architecture", std::string("BertModel"));
  EXPECT_CONTAINS(message_of([&] { load_text_model(path); }), "has no field");
}

// ---- The validator ------------------------------------------------------------------------------

using V = LayerValidation;

/// Validates two batches, the model in integer mode before: its codes are not made anew.
ValidationReport validated(Chain& model) {
  set_mode(model, Mode::integer);
  Validator validator(model);
  for (int batch = 0; batch < 2; ++batch) {
    set_mode(model, Mode::integer);
    const Tensor x = sample_input();
    validator.add([&] { return model.forward(x); });
  }
  return validator.report();
}

void expect_layers_exact(const ValidationReport& report) {
  for (const auto wrong : {&V::code_mismatches, &V::weight_code_mismatches,
                           &V::accumulator_mismatches, &V::outside_bound})
    EXPECT_EQ(report.total(wrong), 0);
}

TEST_F(ExportTest, GoodModelsPass) {
  for (const Scheme& scheme : kActivations) {
    SCOPED_TRACE(to_string(scheme));
    const auto model = calibrated_chain(scheme);
    const ValidationReport report = validated(*model);
    expect_layers_exact(report);
    EXPECT_TRUE(report.passed(1e-2)) << report.relative_output_error();
    EXPECT_FALSE(report.passed(report.relative_output_error() * 0.999 - 1e-300));
    EXPECT_EQ(report.runs, 2);
    ASSERT_EQ(report.layers.size(), 2u);
    EXPECT_EQ(report.layers[0].name, "first");
    EXPECT_EQ(report.layers[0].codes, 2 * kRows * kIn);
    EXPECT_EQ(report.layers[0].weight_codes, kHidden * kIn);
    EXPECT_EQ(report.layers[0].accumulators, 2 * kRows * kHidden);
    EXPECT_EQ(report.layers[1].outputs, 2 * kRows * kOut);
    EXPECT_EQ(report.layers[0].moved_codes, 0);  // nothing is upstream of it
    for (const V& layer : report.layers) {
      EXPECT_GT(layer.worst_of_bound, 0);
      EXPECT_LE(layer.worst_of_bound, 1);
    }
    EXPECT_GT(report.output_signal, 0);
    EXPECT_GT(report.max_output, 0);
  }
}

TEST_F(ExportTest, HalfPrecisionModelsPass) {
  for (const torch::Dtype dtype : {torch::kHalf, torch::kBFloat16}) {
    SCOPED_TRACE(c10::toString(dtype));
    const auto model = calibrated_chain(kAsymmetric, dtype);
    Validator validator(*model);
    const Tensor x = sample_input(dtype);
    validator.add([&] { return model->forward(x); });
    expect_layers_exact(validator.report());
    EXPECT_TRUE(validator.report().passed(0.05));
  }
}

TEST_F(ExportTest, ModesAreGivenBackAndSkippedLayersLeftOut) {
  const auto model = calibrated_chain(kAsymmetric, torch::kFloat, {"second"});
  model->first->set_mode(Mode::observe);
  Validator validator(*model);
  const Tensor x = sample_input();
  validator.add([&] { return model->forward(x); });
  ASSERT_EQ(validator.report().layers.size(), 1u);
  EXPECT_EQ(validator.report().layers[0].name, "first");
  EXPECT_EQ(model->first->mode(), Mode::observe);
  EXPECT_THROW(validator.add([]() -> Tensor { throw std::runtime_error("no data"); }),
               std::runtime_error);
  EXPECT_EQ(model->first->mode(), Mode::observe);
  const V before = validator.report().layers[0];
  model->forward(x);  // the probes are gone
  EXPECT_EQ(validator.report().layers[0].codes, before.codes);
  EXPECT_EQ(validator.report().runs, 1);
}

TEST_F(ExportTest, WhatCannotBeValidatedIsRefused) {
  Chain uncalibrated;
  EXPECT_CONTAINS(message_of([&] { Validator{uncalibrated}; }), "layer 'first'");
  torch::nn::Linear plain(3, 3);
  EXPECT_CONTAINS(message_of([&] { Validator{*plain}; }), "no quantized layer");
  const auto model = calibrated_chain();
  Validator validator(*model);
  const auto more_each_time = [&, times = 0]() mutable {
    for (int i = 0; i < times; ++i) model->forward(torch::zeros({1, kIn}));
    ++times;
    return model->forward(torch::zeros({1, kIn}));
  };
  EXPECT_CONTAINS(message_of([&] { validator.add(more_each_time); }), "ran more often");
}

TEST_F(ExportTest, AnAlteredWeightCodeIsFound) {
  const auto model = calibrated_chain(kAsymmetric);
  set_mode(*model, Mode::integer);
  Tensor codes = model->first->weight_codes();
  codes[2][3] += codes[2][3].item<int>() > 0 ? -100 : 100;
  Validator validator(*model);
  const Tensor x = sample_input();
  validator.add([&] { return model->forward(x); });
  const V& first = validator.report().layers[0];
  EXPECT_EQ(first.weight_code_mismatches, 1);
  EXPECT_EQ(first.code_mismatches, 0);
  // The column's sum of codes is that of before, and so is the zero point's share.
  EXPECT_EQ(first.accumulator_mismatches, kRows);
  EXPECT_GT(first.outside_bound, 0);
  EXPECT_GT(first.worst_of_bound, 1);
  EXPECT_EQ(validator.report().layers[1].weight_code_mismatches, 0);
  EXPECT_FALSE(validator.report().passed(1e9));
}

TEST_F(ExportTest, AScaleAlteredOnOneSideIsFound) {
  const auto model = calibrated_chain();
  set_mode(*model, Mode::integer);
  Tensor scale = model->second->weight_quantizer->scale();
  scale[0] *= 0.8;  // the codes are of the scale before
  Validator validator(*model);
  const Tensor x = sample_input();
  validator.add([&] { return model->forward(x); });
  const V& second = validator.report().layers[1];
  EXPECT_GT(second.weight_code_mismatches, 0);
  EXPECT_LE(second.weight_code_mismatches, kHidden);
  EXPECT_GT(second.outside_bound, 0);
  EXPECT_EQ(validator.report().layers[0].weight_code_mismatches, 0);
  EXPECT_FALSE(validator.report().passed(1e9));
}

TEST_F(ExportTest, APerturbedOutputIsFound) {
  const auto model = calibrated_chain();
  model->first->fault = 1e-3;
  const ValidationReport report = validated(*model);
  EXPECT_EQ(report.layers[0].outside_bound, 2);  // one a batch
  EXPECT_NEAR(report.layers[0].max_difference, 1e-3, 1e-5);
  EXPECT_EQ(report.layers[1].outside_bound, 0);
  EXPECT_FALSE(report.passed(1e9));
}

TEST_F(ExportTest, ANaNOutputIsFound) {
  const auto model = calibrated_chain();
  model->first->fault = kNaN;
  const ValidationReport report = validated(*model);
  EXPECT_EQ(report.layers[0].outside_bound, 2);  // one a batch
  EXPECT_TRUE(std::isnan(report.layers[0].max_difference));
  EXPECT_TRUE(std::isnan(report.worst_of_bound()));
  EXPECT_FALSE(report.passed(1e9));
}

TEST_F(ExportTest, CodesMovedUpstreamAreCounted) {
  const auto model = calibrated_chain();
  model->first->fault = 10;  // upsets the norm of the first row
  const ValidationReport report = validated(*model);
  EXPECT_EQ(report.layers[0].moved_codes, 0);
  EXPECT_GT(report.layers[1].moved_codes, 2);
  EXPECT_LE(report.layers[1].moved_codes, 2 * kHidden);
  EXPECT_EQ(report.layers[1].code_mismatches, 0);
  EXPECT_GT(report.max_output_difference, 0.01);
  EXPECT_GT(report.relative_output_error(), 1e-3);
}

// Kernels with a fault in the first element, in place of Vernier's while the Library lives.
Tensor faulty_quantize(const Tensor& input, const Tensor& scale, const std::optional<Tensor>&,
                       int64_t, std::string_view, int64_t, int64_t, bool) {
  const Tensor column = scale.numel() == 1 ? scale : scale.view({-1, 1});
  Tensor codes = input.div(column).round().clamp(-127, 127).to(torch::kChar);
  codes.flatten()[0].bitwise_xor_(1);
  return codes;
}

Tensor faulty_matmul(const Tensor& codes, const Tensor& weight) {
  Tensor sums = codes.to(torch::kInt).mm(weight.to(torch::kInt).t());
  sums[0][0] += 1;
  return sums;
}

Tensor faulty_linear(const Tensor& codes, const Tensor& weight, const Tensor& input_scale,
                     const Tensor& weight_scale, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>&, const std::optional<Tensor>&,
                     at::ScalarType dtype, std::string_view) {
  const Tensor sums = codes.to(torch::kInt).mm(weight.to(torch::kInt).t());
  Tensor output = sums.to(torch::kFloat) * weight_scale * input_scale + *bias;
  output[0][0] += 0.01;
  return output.to(dtype);
}

/// What is found at the first layer of a good model while `kernel` stands for an operator.
template <typename F>
V first_layer_with(const char* name, F* kernel) {
  const auto model = calibrated_chain(symmetric_scheme(8));
  set_mode(*model, Mode::integer);
  Validator validator(*model);
  const Tensor x = sample_input();
  torch::Library library(torch::Library::IMPL, "vernier", c10::DispatchKey::CPU, __FILE__,
                         __LINE__);
  library.impl(name, kernel);
  validator.add([&] { return model->forward(x); });
  EXPECT_FALSE(validator.report().passed(1e9));
  return validator.report().layers[0];
}

TEST_F(ExportTest, BrokenKernelsAreFound) {
  const V quantize = first_layer_with("quantize", faulty_quantize);
  EXPECT_EQ(quantize.code_mismatches, 1);
  EXPECT_GT(quantize.accumulator_mismatches, 0);
  EXPECT_LE(quantize.accumulator_mismatches, kHidden);

  const V matmul = first_layer_with("int8_matmul", faulty_matmul);
  EXPECT_EQ(matmul.code_mismatches, 0);
  EXPECT_EQ(matmul.accumulator_mismatches, 1);

  const V linear = first_layer_with("int8_linear", faulty_linear);
  EXPECT_EQ(linear.accumulator_mismatches, 0);
  EXPECT_EQ(linear.outside_bound, 1);

  const auto model = calibrated_chain(symmetric_scheme(8));
  EXPECT_TRUE(validated(*model).passed(1e-2));  // Vernier's kernels are back
}

TEST_F(ExportTest, ReportsPassOnlyWhenNothingIsWrong) {
  const auto passed = [](const std::function<void(ValidationReport&)>& change) {
    ValidationReport report;
    report.runs = 1;
    report.layers.resize(2);
    report.output_signal = 4;
    report.output_noise = 0.04;  // a relative error of 0.1
    change(report);
    return report.passed(0.11);
  };
  EXPECT_TRUE(passed([](ValidationReport&) {}));
  EXPECT_TRUE(passed([](ValidationReport& r) { r.layers[1].moved_codes = 9; }));
  for (const auto wrong : {&V::code_mismatches, &V::weight_code_mismatches,
                           &V::accumulator_mismatches, &V::outside_bound})
    EXPECT_FALSE(passed([&](ValidationReport& r) { r.layers[1].*wrong = 1; }));
  EXPECT_FALSE(passed([](ValidationReport& r) { r.runs = 0; }));
  EXPECT_FALSE(passed([](ValidationReport& r) { r.output_noise = 0.06; }));
  EXPECT_FALSE(passed([](ValidationReport& r) { r.output_noise = kNaN; }));
  EXPECT_FALSE(passed([](ValidationReport& r) { r.output_signal = 0; }));
}

// ---- Metrics ------------------------------------------------------------------------------------

TEST(MetricsTest, SpearmanAgainstHandValues) {
  const struct {
    std::vector<double> a, b;
    double expected;
  } cases[] = {
      {{1, 2, 3}, {10, 20, 30}, 1},
      {{1, 2, 3}, {9, 5, 1}, -1},
      {{1, 2, 3}, {1, 10, 1000}, 1},                 // ranks only
      {{1, 2, 3, 4, 5}, {2, 1, 4, 3, 5}, 0.8},       // 1 - 6 * 4 / (5 * 24)
      {{1, 2, 2, 3}, {1, 3, 2, 4}, std::sqrt(0.9)},  // ranks 0 1.5 1.5 3: 4.5 / sqrt(4.5 * 5)
      {{1, 1, 2, 2}, {1, 2, 1, 2}, 0},
      {{5, 5, 5, 1}, {2, 2, 2, 0}, 1},
  };
  for (const auto& [a, b, expected] : cases) {
    EXPECT_NEAR(spearman(a, b), expected, 1e-12);
    EXPECT_NEAR(spearman(b, a), expected, 1e-12);
  }
  EXPECT_TRUE(std::isnan(spearman({1, 2, 3}, {4, 4, 4})));
  EXPECT_TRUE(std::isnan(spearman({7, 7}, {1, 2})));
}

TEST(MetricsTest, SpearmanOfNaNEnds) {
  // In a process of its own, because what it must not do is go on for ever.
  const auto correlate = [] {
    alarm(2);
    try {
      _exit(std::isnan(spearman({1, kNaN, 3}, {1, 2, 3})) ? 0 : 1);
    } catch (const Error&) {
      _exit(0);
    }
  };
  EXPECT_EXIT(correlate(), ::testing::ExitedWithCode(0), "");
}

TEST(MetricsTest, MeanAbsoluteErrorAndSqnr) {
  EXPECT_DOUBLE_EQ(mean_absolute_error({1, -2, 3}, {1, 2, 2.5}), 1.5);
  EXPECT_DOUBLE_EQ(mean_absolute_error({4}, {4}), 0);
  EXPECT_DOUBLE_EQ(sqnr_db(100, 1), 20);
  EXPECT_DOUBLE_EQ(sqnr_db(1, 10), -10);
  EXPECT_EQ(sqnr_db(1, 0), std::numeric_limits<double>::infinity());
  EXPECT_TRUE(std::isnan(sqnr_db(1, kNaN)));
  EXPECT_TRUE(std::isnan(sqnr_db(kNaN, 0)));
}

TEST(MetricsTest, SizesMustAgree) {
  EXPECT_CONTAINS(message_of([] { spearman({1, 2, 3}, {1, 2}); }), "3 and 2");
  EXPECT_CONTAINS(message_of([] { spearman({1}, {1}); }), "at least two");
  EXPECT_CONTAINS(message_of([] { mean_absolute_error({1, 2}, {1}); }), "2 and 1");
  EXPECT_CONTAINS(message_of([] { mean_absolute_error({}, {}); }), "0 and 0");
}

}  // namespace
}  // namespace vernier
