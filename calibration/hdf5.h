// HDF5 files: a small owner of the C library's handles, with clear errors and bounded reading.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace vernier::hdf5 {

/// What the elements of a dataset are. `boolean` is h5py's (an 8-bit enumeration FALSE, TRUE),
/// `text` any string; compounds, references, other enumerations and odd widths are `other`.
enum class ElementType {
  boolean,
  int8,
  uint8,
  int16,
  uint16,
  int32,
  uint32,
  int64,
  uint64,
  float16,
  bfloat16,
  float32,
  float64,
  text,
  other,
};

/// "int8", "float32", ... for messages.
const char* element_type_name(ElementType type);

struct DatasetInfo {
  ElementType type = ElementType::other;
  std::vector<int64_t> shape;  ///< Empty for a scalar.

  /// Number of elements: the product of the shape.
  int64_t size() const;
};

/// How much memory a file may ask for, checked before any is allocated. A dataset that is not
/// chunked may further claim no more bytes than its file has.
struct Limits {
  int64_t max_bytes = int64_t{64} << 30;  ///< Of one read.
  int64_t max_expansion = 2048;           ///< Bytes of a chunked dataset per byte of its file.
  int64_t max_children = 10'000'000;      ///< Names in one group.
};

/// One HDF5 file. Paths inside it are "a/b/c", with or without a leading '/'; "/" or "" is the root
/// group. Names may hold any character but '/' and NUL; a component "." is refused.
///
/// Reading trusts nothing in the file: only hard links are followed, and soft, external and
/// user-defined links, external and virtual storage, and filters other than deflate, shuffle and
/// fletcher32 are refused, so that no file makes the program read another file or load a plugin.
/// Sizes are checked against Limits and the size of the file before memory is allocated.
///
/// That bounds what a file can ask for; it cannot mend the C library, whose decoding of object
/// headers can crash on crafted files (HDF5 1.10.8). Files written by create() carry checksums over
/// all structure, so damage to them is found before it is decoded.
///
/// Every failure throws vernier::Error, one line with the file and the path. The C library's own
/// printing is muted during calls and its state given back afterwards. Calls of several threads are
/// run one at a time. Files are opened without file locks.
///
/// Written files depend on nothing but what is written: no time stamps, so equal calls give equal
/// bytes.
class File {
 public:
  /// Opens for reading. Throws Error when the file does not exist, is not a regular file, cannot be
  /// read, is not HDF5 or is truncated.
  static File open(const std::filesystem::path& path, const Limits& limits = {});

  /// Creates a file, replacing an existing one; for a file that appears whole or not at all, give
  /// it AtomicFile::temporary(). Must be closed by close(): the destructor hides failures. After a
  /// failed write the file is incomplete and every further write throws the same; remove it.
  static File create(const std::filesystem::path& path);

  File(File&&) noexcept;
  File& operator=(File&&) noexcept;
  ~File();

  /// The path given to open() or create().
  const std::filesystem::path& path() const;

  /// Whether there is a group or dataset at `path`. A soft or external link there, or on the way,
  /// throws Error, as do all other functions on meeting one.
  bool exists(std::string_view path) const;
  bool is_group(std::string_view path) const;
  bool is_dataset(std::string_view path) const;

  /// Names of the members of a group, sorted by their bytes.
  std::vector<std::string> children(std::string_view group) const;

  /// Element type and shape of a dataset. Throws Error when there is none at `path`.
  DatasetInfo info(std::string_view path) const;

  /// Throws Error when the dataset's shape is more than its file can hold, as reading it does: what
  /// is made ready for its contents then takes no memory for what is not there.
  void check_claim(std::string_view path) const;

  /// The whole dataset, row-major. T is a fixed-width integer, float or double. Integers (and
  /// booleans) convert to integers and floats to floats; Error when the kinds differ, or when a
  /// value does not fit T. double to float rounds; float16 and bfloat16 read as float exactly.
  template <typename T>
  std::vector<T> read(std::string_view path) const;

  /// Rows [first_row, first_row + count) of the first dimension, row-major; else as read().
  /// Throws Error when the rows are not all there, or the dataset is a scalar.
  template <typename T>
  std::vector<T> read_rows(std::string_view path, int64_t first_row, int64_t count) const;

  /// The whole of a float16 or bfloat16 dataset as its 16-bit patterns; info() tells which.
  std::vector<uint16_t> read_half_bits(std::string_view path) const;

  /// Text written by write_text(), or any scalar string of h5py.
  std::string read_text(std::string_view path) const;

  /// Writes a new dataset of shape `shape` (row-major; {} for a scalar), creating the groups on its
  /// way. Throws Error when `values` has not the shape's size or there is something at `path`.
  template <typename T>
  void write(std::string_view path, std::span<const T> values, std::span<const int64_t> shape);

  /// The same from a vector, so that T is deduced.
  template <typename T>
  void write(std::string_view path, const std::vector<T>& values,
             const std::vector<int64_t>& shape) {
    write<T>(path, std::span<const T>(values), std::span<const int64_t>(shape));
  }

  /// Writes 16-bit patterns as a float16 or bfloat16 dataset (`format`).
  void write_half_bits(std::string_view path, std::span<const uint16_t> bits,
                       std::span<const int64_t> shape, ElementType format);

  /// Writes UTF-8 text without NUL as a scalar dataset; h5py: `file[path].asstr()[()]`.
  void write_text(std::string_view path, std::string_view text);

  /// Creates a group and those on its way; does nothing where they exist.
  void create_group(std::string_view path);

  /// Sets an attribute of the group or dataset at `path`, replacing one of that name. h5py reads
  /// str, int, float and bool.
  void set_attribute(std::string_view path, std::string_view name, std::string_view value);
  void set_attribute(std::string_view path, std::string_view name, const char* value) {
    set_attribute(path, name, std::string_view(value));
  }
  void set_attribute(std::string_view path, std::string_view name, int64_t value);
  void set_attribute(std::string_view path, std::string_view name, int value) {
    set_attribute(path, name, static_cast<int64_t>(value));
  }
  void set_attribute(std::string_view path, std::string_view name, double value);
  void set_attribute(std::string_view path, std::string_view name, bool value);

  bool has_attribute(std::string_view path, std::string_view name) const;

  /// Scalar attributes. Throw Error when there is none of that name or it is of another kind:
  /// int reads any integer that fits int64, double any float, bool h5py's booleans.
  std::string attribute_string(std::string_view path, std::string_view name) const;
  int64_t attribute_int(std::string_view path, std::string_view name) const;
  double attribute_double(std::string_view path, std::string_view name) const;
  bool attribute_bool(std::string_view path, std::string_view name) const;

  /// Hands everything written to the operating system. Throws Error when the disk is full.
  void flush();

  /// flush() and close; nothing may be called afterwards but close() and path(). A created file is
  /// whole only when this returned.
  void close();

 private:
  struct State;
  explicit File(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

/// Creates `path` as one AtomicFile, filled by `fill`: it is there whole or not at all. Throws what
/// `fill` and File throw, with the name of the target in place of the temporary's.
void write_atomically(const std::filesystem::path& path, const std::function<void(File&)>& fill);

}  // namespace vernier::hdf5
