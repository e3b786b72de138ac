// Which operation has the next request.

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "support/faulty_engine.h"
#include "support/io_queue_test.h"
#include "torch_ext/io/io_queue.h"

namespace torch_ext {
namespace {

using test::Fault;

constexpr std::size_t kBlock = 8 << 20;  // A turn is four.
constexpr std::size_t kBlocks = 64;

constexpr auto kNow = IoPriority::kNow;
constexpr auto kPrefetch = IoPriority::kPrefetch;
constexpr auto kWriteBack = IoPriority::kWriteBack;

std::string repeat(std::size_t times, const std::string& text) {
  std::string all;
  for (std::size_t i = 0; i < times; ++i) all += text;
  return all;
}

/// Addresses that nothing may touch; the null engine does not.
class Untouchable {
 public:
  Untouchable() { EXPECT_NE(memory_, MAP_FAILED); }
  ~Untouchable() { munmap(memory_, kBlocks * kBlock); }
  Untouchable(const Untouchable&) = delete;
  Untouchable& operator=(const Untouchable&) = delete;

  std::span<std::byte> blocks(std::size_t count) const {
    return {static_cast<std::byte*>(memory_), count * kBlock};
  }

 private:
  void* const memory_ =
      mmap(nullptr, kBlocks* kBlock, PROT_NONE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
};

/// An engine that holds its first requests until the test has submitted all:
/// then what is requested when depends on the queue's rules alone.
class IoQueueOrderTest : public test::IoQueueTest {
 protected:
  void start(int queue_depth, int thread_count = 1) {
    AioConfig config;
    config.block_size = kBlock;
    config.queue_depth = queue_depth;
    config.thread_count = thread_count;
    script_->set_plan(test::from(0, Fault::held()));
    queue_ = std::make_unique<IoQueue>(config,
                                       test::faulty_factory("null", script_));
  }
  ~IoQueueOrderTest() override { script_->release_all(); }

  /// The name is found again in names().
  void submit(std::uint64_t name, std::size_t blocks,
              IoPriority priority = kNow, std::uint64_t caller = 0) {
    IoOperation operation = write(file_, name << 32, memory_.blocks(blocks));
    operation.priority = priority;
    operation.caller = caller;
    tickets_.push_back(queue_->submit(operation));
  }

  /// So many operations of one block.
  void submit_each(std::size_t count, std::uint64_t name,
                   IoPriority priority = kNow, std::uint64_t caller = 0) {
    for (std::size_t i = 0; i < count; ++i) submit(name, 1, priority, caller);
  }

  /// A caller whose first turn comes right after that of the last such one.
  template <typename Call>
  static void as_another_caller(Call call) {
    std::thread(call).join();
  }

  /// A caller has so many slots until the test has submitted the rest.
  void start_with_slots_taken(int queue_depth, std::size_t slots) {
    start(queue_depth);
    as_another_caller([&] { submit('x', slots); });
    wait_until_held(slots);
  }
  void start_with_all_slots_taken(int queue_depth) {
    start_with_slots_taken(queue_depth, static_cast<std::size_t>(queue_depth));
  }

  /// Cancels the operation with that place in the order of submission.
  void cancel(std::size_t operation) {
    EXPECT_TRUE(queue_->cancel(tickets_.at(operation)));
    tickets_.erase(tickets_.begin() + static_cast<std::ptrdiff_t>(operation));
  }

  void release_and_wait_for_next(std::size_t request) {
    script_->release(request);
    while (script_->requests() < request + 2) std::this_thread::yield();
  }

  void wait_until_held(std::size_t requests) const {
    while (script_->held() < requests) std::this_thread::yield();
  }

  /// The names of the operations whose requests were made, in order.
  std::string names() const {
    std::string result;
    for (const IoRequest& request : script_->log()) {
      result += static_cast<char>(request.offset >> 32);
    }
    return result;
  }

  std::string names_after_all() {
    script_->release_all();
    for (const Ticket& ticket : tickets_) ticket.wait();
    return names();
  }

  const std::shared_ptr<File> file_ = scratch(4096);
  const Untouchable memory_;
  std::unique_ptr<IoQueue> queue_;
  std::vector<Ticket> tickets_;
};

TEST_F(IoQueueOrderTest, AnUrgentOperationOvertakesAllThatIsNotInFlight) {
  start(2);
  submit('w', 8, kWriteBack);
  wait_until_held(2);
  submit('p', 8, kPrefetch);
  submit('n', 8);
  EXPECT_EQ(names_after_all(),
            "ww" + repeat(8, "n") + repeat(7, "p") + "wp" + repeat(5, "w"));
}

TEST_F(IoQueueOrderTest, APromotedOperationGoesWithThoseOfItsNewPriority) {
  start(2);
  submit('x', 2);
  wait_until_held(2);
  submit('p', 3, kPrefetch);
  submit('q', 3, kPrefetch);
  submit('n', 2);
  EXPECT_TRUE(queue_->promote(tickets_.at(2), kNow));
  EXPECT_EQ(names_after_all(), "xxnnqqqppp");
  EXPECT_FALSE(queue_->promote(tickets_.at(2), kNow));
}

TEST_F(IoQueueOrderTest, WhatIsLeftOfAnOperationCanBePromoted) {
  start(2);
  submit('p', 4, kPrefetch);
  wait_until_held(2);
  submit('q', 2, kPrefetch);
  submit('n', 2);
  EXPECT_TRUE(queue_->promote(tickets_.at(0), kNow));
  EXPECT_EQ(names_after_all(), "ppnnppqq");
}

TEST_F(IoQueueOrderTest, NothingIsLeftToPromoteOfWhatIsInFlight) {
  start(2);
  submit('p', 2, kPrefetch);
  wait_until_held(2);
  EXPECT_FALSE(queue_->promote(tickets_.at(0), kNow));
  IoQueue other({}, test::faulty_factory("null", script_));
  EXPECT_FALSE(other.promote(tickets_.at(0), kNow));
  EXPECT_FALSE(queue_->promote(Ticket(), kNow));
}

TEST_F(IoQueueOrderTest, EachSlotThatBecomesFreeIsForTheMostUrgent) {
  start(2, 2);
  submit('p', 64, kPrefetch);
  wait_until_held(4);
  submit('n', 4);
  for (std::size_t i = 0; i < 4; ++i) {
    script_->release(i);
    while (script_->requests() < 5 + i) std::this_thread::yield();
  }
  EXPECT_EQ(names(), "ppppnnnn");
}

TEST_F(IoQueueOrderTest, LessUrgentOperationsThatWaitGetOneRequestOfSixteen) {
  start(1);
  submit('x', 1);
  wait_until_held(1);
  submit('w', 4, kWriteBack);
  submit('p', 4, kPrefetch);
  submit('n', 43);
  EXPECT_EQ(names_after_all(), "x" + repeat(15, "n") + "pw" + repeat(14, "n") +
                                   "pw" + repeat(14, "n") + "pw" + "pw");
}

TEST_F(IoQueueOrderTest, AWriteBackGetsItsShareOfPrefetchesToo) {
  start(1);
  submit('x', 1);
  wait_until_held(1);
  submit('w', 2, kWriteBack);
  submit('p', 31, kPrefetch);
  EXPECT_EQ(names_after_all(), "x" + repeat(2, repeat(15, "p") + "w") + "p");
}

TEST_F(IoQueueOrderTest, OperationsNoLongerThanATurnKeepTheirOrder) {
  start(4);
  submit('x', 4);
  wait_until_held(4);
  submit('a', 4);
  submit('b', 1);
  submit('c', 3);
  submit('d', 2);
  EXPECT_EQ(names_after_all(), "xxxxaaaabcccdd");
}

TEST_F(IoQueueOrderTest, AHugeOperationHoldsUpSmallOnesForOneTurn) {
  for (const IoPriority priority : {kNow, kPrefetch, kWriteBack}) {
    script_ = std::make_shared<test::FaultScript>();
    start(4);
    submit('x', 4, priority);
    wait_until_held(4);
    submit('H', 16, priority);
    submit('a', 1, priority);
    submit('b', 6, priority);
    submit('c', 2, priority);
    EXPECT_EQ(names_after_all(),
              "xxxx"
              "HHHHabbbbcc"
              "HHHHbb"
              "HHHHHHHH");
    queue_.reset();
    tickets_.clear();
  }
}

TEST_F(IoQueueOrderTest, ATurnIsNotCutShortByTheEndOfTheLast) {
  start(4);
  submit('x', 4);
  wait_until_held(4);
  submit('a', 2);
  submit('H', 8);
  submit('b', 1);
  EXPECT_EQ(names_after_all(), "xxxxaaHHHHbHHHH");
}

TEST_F(IoQueueOrderTest, ATurnIsNotCutShortByACanceledOne) {
  start(4);
  submit('x', 2);
  wait_until_held(2);
  submit('H', 8);
  wait_until_held(4);  // Two requests into its turn.
  submit('a', 6);
  submit('b', 1);
  cancel(1);
  EXPECT_EQ(names_after_all(), "xxHHaaaabaa");
}

TEST_F(IoQueueOrderTest, AQueueDeeperThan32MiBHasTurnsOfItsDepth) {
  start(6);
  submit('x', 6);
  wait_until_held(6);
  submit('H', 8);
  submit('a', 1);
  EXPECT_EQ(names_after_all(), "xxxxxxHHHHHHaHH");
}

TEST_F(IoQueueOrderTest, TwoCallersTakeTurns) {
  start_with_all_slots_taken(1);
  as_another_caller([&] { submit_each(4, 'a'); });
  as_another_caller([&] { submit_each(4, 'b'); });
  EXPECT_EQ(names_after_all(), "xabababab");
}

TEST_F(IoQueueOrderTest, ThreeCallersTakeTurnsWhileTheyHaveOperations) {
  start_with_all_slots_taken(4);
  as_another_caller([&] { submit_each(4, 'a'); });
  as_another_caller([&] { submit_each(1, 'b'); });
  as_another_caller([&] { submit_each(3, 'c'); });
  EXPECT_EQ(names_after_all(), "xxxxabcacaca");
}

TEST_F(IoQueueOrderTest, ACallersOperationsKeepTheirOrderBetweenThoseOfOthers) {
  start_with_all_slots_taken(4);
  as_another_caller([&] {
    submit('a', 2);
    submit('b', 1);
    submit('c', 4);
    submit('d', 3);
  });
  as_another_caller([&] { submit_each(3, '-'); });
  EXPECT_EQ(names_after_all(), "xxxxaa-b-cccc-ddd");
}

TEST_F(IoQueueOrderTest, OneReadDoesNotWaitForThousandsOfAnotherCaller) {
  start_with_all_slots_taken(1);
  as_another_caller([&] { submit_each(3000, 'a'); });
  as_another_caller([&] { submit('b', 1); });
  EXPECT_EQ(names_after_all(), "xab" + repeat(2999, "a"));
}

TEST_F(IoQueueOrderTest, ACallerThatComesLaterHasTheNextTurn) {
  start(1);
  as_another_caller([&] { submit_each(8, 'a'); });
  for (std::size_t i = 0; i < 3; ++i) release_and_wait_for_next(i);
  as_another_caller([&] { submit_each(2, 'b'); });
  EXPECT_EQ(names_after_all(), "aaaababaaa");
}

TEST_F(IoQueueOrderTest, ASmallOperationWaitsForOneTurnOfEachOtherCaller) {
  start_with_all_slots_taken(4);
  as_another_caller([&] {
    submit('H', 8);
    submit('a', 1);
  });
  as_another_caller([&] {
    submit('K', 8);
    submit('b', 1);
  });
  as_another_caller([&] { submit('s', 1); });
  EXPECT_EQ(names_after_all(), "xxxxHHHHKKKKsabHHHHKKKK");
}

TEST_F(IoQueueOrderTest, ALongOperationGoesToTheEndOfItsCallersLine) {
  start_with_all_slots_taken(4);
  as_another_caller([&] {
    submit('H', 8);
    submit('a', 1);
  });
  as_another_caller([&] { submit_each(3, 'b'); });
  EXPECT_EQ(names_after_all(), "xxxxHHHHbabHHHHb");
}

TEST_F(IoQueueOrderTest, ATurnIsNotCutShortByAnotherCaller) {
  start_with_slots_taken(4, 2);
  as_another_caller([&] { submit('H', 8); });
  wait_until_held(4);  // Two requests into its turn.
  as_another_caller([&] { submit('b', 1); });
  EXPECT_EQ(names_after_all(), "xxHHHHbHHHH");
}

TEST_F(IoQueueOrderTest, ATurnIsNotCutShortByACanceledOperationBehindIt) {
  start_with_slots_taken(4, 2);
  as_another_caller([&] {
    submit('H', 8);
    wait_until_held(4);  // Two requests into its turn.
    submit('c', 1);
  });
  as_another_caller([&] { submit('b', 1); });
  cancel(2);
  EXPECT_EQ(names_after_all(), "xxHHHHbHHHH");
}

TEST_F(IoQueueOrderTest, ACanceledTurnIsNotContinuedByItsCaller) {
  start_with_slots_taken(4, 2);
  as_another_caller([&] {
    submit('H', 8);
    wait_until_held(4);  // Two requests into its turn.
    submit('a', 4);
  });
  as_another_caller([&] { submit('b', 1); });
  cancel(1);
  EXPECT_EQ(names_after_all(), "xxHHbaaaa");
}

TEST_F(IoQueueOrderTest, ACallerKeepsTheTurnOfAnOperationCanceledBefore) {
  start_with_all_slots_taken(1);
  as_another_caller([&] {
    submit('c', 1);
    submit('a', 1);
  });
  as_another_caller([&] { submit('b', 1); });
  cancel(1);
  EXPECT_EQ(names_after_all(), "xab");
}

TEST_F(IoQueueOrderTest, CallersTakeTurnsWithinEachPriority) {
  start(1);
  submit('x', 1, kNow, 6);
  wait_until_held(1);
  submit_each(2, 'w', kWriteBack, 7);
  submit_each(2, 'W', kWriteBack, 8);
  submit_each(2, 'p', kPrefetch, 7);
  submit_each(2, 'P', kPrefetch, 8);
  submit_each(2, 'n', kNow, 7);
  submit_each(2, 'N', kNow, 8);
  EXPECT_EQ(names_after_all(), "xnNnNpPpPwWwW");
}

TEST_F(IoQueueOrderTest, CallersShareWhatLessUrgentOperationsLeave) {
  start_with_all_slots_taken(1);
  as_another_caller([&] { submit_each(20, 'n'); });
  as_another_caller([&] {
    submit_each(20, 'N');
    submit_each(2, 'p', kPrefetch);
  });
  EXPECT_EQ(names_after_all(), "x" + repeat(7, "nN") + "np" + repeat(7, "Nn") +
                                   "Np" + repeat(5, "nN"));
}

TEST_F(IoQueueOrderTest, MoreCallersThanLinesAreAllServed) {
  constexpr std::size_t kLines = 64;
  constexpr std::size_t kCallers = 3 * kLines + 5;
  start_with_all_slots_taken(1);
  for (std::uint64_t i = 0; i < kCallers; ++i) {
    as_another_caller([&] { submit_each(2, 'x' + 1 + i); });
  }
  script_->release_all();
  for (const Ticket& ticket : tickets_) ticket.wait();
  std::map<std::uint64_t, std::size_t> served;
  for (const IoRequest& request : script_->log()) {
    const std::size_t turns = ++served[request.offset >> 32];
    // Nobody has a second one before all lines had their first.
    EXPECT_TRUE(turns == 1 || served.size() > kLines);
  }
  EXPECT_EQ(served.erase('x'), 1u);
  EXPECT_EQ(served.size(), kCallers);
  for (const auto& [name, turns] : served) EXPECT_EQ(turns, 2u) << name;
}

TEST_F(IoQueueOrderTest, AnOperationCanBeSubmittedOnTheTurnOfAnotherCaller) {
  start(1);
  submit('x', 1, kNow, 7);
  wait_until_held(1);
  as_another_caller([&] { submit_each(2, 'a', kNow, 8); });
  as_another_caller([&] { submit_each(2, 'b', kNow, 8); });
  submit('c', 1, kNow, 9);
  EXPECT_EQ(names_after_all(), "xacabb");
}

TEST_F(IoQueueOrderTest, EachThreadIsACallerOfItsOwn) {
  const std::uint64_t ours = this_caller();
  EXPECT_NE(ours, 0u);
  EXPECT_EQ(this_caller(), ours);
  as_another_caller([&] { EXPECT_NE(this_caller(), ours); });
}

TEST_F(IoQueueOrderTest, APriorityThatDoesNotExistIsRefused) {
  start(1);
  for (const int priority : {-1, 3}) {
    EXPECT_THROW(submit('x', 1, static_cast<IoPriority>(priority)),
                 std::invalid_argument);
  }
}

}  // namespace
}  // namespace torch_ext
