// Which operation has the next request.

#include <gtest/gtest.h>

#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "support/aligned_buffer.h"
#include "support/faulty_engine.h"
#include "support/io_queue_test.h"
#include "torch_ext/io/io_queue.h"

namespace torch_ext {
namespace {

using test::AlignedBuffer;
using test::Fault;
using test::kBlock;

constexpr auto kNow = IoPriority::kNow;
constexpr auto kPrefetch = IoPriority::kPrefetch;
constexpr auto kWriteBack = IoPriority::kWriteBack;

std::string repeat(std::size_t times, const std::string& text) {
  std::string all;
  for (std::size_t i = 0; i < times; ++i) all += text;
  return all;
}

/// An engine that holds its first requests until the test has submitted all:
/// then what is requested when depends on the queue's rules alone.
class IoQueueOrderTest : public test::IoQueueTest {
 protected:
  void start(int queue_depth, int thread_count = 1) {
    AioConfig config = test::small_blocks();
    config.queue_depth = queue_depth;
    config.thread_count = thread_count;
    script_->set_plan(test::from(0, Fault::held()));
    queue_ = std::make_unique<IoQueue>(config,
                                       test::faulty_factory("null", script_));
  }
  ~IoQueueOrderTest() override { script_->release_all(); }

  /// The name is found again in names().
  void submit(char name, std::size_t blocks, IoPriority priority = kNow) {
    IoOperation operation = write(file_, static_cast<std::uint64_t>(name) << 32,
                                  memory_.bytes(0, blocks * kBlock));
    operation.priority = priority;
    tickets_.push_back(queue_->submit(operation));
  }

  void wait_until_held(std::size_t requests) const {
    while (script_->held() < requests) std::this_thread::yield();
  }

  /// Of the operations whose requests were made, in order.
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

  const std::shared_ptr<File> file_ = scratch(kBlock);
  const AlignedBuffer memory_{64 * kBlock};
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

TEST_F(IoQueueOrderTest, APriorityThatDoesNotExistIsRefused) {
  start(1);
  for (const int priority : {-1, 3}) {
    EXPECT_THROW(submit('x', 1, static_cast<IoPriority>(priority)),
                 std::invalid_argument);
  }
}

}  // namespace
}  // namespace torch_ext
