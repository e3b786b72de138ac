#include "torch_ext/io/file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/aligned_buffer.h"
#include "support/child.h"
#include "support/temp_dir.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

namespace fs = std::filesystem;
using test::expect_well_in_child;
using test::refuse_syscall;

constexpr std::uint32_t kTmpfileBit = 020000000;  // O_TMPFILE's own.

/// The failure that `call` throws; one with errno 0 if it throws none.
IoFailure failure_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const IoError& error) {
    return error.failure();
  }
  return {};
}

int error_of_opening(const fs::path& path,
                     File::Mode mode = File::Mode::kRead) {
  return failure_of([&] { File::open(path, mode); }).error;
}

struct stat status_of(int fd) {
  struct stat status = {};
  EXPECT_EQ(fstat(fd, &status), 0);
  return status;
}

int entries(const fs::path& directory) {
  int count = 0;
  for ([[maybe_unused]] const auto& entry : fs::directory_iterator(directory)) {
    ++count;
  }
  return count;
}

class FileTest : public testing::Test {
 protected:
  fs::path path(std::string_view name) const { return directory_ / name; }

  fs::path with_text(std::string_view name, std::string_view text) const {
    std::ofstream(path(name)) << text;
    return path(name);
  }

  const test::TempDir directory_;
};

TEST_F(FileTest, BothDescriptorsAreOfOneFileAndCloseOnExec) {
  const File file = File::open(path("x"), File::Mode::kReadWrite);
  ASSERT_TRUE(file.direct()) << file.buffered_reason();
  EXPECT_EQ(file.buffered_reason(), "");
  EXPECT_NE(file.fd(), file.buffered_fd());
  EXPECT_EQ(status_of(file.fd()).st_ino, status_of(file.buffered_fd()).st_ino);
  EXPECT_NE(fcntl(file.fd(), F_GETFL) & O_DIRECT, 0);
  EXPECT_EQ(fcntl(file.buffered_fd(), F_GETFL) & O_DIRECT, 0);
  for (const int fd : {file.fd(), file.buffered_fd()}) {
    EXPECT_EQ(fcntl(fd, F_GETFL) & O_NONBLOCK, 0);
    EXPECT_NE(fcntl(fd, F_GETFD) & FD_CLOEXEC, 0);
  }
}

TEST_F(FileTest, TheDirectDescriptorTakesItsAlignmentAndNoLess) {
  const File file = File::open(path("x"), File::Mode::kReadWrite);
  const std::size_t offset = file.offset_alignment();
  const std::size_t memory = file.memory_alignment();
  test::AlignedBuffer bytes(8192);
  EXPECT_EQ(pwrite(file.fd(), bytes.data() + memory, offset,
                   static_cast<off_t>(offset)),
            static_cast<ssize_t>(offset));
  EXPECT_GE(file.granule(), 4096u);
  EXPECT_EQ(file.granule() % offset, 0u);
  EXPECT_EQ(file.granule() % memory, 0u);
}

TEST_F(FileTest, ANewFileIs0600WhateverTheUmask) {
  for (const mode_t mask : {0u, 022u, 077u, 0777u}) {
    const mode_t before = umask(mask);
    const fs::path name = path("mask" + std::to_string(mask));
    const File named = File::open(name, File::Mode::kWrite);
    const File scratch = File::scratch(directory_.path());
    umask(before);
    EXPECT_EQ(status_of(named.buffered_fd()).st_mode & 07777u, 0600u) << mask;
    EXPECT_EQ(status_of(scratch.buffered_fd()).st_mode & 07777u, 0600u);
  }
}

TEST_F(FileTest, AnExistingFileKeepsItsBytesAndItsMode) {
  const fs::path name = with_text("old", "twelve bytes");
  fs::permissions(name, fs::perms(0640));
  for (const auto mode :
       {File::Mode::kRead, File::Mode::kWrite, File::Mode::kReadWrite}) {
    const File file = File::open(name, mode);
    EXPECT_EQ(file.size(), 12u);
    EXPECT_EQ(status_of(file.fd()).st_mode & 07777u, 0640u);
  }
}

TEST_F(FileTest, AMissingFileIsMadeForWritingOnly) {
  EXPECT_EQ(error_of_opening(path("none")), ENOENT);
  EXPECT_FALSE(fs::exists(path("none")));
  EXPECT_EQ(error_of_opening(path("none/x"), File::Mode::kWrite), ENOENT);
  EXPECT_EQ(File::open(path("none"), File::Mode::kWrite).size(), 0u);
}

TEST_F(FileTest, LinksAreNotFollowed) {
  fs::create_symlink(with_text("target", "precious"), path("link"));
  fs::create_symlink("nowhere", path("dangling"));
  fs::create_symlink("loop", path("loop"));
  for (const char* name : {"link", "dangling", "loop"}) {
    for (const auto mode :
         {File::Mode::kRead, File::Mode::kWrite, File::Mode::kReadWrite}) {
      EXPECT_EQ(error_of_opening(path(name), mode), ELOOP) << name;
    }
  }
  EXPECT_FALSE(fs::exists(path("nowhere")));
}

TEST_F(FileTest, WhatIsNotARegularFileIsRefusedWithoutWaiting) {
  ASSERT_EQ(mkfifo(path("fifo").c_str(), 0600), 0);
  fs::create_directory(path("dir"));
  for (const auto mode :
       {File::Mode::kRead, File::Mode::kWrite, File::Mode::kReadWrite}) {
    EXPECT_NE(error_of_opening(path("fifo"), mode), 0);
    EXPECT_EQ(error_of_opening(path("dir"), mode), EISDIR);
    EXPECT_EQ(error_of_opening("/dev/null", mode), EINVAL);
  }
  const int socket_fd = socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, path("socket").c_str(),
               sizeof(address.sun_path) - 1);
  ASSERT_EQ(
      bind(socket_fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)),
      0);
  close(socket_fd);
  EXPECT_NE(error_of_opening(path("socket")), 0);
}

TEST_F(FileTest, BadPathsSayWhatIsWrong) {
  EXPECT_THROW(File::open("", File::Mode::kRead), std::invalid_argument);
  EXPECT_THROW(File::open(std::string("a\0b", 3), File::Mode::kRead),
               std::invalid_argument);
  EXPECT_THROW(File::scratch(""), std::invalid_argument);
  EXPECT_EQ(error_of_opening(path(std::string(256, 'n'))), ENAMETOOLONG);
  const IoFailure failure =
      failure_of([&] { File::open(path("no/file"), File::Mode::kRead); });
  EXPECT_EQ(failure.op, "open");
  EXPECT_EQ(failure.path, path("no/file").string());
}

TEST_F(FileTest, ANameOfAnyBytesWorks) {
  for (const std::string& name :
       {std::string(255, 'n'), std::string("\xff\xfe"), std::string("a\nb"),
        std::string("  "), std::string("\xc3\xa9")}) {
    const File file = File::open(path(name), File::Mode::kReadWrite);
    EXPECT_EQ(file.path(), path(name).string());
  }
}

TEST_F(FileTest, ARelativePathIsMadeAbsolute) {
  expect_well_in_child([this]() -> std::string {
    if (chdir(directory_.path().c_str()) != 0) return "chdir";
    const File file = File::open("x", File::Mode::kWrite);
    const File scratch = File::scratch(".");
    if (file.path() != path("x").string()) return file.path();
    return scratch.path().front() == '/' ? "" : scratch.path();
  });
}

TEST_F(FileTest, AMovedFileIsOpenOnceAndClosedOnce) {
  File first = File::open(path("x"), File::Mode::kReadWrite);
  const int fd = first.fd();
  File second = std::move(first);
  EXPECT_EQ(second.fd(), fd);
  EXPECT_EQ(first.buffered_fd(), -1);
  second = File::open(path("y"), File::Mode::kReadWrite);
  EXPECT_EQ(second.path(), path("y").string());
  { const File last = std::move(second); }
  EXPECT_EQ(fcntl(fd, F_GETFD), -1);
}

TEST_F(FileTest, ScratchHasNoNameAndIsGoneWhenClosed) {
  const fs::path place = directory_.path();
  {
    const File file = File::scratch(place);
    EXPECT_EQ(file.path(), (place / "[scratch]").string());
    EXPECT_TRUE(file.direct()) << file.buffered_reason();
    EXPECT_EQ(status_of(file.buffered_fd()).st_nlink, 0u);
    EXPECT_EQ(status_of(file.fd()).st_ino,
              status_of(file.buffered_fd()).st_ino);
    EXPECT_EQ(entries(place), 0);
  }
  EXPECT_EQ(entries(place), 0);
}

TEST_F(FileTest, ScratchNeedsADirectoryThatIsThereAndWritable) {
  const fs::path file = with_text("file", "");
  for (const auto& [place, error] :
       {std::pair(path("missing"), ENOENT), std::pair(file, ENOTDIR),
        std::pair(fs::path("/proc"), ENOENT)}) {
    const IoFailure failure = failure_of([&] { File::scratch(place); });
    EXPECT_EQ(failure.error, error) << place;
    EXPECT_EQ(failure.path, place.string());
  }
}

TEST_F(FileTest, ScratchWithoutTmpfileLeavesNoNameBehind) {
  for (const int error : {EOPNOTSUPP, EISDIR, EINVAL, ENOENT}) {
    expect_well_in_child([&]() -> std::string {
      if (!refuse_syscall(SYS_openat, error, 2, kTmpfileBit)) {
        return test::skip("no seccomp");
      }
      const File file = File::scratch(directory_.path());
      if (!file.direct()) return file.buffered_reason();
      const struct stat status = status_of(file.fd());
      if ((status.st_mode & 07777u) != 0600) return "mode";
      return status.st_nlink == 0 ? "" : "still has a name";
    });
    EXPECT_EQ(entries(directory_.path()), 0);
  }
}

TEST_F(FileTest, WithoutDirectIoTheFileIsBufferedAndSaysWhy) {
  expect_well_in_child([this]() -> std::string {
    if (!refuse_syscall(SYS_openat, EINVAL, 2, O_DIRECT))
      return test::skip("no seccomp");
    for (const File& file : {File::open(path("x"), File::Mode::kReadWrite),
                             File::scratch(directory_.path())}) {
      if (file.direct()) return "direct";
      if (file.fd() != file.buffered_fd()) return "descriptors";
      if (file.memory_alignment() != 1) return "memory alignment";
      if (file.offset_alignment() != 1) return "offset alignment";
      if (file.granule() != 4096) return "granule";
      if (file.buffered_reason().empty()) return "no reason";
    }
    return "";
  });
}

TEST_F(FileTest, AKernelThatDoesNotSayTheAlignmentGetsASafeOne) {
  expect_well_in_child([this]() -> std::string {
    if (!refuse_syscall(SYS_statx, ENOSYS)) return test::skip("no seccomp");
    const File file = File::open(path("x"), File::Mode::kReadWrite);
    if (!file.direct()) return file.buffered_reason();
    if (file.memory_alignment() != 4096) return "memory alignment";
    return file.offset_alignment() == 4096 ? "" : "offset alignment";
  });
}

TEST_F(FileTest, WithoutProcANamedFileIsDirectAndScratchSaysWhyItIsNot) {
  expect_well_in_child([this]() -> std::string {
    if (!test::own_mounts() || mount("none", "/proc", "tmpfs", 0, "") != 0) {
      return test::skip("may not mount");
    }
    const File file = File::open(path("x"), File::Mode::kReadWrite);
    if (!file.direct()) return file.buffered_reason();
    const File scratch = File::scratch(directory_.path());
    if (scratch.direct()) return "how?";
    return scratch.buffered_reason().empty() ? "no reason" : "";
  });
}

TEST_F(FileTest, RunningOutOfDescriptorsIsAnErrorAndLeaksNone) {
  // UBSan needs descriptors to look at `this`.
  expect_well_in_child([name = path("x")]() -> std::string {
    const int next = dup(0);
    close(next);
    const rlimit one_more = {static_cast<rlim_t>(next) + 1,
                             static_cast<rlim_t>(next) + 1};
    if (setrlimit(RLIMIT_NOFILE, &one_more) != 0) return "setrlimit";
    for (int i = 0; i < 3; ++i) {
      const int error = error_of_opening(name, File::Mode::kReadWrite);
      if (error != EMFILE) return errno_name(error);
    }
    const int again = dup(0);
    return again == next ? "" : "a descriptor leaked";
  });
}

TEST_F(FileTest, ReserveGrowsTheFileAndGivesItBlocks) {
  const File file = File::scratch(directory_.path());
  file.reserve(0, 0);
  EXPECT_EQ(file.size(), 0u);
  file.reserve(1 << 20, 3 << 20);
  EXPECT_EQ(file.size(), 4u << 20);
  EXPECT_GE(status_of(file.fd()).st_blocks * 512, 3 << 20);
  file.reserve(0, 4096);
  EXPECT_EQ(file.size(), 4u << 20);
}

TEST_F(FileTest, ReserveKeepsTheBytesThatAreThere) {
  const fs::path name = with_text("old", "twelve bytes");
  const File file = File::open(name, File::Mode::kReadWrite);
  file.reserve(0, 100000);
  char text[12];
  ASSERT_EQ(pread(file.buffered_fd(), text, 12, 0), 12);
  EXPECT_EQ(std::string(text, 12), "twelve bytes");
}

TEST_F(FileTest, ReserveRefusesRangesThatNoFileCanHave) {
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

TEST_F(FileTest, WithoutFallocateReserveSetsTheSizeAndNeverShrinks) {
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

TEST_F(FileTest, TheFileSizeLimitIsAnErrorNotTheEndOfTheProcess) {
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

TEST_F(FileTest, AFileSizeSignalThatWasPendingBeforeStaysSo) {
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

TEST_F(FileTest, AFullMemoryFileSystemLeavesTheSizeAsItWas) {
  expect_well_in_child([this]() -> std::string {
    const char* place = directory_.path().c_str();
    if (!test::own_mounts() ||
        mount("none", place, "tmpfs", 0, "size=4m") != 0) {
      return test::skip("may not mount");
    }
    return reserve_too_much(place);
  });
}

TEST_F(FileTest, AFullDiskLeavesTheSizeAsItWas) {
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
    return reserve_too_much(place);
  });
}

}  // namespace
}  // namespace torch_ext
