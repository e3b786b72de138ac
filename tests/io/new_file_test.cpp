#include "torch_ext/io/new_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>

#include "io/file_lock.h"
#include "support/failing_syscalls.h"
#include "support/temp_dir.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

using test::TempDir;

std::string content(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::set<std::string> names_in(const std::filesystem::path& directory) {
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    names.insert(entry.path().filename());
  }
  return names;
}

void fill(const NewFile& file, std::string_view text) {
  file.file().write(0, std::as_bytes(std::span(text)));
}

mode_t mode_of(const std::filesystem::path& path) {
  struct stat status = {};
  EXPECT_EQ(stat(path.c_str(), &status), 0);
  return status.st_mode & 07777;
}

int error_of(const std::filesystem::path& path) {
  try {
    const NewFile file(path, 1);
  } catch (const IoError& error) {
    EXPECT_EQ(error.failure().path, path.native());
    return error.error();
  }
  return 0;
}

TEST(NewFileTest, TheNameHasTheOldFileUntilTheNewOneIsPublished) {
  const TempDir directory;
  std::ofstream(directory / "x") << "old";
  {
    NewFile file(directory / "x", 3);
    fill(file, "new");
    EXPECT_EQ(content(directory / "x"), "old");
    EXPECT_EQ(names_in(directory.path()), std::set<std::string>{"x"});
    file.publish();
    EXPECT_EQ(content(directory / "x"), "new");
  }
  EXPECT_EQ(content(directory / "x"), "new");
  EXPECT_EQ(names_in(directory.path()), std::set<std::string>{"x"});
}

TEST(NewFileTest, OneThatIsDroppedLeavesNothing) {
  const TempDir directory;
  std::ofstream(directory / "x") << "old";
  fill(NewFile(directory / "x", 3), "new");
  fill(NewFile(directory / "y", 3), "new");
  EXPECT_EQ(content(directory / "x"), "old");
  EXPECT_EQ(names_in(directory.path()), std::set<std::string>{"x"});
}

TEST(NewFileTest, PermissionsAreThoseOfTheOldFileOrWhatTheUmaskLeaves) {
  const TempDir directory;
  std::ofstream(directory / "x") << "old";
  chmod((directory / "x").c_str(), 0640);
  const mode_t before = umask(027);
  NewFile replaced(directory / "x", 0);
  NewFile made(directory / "y", 0);
  umask(before);
  replaced.publish();
  made.publish();
  EXPECT_EQ(mode_of(directory / "x"), 0640u);
  EXPECT_EQ(mode_of(directory / "y"), 0640u);
  umask(022);
  NewFile other(directory / "z", 0);
  umask(before);
  other.publish();
  EXPECT_EQ(mode_of(directory / "z"), 0644u);
}

TEST(NewFileTest, WhatIsNoFileToReplaceIsRefused) {
  const TempDir directory;
  std::filesystem::create_directory(directory / "folder");
  std::filesystem::create_symlink("x", directory / "link");
  ASSERT_EQ(mkfifo((directory / "fifo").c_str(), 0600), 0);
  EXPECT_EQ(error_of(directory / "folder"), EISDIR);
  EXPECT_EQ(error_of(directory / "link"), ELOOP);
  EXPECT_EQ(error_of(directory / "fifo"), EINVAL);
  EXPECT_EQ(error_of(directory / "missing/x"), ENOENT);
  EXPECT_EQ(error_of(directory / "folder/"), EISDIR);
  EXPECT_THROW(NewFile("", 1), std::invalid_argument);
  if (geteuid() == 0) return;  // Root may write everywhere.
  std::ofstream(directory / "protected") << "old";
  chmod((directory / "protected").c_str(), 0444);
  EXPECT_EQ(error_of(directory / "protected"), EACCES);
}

TEST(NewFileTest, AFullDriveRefusesBeforeAnyByte) {
  const TempDir directory;
  std::ofstream(directory / "x") << "old";
  try {
    const NewFile file(directory / "x", std::uint64_t{1} << 60);
    FAIL() << "it has room for an exabyte";
  } catch (const IoError& error) {
    EXPECT_TRUE(error.error() == ENOSPC || error.error() == EFBIG);
    EXPECT_EQ(error.failure().path, (directory / "x").native());
  }
  EXPECT_EQ(content(directory / "x"), "old");
  EXPECT_EQ(names_in(directory.path()), std::set<std::string>{"x"});
}

TEST(NewFileTest, WhatAKilledProcessLeftIsRemovedByTheNextFileOfThatName) {
  const TempDir directory;
  const std::string left = ".x.0123456789abcdef.torch_ext-new";
  const std::string lives = ".x.fedcba9876543210.torch_ext-new";
  const std::set<std::string> others = {
      ".y.0123456789abcdef.torch_ext-new", ".x.0123.torch_ext-new",
      "x.0123456789abcdef.torch_ext-new", ".x.0123456789abcdef.other"};
  for (const std::string& name : others) std::ofstream(directory / name);
  std::ofstream(directory / left);
  std::ofstream(directory / lives);
  const FileLock lock(File::open(directory / lives, File::Mode::kExisting));
  { const NewFile file(directory / "x", 0); }
  std::set<std::string> expected = others;
  expected.insert(lives);
  EXPECT_EQ(names_in(directory.path()), expected);
}

TEST(NewFileTest, ALongNameHasANameBesideThatFits) {
  const TempDir directory;
  const std::string name(255, 'n');
  std::ofstream(directory / name) << "old";
  NewFile file(directory / name, 3);
  fill(file, "new");
  file.publish();
  EXPECT_EQ(content(directory / name), "new");
  EXPECT_EQ(names_in(directory.path()), std::set<std::string>{name});
}

struct Call {
  const char* name;
  long number;
  std::size_t index = 0;
};

/// Replaces "old" while a call fails. Returns what the name has then, and a "!"
/// if that was an error with the path.
std::string replace(const std::filesystem::path& path) {
  std::string error;
  try {
    NewFile file(path, 3);
    fill(file, "new");
    file.publish();
  } catch (const IoError& e) {
    error = e.failure().path == path.native() ? "!" : "!" + e.failure().path;
  }
  return content(path) + error;
}

TEST(NewFileTest, ACallThatFailsLeavesTheOldFileAndNothingElse) {
  const Call calls[] = {
      {"fallocate", SYS_fallocate}, {"fsync of the file", SYS_fsync},
      {"linkat", SYS_linkat},       {"rename", SYS_rename},
      {"fchmod", SYS_fchmod},
  };
  for (const Call& call : calls) {
    for (const int error : {EIO, ENOSPC}) {
      SCOPED_TRACE(std::string(call.name) + " " + errno_name(error));
      const TempDir directory;
      std::ofstream(directory / "x") << "old";
      const test::SyscallTrial trial = test::try_syscall(
          {call.number, error, call.index, true},
          [&](const auto&) { return replace(directory / "x"); });
      if (!trial.unavailable.empty()) GTEST_SKIP() << trial.unavailable;
      EXPECT_GT(trial.failed, 0u);
      EXPECT_EQ(trial.text, "old!");
      EXPECT_EQ(names_in(directory.path()), std::set<std::string>{"x"});
    }
  }
}

TEST(NewFileTest, AnErrorOfTheDirectorySaysThatTheNewFileIsThere) {
  const TempDir directory;
  std::ofstream(directory / "x") << "old";
  const test::SyscallTrial trial =
      test::try_syscall({SYS_fsync, EIO, /*index=*/1, true},
                        [&](const auto&) { return replace(directory / "x"); });
  if (!trial.unavailable.empty()) GTEST_SKIP() << trial.unavailable;
  EXPECT_EQ(trial.text, "new!");
  EXPECT_EQ(names_in(directory.path()), std::set<std::string>{"x"});
}

TEST(NewFileTest, WithoutUnnamedFilesAHiddenNameBesideIsUsed) {
  const TempDir directory;
  std::ofstream(directory / "x") << "old";
  // The first open that the child makes is that with O_TMPFILE or the folder's;
  // each of the first ones fails once.
  std::size_t named = 0;
  for (std::size_t index = 0; index < 3; ++index) {
    const test::SyscallTrial trial = test::try_syscall(
        {SYS_openat, EOPNOTSUPP, index, false}, [&](const auto&) {
          std::string seen;
          try {
            NewFile file(directory / "x", 3);
            seen = std::to_string(names_in(directory.path()).size());
            fill(file, "new");
            file.publish();
          } catch (const IoError&) {
            return std::string("refused");
          }
          return seen;
        });
    if (!trial.unavailable.empty()) GTEST_SKIP() << trial.unavailable;
    if (trial.text == "2") ++named;
    EXPECT_EQ(names_in(directory.path()), std::set<std::string>{"x"});
  }
  EXPECT_EQ(named, 1u);
  EXPECT_EQ(content(directory / "x"), "new");
}

}  // namespace
}  // namespace torch_ext
