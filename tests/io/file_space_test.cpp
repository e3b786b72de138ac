#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

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

TEST_F(FileSpaceTest, WithoutFallocateReserveSetsTheSizeAndNeverShrinks) {
  for (const int error : {EOPNOTSUPP, ENOSYS}) {
    expect_well_in_child([&]() -> std::string {
      const File file = File::scratch(directory_.path());
      if (!refuse_syscall(SYS_fallocate, error)) {
        return test::skip("no seccomp");
      }
      file.reserve(4096, 8192);
      file.reserve(0, 4096);
      return file.size() == 12288 ? "" : std::to_string(file.size());
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

TEST_F(FileSpaceTest, WithoutFallocateGrowLeavesTheSizeToTheWrites) {
  expect_well_in_child([this]() -> std::string {
    const File file = File::open(path("x"), File::Mode::kReadWrite);
    if (!refuse_syscall(SYS_fallocate, EOPNOTSUPP)) {
      return test::skip("no seccomp");
    }
    file.grow(0, 8192);
    return file.size() == 0 ? "" : std::to_string(file.size());
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

TEST_F(FileSpaceTest, AFullDiskLeavesTheSizeAsItWas) {
  expect_well_in_child([this]() -> std::string {
    const std::string place = directory_.path().string();
    const std::string image = place + "/image";
    const auto run = [](const std::string& command) {
      return std::system((command + " >/dev/null 2>&1").c_str()) == 0;
    };
    // Unlike tmpfs, ext4 keeps what it had reserved when it ran full.
    if (!test::own_mounts() || !run("truncate -s 16M " + image) ||
        !run("PATH=$PATH:/sbin:/usr/sbin mkfs.ext4 -q " + image) ||
        !run("mount -o loop " + image + " " + place)) {
      return test::skip("may not mount a loop device");
    }
    const std::string what = reserve_too_much(place);
    return what.empty() ? grow_too_much(place) : what;
  });
}

}  // namespace
}  // namespace torch_ext
