#include "torch_ext/optim/snapshot_file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <system_error>

#include "support/aligned_buffer.h"
#include "support/child.h"
#include "support/pattern.h"
#include "support/temp_dir.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

TEST(SnapshotFileTest, MapsWhatWasWrittenAfterTheFileIsGone) {
  test::TempDir temp;
  test::AlignedBuffer bytes(100000);
  test::fill_pattern(bytes.bytes(), 1);
  std::shared_ptr<std::byte> memory;
  {
    SnapshotFile file(temp.path(), bytes.size());
    file.write(50000, bytes.bytes(50000, 50000));
    file.write(0, bytes.bytes(0, 50000));
    memory = file.map();
  }
  EXPECT_TRUE(test::holds_pattern({memory.get(), bytes.size()}, 1));
  EXPECT_TRUE(std::filesystem::is_empty(temp.path()));
}

TEST(SnapshotFileTest, ChangesOfTheMemoryAreSeenByNobodyElse) {
  test::TempDir temp;
  SnapshotFile file(temp.path(), 8192);
  const auto one = file.map();
  const auto other = file.map();
  one.get()[5000] = std::byte{7};
  EXPECT_EQ(other.get()[5000], std::byte{0});
}

TEST(SnapshotFileTest, AnEmptyFileHasNoMemory) {
  test::TempDir temp;
  EXPECT_EQ(SnapshotFile(temp.path(), 0).map(), nullptr);
}

TEST(SnapshotFileTest, NoSpaceIsAnErrorBeforeAnythingIsWritten) {
  EXPECT_EQ(test::in_child([]() -> std::string {
              test::TempDir temp;
              if (!test::refuse_syscall(SYS_fallocate, ENOSPC)) return "";
              try {
                SnapshotFile file(temp.path(), 8192);
              } catch (const IoError& error) {
                return error.error() == ENOSPC ? "" : error.what();
              }
              return "no error";
            }),
            "");
}

TEST(SnapshotFileTest, TheFileSizeLimitIsAnErrorNotTheEndOfTheProcess) {
  test::expect_well_in_child([]() -> std::string {
    test::TempDir temp;
    test::AlignedBuffer bytes(8192);
    SnapshotFile file(temp.path(), 4096);
    signal(SIGXFSZ, SIG_DFL);
    const rlimit limit = {4096, 4096};
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0) return "setrlimit";
    try {
      file.write(0, bytes.bytes());
      return "no error";
    } catch (const IoError& error) {
      return error.error() == EFBIG ? "" : error.what();
    }
  });
}

TEST(SnapshotFileTest, ADiskThatFillsUpIsAnErrorWithPathAndOffset) {
  EXPECT_EQ(test::in_child([]() -> std::string {
              test::TempDir temp;
              test::AlignedBuffer bytes(8192);
              SnapshotFile file(temp.path(), 8192);
              if (!test::refuse_syscall(SYS_pwrite64, ENOSPC)) return "";
              try {
                file.write(4096, bytes.bytes(0, 4096));
              } catch (const IoError& error) {
                const bool good = error.error() == ENOSPC &&
                                  error.failure().offset == 4096u &&
                                  !error.failure().path.empty();
                return good ? "" : error.what();
              }
              return "no error";
            }),
            "");
}

/// The descriptor of a file without a name, which nobody gives away.
int unnamed_descriptor(const std::filesystem::path& directory) {
  for (const auto& entry :
       std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code none;
    const std::string target =
        std::filesystem::read_symlink(entry.path(), none).string();
    if (target.starts_with(directory.string() + "/#")) {
      return open(entry.path().c_str(), O_RDWR | O_CLOEXEC);
    }
  }
  return -1;
}

TEST(SnapshotFileTest, WhatTheDriveDoesNotHoldIsAnErrorOfMap) {
  for (const std::uint64_t at : {std::uint64_t{0}, std::uint64_t{69999}}) {
    test::TempDir temp;
    test::AlignedBuffer bytes(100000);
    test::fill_pattern(bytes.bytes(), 1);
    SnapshotFile file(temp.path(), bytes.size());
    file.write(0, bytes.bytes(0, 30000));
    file.write(30000, bytes.bytes(30000, 40000));
    const int fd = unnamed_descriptor(temp.path());
    if (fd < 0) GTEST_SKIP() << "the file cannot be found";
    const std::byte other = ~bytes.bytes()[at];
    EXPECT_EQ(pwrite(fd, &other, 1, static_cast<off_t>(at)), 1);
    close(fd);
    try {
      file.map();
      ADD_FAILURE() << at << " is lost in silence";
    } catch (const IoError& error) {
      EXPECT_EQ(error.error(), EIO);
      EXPECT_EQ(error.failure().offset, at == 0 ? 0u : 30000u);
    }
  }
}

TEST(SnapshotFileTest, WhatOnlyASyncHearsOfIsAnErrorOfMap) {
  test::expect_well_in_child([]() -> std::string {
    test::TempDir temp;
    test::AlignedBuffer bytes(8192);
    SnapshotFile file(temp.path(), 8192);
    file.write(0, bytes.bytes());
    if (!test::refuse_syscall(SYS_fdatasync, ENOSPC)) {
      return test::skip("no seccomp");
    }
    try {
      file.map();
    } catch (const IoError& error) {
      return error.error() == ENOSPC ? "" : error.what();
    }
    return "no error";
  });
}

TEST(SnapshotFileTest, AThinDriveThatIsFullIsAnErrorOfMap) {
  test::expect_well_in_child([]() -> std::string {
    // A file system of 64 MiB in a file that can have 9.
    test::TempDir temp;
    const std::string image = (temp.path() / "image").string();
    const std::string place = (temp.path() / "place").string();
    const auto run = [](const std::string& command) {
      return std::system((command + " >/dev/null 2>&1").c_str()) == 0;
    };
    if (!test::own_mounts() ||
        mount("none", temp.path().c_str(), "tmpfs", 0, "size=9m") != 0 ||
        !run("truncate -s 64M " + image) ||
        !run("PATH=$PATH:/sbin:/usr/sbin mkfs.ext4 -q -m 0 -b 4096 -O "
             "^has_journal " +
             image) ||
        !std::filesystem::create_directory(place) ||
        !run("mount -o loop " + image + " " + place)) {
      return test::skip("may not mount a loop device");
    }
    std::string result = "no error";
    {
      test::AlignedBuffer bytes(1 << 20);
      test::fill_pattern(bytes.bytes(), 1);
      SnapshotFile file(place, 32 << 20);
      for (std::uint64_t i = 0; i < 32; ++i) {
        file.write(i << 20, bytes.bytes());
      }
      try {
        file.map();
      } catch (const IoError&) {
        result = "";
      }
    }
    run("umount -l " + place);
    return result;
  });
}

}  // namespace
}  // namespace torch_ext
