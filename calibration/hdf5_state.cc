#include <vernier/calibration/atomic_file.h>
#include <vernier/calibration/hdf5_state.h>

#include <algorithm>
#include <utility>

namespace vernier::hdf5 {

int64_t DatasetInfo::size() const {
  int64_t product = 1;
  for (const int64_t dimension : shape) product *= dimension;
  return product;
}

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

std::vector<std::string> components(const std::filesystem::path& file, std::string_view path) {
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

File::State::~State() {
  if (!file.ok()) return;
  const Call call;
  file = Handle();
}

std::string File::State::where(std::string_view object) const {
  return path.string() + ": " + (object.empty() ? "/" : printable(object));
}

std::string File::State::named(std::string_view object, std::string_view name) const {
  return concat(object.empty() ? "/" : object, " attribute ", name);
}

void File::State::fail(std::string_view object, const char* what) const {
  // Before anything else: building the message must not clear the library's stack.
  const std::string reason = library_reason();
  check_written(object);  // The cause, where there was such a failure.
  throw Error(concat(where(object), ": cannot ", what, " (", reason, ")"));
}

void File::State::wrong_kind(std::string_view label, ElementType type, const char* wanted) const {
  throw Error(
      concat(where(label), ": holds ", element_type_name(type), ", where ", wanted, " is needed"));
}

void File::State::check_written(std::string_view object) const {
  VERNIER_CHECK(failure.error == 0, where(object),
                ": cannot be written: ", write_failure_reason(failure.error));
}

void File::State::check_open() const {
  VERNIER_CHECK(file.ok(), path.string(), ": the HDF5 file is already closed; open it again");
}

void File::State::check_writable(std::string_view object) const {
  check_open();
  VERNIER_CHECK(writable, where(object), ": the file is open for reading only");
}

void File::State::check_attribute_name(std::string_view object, std::string_view name) const {
  VERNIER_CHECK(!name.empty() && name.find('\0') == std::string_view::npos, where(object),
                ": an attribute's name is empty or holds a zero byte");
}

Handle File::State::open_member(hid_t group, const std::string& name,
                                std::string_view object) const {
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

Handle File::State::find(std::string_view object) const {
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

Handle File::State::find_of_type(std::string_view object, H5I_type_t type, const char* name) const {
  Handle found = find(object);
  VERNIER_CHECK(found.ok(), where(object), ": there is no such ", name);
  VERNIER_CHECK(H5Iget_type(found.id()) == type, where(object), ": is not a ", name);
  return found;
}

Handle File::State::find_any(std::string_view object) const {
  Handle found = find(object);
  VERNIER_CHECK(found.ok(), where(object), ": there is no such group or dataset");
  return found;
}

Handle File::State::new_space(std::string_view object, std::span<const int64_t> shape,
                              std::size_t values) const {
  const std::vector<int64_t> dimensions(shape.begin(), shape.end());
  VERNIER_CHECK(dimensions.size() <= H5S_MAX_RANK, where(object), ": ", dimensions.size(),
                " dimensions; HDF5 allows ", H5S_MAX_RANK);
  VERNIER_CHECK(std::all_of(dimensions.begin(), dimensions.end(), [](int64_t d) { return d >= 0; }),
                where(object), ": negative dimension in shape ", shape_text(dimensions));
  const std::optional<int64_t> size = checked_product(dimensions);
  VERNIER_CHECK(size && static_cast<std::size_t>(*size) == values, where(object), ": ", values,
                " values do not fill the shape ", shape_text(dimensions));
  if (dimensions.empty()) return Handle(H5Screate(H5S_SCALAR), H5Sclose);
  const std::vector<hsize_t> extents(dimensions.begin(), dimensions.end());
  return Handle(H5Screate_simple(static_cast<int>(extents.size()), extents.data(), nullptr),
                H5Sclose);
}

Handle File::State::make_groups(std::string_view object, const std::vector<std::string>& names,
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

Handle File::State::link_properties(std::string_view object) const {
  Handle properties(H5Pcreate(H5P_LINK_CREATE), H5Pclose);
  if (!properties.ok() || H5Pset_char_encoding(properties.id(), H5T_CSET_UTF8) < 0)
    fail(object, "create it");
  return properties;
}

Handle File::State::creation_properties(std::string_view object, hid_t kind) const {
  Handle properties(H5Pcreate(kind), H5Pclose);
  if (!properties.ok() || H5Pset_obj_track_times(properties.id(), false) < 0)
    fail(object, "create it");
  return properties;
}

void File::State::write_dataset(std::string_view object, hid_t stored_type, hid_t given_type,
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

void File::State::write_attribute(std::string_view object, std::string_view name, hid_t stored_type,
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

}  // namespace vernier::hdf5
