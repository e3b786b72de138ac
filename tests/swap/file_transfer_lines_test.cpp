// Many operations at once: their order, and what they may hold while they wait.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "support/child.h"
#include "support/file_transfer_test.h"
#include "torch_ext/base/error.h"
#include "torch_ext/swap/file_transfer.h"

namespace torch_ext {
namespace {

namespace fs = std::filesystem;
using test::AlignedBuffer;
using test::expect_well_in_child;
using test::Fault;
using test::kMiB;

int open_descriptors_in(const fs::path& directory) {
  int count = 0;
  for (const auto& link : fs::directory_iterator("/proc/self/fd")) {
    std::error_code gone;
    const fs::path target = fs::read_symlink(link.path(), gone);
    if (target.native().starts_with(directory.native() + "/")) ++count;
  }
  return count;
}

class FileTransferLinesTest : public test::FileTransferTest {
 protected:
  // Bytes 1.. of a buffer, which direct I/O cannot take, or all of it.
  static DeviceBytes bytes_of(const AlignedBuffer& memory, bool in_place) {
    return on_host(in_place ? memory.bytes()
                            : memory.bytes(1, memory.size() - 1));
  }
};

TEST_F(FileTransferLinesTest, ManyMoreFilesThanDescriptorsAreWrittenInOneGo) {
  // Those that find a descriptor at once and those that wait for one hold
  // nothing that the others need: new files and staged memory are the ones
  // that wait.
  for (const bool in_place : {false, true}) {
    FileTransfer files(options());
    AlignedBuffer memory(64 << 10);
    const DeviceBytes bytes = bytes_of(memory, in_place);
    std::vector<SwapTicket> tickets;
    for (int i = 0; i < 2000; ++i) {
      tickets.push_back(files.write(path(i), 0, bytes));
    }
    for (const SwapTicket& ticket : tickets) {
      ASSERT_TRUE(ticket.wait_for(std::chrono::minutes(1)));
      ticket.wait();
    }
    for (int i = 0; i < 2000; ++i) {
      ASSERT_EQ(fs::file_size(path(i)), bytes.size);
      fs::remove(path(i));
    }
  }
}

TEST_F(FileTransferLinesTest, OperationsThatWaitForBuffersHoldNoDescriptors) {
  AlignedBuffer memory(64 << 10);
  std::ofstream(path("old"))
      .write(reinterpret_cast<const char*>(memory.data()), 64 << 10)
      .flush();
  script_->set_plan(test::only(0, Fault::held()));
  FileTransferOptions one_buffer = scripted();
  one_buffer.host_memory = one_buffer.aio.block_size;
  FileTransfer files(one_buffer);
  std::vector<SwapTicket> tickets;
  for (int i = 0; i < 200; ++i) {
    tickets.push_back(files.write(path(i), 0, bytes_of(memory, false)));
  }
  while (script_->held() == 0) std::this_thread::yield();
  const SwapTicket other = files.write(path("old"), 0, bytes_of(memory, true));
  EXPECT_TRUE(other.wait_for(std::chrono::minutes(1)));
  EXPECT_EQ(files.stats().in_flight, 200u);
  script_->release_all();
  for (const SwapTicket& ticket : tickets) ticket.wait();
}

TEST_F(FileTransferLinesTest, OperationsOnTheSameBytesTakeEffectInCallOrder) {
  FileTransfer files(options());
  AlignedBuffer memory(256 << 10);
  AlignedBuffer b(256 << 10);
  AlignedBuffer back(256 << 10);
  for (std::uint64_t round = 0; round < 80; ++round) {
    // Memory that goes through buffers takes longer than that which does not.
    const auto a = memory.bytes(round % 2, memory.size() - 1);
    test::fill_pattern(a, round);
    test::fill_pattern(b.bytes(), round + 1000);
    files.write(path("x"), 0, on_host(a));
    const auto read_back = back.bytes(0, a.size());
    const SwapTicket read = files.read(path("x"), 0, on_host(read_back));
    files.write(path("x"), 0, on_host(b.bytes())).wait();
    read.wait();
    ASSERT_TRUE(test::holds_pattern(read_back, round));
    files.read(path("x"), 0, on_host(back.bytes())).wait();
    ASSERT_TRUE(test::holds_pattern(back.bytes(), round + 1000));
  }
}

TEST_F(FileTransferLinesTest, AnOperationWaitsForThoseOnItsBytesAndNoOthers) {
  script_->set_plan(test::only(0, Fault::held()));
  AlignedBuffer memory(64 << 10);
  AlignedBuffer back(64 << 10);
  std::ofstream(path("x")).write(
      reinterpret_cast<const char*>(memory.bytes(0, 8192).data()), 8192);
  fs::resize_file(path("x"), 1 << 20);
  fs::create_hard_link(path("x"), path("link"));
  FileTransfer files(scripted());
  test::fill_pattern(memory.bytes(), 5);
  const SwapTicket write = files.write(path("x"), 0, on_host(memory.bytes()));
  const SwapTicket same = files.read(path("x"), 0, on_host(back.bytes()));
  AlignedBuffer other(4096);
  const SwapTicket linked =
      files.read(path("link"), 60 << 10, on_host(other.bytes()));
  while (script_->held() == 0) std::this_thread::yield();
  // These do not wait.
  AlignedBuffer free(4096);
  files.read(path("x"), 64 << 10, on_host(free.bytes())).wait();
  files.write(path("y"), 0, on_host(free.bytes())).wait();
  EXPECT_FALSE(same.done());
  EXPECT_FALSE(linked.done());
  EXPECT_EQ(files.stats().in_flight, 3u);
  script_->release_all();
  same.wait();
  linked.wait();
  EXPECT_TRUE(test::holds_pattern(back.bytes(), 5));
  EXPECT_TRUE(std::ranges::equal(other.bytes(), memory.bytes(60 << 10, 4096)));
  write.wait();
}

TEST_F(FileTransferLinesTest, AFailedWriteDoesNotStopThoseBehindIt) {
  script_->set_plan(test::only(0, Fault::fail(EIO)));
  FileTransfer files(scripted());
  AlignedBuffer memory(64 << 10);
  test::fill_pattern(memory.bytes(), 2);
  const SwapTicket first = files.write(path("x"), 0, on_host(memory.bytes()));
  files.write(path("x"), 0, on_host(memory.bytes())).wait();
  EXPECT_THROW(first.wait(), IoError);
  AlignedBuffer back(64 << 10);
  files.read(path("x"), 0, on_host(back.bytes())).wait();
  EXPECT_TRUE(test::holds_pattern(back.bytes(), 2));
}

TEST_F(FileTransferLinesTest, AReadMayFollowTheWriteThatMakesItsFile) {
  FileTransfer files(options());
  AlignedBuffer memory(300'000);
  AlignedBuffer back(300'000);
  for (int i = 0; i < 50; ++i) {
    test::fill_pattern(memory.bytes(), static_cast<std::uint64_t>(i));
    files.write(path(i), 0, on_host(memory.bytes()));
    files.read(path(i), 0, on_host(back.bytes())).wait();
    ASSERT_TRUE(
        test::holds_pattern(back.bytes(), static_cast<std::uint64_t>(i)));
  }
}

TEST_F(FileTransferLinesTest, RaggedWritesCountBothDescriptorsOfAFile) {
  FileTransfer files(options());
  AlignedBuffer memory(64 << 10);
  for (int i = 0; i < 62; ++i) {
    files.write(path(i), 0, on_host(memory.bytes())).wait();
  }
  for (int i = 0; i < 62; ++i) {
    files.write(path(i), 0, on_host(memory.bytes(0, 100))).wait();
    ASSERT_LE(open_descriptors_in(dir_.path()), 64);
  }
  std::vector<SwapTicket> tickets;
  for (int i = 0; i < 62; ++i) {
    tickets.push_back(files.write(path(i), 0, on_host(memory.bytes(1, 5000))));
    ASSERT_LE(open_descriptors_in(dir_.path()), 64);
  }
  for (const SwapTicket& ticket : tickets) ticket.wait();
}

TEST_F(FileTransferLinesTest, ADescriptorLimitClosesWhatIsIdleFirst) {
  expect_well_in_child([this]() -> std::string {
    FileTransfer files(options());
    AlignedBuffer memory(64 << 10);
    files.write(path("first"), 0, on_host(memory.bytes(0, 100))).wait();
    const int next = open("/dev/null", O_RDONLY | O_CLOEXEC);
    close(next);
    rlimit limit{};
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = static_cast<rlim_t>(next + 5);
    setrlimit(RLIMIT_NOFILE, &limit);
    try {
      for (int i = 0; i < 40; ++i) {
        files.write(path(i), 0, on_host(memory.bytes(0, 100))).wait();
        files.write(path(i), 4096, on_host(memory.bytes())).wait();
      }
      std::vector<SwapTicket> tickets;
      for (int i = 0; i < 40; ++i) {
        tickets.push_back(files.write(path(i), 1, on_host(memory.bytes())));
      }
      for (const SwapTicket& ticket : tickets) ticket.wait();
    } catch (const IoError& error) {
      return error.what();
    }
    return "";
  });
}

TEST_F(FileTransferLinesTest, ADurableDescriptorStaysDurable) {
  AlignedBuffer memory(64 << 10);
  const int fd =
      open(path("x").c_str(), O_CREAT | O_WRONLY | O_DSYNC | O_CLOEXEC, 0600);
  script_->set_plan(test::only(0, Fault::held()));
  FileTransfer slow(scripted());
  const SwapTicket ticket = slow.write(fd, 0, on_host(memory.bytes()));
  while (script_->held() == 0) std::this_thread::yield();
  EXPECT_NE(fcntl(script_->log().at(0).fd, F_GETFL) & O_DSYNC, 0);
  script_->release_all();
  ticket.wait();
  close(fd);
}

}  // namespace
}  // namespace torch_ext
