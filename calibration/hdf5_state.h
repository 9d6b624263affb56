// Internal: an open HDF5 file and the steps that File's functions are made of. hdf5_state.cc finds
// objects and writes, hdf5_reading.cc reads what nobody vouches for.
#pragma once

#include <vernier/calibration/hdf5_library.h>
#include <vernier/calibration/hdf5_output.h>
#include <vernier/kernels/error.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_set>
#include <vector>

namespace vernier::hdf5 {

/// The product, or nothing when it is beyond int64.
std::optional<int64_t> checked_product(const std::vector<int64_t>& factors);

/// "[2, 3]", for messages.
std::string shape_text(const std::vector<int64_t>& shape);

/// "a/b" and "/a/b/" as {"a", "b"}; `file` is for the message.
std::vector<std::string> components(const std::filesystem::path& file, std::string_view path);

/// A dataset that has passed every check but those of its size.
struct OpenDataset {
  Handle dataset, type, space, layout;
  DatasetInfo info;
  std::size_t element_bytes = 0;
};

/// What a dataset or attribute holds of a variable-length string: where in the file the text is.
inline constexpr std::size_t kReferenceBytes = 16;

/// A scalar attribute, its type, and what the type is.
struct OpenAttribute {
  Handle attribute, type;
  ElementType element = ElementType::other;
};

/// All functions but the destructor are for use under a Call. `object` is the path of a group or
/// dataset, or a label made from one, and stands in every message.
struct File::State {
  std::filesystem::path path;
  Limits limits;
  // Before the file, so that it outlives it: the driver writes to it as the file closes.
  WriteFailure failure;
  Handle file;
  bool writable = false;
  // Datasets whose chunks were summed up already; summing walks the whole index of the chunks.
  mutable std::unordered_set<std::string> summed;

  ~State();

  // ---- Messages and checks (hdf5_state.cc) ----

  /// The file and the object, as messages begin.
  std::string where(std::string_view object) const;

  /// The label of an attribute.
  std::string named(std::string_view object, std::string_view name) const;

  /// Throws with the library's reason, right after the call that failed.
  [[noreturn]] void fail(std::string_view object, const char* what) const;

  /// Throws that `wanted` was needed, not `type`.
  [[noreturn]] void wrong_kind(std::string_view label, ElementType type, const char* wanted) const;

  /// Throws when a write failed, now or earlier.
  void check_written(std::string_view object) const;

  void check_open() const;
  void check_writable(std::string_view object) const;
  void check_attribute_name(std::string_view object, std::string_view name) const;

  /// Throws when the values are not of T's kind, integer or floating point.
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

  // ---- Finding objects (hdf5_state.cc) ----

  /// The member `name` of an open group; not ok when there is none.
  Handle open_member(hid_t group, const std::string& name, std::string_view object) const;

  /// The object at a path, reached by hard links only; not ok when there is none.
  Handle find(std::string_view object) const;

  /// The same, but throws when there is none; `name` is the type's, for messages.
  Handle find_of_type(std::string_view object, H5I_type_t type, const char* name) const;
  Handle find_any(std::string_view object) const;

  // ---- Writing (hdf5_state.cc) ----

  /// Space for a new array; checks the shape against the number of values.
  Handle new_space(std::string_view object, std::span<const int64_t> shape,
                   std::size_t values) const;

  /// Opens the group at the first `depth` names, creating what is not there.
  Handle make_groups(std::string_view object, const std::vector<std::string>& names,
                     std::size_t depth) const;

  Handle link_properties(std::string_view object) const;

  /// Without time stamps, so that equal contents are equal bytes.
  Handle creation_properties(std::string_view object, hid_t kind) const;

  /// Creates a dataset and writes all of it.
  void write_dataset(std::string_view object, hid_t stored_type, hid_t given_type,
                     const Handle& space, const void* values) const;

  /// Sets a scalar attribute, replacing one of that name.
  void write_attribute(std::string_view object, std::string_view name, hid_t stored_type,
                       hid_t given_type, const void* value) const;

  // ---- Reading (hdf5_reading.cc) ----

  /// The size of the file; of one that is read, no more than the file system says.
  int64_t file_bytes() const;

  /// Refuses storage outside the file and filters that would load code.
  void check_storage(std::string_view object, hid_t properties) const;

  /// The dataset or attribute at a path, all checked but sizes; throws when there is none.
  OpenDataset open_dataset(std::string_view object) const;
  OpenAttribute open_attribute(std::string_view object, std::string_view name) const;

  /// Refuses sizes that the file cannot hold, before memory is allocated for `elements` of them.
  void check_size(std::string_view object, const OpenDataset& opened, int64_t elements,
                  std::size_t wanted_bytes) const;

  /// The part of check_size() for chunked data: `most` bytes may a chunk take, any without a value,
  /// and `available` all chunks as stored.
  void check_chunks(std::string_view object, const OpenDataset& opened, int64_t available,
                    std::optional<int64_t> most) const;

  /// Reads the selected elements; both spaces are H5S_ALL for the whole dataset.
  void read_into(std::string_view object, const OpenDataset& opened, hid_t memory_type_id,
                 hid_t memory_space, hid_t file_space, void* out) const;

  /// Bytes of the file itself, at an address as HDF5 counts them.
  void read_raw(std::string_view object, uint64_t address, void* out, std::size_t bytes) const;

  /// The text of one string element, given how to read it into a buffer as a memory type.
  std::string read_one_text(std::string_view object, hid_t type,
                            const std::function<void(hid_t type, char* out)>& read) const;

  /// The text of a variable-length string, given its reference as stored.
  std::string read_reference(std::string_view object,
                             const std::array<char, kReferenceBytes>& stored) const;
};

}  // namespace vernier::hdf5
