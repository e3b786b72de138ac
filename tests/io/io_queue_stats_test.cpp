// The queue's counters.

#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

#include "support/aligned_buffer.h"
#include "support/faulty_engine.h"
#include "support/io_queue_test.h"
#include "torch_ext/base/error.h"
#include "torch_ext/io/io_queue.h"

namespace torch_ext {
namespace {

using test::AlignedBuffer;
using test::Fault;
using test::kBlock;

using IoQueueStatsTest = test::IoQueueTest;

TEST_F(IoQueueStatsTest, AnOperationIsQueuedThenInFlightThenGone) {
  AioConfig config = test::small_blocks();
  config.queue_depth = 4;
  script_->set_plan(test::from(0, Fault::held()));
  IoQueue io = queue(config);
  const auto file = scratch(16 * kBlock);
  AlignedBuffer memory(16 * kBlock);
  const Ticket first = io.submit(write(file, 0, memory.bytes(0, 3 * kBlock)));
  const Ticket second = io.submit(write(file, 0, memory.bytes(0, 2 * kBlock)));
  const Ticket third = io.submit(write(file, 0, memory.bytes(0, 9 * kBlock)));
  while (script_->held() < 4) std::this_thread::yield();
  IoQueueStats stats = io.stats();
  EXPECT_EQ(stats.operations_in_flight, 1u);
  EXPECT_EQ(stats.operations_queued, 2u);  // Half of the second is not taken.
  EXPECT_EQ(stats.bytes, 14 * kBlock);

  EXPECT_TRUE(io.cancel(third));
  stats = io.stats();
  EXPECT_EQ(stats.operations_in_flight, 1u);
  EXPECT_EQ(stats.operations_queued, 1u);
  EXPECT_EQ(stats.bytes, 5 * kBlock);

  script_->release_all();
  first.wait();
  second.wait();
  stats = io.stats();
  EXPECT_EQ(stats.operations_in_flight, 0u);
  EXPECT_EQ(stats.operations_queued, 0u);
  EXPECT_EQ(stats.bytes, 0u);
  EXPECT_EQ(stats.requests, 5u);
  EXPECT_EQ(stats.retries, 0u);
  EXPECT_EQ(stats.short_transfers, 0u);
}

TEST_F(IoQueueStatsTest, RetriesAndShortTransfersAreCounted) {
  script_->set_plan([](std::size_t index, const IoRequest&) {
    return index == 1   ? Fault::fail(EAGAIN)
           : index == 2 ? Fault::cut(4096)
           : index == 3 ? Fault::cut(0)
                        : Fault();
  });
  IoQueue io = queue(test::small_blocks());
  AlignedBuffer memory(4 * kBlock);
  io.submit(write(scratch(4 * kBlock), 0, memory.bytes())).wait();
  const IoQueueStats stats = io.stats();
  EXPECT_EQ(stats.requests, script_->requests());
  EXPECT_EQ(stats.requests, 7u);
  EXPECT_EQ(stats.retries, 2u);
  EXPECT_EQ(stats.short_transfers, 2u);
}

TEST_F(IoQueueStatsTest, OperationsThatFailOrAreEmptyAreCountedOnceToo) {
  script_->set_plan(test::only(0, Fault::fail(EIO)));
  IoQueue io = queue(test::small_blocks());
  const auto file = scratch(64 * kBlock);
  AlignedBuffer memory(64 * kBlock);
  EXPECT_THROW(io.submit(write(file, 0, memory.bytes())).wait(), IoError);
  io.submit(write(file, 0, {})).wait();
  io.submit({.op = IoRequest::Op::kSync, .file = file}).wait();
  const IoQueueStats stats = io.stats();
  EXPECT_EQ(stats.operations_in_flight, 0u);
  EXPECT_EQ(stats.operations_queued, 0u);
  EXPECT_EQ(stats.bytes, 0u);
}

TEST_F(IoQueueStatsTest, AfterManyOperationsOfManyThreadsNothingIsLeft) {
  constexpr std::size_t kThreads = 8;
  constexpr std::size_t kEach = 12500;
  constexpr std::size_t kOutstanding = 100;
  AioConfig config = test::small_blocks();
  config.thread_count = 2;
  IoQueue io(config, make_engine_factory("null"));
  const auto file = scratch(kBlock);
  AlignedBuffer memory(4 * kBlock);
  std::atomic<bool> over = false;
  std::atomic<std::size_t> wrong = 0;
  std::thread reader([&] {
    const std::uint64_t most = kThreads * kOutstanding;
    while (!over) {
      const IoQueueStats stats = io.stats();
      const std::uint64_t running =
          stats.operations_queued + stats.operations_in_flight;
      if (running > most || stats.bytes > most * memory.size()) ++wrong;
    }
  });
  std::vector<std::thread> callers;
  for (std::size_t caller = 0; caller < kThreads; ++caller) {
    callers.emplace_back([&, caller] {
      std::vector<Ticket> tickets;
      for (std::size_t i = 0; i < kEach; ++i) {
        IoOperation operation =
            write(file, 0, memory.bytes(0, 1 + (caller + i) % 4 * kBlock));
        operation.priority = static_cast<IoPriority>(i % 3);
        tickets.push_back(io.submit(std::move(operation)));
        if (tickets.size() < kOutstanding) continue;
        if (i % 7 == 0) io.cancel(tickets.back());
        for (const Ticket& ticket : tickets) {
          ticket.wait_for(std::chrono::minutes(1));
        }
        tickets.clear();
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  over = true;
  reader.join();
  const IoQueueStats stats = io.stats();
  EXPECT_EQ(wrong, 0u);
  EXPECT_EQ(stats.operations_queued, 0u);
  EXPECT_EQ(stats.operations_in_flight, 0u);
  EXPECT_EQ(stats.bytes, 0u);
  EXPECT_GE(stats.requests, kThreads * kEach / 2);
}

}  // namespace
}  // namespace torch_ext
