#include "torch_ext/io/io_queue.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <future>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support/aligned_buffer.h"
#include "support/faulty_engine.h"
#include "support/io_queue_test.h"
#include "support/pattern.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/checksum.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

using test::AlignedBuffer;
using test::failure_of;
using test::Fault;
using test::IoQueueTest;
using test::kBlock;
using test::small_blocks;

class IoQueueOnEngine : public IoQueueTest,
                        public testing::WithParamInterface<const char*> {
 protected:
  void SetUp() override {
    const std::string reason = engine_unavailable_reason(GetParam());
    if (!reason.empty()) GTEST_SKIP() << reason;
  }
};

TEST_P(IoQueueOnEngine, RandomOperationsMatchAModelInMemory) {
  auto config = small_blocks();
  config.thread_count = 2;
  config.queue_depth = 4;
  constexpr std::size_t kSize = 2 << 20;
  auto file = scratch(kSize);
  AlignedBuffer model(kSize);
  AlignedBuffer memory(kSize);
  IoQueue io(config, make_engine_factory(GetParam()));
  io.submit(write(file, 0, model.bytes())).wait();
  std::mt19937_64 random(7);
  for (int round = 0; round < 40; ++round) {
    // Disjoint slots in flight together; any offset and length inside one.
    std::vector<Ticket> tickets;
    for (std::size_t slot = 0; slot < 8; ++slot) {
      const std::size_t slot_size = kSize / 8;
      const bool aligned = random() % 2 == 0;
      const std::size_t unit = aligned ? 4096 : 1;
      const std::size_t from = random() % (slot_size / unit) * unit;
      const std::size_t count =
          (1 + random() % ((slot_size - from) / unit)) * unit;
      const std::size_t offset = slot * slot_size + from;
      auto bytes = memory.bytes(offset, count);
      if (random() % 2 == 0) {
        test::fill_pattern(bytes, random());
        std::copy(bytes.begin(), bytes.end(), model.data() + offset);
        tickets.push_back(io.submit(write(file, offset, bytes)));
      } else {
        tickets.push_back(io.submit(read(file, offset, bytes)));
      }
    }
    for (const Ticket& ticket : tickets) ticket.wait();
  }
  io.submit(read(file, 0, memory.bytes())).wait();
  EXPECT_TRUE(std::equal(model.bytes().begin(), model.bytes().end(),
                         memory.bytes().begin()));
}

TEST_P(IoQueueOnEngine, ChecksumsAreFilledByWritesAndComparedByReads) {
  auto file = scratch(1 << 20);
  AlignedBuffer memory(3 * kBlock + 4096);
  test::fill_pattern(memory.bytes(), 1);
  std::vector<std::uint64_t> sums(4);
  IoQueue io(small_blocks(), make_engine_factory(GetParam()));
  auto operation = write(file, 4096, memory.bytes());
  operation.checksums = sums;
  io.submit(operation).wait();
  EXPECT_EQ(sums[1], checksum(memory.bytes(kBlock, kBlock)));
  EXPECT_EQ(sums[3], checksum(memory.bytes(3 * kBlock, 4096)));

  operation = read(file, 4096, memory.bytes());
  operation.checksums = sums;
  io.submit(operation).wait();

  // One byte of the third block changes behind our back.
  AlignedBuffer page(4096);
  test::fill_pattern(page.bytes(), 2);
  io.submit(write(file, 4096 + 2 * kBlock, page.bytes())).wait();
  const IoFailure failure = failure_of([&] { io.submit(operation).wait(); });
  EXPECT_EQ(failure.error, EIO);
  EXPECT_EQ(failure.offset, 4096 + 2 * kBlock);
  EXPECT_EQ(failure.length, kBlock);
  EXPECT_NE(failure.detail.find("checksum"), std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(Engines, IoQueueOnEngine,
                         testing::Values("libaio", "io_uring", "threads",
                                         "memory"),
                         [](const auto& info) {
                           return std::string(info.param);
                         });

TEST_F(IoQueueTest, OneOperationIsCutIntoRequestsOfBlockSize) {
  auto file = scratch(1 << 20);
  AlignedBuffer memory(3 * kBlock + 8192);
  auto io = queue(small_blocks(), "threads");
  io.submit(write(file, 8192, memory.bytes())).wait();
  std::map<std::uint64_t, std::size_t> requests;
  for (const IoRequest& request : script_->log()) {
    requests[request.offset] = request.length;
  }
  const std::map<std::uint64_t, std::size_t> expected = {
      {8192, kBlock},
      {8192 + kBlock, kBlock},
      {8192 + 2 * kBlock, kBlock},
      {8192 + 3 * kBlock, 8192}};
  EXPECT_EQ(requests, expected);
}

TEST_F(IoQueueTest, OnlyTheEdgesOfAMisalignedOperationAreBuffered) {
  auto file = scratch(1 << 20);
  if (!file->direct()) GTEST_SKIP() << file->buffered_reason();
  AlignedBuffer memory(1 << 20);
  auto io = queue(small_blocks(), "threads");
  // The address has the offset's phase, so the middle can go direct.
  io.submit(write(file, 100, memory.bytes(100, 200000))).wait();
  std::map<std::uint64_t, int> descriptors;
  for (const IoRequest& request : script_->log()) {
    descriptors[request.offset] = request.fd;
    if (request.fd == file->fd()) {
      EXPECT_EQ(request.offset % 4096, 0u);
      EXPECT_EQ(request.length % 4096, 0u);
    }
  }
  EXPECT_EQ(descriptors.at(100), file->buffered_fd());
  EXPECT_EQ(descriptors.at(4096), file->fd());
  EXPECT_EQ(descriptors.at(align_down(200100, 4096)), file->buffered_fd());
}

TEST_F(IoQueueTest, AMisalignedAddressIsBufferedAltogether) {
  auto file = scratch(1 << 20);
  if (!file->direct()) GTEST_SKIP() << file->buffered_reason();
  AlignedBuffer memory(1 << 20);
  auto io = queue(small_blocks(), "threads");
  io.submit(write(file, 0, memory.bytes(1, 200000))).wait();
  for (const IoRequest& request : script_->log()) {
    EXPECT_EQ(request.fd, file->buffered_fd());
  }
}

TEST_F(IoQueueTest, ShortTransfersAreContinuedAtAlignedOffsets) {
  auto file = scratch(1 << 20);
  AlignedBuffer memory(2 * kBlock);
  test::fill_pattern(memory.bytes(), 3);
  for (const std::size_t cut :
       std::initializer_list<std::size_t>{1, 511, 512, 513, 4096, 65535}) {
    script_->set_plan([cut](std::size_t index, const IoRequest& request) {
      return index % 2 == 0 ? Fault::cut(std::min(cut, request.length))
                            : Fault();
    });
    auto io = queue(small_blocks());
    io.submit(write(file, 0, memory.bytes())).wait();
    AlignedBuffer back(2 * kBlock);
    io.submit(read(file, 0, back.bytes())).wait();
    EXPECT_TRUE(test::holds_pattern(back.bytes(), 3)) << "cut at " << cut;
    for (const IoRequest& request : script_->log()) {
      EXPECT_EQ(request.offset % file->offset_alignment(), 0u);
    }
  }
}

TEST_F(IoQueueTest, TransientErrorsAreTriedAgain) {
  auto file = scratch(1 << 20);
  AlignedBuffer memory(4 * kBlock);
  test::fill_pattern(memory.bytes(), 4);
  for (const int error : {EINTR, EAGAIN, ENOMEM, ECANCELED}) {
    script_->set_plan([error](std::size_t index, const IoRequest&) {
      return index % 3 == 0 ? Fault::fail(error) : Fault();
    });
    auto io = queue(small_blocks());
    io.submit(write(file, 0, memory.bytes())).wait();
  }
}

TEST_F(IoQueueTest, RefusedSubmitsAreTriedAgain) {
  auto file = scratch(1 << 20);
  AlignedBuffer memory(8 * kBlock);
  script_->set_plan(
      [](std::size_t, const IoRequest&) { return Fault::refuse(2); });
  auto io = queue(small_blocks());
  io.submit(write(file, 0, memory.bytes())).wait();
  EXPECT_EQ(script_->requests(), 8u);
}

TEST_F(IoQueueTest, AnErrorCarriesOperationPathOffsetLengthAndErrno) {
  auto file = scratch(1 << 20);
  AlignedBuffer memory(4 * kBlock);
  script_->set_plan(test::only(2, Fault::fail(ENOSPC)));
  auto config = small_blocks();
  config.single_submit = true;
  auto io = queue(config);
  const IoFailure failure =
      failure_of([&] { io.submit(write(file, 0, memory.bytes())).wait(); });
  EXPECT_EQ(failure.op, "pwrite");
  EXPECT_EQ(failure.path, file->path());
  EXPECT_EQ(failure.offset, 2 * kBlock);
  EXPECT_EQ(failure.length, kBlock);
  EXPECT_EQ(failure.error, ENOSPC);
}

TEST_F(IoQueueTest, AnErrorIsReportedAfterAllRequestsHaveEndedAndStopsTheRest) {
  auto config = small_blocks();
  config.queue_depth = 4;
  auto file = scratch(4 << 20);
  AlignedBuffer memory(64 * kBlock);
  script_->set_plan([](std::size_t index, const IoRequest&) {
    return index == 0 ? Fault::fail(EIO) : Fault::held();
  });
  auto io = queue(config);
  std::atomic<int> calls = 0;
  auto operation = write(file, 0, memory.bytes());
  operation.on_done = [&calls](std::exception_ptr error) {
    calls += error != nullptr ? 1 : 100;
  };
  const Ticket ticket = io.submit(operation);
  while (script_->held() < 3) std::this_thread::yield();
  EXPECT_FALSE(ticket.wait_for(std::chrono::milliseconds(20)));
  script_->release_all();
  EXPECT_THROW(ticket.wait(), IoError);
  EXPECT_EQ(calls, 1);
  EXPECT_LT(script_->requests(), 16u);
}

TEST_F(IoQueueTest, TheFileIsLetGoOfBeforeTheEndIsTold) {
  auto io = queue(small_blocks());
  auto file = scratch(1 << 20);
  AlignedBuffer memory(4 * kBlock);
  std::atomic<long> users = -1;
  auto operation = write(file, 0, memory.bytes());
  operation.on_done = [&](std::exception_ptr) { users = file.use_count(); };
  io.submit(std::exchange(operation, {})).wait();
  EXPECT_EQ(users, 1);
}

TEST_F(IoQueueTest, OtherOperationsLiveOnWhenOneFails) {
  auto file = scratch(1 << 20);
  AlignedBuffer memory(8 * kBlock);
  script_->set_plan([](std::size_t, const IoRequest& request) {
    return request.offset == 3 * kBlock ? Fault::fail(EIO) : Fault();
  });
  auto io = queue(small_blocks());
  std::vector<Ticket> tickets;
  for (std::size_t i = 0; i < 8; ++i) {
    tickets.push_back(
        io.submit(write(file, i * kBlock, memory.bytes(i * kBlock, kBlock))));
  }
  for (std::size_t i = 0; i < 8; ++i) {
    tickets[i].wait_for(std::chrono::hours(1));
    EXPECT_EQ(tickets[i].error() != nullptr, i == 3);
  }
}

TEST_F(IoQueueTest, AReadBeyondTheEndOfTheFileIsAnErrorThatSaysWhereItEnds) {
  const auto path = dir_ / "short";
  auto file = std::make_shared<File>(File::open(path, File::Mode::kReadWrite));
  AlignedBuffer memory(4 * kBlock);
  for (const char* engine : {"threads", "libaio"}) {
    IoQueue io(small_blocks(), make_engine_factory(engine));
    io.submit(write(file, 0, memory.bytes(0, kBlock + 1000))).wait();
    const IoFailure failure =
        failure_of([&] { io.submit(read(file, 0, memory.bytes())).wait(); });
    EXPECT_EQ(failure.op, "pread");
    EXPECT_EQ(failure.error, EIO);
    EXPECT_NE(failure.detail.find("ends at byte 66536"), std::string::npos)
        << failure.detail;
    io.submit(read(file, 0, memory.bytes(0, kBlock + 1000))).wait();
  }
}

TEST_F(IoQueueTest, ADeviceThatMovesNothingIsAnErrorNotAHang) {
  auto file = scratch(1 << 20);
  AlignedBuffer memory(kBlock);
  script_->set_plan(test::from(0, Fault::cut(0)));
  auto io = queue(small_blocks());
  EXPECT_EQ(failure_of([&] {
              io.submit(write(file, 0, memory.bytes())).wait();
            }).error,
            EIO);
}

TEST_F(IoQueueTest, AnEmptyOperationEndsWell) {
  auto io = queue(small_blocks(), "threads");
  io.submit(write(scratch(4096), 0, {})).wait();
  EXPECT_EQ(script_->requests(), 0u);
}

TEST_F(IoQueueTest, SyncReachesTheEngine) {
  auto io = queue(small_blocks(), "threads");
  io.submit({.op = IoRequest::Op::kSync, .file = scratch(4096)}).wait();
  EXPECT_EQ(script_->log().at(0).op, IoRequest::Op::kSync);
}

TEST_F(IoQueueTest, BadOperationsAreRefusedAtOnce) {
  auto io = queue(small_blocks(), "threads");
  auto file = scratch(4096);
  AlignedBuffer memory(8192);
  EXPECT_THROW(io.submit(write(nullptr, 0, memory.bytes())),
               std::invalid_argument);
  EXPECT_THROW(io.submit(write(file, ~std::uint64_t{0}, memory.bytes())),
               std::invalid_argument);
  std::vector<std::uint64_t> two(2);
  auto operation = write(file, 0, memory.bytes());
  operation.checksums = two;
  EXPECT_THROW(io.submit(operation), std::invalid_argument);
  EXPECT_EQ(script_->requests(), 0u);
}

TEST_F(IoQueueTest, BadConfigurationIsRefused) {
  AioConfig config;
  config.queue_depth = 0;
  EXPECT_THROW(queue(config), std::invalid_argument);
}

TEST_F(IoQueueTest, DestructionWaitsForWhatWasSubmitted) {
  auto file = scratch(4 << 20);
  AlignedBuffer memory(32 * kBlock);
  test::fill_pattern(memory.bytes(), 5);
  std::vector<Ticket> tickets;
  {
    IoQueue io(small_blocks(), make_engine_factory("libaio"));
    for (std::size_t i = 0; i < 32; ++i) {
      tickets.push_back(
          io.submit(write(file, i * kBlock, memory.bytes(i * kBlock, kBlock))));
    }
  }
  for (const Ticket& ticket : tickets) EXPECT_TRUE(ticket.done());
  AlignedBuffer back(memory.size());
  ASSERT_EQ(pread(file->fd(), back.data(), back.size(), 0),
            static_cast<ssize_t>(back.size()));
  EXPECT_TRUE(test::holds_pattern(back.bytes(), 5));
}

TEST_F(IoQueueTest, ManyThreadsShareOneQueue) {
  auto config = small_blocks();
  config.thread_count = 3;
  auto file = scratch(16 << 20);
  IoQueue io(config, make_engine_factory("libaio"));
  std::vector<std::thread> callers;
  std::atomic<int> wrong = 0;
  for (std::size_t caller = 0; caller < 8; ++caller) {
    callers.emplace_back([&, caller] {
      AlignedBuffer memory(kBlock);
      for (std::size_t i = 0; i < 30; ++i) {
        const std::uint64_t offset = (caller * 30 + i) * kBlock;
        test::fill_pattern(memory.bytes(), caller, i);
        io.submit(write(file, offset, memory.bytes())).wait();
        test::fill_pattern(memory.bytes(), 99);
        io.submit(read(file, offset, memory.bytes())).wait();
        if (!test::holds_pattern(memory.bytes(), caller, i)) ++wrong;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong, 0);
}

TEST_F(IoQueueTest, AForkedChildIsRefusedAndMayExit) {
  auto file = scratch(1 << 20);
  AlignedBuffer memory(kBlock);
  auto io =
      std::make_unique<IoQueue>(small_blocks(), make_engine_factory("libaio"));
  const pid_t child = fork();
  if (child == 0) {
    int result = 1;
    try {
      io->submit(write(file, 0, memory.bytes()));
    } catch (const StateError& error) {
      const std::string text = error.what();
      result = text.find(std::to_string(getppid())) == std::string::npos;
    }
    io.reset();
    _exit(result);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  io->submit(write(file, 0, memory.bytes())).wait();
}

TEST_F(IoQueueTest, AFactoryThatFailsHalfWayLeavesNoThread) {
  AioConfig config;
  config.thread_count = 3;
  int made = 0;
  const auto factory = [&made](int depth) {
    if (++made == 3) throw IoError({.op = "io_setup", .error = EAGAIN});
    return make_engine_factory("memory")(depth);
  };
  EXPECT_EQ(failure_of([&] { IoQueue(config, factory); }).error, EAGAIN);
}

}  // namespace
}  // namespace torch_ext
