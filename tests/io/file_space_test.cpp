#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "support/child.h"
#include "support/temp_dir.h"
#include "torch_ext/base/error.h"
#include "torch_ext/io/file.h"

namespace torch_ext {
namespace {

namespace fs = std::filesystem;
using test::expect_well_in_child;
using test::refuse_syscall;

/// The failure that `call` throws; one with errno 0 if it throws none.
IoFailure failure_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const IoError& error) {
    return error.failure();
  }
  return {};
}

struct stat status_of(int fd) {
  struct stat status = {};
  EXPECT_EQ(fstat(fd, &status), 0);
  return status;
}

/// How a File gets its blocks: reserve() and grow().
class FileSpaceTest : public testing::Test {
 protected:
  fs::path path(std::string_view name) const { return directory_ / name; }

  fs::path with_text(std::string_view name, std::string_view text) const {
    std::ofstream(path(name)) << text;
    return path(name);
  }

  const test::TempDir directory_;
};

TEST_F(FileSpaceTest, ReserveGrowsTheFileAndGivesItBlocks) {
  const File file = File::scratch(directory_.path());
  file.reserve(0, 0);
  EXPECT_EQ(file.size(), 0u);
  file.reserve(1 << 20, 3 << 20);
  EXPECT_EQ(file.size(), 4u << 20);
  EXPECT_GE(status_of(file.fd()).st_blocks * 512, 3 << 20);
  file.reserve(0, 4096);
  EXPECT_EQ(file.size(), 4u << 20);
}

TEST_F(FileSpaceTest, ReserveKeepsTheBytesThatAreThere) {
  const fs::path name = with_text("old", "twelve bytes");
  const File file = File::open(name, File::Mode::kReadWrite);
  file.reserve(0, 100000);
  char text[12];
  ASSERT_EQ(pread(file.buffered_fd(), text, 12, 0), 12);
  EXPECT_EQ(std::string(text, 12), "twelve bytes");
}

TEST_F(FileSpaceTest, ReserveRefusesRangesThatNoFileCanHave) {
  const File file = File::scratch(directory_.path());
  const auto huge = std::uint64_t{1} << 63;
  for (const auto& [offset, length] :
       {std::pair(huge, std::uint64_t{1}), std::pair(std::uint64_t{1}, huge),
        std::pair(huge - 4096, std::uint64_t{8192})}) {
    const IoFailure failure = failure_of([&] { file.reserve(offset, length); });
    EXPECT_EQ(failure.error, EFBIG);
    EXPECT_EQ(failure.offset, offset);
    EXPECT_EQ(failure.length, length);
  }
  EXPECT_EQ(file.size(), 0u);
}

TEST_F(FileSpaceTest, WithoutFallocateReserveGivesBlocksByWritingZeros) {
  for (const int error : {EOPNOTSUPP, ENOSYS}) {
    expect_well_in_child([&]() -> std::string {
      if (!refuse_syscall(SYS_fallocate, error)) {
        return test::skip("no seccomp");
      }
      const File file = File::scratch(directory_.path());
      if (file.reserves()) return "nobody noticed";
      file.write(0, std::vector<std::byte>(5000, std::byte{7}));
      file.reserve(4096, (3 << 20) - 4096);
      file.reserve(0, 4096);
      if (file.size() != 3 << 20) return std::to_string(file.size());
      if (status_of(file.fd()).st_blocks * 512 < 3 << 20) return "holes";
      std::vector<char> bytes(3 << 20);
      if (pread(file.buffered_fd(), bytes.data(), bytes.size(), 0) != 3 << 20) {
        return "pread";
      }
      const auto zeros = std::count(bytes.begin(), bytes.end(), 0);
      return zeros == (3 << 20) - 5000 ? "" : "bytes that were there changed";
    });
  }
}

TEST_F(FileSpaceTest, WithoutFallocateADriveThatTakesNoZerosIsAnError) {
  for (const long number : {SYS_pwrite64, SYS_fdatasync}) {
    expect_well_in_child([&]() -> std::string {
      const File file = File::scratch(directory_.path());
      file.reserve(0, 8192);
      if (!refuse_syscall(SYS_fallocate, EOPNOTSUPP) ||
          !refuse_syscall(number, EIO)) {
        return test::skip("no seccomp");
      }
      const IoFailure failure =
          failure_of([&] { file.reserve(8192, 1 << 20); });
      if (failure.error != EIO) return errno_name(failure.error);
      return file.size() == 8192 ? "" : std::to_string(file.size());
    });
  }
}

/// A child's process whose files may have 1 MiB, and which dies of more.
bool limit_file_size() {
  signal(SIGXFSZ, SIG_DFL);
  const rlimit limit = {1 << 20, 1 << 20};
  return setrlimit(RLIMIT_FSIZE, &limit) == 0;
}

TEST_F(FileSpaceTest, TheFileSizeLimitIsAnErrorNotTheEndOfTheProcess) {
  expect_well_in_child([this]() -> std::string {
    const File file = File::scratch(directory_.path());
    if (!limit_file_size()) return "setrlimit";
    const std::vector<std::byte> bytes(8192);
    for (int i = 0; i < 2; ++i) {
      IoFailure failure = failure_of([&] { file.reserve(0, 2 << 20); });
      if (failure.error != EFBIG) return "reserve " + errno_name(failure.error);
      failure = failure_of([&] { file.write((1 << 20) - 4096, bytes); });
      if (failure.error != EFBIG) return "write " + errno_name(failure.error);
      if (failure.offset != 1u << 20) return "offset";
    }
    sigset_t pending;
    sigpending(&pending);
    if (sigismember(&pending, SIGXFSZ) != 0) return "a signal is left";
    sigset_t blocked;
    pthread_sigmask(SIG_BLOCK, nullptr, &blocked);
    return sigismember(&blocked, SIGXFSZ) == 0 ? "" : "it stays blocked";
  });
}

TEST_F(FileSpaceTest, AFileSizeSignalThatWasPendingBeforeStaysSo) {
  expect_well_in_child([this]() -> std::string {
    const File file = File::scratch(directory_.path());
    if (!limit_file_size()) return "setrlimit";
    sigset_t one;
    sigemptyset(&one);
    sigaddset(&one, SIGXFSZ);
    pthread_sigmask(SIG_BLOCK, &one, nullptr);
    raise(SIGXFSZ);
    const IoFailure failure = failure_of([&] { file.reserve(0, 2 << 20); });
    if (failure.error != EFBIG) return errno_name(failure.error);
    sigset_t pending;
    sigpending(&pending);
    return sigismember(&pending, SIGXFSZ) == 1 ? "" : "the signal is lost";
  });
}

/// What reserve() does on a full file system with 1 MiB reserved before.
std::string reserve_too_much(const fs::path& place) {
  const File file = File::scratch(place);
  file.reserve(0, 1 << 20);
  const IoFailure failure =
      failure_of([&] { file.reserve(1 << 20, 64 << 20); });
  if (failure.error != ENOSPC) return errno_name(failure.error);
  if (failure.op != "fallocate") return failure.op;
  if (failure.offset != 1u << 20) return "offset";
  if (failure.length != 64u << 20) return "length";
  if (file.size() != 1u << 20) return "size " + std::to_string(file.size());
  const auto blocks = status_of(file.fd()).st_blocks;
  // A few more than its bytes need hold the map of its blocks.
  if (blocks > (1 << 20) / 512 + 64) return "blocks " + std::to_string(blocks);
  file.reserve(1 << 20, 2 << 20);  // The rest of the disk is still there.
  return "";
}

TEST_F(FileSpaceTest, GrowGivesBlocksAndNeverShrinks) {
  const fs::path name = with_text("old", "twelve bytes");
  const File file = File::open(name, File::Mode::kReadWrite);
  file.grow(0, 1 << 20);
  EXPECT_EQ(file.size(), 1u << 20);
  EXPECT_GE(status_of(file.fd()).st_blocks * 512, 1 << 20);
  file.grow(0, 4096);
  EXPECT_EQ(file.size(), 1u << 20);
  char text[12];
  ASSERT_EQ(pread(file.buffered_fd(), text, 12, 0), 12);
  EXPECT_EQ(std::string(text, 12), "twelve bytes");
}

TEST_F(FileSpaceTest, GrowLeavesAHoleBeforeTheRange) {
  const File file = File::scratch(directory_.path());
  const std::uint64_t far = std::uint64_t{1} << 30;
  for (const std::uint64_t offset : {far, 3 * far}) {
    file.grow(offset, 8192);
    EXPECT_EQ(file.size(), offset + 8192);
    EXPECT_GE(status_of(file.fd()).st_blocks * 512, 8192);
    EXPECT_LE(status_of(file.fd()).st_blocks * 512, 1 << 20);
  }
}

TEST_F(FileSpaceTest, GrowFillsHolesAndKeepsTheBytes) {
  const fs::path name = with_text("holes", "twelve bytes");
  fs::resize_file(name, 1 << 20);
  const File file = File::open(name, File::Mode::kReadWrite);
  EXPECT_TRUE(file.needs_space(0, 4096));
  file.grow(4096, 512 << 10);
  EXPECT_EQ(file.size(), 1u << 20);
  EXPECT_GE(status_of(file.fd()).st_blocks * 512, 512 << 10);
  EXPECT_LT(status_of(file.fd()).st_blocks * 512, 1 << 20);
  file.grow(0, 1 << 20);
  EXPECT_FALSE(file.needs_space(0, 1 << 20));
  EXPECT_TRUE(file.needs_space(1 << 20, 1));
  char text[12];
  ASSERT_EQ(pread(file.buffered_fd(), text, 12, 0), 12);
  EXPECT_EQ(std::string(text, 12), "twelve bytes");
}

TEST_F(FileSpaceTest, WithoutFallocateGrowGivesBlocksByWritingZeros) {
  expect_well_in_child([this]() -> std::string {
    const fs::path name = with_text("x", "twelve bytes");
    const File file = File::open(name, File::Mode::kReadWrite);
    if (!refuse_syscall(SYS_fallocate, EOPNOTSUPP)) {
      return test::skip("no seccomp");
    }
    file.grow(0, 1 << 20);
    if (file.reserves()) return "nobody noticed";
    if (file.size() != 1 << 20) return std::to_string(file.size());
    if (status_of(file.fd()).st_blocks * 512 < 1 << 20) return "holes";
    char text[12];
    if (pread(file.buffered_fd(), text, 12, 0) != 12) return "pread";
    return std::string(text, 12) == "twelve bytes" ? "" : std::string(text, 12);
  });
}

/// What grow() does on a full file system.
std::string grow_too_much(const fs::path& place) {
  const File file = File::open(place / "x", File::Mode::kWrite);
  file.grow(0, 1 << 20);
  for (int i = 0; i < 2; ++i) {
    const IoFailure failure = failure_of([&] { file.grow(0, 65 << 20); });
    if (failure.error != ENOSPC) return errno_name(failure.error);
    if (failure.op != "fallocate") return failure.op;
    if (failure.offset != 0u) return "offset";
    if (failure.length != 65u << 20) return "length";
    if (file.size() != 1u << 20) return "size " + std::to_string(file.size());
  }
  file.grow(0, 3 << 20);  // The rest of the disk is still there.
  return "";
}

TEST_F(FileSpaceTest, ACallThatIsInterruptedForEverIsAnError) {
  const File file = File::open(path("x"), File::Mode::kWrite);
  expect_well_in_child([&]() -> std::string {
    if (!refuse_syscall(SYS_fallocate, EINTR)) return test::skip("no seccomp");
    if (failure_of([&] { file.grow(0, 4096); }).error != EINTR) return "grow";
    if (!refuse_syscall(SYS_openat, EINTR)) return test::skip("no seccomp");
    const auto open = [&] { File::open(path("x"), File::Mode::kRead); };
    return failure_of(open).error == EINTR ? "" : "open";
  });
}

TEST_F(FileSpaceTest, AFullMemoryFileSystemLeavesTheSizeAsItWas) {
  expect_well_in_child([this]() -> std::string {
    const char* place = directory_.path().c_str();
    if (!test::own_mounts() ||
        mount("none", place, "tmpfs", 0, "size=4m") != 0) {
      return test::skip("may not mount");
    }
    const std::string what = reserve_too_much(place);
    return what.empty() ? grow_too_much(place) : what;
  });
}

/// A file system of 16 MiB in a loop device, in a child's own mounts.
bool mount_small(const std::string& type, const std::string& place) {
  const std::string image = place + "/image";
  const auto run = [](const std::string& command) {
    return std::system((command + " >/dev/null 2>&1").c_str()) == 0;
  };
  return test::own_mounts() && run("truncate -s 16M " + image) &&
         run("PATH=$PATH:/sbin:/usr/sbin mkfs." + type + " -q " + image) &&
         run("mount -o loop " + image + " " + place);
}

TEST_F(FileSpaceTest, AFullDiskLeavesTheSizeAsItWas) {
  // Unlike tmpfs, ext4 keeps what it had reserved when it ran full. ext2 has no
  // fallocate.
  for (const char* type : {"ext4", "ext2"}) {
    expect_well_in_child([&]() -> std::string {
      const std::string place = directory_.path().string();
      if (!mount_small(type, place)) {
        return test::skip("may not mount a loop device");
      }
      const std::string what = reserve_too_much(place);
      return what.empty() ? grow_too_much(place) : what;
    });
  }
}

/// What a full disk of 16 MiB leaves of growth into the holes of a file, and
/// of growth beyond its end.
std::string fill_in_vain(const fs::path& place, std::uint64_t size) {
  const fs::path name = place / "sparse";
  std::ofstream(name) << "twelve bytes";
  fs::resize_file(name, size);
  const File file = File::open(name, File::Mode::kReadWrite);
  file.reserve(1 << 20, 4096);  // Somewhere in it there is something.
  const std::vector<std::byte> sevens(4096, std::byte{7});
  file.write(1 << 20, sevens);
  const auto blocks = status_of(file.fd()).st_blocks;
  const IoFailure failure = failure_of([&] { file.grow(5, 24 << 20); });
  if (failure.error != ENOSPC) return errno_name(failure.error);
  if (file.size() != size) return "size " + std::to_string(file.size());
  const auto kept = status_of(file.fd()).st_blocks - blocks;
  // A few hold the map of its blocks.
  if (kept > 64) return "keeps " + std::to_string(kept) + " blocks";
  std::vector<std::byte> bytes(4096);
  if (pread(file.buffered_fd(), bytes.data(), 4096, 1 << 20) != 4096 ||
      bytes != sevens) {
    return "bytes that were there are gone";
  }
  char text[12];
  if (pread(file.buffered_fd(), text, 12, 0) != 12 ||
      std::string(text, 12) != "twelve bytes") {
    return "text that was there is gone";
  }
  file.grow(0, 8 << 20);  // The rest of the disk is still there.
  return "";
}

TEST_F(FileSpaceTest, NoFailedGrowthKeepsWhatItGotOfTheDisk) {
  for (const char* type : {"ext4", "ext2"}) {
    for (const std::uint64_t size :
         {std::uint64_t{24} << 20, std::uint64_t{2} << 20}) {
      for (const bool says : {true, false}) {
        expect_well_in_child([&]() -> std::string {
          if (!mount_small(type, directory_.path().string())) {
            return test::skip("may not mount a loop device");
          }
          // As if others took the space in between, or there were a quota.
          if (!says && !refuse_syscall(SYS_fstatfs, EIO)) {
            return test::skip("no seccomp");
          }
          const std::string what = fill_in_vain(directory_.path(), size);
          return what.empty() ? "" : std::string(type) + ": " + what;
        });
      }
    }
  }
}

TEST_F(FileSpaceTest, GivingBackLeavesWhatLiesBeforeTheRange) {
  expect_well_in_child([this]() -> std::string {
    const std::string place = directory_.path().string();
    if (!mount_small("ext2", place)) {
      return test::skip("may not mount a loop device");
    }
    if (!refuse_syscall(SYS_fstatfs, EIO)) return test::skip("no seccomp");
    const File file = File::open(path("x"), File::Mode::kReadWrite);
    const std::vector<std::byte> sevens(4096, std::byte{7});
    file.write(0, sevens);

    if (failure_of([&] { file.grow(8192, 64 << 20); }).error != ENOSPC) {
      return "no error";
    }
    std::vector<std::byte> bytes(4096);
    if (pread(file.buffered_fd(), bytes.data(), 4096, 0) != 4096) return "cut";
    return bytes == sevens ? "" : "changed";
  });
}

}  // namespace
}  // namespace torch_ext
