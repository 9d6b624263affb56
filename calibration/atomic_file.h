// Output files and folders that appear whole or not at all.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>

namespace vernier {

/// One output file, written beside its target and renamed over it by commit(). Until then, and for
/// ever when the program stops before, the target is what it was: an older file stays whole.
///
///     AtomicFile out("stats.h5");
///     hdf5::File file = hdf5::File::create(out.temporary());
///     ...
///     file.close();
///     out.commit();
///
/// A killed program can leave `.NAME.PID.RANDOM.tmp` in the target's folder; it is safe to delete.
class AtomicFile {
 public:
  /// Creates the empty temporary, so that a target that cannot be written is found before the work
  /// and not after it. A symbolic link is followed: the file it names is the one replaced or
  /// created.
  /// Throws Error when the folder is missing or not writable, or the target is a folder, a device
  /// or anything else that is no regular file.
  explicit AtomicFile(std::filesystem::path target);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  /// Removes the temporary unless commit() took it.
  ~AtomicFile();

  /// The file to write, in the target's folder. It exists and is empty at first; it may be opened,
  /// truncated and written by other means than write().
  const std::filesystem::path& temporary() const { return temporary_; }

  const std::filesystem::path& target() const { return target_; }

  /// Appends bytes to the temporary. Throws Error when they cannot be written (disk full).
  void write(const void* data, std::size_t bytes);

  /// Makes the temporary durable (fsync), renames it to the target and makes the rename durable.
  /// Throws Error when the disk is full or the rename is refused; after a refused rename the
  /// finished temporary is kept and named in the message. May be called once.
  void commit();

 private:
  std::filesystem::path target_;
  std::filesystem::path temporary_;
  int descriptor_ = -1;  // Of the temporary, for write() and fsync.
  bool owned_ = true;    // Whether the destructor removes the temporary.
};

/// One output folder, filled beside its target and renamed by commit().
class AtomicFolder {
 public:
  /// Creates the empty temporary folder. Throws Error when the parent is missing or not writable,
  /// or when the target exists and is not an empty folder, is the current folder or a mount point
  /// (neither can be replaced by a rename).
  explicit AtomicFolder(std::filesystem::path target);
  AtomicFolder(const AtomicFolder&) = delete;
  AtomicFolder& operator=(const AtomicFolder&) = delete;
  /// Removes the temporary folder and all in it unless commit() took it.
  ~AtomicFolder();

  /// The folder to fill, beside the target.
  const std::filesystem::path& temporary() const { return temporary_; }

  const std::filesystem::path& target() const { return target_; }

  /// Makes every file of the temporary folder durable (fsync), renames it to the target and makes
  /// the rename durable. Throws Error as AtomicFile::commit, and also when something was put at the
  /// target meanwhile. May be called once.
  void commit();

 private:
  std::filesystem::path target_;
  std::filesystem::path temporary_;
  bool owned_ = true;
};

/// Writes `text` to `path` as one AtomicFile.
void write_text_atomically(const std::filesystem::path& path, std::string_view text);

/// For a message: why writing failed with this error number, and what to do.
std::string write_failure_reason(int error);

}  // namespace vernier
