#include <gtest/gtest.h>
#include <hdf5.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vernier/calibration/atomic_file.h>
#include <vernier/calibration/hdf5.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/temporary_folder.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace vernier::hdf5 {
namespace {

namespace fs = std::filesystem;
using vernier::testing::message_of;
using vernier::testing::read_bytes;
using vernier::testing::TemporaryFolder;
using vernier::testing::write_bytes;

/// Builds a file with the C library, for what File does not write.
void build(const fs::path& path, const std::function<void(hid_t)>& fill) {
  const hid_t file = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  ASSERT_GE(file, 0);
  fill(file);
  ASSERT_GE(H5Fclose(file), 0);
}

/// A dataset of the C library; `data` may be null to write nothing.
void add(hid_t file, const char* name, hid_t type, const std::vector<hsize_t>& shape,
         const void* data, const std::function<void(hid_t)>& creation = {},
         const std::vector<hsize_t>& most = {}) {
  const hid_t space = shape.empty() ? H5Screate(H5S_SCALAR)
                                    : H5Screate_simple(static_cast<int>(shape.size()), shape.data(),
                                                       most.empty() ? nullptr : most.data());
  const hid_t properties = H5Pcreate(H5P_DATASET_CREATE);
  if (creation) creation(properties);
  const hid_t dataset = H5Dcreate2(file, name, type, space, H5P_DEFAULT, properties, H5P_DEFAULT);
  ASSERT_GE(dataset, 0);
  if (data != nullptr) {
    ASSERT_GE(H5Dwrite(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data), 0);
  }
  H5Dclose(dataset);
  H5Pclose(properties);
  H5Sclose(space);
}

/// Writes one file with everything File writes.
void write_everything(const fs::path& path) {
  File file = File::create(path);
  file.write("layers/encoder.layer.0.query/codes", std::vector<int8_t>{-127, 0, 127, 5, 6, 7},
             {2, 3});
  file.write("layers/encoder.layer.0.query/scale", std::vector<float>{0.5f, 1e-40f, 3e38f}, {3});
  file.write("bins", std::vector<int64_t>{1, -2, int64_t{1} << 60}, {3});
  file.write("bytes", std::vector<uint8_t>{1, 2, 255}, {3, 1});
  file.write("accumulators", std::vector<int32_t>{1 << 30, -5}, {1, 2});
  file.write("scalar", std::vector<double>{3.25}, {});
  file.write("none", std::vector<int32_t>{}, {0, 5});
  file.write_text("config", "{\"name\": \"\u00e4\"}");
  file.write_text("empty", "");
  file.set_attribute("", "format", "vernier \u00fc");
  file.set_attribute("/", "version", 7);
  file.set_attribute("scalar", "alpha", 0.25);
  file.set_attribute("layers", "yes", true);
  file.set_attribute("layers", "no", false);
  file.set_attribute("layers", "empty", "");
  file.close();
}

TEST(Hdf5, RoundTrip) {
  TemporaryFolder folder;
  write_everything(folder / "a.h5");
  const File file = File::open(folder / "a.h5");
  EXPECT_EQ(file.path(), folder / "a.h5");
  const std::string query = "layers/encoder.layer.0.query";
  EXPECT_EQ(file.read<int8_t>(query + "/codes"), (std::vector<int8_t>{-127, 0, 127, 5, 6, 7}));
  EXPECT_EQ(file.read<float>("/" + query + "/scale/"), (std::vector<float>{0.5f, 1e-40f, 3e38f}));
  EXPECT_EQ(file.read<int64_t>("bins"), (std::vector<int64_t>{1, -2, int64_t{1} << 60}));
  EXPECT_EQ(file.read<uint8_t>("bytes"), (std::vector<uint8_t>{1, 2, 255}));
  EXPECT_EQ(file.read<int32_t>("accumulators"), (std::vector<int32_t>{1 << 30, -5}));
  EXPECT_EQ(file.read<double>("scalar"), (std::vector<double>{3.25}));
  EXPECT_TRUE(file.read<int32_t>("none").empty());
  EXPECT_EQ(file.read_text("config"), "{\"name\": \"\u00e4\"}");
  EXPECT_EQ(file.read_text("empty"), "");

  EXPECT_EQ(file.info(query + "/codes").type, ElementType::int8);
  EXPECT_EQ(file.info(query + "/codes").shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(file.info(query + "/codes").size(), 6);
  EXPECT_EQ(file.info("scalar").type, ElementType::float64);
  EXPECT_TRUE(file.info("scalar").shape.empty());
  EXPECT_EQ(file.info("none").shape, (std::vector<int64_t>{0, 5}));
  EXPECT_EQ(file.info("config").type, ElementType::text);

  EXPECT_EQ(file.attribute_string("/", "format"), "vernier \u00fc");
  EXPECT_EQ(file.attribute_int("", "version"), 7);
  EXPECT_EQ(file.attribute_double("scalar", "alpha"), 0.25);
  EXPECT_TRUE(file.attribute_bool("layers", "yes"));
  EXPECT_FALSE(file.attribute_bool("layers", "no"));
  EXPECT_EQ(file.attribute_string("layers", "empty"), "");
  EXPECT_TRUE(file.has_attribute("layers", "yes"));
  EXPECT_FALSE(file.has_attribute("layers", "maybe"));
}

TEST(Hdf5, EqualContentsAreEqualBytes) {
  TemporaryFolder folder;
  write_everything(folder / "a.h5");
  sleep(1);  // A time stamp would have seconds.
  write_everything(folder / "b.h5");
  EXPECT_EQ(read_bytes(folder / "a.h5"), read_bytes(folder / "b.h5"));
}

TEST(Hdf5, TellsWhatIsThere) {
  TemporaryFolder folder;
  write_everything(folder / "a.h5");
  const File file = File::open(folder / "a.h5");
  EXPECT_TRUE(file.exists("/"));
  EXPECT_TRUE(file.is_group(""));
  EXPECT_TRUE(file.is_group("layers"));
  EXPECT_FALSE(file.is_dataset("layers"));
  EXPECT_TRUE(file.is_dataset("bins"));
  EXPECT_FALSE(file.is_group("bins"));
  EXPECT_FALSE(file.exists("nothing"));
  EXPECT_FALSE(file.exists("nothing/below"));
  EXPECT_FALSE(file.exists("bins/below"));
  EXPECT_EQ(file.children("/"), (std::vector<std::string>{"accumulators", "bins", "bytes", "config",
                                                          "empty", "layers", "none", "scalar"}));
  EXPECT_EQ(file.children("layers"), (std::vector<std::string>{"encoder.layer.0.query"}));
  EXPECT_CONTAINS(message_of([&] { file.children("bins"); }), "bins: is not a group");
  EXPECT_CONTAINS(message_of([&] { file.children("no"); }), "no: there is no such group");
  EXPECT_CONTAINS(message_of([&] { file.info("layers"); }), "layers: is not a dataset");
  EXPECT_CONTAINS(message_of([&] { file.read<float>("no"); }),
                  "a.h5: no: there is no such dataset");
  EXPECT_CONTAINS(message_of([&] { file.exists("a/./b"); }), "no HDF5 path");
  EXPECT_CONTAINS(message_of([&] { file.exists(std::string("a\0b", 3)); }), "no HDF5 path");
  EXPECT_CONTAINS(message_of([&] { file.attribute_int("no", "a"); }), "no such group or dataset");
  EXPECT_CONTAINS(message_of([&] { file.attribute_int("", "a"); }), "no such attribute");
}

TEST(Hdf5, ListsManyChildrenInOrder) {
  TemporaryFolder folder;
  File file = File::create(folder / "a.h5");
  for (int i = 2000; i > 0; --i) file.create_group("g/" + std::to_string(i));
  file.close();
  Limits limits;
  const std::vector<std::string> names = File::open(folder / "a.h5").children("g");
  EXPECT_EQ(names.size(), 2000u);
  EXPECT_TRUE(std::is_sorted(names.begin(), names.end()));
  limits.max_children = 1999;
  const File limited = File::open(folder / "a.h5", limits);
  EXPECT_CONTAINS(message_of([&] { limited.children("g"); }), "more members than the limit");
}

TEST(Hdf5, ReadsRows) {
  TemporaryFolder folder;
  std::vector<int32_t> values(60);
  for (int i = 0; i < 60; ++i) values[static_cast<std::size_t>(i)] = i;
  File file = File::create(folder / "a.h5");
  file.write("x", values, {5, 3, 4});
  file.write("line", values, {60});
  file.write("scalar", std::vector<int32_t>{1}, {});
  EXPECT_EQ(file.read_rows<int64_t>("x", 1, 1),
            (std::vector<int64_t>{12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23}));
  EXPECT_EQ(file.read_rows<int32_t>("x", 0, 5), values);
  EXPECT_EQ(file.read_rows<int8_t>("line", 58, 2), (std::vector<int8_t>{58, 59}));
  EXPECT_TRUE(file.read_rows<int32_t>("x", 5, 0).empty());
  EXPECT_CONTAINS(message_of([&] { file.read_rows<int32_t>("x", 4, 2); }),
                  "has 5 rows; 2 from row");
  EXPECT_CONTAINS(message_of([&] { file.read_rows<int32_t>("x", -1, 2); }), "has 5 rows");
  EXPECT_CONTAINS(message_of([&] { file.read_rows<int32_t>("x", 0, -2); }), "has 5 rows");
  const int64_t most = std::numeric_limits<int64_t>::max();
  EXPECT_CONTAINS(message_of([&] { file.read_rows<int32_t>("x", 1, most); }), "has 5 rows");
  EXPECT_CONTAINS(message_of([&] { file.read_rows<int32_t>("scalar", 0, 1); }), "no rows");
}

TEST(Hdf5, ConvertsOnlyWhatFits) {
  TemporaryFolder folder;
  const double infinity = std::numeric_limits<double>::infinity();
  File file = File::create(folder / "a.h5");
  file.write("i", std::vector<int32_t>{-128, 127}, {2});
  file.write("high", std::vector<int32_t>{1, 128}, {2});
  file.write("u", std::vector<uint64_t>{~uint64_t{0}}, {1});
  file.write("f", std::vector<float>{1.5f, -2}, {2});
  file.write("d", std::vector<double>{0.1, infinity, -infinity, std::nan("")}, {4});
  file.write("large", std::vector<double>{1e300}, {1});
  file.write_text("t", "12");
  EXPECT_EQ(file.read<int8_t>("i"), (std::vector<int8_t>{-128, 127}));
  EXPECT_EQ(file.read<int64_t>("i"), (std::vector<int64_t>{-128, 127}));
  EXPECT_CONTAINS(message_of([&] { file.read<int8_t>("high"); }), "high: a value of this int32");
  EXPECT_CONTAINS(message_of([&] { file.read_rows<int8_t>("high", 1, 1); }), "does not fit");
  EXPECT_EQ(file.read_rows<int8_t>("high", 0, 1), (std::vector<int8_t>{1}));
  EXPECT_CONTAINS(message_of([&] { file.read<uint8_t>("i"); }), "does not fit");
  EXPECT_CONTAINS(message_of([&] { file.read<uint64_t>("i"); }), "does not fit");
  EXPECT_CONTAINS(message_of([&] { file.read<int64_t>("u"); }), "does not fit");
  EXPECT_EQ(file.read<double>("f"), (std::vector<double>{1.5, -2}));
  const std::vector<float> rounded = file.read<float>("d");
  EXPECT_EQ(rounded[0], 0.1f);
  EXPECT_EQ(rounded[1], std::numeric_limits<float>::infinity());
  EXPECT_EQ(rounded[2], -std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(rounded[3]));
  EXPECT_CONTAINS(message_of([&] { file.read<float>("large"); }), "does not fit");
  EXPECT_CONTAINS(message_of([&] { file.read<float>("i"); }), "holds int32, where floating point");
  EXPECT_CONTAINS(message_of([&] { file.read<int64_t>("f"); }), "holds float32, where integers");
  EXPECT_CONTAINS(message_of([&] { file.read<int64_t>("t"); }), "holds text, where integers");
  EXPECT_CONTAINS(message_of([&] { file.read_text("i"); }), "holds int32, where text");
}

TEST(Hdf5, HalfTypesKeepTheirBits) {
  TemporaryFolder folder;
  std::vector<uint16_t> bits(65536);
  for (std::size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint16_t>(i);
  const std::vector<int64_t> shape{256, 256};
  File file = File::create(folder / "a.h5");
  file.write_half_bits("half", bits, shape, ElementType::float16);
  file.write_half_bits("brain", bits, shape, ElementType::bfloat16);
  file.write("words", bits, {65536});
  EXPECT_EQ(file.info("half").type, ElementType::float16);
  EXPECT_EQ(file.info("brain").type, ElementType::bfloat16);
  EXPECT_EQ(file.info("words").type, ElementType::uint16);
  EXPECT_EQ(file.read_half_bits("half"), bits);
  EXPECT_EQ(file.read_half_bits("brain"), bits);
  EXPECT_EQ(file.read<uint16_t>("words"), bits);
  // A bfloat16 is the upper half of a float.
  const std::vector<float> brain = file.read<float>("brain");
  for (std::size_t i = 0; i < bits.size(); ++i) {
    const uint32_t word = static_cast<uint32_t>(i) << 16;
    float expected;
    std::memcpy(&expected, &word, 4);
    if (std::isnan(expected))
      EXPECT_TRUE(std::isnan(brain[i])) << i;
    else
      EXPECT_EQ(brain[i], expected) << i;
  }
  const std::vector<float> half = file.read<float>("half");
  for (std::size_t i = 0; i < bits.size(); ++i) {
    const int exponent = static_cast<int>(i >> 10 & 31);
    const auto mantissa = static_cast<float>(i & 1023);
    float expected =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    if (i >> 15 != 0) expected = -expected;
    if (exponent == 31) {
      EXPECT_EQ(std::isnan(half[i]), mantissa != 0) << i;
      EXPECT_EQ(std::isinf(half[i]), mantissa == 0) << i;
    } else {
      EXPECT_EQ(half[i], expected) << i;
    }
  }
  EXPECT_CONTAINS(message_of([&] { file.read_half_bits("words"); }), "float16 or bfloat16");
  EXPECT_CONTAINS(message_of([&] { file.read<uint16_t>("half"); }), "where integers");
  EXPECT_CONTAINS(message_of([&] { file.write_half_bits("w", bits, shape, ElementType::float32); }),
                  "not float32");
}

TEST(Hdf5, RefusesBadWrites) {
  TemporaryFolder folder;
  File file = File::create(folder / "a.h5");
  file.write("a/b", std::vector<float>{1, 2}, {2});
  const std::vector<float> two{1, 2};
  EXPECT_CONTAINS(message_of([&] { file.write("a/b", two, {2}); }), "a/b: exists already");
  EXPECT_CONTAINS(message_of([&] { file.write("a", two, {2}); }), "exists already");
  EXPECT_CONTAINS(message_of([&] { file.write("a/b/c", two, {2}); }),
                  "is a dataset and not a group");
  EXPECT_CONTAINS(message_of([&] { file.write("c", two, {3}); }), "do not fill the shape [3]");
  EXPECT_CONTAINS(message_of([&] { file.write("c", two, {-1, -2}); }), "negative dimension");
  EXPECT_CONTAINS(message_of([&] { file.write("c", two, {int64_t{1} << 62, 8}); }), "do not fill");
  EXPECT_CONTAINS(message_of([&] { file.write("/", two, {2}); }), "needs a name");
  EXPECT_CONTAINS(message_of([&] { file.write("c", two, std::vector<int64_t>(40, 1)); }),
                  "40 dimensions");
  EXPECT_CONTAINS(message_of([&] { file.write_text("c", std::string("a\0b", 3)); }), "zero byte");
  EXPECT_CONTAINS(message_of([&] { file.set_attribute("no", "a", 1); }),
                  "no such group or dataset");
  EXPECT_CONTAINS(message_of([&] { file.set_attribute("", "", 1); }), "name is empty");
  EXPECT_CONTAINS(message_of([&] { file.create_group("a/b"); }), "is a dataset");
  file.create_group("a");
  file.close();
  file.close();
  EXPECT_CONTAINS(message_of([&] { file.write("c", two, {2}); }), "already closed");
  EXPECT_CONTAINS(message_of([&] { file.exists("c"); }), "already closed");
  EXPECT_CONTAINS(message_of([&] { file.flush(); }), "already closed");

  File reading = File::open(folder / "a.h5");
  EXPECT_CONTAINS(message_of([&] { reading.write("c", two, {2}); }), "for reading only");
  EXPECT_CONTAINS(message_of([&] { reading.set_attribute("", "a", 1); }), "for reading only");
  reading.flush();
}

TEST(Hdf5, AttributesAreReplacedAndTyped) {
  TemporaryFolder folder;
  File file = File::create(folder / "a.h5");
  file.set_attribute("", "a", 1);
  file.set_attribute("", "a", "text");
  EXPECT_EQ(file.attribute_string("", "a"), "text");
  file.set_attribute("", "i", int64_t{-5});
  file.set_attribute("", "d", 2.0);
  file.set_attribute("", "b", true);
  EXPECT_CONTAINS(message_of([&] { file.attribute_int("", "a"); }), "attribute a: holds text");
  EXPECT_CONTAINS(message_of([&] { file.attribute_double("", "i"); }), "where floating point");
  EXPECT_CONTAINS(message_of([&] { file.attribute_int("", "d"); }), "holds float64");
  EXPECT_CONTAINS(message_of([&] { file.attribute_bool("", "i"); }), "where a bool is needed");
  EXPECT_CONTAINS(message_of([&] { file.attribute_int("", "b"); }), "where an integer is needed");
  EXPECT_CONTAINS(message_of([&] { file.attribute_string("", "i"); }), "where text is needed");
  const std::string large(300000, 'x');
  file.set_attribute("", "large", large);
  file.write_text("large", large);
  file.close();
  const File reading = File::open(folder / "a.h5");
  EXPECT_EQ(reading.attribute_string("", "large"), large);
  EXPECT_EQ(reading.read_text("large"), large);
  EXPECT_EQ(reading.attribute_int("", "i"), -5);
}

TEST(Hdf5, ReadsFilesOfTheCLibrary) {
  TemporaryFolder folder;
  build(folder / "a.h5", [](hid_t file) {
    const std::vector<int32_t> values{1, 2, 3, 4, 5, 6};
    add(file, "zipped", H5T_NATIVE_INT32, {3, 2}, values.data(), [](hid_t properties) {
      const hsize_t chunk[2] = {2, 2};
      H5Pset_chunk(properties, 2, chunk);
      H5Pset_shuffle(properties);
      H5Pset_deflate(properties, 4);
      H5Pset_fletcher32(properties);
    });
    const int32_t big[2] = {0x01000000, 0x00010000};  // 1 and 256 in the other byte order.
    const hid_t swapped = H5Tcopy(H5T_STD_I32BE);
    add(file, "big", swapped, {2}, big);
    H5Tclose(swapped);
    const hid_t boolean = H5Tenum_create(H5T_NATIVE_INT8);
    int8_t value = 0;
    H5Tenum_insert(boolean, "FALSE", &value);
    value = 1;
    H5Tenum_insert(boolean, "TRUE", &value);
    const int8_t mask[3] = {1, 0, 1};
    add(file, "mask", boolean, {3}, mask);
    H5Tclose(boolean);
    const hid_t fixed = H5Tcopy(H5T_C_S1);
    H5Tset_size(fixed, 8);
    add(file, "fixed", fixed, {}, "abc\0\0\0\0\0");
    H5Tset_strpad(fixed, H5T_STR_SPACEPAD);
    add(file, "spaces", fixed, {1}, "abc     ");
    H5Tset_strpad(fixed, H5T_STR_NULLPAD);
    add(file, "whole", fixed, {}, "abcdefgh");
    add(file, "many", fixed, {2}, "abcdefghabcdefgh");
    H5Tclose(fixed);
    const hid_t compound = H5Tcreate(H5T_COMPOUND, 4);
    H5Tinsert(compound, "a", 0, H5T_NATIVE_INT32);
    add(file, "compound", compound, {2}, big);
    H5Tclose(compound);
    const hid_t null = H5Screate(H5S_NULL);
    H5Dclose(H5Dcreate2(file, "null", H5T_NATIVE_INT, null, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
    H5Sclose(null);
    const hid_t scalar = H5Screate(H5S_SCALAR);
    const hid_t attribute = H5Acreate2(file, "u", H5T_STD_U64LE, scalar, H5P_DEFAULT, H5P_DEFAULT);
    const uint64_t most = ~uint64_t{0};
    H5Awrite(attribute, H5T_NATIVE_UINT64, &most);
    H5Aclose(attribute);
    H5Sclose(scalar);
  });
  const File file = File::open(folder / "a.h5");
  EXPECT_EQ(file.read<int64_t>("zipped"), (std::vector<int64_t>{1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(file.read_rows<int32_t>("zipped", 1, 2), (std::vector<int32_t>{3, 4, 5, 6}));
  EXPECT_EQ(file.read<int16_t>("big"), (std::vector<int16_t>{1, 256}));
  EXPECT_EQ(file.info("mask").type, ElementType::boolean);
  EXPECT_EQ(file.read<int64_t>("mask"), (std::vector<int64_t>{1, 0, 1}));
  EXPECT_EQ(file.read_text("fixed"), "abc");
  EXPECT_EQ(file.read_text("spaces"), "abc");
  EXPECT_EQ(file.read_text("whole"), "abcdefgh");
  EXPECT_CONTAINS(message_of([&] { file.read_text("many"); }), "[2] strings, where one");
  EXPECT_EQ(file.info("compound").type, ElementType::other);
  EXPECT_CONTAINS(message_of([&] { file.read<int32_t>("compound"); }), "an unsupported type");
  EXPECT_EQ(file.info("null").type, ElementType::other);
  EXPECT_CONTAINS(message_of([&] { file.read<int32_t>("null"); }), "an unsupported type");
  EXPECT_CONTAINS(message_of([&] { file.attribute_int("", "u"); }), "does not fit");
}

TEST(Hdf5, SaysWhyAFileDoesNotOpen) {
  TemporaryFolder folder;
  const auto opening = [&](const char* name) {
    return message_of([&] { File::open(folder / name); });
  };
  EXPECT_CONTAINS(opening("no.h5"), "no.h5: the file does not exist");
  write_bytes(folder / "text", "just text, nothing else");
  EXPECT_CONTAINS(opening("text"), "is not an HDF5 file");
  write_bytes(folder / "empty", "");
  EXPECT_CONTAINS(opening("empty"), "is empty");
  fs::create_directory(folder / "folder");
  EXPECT_CONTAINS(opening("folder"), "is not a regular file");
  ASSERT_EQ(mkfifo((folder / "pipe").c_str(), 0600), 0);
  EXPECT_CONTAINS(opening("pipe"), "is not a regular file");
  write_everything(folder / "a.h5");
  std::string bytes = read_bytes(folder / "a.h5");
  write_bytes(folder / "cut", std::string_view(bytes).substr(0, bytes.size() - 1));
  EXPECT_CONTAINS(opening("cut"), "is truncated");
  bytes[20] ^= 1;
  write_bytes(folder / "damaged", bytes);
  EXPECT_CONTAINS(opening("damaged"), "cannot be opened");
  EXPECT_CONTAINS(message_of([&] { File::create(folder / "no/a.h5"); }), "cannot be created");
}

TEST(Hdf5, RefusesLinks) {
  TemporaryFolder folder;
  write_everything(folder / "secret.h5");
  build(folder / "a.h5", [](hid_t file) {
    H5Lcreate_external("secret.h5", "/bins", file, "external", H5P_DEFAULT, H5P_DEFAULT);
    H5Lcreate_external("secret.h5", "/", file, "root", H5P_DEFAULT, H5P_DEFAULT);
    H5Lcreate_soft("/root/bins", file, "soft", H5P_DEFAULT, H5P_DEFAULT);
    H5Lcreate_soft("/loop", file, "loop", H5P_DEFAULT, H5P_DEFAULT);
  });
  const File file = File::open(folder / "a.h5");
  EXPECT_EQ(file.children("/"), (std::vector<std::string>{"external", "loop", "root", "soft"}));
  EXPECT_CONTAINS(message_of([&] { file.read<int64_t>("external"); }), "is an external link");
  EXPECT_CONTAINS(message_of([&] { file.read<int64_t>("root/bins"); }), "root is an external link");
  EXPECT_CONTAINS(message_of([&] { file.exists("root/bins"); }), "root is an external link");
  EXPECT_CONTAINS(message_of([&] { file.children("root"); }), "is an external link");
  EXPECT_CONTAINS(message_of([&] { file.has_attribute("root", "a"); }), "is an external link");
  EXPECT_CONTAINS(message_of([&] { file.info("soft"); }), "is a soft link");
  EXPECT_CONTAINS(message_of([&] { file.is_group("loop"); }), "is a soft link");
}

TEST(Hdf5, RefusesDataOutsideTheFileAndFilters) {
  TemporaryFolder folder;
  write_bytes(folder / "secret", std::string(64, 's'));
  write_everything(folder / "secret.h5");
  build(folder / "a.h5", [&](hid_t file) {
    add(file, "external", H5T_NATIVE_INT8, {16}, nullptr,
        [&](hid_t properties) { H5Pset_external(properties, (folder / "secret").c_str(), 0, 16); });
    add(file, "virtual", H5T_NATIVE_INT64, {3}, nullptr, [&](hid_t properties) {
      const hsize_t three = 3;
      const hid_t space = H5Screate_simple(1, &three, nullptr);
      H5Pset_virtual(properties, space, (folder / "secret.h5").c_str(), "/bins", space);
      H5Sclose(space);
    });
    const std::vector<int32_t> values(16, 3);
    add(file, "nbit", H5T_NATIVE_INT32, {16}, values.data(), [](hid_t properties) {
      const hsize_t chunk = 16;
      H5Pset_chunk(properties, 1, &chunk);
      H5Pset_nbit(properties);
    });
    add(file, "plugin", H5T_NATIVE_INT32, {16}, nullptr, [](hid_t properties) {
      const hsize_t chunk = 16;
      H5Pset_chunk(properties, 1, &chunk);
      H5Pset_filter(properties, 32000, H5Z_FLAG_OPTIONAL, 0, nullptr);
    });
  });
  const File file = File::open(folder / "a.h5");
  EXPECT_CONTAINS(message_of([&] { file.read<int8_t>("external"); }), "in an external file");
  EXPECT_CONTAINS(message_of([&] { file.info("external"); }), "in an external file");
  EXPECT_CONTAINS(message_of([&] { file.read<int64_t>("virtual"); }), "virtual");
  EXPECT_CONTAINS(message_of([&] { file.info("virtual"); }), "virtual");
  EXPECT_CONTAINS(message_of([&] { file.read<int32_t>("nbit"); }), "filter 5");
  EXPECT_CONTAINS(message_of([&] { file.read<int32_t>("plugin"); }), "filter 32000");
}

TEST(Hdf5, BoundsWhatIsAllocated) {
  TemporaryFolder folder;
  const hsize_t large = hsize_t{1} << 40;
  build(folder / "a.h5", [&](hid_t file) {
    // Nothing is stored for either until it is written.
    add(file, "contiguous", H5T_NATIVE_INT8, {1 << 20}, nullptr);
    add(file, "petabytes", H5T_NATIVE_INT64, {large, 1024}, nullptr);
    add(file, "overflow", H5T_NATIVE_INT64, {large, large, large}, nullptr, [](hid_t properties) {
      const hsize_t chunk[3] = {1, 1, 1};
      H5Pset_chunk(properties, 3, chunk);
    });
    add(file, "zeros", H5T_NATIVE_INT64, {0, large, large}, nullptr);
    add(file, "chunked", H5T_NATIVE_INT8, {hsize_t{1} << 30}, nullptr, [](hid_t properties) {
      const hsize_t chunk = 1024;
      H5Pset_chunk(properties, 1, &chunk);
    });
    add(file, "chunk", H5T_NATIVE_INT8, {16}, nullptr,
        [](hid_t properties) {
          const hsize_t chunk = hsize_t{1} << 31;
          H5Pset_chunk(properties, 1, &chunk);
        },
        {H5S_UNLIMITED});
    const std::vector<int8_t> zeros(1 << 20);
    add(file, "ratio", H5T_NATIVE_INT8, {1 << 20}, zeros.data(), [](hid_t properties) {
      const hsize_t chunk = 1 << 18;
      H5Pset_chunk(properties, 1, &chunk);
      H5Pset_deflate(properties, 9);
    });
    const hid_t wide = H5Tcopy(H5T_C_S1);
    H5Tset_size(wide, std::size_t{1} << 31);
    add(file, "text", wide, {}, nullptr);
    H5Tclose(wide);
  });
  const File file = File::open(folder / "a.h5");
  EXPECT_CONTAINS(message_of([&] { file.read<int8_t>("contiguous"); }),
                  "can hold; the file is damaged");
  EXPECT_CONTAINS(message_of([&] { file.read_rows<int8_t>("contiguous", 0, 1); }), "can hold");
  EXPECT_CONTAINS(message_of([&] { file.read<int64_t>("petabytes"); }), "more than the limit");
  EXPECT_CONTAINS(message_of([&] { file.read_rows<int64_t>("petabytes", 0, 1); }), "can hold");
  EXPECT_CONTAINS(message_of([&] { file.read<int64_t>("overflow"); }), "more than 2^63 elements");
  EXPECT_CONTAINS(message_of([&] { file.read<int64_t>("zeros"); }), "more than 2^63 elements");
  EXPECT_CONTAINS(message_of([&] { file.read<int8_t>("chunked"); }), "can hold");
  EXPECT_CONTAINS(message_of([&] { file.read<int8_t>("chunk"); }), "claims chunks larger");
  EXPECT_CONTAINS(message_of([&] { file.read_text("text"); }), "can hold");
  EXPECT_EQ(file.read<int8_t>("ratio"), std::vector<int8_t>(1 << 20));
  for (const char* name : {"contiguous", "chunked", "text"})
    EXPECT_CONTAINS(message_of([&] { file.check_claim(name); }), "can hold");
  EXPECT_CONTAINS(message_of([&] { file.check_claim("petabytes"); }), "more than the limit");
  EXPECT_EQ(message_of([&] { file.check_claim("ratio"); }), "");

  Limits limits;
  limits.max_bytes = 1000;
  write_everything(folder / "b.h5");
  File limited = File::open(folder / "b.h5", limits);
  EXPECT_EQ(limited.read<int64_t>("bins").size(), 3u);
  limits.max_bytes = 23;
  limited = File::open(folder / "b.h5", limits);
  EXPECT_CONTAINS(message_of([&] { limited.read<int64_t>("bins"); }), "the limit of 23 bytes");
  EXPECT_EQ(limited.read_rows<int64_t>("bins", 1, 2).size(), 2u);
}

TEST(Hdf5, RefusesTextThatIsNotWhereItIsSaidToBe) {
  TemporaryFolder folder;
  const std::string text(100000, 't');
  File file = File::create(folder / "a.h5");
  file.write_text("x", text);
  file.close();
  const std::string bytes = read_bytes(folder / "a.h5");
  const std::size_t heap = bytes.find("GCOL");
  ASSERT_NE(heap, std::string::npos);
  // The reference is its length (4 bytes), the heap's address (8) and an index (4).
  std::string reference(12, '\0');
  const auto length = static_cast<uint32_t>(text.size());
  const auto address = static_cast<uint64_t>(heap);
  std::memcpy(reference.data(), &length, 4);
  std::memcpy(reference.data() + 4, &address, 8);
  const std::size_t at = bytes.find(reference);
  ASSERT_NE(at, std::string::npos);
  const auto reading = [&](std::size_t offset, auto value) {
    std::string damaged = bytes;
    std::memcpy(damaged.data() + offset, &value, sizeof value);
    write_bytes(folder / "b.h5", damaged);
    std::string result;
    const std::string message =
        message_of([&] { result = File::open(folder / "b.h5").read_text("x"); });
    return message.empty() ? result : message;
  };
  EXPECT_EQ(reading(at, uint32_t{0}), "");
  EXPECT_EQ(reading(at, uint32_t{1}), "t");  // HDF5 1.10.8 overruns its buffer here.
  EXPECT_CONTAINS(reading(at, uint32_t{0xffffffff}), "is not where the file says");
  EXPECT_CONTAINS(reading(at + 4, uint64_t{1} << 40), "beyond the end of the file");
  EXPECT_CONTAINS(reading(at + 4, ~uint64_t{0}), "beyond the end of the file");
  EXPECT_CONTAINS(reading(at + 4, uint64_t{8}), "is not where the file says");
  EXPECT_CONTAINS(reading(at + 12, uint32_t{9}), "is not where the file says");
  EXPECT_CONTAINS(reading(heap + 8, uint64_t{0}), "is not where the file says");
  EXPECT_CONTAINS(reading(heap + 8, ~uint64_t{0}), "is not where the file says");
  EXPECT_CONTAINS(reading(heap + 24, uint64_t{5}), "is not where the file says");
  EXPECT_CONTAINS(reading(heap + 24, ~uint64_t{0}), "is not where the file says");
}

TEST(Hdf5, GivesTheLibrarysErrorStateBack) {
  TemporaryFolder folder;
  H5E_auto2_t before = nullptr;
  H5E_auto2_t after = nullptr;
  void* data = nullptr;
  ASSERT_GE(H5Eget_auto2(H5E_DEFAULT, &before, &data), 0);
  ::testing::internal::CaptureStderr();
  write_everything(folder / "a.h5");
  message_of([&] { File::open(folder / "a.h5").read<float>("no"); });
  message_of([&] { File::create(folder / "no/a.h5"); });
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "");
  ASSERT_GE(H5Eget_auto2(H5E_DEFAULT, &after, &data), 0);
  EXPECT_EQ(before, after);
}

TEST(Hdf5, ThreadsReadOneAfterAnother) {
  TemporaryFolder folder;
  File file = File::create(folder / "a.h5");
  file.write("x", std::vector<int32_t>(1000, 7), {1000});
  file.close();
  const File reading = File::open(folder / "a.h5");
  std::vector<std::thread> threads;
  std::vector<int> good(4);
  for (std::size_t t = 0; t < good.size(); ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i)
        good[t] += reading.read_rows<int32_t>("x", i, 3) == std::vector<int32_t>(3, 7);
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(good, std::vector<int>(4, 200));
}

TEST(Hdf5, FullDiskThrowsAtTheLatestOnClose) {
  TemporaryFolder folder;
  // With room for the data of neither, of the small dataset only, and of all but the end.
  for (const rlim_t room : {rlim_t{100}, rlim_t{3000}, rlim_t{40000}}) {
    ::testing::internal::CaptureStderr();
    const pid_t child = fork();
    if (child == 0) {
      signal(SIGXFSZ, SIG_IGN);
      const rlimit limit{room, room};
      if (setrlimit(RLIMIT_FSIZE, &limit) != 0) _exit(2);
      std::string message;
      {
        AtomicFile out(folder / "a.h5");
        message = message_of([&] {
          File file = File::create(out.temporary());
          file.write("small", std::vector<int8_t>(1000), {1000});
          file.write("large", std::vector<int8_t>(39000), {39000});
          file.write_text("text", std::string(3000, 'x'));
          file.close();
          out.commit();
        });
      }
      const bool clear = message.find("larger than") != std::string::npos &&
                         message.find(".a.h5.") != std::string::npos;
      if (!clear) fprintf(stderr, "unclear: %s\n", message.c_str());
      if (!clear) _exit(1);
      exit(0);  // With the library's own clean-up, which must not crash.
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0) << "with room for " << room << " bytes";
    EXPECT_EQ(::testing::internal::GetCapturedStderr(), "");
    EXPECT_EQ(folder.entries(), 0u);
  }
}

/// Reads all there is below `path` in every way.
void read_all(const File& file, const std::string& path, int depth) {
  for (const char* name : {"format", "version", "alpha", "yes"}) {
    message_of([&] { file.attribute_string(path, name); });
    message_of([&] { file.attribute_int(path, name); });
    message_of([&] { file.attribute_double(path, name); });
    message_of([&] { file.attribute_bool(path, name); });
  }
  if (file.is_dataset(path)) {
    message_of([&] { file.read<int64_t>(path); });
    message_of([&] { file.read<float>(path); });
    message_of([&] { file.read_rows<int8_t>(path, 0, 1); });
    message_of([&] { file.read_half_bits(path); });
    message_of([&] { file.read_text(path); });
  } else if (file.is_group(path) && depth < 6) {
    for (const std::string& name : file.children(path))
      message_of([&] { read_all(file, path + "/" + name, depth + 1); });
  }
}

TEST(Hdf5, DamagedFilesAreReadOrRefused) {
  TemporaryFolder folder;
  write_everything(folder / "a.h5");
  const std::string bytes = read_bytes(folder / "a.h5");
  std::mt19937 random(1);
  int opened = 0;
  for (int i = 0; i < 300; ++i) {
    std::string damaged = bytes;
    for (unsigned flips = 1 + random() % 4; flips > 0; --flips)
      damaged[random() % damaged.size()] ^= static_cast<char>(1u << (random() % 8));
    if (i % 5 == 0) damaged.resize(random() % damaged.size());
    write_bytes(folder / "b.h5", damaged);
    message_of([&] {
      const File file = File::open(folder / "b.h5");
      ++opened;
      read_all(file, "", 0);
    });
  }
  EXPECT_GT(opened, 100);
}

}  // namespace
}  // namespace vernier::hdf5
