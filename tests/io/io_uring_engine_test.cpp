// The calls of liburing that the io_uring engine makes, and what it does when
// they are refused.

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "support/aio_call_counter.h"
#include "support/aligned_buffer.h"
#include "support/child.h"
#include "support/pattern.h"
#include "support/temp_dir.h"
#include "support/uring_call_counter.h"
#include "torch_ext/base/error.h"
#include "torch_ext/io/file.h"
#include "torch_ext/io/io_engine.h"

namespace torch_ext {
namespace {

using namespace std::chrono_literals;
using test::AlignedBuffer;
using test::HeldDescriptor;
using test::uring_calls;
using test::UringCalls;
using test::UringRulesInForce;
using Clock = std::chrono::steady_clock;

constexpr std::size_t kPage = 4096;
constexpr std::size_t kCount = 16;
constexpr std::chrono::nanoseconds kLong = 60s;

class IoUringEngineTest : public testing::Test {
 protected:
  void SetUp() override {
    const std::string reason = engine_unavailable_reason("io_uring");
    if (!reason.empty()) GTEST_SKIP() << reason;
    if (!test::uring_calls_available()) GTEST_SKIP() << "liburing is built in";
    test::fill_pattern(buffer_.bytes(), 1);
    for (std::size_t i = 0; i < kCount; ++i) {
      writes_.push_back({.op = IoRequest::Op::kWrite,
                         .fd = file_.fd(),
                         .offset = i * kPage,
                         .data = buffer_.data() + i * kPage,
                         .length = kPage,
                         .cookie = i});
    }
    engine_ = make_engine_factory("io_uring")(kCount);
    before_ = uring_calls();
  }

  UringCalls calls() const { return uring_calls() - before_; }
  std::size_t poll(std::size_t at_least,
                   std::chrono::nanoseconds timeout = kLong) {
    return engine_->poll(done_, at_least, timeout);
  }
  std::span<const IoRequest> first(std::size_t count) const {
    return std::span(writes_).first(count);
  }
  bool is_written() const {
    AlignedBuffer bytes(buffer_.size());
    return pread(file_.buffered_fd(), bytes.data(), bytes.size(), 0) ==
               static_cast<ssize_t>(bytes.size()) &&
           test::holds_pattern(bytes.bytes(), 1);
  }

  const test::TempDir directory_;
  const File file_ = File::scratch(directory_.path());
  AlignedBuffer buffer_{kCount * kPage};
  std::vector<IoRequest> writes_;
  std::vector<IoCompletion> done_ = std::vector<IoCompletion>(kCount);
  std::unique_ptr<IoEngine> engine_;
  UringCalls before_;
};

TEST_F(IoUringEngineTest, ABatchIsOneCallAndReapingWhatIsThereIsNone) {
  const HeldDescriptor held(file_.fd());
  EXPECT_EQ(engine_->submit(writes_), kCount);
  EXPECT_EQ(calls().submits, 1u);
  EXPECT_EQ(calls().requests, kCount);
  EXPECT_EQ(poll(0), 0u);
  EXPECT_EQ(calls().submits, 1u);
  EXPECT_EQ(calls().waits, 0u);
}

TEST_F(IoUringEngineTest, NothingToDoMakesNoCall) {
  EXPECT_EQ(engine_->submit({}), 0u);
  EXPECT_EQ(poll(16), 0u);
  EXPECT_EQ(poll(0), 0u);
  engine_->wake();
  EXPECT_EQ(calls().submits, 0u);
  EXPECT_EQ(calls().waits, 0u);
}

TEST_F(IoUringEngineTest, ABlockingPollIsMadeReadyToBeWokenOnlyOnce) {
  const HeldDescriptor held(file_.fd());
  ASSERT_EQ(engine_->submit(first(1)), 1u);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(poll(1, 1ms), 0u);
  EXPECT_EQ(calls().polls, 1u);
  EXPECT_EQ(calls().submits, 2u);
  EXPECT_EQ(calls().waits, 5u);
}

TEST_F(IoUringEngineTest, APollForManyIsOneCallThatAWakeEnds) {
  const HeldDescriptor held(file_.fd());
  ASSERT_EQ(engine_->submit(writes_), kCount);
  std::thread waker([this] {
    while (calls().waits == 0) std::this_thread::yield();
    std::this_thread::sleep_for(5ms);
    engine_->wake();
  });
  EXPECT_EQ(poll(kCount), 0u);
  waker.join();
  EXPECT_EQ(calls().waits, 1u);
}

TEST_F(IoUringEngineTest, AfterAWakeItIsMadeReadyOnceMore) {
  const HeldDescriptor held(file_.fd());
  ASSERT_EQ(engine_->submit(first(1)), 1u);
  std::thread waker([this] {
    while (calls().waits == 0) std::this_thread::yield();
    engine_->wake();
  });
  EXPECT_EQ(poll(1), 0u);
  waker.join();
  for (int i = 0; i < 5; ++i) EXPECT_EQ(poll(1, 1ms), 0u);
  EXPECT_LE(calls().polls, 2u);
}

TEST_F(IoUringEngineTest, AKernelThatTakesHalfIsOfferedTheRest) {
  const UringRulesInForce half(
      {.submit = [](int count) { return (count + 1) / 2; }});
  EXPECT_EQ(engine_->submit(writes_), kCount);
  EXPECT_EQ(calls().submits, 5u);  // 8, 4, 2, 1, 1
  EXPECT_EQ(poll(16), kCount);
  EXPECT_TRUE(is_written());
}

TEST_F(IoUringEngineTest, WhatABusyKernelLeavesIsNotInFlight) {
  for (const int error : {EAGAIN, EBUSY, ENOMEM}) {
    const std::size_t before = calls().requests;
    {
      int call = 0;
      const UringRulesInForce busy(
          {.submit = [&](int) { return ++call == 2 ? -error : 5; }});
      EXPECT_EQ(engine_->submit(writes_), 5u);
    }
    EXPECT_EQ(poll(16), 5u);
    EXPECT_EQ(poll(16), 0u);
    EXPECT_EQ(engine_->submit(std::span(writes_).subspan(5)), 11u);
    EXPECT_EQ(poll(16), 11u);
    EXPECT_EQ(calls().requests - before, kCount);
  }
  EXPECT_TRUE(is_written());
}

TEST_F(IoUringEngineTest, AKernelThatTakesNothingIsNotAskedForEver) {
  for (const int answer : {0, -EAGAIN}) {
    {
      const UringRulesInForce none({.submit = [&](int) { return answer; }});
      for (int i = 0; i < 100; ++i) EXPECT_EQ(engine_->submit(writes_), 0u);
      EXPECT_EQ(poll(16), 0u);
    }
    std::fill(done_.begin(), done_.end(), IoCompletion{});
    EXPECT_EQ(engine_->submit(writes_), kCount);
    EXPECT_EQ(poll(16), kCount);
    std::set<std::uint64_t> cookies;
    for (const IoCompletion& done : done_) cookies.insert(done.cookie);
    EXPECT_EQ(cookies.size(), kCount);
  }
  EXPECT_TRUE(is_written());
}

TEST_F(IoUringEngineTest, AnInterruptedSubmitIsMadeAgain) {
  int call = 0;
  const UringRulesInForce interrupted(
      {.submit = [&](int count) { return ++call <= 3 ? -EINTR : count; }});
  EXPECT_EQ(engine_->submit(writes_), kCount);
  EXPECT_EQ(poll(16), kCount);
  EXPECT_TRUE(is_written());
}

TEST_F(IoUringEngineTest, ASubmitThatIsInterruptedForEverFindsNoRoom) {
  {
    const UringRulesInForce storm({.submit = [](int) { return -EINTR; }});
    EXPECT_EQ(engine_->submit(writes_), 0u);
  }
  EXPECT_EQ(engine_->submit(writes_), kCount);
  EXPECT_EQ(poll(16), kCount);
  EXPECT_TRUE(is_written());
}

TEST_F(IoUringEngineTest, ARefusalForGoodIsTheResultOfWhatWasNotTaken) {
  {
    int call = 0;
    const UringRulesInForce refusing(
        {.submit = [&](int) { return ++call == 1 ? 6 : -EPERM; }});
    EXPECT_EQ(engine_->submit(writes_), kCount);
  }
  EXPECT_EQ(engine_->submit(writes_), 0u);
  std::size_t count = 0;
  while (count < kCount) {
    count += engine_->poll(std::span(done_).subspan(count), 1, kLong);
  }
  for (const IoCompletion& done : done_) {
    EXPECT_EQ(done.result, done.cookie < 6 ? 4096 : -EPERM) << done.cookie;
  }
}

TEST_F(IoUringEngineTest, AnInterruptedPollWaitsOn) {
  for (const int error : {EINTR, EAGAIN, EBUSY}) {
    HeldDescriptor held(file_.fd());
    ASSERT_EQ(engine_->submit(writes_), kCount);
    int call = 0;
    const UringRulesInForce interrupted({.wait = [&] {
      if (++call == 6) held.release();
      return call <= 5 ? -error : 0;
    }});
    EXPECT_EQ(poll(16), kCount);
    EXPECT_GE(call, 6);
  }
}

TEST_F(IoUringEngineTest, AKernelThatDisownsTheRingMakesPollThrow) {
  HeldDescriptor held(file_.fd());
  ASSERT_EQ(engine_->submit(writes_), kCount);
  {
    const UringRulesInForce disowned({.wait = [] { return -EBADF; }});
    try {
      poll(16);
      FAIL() << "no exception";
    } catch (const IoError& error) {
      EXPECT_EQ(error.failure().op, "io_uring_enter");
      EXPECT_EQ(error.error(), EBADF);
    }
  }
  held.release();
  EXPECT_EQ(poll(16), kCount);
}

TEST_F(IoUringEngineTest, WhatWasReapedBeforeAnErrorIsNotLost) {
  HeldDescriptor held(file_.fd());
  writes_[3].fd = -1;  // Completes when submit returns.
  ASSERT_EQ(engine_->submit(writes_), kCount);
  {
    const UringRulesInForce disowned({.wait = [] { return -EBADF; }});
    EXPECT_EQ(poll(16), 1u);
    EXPECT_EQ(done_[0].cookie, 3u);
    EXPECT_EQ(done_[0].result, -EBADF);
    EXPECT_THROW(poll(16), IoError);
  }
  held.release();
  EXPECT_EQ(poll(16), kCount - 1);
}

TEST_F(IoUringEngineTest, WithoutRoomForWakesAPollIsWokenAndEndsInTime) {
  const HeldDescriptor held(file_.fd());
  ASSERT_EQ(engine_->submit(writes_), kCount);
  const UringRulesInForce full({.submit = [](int) { return -EAGAIN; }});
  const auto start = Clock::now();
  EXPECT_EQ(poll(16, 20ms), 0u);
  EXPECT_GE(Clock::now() - start, 20ms);
  std::thread waker([this] {
    std::this_thread::sleep_for(5ms);
    engine_->wake();
  });
  EXPECT_EQ(poll(16, std::chrono::nanoseconds::max()), 0u);
  waker.join();
}

TEST_F(IoUringEngineTest, TheDestructorWaitsEvenIfTheKernelRefusesToWait) {
  HeldDescriptor held(file_.fd());
  ASSERT_EQ(engine_->submit(writes_), kCount);
  const UringRulesInForce disowned({.wait = [] { return -EBADF; }});
  std::atomic<bool> destroyed = false;
  std::thread destroyer([&] {
    engine_.reset();
    destroyed = true;
  });
  std::this_thread::sleep_for(20ms);
  EXPECT_FALSE(destroyed);
  held.release();
  destroyer.join();
  EXPECT_TRUE(is_written());
}

TEST_F(IoUringEngineTest, NoMoreAreInFlightThanCompletionsHaveRoomFor) {
  constexpr std::size_t kMany = 200;
  std::optional<UringRulesInForce> small;
  small.emplace(test::UringRules{.entries = 20});
  const auto engine = make_engine_factory("io_uring")(kMany);
  small.reset();
  EXPECT_EQ(engine->depth(), kMany);
  std::vector<IoRequest> requests(kMany, writes_[0]);
  for (std::size_t i = 0; i < kMany; ++i) requests[i].cookie = i;
  HeldDescriptor held(file_.fd());
  std::size_t taken = engine->submit(requests);
  EXPECT_EQ(taken, 64u - 16);  // 20 in powers of two, twice, less the wakes.
  held.release();
  std::multiset<std::uint64_t> cookies;
  while (cookies.size() < kMany) {
    const std::size_t count = engine->poll(done_, 1, kLong);
    ASSERT_GT(count, 0u);
    for (std::size_t i = 0; i < count; ++i) cookies.insert(done_[i].cookie);
    taken += engine->submit(std::span(requests).subspan(taken));
  }
  for (std::size_t i = 0; i < kMany; ++i) EXPECT_EQ(cookies.count(i), 1u) << i;
}

TEST_F(IoUringEngineTest, ADepthBeyondTheLargestRingIsNoError) {
  const auto engine = make_engine_factory("io_uring")(1 << 18);
  EXPECT_EQ(engine->depth(), std::size_t{1} << 18);
  EXPECT_EQ(engine->submit(writes_), kCount);
  EXPECT_EQ(engine->poll(done_, kCount, kLong), kCount);
}

TEST_F(IoUringEngineTest, WithOneRequestAtATimeWakesLoseNothing) {
  const auto engine = make_engine_factory("io_uring")(1);
  std::atomic<bool> stop = false;
  std::vector<std::thread> wakers;
  for (int i = 0; i < 3; ++i) {
    wakers.emplace_back([&] {
      while (!stop) engine->wake();
    });
  }
  for (int round = 0; round < 500; ++round) {
    ASSERT_EQ(engine->submit(writes_), 1u);
    const auto deadline = Clock::now() + kLong;
    std::size_t count = 0;
    while (count == 0 && Clock::now() < deadline) {
      count = engine->poll(done_, 1, kLong);
    }
    ASSERT_EQ(count, 1u);
    EXPECT_EQ(done_[0].result, 4096);
  }
  stop = true;
  for (std::thread& waker : wakers) waker.join();
}

/// Where the first mapping of a ring begins; 0 if this process has none.
std::uintptr_t ring_address() {
  std::ifstream maps("/proc/self/maps");
  std::string line;
  while (std::getline(maps, line)) {
    if (line.find("io_uring") != std::string::npos) {
      return std::stoull(line, nullptr, 16);
    }
  }
  return 0;
}

TEST_F(IoUringEngineTest, AForkedChildHasNoMemoryOfTheRingAndWaitsForNothing) {
  HeldDescriptor held(file_.fd());
  ASSERT_EQ(engine_->submit(writes_), kCount);
  const std::uintptr_t address = ring_address();
  ASSERT_NE(address, 0u);
  test::expect_well_in_child([&]() -> std::string {
    if (ring_address() != 0) return "inherited";
    // What the child maps there since is not the ring's.
    void* const place = reinterpret_cast<void*>(address);
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
    if (mmap(place, kPage, PROT_READ, kFlags, -1, 0) != place) return "mmap";
    engine_.reset();
    return msync(place, kPage, MS_ASYNC) == 0 ? "" : "unmapped";
  });
  held.release();
  EXPECT_EQ(poll(kCount), kCount);
  EXPECT_TRUE(is_written());
}

TEST_F(IoUringEngineTest, ARefusedRingIsTheReasonGivenAndTheError) {
  for (const int error : {EPERM, ENOSYS, EACCES, ENOMEM, EMFILE}) {
    const UringRulesInForce refusing({.setup = [&] { return -error; }});
    const std::string reason = engine_unavailable_reason("io_uring");
    EXPECT_NE(reason.find(errno_name(error)), std::string::npos) << reason;
    const bool advised = reason.find("; ") != std::string::npos;
    EXPECT_EQ(advised, error != EMFILE) << reason;
    try {
      make_engine_factory("io_uring")(4);
      FAIL() << "no exception";
    } catch (const IoError& refused) {
      EXPECT_EQ(refused.failure().op, "io_uring_setup");
      EXPECT_EQ(refused.error(), error);
      EXPECT_EQ(refused.what(), reason);
    }
  }
}

TEST_F(IoUringEngineTest, AKernelWithoutTheFeaturesIsTooOld) {
  const UringRulesInForce old({.old_kernel = true});
  const std::string reason = engine_unavailable_reason("io_uring");
  EXPECT_NE(reason.find("5.11"), std::string::npos) << reason;
  EXPECT_THROW(make_engine_factory("io_uring")(4), IoError);
}

TEST_F(IoUringEngineTest, EnginesLeaveNoDescriptorsBehind) {
  const auto count = [] {
    const std::filesystem::directory_iterator open("/proc/self/fd");
    return std::distance(begin(open), end(open));
  };
  engine_.reset();
  const auto before = count();
  for (int i = 0; i < 3; ++i) make_engine_factory("io_uring")(4);
  {
    const UringRulesInForce old({.old_kernel = true});
    EXPECT_THROW(make_engine_factory("io_uring")(4), IoError);
  }
  EXPECT_EQ(engine_unavailable_reason("io_uring"), "");
  EXPECT_EQ(count(), before);
}

// Also holds for a core that liburing is built into.
TEST(IoUringEngineRefusedTest, ASandboxedKernelIsTheReasonGiven) {
  if (engine_unavailable_reason("io_uring") == "built without liburing") {
    EXPECT_THROW(make_engine_factory("io_uring")(1), IoError);
    GTEST_SKIP() << "built without liburing";
  }
  for (const long call : {SYS_io_uring_setup, SYS_io_uring_enter}) {
    for (const int error : {EPERM, ENOSYS, EACCES, ENOMEM}) {
      test::expect_well_in_child([call, error]() -> std::string {
        if (!test::refuse_syscall(call, error)) {
          return test::skip("no seccomp");
        }
        const std::string reason = engine_unavailable_reason("io_uring");
        return reason.find(errno_name(error)) != std::string::npos
                   ? ""
                   : "reason: " + reason;
      });
    }
  }
}

}  // namespace
}  // namespace torch_ext
