#include <vernier/calibration/atomic_file.h>
#include <vernier/tests/expect_error.h>
#include <vernier/tests/temporary_folder.h>

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <functional>
#include <string>

namespace vernier {
namespace {

namespace fs = std::filesystem;
using testing::message_of;
using testing::read_bytes;
using testing::TemporaryFolder;
using testing::write_bytes;

/// Runs `action` in a forked child and gives back its wait status.
int in_child(const std::function<int()>& action) {
  const pid_t child = fork();
  if (child == 0) _exit(action());
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  return status;
}

TEST(AtomicFile, AppearsOnlyAtCommit) {
  TemporaryFolder folder;
  const fs::path target = folder / "a.json";
  AtomicFile file(target);
  EXPECT_EQ(file.temporary().parent_path(), folder.path());
  EXPECT_EQ(file.temporary().filename().string().rfind(".a.json.", 0), 0u);
  EXPECT_TRUE(fs::exists(file.temporary()));
  file.write("hello ", 6);
  file.write("world", 5);
  EXPECT_FALSE(fs::exists(target));
  file.commit();
  EXPECT_EQ(read_bytes(target), "hello world");
  EXPECT_EQ(folder.entries(), 1u);
  EXPECT_CONTAINS(message_of([&] { file.commit(); }), "already committed");
  EXPECT_CONTAINS(message_of([&] { file.write("x", 1); }), "already committed");
}

TEST(AtomicFile, IsRemovedWithoutCommit) {
  TemporaryFolder folder;
  write_bytes(folder / "a", "old");
  {
    AtomicFile file(folder / "a");
    file.write("new", 3);
  }
  EXPECT_EQ(read_bytes(folder / "a"), "old");
  EXPECT_EQ(folder.entries(), 1u);
}

TEST(AtomicFile, CommitsWhatOthersWroteIntoTheTemporary) {
  TemporaryFolder folder;
  AtomicFile file(folder / "a");
  write_bytes(file.temporary(), "by another stream");
  file.commit();
  EXPECT_EQ(read_bytes(folder / "a"), "by another stream");
}

TEST(AtomicFile, WriteTextReplacesAWholeFile) {
  TemporaryFolder folder;
  write_text_atomically(folder / "a", "first, and longer");
  write_text_atomically(folder / "a", "second");
  EXPECT_EQ(read_bytes(folder / "a"), "second");
  write_text_atomically(folder / "a", "");
  EXPECT_EQ(read_bytes(folder / "a"), "");
  EXPECT_EQ(folder.entries(), 1u);
}

TEST(AtomicFile, HasTheUsualPermissions) {
  TemporaryFolder folder;
  const mode_t old = umask(027);
  write_text_atomically(folder / "a", "x");
  umask(old);
  struct stat status;
  ASSERT_EQ(stat((folder / "a").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0640u);
}

TEST(AtomicFile, FollowsASymbolicLink) {
  TemporaryFolder folder;
  fs::create_directory(folder / "there");
  write_bytes(folder / "there/real", "old");
  fs::create_symlink("there/real", folder / "link");
  write_text_atomically(folder / "link", "new");
  EXPECT_TRUE(fs::is_symlink(folder / "link"));
  EXPECT_EQ(read_bytes(folder / "there/real"), "new");
}

TEST(AtomicFile, FollowsSymbolicLinksToWhatDoesNotExistYet) {
  TemporaryFolder folder;
  fs::create_directories(folder / "there/deep");
  fs::create_directory_symlink("there/deep", folder / "near");
  fs::create_symlink("near/../new", folder / "link");  // there/new
  fs::create_symlink(folder / "link", folder / "link to the link");
  write_text_atomically(folder / "link to the link", "text");
  EXPECT_TRUE(fs::is_symlink(folder / "link"));
  EXPECT_TRUE(fs::is_symlink(folder / "link to the link"));
  EXPECT_EQ(read_bytes(folder / "there/new"), "text");

  fs::create_symlink("nowhere/new", folder / "astray");
  EXPECT_CONTAINS(message_of([&] { AtomicFile file(folder / "astray"); }),
                  "nowhere does not exist");
  fs::create_symlink("round", folder / "about");
  fs::create_symlink("about", folder / "round");
  EXPECT_CONTAINS(message_of([&] { AtomicFile file(folder / "round"); }), "lead to one another");

  fs::create_symlink("there/folder", folder / "to a folder");
  AtomicFolder made(folder / "to a folder");
  made.commit();
  EXPECT_TRUE(fs::is_symlink(folder / "to a folder"));
  EXPECT_TRUE(fs::is_directory(folder / "there/folder"));
}

TEST(AtomicFile, TakesARelativeAndALongName) {
  TemporaryFolder folder;
  const fs::path before = fs::current_path();
  fs::current_path(folder.path());
  write_text_atomically("relative", "x");
  fs::current_path(before);
  EXPECT_EQ(read_bytes(folder / "relative"), "x");
  const std::string name(250, 'n');
  write_text_atomically(folder / name, "y");
  EXPECT_EQ(read_bytes(folder / name), "y");
}

TEST(AtomicFile, SaysAtOnceWhyItCannotWrite) {
  TemporaryFolder folder;
  fs::create_directory(folder / "folder");
  write_bytes(folder / "file", "x");
  EXPECT_CONTAINS(message_of([&] { AtomicFile file(folder / "no/a"); }), "does not exist");
  EXPECT_CONTAINS(message_of([&] { AtomicFile file(folder / "folder"); }), "is a folder");
  EXPECT_CONTAINS(message_of([&] { AtomicFile file(folder / "folder/"); }), "is a folder");
  EXPECT_CONTAINS(message_of([&] { AtomicFile file(folder / "file/a"); }), "is not a folder");
  EXPECT_CONTAINS(message_of([&] { AtomicFile file("/dev/null"); }), "not a regular file");
  EXPECT_CONTAINS(message_of([&] { AtomicFile file(""); }), "empty");
  EXPECT_CONTAINS(message_of([&] { AtomicFile file("/"); }), "root folder");
  EXPECT_CONTAINS(message_of([&] { AtomicFile file("/proc/a"); }), "cannot write /proc/a");
  EXPECT_EQ(folder.entries(), 2u);
}

TEST(AtomicFile, NamesAFolderThatIsNotWritable) {
  TemporaryFolder folder;
  fs::permissions(folder.path(), fs::perms::owner_read | fs::perms::owner_exec);
  const int status = in_child([&] {
    // Root may write anywhere.
    if (geteuid() == 0 && (chmod(folder.path().c_str(), 0555) != 0 || setuid(65534) != 0)) return 2;
    const std::string message = message_of([&] { AtomicFile file(folder / "a"); });
    return message.find("permission denied") == std::string::npos ? 1 : 0;
  });
  fs::permissions(folder.path(), fs::perms::owner_all);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 2) GTEST_SKIP() << "cannot drop root's rights";
  EXPECT_EQ(status, 0);
}

TEST(AtomicFile, KilledInTheMiddleLeavesTheOldFile) {
  TemporaryFolder folder;
  write_bytes(folder / "a", "old");
  const int status = in_child([&] {
    AtomicFile file(folder / "a");
    file.write("half of the new", 15);
    raise(SIGKILL);
    return 0;
  });
  EXPECT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(read_bytes(folder / "a"), "old");
  // A kill that cannot be caught leaves the temporary, under its own name.
  EXPECT_EQ(folder.entries(), 2u);
  write_text_atomically(folder / "a", "new");
  EXPECT_EQ(read_bytes(folder / "a"), "new");
}

TEST(AtomicFile, FullDiskLeavesTheOldFile) {
  TemporaryFolder folder;
  write_bytes(folder / "a", "old");
  const int status = in_child([&] {
    signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{10000, 10000};
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0) return 2;
    const std::string text(20000, 'x');
    const std::string message = message_of([&] { write_text_atomically(folder / "a", text); });
    return message.find("larger than") == std::string::npos ? 1 : 0;
  });
  EXPECT_EQ(status, 0);
  EXPECT_EQ(read_bytes(folder / "a"), "old");
  EXPECT_EQ(folder.entries(), 1u);
}

TEST(AtomicFile, KeepsTheFinishedFileWhenTheRenameIsRefused) {
  TemporaryFolder folder;
  AtomicFile file(folder / "a");
  file.write("work of hours", 13);
  fs::create_directory(folder / "a");  // Somebody else, meanwhile.
  EXPECT_CONTAINS(message_of([&] { file.commit(); }), "kept as");
  EXPECT_EQ(read_bytes(file.temporary()), "work of hours");
}

TEST(AtomicFolder, AppearsOnlyAtCommit) {
  TemporaryFolder folder;
  {
    AtomicFolder out(folder / "out/");
    EXPECT_EQ(out.target(), folder / "out");
    write_bytes(out.temporary() / "a", "x");
    fs::create_directory(out.temporary() / "deep");
    write_bytes(out.temporary() / "deep/b", "y");
    EXPECT_FALSE(fs::exists(folder / "out"));
    out.commit();
    EXPECT_CONTAINS(message_of([&] { out.commit(); }), "already committed");
  }
  EXPECT_EQ(read_bytes(folder / "out/deep/b"), "y");
  EXPECT_EQ(folder.entries(), 1u);
}

TEST(AtomicFolder, IsRemovedWithoutCommit) {
  TemporaryFolder folder;
  {
    AtomicFolder out(folder / "out");
    write_bytes(out.temporary() / "a", "x");
  }
  EXPECT_EQ(folder.entries(), 0u);
}

TEST(AtomicFolder, ReplacesAnEmptyFolderOnly) {
  TemporaryFolder folder;
  fs::create_directory(folder / "empty");
  {
    AtomicFolder out(folder / "empty");
    EXPECT_TRUE(fs::is_empty(folder / "empty"));
    write_bytes(out.temporary() / "a", "x");
    out.commit();
  }
  EXPECT_EQ(read_bytes(folder / "empty/a"), "x");
  EXPECT_CONTAINS(message_of([&] { AtomicFolder out(folder / "empty"); }), "not empty");
  EXPECT_CONTAINS(message_of([&] { AtomicFolder out(folder / "empty/a"); }), "a file of that name");
  EXPECT_CONTAINS(message_of([&] { AtomicFolder out(folder / "no/out"); }), "does not exist");
  EXPECT_EQ(folder.entries(), 1u);
}

TEST(AtomicFolder, RefusesTheCurrentFolderAndMountPoints) {
  TemporaryFolder folder;
  const fs::path before = fs::current_path();
  fs::current_path(folder.path());
  EXPECT_CONTAINS(message_of([] { AtomicFolder out("."); }), "current folder");
  fs::current_path(before);
  if (fs::is_directory("/dev/shm") && fs::is_empty("/dev/shm") && geteuid() == 0) {
    EXPECT_CONTAINS(message_of([] { AtomicFolder out("/dev/shm"); }), "mount point");
  }
}

TEST(AtomicFolder, RefusesATargetFilledMeanwhile) {
  TemporaryFolder folder;
  AtomicFolder out(folder / "out");
  write_bytes(out.temporary() / "a", "mine");
  fs::create_directory(folder / "out");
  write_bytes(folder / "out/b", "theirs");
  EXPECT_CONTAINS(message_of([&] { out.commit(); }), "kept as");
  EXPECT_EQ(read_bytes(folder / "out/b"), "theirs");
  EXPECT_EQ(read_bytes(out.temporary() / "a"), "mine");
}

TEST(AtomicFolder, KilledInTheMiddleLeavesNoFolder) {
  TemporaryFolder folder;
  const int status = in_child([&] {
    AtomicFolder out(folder / "out");
    write_bytes(out.temporary() / "a", "x");
    raise(SIGKILL);
    return 0;
  });
  EXPECT_TRUE(WIFSIGNALED(status));
  EXPECT_FALSE(fs::exists(folder / "out"));
}

}  // namespace
}  // namespace vernier
