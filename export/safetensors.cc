#include <vernier/calibration/atomic_file.h>
#include <vernier/export/safetensors.h>
#include <vernier/kernels/error.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <set>
#include <system_error>

namespace vernier {
namespace {

namespace fs = std::filesystem;

static_assert(std::endian::native == std::endian::little, "safetensors is little endian");

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // The limit of the reference implementation.
constexpr std::size_t kMaxRank = 64;               // ATen's kernels take no more.
constexpr const char* kMetadataName = "__metadata__";

struct Dtype {
  const char* name;
  at::ScalarType type;
  int64_t bytes;
};
constexpr std::array<Dtype, 15> kDtypes{{
    {"F64", at::kDouble, 8},
    {"F32", at::kFloat, 4},
    {"F16", at::kHalf, 2},
    {"BF16", at::kBFloat16, 2},
    {"F8_E4M3", at::kFloat8_e4m3fn, 1},
    {"F8_E5M2", at::kFloat8_e5m2, 1},
    {"I64", at::kLong, 8},
    {"I32", at::kInt, 4},
    {"I16", at::kShort, 2},
    {"I8", at::kChar, 1},
    {"U64", at::kUInt64, 8},
    {"U32", at::kUInt32, 4},
    {"U16", at::kUInt16, 2},
    {"U8", at::kByte, 1},
    {"BOOL", at::kBool, 1},
}};

const Dtype* find_dtype(const std::string& name) {
  for (const Dtype& dtype : kDtypes)
    if (name == dtype.name) return &dtype;
  return nullptr;
}

const Dtype* find_dtype(at::ScalarType type) {
  for (const Dtype& dtype : kDtypes)
    if (type == dtype.type) return &dtype;
  return nullptr;
}

/// UTF-8 `text` fit for a message of one line: control characters and excess length removed.
std::string printable(const std::string& text) {
  std::size_t length = std::min<std::size_t>(text.size(), 200);
  // Not through the middle of a character.
  while (length < text.size() && length > 0 && (text[length] & 0xc0) == 0x80) --length;
  std::string out = text.substr(0, length);
  if (length < text.size()) out += "...";
  for (char& c : out)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  return out;
}

/// A parser's message, which may quote bytes that are not UTF-8.
std::string ascii(const std::string& text) {
  std::string out = printable(text);
  for (char& c : out)
    if (static_cast<unsigned char>(c) >= 0x80) c = '?';
  return out;
}

/// A file mapped copy-on-write.
class Mapping {
 public:
  explicit Mapping(const fs::path& path) {
    // Not blocking, or a pipe would wait for its writer.
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    VERNIER_CHECK(descriptor >= 0 || errno != ENOENT, path.string(), ": the file does not exist");
    VERNIER_CHECK(descriptor >= 0, path.string(),
                  ": cannot be read: ", std::generic_category().message(errno));
    struct stat status {};
    const bool regular = ::fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode);
    int error = 0;
    if (regular && status.st_size > 0) {
      bytes_ = static_cast<std::size_t>(status.st_size);
      // Writable and private: a tensor of it may be changed, the file is not. Unreserved: else a
      // model larger than memory and swap would be refused.
      void* address = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE,
                             descriptor, 0);
      if (address == MAP_FAILED)
        error = errno;
      else
        data_ = static_cast<char*>(address);
    }
    ::close(descriptor);
    VERNIER_CHECK(regular, path.string(), ": is not a regular file; name a safetensors file");
    VERNIER_CHECK(error == 0, path.string(),
                  ": cannot be mapped into memory: ", std::generic_category().message(error));
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() {
    if (data_ != nullptr) ::munmap(data_, bytes_);
  }

  char* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  std::size_t bytes_ = 0;
};

struct Entry {
  SafetensorsInfo info;
  const Dtype* dtype = nullptr;
  uint64_t begin = 0;  // Bytes into the data, which follows the header.
  uint64_t end = 0;
};

/// What the parsers below share: events of nlohmann's, of which each handles those it allows. The
/// library parses without recursion, and an event that is not allowed throws at once, so that deep
/// nesting costs nothing.
class JsonHandler {
 public:
  using number_integer_t = nlohmann::json::number_integer_t;
  using number_unsigned_t = nlohmann::json::number_unsigned_t;
  using number_float_t = nlohmann::json::number_float_t;
  using string_t = nlohmann::json::string_t;
  using binary_t = nlohmann::json::binary_t;

  explicit JsonHandler(std::string where) : where_(std::move(where)) {}

  bool binary(binary_t&) { fail("holds binary data"); }
  bool parse_error(std::size_t, const std::string&, const nlohmann::detail::exception& error) {
    fail("is not valid JSON (" + ascii(error.what()) + ")");
  }

 protected:
  [[noreturn]] void fail(const std::string& what) const {
    throw Error(where_ + " " + what + "; the file is damaged or not what its name says");
  }

 private:
  std::string where_;
};

/// Reads {"__metadata__": {TEXT: TEXT}, NAME: {"dtype", "shape", "data_offsets"}, ...} and nothing
/// else.
class HeaderHandler : public JsonHandler {
 public:
  HeaderHandler(const fs::path& path, std::map<std::string, Entry>& entries,
                std::map<std::string, std::string>& metadata)
      : JsonHandler(path.string() + ": the header"), entries_(entries), metadata_(metadata) {}

  bool null() { fail("has a null" + place()); }
  bool boolean(bool) { fail("has a bool" + place()); }
  bool number_integer(number_integer_t) { fail("has a negative number" + place()); }
  bool number_float(number_float_t, const string_t&) {
    fail("has a number that is no 64-bit integer" + place());
  }

  bool number_unsigned(number_unsigned_t value) {
    if (at_ == At::kShape) {
      if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
        fail("has a dimension beyond 2^63" + place());
      if (entry_.info.shape.size() >= kMaxRank) fail("has more than 64 dimensions" + place());
      entry_.info.shape.push_back(static_cast<int64_t>(value));
    } else if (at_ == At::kOffsets) {
      if (offsets_.size() >= 2) fail("has more than two data_offsets" + place());
      offsets_.push_back(value);
    } else {
      fail("has a number where none belongs" + place());
    }
    return true;
  }

  bool string(string_t& value) {
    if (at_ == At::kMetadata) {
      if (!metadata_.emplace(key_, value).second)
        fail("has the metadata " + printable(key_) + " twice");
    } else if (at_ == At::kTensor && key_ == "dtype") {
      entry_.dtype = find_dtype(value);
      if (entry_.dtype == nullptr) fail("has the unknown dtype " + printable(value) + place());
      entry_.info.dtype = value;
    } else {
      fail("has text where none belongs" + place());
    }
    return true;
  }

  bool start_object(std::size_t) {
    if (at_ == At::kStart) {
      at_ = At::kTop;
    } else if (at_ == At::kTop) {
      at_ = name_ == kMetadataName ? At::kMetadata : At::kTensor;
      entry_ = {};
      offsets_.clear();
      fields_.clear();
    } else {
      fail("is nested too deep" + place());
    }
    return true;
  }

  bool key(string_t& value) {
    if (at_ == At::kTop) {
      name_ = value;
      if (!names_.insert(name_).second) fail("has the name " + printable(name_) + " twice");
    } else {
      key_ = value;
      if (at_ == At::kTensor) {
        if (key_ != "dtype" && key_ != "shape" && key_ != "data_offsets")
          fail("has the unknown field " + printable(key_) + place());
        if (!fields_.insert(key_).second) fail("has " + key_ + " twice" + place());
      }
    }
    return true;
  }

  bool end_object() {
    if (at_ == At::kTensor) {
      if (fields_.size() != 3) fail("lacks dtype, shape or data_offsets" + place());
      if (offsets_.size() != 2) fail("has not two data_offsets" + place());
      entry_.begin = offsets_[0];
      entry_.end = offsets_[1];
      entries_.emplace(name_, std::move(entry_));
    }
    at_ = at_ == At::kTop ? At::kEnd : At::kTop;
    return true;
  }

  bool start_array(std::size_t) {
    if (at_ != At::kTensor || key_ == "dtype") fail("has a list where none belongs" + place());
    at_ = key_ == "shape" ? At::kShape : At::kOffsets;
    return true;
  }

  bool end_array() {
    at_ = At::kTensor;
    return true;
  }

 private:
  enum class At { kStart, kTop, kMetadata, kTensor, kShape, kOffsets, kEnd };

  std::string place() const { return name_.empty() ? "" : " at " + printable(name_); }

  std::map<std::string, Entry>& entries_;
  std::map<std::string, std::string>& metadata_;
  At at_ = At::kStart;
  std::string name_, key_;
  std::set<std::string> names_, fields_;
  Entry entry_;
  std::vector<uint64_t> offsets_;
};

/// Reads the object "weight_map" at the top of an index and skips all else.
class IndexHandler : public JsonHandler {
 public:
  IndexHandler(const fs::path& path, std::map<std::string, std::string>& map)
      : JsonHandler(path.string() + ": the index"), map_(map) {}

  bool null() { return other(); }
  bool boolean(bool) { return other(); }
  bool number_integer(number_integer_t) { return other(); }
  bool number_unsigned(number_unsigned_t) { return other(); }
  bool number_float(number_float_t, const string_t&) { return other(); }

  bool string(string_t& value) {
    if (!in_map_) return other();
    if (!map_.emplace(key_, value).second) fail("names the tensor " + printable(key_) + " twice");
    return true;
  }

  bool start_object(std::size_t) {
    if (in_map_ || (depth_ == 1 && key_ == "weight_map" && found_))
      fail("has more than one weight_map, or one that is not names to files");
    if (depth_ == 1 && key_ == "weight_map") in_map_ = found_ = true;
    return deeper();
  }

  bool key(string_t& value) {
    key_ = value;
    return true;
  }

  bool end_object() {
    --depth_;
    if (depth_ == 1) in_map_ = false;
    return true;
  }

  bool start_array(std::size_t) {
    if (depth_ == 0) fail("is not a JSON object");
    other();
    return deeper();
  }

  bool end_array() {
    --depth_;
    return true;
  }

 private:
  /// A value that is skipped, if it stands where anything may.
  bool other() {
    if (depth_ == 0) fail("is not a JSON object");
    if (in_map_ || (depth_ == 1 && key_ == "weight_map"))
      fail("has a weight_map that is not names to files");
    return true;
  }

  bool deeper() {
    if (++depth_ > 64) fail("is nested too deep");
    return true;
  }

  std::map<std::string, std::string>& map_;
  std::string key_;
  int depth_ = 0;
  bool in_map_ = false;
  bool found_ = false;
};

/// Checks each tensor's size, and that together they cover `data_bytes` without holes or overlap;
/// gives the names in the order of their data.
std::vector<std::string> check_layout(const fs::path& path,
                                      const std::map<std::string, Entry>& entries,
                                      uint64_t data_bytes) {
  std::vector<const std::pair<const std::string, Entry>*> order;
  for (const auto& named : entries) {
    const auto& [name, entry] = named;
    VERNIER_CHECK(entry.begin <= entry.end && entry.end <= data_bytes, path.string(), ": tensor ",
                  printable(name), " is at bytes ", entry.begin, " to ", entry.end, " of ",
                  data_bytes, "; the file is damaged or cut short");
    // Zeros left out, the product bounds the strides as well.
    int64_t bound = entry.dtype->bytes;
    int64_t bytes = entry.dtype->bytes;
    for (const int64_t dimension : entry.info.shape) {
      const bool fits = !__builtin_mul_overflow(bound, std::max<int64_t>(dimension, 1), &bound);
      VERNIER_CHECK(fits, path.string(), ": tensor ", printable(name),
                    " has a shape of more than 2^63 bytes; the file is damaged");
      bytes *= dimension;
    }
    VERNIER_CHECK(static_cast<uint64_t>(bytes) == entry.end - entry.begin, path.string(),
                  ": tensor ", printable(name), " has ", entry.end - entry.begin,
                  " bytes of data, its shape and dtype need ", bytes, "; the file is damaged");
    order.push_back(&named);
  }
  std::stable_sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  std::vector<std::string> names;
  uint64_t end = 0;
  for (const auto* named : order) {
    const auto& [name, entry] = *named;
    VERNIER_CHECK(entry.begin == end, path.string(), ": tensor ", printable(name),
                  " starts at byte ", entry.begin, ", the one before ends at ", end,
                  "; tensors may neither overlap nor leave holes");
    end = entry.end;
    names.push_back(name);
  }
  VERNIER_CHECK(end == data_bytes, path.string(), ": has ", data_bytes,
                " bytes of data, its tensors only ", end, "; the file is damaged");
  return names;
}

int64_t data_bytes(const TensorToWrite& tensor) {
  return c10::multiply_integers(tensor.shape) *
         static_cast<int64_t>(c10::elementSize(tensor.dtype));
}

std::string utf8_json(const std::string& text, const char* what) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::type_error&) {
    throw Error(concat(what, " ", ascii(text), " is not UTF-8; rename it"));
  }
}

}  // namespace

struct SafetensorsFile::State {
  fs::path path;
  std::shared_ptr<const Mapping> mapping;
  uint64_t data = 0;  // Where in the file the data begins.
  std::map<std::string, Entry> entries;
  std::vector<std::string> names;
  std::map<std::string, std::string> metadata;

  const Entry& entry(const std::string& name) const {
    const auto found = entries.find(name);
    VERNIER_CHECK(found != entries.end(), path.string(), ": has no tensor ", printable(name));
    return found->second;
  }
};

SafetensorsFile::SafetensorsFile(std::shared_ptr<const State> state) : state_(std::move(state)) {}

SafetensorsFile SafetensorsFile::open(const fs::path& path) {
  auto state = std::make_shared<State>();
  state->path = path;
  state->mapping = std::make_shared<Mapping>(path);
  const uint64_t bytes = state->mapping->bytes();
  VERNIER_CHECK(bytes >= 8, path.string(), ": has ", bytes,
                " bytes, too few for a safetensors file");
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, state->mapping->data(), 8);
  VERNIER_CHECK(header_bytes <= bytes - 8, path.string(), ": claims a header of ", header_bytes,
                " bytes and has ", bytes - 8,
                " bytes after its length; it is cut short or not a safetensors file");
  VERNIER_CHECK(header_bytes <= kMaxHeaderBytes, path.string(), ": claims a header of ",
                header_bytes, " bytes; the limit is ", kMaxHeaderBytes);
  const char* header = state->mapping->data() + 8;
  VERNIER_CHECK(header_bytes > 0 && header[0] == '{', path.string(),
                ": its header is not a JSON object; it is not a safetensors file");
  HeaderHandler handler(path, state->entries, state->metadata);
  nlohmann::json::sax_parse(header, header + header_bytes, &handler);
  state->data = 8 + header_bytes;
  state->names = check_layout(path, state->entries, bytes - state->data);
  return SafetensorsFile(std::move(state));
}

const std::vector<std::string>& SafetensorsFile::names() const { return state_->names; }

bool SafetensorsFile::contains(const std::string& name) const {
  return state_->entries.contains(name);
}

const SafetensorsInfo& SafetensorsFile::info(const std::string& name) const {
  return state_->entry(name).info;
}

at::Tensor SafetensorsFile::tensor(const std::string& name) const {
  const Entry& entry = state_->entry(name);
  const auto options = at::TensorOptions().dtype(entry.dtype->type);
  const uint64_t bytes = entry.end - entry.begin;
  if (bytes == 0) return at::empty(entry.info.shape, options);
  char* data = state_->mapping->data() + state_->data + entry.begin;
  if (entry.dtype->type == at::kBool) {
    // Any other byte in a bool is undefined behaviour to its reader.
    const bool good =
        std::all_of(data, data + bytes, [](char byte) { return byte == 0 || byte == 1; });
    VERNIER_CHECK(good, state_->path.string(), ": tensor ", printable(name),
                  " is BOOL and has bytes other than 0 and 1; the file is damaged");
  }
  if (std::bit_cast<uintptr_t>(data) % static_cast<uintptr_t>(entry.dtype->bytes) != 0) {
    at::Tensor copy = at::empty(entry.info.shape, options);
    std::memcpy(copy.mutable_data_ptr(), data, bytes);
    return copy;
  }
  return at::from_blob(
      data, entry.info.shape, [mapping = state_->mapping](void*) {}, options);
}

const std::map<std::string, std::string>& SafetensorsFile::metadata() const {
  return state_->metadata;
}

const fs::path& SafetensorsFile::path() const { return state_->path; }

SafetensorsFolder SafetensorsFolder::open(const fs::path& folder) {
  std::error_code error;
  VERNIER_CHECK(fs::is_directory(folder, error), folder.string(),
                ": is not a folder; name a Hugging Face model folder");
  SafetensorsFolder opened;
  opened.folder_ = folder;
  const fs::path single = folder / "model.safetensors";
  const fs::path index = folder / "model.safetensors.index.json";
  std::map<std::string, std::string> shard_of;
  if (fs::exists(single, error)) {
    opened.files_.push_back(SafetensorsFile::open(single));
  } else {
    VERNIER_CHECK(
        fs::exists(index, error), folder.string(),
        ": has neither model.safetensors nor model.safetensors.index.json; save the model",
        " with safe_serialization=True");
    const Mapping text(index);
    VERNIER_CHECK(text.bytes() <= kMaxHeaderBytes, index.string(), ": is larger than ",
                  kMaxHeaderBytes, " bytes");
    IndexHandler handler(index, shard_of);
    nlohmann::json::sax_parse(text.data(), text.data() + text.bytes(), &handler);
    VERNIER_CHECK(!shard_of.empty(), index.string(), ": has no weight_map, or an empty one");
    std::set<std::string> shards;
    for (const auto& [name, shard] : shard_of) shards.insert(shard);
    for (const std::string& shard : shards) {
      const fs::path relative(shard);
      const bool inside = !shard.empty() && shard.find('\0') == std::string::npos &&
                          relative.is_relative() &&
                          std::find(relative.begin(), relative.end(), "..") == relative.end();
      VERNIER_CHECK(inside, index.string(), ": names the shard ", printable(shard),
                    ", which is outside the folder");
      VERNIER_CHECK(fs::exists(folder / relative, error), index.string(), ": the shard ",
                    printable(shard), " is missing; download it");
      opened.files_.push_back(SafetensorsFile::open(folder / relative));
    }
  }
  for (std::size_t i = 0; i < opened.files_.size(); ++i) {
    for (const std::string& name : opened.files_[i].names()) {
      const auto [at, added] = opened.file_of_.emplace(name, i);
      VERNIER_CHECK(added, opened.files_[i].path().string(), ": tensor ", printable(name),
                    " is also in ", opened.files_[at->second].path().string(),
                    "; a name may be in one shard only");
    }
  }
  for (const auto& [name, shard] : shard_of) {
    const auto found = opened.file_of_.find(name);
    VERNIER_CHECK(
        found != opened.file_of_.end() && opened.files_[found->second].path() == folder / shard,
        index.string(), ": tensor ", printable(name), " is not in ", printable(shard),
        ", where the index puts it");
  }
  for (const auto& [name, file] : opened.file_of_) opened.names_.push_back(name);
  return opened;
}

bool SafetensorsFolder::contains(const std::string& name) const { return file_of_.contains(name); }

const SafetensorsFile& SafetensorsFolder::file_of(const std::string& name) const {
  const auto found = file_of_.find(name);
  VERNIER_CHECK(found != file_of_.end(), folder_.string(), ": has no tensor ", printable(name));
  return files_[found->second];
}

const SafetensorsInfo& SafetensorsFolder::info(const std::string& name) const {
  return file_of(name).info(name);
}

at::Tensor SafetensorsFolder::tensor(const std::string& name) const {
  return file_of(name).tensor(name);
}

TensorToWrite::TensorToWrite(std::string tensor_name, const at::Tensor& tensor)
    : name(std::move(tensor_name)), dtype(at::kFloat) {
  VERNIER_CHECK(tensor.defined(), "tensor ", ascii(name), " is undefined");
  VERNIER_CHECK(tensor.layout() == at::kStrided && !tensor.is_meta(), "tensor ", ascii(name),
                " is sparse or has no data; only dense tensors can be written");
  dtype = tensor.scalar_type();
  shape = tensor.sizes().vec();
  make = [tensor] { return tensor; };
}

TensorToWrite::TensorToWrite(std::string tensor_name, at::ScalarType tensor_dtype,
                             std::vector<int64_t> tensor_shape, std::function<at::Tensor()> maker)
    : name(std::move(tensor_name)),
      dtype(tensor_dtype),
      shape(std::move(tensor_shape)),
      make(std::move(maker)) {}

void write_safetensors(const fs::path& path,
                       const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::vector<TensorToWrite> to_write;
  try {
    for (const auto& [name, tensor] : tensors) to_write.emplace_back(name, tensor);
  } catch (const Error& error) {
    throw Error(concat(path.string(), ": ", error.what()));
  }
  stream_safetensors(path, to_write, metadata);
}

void stream_safetensors(const fs::path& path, const std::vector<TensorToWrite>& tensors,
                        const std::map<std::string, std::string>& metadata) {
  std::set<std::string> names;
  std::vector<const Dtype*> dtypes;
  for (const TensorToWrite& tensor : tensors) {
    const std::string place = path.string() + ": tensor " + ascii(tensor.name);
    VERNIER_CHECK(tensor.name != kMetadataName, place, ": the name is reserved; rename it");
    VERNIER_CHECK(names.insert(tensor.name).second, place, ": the name is given twice; rename one");
    dtypes.push_back(find_dtype(tensor.dtype));
    VERNIER_CHECK(dtypes.back() != nullptr, place, ": safetensors has no dtype for ",
                  c10::toString(tensor.dtype), "; convert it");
  }
  // Where the data of each tensor goes: by element size, so that no tensor starts unaligned.
  std::vector<std::size_t> order(tensors.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return dtypes[a]->bytes > dtypes[b]->bytes;
  });
  std::vector<int64_t> begins(tensors.size());
  int64_t end = 0;
  for (const std::size_t i : order) {
    begins[i] = end;
    end += data_bytes(tensors[i]);
  }

  std::string header = "{";
  if (!metadata.empty()) {
    header += concat("\"", kMetadataName, "\":{");
    const char* separator = "";
    for (const auto& [key, value] : metadata) {
      header += concat(separator, utf8_json(key, "the metadata key"), ":",
                       utf8_json(value, "the metadata value"));
      separator = ",";
    }
    header += "}";
  }
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const TensorToWrite& tensor = tensors[i];
    header += concat(header.size() > 1 ? "," : "", utf8_json(tensor.name, "the tensor name"),
                     ":{\"dtype\":\"", dtypes[i]->name, "\",\"shape\":[");
    for (size_t d = 0; d < tensor.shape.size(); ++d)
      header += concat(d > 0 ? "," : "", tensor.shape[d]);
    header += concat("],\"data_offsets\":[", begins[i], ",", begins[i] + data_bytes(tensor), "]}");
  }
  header += "}";
  header.append((8 - header.size() % 8) % 8, ' ');
  VERNIER_CHECK(header.size() <= kMaxHeaderBytes, path.string(), ": the header has ", header.size(),
                " bytes, readers take at most ", kMaxHeaderBytes,
                "; write fewer tensors or less metadata to one file");

  AtomicFile file(path);
  const uint64_t header_bytes = header.size();
  file.write(&header_bytes, sizeof header_bytes);
  file.write(header.data(), header.size());
  for (const std::size_t i : order) {
    const at::Tensor made = tensors[i].make();
    VERNIER_CHECK(made.scalar_type() == tensors[i].dtype && made.sizes() == tensors[i].shape,
                  path.string(), ": tensor ", ascii(tensors[i].name), " became ",
                  c10::toString(made.scalar_type()), " ", made.sizes(), ", not ",
                  c10::toString(tensors[i].dtype), " ", at::IntArrayRef(tensors[i].shape));
    const at::Tensor data = made.detach().to(at::kCPU).contiguous().resolve_neg();
    file.write(data.const_data_ptr(), data.nbytes());
  }
  file.commit();
}

void write_safetensors_folder(const fs::path& folder, std::vector<TensorToWrite> tensors,
                              int64_t shard_bytes) {
  std::sort(tensors.begin(), tensors.end(),
            [](const TensorToWrite& a, const TensorToWrite& b) { return a.name < b.name; });
  std::vector<std::vector<TensorToWrite>> shards(1);
  int64_t total = 0, in_shard = 0;
  for (TensorToWrite& tensor : tensors) {
    const int64_t bytes = data_bytes(tensor);
    if (!shards.back().empty() && in_shard + bytes > shard_bytes) {
      shards.emplace_back();
      in_shard = 0;
    }
    in_shard += bytes;
    total += bytes;
    shards.back().push_back(std::move(tensor));
  }
  const std::map<std::string, std::string> metadata = {{"format", "pt"}};
  if (shards.size() == 1)
    return stream_safetensors(folder / "model.safetensors", shards.front(), metadata);
  nlohmann::ordered_json index;
  index["metadata"]["total_size"] = total;
  std::map<std::string, std::string> shard_of;
  for (size_t i = 0; i < shards.size(); ++i) {
    std::array<char, 64> name;
    std::snprintf(name.data(), name.size(), "model-%05zu-of-%05zu.safetensors", i + 1,
                  shards.size());
    stream_safetensors(folder / name.data(), shards[i], metadata);
    for (const TensorToWrite& tensor : shards[i]) shard_of[tensor.name] = name.data();
  }
  index["weight_map"] = shard_of;
  write_text_atomically(folder / "model.safetensors.index.json", index.dump(2) + "\n");
}

}  // namespace vernier
