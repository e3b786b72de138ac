#include "torch_ext/store/store.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/aio_call_counter.h"
#include "support/aligned_buffer.h"
#include "support/child.h"
#include "support/faulty_engine.h"
#include "support/io_queue_test.h"
#include "support/pattern.h"
#include "support/temp_dir.h"
#include "support/uring_call_counter.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"
#include "torch_ext/io/file.h"

namespace torch_ext {
namespace {

using test::AlignedBuffer;
using test::Fault;
using test::kBlock;
using test::TempDir;

class StoreTest : public test::IoQueueTest {
 protected:
  StoreOptions options() {
    return {.directory = dir_.path(), .aio = test::small_blocks()};
  }
  StoreOptions scripted(std::string_view engine = "memory") {
    StoreOptions result = options();
    result.engine_factory = test::faulty_factory(engine, script_);
    return result;
  }
};

TEST_F(StoreTest, ExtentsOfEverySizeComeBackAsWritten) {
  Store store(options());
  std::vector<std::shared_ptr<Extent>> extents;
  const std::size_t sizes[] = {1,      511,        4095,          4096,
                               4097,   kBlock - 1, kBlock,        kBlock + 1,
                               100000, 1 << 20,    (1 << 20) + 17};
  for (const std::size_t size : sizes) {
    extents.push_back(store.allocate(size));
    EXPECT_EQ(extents.back()->size(), size);
    EXPECT_EQ(extents.back()->padded_size(), align_up(size, store.granule()));
    AlignedBuffer memory(extents.back()->padded_size());
    test::fill_pattern(memory.bytes(), size);
    store.write(extents.back(), 0, memory.bytes()).wait();
  }
  for (std::size_t i = 0; i < extents.size(); ++i) {
    AlignedBuffer memory(extents[i]->padded_size());
    store.read(extents[i], 0, memory.bytes()).wait();
    EXPECT_TRUE(test::holds_pattern(memory.bytes(), sizes[i]));
  }
}

TEST_F(StoreTest, PartsOfAnExtentAreWrittenAndReadAtBlockOffsets) {
  Store store(options());
  auto extent = store.allocate(3 * kBlock + 4096);
  AlignedBuffer memory(3 * kBlock + 4096);
  test::fill_pattern(memory.bytes(), 1);
  store.write(extent, kBlock, memory.bytes(kBlock, 2 * kBlock + 4096)).wait();
  store.write(extent, 0, memory.bytes(0, kBlock)).wait();
  AlignedBuffer back(kBlock);
  store.read(extent, 2 * kBlock, back.bytes()).wait();
  EXPECT_TRUE(test::holds_pattern(back.bytes(), 1, 2 * kBlock));
}

TEST_F(StoreTest, DroppedSpaceIsUsedAgainBeforeTheFileGrows) {
  Store store(options());
  auto first = store.allocate(20 << 20);
  auto second = store.allocate(20 << 20);
  const std::uint64_t offset = first->offset();
  const std::uint64_t size = store.stats().file_size;
  EXPECT_EQ(store.stats().allocated, 40u << 20);
  first.reset();
  EXPECT_EQ(store.stats().allocated, 20u << 20);
  EXPECT_EQ(store.allocate(20 << 20)->offset(), offset);
  EXPECT_EQ(store.stats().file_size, size);
}

TEST_F(StoreTest, TryAllocateTakesFreeSpaceAndNeverGrowsTheFile) {
  Store store(options());
  EXPECT_EQ(store.try_allocate(kBlock), nullptr);
  EXPECT_EQ(store.stats().file_size, 0u);
  EXPECT_EQ(store.stats().allocated, 0u);
  EXPECT_EQ(store.try_allocate(0)->padded_size(), 0u);

  const auto first = store.allocate(kBlock);
  const std::uint64_t size = store.stats().file_size;
  auto second = store.try_allocate(kBlock + 1);
  ASSERT_NE(second, nullptr);
  EXPECT_EQ(second->size(), kBlock + 1);
  EXPECT_EQ(store.stats().allocated,
            first->padded_size() + second->padded_size());
  EXPECT_EQ(store.try_allocate(size), nullptr);
  EXPECT_EQ(store.stats().file_size, size);

  const std::uint64_t offset = second->offset();
  AlignedBuffer memory(second->padded_size());
  store.write(second, 0, memory.bytes()).wait();
  store.read(second, 0, memory.bytes()).wait();
  second.reset();
  EXPECT_EQ(store.try_allocate(kBlock)->offset(), offset);
}

TEST_F(StoreTest, AnOperationInFlightKeepsItsExtentsSpace) {
  script_->set_plan(test::from(0, Fault::held()));
  Store store(scripted());
  AlignedBuffer memory(kBlock);
  auto extent = store.allocate(kBlock);
  const std::uint64_t offset = extent->offset();
  const Ticket ticket = store.write(std::move(extent), 0, memory.bytes());
  EXPECT_NE(store.allocate(kBlock)->offset(), offset);
  script_->release_all();
  ticket.wait();
  EXPECT_EQ(store.stats().allocated, 0u);
  EXPECT_EQ(store.allocate(kBlock)->offset(), offset);
}

TEST_F(StoreTest, ABlockThatComesBackWrongIsAnErrorUnlessVerifyIsOff) {
  for (const bool verify : {true, false}) {
    StoreOptions options = scripted("null");  // Reads bring nothing.
    options.verify = verify;
    Store store(options);
    AlignedBuffer memory(kBlock);
    test::fill_pattern(memory.bytes(), 1);
    auto extent = store.allocate(kBlock);
    store.write(extent, 0, memory.bytes()).wait();
    test::fill_pattern(memory.bytes(), 2);
    const Ticket ticket = store.read(extent, 0, memory.bytes());
    ticket.wait_for(std::chrono::hours(1));
    EXPECT_EQ(ticket.error() != nullptr, verify);
  }
}

TEST_F(StoreTest, SpaceThatTheDeviceCouldNotWriteIsNotOfferedAgain) {
  Store store(scripted());
  AlignedBuffer memory(kBlock);
  script_->set_plan(test::only(0, Fault::fail(EIO)));
  auto extent = store.allocate(kBlock);
  const std::uint64_t bad = extent->offset();
  EXPECT_THROW(store.write(extent, 0, memory.bytes()).wait(), IoError);
  extent.reset();
  EXPECT_NE(store.allocate(kBlock)->offset(), bad);
}

TEST_F(StoreTest, CountsOnlyWhatEndedWell) {
  Store store(scripted());
  AlignedBuffer memory(kBlock);
  auto extent = store.allocate(kBlock);
  store.write(extent, 0, memory.bytes()).wait();
  store.read(extent, 0, memory.bytes()).wait();
  script_->set_plan(test::from(0, Fault::fail(EIO)));
  EXPECT_THROW(store.write(extent, 0, memory.bytes()).wait(), IoError);
  const StoreStats stats = store.stats();
  EXPECT_EQ(stats.bytes_written, kBlock);
  EXPECT_EQ(stats.bytes_read, kBlock);
  EXPECT_EQ(stats.write_ops, 1u);
  EXPECT_EQ(stats.read_ops, 1u);
}

TEST_F(StoreTest, ArgumentsThatCannotWorkAreRefused) {
  Store store(options());
  Store other(options());
  AlignedBuffer memory(4 * kBlock);
  auto extent = store.allocate(2 * kBlock);
  EXPECT_THROW(store.write(nullptr, 0, memory.bytes(0, kBlock)),
               std::invalid_argument);
  EXPECT_THROW(other.write(extent, 0, memory.bytes(0, kBlock)),
               std::invalid_argument);
  EXPECT_THROW(store.write(extent, 4096, memory.bytes(0, kBlock)),
               std::invalid_argument);
  EXPECT_THROW(store.write(extent, 0, memory.bytes(0, 4096)),
               std::invalid_argument);
  EXPECT_THROW(store.write(extent, 0, memory.bytes()), std::invalid_argument);
  EXPECT_THROW(store.allocate(~std::uint64_t{0}), std::invalid_argument);
}

TEST_F(StoreTest, ABlockSizeThatFilesCannotTakeIsNamedWithTheAlignment) {
  StoreOptions bad = options();
  bad.aio.block_size = 1000;
  try {
    Store store(bad);
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find("4096"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("1000"), std::string::npos);
  }
}

TEST_F(StoreTest, AMissingDirectoryIsAnIoErrorWithItsPath) {
  StoreOptions bad = options();
  bad.directory = dir_ / "missing";
  try {
    Store store(bad);
    FAIL();
  } catch (const IoError& error) {
    EXPECT_EQ(error.error(), ENOENT);
    EXPECT_NE(error.failure().path.find("missing"), std::string::npos);
  }
}

TEST_F(StoreTest, LeavesNoNameInTheDirectory) {
  Store store(options());
  auto extent = store.allocate(kBlock);
  EXPECT_TRUE(std::filesystem::is_empty(dir_.path()));
}

TEST_F(StoreTest, AnExtentMayOutliveItsStore) {
  std::shared_ptr<Extent> extent;
  {
    Store store(options());
    extent = store.allocate(kBlock);
  }
  EXPECT_EQ(extent->size(), kBlock);
}

TEST_F(StoreTest, WhereTheGrowthIsRefusedTheFileGrowsByWhatIsMissing) {
  for (const int error : {ENOSPC, EFBIG, EDQUOT}) {
    test::expect_well_in_child([this, error]() -> std::string {
      Store store(options());
      constexpr std::uint32_t kGrowth = 16 << 20;
      if (!test::refuse_syscall(SYS_fallocate, error, 3, kGrowth)) {
        return test::skip("no seccomp");
      }
      const auto extent = store.allocate(kBlock);
      const std::uint64_t size = store.stats().file_size;
      return size == kBlock ? "" : std::to_string(size);
    });
  }
}

TEST_F(StoreTest, TheFileSizeLimitIsAnErrorAndWhatFitsIsStillGiven) {
  test::expect_well_in_child([this]() -> std::string {
    signal(SIGXFSZ, SIG_DFL);
    const rlimit limit = {2 << 20, 2 << 20};  // The head, and as much again.
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0) return "setrlimit";
    Store store(options());
    AlignedBuffer memory(kBlock);
    store.write(store.allocate(kBlock), 0, memory.bytes()).wait();
    try {
      store.allocate(2 << 20);
      return "no error";
    } catch (const IoError& error) {
      return error.error() == EFBIG ? "" : error.what();
    }
  });
}

TEST_F(StoreTest, WithoutKernelSlotsForTheQueueIoUringIsUsedWithANote) {
  if (!test::aio_calls_available()) GTEST_SKIP() << "libaio is not linked";
  if (!File::scratch(dir_.path()).direct()) GTEST_SKIP() << "no direct I/O";
  const std::string reason = engine_unavailable_reason("io_uring");
  if (!reason.empty()) GTEST_SKIP() << reason;
  const test::AioRulesInForce rules({.setup = [] { return -EAGAIN; }});
  Store store(options());
  EXPECT_EQ(store.engine(), "io_uring");
  ASSERT_EQ(store.notes().size(), 1u);
  EXPECT_TRUE(
      store.notes()[0].starts_with("I/O engine io_uring instead of libaio ("))
      << store.notes()[0];
  AlignedBuffer memory(kBlock);
  auto extent = store.allocate(kBlock);
  store.write(extent, 0, memory.bytes()).wait();
  store.read(extent, 0, memory.bytes()).wait();
}

TEST_F(StoreTest, TellsWhichEngineWasChosenButNotWhichWasAskedFor) {
  StoreOptions asked = options();
  {
    Store store(asked);
    ASSERT_FALSE(store.notes().empty());
    EXPECT_TRUE(store.notes()[0].starts_with("I/O engine " + store.engine()));
  }
  asked.engine = "threads";
  Store store(asked);
  for (const std::string& note : store.notes()) {
    EXPECT_FALSE(note.starts_with("I/O engine")) << note;
  }
}

TEST_F(StoreTest, WithoutKernelSlotsAndIoUringTheThreadsEngineIsUsed) {
  if (!test::aio_calls_available()) GTEST_SKIP() << "libaio is not linked";
  if (!File::scratch(dir_.path()).direct()) GTEST_SKIP() << "no direct I/O";
  if (!test::uring_calls_available() &&
      engine_unavailable_reason("io_uring").empty()) {
    GTEST_SKIP() << "io_uring cannot be taken away";
  }
  for (const int error : {EAGAIN, ENOMEM}) {
    StoreOptions queue = options();
    queue.aio.thread_count = 3;
    int call = 0;
    // The first asks whether there is AIO, the second makes one engine.
    const test::AioRulesInForce rules(
        {.setup = [&] { return ++call % 3 == 0 ? -error : 0; }});
    const test::UringRulesInForce no_rings({.setup = [] { return -EPERM; }});
    Store store(queue);
    EXPECT_EQ(store.engine(), "threads");
    ASSERT_EQ(store.notes().size(), 1u);
    const std::string note = store.notes()[0];
    EXPECT_TRUE(
        note.starts_with("I/O engine threads instead of libaio (io_setup: "))
        << note;
    EXPECT_NE(note.find(errno_name(error)), std::string::npos) << note;
    EXPECT_NE(note.find("; io_uring ("), std::string::npos) << note;
    AlignedBuffer memory(kBlock);
    auto extent = store.allocate(kBlock);
    store.write(extent, 0, memory.bytes()).wait();
    store.read(extent, 0, memory.bytes()).wait();

    call = 0;
    queue.engine = "libaio";
    EXPECT_THROW(Store{queue}, IoError);
    queue.engine = "io_uring";
    EXPECT_THROW(Store{queue}, IoError);
  }
}

TEST_F(StoreTest, SaysThatAFileSystemInMemorySavesNone) {
  for (const char* kind : {"tmpfs", "ramfs"}) {
    test::expect_well_in_child([this, kind]() -> std::string {
      if (!test::own_mounts() ||
          mount("none", dir_.path().c_str(), kind, 0, "") != 0) {
        return test::skip("may not mount");
      }
      const Store store(options());
      for (const std::string& note : store.notes()) {
        if (note.find("stays in host memory") != std::string::npos) return "";
      }
      return std::string("no note on ") + kind;
    });
  }
  const Store store(options());
  if (File::scratch(dir_.path()).in_memory()) GTEST_SKIP() << "a tmpfs";
  for (const std::string& note : store.notes()) {
    EXPECT_EQ(note.find("host memory"), std::string::npos) << note;
  }
}

TEST_F(StoreTest, OnFilesWithoutDirectIoTheThreadsEngineIsUsed) {
  test::expect_well_in_child([this]() -> std::string {
    if (!test::refuse_syscall(SYS_openat, EINVAL, 2, O_DIRECT)) {
      return test::skip("no seccomp");
    }
    const Store store(options());
    const std::string note = store.notes().empty() ? "" : store.notes()[0];
    return store.engine() == "threads" &&
                   note.find("direct I/O") != std::string::npos
               ? ""
               : store.engine() + ": " + note;
  });
}

TEST_F(StoreTest, ADepthThatIsTooMuchForOneEngineIsNotForAll) {
  StoreOptions deep = options();
  deep.aio.queue_depth = 65536;
  Store store(deep);
  AlignedBuffer memory(kBlock);
  auto extent = store.allocate(kBlock);
  store.write(extent, 0, memory.bytes()).wait();
}

TEST_F(StoreTest, AFullDiskRefusesTheExtentAndKeepsTheRest) {
  TempDir mount_point;
  if (mount("none", mount_point.path().c_str(), "tmpfs", 0, "size=1m") != 0) {
    GTEST_SKIP() << "mounting a tmpfs needs root";
  }
  {
    StoreOptions small = options();
    small.directory = mount_point.path();
    Store store(small);
    AlignedBuffer memory(kBlock);
    test::fill_pattern(memory.bytes(), 1);
    auto extent = store.allocate(kBlock);
    store.write(extent, 0, memory.bytes()).wait();
    try {
      store.allocate(2 << 20);
      ADD_FAILURE() << "no error";
    } catch (const IoError& error) {
      EXPECT_EQ(error.error(), ENOSPC);
      EXPECT_EQ(error.failure().length, (2u << 20));
    }
    auto another = store.allocate(kBlock);
    store.write(another, 0, memory.bytes()).wait();
    store.read(extent, 0, memory.bytes()).wait();
    EXPECT_TRUE(test::holds_pattern(memory.bytes(), 1));
  }
  umount(mount_point.path().c_str());
}

}  // namespace
}  // namespace torch_ext
