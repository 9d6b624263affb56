#include <vernier/calibration/atomic_file.h>
#include <vernier/calibration/hdf5.h>
#include <vernier/calibration/hdf5_library.h>
#include <vernier/calibration/hdf5_output.h>
#include <vernier/calibration/hdf5_state.h>
#include <vernier/kernels/error.h>

#include <fcntl.h>
#include <hdf5.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <limits>
#include <system_error>
#include <utility>

namespace vernier::hdf5 {

namespace fs = std::filesystem;

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
  VERNIER_CHECK(use_output_driver(access.id(), state->failure), path.string(),
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

void File::check_claim(std::string_view path) const {
  const Call call;
  const OpenDataset opened = state_->open_dataset(path);
  state_->check_size(path, opened, opened.info.size(), /*wanted_bytes=*/1);
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
  const OpenAttribute opened = state_->open_attribute(path, name);
  const std::string label = state_->named(path, name);
  if (opened.element != ElementType::text) state_->wrong_kind(label, opened.element, "text");
  return state_->read_one_text(label, opened.type.id(), [&](hid_t type, char* out) {
    if (H5Aread(opened.attribute.id(), type, out) < 0) state_->fail(label, "read it");
  });
}

int64_t File::attribute_int(std::string_view path, std::string_view name) const {
  const Call call;
  const OpenAttribute opened = state_->open_attribute(path, name);
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
  const OpenAttribute opened = state_->open_attribute(path, name);
  const std::string label = state_->named(path, name);
  if (!is_float(opened.element)) state_->wrong_kind(label, opened.element, "floating point");
  double value = 0;
  if (H5Aread(opened.attribute.id(), H5T_NATIVE_DOUBLE, &value) < 0) state_->fail(label, "read it");
  return value;
}

bool File::attribute_bool(std::string_view path, std::string_view name) const {
  const Call call;
  const OpenAttribute opened = state_->open_attribute(path, name);
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

void write_atomically(const std::filesystem::path& path, const std::function<void(File&)>& fill) {
  AtomicFile target(path);
  try {
    File file = File::create(target.temporary());
    fill(file);
    file.close();
  } catch (const Error& error) {
    std::string message = error.what();
    const std::string temporary = target.temporary().string();
    if (const size_t at = message.find(temporary); at != std::string::npos)
      message.replace(at, temporary.size(), path.string());
    throw Error(message);
  }
  target.commit();
}

}  // namespace vernier::hdf5
