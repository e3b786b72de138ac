// What cancel() leaves out, and what it leaves alone.

#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support/aligned_buffer.h"
#include "support/child.h"
#include "support/faulty_engine.h"
#include "support/io_queue_test.h"
#include "torch_ext/base/error.h"
#include "torch_ext/io/io_queue.h"

namespace torch_ext {
namespace {

using test::AlignedBuffer;
using test::failure_of;
using test::Fault;
using test::kBlock;

using Blocks = std::vector<std::uint64_t>;

constexpr std::size_t kBlocks = 16;

/// A queue of four slots whose requests are held until release().
class IoQueueCancelTest : public test::IoQueueTest {
 protected:
  IoQueueCancelTest() {
    script_->set_plan(test::from(0, Fault::held()));
    AioConfig config = test::small_blocks();
    config.queue_depth = 4;
    queue_.emplace(config, test::faulty_factory("null", script_));
  }
  ~IoQueueCancelTest() override { script_->release_all(); }

  IoOperation write(std::size_t first_block, std::size_t blocks) const {
    return IoQueueTest::write(
        file_, first_block * kBlock,
        memory_.bytes(first_block * kBlock, blocks * kBlock));
  }
  Ticket submit(std::size_t first_block, std::size_t blocks) {
    return queue_->submit(write(first_block, blocks));
  }

  void wait_until_held(std::size_t requests) const {
    while (script_->held() < requests) std::this_thread::yield();
  }

  /// The first blocks of the requests, in order.
  Blocks blocks() const {
    Blocks result;
    for (const IoRequest& request : script_->log()) {
      result.push_back(request.offset / kBlock);
    }
    return result;
  }

  const std::shared_ptr<File> file_ = scratch(kBlock);
  const AlignedBuffer memory_{kBlocks * kBlock};
  std::optional<IoQueue> queue_;
};

TEST_F(IoQueueCancelTest, BeforeItsFirstRequestAnOperationEndsAtOnce) {
  const Ticket busy = submit(0, 4);
  wait_until_held(4);
  int calls = 0;
  std::exception_ptr heard;
  IoOperation operation = write(8, 6);
  operation.on_done = [&](std::exception_ptr error) {
    ++calls;
    heard = std::move(error);
  };
  const Ticket ticket = queue_->submit(std::move(operation));
  EXPECT_TRUE(queue_->cancel(ticket));
  // Although the device moves nothing.
  ASSERT_TRUE(ticket.done());
  const IoFailure failure = failure_of(ticket);
  EXPECT_EQ(failure.op, "pwrite");
  EXPECT_EQ(failure.path, file_->path());
  EXPECT_EQ(failure.offset, 8 * kBlock);
  EXPECT_EQ(failure.length, 6 * kBlock);
  EXPECT_EQ(failure.error, ECANCELED);
  EXPECT_EQ(calls, 1);
  EXPECT_EQ(heard, ticket.error());

  EXPECT_FALSE(queue_->cancel(ticket));
  script_->release_all();
  busy.wait();
  EXPECT_EQ(blocks(), (Blocks{0, 1, 2, 3}));
}

TEST_F(IoQueueCancelTest, RequestsInFlightEndBeforeTheOperationDoes) {
  std::atomic<int> calls = 0;
  IoOperation operation = write(0, kBlocks);
  operation.on_done = [&](std::exception_ptr) { ++calls; };
  const Ticket ticket = queue_->submit(std::move(operation));
  wait_until_held(4);
  EXPECT_TRUE(queue_->cancel(ticket));
  EXPECT_FALSE(queue_->cancel(ticket));
  for (std::size_t request = 0; request < 3; ++request) {
    script_->release(request);
  }
  while (script_->held() > 1) std::this_thread::yield();
  EXPECT_FALSE(ticket.wait_for(std::chrono::milliseconds(20)));
  EXPECT_EQ(calls, 0);
  script_->release(3);
  EXPECT_EQ(failure_of(ticket).error, ECANCELED);
  EXPECT_EQ(calls, 1);
  EXPECT_EQ(script_->requests(), 4u);
}

TEST_F(IoQueueCancelTest, WithAllRequestsInFlightNothingIsCanceled) {
  const Ticket ticket = submit(0, 4);
  wait_until_held(4);
  EXPECT_FALSE(queue_->cancel(ticket));
  script_->release_all();
  ticket.wait();
}

TEST_F(IoQueueCancelTest, WhatHasEndedOrIsOfAnotherStaysAsItIs) {
  EXPECT_FALSE(queue_->cancel(Ticket()));
  EXPECT_FALSE(queue_->cancel(TicketSource().ticket()));
  const Ticket ticket = submit(0, 8);
  wait_until_held(4);
  IoQueue other(test::small_blocks(), make_engine_factory("null"));
  EXPECT_FALSE(other.cancel(ticket));
  script_->release_all();
  ticket.wait();
  EXPECT_FALSE(queue_->cancel(ticket));
  ticket.wait();
}

TEST_F(IoQueueCancelTest, AnOperationThatHasFailedKeepsItsError) {
  script_->set_plan([](std::size_t index, const IoRequest&) {
    return index == 0 ? Fault::fail(EIO) : Fault::held();
  });
  const Ticket ticket = submit(0, kBlocks);
  const Ticket next = submit(0, 1);
  // Only the slot of the one that has failed can be the next one's.
  while (script_->requests() < 5) std::this_thread::yield();
  EXPECT_FALSE(queue_->cancel(ticket));
  script_->release_all();
  EXPECT_EQ(failure_of(ticket).error, EIO);
  next.wait();
}

TEST_F(IoQueueCancelTest, AShortTransferIsNotContinued) {
  script_->set_plan([](std::size_t, const IoRequest&) {
    return Fault{.transfer = 4096, .hold = true};
  });
  const Ticket ticket = submit(0, kBlocks);
  wait_until_held(4);
  EXPECT_TRUE(queue_->cancel(ticket));
  script_->release_all();
  EXPECT_EQ(failure_of(ticket).error, ECANCELED);
  EXPECT_EQ(script_->requests(), 4u);
}

TEST_F(IoQueueCancelTest, OthersKeepTheirPlaces) {
  const Ticket busy = submit(0, 2);
  wait_until_held(2);
  const Ticket first = submit(8, 8);
  wait_until_held(4);
  const Ticket second = submit(1, 6);
  const Ticket third = submit(14, 1);
  const Ticket fourth = submit(15, 1);
  EXPECT_TRUE(queue_->cancel(third));
  EXPECT_TRUE(queue_->cancel(first));
  script_->release_all();
  for (const Ticket* ticket : {&busy, &second, &fourth}) ticket->wait();
  EXPECT_EQ(failure_of(first).error, ECANCELED);
  EXPECT_EQ(blocks(), (Blocks{0, 1, 8, 9, 1, 2, 3, 4, 5, 6, 15}));
}

TEST_F(IoQueueCancelTest, ACallbackMayCancelAnyOperation) {
  std::optional<Ticket> own;
  const Ticket busy = submit(0, 4);
  wait_until_held(4);
  const Ticket victim = submit(8, 8);
  bool own_result = true;
  bool other_result = false;
  IoOperation operation = write(4, 1);
  operation.on_done = [&](std::exception_ptr) {
    own_result = queue_->cancel(*own);
    other_result = queue_->cancel(victim);
  };
  own = queue_->submit(std::move(operation));
  EXPECT_TRUE(queue_->cancel(*own));
  EXPECT_FALSE(own_result);
  EXPECT_TRUE(other_result);
  EXPECT_TRUE(victim.done());
}

TEST_F(IoQueueCancelTest, AForkedChildIsRefused) {
  const Ticket ticket = submit(0, kBlocks);
  test::expect_well_in_child([&]() -> std::string {
    try {
      queue_->cancel(ticket);
      return "no error";
    } catch (const StateError&) {
      return "";
    }
  });
}

TEST_F(IoQueueCancelTest, ACanceledOperationKeepsNoFileOpen) {
  submit(0, 4);
  wait_until_held(4);
  auto file = scratch(kBlock);
  const std::weak_ptr<File> seen = file;
  const Ticket ticket =
      queue_->submit(IoQueueTest::write(std::move(file), 0, memory_.bytes()));
  EXPECT_TRUE(queue_->cancel(ticket));
  EXPECT_TRUE(seen.expired());
}

// Sixteen threads cancel what they and others submit.
TEST_F(IoQueueCancelTest, EveryOperationEndsOnceAndAsCancelSaid) {
  constexpr std::size_t kThreads = 16;
  constexpr std::size_t kRounds = 300;
  AioConfig config = test::small_blocks();
  config.queue_depth = 2;
  config.thread_count = 3;
  IoQueue queue(config, make_engine_factory("null"));
  std::mutex mutex;
  std::vector<Ticket> latest(kThreads);
  std::atomic<std::size_t> ended = 0;
  std::atomic<std::size_t> canceled = 0;
  std::atomic<std::size_t> failed = 0;
  std::atomic<std::size_t> hung = 0;
  std::vector<std::thread> threads;
  for (std::size_t thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      std::mt19937_64 random(thread);
      for (std::size_t round = 0; round < kRounds; ++round) {
        std::vector<Ticket> tickets;
        for (std::size_t i = 0; i < 4; ++i) {
          IoOperation operation = write(0, random() % (kBlocks + 1));
          operation.priority = static_cast<IoPriority>(random() % 3);
          operation.on_done = [&ended](std::exception_ptr) { ++ended; };
          tickets.push_back(queue.submit(std::move(operation)));
        }
        Ticket another;
        {
          std::lock_guard lock(mutex);
          latest[thread] = tickets[0];
          another = latest[random() % kThreads];
        }
        for (const Ticket& ticket : {tickets[0], tickets[1], another}) {
          if (queue.cancel(ticket)) ++canceled;
        }
        for (const Ticket& ticket : tickets) {
          if (!ticket.wait_for(std::chrono::minutes(1))) ++hung;
          if (ticket.error() != nullptr) ++failed;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(hung, 0u);
  EXPECT_EQ(ended, kThreads * kRounds * 4);
  EXPECT_EQ(failed, canceled);
  EXPECT_GT(canceled, 0u);
}

}  // namespace
}  // namespace torch_ext
