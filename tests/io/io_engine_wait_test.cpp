// What poll() and wake() do while requests do not complete, on the engines
// that block.

#include <gtest/gtest.h>
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <optional>
#include <thread>
#include <vector>

#include "support/aio_call_counter.h"
#include "support/engine_test.h"
#include "support/uring_call_counter.h"

namespace torch_ext {
namespace {

using namespace std::chrono_literals;
using std::chrono::nanoseconds;
using test::AlignedBuffer;
using test::HeldDescriptor;
using test::kLong;
using test::kPage;
using Clock = std::chrono::steady_clock;

/// Has requests on two files: those on `slow_` are held back.
class IoEngineWaiting : public test::EngineTest {
 protected:
  void SetUp() override {
    EngineTest::SetUp();
    if (IsSkipped()) return;
    if (is("libaio") && !test::aio_calls_available()) {
      GTEST_SKIP() << "requests can only be held back below libaio";
    }
    if (is("io_uring") && !test::uring_calls_available()) {
      GTEST_SKIP() << "requests can only be held back below liburing";
    }
    slow_.emplace(filled(32 * kPage, 1));
    fast_.emplace(filled(32 * kPage, 1));
    engine_ = make(32);
    held_.emplace(slow_->fd());
  }

  void TearDown() override {
    held_.reset();
    engine_.reset();
  }

  void submit(const File& file, std::size_t count) {
    const std::vector<IoRequest> requests = page_reads(file.fd(), buffer_);
    ASSERT_EQ(engine_->submit(std::span(requests).first(count)), count);
  }

  std::size_t poll(std::size_t at_least, nanoseconds timeout) {
    return engine_->poll(done_, at_least, timeout);
  }

  AlignedBuffer buffer_{32 * kPage};
  std::vector<IoCompletion> done_ = std::vector<IoCompletion>(32);
  std::optional<File> slow_;
  std::optional<File> fast_;
  std::unique_ptr<IoEngine> engine_;
  std::optional<HeldDescriptor> held_;
};

INSTANTIATE_TEST_SUITE_P(Engines, IoEngineWaiting,
                         testing::Values(test::EngineCase{"libaio", ""},
                                         test::EngineCase{"io_uring", ""},
                                         test::EngineCase{"threads", ""}),
                         test::engine_case_name);

TEST_P(IoEngineWaiting, PollForNoneDoesNotBlock) {
  submit(*slow_, 1);
  EXPECT_EQ(poll(0, kLong), 0u);
}

TEST_P(IoEngineWaiting, TheTimeoutEndsAPollThatNothingElseEnds) {
  submit(*slow_, 1);
  for (const nanoseconds timeout : {-5ns, 0ns, 1ns, 30'000'000ns}) {
    const auto start = Clock::now();
    EXPECT_EQ(poll(1, timeout), 0u);
    EXPECT_GE(Clock::now() - start, timeout);
  }
}

TEST_P(IoEngineWaiting, PollReturnsWhatIsThereWhenItsTimeIsOver) {
  submit(*slow_, 1);
  submit(*fast_, 2);
  std::size_t count = 0;
  const auto deadline = Clock::now() + kLong;
  while (count < 2 && Clock::now() < deadline) count += poll(3 - count, 20ms);
  EXPECT_EQ(count, 2u);
  held_->release();
  EXPECT_EQ(poll(1, kLong), 1u);
}

TEST_P(IoEngineWaiting, PollForSomeLeavesTheRestInFlight) {
  submit(*slow_, 10);
  submit(*fast_, 3);
  EXPECT_EQ(poll(3, kLong), 3u);
  EXPECT_EQ(poll(0, kLong), 0u);
  held_->release();
  EXPECT_EQ(poll(10, kLong), 10u);
}

TEST_P(IoEngineWaiting, AWakeEndsAPollThatBlocksHoweverManyItWaitsFor) {
  submit(*slow_, 32);
  for (const std::size_t at_least : {1u, 3u, 32u}) {
    std::atomic<bool> ended = false;
    std::thread waker([&] {
      // Most rounds wake a poll that is blocked, some one that will be.
      std::this_thread::sleep_for(5ms);
      engine_->wake();
    });
    const auto start = Clock::now();
    EXPECT_EQ(poll(at_least, nanoseconds::max()), 0u);
    EXPECT_LT(Clock::now() - start, kLong);
    ended = true;
    waker.join();
  }
  held_->release();
  EXPECT_EQ(poll(32, kLong), 32u);
}

TEST_P(IoEngineWaiting, AWakeBeforeThePollIsNotLostAndCountsOnce) {
  submit(*slow_, 2);
  engine_->wake();
  engine_->wake();
  const auto start = Clock::now();
  EXPECT_EQ(poll(2, kLong), 0u);
  EXPECT_LT(Clock::now() - start, kLong);
  const auto again = Clock::now();
  EXPECT_EQ(poll(2, 20ms), 0u);
  EXPECT_GE(Clock::now() - again, 20ms);
}

TEST_P(IoEngineWaiting, AWakeWaitsForAPollThatWouldBlock) {
  engine_->wake();
  EXPECT_EQ(poll(1, kLong), 0u);  // Nothing in flight.
  submit(*slow_, 1);
  EXPECT_EQ(poll(0, kLong), 0u);
  const auto start = Clock::now();
  EXPECT_EQ(poll(1, kLong), 0u);
  EXPECT_LT(Clock::now() - start, kLong);
}

TEST_P(IoEngineWaiting, ManyWakersLoseNoWakeAndNoCompletion) {
  std::atomic<std::size_t> wakes = 0;
  std::atomic<bool> stop = false;
  std::vector<std::thread> wakers;
  for (int i = 0; i < 4; ++i) {
    wakers.emplace_back([&] {
      while (!stop) {
        engine_->wake();
        ++wakes;
        std::this_thread::yield();
      }
    });
  }
  std::size_t completed = 0;
  for (int round = 0; round < 300; ++round) {
    submit(*fast_, 32);
    std::size_t count = 0;
    const auto deadline = Clock::now() + kLong;
    while (count < 32 && Clock::now() < deadline) {
      count += poll(32 - count, kLong);
    }
    completed += count;
  }
  stop = true;
  for (std::thread& waker : wakers) waker.join();
  EXPECT_EQ(completed, 300u * 32);
  EXPECT_GT(wakes, 0u);
}

/// Sends this thread a signal every millisecond while it lives.
class SignalStorm {
 public:
  SignalStorm() {
    struct sigaction action = {};
    action.sa_handler = [](int) { count_.fetch_add(1); };
    sigaction(SIGUSR2, &action, &before_);
    count_ = 0;
    thread_ = std::thread([this, target = pthread_self()] {
      while (!stop_) {
        pthread_kill(target, SIGUSR2);
        std::this_thread::sleep_for(1ms);
      }
    });
  }
  ~SignalStorm() {
    stop_ = true;
    thread_.join();
    sigaction(SIGUSR2, &before_, nullptr);
  }

  int count() const { return count_; }

 private:
  static inline std::atomic<int> count_;
  struct sigaction before_ = {};
  std::atomic<bool> stop_ = false;
  std::thread thread_;
};

TEST_P(IoEngineWaiting, SignalsNeitherEndAPollNorLoseACompletion) {
  submit(*slow_, 8);
  SignalStorm storm;
  const auto start = Clock::now();
  EXPECT_EQ(poll(8, 50ms), 0u);
  EXPECT_GE(Clock::now() - start, 50ms);
  EXPECT_GT(storm.count(), 0);
  std::thread releaser([this] {
    std::this_thread::sleep_for(5ms);
    held_->release();
  });
  EXPECT_EQ(poll(8, kLong), 8u);
  releaser.join();
}

TEST_P(IoEngineWaiting, TheDestructorWaitsForRequestsThatDoNotComplete) {
  submit(*slow_, 20);
  std::atomic<bool> destroyed = false;
  std::thread destroyer([&] {
    engine_.reset();
    destroyed = true;
  });
  std::this_thread::sleep_for(30ms);
  EXPECT_FALSE(destroyed);
  held_->release();
  destroyer.join();
  EXPECT_TRUE(test::holds_pattern(buffer_.bytes(0, 20 * kPage), 1));
}

}  // namespace
}  // namespace torch_ext
