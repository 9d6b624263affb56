#include <vernier/export/safetensors.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/temporary_folder.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace vernier {
namespace {

namespace fs = std::filesystem;
using testing::message_of;
using testing::read_bytes;
using testing::TemporaryFolder;
using testing::write_bytes;

/// A file of this header and data, its length in front.
std::string file_of(const std::string& header, const std::string& data = "") {
  const uint64_t bytes = header.size();
  return std::string(reinterpret_cast<const char*>(&bytes), 8) + header + data;
}

/// One F32 tensor "x" with the given fields.
std::string tensor_header(const std::string& shape, const std::string& offsets,
                          const std::string& dtype = "F32") {
  return R"({"x":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets +
         "}}";
}

class SafetensorsTest : public ::testing::Test {
 protected:
  /// Why a file of these bytes does not open; empty when it does.
  std::string opening(const std::string& bytes) {
    write_bytes(folder / "f.safetensors", bytes);
    return message_of([&] { SafetensorsFile::open(folder / "f.safetensors"); });
  }

  TemporaryFolder folder;
};

TEST_F(SafetensorsTest, RoundTripOfEveryDtype) {
  const std::vector<at::ScalarType> types{
      at::kDouble,      at::kFloat,  at::kHalf,   at::kBFloat16, at::kFloat8_e4m3fn,
      at::kFloat8_e5m2, at::kLong,   at::kInt,    at::kShort,    at::kChar,
      at::kUInt64,      at::kUInt32, at::kUInt16, at::kByte,     at::kBool};
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const at::ScalarType type : types)
    tensors.emplace_back(c10::toString(type), at::arange(3).sub(1).abs().view({3, 1}).to(type));
  tensors.emplace_back("scalar", at::scalar_tensor(2.5));
  tensors.emplace_back("none", at::empty({0, 4}));
  tensors.emplace_back("transposed", at::arange(6).view({2, 3}).t());
  tensors.emplace_back("layer.0/\"quoted\" \xc3\xa4", at::ones({1}));
  write_safetensors(folder / "f", tensors, {{"format", "pt"}, {"note", "a \"b\"\n"}});
  const SafetensorsFile file = SafetensorsFile::open(folder / "f");
  EXPECT_EQ(file.names().size(), tensors.size());
  EXPECT_EQ(file.metadata().at("note"), "a \"b\"\n");
  EXPECT_EQ(file.metadata().at("format"), "pt");
  for (const auto& [name, tensor] : tensors) {
    ASSERT_TRUE(file.contains(name)) << name;
    const at::Tensor read = file.tensor(name);
    EXPECT_EQ(read.scalar_type(), tensor.scalar_type()) << name;
    EXPECT_EQ(read.sizes(), tensor.sizes()) << name;
    const at::Tensor wanted = tensor.contiguous();
    EXPECT_EQ(file.info(name).shape, tensor.sizes().vec()) << name;
    if (tensor.numel() == 0) continue;
    EXPECT_EQ(std::memcmp(read.const_data_ptr(), wanted.const_data_ptr(), wanted.nbytes()), 0);
    // All written tensors are aligned, so all are views of the file.
    EXPECT_EQ(read.const_data_ptr(), file.tensor(name).const_data_ptr()) << name;
  }
  EXPECT_EQ(file.info("BFloat16").dtype, "BF16");
  EXPECT_EQ(file.info("Char").dtype, "I8");
  EXPECT_FALSE(file.contains("no"));
  EXPECT_CONTAINS(message_of([&] { file.tensor("no"); }), "has no tensor no");
  EXPECT_CONTAINS(message_of([&] { file.info("no"); }), "has no tensor no");
  uint64_t header = 0;
  std::memcpy(&header, read_bytes(folder / "f").data(), 8);
  EXPECT_EQ(header % 8, 0u);
}

TEST_F(SafetensorsTest, TensorsKeepTheMappingAndSpareTheFile) {
  write_safetensors(folder / "f", {{"x", at::ones({1000})}});
  const std::string before = read_bytes(folder / "f");
  std::optional<SafetensorsFile> file = SafetensorsFile::open(folder / "f");
  at::Tensor x = file->tensor("x");
  const at::Tensor same = file->tensor("x");
  file.reset();
  x.add_(1);
  EXPECT_EQ(x.sum().item<float>(), 2000);
  EXPECT_EQ(same.sum().item<float>(), 2000);
  EXPECT_EQ(read_bytes(folder / "f"), before);
}

TEST_F(SafetensorsTest, CopiesUnalignedData) {
  std::string data(1 + 8, '\0');
  const float two[2] = {1.5f, -2};
  std::memcpy(data.data() + 1, two, 8);
  std::string header = R"({"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]},)"
                       R"("b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}})";
  header.append((8 - header.size() % 8) % 8, ' ');
  EXPECT_EQ(opening(file_of(header, data)), "");
  const SafetensorsFile file = SafetensorsFile::open(folder / "f.safetensors");
  EXPECT_EQ(file.names(), (std::vector<std::string>{"a", "b"}));
  EXPECT_TRUE(at::equal(file.tensor("b"), at::tensor({1.5f, -2.0f})));
}

TEST_F(SafetensorsTest, RefusesFilesThatAreNone) {
  const auto open = [&](const char* name) {
    return message_of([&] { SafetensorsFile::open(folder / name); });
  };
  EXPECT_CONTAINS(open("no"), "no: the file does not exist");
  fs::create_directory(folder / "folder");
  EXPECT_CONTAINS(open("folder"), "not a regular file");
  ASSERT_EQ(mkfifo((folder / "pipe").c_str(), 0600), 0);
  EXPECT_CONTAINS(open("pipe"), "not a regular file");
  EXPECT_CONTAINS(opening(""), "has 0 bytes, too few");
  EXPECT_CONTAINS(opening("1234567"), "has 7 bytes, too few");
  EXPECT_CONTAINS(opening(std::string("\3\0\0\0\0\0\0\0{}", 10)), "claims a header of 3 bytes");
  EXPECT_CONTAINS(opening(std::string(8, '\xff') + "{}"), "claims a header of 184467440737095516");
  EXPECT_CONTAINS(opening(std::string(8, '\0')), "not a JSON object");
  EXPECT_CONTAINS(opening("PK\3\4 a zip archive, say"), "not a safetensors file");
  EXPECT_EQ(opening(file_of("{}")), "");
  EXPECT_EQ(opening(file_of("{}   ")), "");
  // Over 100 MB of header: a sparse file, so that it costs no disk.
  const uint64_t large = 100'000'001;
  write_bytes(folder / "large", std::string(reinterpret_cast<const char*>(&large), 8) + "{");
  fs::resize_file(folder / "large", 8 + large);
  EXPECT_CONTAINS(open("large"), "the limit is 100000000");
}

TEST_F(SafetensorsTest, RefusesBadJson) {
  const auto header = [&](const std::string& text) { return opening(file_of(text)); };
  EXPECT_CONTAINS(header("[]"), "not a JSON object");
  EXPECT_CONTAINS(header(" {}"), "not a JSON object");
  EXPECT_CONTAINS(header("{"), "not valid JSON");
  EXPECT_CONTAINS(header("{}}"), "not valid JSON");
  EXPECT_CONTAINS(header("{\"a\" 1}"), "not valid JSON");
  EXPECT_CONTAINS(header("{\"\xff\xfe\":1}"), "not valid JSON");
  EXPECT_CONTAINS(header("{\"a\n\":1}"), "not valid JSON");
  EXPECT_CONTAINS(header("{\"" + std::string(100000, 'a')), "not valid JSON");
  EXPECT_CONTAINS(header("{\"a\":1}"), "a number where none belongs at a");
  EXPECT_CONTAINS(header("{\"a\":null}"), "a null at a");
  EXPECT_CONTAINS(header("{\"a\":\"b\"}"), "text where none belongs");
  EXPECT_CONTAINS(header("{\"a\":[1]}"), "a list where none belongs");
  EXPECT_CONTAINS(header("{\"a\":{}}"), "lacks dtype");
  EXPECT_CONTAINS(header("{\"a\":{\"b\":1}}"), "unknown field b at a");
  EXPECT_CONTAINS(header("{\"a\":{\"dtype\":{\"b\":1}}}"), "nested too deep");
  EXPECT_CONTAINS(header("{\"a\":{\"shape\":[[1]]}}"), "a list where none belongs");
  EXPECT_CONTAINS(header("{\"a\":{\"dtype\":[1]}}"), "a list where none belongs");
  std::string deep = "{\"a\":";
  for (int i = 0; i < 1000000; ++i) deep += "{\"a\":";
  EXPECT_CONTAINS(header(deep), "unknown field a");
  EXPECT_CONTAINS(header("{\"a\":{\"shape\":" + std::string(1000000, '[')), "a list where none");
  EXPECT_CONTAINS(header("{\"__metadata__\":{\"a\":1}}"), "a number where none belongs");
  EXPECT_CONTAINS(header("{\"__metadata__\":{\"a\":{}}}"), "nested too deep");
  EXPECT_CONTAINS(header("{\"__metadata__\":{\"a\":\"1\",\"a\":\"2\"}}"), "metadata a twice");
  EXPECT_CONTAINS(header("{\"__metadata__\":{},\"__metadata__\":{}}"), "__metadata__ twice");
  EXPECT_CONTAINS(header("{\"__metadata__\":\"a\"}"), "text where none belongs");
  EXPECT_EQ(header("{\"__metadata__\":{\"a\":\"1\"}}"), "");
}

TEST_F(SafetensorsTest, RefusesBadTensors) {
  const std::string four(4, '\0');
  EXPECT_EQ(opening(file_of(tensor_header("[1]", "[0,4]"), four)), "");
  EXPECT_EQ(opening(file_of(tensor_header("[]", "[0,4]"), four)), "");
  EXPECT_EQ(opening(file_of(tensor_header("[0,7]", "[0,0]"))), "");
  const auto bad = [&](const std::string& shape, const std::string& offsets,
                       const std::string& dtype = "F32") {
    return opening(file_of(tensor_header(shape, offsets, dtype), four));
  };
  EXPECT_CONTAINS(bad("[1]", "[0,4]", "F31"), "unknown dtype F31 at x");
  EXPECT_CONTAINS(bad("[1]", "[0,4]", "f32"), "unknown dtype");
  EXPECT_CONTAINS(bad("[-1]", "[0,4]"), "a negative number at x");
  EXPECT_CONTAINS(bad("[1.0]", "[0,4]"), "no 64-bit integer");
  EXPECT_CONTAINS(bad("[1e400]", "[0,4]"), "");
  EXPECT_NE(bad("[1e400]", "[0,4]"), "");
  EXPECT_CONTAINS(bad("[99999999999999999999]", "[0,4]"), "no 64-bit integer");
  EXPECT_CONTAINS(bad("[18446744073709551615]", "[0,4]"), "beyond 2^63");
  EXPECT_CONTAINS(bad("[true]", "[0,4]"), "a bool");
  EXPECT_CONTAINS(bad("[\"1\"]", "[0,4]"), "text where none belongs");
  EXPECT_CONTAINS(bad("1", "[0,4]"), "a number where none belongs");
  EXPECT_CONTAINS(bad("[4294967296,4294967296]", "[0,4]"), "more than 2^63 bytes");
  EXPECT_CONTAINS(bad("[0,4611686018427387904,4]", "[0,4]"), "more than 2^63 bytes");
  EXPECT_CONTAINS(bad("[4611686018427387904]", "[0,4]"), "more than 2^63 bytes");
  EXPECT_CONTAINS(bad("[1152921504606846976]", "[0,4]"), "its shape and dtype need");
  std::string ones = "[1";
  for (int i = 0; i < 64; ++i) ones += ",1";
  EXPECT_CONTAINS(bad(ones + "]", "[0,4]"), "more than 64 dimensions");
  EXPECT_CONTAINS(bad("[2]", "[0,4]"), "has 4 bytes of data, its shape and dtype need 8");
  EXPECT_CONTAINS(bad("[1]", "[0,5]"), "is at bytes 0 to 5 of 4");
  EXPECT_CONTAINS(bad("[1]", "[4,0]"), "is at bytes 4 to 0");
  EXPECT_CONTAINS(bad("[1]", "[1152921504606846976,1152921504606846980]"), "of 4");
  EXPECT_CONTAINS(bad("[1]", "[18446744073709551612,18446744073709551616]"), "no 64-bit integer");
  EXPECT_CONTAINS(bad("[1]", "[0]"), "not two data_offsets");
  EXPECT_CONTAINS(bad("[1]", "[0,4,8]"), "more than two data_offsets");
  EXPECT_CONTAINS(bad("[1]", "[0,-4]"), "a negative number");
  EXPECT_CONTAINS(bad("[0]", "[0,0]"), "has 4 bytes of data, its tensors only 0");
  EXPECT_CONTAINS(opening(file_of(tensor_header("[1]", "[0,4]"), four + "x")),
                  "has 5 bytes of data, its tensors only 4");
  EXPECT_CONTAINS(opening(file_of(tensor_header("[1]", "[1,5]"), four + "x")), "neither overlap");
  EXPECT_CONTAINS(opening(file_of(tensor_header("[1]", "[0,4]"), "abc")), "cut short");
  EXPECT_CONTAINS(
      opening(file_of(R"({"x":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}})")),
      "dtype twice at x");
  const std::string x = R"("x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]})";
  EXPECT_CONTAINS(opening(file_of("{" + x + "," + x + "}", "ab")), "the name x twice");
  const auto two = [&](const std::string& offsets) {
    return opening(file_of(
        "{" + x + R"(,"y":{"dtype":"U8","shape":[2],"data_offsets":)" + offsets + "}}", four));
  };
  EXPECT_EQ(two("[2,4]"), "");
  EXPECT_CONTAINS(two("[1,3]"), "neither overlap");
  EXPECT_CONTAINS(two("[0,2]"), "neither overlap");
}

TEST_F(SafetensorsTest, MessagesOfHostileNamesAreOneShortLine) {
  const std::string name = "a\\n\\u001b[31m" + std::string(5000, 'n');
  const std::string message = opening(file_of("{\"" + name + "\":1}"));
  EXPECT_CONTAINS(message, "a??[31mnnn");
  EXPECT_LT(message.size(), 500u);
}

TEST_F(SafetensorsTest, RefusesBoolsThatAreNone) {
  EXPECT_EQ(opening(file_of(tensor_header("[3]", "[0,3]", "BOOL"), std::string("\0\1\2", 3))), "");
  const SafetensorsFile file = SafetensorsFile::open(folder / "f.safetensors");
  EXPECT_CONTAINS(message_of([&] { file.tensor("x"); }), "bytes other than 0 and 1");
}

TEST_F(SafetensorsTest, DamagedHeadersOpenOrThrow) {
  write_safetensors(folder / "a", {{"x", at::ones({2, 3})}, {"y.z", at::ones({3}, at::kChar)}},
                    {{"format", "pt"}});
  const std::string bytes = read_bytes(folder / "a");
  std::mt19937 random(1);
  int opened = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string damaged = bytes;
    for (unsigned changes = 1 + random() % 4; changes > 0; --changes) {
      char& byte = damaged[random() % damaged.size()];
      if (random() % 2 == 0)
        byte = static_cast<char>(byte ^ (1u << (random() % 8)));
      else
        byte = "0123456789{}[]\",:-.eE \x80\xff"[random() % 24];
    }
    if (i % 8 == 0) damaged.resize(random() % damaged.size());
    write_bytes(folder / "b", damaged);
    message_of([&] {
      const SafetensorsFile file = SafetensorsFile::open(folder / "b");
      ++opened;
      for (const std::string& name : file.names()) {
        const at::Tensor tensor = file.tensor(name);
        EXPECT_LE(tensor.nbytes(), bytes.size());
        std::string copy(static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes());
      }
    });
  }
  EXPECT_GT(opened, 100);
  EXPECT_LT(opened, 19000);
}

TEST_F(SafetensorsTest, FolderOfOneFile) {
  write_safetensors(folder / "model.safetensors", {{"b", at::ones({2})}, {"a", at::zeros({1})}});
  const SafetensorsFolder model = SafetensorsFolder::open(folder.path());
  EXPECT_EQ(model.names(), (std::vector<std::string>{"a", "b"}));
  EXPECT_TRUE(model.contains("a"));
  EXPECT_FALSE(model.contains("c"));
  EXPECT_EQ(model.info("b").shape, std::vector<int64_t>{2});
  EXPECT_TRUE(at::equal(model.tensor("b"), at::ones({2})));
  EXPECT_EQ(model.files().size(), 1u);
  EXPECT_CONTAINS(message_of([&] { model.tensor("c"); }), "has no tensor c");
}

class SafetensorsFolderTest : public SafetensorsTest {
 protected:
  void SetUp() override {
    fs::create_directory(folder / "m");
    write_safetensors(folder / "m/one", {{"a", at::ones({1})}, {"extra", at::ones({2})}});
    write_safetensors(folder / "m/two", {{"b", at::zeros({1})}});
    write_safetensors(folder / "outside", {{"b", at::zeros({1})}});
  }

  std::string opening_index(const std::string& text) {
    write_bytes(folder / "m/model.safetensors.index.json", text);
    return message_of([&] { SafetensorsFolder::open(folder / "m"); });
  }
};

TEST_F(SafetensorsFolderTest, OpensShards) {
  EXPECT_EQ(opening_index(R"({"metadata":{"total_size":8,"a":[{"b":null}],"c":-1.5,"d":true},
                              "weight_map":{"a":"one","b":"two"}})"),
            "");
  const SafetensorsFolder model = SafetensorsFolder::open(folder / "m");
  EXPECT_EQ(model.names(), (std::vector<std::string>{"a", "b", "extra"}));
  EXPECT_EQ(model.files().size(), 2u);
  EXPECT_TRUE(at::equal(model.tensor("a"), at::ones({1})));
  EXPECT_TRUE(at::equal(model.tensor("b"), at::zeros({1})));
}

TEST_F(SafetensorsFolderTest, FollowsLinksAsTheHubCacheHasThem) {
  fs::rename(folder / "m/two", folder / "blob");
  fs::create_symlink("../blob", folder / "m/two");
  EXPECT_EQ(opening_index(R"({"weight_map":{"a":"one","b":"two"}})"), "");
}

TEST_F(SafetensorsFolderTest, RefusesBadFoldersAndIndices) {
  EXPECT_CONTAINS(message_of([&] { SafetensorsFolder::open(folder / "m"); }), "has neither model");
  EXPECT_CONTAINS(message_of([&] { SafetensorsFolder::open(folder / "no"); }), "is not a folder");
  const auto map = [&](const std::string& weights) {
    return opening_index(R"({"weight_map":{)" + weights + "}}");
  };
  EXPECT_CONTAINS(map(R"("a":"one","b":"three")"), "the shard three is missing");
  EXPECT_CONTAINS(map(R"("a":"one","c":"two")"), "tensor c is not in two");
  EXPECT_CONTAINS(map(R"("a":"two","b":"two","extra":"one")"), "tensor a is not in two");
  EXPECT_CONTAINS(map(R"("a":"one","b":"../outside")"), "outside the folder");
  EXPECT_CONTAINS(map(R"("a":"one","b":"x/../../outside")"), "outside the folder");
  EXPECT_CONTAINS(map("\"b\":\"" + (folder / "outside").string() + "\""), "outside the folder");
  EXPECT_CONTAINS(map(R"("b":"")"), "outside the folder");
  EXPECT_CONTAINS(map(R"("b":".")"), "not a regular file");
  EXPECT_CONTAINS(map(R"("b":"two\u0000")"), "outside the folder");
  EXPECT_CONTAINS(map(R"("a":"one","a":"one")"), "names the tensor a twice");
  EXPECT_CONTAINS(map(R"("a":"one","b":"two","c":["d"])"), "not names to files");
  EXPECT_CONTAINS(map(R"("a":1)"), "not names to files");
  EXPECT_CONTAINS(map(R"("a":{})"), "not names to files");
  EXPECT_CONTAINS(map(""), "no weight_map, or an empty one");
  EXPECT_CONTAINS(opening_index("{}"), "no weight_map");
  EXPECT_CONTAINS(opening_index(""), "not valid JSON");
  EXPECT_CONTAINS(opening_index("[]"), "not a JSON object");
  EXPECT_CONTAINS(opening_index("3"), "not a JSON object");
  EXPECT_CONTAINS(opening_index(R"({"weight_map":3})"), "not names to files");
  EXPECT_CONTAINS(opening_index(R"({"weight_map":{"a":"one"},"weight_map":{"a":"one"}})"),
                  "more than one weight_map");
  EXPECT_CONTAINS(opening_index(R"({"weight_map":{"a":"one"}} x)"), "not valid JSON");
  EXPECT_CONTAINS(opening_index("{\"x\":" + std::string(1000000, '[')), "nested too deep");
  write_safetensors(folder / "m/two", {{"a", at::zeros({1})}, {"b", at::zeros({1})}});
  EXPECT_CONTAINS(map(R"("a":"one","b":"two")"), "is also in");
  write_bytes(folder / "m/two", "damaged");
  EXPECT_CONTAINS(map(R"("a":"one","b":"two")"), "two: has 7 bytes, too few");
}

TEST_F(SafetensorsTest, RefusesToWriteWhatCannotBeRead) {
  const at::Tensor one = at::ones({1});
  const fs::path path = folder / "f";
  const auto writing = [&](const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                           const std::map<std::string, std::string>& metadata = {}) {
    return message_of([&] { write_safetensors(path, tensors, metadata); });
  };
  EXPECT_CONTAINS(writing({{"a", one}, {"a", one}}), "tensor a: the name is given twice");
  EXPECT_CONTAINS(writing({{"__metadata__", one}}), "reserved");
  EXPECT_CONTAINS(writing({{"\xff", one}}), "not UTF-8");
  EXPECT_CONTAINS(writing({{"a", one}}, {{"k", "\xff"}}), "the metadata value ? is not UTF-8");
  EXPECT_CONTAINS(writing({{"a", at::Tensor()}}), "undefined");
  EXPECT_CONTAINS(writing({{"a", one.to_sparse()}}), "sparse");
  EXPECT_CONTAINS(writing({{"a", one.to(at::kMeta)}}), "no data");
  EXPECT_CONTAINS(writing({{"a", one.to(at::kComplexFloat)}}), "no dtype for ComplexFloat");
  EXPECT_FALSE(fs::exists(path));
  EXPECT_CONTAINS(message_of([&] {
                    write_safetensors(folder / "no/f", {{"a", one}});
                  }),
                  "does not exist");
  EXPECT_EQ(writing({}), "");
  EXPECT_TRUE(SafetensorsFile::open(path).names().empty());
}

TEST_F(SafetensorsTest, StreamsTensorsAndHoldsThemToWhatWasSaid) {
  int made = 0;
  const auto make = [&] {
    ++made;
    return at::arange(6, at::kFloat).view({3, 2}).t();
  };
  stream_safetensors(folder / "f", {{"lazy", at::kFloat, {2, 3}, make}, {"there", at::ones({2})}});
  EXPECT_EQ(made, 1);
  const SafetensorsFile file = SafetensorsFile::open(folder / "f");
  EXPECT_TRUE(file.tensor("lazy").equal(make()));
  const auto streaming = [&](at::ScalarType dtype, std::vector<int64_t> shape) {
    return message_of([&] { stream_safetensors(folder / "bad", {{"x", dtype, shape, make}}); });
  };
  EXPECT_CONTAINS(streaming(at::kHalf, {2, 3}), "tensor x became Float [2, 3], not Half [2, 3]");
  EXPECT_CONTAINS(streaming(at::kFloat, {3, 2}), "tensor x became");
  EXPECT_EQ(folder.entries(), 1u);
}

TEST_F(SafetensorsTest, WritesShardsThatTheFolderReads) {
  const at::Tensor small = at::arange(10, at::kFloat), large = at::arange(30, at::kFloat);
  const std::vector<TensorToWrite> tensors = {
      {"d", small}, {"b", large}, {"a", small}, {"c", small.to(at::kHalf)}, {"e", small}};
  const auto check = [&](const fs::path& path, const std::vector<std::string>& files) {
    fs::create_directory(path);
    write_safetensors_folder(path, tensors, 100);
    for (const std::string& name : files) EXPECT_TRUE(fs::exists(path / name)) << name;
    const SafetensorsFolder read = SafetensorsFolder::open(path);
    EXPECT_EQ(read.names(), (std::vector<std::string>{"a", "b", "c", "d", "e"}));
    for (const TensorToWrite& tensor : tensors)
      EXPECT_TRUE(read.tensor(tensor.name).equal(tensor.make())) << tensor.name;
    for (const SafetensorsFile& file : read.files()) EXPECT_EQ(file.metadata().at("format"), "pt");
  };
  // 40 bytes; 120, more than a shard and so alone; 20 + 40 + 40 fill the third to the brim.
  check(folder / "shards", {"model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
                            "model-00003-of-00003.safetensors", "model.safetensors.index.json"});
  EXPECT_CONTAINS(read_bytes(folder / "shards/model.safetensors.index.json"),
                  "\"total_size\": 260");
  fs::create_directory(folder / "one");
  write_safetensors_folder(folder / "one", tensors);
  EXPECT_EQ(SafetensorsFolder::open(folder / "one").files().size(), 1u);
  EXPECT_FALSE(fs::exists(folder / "one/model.safetensors.index.json"));
}

TEST_F(SafetensorsTest, AFullDiskLeavesTheOldFile) {
  write_safetensors(folder / "f", {{"a", at::ones({1})}});
  const std::string before = read_bytes(folder / "f");
  const at::Tensor large = at::ones({100000});
  const pid_t child = fork();
  if (child == 0) {
    signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{10000, 10000};
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0) _exit(2);
    const std::string message = message_of([&] {
      write_safetensors(folder / "f", {{"a", large}});
    });
    _exit(message.find("larger than") == std::string::npos ? 1 : 0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(read_bytes(folder / "f"), before);
  EXPECT_EQ(folder.entries(), 1u);
}

}  // namespace
}  // namespace vernier
