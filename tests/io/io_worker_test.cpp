// What an I/O thread does when the kernel says "not now", or disowns its
// engine.

#include "io/io_worker.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <limits>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "support/aio_call_counter.h"
#include "support/aligned_buffer.h"
#include "support/faulty_engine.h"
#include "support/io_queue_test.h"
#include "support/pattern.h"
#include "torch_ext/base/error.h"
#include "torch_ext/io/io_queue.h"

namespace torch_ext {
namespace {

using namespace std::chrono_literals;
using test::AlignedBuffer;
using test::failure_of;
using test::Fault;
using test::FaultScript;
using test::kBlock;

constexpr std::size_t kForEver = std::numeric_limits<std::size_t>::max();

class IoWorkerTest : public test::IoQueueTest {
 protected:
  static AioConfig config() { return test::small_blocks(); }

  IoOperation write(std::size_t first_block, std::size_t blocks) {
    return IoQueueTest::write(
        file_, first_block * kBlock,
        memory_.bytes(first_block * kBlock, blocks * kBlock));
  }

  bool file_holds_pattern(std::uint64_t seed) {
    AlignedBuffer back(memory_.size());
    return pread(file_->buffered_fd(), back.data(), back.size(), 0) ==
               static_cast<ssize_t>(back.size()) &&
           test::holds_pattern(back.bytes(), seed);
  }

  static constexpr std::size_t kBlocks = 64;

  const std::shared_ptr<File> file_ = scratch(kBlocks * kBlock);
  AlignedBuffer memory_{kBlocks * kBlock};
};

/// A worker with as much patience as a test has.
class PatientWorker {
 public:
  PatientWorker(const AioConfig& config, std::shared_ptr<FaultScript> script,
                std::chrono::nanoseconds patience)
      : block_size_(config.block_size),
        backlog_(static_cast<std::size_t>(config.queue_depth)),
        worker_(backlog_, config,
                test::faulty_factory("memory", script)(config.queue_depth),
                patience) {
    worker_.start();
  }
  ~PatientWorker() {
    backlog_.close();
    worker_.join();
  }

  Ticket submit(IoOperation operation) {
    const auto started =
        std::make_shared<RunningOperation>(std::move(operation), block_size_);
    backlog_.push(started);
    last_ = started;
    return started->ticket();
  }
  bool cancel_last() { return backlog_.cancel(*last_); }

 private:
  const std::uint64_t block_size_;
  std::shared_ptr<RunningOperation> last_;
  IoBacklog backlog_;
  IoWorker worker_;
};

/// Ends requests as soon as it is asked, as many as are wanted, and keeps with
/// what it was asked while all its slots were in flight.
class AskedEngine final : public IoEngine {
 public:
  struct Question {
    std::size_t at_least;
    std::chrono::nanoseconds timeout;
  };

  AskedEngine(std::size_t depth, std::vector<Question>& questions)
      : depth_(depth), questions_(questions) {}

  std::string_view name() const noexcept override { return "asked"; }
  std::size_t depth() const noexcept override { return depth_; }
  std::size_t submit(std::span<const IoRequest> batch) override {
    in_flight_.insert(in_flight_.end(), batch.begin(), batch.end());
    return batch.size();
  }
  std::size_t poll(std::span<IoCompletion> out, std::size_t at_least,
                   std::chrono::nanoseconds timeout) override {
    if (in_flight_.size() == depth_) questions_.push_back({at_least, timeout});
    const std::size_t count = std::min(at_least, in_flight_.size());
    for (std::size_t i = 0; i < count; ++i) {
      out[i] = {in_flight_[i].cookie,
                static_cast<std::int64_t>(in_flight_[i].length)};
    }
    in_flight_.erase(in_flight_.begin(),
                     in_flight_.begin() + static_cast<std::ptrdiff_t>(count));
    return count;
  }
  void wake() noexcept override {}

 private:
  const std::size_t depth_;
  std::vector<Question>& questions_;
  std::vector<IoRequest> in_flight_;
};

/// The questions that one operation of kOfThem blocks of that size asks.
std::vector<AskedEngine::Question> questions(std::shared_ptr<File> file,
                                             std::size_t block,
                                             bool overlap_events) {
  constexpr std::size_t kOfThem = 64;
  AlignedBuffer memory(kOfThem * block);
  AioConfig config;
  config.block_size = block;
  config.queue_depth = 32;
  config.overlap_events = overlap_events;
  std::vector<AskedEngine::Question> questions;
  IoQueue io(config, [&](int depth) {
    return std::make_unique<AskedEngine>(static_cast<std::size_t>(depth),
                                         questions);
  });
  io.submit({.op = IoRequest::Op::kWrite,
             .file = std::move(file),
             .bytes = memory.bytes()})
      .wait();
  return questions;
}

TEST_F(IoWorkerTest, SmallPiecesEndTogetherWhileAllSlotsAreInFlight) {
  struct Case {
    std::size_t block;
    std::size_t at_least;
  };
  constexpr std::size_t kKiB = 1024;
  // A quarter of the slots, and half a MiB.
  for (const Case& each : {Case{4 * kKiB, 8}, Case{64 * kKiB, 8},
                           Case{128 * kKiB, 4}, Case{1024 * kKiB, 1}}) {
    const auto asked = questions(file_, each.block, true);
    ASSERT_FALSE(asked.empty());
    for (const auto& question : asked) {
      EXPECT_EQ(question.at_least, each.at_least) << each.block;
      // A device that hangs on one must not hide that others have ended.
      EXPECT_EQ(question.timeout <= 1ms, each.at_least > 1);
    }
    for (const auto& question : questions(file_, each.block, false)) {
      EXPECT_EQ(question.at_least, 32u);
    }
  }
}

// Checksums and callbacks take time in which the device would be idle.
TEST_F(IoWorkerTest, TheNextPieceIsSubmittedBeforeTheOneThatMovedEnds) {
  script_->set_plan(test::only(0, Fault::held()));
  AioConfig config = IoWorkerTest::config();
  config.queue_depth = 1;
  IoQueue io = queue(config);
  std::size_t submitted_at_end = 0;
  IoOperation first = write(0, 1);
  first.on_done = [&](std::exception_ptr) {
    submitted_at_end = script_->requests();
  };
  const Ticket end_of_first = io.submit(std::move(first));
  const Ticket end_of_second = io.submit(write(1, 1));
  script_->release_all();
  end_of_first.wait();
  end_of_second.wait();
  EXPECT_EQ(submitted_at_end, 2u);
}

TEST_F(IoWorkerTest, OutOfPatienceAllPiecesOfTheOperationStopAtOnce) {
  for (const int error : {EINTR, EAGAIN, ENOMEM, ECANCELED}) {
    script_ = std::make_shared<FaultScript>(test::from(0, Fault::fail(error)));
    PatientWorker worker(config(), script_, 50ms);
    const IoFailure failure = failure_of(worker.submit(write(0, kBlocks)));
    EXPECT_EQ(failure.op, "pwrite");
    EXPECT_EQ(failure.error, error);
    // 50 ms have room for 12 attempts. One piece's patience is all there is.
    EXPECT_LE(script_->requests(), 8u * 15);
    std::set<std::uint64_t> offsets;
    for (const IoRequest& request : script_->log()) {
      offsets.insert(request.offset);
    }
    EXPECT_EQ(offsets.size(), 8u);
  }
}

TEST_F(IoWorkerTest, APieceIsNotTriedAgainForAnOperationThatHasFailed) {
  script_->set_plan([](std::size_t index, const IoRequest& request) {
    if (request.offset > 0) return Fault::fail(EAGAIN);
    return index < 20 ? Fault::fail(EINTR) : Fault::fail(EIO);
  });
  PatientWorker worker(config(), script_, 1h);
  EXPECT_EQ(failure_of(worker.submit(write(0, kBlocks))).error, EIO);
  script_->set_plan(nullptr);  // Lets a worker that still tries end.
}

TEST_F(IoWorkerTest, APieceIsNotTriedAgainForAnOperationThatIsCanceled) {
  script_->set_plan(test::from(0, Fault::fail(EAGAIN)));
  PatientWorker worker(config(), script_, 1h);
  const Ticket ticket = worker.submit(write(0, kBlocks));
  while (script_->requests() < 2 * 8) std::this_thread::yield();
  EXPECT_TRUE(worker.cancel_last());
  EXPECT_EQ(failure_of(ticket).error, ECANCELED);
  script_->set_plan(nullptr);  // Lets a worker that still tries end.
}

TEST_F(IoWorkerTest, OutOfPatienceWithRefusedSubmitsAllOperationsStop) {
  script_->set_plan(test::from(0, Fault::refuse(kForEver)));
  PatientWorker worker(config(), script_, 50ms);
  std::vector<Ticket> tickets;
  for (std::size_t i = 0; i < 4; ++i) {
    tickets.push_back(worker.submit(write(i, 1)));
  }
  for (const Ticket& ticket : tickets) {
    const IoFailure failure = failure_of(ticket);
    EXPECT_EQ(failure.error, EAGAIN);
    EXPECT_EQ(failure.detail, "the kernel took no request for seconds");
  }
  EXPECT_EQ(script_->requests(), 0u);
}

TEST_F(IoWorkerTest, OthersGoOnWhilePiecesWaitToBeTriedAgain) {
  script_->set_plan([](std::size_t, const IoRequest& request) {
    return request.offset < 7 * kBlock ? Fault::fail(EAGAIN) : Fault();
  });
  PatientWorker worker(config(), script_, 1h);
  const Ticket stuck = worker.submit(write(0, 7));
  while (script_->requests() < 7 * 8) std::this_thread::yield();
  // One slot is left for 57 * 4 pieces. With a pause in each of their turns
  // they would take minutes.
  std::vector<Ticket> others;
  for (int i = 0; i < 4; ++i) {
    others.push_back(worker.submit(write(7, kBlocks - 7)));
  }
  EXPECT_TRUE(others.back().wait_for(60s));
  EXPECT_FALSE(stuck.done());
  script_->set_plan(nullptr);
  stuck.wait();
}

TEST_F(IoWorkerTest, RefusedSubmitsLeaveShortTransfersTheirTries) {
  script_->set_plan([](std::size_t index, const IoRequest&) {
    return index == 0 ? Fault{.transfer = 100, .refusals = 12} : Fault();
  });
  PatientWorker worker(config(), script_, 1h);
  worker.submit(write(0, 1)).wait();
  EXPECT_EQ(script_->requests(), 2u);
}

TEST_F(IoWorkerTest, AFailedSyncIsFinal) {
  for (const int error : {EIO, EAGAIN, ENOMEM, EINTR}) {
    script_ = std::make_shared<FaultScript>(test::only(0, Fault::fail(error)));
    auto io = queue(config());
    const IoFailure failure =
        failure_of(io.submit({.op = IoRequest::Op::kSync, .file = file_}));
    EXPECT_EQ(failure.op, "fsync");
    EXPECT_EQ(failure.error, error);
    EXPECT_EQ(script_->requests(), 1u);
  }
}

TEST_F(IoWorkerTest, AnEngineThatFailsForAWhileLosesNothing) {
  for (const bool overlap_events : {true, false}) {
    test::fill_pattern(memory_.bytes(), overlap_events);
    AioConfig aio = config();
    aio.overlap_events = overlap_events;
    IoQueue io(aio, test::faulty_factory("threads", script_));
    for (std::size_t i = 0; i < kBlocks; ++i) {
      if (i % 8 == 0) script_->fail_polls(1 + i % 3);
      io.submit(write(i, 1)).wait();
    }
    EXPECT_TRUE(file_holds_pattern(overlap_events));
  }
}

TEST_F(IoWorkerTest, ALostEngineEndsOperationsWithItsErrorNowAndLater) {
  script_->set_plan(test::from(0, Fault::held()));
  std::optional<IoQueue> io(std::in_place, config(),
                            test::faulty_factory("memory", script_));
  std::size_t engines_at_the_end = 99;
  IoOperation operation = write(0, 8);
  operation.on_done = [&](std::exception_ptr) {
    engines_at_the_end = script_->engines();
  };
  script_->fail_polls(kForEver);
  const Ticket first = io->submit(operation);
  while (script_->held() < 8) std::this_thread::yield();
  const Ticket second = io->submit(write(0, 1));
  script_->release_all();

  const IoFailure failure = failure_of(first);
  EXPECT_EQ(failure.op, "pwrite");
  EXPECT_EQ(failure.path, file_->path());
  EXPECT_EQ(failure.error, EINVAL);
  EXPECT_EQ(failure.detail,
            "the I/O engine is lost: io_getevents: Invalid argument (EINVAL)");
  // Until its engine was gone, the kernel could write to the memory.
  EXPECT_EQ(engines_at_the_end, 0u);
  EXPECT_EQ(failure_of(second).error, EINVAL);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(failure_of(io->submit(write(0, kBlocks))).error, EINVAL);
  }
  EXPECT_EQ(script_->requests(), 8u);
  io.reset();
}

TEST_F(IoWorkerTest, ALostEngineKeepsMemoryUntilTheKernelHasDoneWithIt) {
  script_->set_plan(test::from(0, Fault::held()));
  script_->fail_polls(kForEver);
  auto io = queue(config());
  const Ticket ticket = io.submit(write(0, 8));
  EXPECT_FALSE(ticket.wait_for(2s));
  script_->release_all();
  EXPECT_EQ(failure_of(ticket).error, EINVAL);
}

TEST_F(IoWorkerTest, TheKernelMayDisownAnAioContextOnceOrForGood) {
  if (!test::aio_calls_available()) GTEST_SKIP() << "libaio is not linked";
  test::fill_pattern(memory_.bytes(), 5);
  IoQueue io(config(), make_engine_factory("libaio"));
  {
    int call = 0;
    const test::AioRulesInForce sometimes(
        {.getevents = [&] { return ++call % 3 == 1 ? -EINVAL : 0; }});
    ASSERT_TRUE(io.submit(write(0, kBlocks)).wait_for(60s));
    EXPECT_TRUE(file_holds_pattern(5));
  }
  const test::AioRulesInForce never({.getevents = [] { return -EINVAL; }});
  EXPECT_EQ(failure_of(io.submit(write(0, kBlocks))).error, EINVAL);
  EXPECT_EQ(failure_of(io.submit(write(0, 1))).error, EINVAL);
}

}  // namespace
}  // namespace torch_ext
