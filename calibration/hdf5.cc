#include <vernier/calibration/hdf5.h>
#include <vernier/kernels/error.h>

#include <fcntl.h>
#include <hdf5.h>
#if H5_VERSION_GE(1, 13, 0)
#include <H5FDdevelop.h>
#endif
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <system_error>
#include <type_traits>
#include <unordered_set>
#include <utility>

namespace vernier::hdf5 {
namespace {

namespace fs = std::filesystem;

static_assert(std::endian::native == std::endian::little,
              "half types and global heaps are read as little endian");

/// `text` fit for a message of one line: control characters and excess length removed.
std::string printable(std::string_view text) {
  std::size_t length = std::min<std::size_t>(text.size(), 300);
  // Not through the middle of a UTF-8 character.
  while (length < text.size() && length > 0 && (text[length] & 0xc0) == 0x80) --length;
  std::string out(text.substr(0, length));
  if (length < text.size()) out += "...";
  for (char& c : out)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  return out;
}

/// Held during every use of the C library: one thread at a time, since many builds of it are not
/// thread-safe, with its printing muted and then given back to the program as it was.
class Call {
 public:
  Call() : lock_(mutex()) {
    // A damaged file leaves memory behind in the library, of which it complains on stderr as the
    // program exits. Handlers run in reverse order: one set after the library's mutes it in time.
    [[maybe_unused]] static const bool muted_at_exit =
        H5open() >= 0 && std::atexit([] { H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr); }) == 0;
    H5Eget_auto2(H5E_DEFAULT, &function_, &data_);
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  ~Call() {
    H5Eclear2(H5E_DEFAULT);
    H5Eset_auto2(H5E_DEFAULT, function_, data_);
  }

 private:
  static std::recursive_mutex& mutex() {
    static auto* const mutex = new std::recursive_mutex;  // Never destroyed: Files may be static.
    return *mutex;
  }

  std::lock_guard<std::recursive_mutex> lock_;
  H5E_auto2_t function_ = nullptr;
  void* data_ = nullptr;
};

/// The most specific entry of the library's error stack. To be asked for right after the call that
/// failed: the next call, be it a close, clears the stack.
std::string library_reason() {
  std::string reason;
  H5Ewalk2(
      H5E_DEFAULT, H5E_WALK_UPWARD,
      [](unsigned, const H5E_error2_t* error, void* out) -> herr_t {
        auto& text = *static_cast<std::string*>(out);
        if (text.empty() && error->desc != nullptr) text = error->desc;
        return 0;
      },
      &reason);
  return reason.empty() ? "HDF5 gives no reason" : "HDF5: " + printable(reason);
}

/// Owner of one HDF5 identifier.
class Handle {
 public:
  using Closer = herr_t (*)(hid_t);

  Handle() = default;
  Handle(hid_t id, Closer closer) : id_(id), closer_(closer) {}
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, -1)), closer_(other.closer_) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(id_, other.id_);
    std::swap(closer_, other.closer_);
    return *this;
  }
  ~Handle() {
    if (id_ >= 0) closer_(id_);
  }

  hid_t id() const { return id_; }
  bool ok() const { return id_ >= 0; }
  hid_t release() { return std::exchange(id_, -1); }

 private:
  hid_t id_ = -1;
  Closer closer_ = nullptr;
};

struct TypeName {
  ElementType type;
  const char* name;
};
constexpr std::array<TypeName, 15> kTypeNames{{
    {ElementType::boolean, "bool"},
    {ElementType::int8, "int8"},
    {ElementType::uint8, "uint8"},
    {ElementType::int16, "int16"},
    {ElementType::uint16, "uint16"},
    {ElementType::int32, "int32"},
    {ElementType::uint32, "uint32"},
    {ElementType::int64, "int64"},
    {ElementType::uint64, "uint64"},
    {ElementType::float16, "float16"},
    {ElementType::bfloat16, "bfloat16"},
    {ElementType::float32, "float32"},
    {ElementType::float64, "float64"},
    {ElementType::text, "text"},
    {ElementType::other, "an unsupported type"},
}};

bool is_integer(ElementType type) {
  return type >= ElementType::boolean && type <= ElementType::uint64;
}

bool is_float(ElementType type) {
  return type >= ElementType::float16 && type <= ElementType::float64;
}

template <typename T>
hid_t memory_type() {
  if constexpr (std::is_same_v<T, int8_t>) return H5T_NATIVE_INT8;
  if constexpr (std::is_same_v<T, uint8_t>) return H5T_NATIVE_UINT8;
  if constexpr (std::is_same_v<T, int16_t>) return H5T_NATIVE_INT16;
  if constexpr (std::is_same_v<T, uint16_t>) return H5T_NATIVE_UINT16;
  if constexpr (std::is_same_v<T, int32_t>) return H5T_NATIVE_INT32;
  if constexpr (std::is_same_v<T, uint32_t>) return H5T_NATIVE_UINT32;
  if constexpr (std::is_same_v<T, int64_t>) return H5T_NATIVE_INT64;
  if constexpr (std::is_same_v<T, uint64_t>) return H5T_NATIVE_UINT64;
  if constexpr (std::is_same_v<T, float>) return H5T_NATIVE_FLOAT;
  if constexpr (std::is_same_v<T, double>) return H5T_NATIVE_DOUBLE;
}

template <typename T>
hid_t file_type() {
  if constexpr (std::is_same_v<T, int8_t>) return H5T_STD_I8LE;
  if constexpr (std::is_same_v<T, uint8_t>) return H5T_STD_U8LE;
  if constexpr (std::is_same_v<T, int16_t>) return H5T_STD_I16LE;
  if constexpr (std::is_same_v<T, uint16_t>) return H5T_STD_U16LE;
  if constexpr (std::is_same_v<T, int32_t>) return H5T_STD_I32LE;
  if constexpr (std::is_same_v<T, uint32_t>) return H5T_STD_U32LE;
  if constexpr (std::is_same_v<T, int64_t>) return H5T_STD_I64LE;
  if constexpr (std::is_same_v<T, uint64_t>) return H5T_STD_U64LE;
  if constexpr (std::is_same_v<T, float>) return H5T_IEEE_F32LE;
  if constexpr (std::is_same_v<T, double>) return H5T_IEEE_F64LE;
}

/// Bit layout of the float formats: exponent bits, mantissa bits; the sign is the highest bit.
struct FloatLayout {
  ElementType type;
  std::size_t bytes, exponent, mantissa;
};
constexpr std::array<FloatLayout, 4> kFloats{{
    {ElementType::float16, 2, 5, 10},
    {ElementType::bfloat16, 2, 8, 7},
    {ElementType::float32, 4, 8, 23},
    {ElementType::float64, 8, 11, 52},
}};

Handle half_type(ElementType format) {
  const FloatLayout& layout = format == ElementType::float16 ? kFloats[0] : kFloats[1];
  // Fields first, size last: HDF5 refuses a size that does not hold the current fields.
  Handle type(H5Tcopy(H5T_IEEE_F32LE), H5Tclose);
  const bool ok =
      type.ok() &&
      H5Tset_fields(type.id(), 15, layout.mantissa, layout.exponent, 0, layout.mantissa) >= 0 &&
      H5Tset_precision(type.id(), 16) >= 0 &&
      H5Tset_ebias(type.id(), (std::size_t{1} << (layout.exponent - 1)) - 1) >= 0 &&
      H5Tset_size(type.id(), 2) >= 0;
  return ok ? std::move(type) : Handle();
}

/// h5py's bool.
Handle boolean_type() {
  Handle type(H5Tenum_create(H5T_STD_I8LE), H5Tclose);
  const int8_t no = 0;
  const int8_t yes = 1;
  const bool ok = type.ok() && H5Tenum_insert(type.id(), "FALSE", &no) >= 0 &&
                  H5Tenum_insert(type.id(), "TRUE", &yes) >= 0;
  return ok ? std::move(type) : Handle();
}

Handle text_type() {
  Handle type(H5Tcopy(H5T_C_S1), H5Tclose);
  const bool ok = type.ok() && H5Tset_size(type.id(), H5T_VARIABLE) >= 0 &&
                  H5Tset_cset(type.id(), H5T_CSET_UTF8) >= 0;
  return ok ? std::move(type) : Handle();
}

ElementType classify_integer(hid_t type) {
  const std::size_t bytes = H5Tget_size(type);
  if (H5Tget_precision(type) != 8 * bytes) return ElementType::other;
  const bool is_signed = H5Tget_sign(type) == H5T_SGN_2;
  switch (bytes) {
    case 1:
      return is_signed ? ElementType::int8 : ElementType::uint8;
    case 2:
      return is_signed ? ElementType::int16 : ElementType::uint16;
    case 4:
      return is_signed ? ElementType::int32 : ElementType::uint32;
    case 8:
      return is_signed ? ElementType::int64 : ElementType::uint64;
    default:
      return ElementType::other;
  }
}

ElementType classify_float(hid_t type) {
  std::size_t sign = 0, exponent_at = 0, exponent = 0, mantissa_at = 0, mantissa = 0;
  if (H5Tget_fields(type, &sign, &exponent_at, &exponent, &mantissa_at, &mantissa) < 0)
    return ElementType::other;
  for (const FloatLayout& layout : kFloats) {
    const bool same = H5Tget_size(type) == layout.bytes &&
                      H5Tget_precision(type) == 8 * layout.bytes && mantissa_at == 0 &&
                      mantissa == layout.mantissa && exponent_at == layout.mantissa &&
                      exponent == layout.exponent && sign == 8 * layout.bytes - 1 &&
                      H5Tget_ebias(type) == (std::size_t{1} << (exponent - 1)) - 1 &&
                      H5Tget_norm(type) == H5T_NORM_IMPLIED;
    if (same) return layout.type;
  }
  return ElementType::other;
}

ElementType classify(hid_t type) {
  switch (H5Tget_class(type)) {
    case H5T_INTEGER:
      return classify_integer(type);
    case H5T_FLOAT:
      return classify_float(type);
    case H5T_STRING:
      return ElementType::text;
    case H5T_ENUM: {
      int8_t no = -1;
      int8_t yes = -1;
      // The values are read as one byte, so the sizes come first: the enumeration's, and that of
      // its integer, which in a damaged file can differ.
      const Handle base(H5Tget_super(type), H5Tclose);
      const bool same = base.ok() && H5Tget_size(base.id()) == 1 && H5Tget_size(type) == 1 &&
                        H5Tget_class(base.id()) == H5T_INTEGER && H5Tget_nmembers(type) == 2 &&
                        H5Tenum_valueof(type, "FALSE", &no) >= 0 &&
                        H5Tenum_valueof(type, "TRUE", &yes) >= 0 && no == 0 && yes == 1;
      return same ? ElementType::boolean : ElementType::other;
    }
    default:
      return ElementType::other;
  }
}

/// Asked by HDF5 about values that the wanted type cannot hold, which it would otherwise clip.
H5T_conv_ret_t refuse_clipping(H5T_conv_except_t what, hid_t source, hid_t, void* value, void*,
                               void* clipped) {
  if (what != H5T_CONV_EXCEPT_RANGE_HI && what != H5T_CONV_EXCEPT_RANGE_LOW)
    return H5T_CONV_UNHANDLED;
  if (H5Tequal(source, H5T_NATIVE_DOUBLE) > 0) {
    // An infinity stays one; only finite values are too large for float.
    double number = 0;
    std::memcpy(&number, value, sizeof number);
    if (std::isinf(number)) return H5T_CONV_UNHANDLED;
  }
  *static_cast<bool*>(clipped) = true;
  return H5T_CONV_ABORT;
}

/// Where a variable-length string stands in its file: the 16 bytes a dataset or attribute holds.
struct TextReference {
  uint32_t length;
  uint64_t heap;
  uint32_t index;
};
constexpr std::size_t kReferenceBytes = 16;

/// "Converts" a variable-length string to 16 opaque bytes: its reference, as stored.
herr_t keep_reference(hid_t source, hid_t target, H5T_cdata_t* state, size_t, size_t, size_t, void*,
                      void*, hid_t) {
  if (state->command != H5T_CONV_INIT) return 0;  // In place, both of 16 bytes.
  if (H5Tis_variable_str(source) <= 0 || H5Tget_size(source) != kReferenceBytes ||
      H5Tget_size(target) != kReferenceBytes)
    return -1;
  state->need_bkg = H5T_BKG_NO;
  return 0;
}

/// Memory type that reads a variable-length string as its reference. The library's own reading of
/// such strings copies as many bytes as the heap states into a buffer of the length stated at the
/// reference (HDF5 1.10.8: a heap overflow that a crafted file can cause), so Vernier goes to the
/// heap itself. The conversion is registered once per process and concerns only this opaque type.
hid_t reference_type() {
  static const hid_t type = [] {
    const Handle text = text_type();
    const hid_t opaque = H5Tcreate(H5T_OPAQUE, kReferenceBytes);
    H5Tset_tag(opaque, "vernier text reference");
    H5Tregister(H5T_PERS_SOFT, "vernier text", text.id(), opaque, keep_reference);
    return opaque;
  }();
  return type;
}

// Writing goes through a driver of Vernier's, for one reason: when the library cannot write what it
// still holds as a file closes (the disk is full), HDF5 1.10.8 keeps the identifier of the half
// closed file and crashes on it as the program exits. So the driver notes the first failure, tells
// the library that all is well, and File throws what was noted.

/// The error number of the first write that failed; 0 while none has.
struct WriteFailure {
  int error = 0;

  void note(int number) {
    if (error == 0) error = number;
  }
};

/// The driver's view of an open file; the library's part stands first.
struct OutputFile {
  H5FD_t base{};
  int descriptor = -1;
  dev_t device = 0;
  ino_t inode = 0;
  haddr_t allocated = 0;  // The end of what the library has given out: "eoa".
  haddr_t end = 0;        // The end of the file: "eof".
  WriteFailure* failure = nullptr;
};

OutputFile& output(H5FD_t* file) { return *reinterpret_cast<OutputFile*>(file); }
const OutputFile& output(const H5FD_t* file) { return *reinterpret_cast<const OutputFile*>(file); }

H5FD_t* open_output(const char* name, unsigned flags, hid_t access, haddr_t) {
  const void* info = H5Pget_driver_info(access);
  if (info == nullptr) return nullptr;
  const int mode = ((flags & H5F_ACC_RDWR) != 0 ? O_RDWR : O_RDONLY) |
                   ((flags & H5F_ACC_TRUNC) != 0 ? O_TRUNC : 0) |
                   ((flags & H5F_ACC_CREAT) != 0 ? O_CREAT : 0) |
                   ((flags & H5F_ACC_EXCL) != 0 ? O_EXCL : 0);
  const int descriptor = ::open(name, mode | O_CLOEXEC, 0666);
  if (descriptor < 0) return nullptr;
  struct stat status {};
  if (::fstat(descriptor, &status) != 0) {
    ::close(descriptor);
    return nullptr;
  }
  auto* file = new OutputFile;
  file->descriptor = descriptor;
  file->device = status.st_dev;
  file->inode = status.st_ino;
  file->end = static_cast<haddr_t>(status.st_size);
  std::memcpy(&file->failure, info, sizeof file->failure);
  return &file->base;
}

herr_t close_output(H5FD_t* base) {
  OutputFile* file = &output(base);
  if (::close(file->descriptor) != 0 && errno != EINTR) file->failure->note(errno);
  delete file;
  return 0;
}

int compare_outputs(const H5FD_t* a, const H5FD_t* b) {
  const auto key = [](const H5FD_t* file) {
    return std::pair(output(file).device, output(file).inode);
  };
  return key(a) < key(b) ? -1 : key(b) < key(a) ? 1 : 0;
}

herr_t query_output(const H5FD_t*, unsigned long* features) {
  if (features != nullptr)
    *features = H5FD_FEAT_AGGREGATE_METADATA | H5FD_FEAT_ACCUMULATE_METADATA |
                H5FD_FEAT_DATA_SIEVE | H5FD_FEAT_AGGREGATE_SMALLDATA |
                H5FD_FEAT_POSIX_COMPAT_HANDLE | H5FD_FEAT_DEFAULT_VFD_COMPATIBLE;
  return 0;
}

herr_t read_output(H5FD_t* base, H5FD_mem_t, hid_t, haddr_t address, std::size_t bytes, void* out) {
  auto* next = static_cast<char*>(out);
  while (bytes > 0) {
    const ssize_t got = ::pread(output(base).descriptor, next, bytes, static_cast<off_t>(address));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return -1;
    if (got == 0) {  // What was never written reads as zeros.
      std::memset(next, 0, bytes);
      return 0;
    }
    next += got;
    address += static_cast<haddr_t>(got);
    bytes -= static_cast<std::size_t>(got);
  }
  return 0;
}

herr_t write_output(H5FD_t* base, H5FD_mem_t, hid_t, haddr_t address, std::size_t bytes,
                    const void* data) {
  OutputFile& file = output(base);
  file.end = std::max(file.end, address + bytes);
  const auto* next = static_cast<const char*>(data);
  while (bytes > 0 && file.failure->error == 0) {
    const ssize_t put = ::pwrite(file.descriptor, next, bytes, static_cast<off_t>(address));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) {
      file.failure->note(errno);
      break;
    }
    next += put;
    address += static_cast<haddr_t>(put);
    bytes -= static_cast<std::size_t>(put);
  }
  return 0;
}

herr_t truncate_output(H5FD_t* base, hid_t, hbool_t) {
  OutputFile& file = output(base);
  if (file.end == file.allocated) return 0;
  if (file.failure->error == 0 &&
      ::ftruncate(file.descriptor, static_cast<off_t>(file.allocated)) != 0)
    file.failure->note(errno);
  file.end = file.allocated;
  return 0;
}

herr_t output_handle(H5FD_t* base, hid_t, void** handle) {
  *handle = &output(base).descriptor;
  return 0;
}

hid_t output_driver() {
  static const hid_t driver = [] {
    H5FD_class_t methods{};
#ifdef H5FD_CLASS_VERSION
    methods.version = H5FD_CLASS_VERSION;
    methods.value = static_cast<H5FD_class_value_t>(H5_VFD_RESERVED + 1);
#endif
    methods.name = "vernier";
    methods.maxaddr = static_cast<haddr_t>(std::numeric_limits<off_t>::max());
    methods.fc_degree = H5F_CLOSE_STRONG;
    methods.fapl_size = sizeof(WriteFailure*);
    methods.open = open_output;
    methods.close = close_output;
    methods.cmp = compare_outputs;
    methods.query = query_output;
    methods.get_eoa = [](const H5FD_t* file, H5FD_mem_t) { return output(file).allocated; };
    methods.set_eoa = [](H5FD_t* file, H5FD_mem_t, haddr_t address) -> herr_t {
      output(file).allocated = address;
      return 0;
    };
    methods.get_eof = [](const H5FD_t* file, H5FD_mem_t) { return output(file).end; };
    methods.get_handle = output_handle;
    methods.read = read_output;
    methods.write = write_output;
    methods.truncate = truncate_output;
    const H5FD_mem_t map[H5FD_MEM_NTYPES] = H5FD_FLMAP_DICHOTOMY;
    std::copy(std::begin(map), std::end(map), std::begin(methods.fl_map));
    return H5FDregister(&methods);
  }();
  return driver;
}

/// For a message: why a write failed.
std::string failure_text(int error) {
  switch (error) {
    case ENOSPC:
    case EDQUOT:
      return "the disk is full; free space or write elsewhere";
    case EFBIG:
      return "the file is larger than this file system or the process's limit allows";
    default:
      return std::generic_category().message(error);
  }
}

/// The product, or nothing when it is beyond int64.
std::optional<int64_t> checked_product(const std::vector<int64_t>& factors) {
  int64_t product = 1;
  for (const int64_t factor : factors)
    if (__builtin_mul_overflow(product, factor, &product)) return std::nullopt;
  return product;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i)
    text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

/// "a/b" and "/a/b/" as {"a", "b"}.
std::vector<std::string> components(const fs::path& file, std::string_view path) {
  std::vector<std::string> parts;
  std::size_t begin = 0;
  while (begin <= path.size()) {
    const std::size_t end = std::min(path.find('/', begin), path.size());
    const std::string_view part = path.substr(begin, end - begin);
    begin = end + 1;
    if (part.empty()) continue;
    // HDF5 takes "." for the group itself, which would give one object two names.
    VERNIER_CHECK(part != "." && part.find('\0') == std::string_view::npos, file.string(), ": ",
                  printable(path), " is no HDF5 path; a name may not be '.' or hold a zero byte");
    parts.emplace_back(part);
  }
  return parts;
}

/// A dataset that has passed every check but those of its size.
struct OpenDataset {
  Handle dataset, type, space, layout;
  DatasetInfo info;
  std::size_t element_bytes = 0;
};

}  // namespace

const char* element_type_name(ElementType type) {
  for (const TypeName& entry : kTypeNames)
    if (entry.type == type) return entry.name;
  return "an unsupported type";
}

int64_t DatasetInfo::size() const {
  int64_t product = 1;
  for (const int64_t dimension : shape) product *= dimension;
  return product;
}

struct File::State {
  fs::path path;
  Limits limits;
  // Before the file, so that it outlives it: the driver writes to it as the file closes.
  WriteFailure failure;
  Handle file;
  bool writable = false;
  // Datasets whose chunks were summed up already; summing walks the whole index of the chunks.
  mutable std::unordered_set<std::string> summed;

  ~State() {
    if (!file.ok()) return;
    const Call call;
    file = Handle();
  }

  std::string where(std::string_view object) const {
    return path.string() + ": " + (object.empty() ? "/" : printable(object));
  }

  [[noreturn]] void fail(std::string_view object, const char* what) const {
    // Before anything else: building the message must not clear the library's stack.
    const std::string reason = library_reason();
    check_written(object);  // The cause, where there was such a failure.
    throw Error(concat(where(object), ": cannot ", what, " (", reason, ")"));
  }

  /// Throws when a write failed, now or earlier.
  void check_written(std::string_view object) const {
    VERNIER_CHECK(failure.error == 0, where(object),
                  ": cannot be written: ", failure_text(failure.error));
  }

  void check_open() const {
    VERNIER_CHECK(file.ok(), path.string(), ": the HDF5 file is already closed; open it again");
  }

  void check_writable(std::string_view object) const {
    check_open();
    VERNIER_CHECK(writable, where(object), ": the file is open for reading only");
  }

  int64_t file_bytes() const {
    hsize_t bytes = 0;
    if (H5Fget_filesize(file.id(), &bytes) < 0) fail("/", "tell the file's size");
    if (!writable) {
      // What the file says of its size is not trusted.
      std::error_code error;
      const auto actual = fs::file_size(path, error);
      if (!error) bytes = std::min<hsize_t>(bytes, actual);
    }
    return static_cast<int64_t>(std::min<hsize_t>(bytes, std::numeric_limits<int64_t>::max()));
  }

  /// The member `name` of an open group; not ok when there is none.
  Handle open_member(hid_t group, const std::string& name, std::string_view object) const {
    const htri_t there = H5Lexists(group, name.c_str(), H5P_DEFAULT);
    if (there < 0) fail(object, "look it up");
    if (there == 0) return {};
    H5L_info_t link;
    if (H5Lget_info(group, name.c_str(), &link, H5P_DEFAULT) < 0) fail(object, "look it up");
    const char* kind = link.type == H5L_TYPE_SOFT       ? "a soft link"
                       : link.type == H5L_TYPE_EXTERNAL ? "an external link"
                                                        : "a user-defined link";
    VERNIER_CHECK(link.type == H5L_TYPE_HARD, where(object), ": ", printable(name), " is ", kind,
                  ", and links are not followed; copy the data into the file");
    Handle member(H5Oopen(group, name.c_str(), H5P_DEFAULT), H5Oclose);
    if (!member.ok()) fail(object, "open it");
    return member;
  }

  /// The object at a path, reached by hard links only; not ok when there is none.
  Handle find(std::string_view object) const {
    check_open();
    Handle at(H5Gopen2(file.id(), "/", H5P_DEFAULT), H5Oclose);
    if (!at.ok()) fail("/", "open the root group");
    for (const std::string& name : components(path, object)) {
      if (H5Iget_type(at.id()) != H5I_GROUP) return {};
      Handle next = open_member(at.id(), name, object);
      if (!next.ok()) return {};
      at = std::move(next);
    }
    return at;
  }

  Handle find_of_type(std::string_view object, H5I_type_t type, const char* name) const {
    Handle found = find(object);
    VERNIER_CHECK(found.ok(), where(object), ": there is no such ", name);
    VERNIER_CHECK(H5Iget_type(found.id()) == type, where(object), ": is not a ", name);
    return found;
  }

  Handle find_any(std::string_view object) const {
    Handle found = find(object);
    VERNIER_CHECK(found.ok(), where(object), ": there is no such group or dataset");
    return found;
  }

  /// Refuses storage outside the file and filters that would load code.
  void check_storage(std::string_view object, hid_t properties) const {
    const H5D_layout_t layout = H5Pget_layout(properties);
    VERNIER_CHECK(layout == H5D_COMPACT || layout == H5D_CONTIGUOUS || layout == H5D_CHUNKED,
                  where(object),
                  ": its data is a view of other datasets (virtual); copy the data into the file");
    VERNIER_CHECK(H5Pget_external_count(properties) == 0, where(object),
                  ": its data is in an external file; copy the data into the file");
    const int filters = H5Pget_nfilters(properties);
    if (filters < 0) fail(object, "read its filters");
    for (int i = 0; i < filters; ++i) {
      unsigned flags = 0;
      std::size_t values = 0;
      std::array<char, 64> name{};
      unsigned config = 0;
      const H5Z_filter_t filter =
          H5Pget_filter2(properties, static_cast<unsigned>(i), &flags, &values, nullptr,
                         name.size() - 1, name.data(), &config);
      VERNIER_CHECK(filter == H5Z_FILTER_DEFLATE || filter == H5Z_FILTER_SHUFFLE ||
                        filter == H5Z_FILTER_FLETCHER32,
                    where(object), ": it is compressed by filter ", filter, " (",
                    printable(name.data()), "), which is not read; store it with gzip or none");
    }
  }

  OpenDataset open_dataset(std::string_view object) const {
    OpenDataset opened;
    opened.dataset = find_of_type(object, H5I_DATASET, "dataset");
    const hid_t id = opened.dataset.id();
    // First of all: asking a virtual dataset for its extent opens the files it names.
    opened.layout = Handle(H5Dget_create_plist(id), H5Pclose);
    if (!opened.layout.ok()) fail(object, "read its layout");
    check_storage(object, opened.layout.id());
    opened.type = Handle(H5Dget_type(id), H5Tclose);
    if (!opened.type.ok()) fail(object, "read its type");
    opened.element_bytes = H5Tget_size(opened.type.id());
    opened.space = Handle(H5Dget_space(id), H5Sclose);
    if (!opened.space.ok()) fail(object, "read its shape");
    opened.info.type = classify(opened.type.id());
    const H5S_class_t kind = H5Sget_simple_extent_type(opened.space.id());
    if (kind == H5S_SCALAR) return opened;
    if (kind != H5S_SIMPLE) {  // h5py's Empty: a dataset without any value.
      opened.info.type = ElementType::other;
      opened.info.shape = {0};
      return opened;
    }
    const int rank = H5Sget_simple_extent_ndims(opened.space.id());
    if (rank < 0) fail(object, "read its shape");
    std::vector<hsize_t> dimensions(static_cast<std::size_t>(rank));
    if (H5Sget_simple_extent_dims(opened.space.id(), dimensions.data(), nullptr) < 0)
      fail(object, "read its shape");
    // The product with zeros left out bounds every product of dimensions, so that none overflows.
    int64_t bound = 1;
    for (const hsize_t dimension : dimensions) {
      const bool fits = dimension <= hsize_t{std::numeric_limits<int64_t>::max()} &&
                        !__builtin_mul_overflow(
                            bound, static_cast<int64_t>(std::max<hsize_t>(dimension, 1)), &bound);
      VERNIER_CHECK(fits, where(object), ": its shape has more than 2^63 elements; ",
                    "the file is damaged");
      opened.info.shape.push_back(static_cast<int64_t>(dimension));
    }
    return opened;
  }

  /// Refuses sizes that the file cannot hold, before memory is allocated for `elements` of them.
  void check_size(std::string_view object, const OpenDataset& opened, int64_t elements,
                  std::size_t wanted_bytes) const {
    const auto element_bytes = static_cast<int64_t>(std::max(opened.element_bytes, wanted_bytes));
    const std::optional<int64_t> bytes = checked_product({elements, element_bytes});
    VERNIER_CHECK(bytes && *bytes <= limits.max_bytes, where(object), ": reading ", elements,
                  " elements of shape ", shape_text(opened.info.shape),
                  " takes more than the limit of ", limits.max_bytes, " bytes");
    const std::optional<int64_t> stored =
        checked_product({opened.info.size(), static_cast<int64_t>(opened.element_bytes)});
    const int64_t available = file_bytes();
    const H5D_layout_t layout = H5Pget_layout(opened.layout.id());
    const bool chunked = layout == H5D_CHUNKED;
    const std::optional<int64_t> most =
        checked_product({available, chunked ? limits.max_expansion : int64_t{1}});
    // No bound beyond int64 is exceeded by a size within it.
    const auto too_large = [&most](std::optional<int64_t> size) {
      return !size || (most && *size > *most);
    };
    VERNIER_CHECK(!too_large(stored), where(object), ": claims shape ",
                  shape_text(opened.info.shape), " of ", opened.element_bytes,
                  " bytes each, more than its file of ", available,
                  " bytes can hold; the file is damaged");
    // HDF5 1.10.8 reads beyond the buffer of compact data (kept in the header) that is too short.
    VERNIER_CHECK(layout != H5D_COMPACT ||
                      H5Dget_storage_size(opened.dataset.id()) >= static_cast<hsize_t>(*stored),
                  where(object), ": claims shape ", shape_text(opened.info.shape), " of ",
                  opened.element_bytes, " bytes each, more than it stores; the file is damaged");
    if (chunked) check_chunks(object, opened, available, too_large);
  }

  template <typename TooLarge>
  void check_chunks(std::string_view object, const OpenDataset& opened, int64_t available,
                    const TooLarge& too_large) const {
    std::array<hsize_t, H5S_MAX_RANK> chunk{};
    const int rank = H5Pget_chunk(opened.layout.id(), H5S_MAX_RANK, chunk.data());
    if (rank < 0) fail(object, "read its layout");
    std::vector<int64_t> factors{static_cast<int64_t>(opened.element_bytes)};
    for (int i = 0; i < rank; ++i)
      factors.push_back(static_cast<int64_t>(std::min<hsize_t>(
          chunk[static_cast<std::size_t>(i)], std::numeric_limits<int64_t>::max())));
    VERNIER_CHECK(!too_large(checked_product(factors)), where(object),
                  ": claims chunks larger than its file of ", available,
                  " bytes can hold; the file is damaged");
    if (writable || summed.contains(std::string(object))) return;
    // A chunk is read into a buffer of the length that the index of the chunks states for it.
    const hsize_t stored = H5Dget_storage_size(opened.dataset.id());
    VERNIER_CHECK(stored <= static_cast<hsize_t>(available), where(object), ": its chunks claim ",
                  stored, " bytes, more than its file of ", available,
                  " bytes has; the file is damaged");
    summed.emplace(object);
  }

  /// Reads the selected elements; `selection` H5S_ALL for the whole dataset.
  void read_into(std::string_view object, const OpenDataset& opened, hid_t memory_type_id,
                 hid_t memory_space, hid_t file_space, void* out) const {
    bool clipped = false;
    const Handle transfer(H5Pcreate(H5P_DATASET_XFER), H5Pclose);
    if (!transfer.ok() || H5Pset_type_conv_cb(transfer.id(), refuse_clipping, &clipped) < 0)
      fail(object, "read it");
    if (H5Dread(opened.dataset.id(), memory_type_id, memory_space, file_space, transfer.id(), out) <
        0) {
      VERNIER_CHECK(!clipped, where(object), ": a value of this ",
                    element_type_name(opened.info.type),
                    " dataset does not fit the type it is read as");
      fail(object, "read it");
    }
  }

  template <typename T>
  void check_kind(std::string_view object, ElementType type) const {
    if constexpr (std::is_integral_v<T>) {
      VERNIER_CHECK(is_integer(type), where(object), ": holds ", element_type_name(type),
                    ", where integers are needed");
    } else {
      VERNIER_CHECK(is_float(type), where(object), ": holds ", element_type_name(type),
                    ", where floating point is needed");
    }
  }

  /// Space for a new array; checks the shape against the number of values.
  Handle new_space(std::string_view object, std::span<const int64_t> shape,
                   std::size_t values) const {
    const std::vector<int64_t> dimensions(shape.begin(), shape.end());
    VERNIER_CHECK(dimensions.size() <= H5S_MAX_RANK, where(object), ": ", dimensions.size(),
                  " dimensions; HDF5 allows ", H5S_MAX_RANK);
    VERNIER_CHECK(
        std::all_of(dimensions.begin(), dimensions.end(), [](int64_t d) { return d >= 0; }),
        where(object), ": negative dimension in shape ", shape_text(dimensions));
    const std::optional<int64_t> size = checked_product(dimensions);
    VERNIER_CHECK(size && static_cast<std::size_t>(*size) == values, where(object), ": ", values,
                  " values do not fill the shape ", shape_text(dimensions));
    if (dimensions.empty()) return Handle(H5Screate(H5S_SCALAR), H5Sclose);
    const std::vector<hsize_t> extents(dimensions.begin(), dimensions.end());
    return Handle(H5Screate_simple(static_cast<int>(extents.size()), extents.data(), nullptr),
                  H5Sclose);
  }

  /// Opens the group at the first `depth` names, creating what is not there.
  Handle make_groups(std::string_view object, const std::vector<std::string>& names,
                     std::size_t depth) const {
    Handle at(H5Gopen2(file.id(), "/", H5P_DEFAULT), H5Oclose);
    if (!at.ok()) fail("/", "open the root group");
    for (std::size_t i = 0; i < depth; ++i) {
      Handle next = open_member(at.id(), names[i], object);
      if (!next.ok()) {
        const Handle link = link_properties(object);
        const Handle group = creation_properties(object, H5P_GROUP_CREATE);
        next = Handle(H5Gcreate2(at.id(), names[i].c_str(), link.id(), group.id(), H5P_DEFAULT),
                      H5Oclose);
        if (!next.ok()) fail(object, "create a group");
      }
      VERNIER_CHECK(H5Iget_type(next.id()) == H5I_GROUP, where(object), ": cannot be created, for ",
                    printable(names[i]), " is a dataset and not a group");
      at = std::move(next);
    }
    return at;
  }

  Handle link_properties(std::string_view object) const {
    Handle properties(H5Pcreate(H5P_LINK_CREATE), H5Pclose);
    if (!properties.ok() || H5Pset_char_encoding(properties.id(), H5T_CSET_UTF8) < 0)
      fail(object, "create it");
    return properties;
  }

  /// Without time stamps, so that equal contents are equal bytes.
  Handle creation_properties(std::string_view object, hid_t kind) const {
    Handle properties(H5Pcreate(kind), H5Pclose);
    if (!properties.ok() || H5Pset_obj_track_times(properties.id(), false) < 0)
      fail(object, "create it");
    return properties;
  }

  /// Creates a dataset and writes all of it.
  void write_dataset(std::string_view object, hid_t stored_type, hid_t given_type,
                     const Handle& space, const void* values) const {
    const std::vector<std::string> names = components(path, object);
    VERNIER_CHECK(!names.empty(), where(object), ": a dataset needs a name");
    const Handle group = make_groups(object, names, names.size() - 1);
    const htri_t there = H5Lexists(group.id(), names.back().c_str(), H5P_DEFAULT);
    VERNIER_CHECK(there <= 0, where(object), ": exists already; choose another name");
    if (there < 0) fail(object, "look it up");
    if (!space.ok()) fail(object, "create its shape");
    const Handle link = link_properties(object);
    const Handle creation = creation_properties(object, H5P_DATASET_CREATE);
    const Handle dataset(H5Dcreate2(group.id(), names.back().c_str(), stored_type, space.id(),
                                    link.id(), creation.id(), H5P_DEFAULT),
                         H5Dclose);
    if (!dataset.ok()) fail(object, "create the dataset");
    if (H5Sget_simple_extent_npoints(space.id()) == 0) return;
    if (H5Dwrite(dataset.id(), given_type, H5S_ALL, H5S_ALL, H5P_DEFAULT, values) < 0)
      fail(object, "write the dataset");
    check_written(object);
  }

  std::string named(std::string_view object, std::string_view name) const {
    return concat(object.empty() ? "/" : object, " attribute ", name);
  }

  void check_attribute_name(std::string_view object, std::string_view name) const {
    VERNIER_CHECK(!name.empty() && name.find('\0') == std::string_view::npos, where(object),
                  ": an attribute's name is empty or holds a zero byte");
  }

  void write_attribute(std::string_view object, std::string_view name, hid_t stored_type,
                       hid_t given_type, const void* value) const {
    check_writable(object);
    check_attribute_name(object, name);
    const std::string label = named(object, name);
    const std::string zero_ended(name);
    const Handle owner = find_any(object);
    const htri_t there = H5Aexists(owner.id(), zero_ended.c_str());
    if (there < 0 || (there > 0 && H5Adelete(owner.id(), zero_ended.c_str()) < 0))
      fail(label, "replace it");
    const Handle space(H5Screate(H5S_SCALAR), H5Sclose);
    const Handle creation(H5Pcreate(H5P_ATTRIBUTE_CREATE), H5Pclose);
    if (!space.ok() || !creation.ok() || H5Pset_char_encoding(creation.id(), H5T_CSET_UTF8) < 0)
      fail(label, "create it");
    const Handle attribute(H5Acreate2(owner.id(), zero_ended.c_str(), stored_type, space.id(),
                                      creation.id(), H5P_DEFAULT),
                           H5Aclose);
    if (!attribute.ok()) fail(label, "create it");
    if (H5Awrite(attribute.id(), given_type, value) < 0) fail(label, "write it");
    check_written(label);
  }

  /// A scalar attribute, its type, and what the type is.
  struct OpenAttribute {
    Handle attribute, type;
    ElementType element = ElementType::other;
  };

  OpenAttribute open_attribute(std::string_view object, std::string_view name) const {
    check_attribute_name(object, name);
    const std::string zero_ended(name);
    const Handle owner = find_any(object);
    const htri_t there = H5Aexists(owner.id(), zero_ended.c_str());
    if (there < 0) fail(named(object, name), "look it up");
    VERNIER_CHECK(there > 0, where(named(object, name)), ": there is no such attribute");
    OpenAttribute opened;
    opened.attribute = Handle(H5Aopen(owner.id(), zero_ended.c_str(), H5P_DEFAULT), H5Aclose);
    if (!opened.attribute.ok()) fail(named(object, name), "open it");
    opened.type = Handle(H5Aget_type(opened.attribute.id()), H5Tclose);
    const Handle space(H5Aget_space(opened.attribute.id()), H5Sclose);
    if (!opened.type.ok() || !space.ok()) fail(named(object, name), "read its type");
    VERNIER_CHECK(H5Sget_simple_extent_npoints(space.id()) == 1, where(named(object, name)),
                  ": is not one value");
    opened.element = classify(opened.type.id());
    return opened;
  }

  [[noreturn]] void wrong_kind(std::string_view label, ElementType type, const char* wanted) const {
    throw Error(concat(where(label), ": holds ", element_type_name(type), ", where ", wanted,
                       " is needed"));
  }

  /// Bytes of the file itself, at an address as HDF5 counts them.
  void read_raw(std::string_view object, uint64_t address, void* out, std::size_t bytes) const {
    const Handle properties(H5Fget_create_plist(file.id()), H5Pclose);
    hsize_t user_block = 0;
    void* descriptor = nullptr;
    if (!properties.ok() || H5Pget_userblock(properties.id(), &user_block) < 0 ||
        H5Fget_vfd_handle(file.id(), H5P_DEFAULT, &descriptor) < 0)
      fail(object, "read its text");
    const auto available = static_cast<uint64_t>(file_bytes());
    const bool inside = user_block <= available && address <= available - user_block &&
                        bytes <= available - user_block - address;
    VERNIER_CHECK(inside, where(object), ": its text is beyond the end of the file; ",
                  "the file is damaged");
    auto* next = static_cast<char*>(out);
    auto offset = static_cast<off_t>(user_block + address);
    while (bytes > 0) {
      const ssize_t got = ::pread(*static_cast<int*>(descriptor), next, bytes, offset);
      if (got < 0 && errno == EINTR) continue;
      VERNIER_CHECK(got > 0, where(object), ": cannot read its text: ",
                    got < 0 ? std::generic_category().message(errno) : "the file ends before it");
      next += got;
      offset += got;
      bytes -= static_cast<std::size_t>(got);
    }
  }

  /// The variable-length string that `stored` (16 bytes) refers to: one object of a global heap
  /// collection (HDF5 file format specification 3.0, III.E).
  std::string read_reference(std::string_view object,
                             const std::array<char, kReferenceBytes>& stored) const {
    TextReference reference;
    std::memcpy(&reference.length, stored.data(), 4);
    std::memcpy(&reference.heap, stored.data() + 4, 8);
    std::memcpy(&reference.index, stored.data() + 12, 4);
    if (reference.length == 0 || reference.heap == 0) return "";
    // Written strings may still be in the library's cache.
    if (writable && H5Fflush(file.id(), H5F_SCOPE_LOCAL) < 0) fail(object, "read its text");
    const auto damaged = [&](bool ok) {
      VERNIER_CHECK(ok, where(object), ": its text is not where the file says; ",
                    "the file is damaged");
    };
    std::array<char, 16> header;
    const auto field = [&header](std::size_t offset, auto type) {
      decltype(type) value;
      std::memcpy(&value, header.data() + offset, sizeof value);
      return value;
    };
    read_raw(object, reference.heap, header.data(), header.size());
    const auto collection = field(8, uint64_t{});
    damaged(std::memcmp(header.data(), "GCOL\1", 5) == 0 && collection >= 32 &&
            collection <= static_cast<uint64_t>(file_bytes()));
    // Objects have 16-bit numbers, so that a longer walk is a loop made of damage.
    uint64_t at = 16;
    for (int i = 0; i <= 0xffff && at <= collection - 16; ++i) {
      read_raw(object, reference.heap + at, header.data(), header.size());
      const auto index = field(0, uint16_t{});
      const auto bytes = field(8, uint64_t{});
      if (index == 0) break;  // The free space at the end.
      damaged(bytes <= collection - 16 - at);
      if (index == reference.index) {
        damaged(reference.length <= bytes && reference.length <= limits.max_bytes);
        std::string text(reference.length, '\0');
        read_raw(object, reference.heap + at + 16, text.data(), text.size());
        return text;
      }
      at += 16 + (bytes + 7) / 8 * 8;
    }
    damaged(false);
    return "";
  }

  /// The text of one string element, given how to read it into a buffer as a memory type.
  template <typename Read>
  std::string read_one_text(std::string_view object, hid_t type, const Read& read) const {
    if (H5Tis_variable_str(type) > 0) {
      const Handle properties(H5Fget_create_plist(file.id()), H5Pclose);
      std::size_t address_bytes = 0, length_bytes = 0;
      if (!properties.ok() || H5Pget_sizes(properties.id(), &address_bytes, &length_bytes) < 0)
        fail(object, "read its text");
      VERNIER_CHECK(address_bytes == 8 && length_bytes == 8, where(object),
                    ": the file has no 64-bit addresses; copy it with h5repack");
      std::array<char, kReferenceBytes> stored{};
      read(reference_type(), stored.data());
      return read_reference(object, stored);
    }
    const std::size_t bytes = H5Tget_size(type);
    VERNIER_CHECK(static_cast<int64_t>(bytes) <= std::min(limits.max_bytes, file_bytes()),
                  where(object), ": claims ", bytes, " bytes, more than its file can hold; ",
                  "the file is damaged");
    std::string text(bytes, '\0');
    read(type, text.data());
    switch (H5Tget_strpad(type)) {
      case H5T_STR_NULLTERM:
        text.resize(std::min(text.find('\0'), text.size()));
        break;
      case H5T_STR_NULLPAD:
        text.resize(text.find_last_not_of('\0') + 1);
        break;
      default:
        text.resize(text.find_last_not_of(' ') + 1);
    }
    return text;
  }
};

namespace {

/// Whether the file holds HDF5's signature where the format allows it: at 0, 512, 1024, 2048, ...
bool has_signature(int descriptor, int64_t bytes) {
  constexpr std::string_view kSignature("\x89HDF\r\n\x1a\n", 8);
  for (int64_t at = 0; at + 8 <= bytes; at = at == 0 ? 512 : at * 2) {
    std::array<char, 8> head;
    if (::pread(descriptor, head.data(), head.size(), at) == 8 &&
        std::string_view(head.data(), head.size()) == kSignature)
      return true;
  }
  return false;
}

/// The checks of open() that do not need the library, and speak more clearly than it does.
void check_is_hdf5(const fs::path& path) {
  // Not blocking, or a pipe would wait for its writer.
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  const int error = errno;
  VERNIER_CHECK(descriptor >= 0 || error != ENOENT, path.string(), ": the file does not exist");
  VERNIER_CHECK(descriptor >= 0, path.string(),
                ": cannot be read: ", std::generic_category().message(error));
  struct stat status {};
  const bool regular = ::fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode);
  const bool signature = regular && has_signature(descriptor, status.st_size);
  ::close(descriptor);
  VERNIER_CHECK(regular, path.string(), ": is not a regular file; name an HDF5 file");
  VERNIER_CHECK(status.st_size > 0, path.string(), ": is empty; name an HDF5 file");
  VERNIER_CHECK(signature, path.string(), ": is not an HDF5 file");
}

Handle access_properties(const fs::path& path) {
  Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  // Files are written beside their place and renamed, so locks guard nothing; on network file
  // systems without them they only fail. Strong: a file closes even when an object of it is open.
  const bool ok = access.ok() && H5Pset_fapl_sec2(access.id()) >= 0 &&
                  H5Pset_file_locking(access.id(), false, true) >= 0 &&
                  H5Pset_fclose_degree(access.id(), H5F_CLOSE_STRONG) >= 0;
  VERNIER_CHECK(ok, path.string(), ": cannot set up HDF5 (", library_reason(), ")");
  return access;
}

}  // namespace

File::File(std::unique_ptr<State> state) : state_(std::move(state)) {}
File::File(File&&) noexcept = default;
File& File::operator=(File&&) noexcept = default;
File::~File() = default;

File File::open(const fs::path& path, const Limits& limits) {
  check_is_hdf5(path);
  const Call call;
  const Handle access = access_properties(path);
  Handle file(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access.id()), H5Fclose);
  if (!file.ok()) {
    const std::string reason = library_reason();
    VERNIER_CHECK(reason.find("truncated") == std::string::npos, path.string(),
                  ": is truncated; copy or create it again (", reason, ")");
    throw Error(
        concat(path.string(), ": cannot be opened; copy or create it again (", reason, ")"));
  }
  auto state = std::make_unique<State>();
  state->path = path;
  state->limits = limits;
  state->file = std::move(file);
  return File(std::move(state));
}

File File::create(const fs::path& path) {
  const Call call;
  const Handle access = access_properties(path);
  const Handle creation(H5Pcreate(H5P_FILE_CREATE), H5Pclose);
  // The format of HDF5 1.8: readable everywhere, with checksums over all structure.
  const bool ok = creation.ok() && H5Pset_obj_track_times(creation.id(), false) >= 0 &&
                  H5Pset_libver_bounds(access.id(), H5F_LIBVER_V18, H5F_LIBVER_LATEST) >= 0;
  VERNIER_CHECK(ok, path.string(), ": cannot set up HDF5 (", library_reason(), ")");
  auto state = std::make_unique<State>();
  state->path = path;
  state->writable = true;
  const WriteFailure* failure = &state->failure;
  // The driver's information is this pointer; HDF5 copies it from where it is told to.
  VERNIER_CHECK(H5Pset_driver(access.id(), output_driver(), &failure) >= 0, path.string(),
                ": cannot set up HDF5 (", library_reason(), ")");
  errno = 0;
  state->file =
      Handle(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, creation.id(), access.id()), H5Fclose);
  if (!state->file.ok()) {
    const int error = errno;
    throw Error(concat(path.string(), ": cannot be created (",
                       error != 0 ? std::generic_category().message(error) : library_reason(),
                       ")"));
  }
  return File(std::move(state));
}

const fs::path& File::path() const { return state_->path; }

bool File::exists(std::string_view path) const {
  const Call call;
  const Handle object = state_->find(path);
  if (!object.ok()) return false;
  const H5I_type_t type = H5Iget_type(object.id());
  return type == H5I_GROUP || type == H5I_DATASET;
}

bool File::is_group(std::string_view path) const {
  const Call call;
  const Handle object = state_->find(path);
  return object.ok() && H5Iget_type(object.id()) == H5I_GROUP;
}

bool File::is_dataset(std::string_view path) const {
  const Call call;
  const Handle object = state_->find(path);
  return object.ok() && H5Iget_type(object.id()) == H5I_DATASET;
}

std::vector<std::string> File::children(std::string_view group) const {
  const Call call;
  const Handle opened = state_->find_of_type(group, H5I_GROUP, "group");
  struct Names {
    std::vector<std::string> list;
    std::size_t most;
  } names{{}, static_cast<std::size_t>(state_->limits.max_children)};
  const herr_t result = H5Literate(
      opened.id(), H5_INDEX_NAME, H5_ITER_NATIVE, nullptr,
      [](hid_t, const char* name, const H5L_info_t*, void* out) -> herr_t {
        auto& found = *static_cast<Names*>(out);
        if (found.list.size() >= found.most) return 1;
        found.list.emplace_back(name);
        return 0;
      },
      &names);
  if (result < 0) state_->fail(group, "list the group");
  VERNIER_CHECK(result == 0, state_->where(group), ": has more members than the limit of ",
                names.most);
  std::sort(names.list.begin(), names.list.end());
  return std::move(names.list);
}

DatasetInfo File::info(std::string_view path) const {
  const Call call;
  return state_->open_dataset(path).info;
}

template <typename T>
std::vector<T> File::read(std::string_view path) const {
  const Call call;
  const OpenDataset opened = state_->open_dataset(path);
  state_->check_kind<T>(path, opened.info.type);
  state_->check_size(path, opened, opened.info.size(), sizeof(T));
  std::vector<T> values(static_cast<std::size_t>(opened.info.size()));
  if (!values.empty())
    state_->read_into(path, opened, memory_type<T>(), H5S_ALL, H5S_ALL, values.data());
  return values;
}

template <typename T>
std::vector<T> File::read_rows(std::string_view path, int64_t first_row, int64_t count) const {
  const Call call;
  const OpenDataset opened = state_->open_dataset(path);
  state_->check_kind<T>(path, opened.info.type);
  const std::vector<int64_t>& shape = opened.info.shape;
  VERNIER_CHECK(!shape.empty(), state_->where(path), ": is a scalar and has no rows");
  VERNIER_CHECK(
      first_row >= 0 && count >= 0 && first_row <= shape[0] && count <= shape[0] - first_row,
      state_->where(path), ": has ", shape[0], " rows; ", count, " from row ", first_row,
      " were asked for");
  int64_t elements = count;
  for (std::size_t i = 1; i < shape.size(); ++i) elements *= shape[i];
  state_->check_size(path, opened, elements, sizeof(T));
  std::vector<T> values(static_cast<std::size_t>(elements));
  if (values.empty()) return values;
  std::vector<hsize_t> start(shape.size(), 0);
  std::vector<hsize_t> extent(shape.begin(), shape.end());
  start[0] = static_cast<hsize_t>(first_row);
  extent[0] = static_cast<hsize_t>(count);
  const Handle memory(H5Screate_simple(static_cast<int>(extent.size()), extent.data(), nullptr),
                      H5Sclose);
  if (!memory.ok() || H5Sselect_hyperslab(opened.space.id(), H5S_SELECT_SET, start.data(), nullptr,
                                          extent.data(), nullptr) < 0)
    state_->fail(path, "select rows");
  state_->read_into(path, opened, memory_type<T>(), memory.id(), opened.space.id(), values.data());
  return values;
}

std::vector<uint16_t> File::read_half_bits(std::string_view path) const {
  const Call call;
  const OpenDataset opened = state_->open_dataset(path);
  const ElementType type = opened.info.type;
  VERNIER_CHECK(type == ElementType::float16 || type == ElementType::bfloat16, state_->where(path),
                ": holds ", element_type_name(type), ", where float16 or bfloat16 is needed");
  state_->check_size(path, opened, opened.info.size(), sizeof(uint16_t));
  const Handle memory = half_type(type);
  if (!memory.ok()) state_->fail(path, "make its type");
  std::vector<uint16_t> bits(static_cast<std::size_t>(opened.info.size()));
  if (!bits.empty()) state_->read_into(path, opened, memory.id(), H5S_ALL, H5S_ALL, bits.data());
  return bits;
}

std::string File::read_text(std::string_view path) const {
  const Call call;
  const OpenDataset opened = state_->open_dataset(path);
  VERNIER_CHECK(opened.info.type == ElementType::text, state_->where(path), ": holds ",
                element_type_name(opened.info.type), ", where text is needed");
  VERNIER_CHECK(opened.info.size() == 1, state_->where(path), ": is ",
                shape_text(opened.info.shape), " strings, where one is needed");
  state_->check_size(path, opened, 1, opened.element_bytes);
  return state_->read_one_text(path, opened.type.id(), [&](hid_t type, char* out) {
    state_->read_into(path, opened, type, H5S_ALL, H5S_ALL, out);
  });
}

template <typename T>
void File::write(std::string_view path, std::span<const T> values, std::span<const int64_t> shape) {
  const Call call;
  state_->check_writable(path);
  const Handle space = state_->new_space(path, shape, values.size());
  state_->write_dataset(path, file_type<T>(), memory_type<T>(), space, values.data());
}

void File::write_half_bits(std::string_view path, std::span<const uint16_t> bits,
                           std::span<const int64_t> shape, ElementType format) {
  const Call call;
  state_->check_writable(path);
  VERNIER_CHECK(format == ElementType::float16 || format == ElementType::bfloat16,
                state_->where(path), ": 16-bit patterns are float16 or bfloat16, not ",
                element_type_name(format));
  const Handle space = state_->new_space(path, shape, bits.size());
  const Handle type = half_type(format);
  if (!type.ok()) state_->fail(path, "make its type");
  state_->write_dataset(path, type.id(), type.id(), space, bits.data());
}

void File::write_text(std::string_view path, std::string_view text) {
  const Call call;
  state_->check_writable(path);
  VERNIER_CHECK(text.find('\0') == std::string_view::npos, state_->where(path),
                ": text with a zero byte cannot be stored");
  const std::string zero_ended(text);
  const char* pointer = zero_ended.c_str();
  const Handle type = text_type();
  const Handle space(H5Screate(H5S_SCALAR), H5Sclose);
  if (!type.ok()) state_->fail(path, "make its type");
  state_->write_dataset(path, type.id(), type.id(), space, &pointer);
}

void File::create_group(std::string_view path) {
  const Call call;
  state_->check_writable(path);
  const std::vector<std::string> names = components(state_->path, path);
  state_->make_groups(path, names, names.size());
}

void File::set_attribute(std::string_view path, std::string_view name, std::string_view value) {
  const Call call;
  state_->check_writable(path);
  VERNIER_CHECK(value.find('\0') == std::string_view::npos,
                state_->where(state_->named(path, name)),
                ": text with a zero byte cannot be stored");
  const std::string zero_ended(value);
  const char* pointer = zero_ended.c_str();
  const Handle type = text_type();
  if (!type.ok()) state_->fail(path, "make an attribute's type");
  state_->write_attribute(path, name, type.id(), type.id(), &pointer);
}

void File::set_attribute(std::string_view path, std::string_view name, int64_t value) {
  const Call call;
  state_->write_attribute(path, name, H5T_STD_I64LE, H5T_NATIVE_INT64, &value);
}

void File::set_attribute(std::string_view path, std::string_view name, double value) {
  const Call call;
  state_->write_attribute(path, name, H5T_IEEE_F64LE, H5T_NATIVE_DOUBLE, &value);
}

void File::set_attribute(std::string_view path, std::string_view name, bool value) {
  const Call call;
  const Handle type = boolean_type();
  if (!type.ok()) state_->fail(path, "make an attribute's type");
  const int8_t byte = value ? 1 : 0;
  state_->write_attribute(path, name, type.id(), type.id(), &byte);
}

bool File::has_attribute(std::string_view path, std::string_view name) const {
  const Call call;
  state_->check_attribute_name(path, name);
  const Handle owner = state_->find_any(path);
  const htri_t there = H5Aexists(owner.id(), std::string(name).c_str());
  if (there < 0) state_->fail(state_->named(path, name), "look it up");
  return there > 0;
}

std::string File::attribute_string(std::string_view path, std::string_view name) const {
  const Call call;
  const State::OpenAttribute opened = state_->open_attribute(path, name);
  const std::string label = state_->named(path, name);
  if (opened.element != ElementType::text) state_->wrong_kind(label, opened.element, "text");
  return state_->read_one_text(label, opened.type.id(), [&](hid_t type, char* out) {
    if (H5Aread(opened.attribute.id(), type, out) < 0) state_->fail(label, "read it");
  });
}

int64_t File::attribute_int(std::string_view path, std::string_view name) const {
  const Call call;
  const State::OpenAttribute opened = state_->open_attribute(path, name);
  const std::string label = state_->named(path, name);
  if (!is_integer(opened.element) || opened.element == ElementType::boolean)
    state_->wrong_kind(label, opened.element, "an integer");
  if (opened.element == ElementType::uint64) {
    // Reading attributes takes no callback for values that do not fit.
    uint64_t value = 0;
    if (H5Aread(opened.attribute.id(), H5T_NATIVE_UINT64, &value) < 0)
      state_->fail(label, "read it");
    VERNIER_CHECK(value <= uint64_t{std::numeric_limits<int64_t>::max()}, state_->where(label),
                  ": ", value, " does not fit a signed 64-bit integer");
    return static_cast<int64_t>(value);
  }
  int64_t value = 0;
  if (H5Aread(opened.attribute.id(), H5T_NATIVE_INT64, &value) < 0) state_->fail(label, "read it");
  return value;
}

double File::attribute_double(std::string_view path, std::string_view name) const {
  const Call call;
  const State::OpenAttribute opened = state_->open_attribute(path, name);
  const std::string label = state_->named(path, name);
  if (!is_float(opened.element)) state_->wrong_kind(label, opened.element, "floating point");
  double value = 0;
  if (H5Aread(opened.attribute.id(), H5T_NATIVE_DOUBLE, &value) < 0) state_->fail(label, "read it");
  return value;
}

bool File::attribute_bool(std::string_view path, std::string_view name) const {
  const Call call;
  const State::OpenAttribute opened = state_->open_attribute(path, name);
  const std::string label = state_->named(path, name);
  if (opened.element != ElementType::boolean) state_->wrong_kind(label, opened.element, "a bool");
  int8_t byte = 0;
  if (H5Aread(opened.attribute.id(), opened.type.id(), &byte) < 0) state_->fail(label, "read it");
  return byte != 0;
}

void File::flush() {
  const Call call;
  state_->check_open();
  if (state_->writable && H5Fflush(state_->file.id(), H5F_SCOPE_LOCAL) < 0)
    state_->fail("/", "write the file");
  state_->check_written("/");
}

void File::close() {
  const Call call;
  if (!state_->file.ok()) return;
  flush();
  if (H5Fclose(state_->file.release()) < 0) state_->fail("/", "close the file");
  state_->check_written("/");
}

#define VERNIER_INSTANTIATE(T)                                                          \
  template std::vector<T> File::read<T>(std::string_view) const;                        \
  template std::vector<T> File::read_rows<T>(std::string_view, int64_t, int64_t) const; \
  template void File::write<T>(std::string_view, std::span<const T>, std::span<const int64_t>);
VERNIER_INSTANTIATE(int8_t)
VERNIER_INSTANTIATE(uint8_t)
VERNIER_INSTANTIATE(int16_t)
VERNIER_INSTANTIATE(uint16_t)
VERNIER_INSTANTIATE(int32_t)
VERNIER_INSTANTIATE(uint32_t)
VERNIER_INSTANTIATE(int64_t)
VERNIER_INSTANTIATE(uint64_t)
VERNIER_INSTANTIATE(float)
VERNIER_INSTANTIATE(double)
#undef VERNIER_INSTANTIATE

}  // namespace vernier::hdf5
