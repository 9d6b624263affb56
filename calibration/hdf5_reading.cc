#include <vernier/calibration/hdf5_state.h>

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <system_error>

namespace vernier::hdf5 {
namespace {

static_assert(std::endian::native == std::endian::little,
              "half types and global heaps are read as little endian");

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

/// Where the text of a variable-length string stands in its file: what its kReferenceBytes say.
struct TextReference {
  uint32_t length;
  uint64_t heap;
  uint32_t index;
};

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

/// No bound beyond int64, `most` without a value, is exceeded by a size within it.
bool exceeds(std::optional<int64_t> size, std::optional<int64_t> most) {
  return !size || (most && *size > *most);
}

}  // namespace

int64_t File::State::file_bytes() const {
  hsize_t bytes = 0;
  if (H5Fget_filesize(file.id(), &bytes) < 0) fail("/", "tell the file's size");
  if (!writable) {
    // What the file says of its size is not trusted.
    std::error_code error;
    const auto actual = std::filesystem::file_size(path, error);
    if (!error) bytes = std::min<hsize_t>(bytes, actual);
  }
  return static_cast<int64_t>(std::min<hsize_t>(bytes, std::numeric_limits<int64_t>::max()));
}

void File::State::check_storage(std::string_view object, hid_t properties) const {
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

OpenDataset File::State::open_dataset(std::string_view object) const {
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

OpenAttribute File::State::open_attribute(std::string_view object, std::string_view name) const {
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

void File::State::check_size(std::string_view object, const OpenDataset& opened, int64_t elements,
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
  VERNIER_CHECK(!exceeds(stored, most), where(object), ": claims shape ",
                shape_text(opened.info.shape), " of ", opened.element_bytes,
                " bytes each, more than its file of ", available,
                " bytes can hold; the file is damaged");
  // HDF5 1.10.8 reads beyond the buffer of compact data (kept in the header) that is too short.
  VERNIER_CHECK(layout != H5D_COMPACT ||
                    H5Dget_storage_size(opened.dataset.id()) >= static_cast<hsize_t>(*stored),
                where(object), ": claims shape ", shape_text(opened.info.shape), " of ",
                opened.element_bytes, " bytes each, more than it stores; the file is damaged");
  if (chunked) check_chunks(object, opened, available, most);
}

void File::State::check_chunks(std::string_view object, const OpenDataset& opened,
                               int64_t available, std::optional<int64_t> most) const {
  std::array<hsize_t, H5S_MAX_RANK> chunk{};
  const int rank = H5Pget_chunk(opened.layout.id(), H5S_MAX_RANK, chunk.data());
  if (rank < 0) fail(object, "read its layout");
  std::vector<int64_t> factors{static_cast<int64_t>(opened.element_bytes)};
  for (int i = 0; i < rank; ++i)
    factors.push_back(static_cast<int64_t>(std::min<hsize_t>(chunk[static_cast<std::size_t>(i)],
                                                             std::numeric_limits<int64_t>::max())));
  VERNIER_CHECK(!exceeds(checked_product(factors), most), where(object),
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

void File::State::read_into(std::string_view object, const OpenDataset& opened,
                            hid_t memory_type_id, hid_t memory_space, hid_t file_space,
                            void* out) const {
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

void File::State::read_raw(std::string_view object, uint64_t address, void* out,
                           std::size_t bytes) const {
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

std::string File::State::read_one_text(
    std::string_view object, hid_t type,
    const std::function<void(hid_t type, char* out)>& read) const {
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

// One object of a global heap collection (HDF5 file format specification 3.0, III.E).
std::string File::State::read_reference(std::string_view object,
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

}  // namespace vernier::hdf5
