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

TEST_F(FileTest, TheErrorOfALinkNamesTheRemedyWhereThereIsOne) {
  const auto text_of = [&](const char* name) -> std::string {
    try {
      File::open(path(name), File::Mode::kWrite);
    } catch (const IoError& error) {
      return error.what();
    }
    return "no error";
  };
  const char* remedy = "os.path.realpath";
  fs::create_symlink(with_text("target", "precious"), path("link"));
  fs::create_symlink("nowhere", path("dangling"));
  fs::create_symlink("loop", path("loop"));
  EXPECT_NE(text_of("link").find(remedy), std::string::npos);
  EXPECT_NE(text_of("dangling").find(remedy), std::string::npos);
  EXPECT_EQ(text_of("loop").find(remedy), std::string::npos);
  EXPECT_NE(text_of("loop").find("circle"), std::string::npos);
  fs::create_directory_symlink(fs::path(path("link")).parent_path(),
                               path("folder"));
  EXPECT_EQ(text_of("folder/target"), "no error");
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
    if (!refuse_syscall(SYS_openat, EINVAL, 2, O_DIRECT) ||
        !refuse_syscall(SYS_fcntl, EINVAL, 2, O_DIRECT)) {
      return test::skip("no seccomp");
    }
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
    const auto limit_to = [next](int more) {
      rlimit limit;
      getrlimit(RLIMIT_NOFILE, &limit);
      limit.rlim_cur = static_cast<rlim_t>(next + more);
      return setrlimit(RLIMIT_NOFILE, &limit) == 0;
    };
    for (int i = 0; i < 3; ++i) {
      if (!limit_to(0)) return "setrlimit";
      const int error = error_of_opening(name, File::Mode::kReadWrite);
      if (error != EMFILE) return errno_name(error);
      if (!limit_to(1)) return "setrlimit";
      const File file = File::open(name, File::Mode::kReadWrite);
      if (!file.direct()) return file.buffered_reason();
      const IoFailure second = failure_of([&] { file.buffered_fd(); });
      if (second.error != EMFILE) return errno_name(second.error);
      if (file.descriptors() != 1) return "descriptors";
    }
    const int again = dup(0);
    return again == next ? "" : "a descriptor leaked";
  });
}

TEST_F(FileTest, TheBufferedDescriptorIsOpenedOnceAndOnlyWhenItIsNeeded) {
  const File file = File::open(path("x"), File::Mode::kReadWrite);
  ASSERT_TRUE(file.direct());
  EXPECT_EQ(file.descriptors(), 1);
  const int fd = file.buffered_fd();
  EXPECT_EQ(file.descriptors(), 2);
  EXPECT_EQ(file.buffered_fd(), fd);
}

TEST_F(FileTest, TheIdentityIsOfTheFileAndNotOfItsName) {
  const File file = File::open(path("x"), File::Mode::kReadWrite);
  EXPECT_EQ(File::identify(path("x")), file.identity());
  fs::rename(path("x"), path("y"));
  EXPECT_EQ(File::identify(path("y")), file.identity());
  EXPECT_EQ(File::identify(path("x")), std::nullopt);
  const File other = File::open(path("x"), File::Mode::kReadWrite);
  EXPECT_NE(other.identity(), file.identity());
  fs::create_symlink(path("y"), path("link"));
  EXPECT_NE(File::identify(path("link")), file.identity());
}

TEST_F(FileTest, ANameThatCannotBeLookedUpIsNotOneThatIsNotThere) {
  with_text("x", "");
  fs::create_symlink(path("nowhere"), path("link"));
  EXPECT_TRUE(File::exists(path("x")));
  EXPECT_TRUE(File::exists(path("link")));
  EXPECT_FALSE(File::exists(path("y")));
  EXPECT_FALSE(File::exists(path("y") / "z"));
  EXPECT_FALSE(File::exists(path("x") / "z"));
  fs::create_symlink(path("loop"), path("loop"));
  EXPECT_THROW(File::exists(path("loop") / "z"), IoError);
}

TEST_F(FileTest, AFileThatTookTheNameIsNotTakenForTheFileItself) {
  expect_well_in_child([this]() -> std::string {
    const File file = File::open(path("x"), File::Mode::kReadWrite);
    fs::rename(path("x"), path("y"));
    with_text("x", "a stranger's");
    // Only the name is left to find it by.
    if (!test::own_mounts() || mount("none", "/proc", "tmpfs", 0, "") != 0) {
      return test::skip("may not mount");
    }
    const IoFailure failure = failure_of([&] { file.buffered_fd(); });
    return failure.error == ESTALE ? "" : errno_name(failure.error);
  });
}

TEST_F(FileTest, ADescriptorOfTheCallerIsOpenedAgainAndStaysOpen) {
  const fs::path name = with_text("x", "twelve bytes");
  const int fd = ::open(name.c_str(), O_RDWR | O_APPEND);
  {
    const File file = File::open(fd);
    EXPECT_EQ(file.identity(), File::identify(name));
    EXPECT_NE(file.fd(), fd);
    const std::byte letter{'T'};
    file.write(0, {&letter, 1});
    EXPECT_EQ(file.size(), 12u);
  }
  char text[13] = {};
  EXPECT_EQ(pread(fd, text, 12, 0), 12);
  EXPECT_STREQ(text, "Twelve bytes");
  close(fd);
  EXPECT_EQ(failure_of([&] { File::open(fd); }).error, EBADF);
  const int null = ::open("/dev/null", O_RDWR);
  EXPECT_EQ(failure_of([&] { File::open(null); }).error, EINVAL);
  close(null);
}

}  // namespace
}  // namespace torch_ext
