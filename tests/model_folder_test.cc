// Hugging Face folders that are written (recipes/model_folder.h).
#include <gtest/gtest.h>
#include <vernier/recipes/model_folder.h>
#include <vernier/recipes/recipe.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/temporary_folder.h>
#include <vernier/tests/tiny_bert.h>

#include <set>

namespace vernier {
namespace {

namespace fs = std::filesystem;
using testing::message_of;
using testing::read_bytes;
using testing::write_bytes;
using Json = nlohmann::ordered_json;

class ModelFolderTest : public ::testing::Test {
 protected:
  void SetUp() override { testing::write_bert(source); }

  static Json config_of(const fs::path& path) {
    return Json::parse(read_bytes(path / "config.json"));
  }
  static std::set<std::string> files_of(const fs::path& path) {
    std::set<std::string> names;
    for (const auto& entry : fs::directory_iterator(path))
      names.insert(entry.path().filename().string());
    return names;
  }

  testing::TemporaryFolder folder;
  const fs::path source = folder / "model", out = folder / "out";
};

TEST_F(ModelFolderTest, AFolderWrittenLoadsAsTheSameModel) {
  const auto model = load_text_model(source);
  save_hugging_face(*model, source, out);
  EXPECT_EQ(load_text_model(out)->info.fingerprint, model->info.fingerprint);
  EXPECT_EQ(files_of(out), (std::set<std::string>{"config.json", "model.safetensors"}));
  // The configuration is the source's, and says the dtype.
  Json config = config_of(out);
  EXPECT_EQ(config["dtype"], "float32");
  config.erase("dtype");
  EXPECT_EQ(config, config_of(source));
  EXPECT_EQ(SafetensorsFile::open(out / "model.safetensors").metadata().at("format"), "pt");
}

TEST_F(ModelFolderTest, WritesTheParametersThatTheModelHasNow) {
  const auto model = load_text_model(source);
  {
    const torch::NoGradGuard no_grad;
    for (auto& parameter : model->parameters()) parameter.mul_(1.5);
  }
  save_hugging_face(*model, source, out);
  const auto again = load_text_model(out);
  for (const auto& item : model->named_parameters())
    EXPECT_TRUE(again->named_parameters()[item.key()].equal(item.value())) << item.key();
}

TEST_F(ModelFolderTest, DtypeIsKeptOrChanged) {
  testing::NamedTensors tensors = testing::random_tensors(testing::tiny_config());
  for (auto& [name, tensor] : tensors) tensor = tensor.to(torch::kBFloat16);
  tensors.emplace_back("embeddings.position_ids", torch::arange(4));
  nlohmann::json config = testing::tiny_config();
  config["torch_dtype"] = "bfloat16";
  testing::write_bert(source, config, tensors);
  const auto model = load_text_model(source);
  const auto dtypes = [&](std::optional<torch::Dtype> dtype, const char* name) {
    save_hugging_face(*model, source, folder / name, dtype);
    const Json written = config_of(folder / name);
    EXPECT_FALSE(written.contains("dtype"));  // the field that was there says it
    const SafetensorsFolder weights = SafetensorsFolder::open(folder / name);
    EXPECT_EQ(weights.info("embeddings.position_ids").dtype, "I64");
    return std::pair(written["torch_dtype"].get<std::string>(),
                     weights.info("encoder.layer.0.output.dense.weight").dtype);
  };
  EXPECT_EQ(dtypes(std::nullopt, "same"), std::pair(std::string("bfloat16"), std::string("BF16")));
  EXPECT_EQ(load_text_model(folder / "same")->info.fingerprint, model->info.fingerprint);
  EXPECT_EQ(dtypes(torch::kHalf, "half"), std::pair(std::string("float16"), std::string("F16")));
  EXPECT_EQ(dtypes(torch::kFloat, "full"), std::pair(std::string("float32"), std::string("F32")));
  EXPECT_EQ(load_text_model(folder / "full")->info.fingerprint, model->info.fingerprint);
}

TEST_F(ModelFolderTest, NamesAndTensorsOfTheSourceAreKept) {
  testing::NamedTensors tensors;
  for (const auto& [name, tensor] : testing::random_tensors(testing::tiny_config()))
    tensors.emplace_back("bert." + name, tensor);
  tensors.emplace_back("cls.predictions.bias", torch::ones({3}));
  testing::write_bert(source, testing::tiny_config(), tensors);
  const auto model = load_text_model(source);
  save_hugging_face(*model, source, out);
  const SafetensorsFolder weights = SafetensorsFolder::open(out);
  EXPECT_EQ(weights.names(), SafetensorsFolder::open(source).names());
  for (const auto& [name, tensor] : tensors) EXPECT_TRUE(weights.tensor(name).equal(tensor));
}

TEST_F(ModelFolderTest, WhatBelongsToTheModelGoesAlong) {
  const std::vector<std::string> along = {
      "tokenizer.json", "tokenizer_config.json",  "vocab.txt", "merges.txt",
      "spiece.model",   "generation_config.json", "LICENSE",   "chat_template.jinja"};
  for (const std::string& name : along) write_bytes(source / name, name);
  for (const char* name :
       {"pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.json",
        "model.onnx", "tf_model.h5", ".gitattributes"})
    write_bytes(source / name, "old");
  fs::create_directories(source / "1_Pooling");
  write_bytes(source / "1_Pooling/config.json", "{}");
  fs::create_directories(source / "onnx");
  fs::create_symlink("/dev/null", source / "nowhere.json");
  const auto model = load_text_model(source);
  save_hugging_face(*model, source, out);
  std::set<std::string> expected(along.begin(), along.end());
  expected.insert({"config.json", "model.safetensors", "1_Pooling"});
  EXPECT_EQ(files_of(out), expected);
  for (const std::string& name : along) EXPECT_EQ(read_bytes(out / name), name);
  EXPECT_EQ(read_bytes(out / "1_Pooling/config.json"), "{}");
}

TEST_F(ModelFolderTest, FromACheckpointWithoutItsFolder) {
  const auto model = load_text_model(source);
  apply_recipe(*model, load_recipe("w8a8-dynamic"));
  calibrate_layers(*model, {});
  save_checkpoint(*model, model->info, folder / "m.h5");
  const auto quantized = load_text_model(folder / "m.h5");
  save_hugging_face(*quantized, {}, out);
  const auto real = load_text_model(out);
  for (const auto& item : real->named_parameters())
    EXPECT_TRUE(quantized->named_parameters()[item.key()].equal(item.value())) << item.key();
}

TEST_F(ModelFolderTest, LearnedScalesAreNoTensorsOfTheFolder) {
  const auto model = load_text_model(source);
  apply_recipe(*model, load_recipe("qat-w4a4"));
  save_hugging_face(*model, source, out);
  save_hugging_face(*model, {}, folder / "alone");
  EXPECT_EQ(SafetensorsFolder::open(out).names(), SafetensorsFolder::open(source).names());
  EXPECT_EQ(SafetensorsFolder::open(folder / "alone").names(),
            SafetensorsFolder::open(source).names());
}

TEST_F(ModelFolderTest, RefusesWhatCannotBeWritten) {
  const auto model = load_text_model(source);
  const auto saving = [&](const fs::path& from, std::optional<torch::Dtype> dtype = {}) {
    return message_of([&] { save_hugging_face(*model, from, out, dtype); });
  };
  EXPECT_CONTAINS(message_of([&] { save_hugging_face(*model, source, source); }), "not empty");
  EXPECT_CONTAINS(saving(folder / "no"), "is not a folder");

  const std::string name = "encoder.layer.0.output.dense.weight";
  testing::NamedTensors tensors = testing::random_tensors(testing::tiny_config());
  testing::tensor_of(tensors, name) = torch::ones({3, 3});
  testing::write_bert(folder / "other", testing::tiny_config(), tensors);
  EXPECT_CONTAINS(saving(folder / "other"), "tensor '" + name + "' has shape [3, 3]");
  std::erase_if(tensors, [&](const auto& item) { return item.first == name; });
  testing::write_bert(folder / "other", testing::tiny_config(), tensors);
  EXPECT_CONTAINS(saving(folder / "other"), "has no tensor '" + name + "'");

  {
    const torch::NoGradGuard no_grad;
    model->named_parameters()[name][0][0] = 1e5;
  }
  EXPECT_CONTAINS(saving(source, torch::kHalf), "tensor '" + name + "' overflows float16");
  EXPECT_EQ(saving(source, torch::kBFloat16), "");
  EXPECT_EQ(files_of(folder.path()), (std::set<std::string>{"model", "other", "out"}));
  EXPECT_CONTAINS(message_of([] { dtype_from_name("int8"); }), "use float32, float16 or bfloat16");
}

}  // namespace
}  // namespace vernier
