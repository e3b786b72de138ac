#include "torch_ext/optim/snapshot_file.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include <cerrno>
#include <csignal>
#include <filesystem>

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

}  // namespace
}  // namespace torch_ext
