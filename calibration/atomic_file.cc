#include <vernier/calibration/atomic_file.h>
#include <vernier/kernels/error.h>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <system_error>
#include <utility>

namespace vernier {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void fail(const char* what, const fs::path& path, int error) {
  throw Error(concat(what, " ", path.string(), ": ", write_failure_reason(error)));
}

/// As many symbolic links as Linux follows.
constexpr int kMostLinks = 40;

/// The absolute target without a trailing slash, a symbolic link at its end followed, also to what
/// does not exist yet: a rename would replace the link and leave what it names as it was.
fs::path resolved(const fs::path& target) {
  VERNIER_CHECK(!target.empty(), "an output path is empty; name a file or folder");
  fs::path path = fs::absolute(target).lexically_normal();
  if (path.filename().empty()) path = path.parent_path();
  std::error_code error;
  for (int links = 0; fs::is_symlink(fs::symlink_status(path, error)); ++links) {
    VERNIER_CHECK(links < kMostLinks, "cannot write ", target.string(),
                  ": its symbolic links lead to one another; remove them");
    fs::path named = path.parent_path() / fs::read_symlink(path, error);
    if (error) fail("cannot read the symbolic link", path, error.value());
    if (named.filename().empty()) named = named.parent_path();
    // A '..' goes up from where a folder is, not from where a link to it stands.
    const fs::path folder = fs::weakly_canonical(named.parent_path(), error);
    if (error) fail("cannot follow the symbolic link", path, error.value());
    path = (folder / named.filename()).lexically_normal();
    if (path.filename().empty()) path = path.parent_path();
  }
  VERNIER_CHECK(!path.filename().empty(), "cannot write to ", target.string(),
                ": it is the root folder; name a file or folder inside it");
  return path;
}

void check_parent(const fs::path& path) {
  const fs::path parent = path.parent_path();
  std::error_code error;
  const fs::file_status status = fs::status(parent, error);
  if (status.type() == fs::file_type::not_found)
    throw Error(concat("cannot write ", path.string(), ": the folder ", parent.string(),
                       " does not exist; create it first"));
  if (error) fail("cannot look at the folder", parent, error.value());
  VERNIER_CHECK(fs::is_directory(status), "cannot write ", path.string(), ": ", parent.string(),
                " is not a folder");
}

/// A hidden name beside the target that no other process and no earlier run has.
fs::path temporary_beside(const fs::path& target) {
  std::random_device random;
  const uint64_t bits = (uint64_t{random()} << 32) | random();
  std::array<char, 17> hex;
  std::snprintf(hex.data(), hex.size(), "%016llx", static_cast<unsigned long long>(bits));
  // File systems allow 255 bytes in a name; a long target's own name is cut.
  const std::string name = target.filename().string().substr(0, 200);
  return target.parent_path() / concat(".", name, ".", ::getpid(), ".", hex.data(), ".tmp");
}

/// Makes a file's or folder's contents durable.
void sync_path(const fs::path& path, int flags) {
  const int descriptor = ::open(path.c_str(), flags | O_CLOEXEC);
  if (descriptor < 0) fail("cannot open", path, errno);
  const int result = ::fsync(descriptor);
  const int error = errno;
  ::close(descriptor);
  // Some file systems cannot sync a folder and say so by EINVAL; a rename there is as durable as it
  // gets.
  if (result != 0 && error != EINVAL) fail("cannot write", path, error);
}

void sync_tree(const fs::path& folder) {
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(folder)) {
    const fs::file_status status = entry.symlink_status();
    if (fs::is_regular_file(status)) sync_path(entry.path(), O_RDONLY);
    if (fs::is_directory(status)) sync_path(entry.path(), O_RDONLY | O_DIRECTORY);
  }
  sync_path(folder, O_RDONLY | O_DIRECTORY);
}

}  // namespace

std::string write_failure_reason(int error) {
  switch (error) {
    case ENOSPC:
    case EDQUOT:
      return "the disk is full; free space or write elsewhere";
    case EFBIG:
      return "the file is larger than this file system or the process's limit allows";
    case EACCES:
    case EPERM:
      return "permission denied; choose a folder you may write to";
    case EROFS:
      return "the file system is read-only; write elsewhere";
    default:
      return std::generic_category().message(error);
  }
}

AtomicFile::AtomicFile(fs::path target) : target_(resolved(target)) {
  check_parent(target_);
  std::error_code error;
  const fs::file_status status = fs::status(target_, error);
  VERNIER_CHECK(!fs::is_directory(status), "cannot write ", target_.string(),
                ": it is a folder; name a file");
  VERNIER_CHECK(!fs::exists(status) || fs::is_regular_file(status), "cannot write ",
                target_.string(), ": it is not a regular file, and would be replaced by one");
  temporary_ = temporary_beside(target_);
  descriptor_ = ::open(temporary_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0666);
  if (descriptor_ < 0) fail("cannot write", target_, errno);
}

AtomicFile::~AtomicFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
  if (owned_) ::unlink(temporary_.c_str());
}

void AtomicFile::write(const void* data, std::size_t bytes) {
  VERNIER_CHECK(descriptor_ >= 0, "cannot write ", target_.string(), ": it is already committed");
  const char* next = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(descriptor_, next, bytes);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail("cannot write", target_, errno);
    next += written;
    bytes -= static_cast<std::size_t>(written);
  }
}

void AtomicFile::commit() {
  VERNIER_CHECK(descriptor_ >= 0, "cannot write ", target_.string(), ": it is already committed");
  // The file may have been written through another descriptor, or put in place by a rename; syncing
  // by name covers both.
  sync_path(temporary_, O_RDONLY);
  const int closed = ::close(std::exchange(descriptor_, -1));
  if (closed != 0 && errno != EINTR) fail("cannot write", target_, errno);
  if (::rename(temporary_.c_str(), target_.c_str()) != 0) {
    const int error = errno;
    owned_ = false;
    throw Error(concat("cannot rename the finished file to ", target_.string(), ": ",
                       write_failure_reason(error), "; it is kept as ", temporary_.string()));
  }
  owned_ = false;
  sync_path(target_.parent_path(), O_RDONLY | O_DIRECTORY);
}

AtomicFolder::AtomicFolder(fs::path target) : target_(resolved(target)) {
  check_parent(target_);
  std::error_code error;
  const fs::file_status status = fs::status(target_, error);
  bool replaces = false;
  if (fs::exists(status)) {
    VERNIER_CHECK(fs::is_directory(status), "cannot write the folder ", target_.string(),
                  ": there is a file of that name; remove it or choose another");
    const bool empty = fs::is_empty(target_, error);
    if (error) fail("cannot look at the folder", target_, error.value());
    VERNIER_CHECK(empty, "cannot write the folder ", target_.string(),
                  ": it is not empty; remove it or choose another");
    VERNIER_CHECK(!fs::equivalent(target_, fs::current_path(error), error),
                  "cannot write the folder ", target_.string(),
                  ": it is the current folder; name a folder inside it");
    replaces = true;
  }
  temporary_ = temporary_beside(target_);
  if (::mkdir(temporary_.c_str(), 0777) != 0) fail("cannot write the folder", target_, errno);
  if (!replaces) return;
  // A rename over the empty folder now finds out, before the work, what would refuse it after: the
  // target is a mount point, or the parent is another user's sticky folder.
  int refused = 0;
  if (::rename(temporary_.c_str(), target_.c_str()) != 0) {
    refused = errno;
    ::rmdir(temporary_.c_str());
  } else if (::mkdir(temporary_.c_str(), 0777) != 0) {
    fail("cannot write the folder", target_, errno);
  }
  VERNIER_CHECK(refused != EBUSY && refused != EXDEV, "cannot write the folder ", target_.string(),
                ": it is a mount point; name a folder inside it");
  if (refused != 0) fail("cannot write the folder", target_, refused);
}

AtomicFolder::~AtomicFolder() {
  std::error_code ignored;
  if (owned_) fs::remove_all(temporary_, ignored);
}

void AtomicFolder::commit() {
  VERNIER_CHECK(owned_, "cannot write the folder ", target_.string(), ": it is already committed");
  try {
    sync_tree(temporary_);
  } catch (const fs::filesystem_error& error) {
    fail("cannot write the folder", target_, error.code().value());
  }
  if (::rename(temporary_.c_str(), target_.c_str()) != 0) {
    const int error = errno;
    owned_ = false;
    throw Error(concat("cannot rename the finished folder to ", target_.string(), ": ",
                       write_failure_reason(error), "; it is kept as ", temporary_.string()));
  }
  owned_ = false;
  sync_path(target_.parent_path(), O_RDONLY | O_DIRECTORY);
}

void write_text_atomically(const fs::path& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text.data(), text.size());
  file.commit();
}

}  // namespace vernier
