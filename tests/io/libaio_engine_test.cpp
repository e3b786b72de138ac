// The kernel calls that the libaio engine makes, and what it does when they
// are refused.

#include <gtest/gtest.h>
#include <sys/syscall.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "support/aio_call_counter.h"
#include "support/aligned_buffer.h"
#include "support/child.h"
#include "support/pattern.h"
#include "support/temp_dir.h"
#include "torch_ext/base/error.h"
#include "torch_ext/io/file.h"
#include "torch_ext/io/io_engine.h"

namespace torch_ext {
namespace {

using test::aio_calls;
using test::AioCalls;
using test::AioRulesInForce;
using test::AlignedBuffer;

constexpr std::size_t kPage = 4096;
constexpr std::chrono::nanoseconds kLong = std::chrono::seconds(60);

class LibaioEngineTest : public testing::Test {
 protected:
  void SetUp() override {
    const std::string reason = engine_unavailable_reason("libaio");
    if (!reason.empty()) GTEST_SKIP() << reason;
    if (!test::aio_calls_available()) GTEST_SKIP() << "built without libaio";
    for (std::size_t i = 0; i < 16; ++i) {
      writes_.push_back({.op = IoRequest::Op::kWrite,
                         .fd = file_.fd(),
                         .offset = i * kPage,
                         .data = buffer_.data() + i * kPage,
                         .length = kPage,
                         .cookie = i});
    }
    engine_ = make_engine_factory("libaio")(16);
    before_ = aio_calls();
  }

  AioCalls calls() const { return aio_calls() - before_; }
  std::size_t poll(std::size_t at_least) {
    return engine_->poll(done_, at_least, kLong);
  }
  /// The results that are not a whole page, by cookie.
  std::set<std::pair<std::uint64_t, std::int64_t>> failures() const {
    std::set<std::pair<std::uint64_t, std::int64_t>> failed;
    for (const IoCompletion& done : done_) {
      if (done.result != 4096) failed.emplace(done.cookie, done.result);
    }
    return failed;
  }

  const test::TempDir directory_;
  const File file_ = File::scratch(directory_.path());
  AlignedBuffer buffer_{16 * kPage};
  std::vector<IoRequest> writes_;
  std::vector<IoCompletion> done_ = std::vector<IoCompletion>(16);
  std::unique_ptr<IoEngine> engine_;
  AioCalls before_;
};

TEST_F(LibaioEngineTest, ABatchIsOneCallAndSoIsReapingIt) {
  EXPECT_EQ(engine_->submit(writes_), 16u);
  EXPECT_EQ(calls().submits, 1u);
  EXPECT_EQ(calls().requests, 16u);
  EXPECT_EQ(poll(16), 16u);
  EXPECT_EQ(calls().getevents, 1u);
}

TEST_F(LibaioEngineTest, NothingToDoMakesNoCall) {
  EXPECT_EQ(engine_->submit({}), 0u);
  EXPECT_EQ(poll(16), 0u);
  EXPECT_EQ(poll(0), 0u);
  engine_->wake();
  EXPECT_EQ(calls().submits, 0u);
  EXPECT_EQ(calls().getevents, 0u);
  EXPECT_EQ(calls().wakes, 0u);
}

TEST_F(LibaioEngineTest, AWakeIsOneCallWhileTheOwnerBlocksElseNone) {
  const test::HeldDescriptor held(file_.fd());
  ASSERT_EQ(engine_->submit(writes_), 16u);
  std::thread waker([this] {
    while (calls().getevents == 0) std::this_thread::yield();
    engine_->wake();
  });
  EXPECT_EQ(poll(16), 0u);
  waker.join();
  EXPECT_LE(calls().wakes, 1u);
  const std::size_t wakes = calls().wakes;
  engine_->wake();
  EXPECT_EQ(poll(1), 0u);
  EXPECT_EQ(calls().wakes, wakes);
}

TEST_F(LibaioEngineTest, AKernelThatTakesHalfIsOfferedTheRest) {
  const AioRulesInForce half(
      {.submit = [](long count) { return (count + 1) / 2; }});
  EXPECT_EQ(engine_->submit(writes_), 16u);
  EXPECT_EQ(calls().submits, 5u);  // 8, 4, 2, 1, 1
  EXPECT_EQ(poll(16), 16u);
  EXPECT_TRUE(failures().empty());
}

TEST_F(LibaioEngineTest, ABusyKernelMakesSubmitTakeFewer) {
  int call = 0;
  const AioRulesInForce busy(
      {.submit = [&](long) -> long { return ++call == 2 ? -EAGAIN : 5; }});
  EXPECT_EQ(engine_->submit(writes_), 5u);
  EXPECT_EQ(poll(5), 5u);
  EXPECT_EQ(engine_->submit(std::span(writes_).first(5)), 5u);
  EXPECT_EQ(poll(5), 5u);
}

TEST_F(LibaioEngineTest, AKernelThatTakesNothingIsNotAskedForEver) {
  const AioRulesInForce none({.submit = [](long) { return 0; }});
  EXPECT_EQ(engine_->submit(writes_), 0u);
  EXPECT_EQ(poll(16), 0u);
}

TEST_F(LibaioEngineTest, WakesThatCameTooLateDoNotKeepTheRingFull) {
  writes_[0].fd = file_.buffered_fd();  // Complete when submit returns.
  ASSERT_EQ(engine_->submit(std::span(writes_).first(1)), 1u);
  {
    const AioRulesInForce woken({.getevents = [this] {
      engine_->wake();
      return -EINTR;
    }});
    EXPECT_EQ(poll(1), 0u);
  }
  EXPECT_EQ(calls().wakes, 1u);
  EXPECT_EQ(engine_->poll(std::span(done_).first(1), 1, kLong), 1u);
  int call = 0;
  const AioRulesInForce full(
      {.submit = [&](long count) { return ++call == 1 ? -EAGAIN : count; }});
  EXPECT_EQ(engine_->submit(std::span(writes_).first(1)), 1u);
  EXPECT_EQ(poll(1), 1u);
}

TEST_F(LibaioEngineTest, AnInterruptedSubmitIsMadeAgain) {
  int call = 0;
  const AioRulesInForce interrupted({.submit = [&](long count) -> long {
    return ++call <= 3 ? -EINTR : count;
  }});
  EXPECT_EQ(engine_->submit(writes_), 16u);
  EXPECT_EQ(poll(16), 16u);
  EXPECT_TRUE(failures().empty());
}

TEST_F(LibaioEngineTest, ASubmitThatIsInterruptedForEverFindsNoRoom) {
  {
    const AioRulesInForce storm({.submit = [](long) { return -EINTR; }});
    EXPECT_EQ(engine_->submit(writes_), 0u);
  }
  EXPECT_EQ(engine_->submit(writes_), 16u);
  EXPECT_EQ(poll(16), 16u);
}

TEST_F(LibaioEngineTest, ARefusalIsTheFirstRequestsAndTheOthersGoOn) {
  for (const int error : {EINVAL, EFAULT, EBADF, EPERM, ENOSYS, ENOMEM}) {
    int call = 0;
    const AioRulesInForce refusing({.submit = [&](long count) -> long {
      ++call;
      return call == 1 ? 6 : call == 2 ? -error : count;
    }});
    EXPECT_EQ(engine_->submit(writes_), 16u);
    std::size_t count = 0;
    while (count < 16) {
      count += engine_->poll(std::span(done_).subspan(count), 1, kLong);
    }
    using Failures = std::set<std::pair<std::uint64_t, std::int64_t>>;
    EXPECT_EQ(failures(), Failures({{6, -error}}));
  }
}

TEST_F(LibaioEngineTest, ASyncThatTheKernelCannotQueueIsDoneAtOnce) {
  const AioRulesInForce refusing({.submit = [](long) { return -EINVAL; }});
  const IoRequest syncs[] = {{.op = IoRequest::Op::kSync, .fd = file_.fd()},
                             {.op = IoRequest::Op::kSync, .fd = -1}};
  ASSERT_EQ(engine_->submit(syncs), 2u);
  ASSERT_EQ(poll(2), 2u);
  EXPECT_EQ(done_[0].result, 0);
  EXPECT_EQ(done_[1].result, -EBADF);
}

TEST_F(LibaioEngineTest, AnInterruptedPollWaitsOn) {
  ASSERT_EQ(engine_->submit(writes_), 16u);
  int call = 0;
  const AioRulesInForce interrupted(
      {.getevents = [&] { return ++call <= 5 ? -EINTR : 0; }});
  EXPECT_EQ(poll(16), 16u);
  EXPECT_EQ(call, 6);
}

TEST_F(LibaioEngineTest, AKernelThatDisownsTheEngineMakesPollThrow) {
  ASSERT_EQ(engine_->submit(writes_), 16u);
  {
    const AioRulesInForce disowned({.getevents = [] { return -EINVAL; }});
    try {
      poll(16);
      FAIL() << "no exception";
    } catch (const IoError& error) {
      EXPECT_EQ(error.failure().op, "io_getevents");
      EXPECT_EQ(error.error(), EINVAL);
    }
  }
  EXPECT_EQ(poll(16), 16u);
}

TEST_F(LibaioEngineTest, WhatWasReapedBeforeAnErrorIsNotLost) {
  {
    int call = 0;
    const AioRulesInForce rules({.submit = [&](long count) -> long {
                                   return ++call == 1 ? -EBADF : count;
                                 },
                                 .getevents = [] { return -EINVAL; }});
    EXPECT_EQ(engine_->submit(writes_), 16u);
    EXPECT_EQ(poll(16), 1u);
    EXPECT_THROW(poll(16), IoError);
  }
  EXPECT_EQ(poll(16), 15u);
}

TEST_F(LibaioEngineTest, AFullMachineIsAnErrorThatNamesTheLimit) {
  const AioRulesInForce full({.setup = [] { return -EAGAIN; }});
  try {
    make_engine_factory("libaio")(16);
    FAIL() << "no exception";
  } catch (const IoError& error) {
    EXPECT_EQ(error.failure().op, "io_setup");
    EXPECT_EQ(error.error(), EAGAIN);
    const std::string detail = error.failure().detail;
    EXPECT_NE(detail.find("fs.aio-max-nr is "), std::string::npos) << detail;
    EXPECT_NE(detail.find("32 more"), std::string::npos) << detail;
  }
}

TEST_F(LibaioEngineTest, ADepthBeyondTheLimitIsRefusedByTheRealKernel) {
  std::ifstream file("/proc/sys/fs/aio-max-nr");
  int most = 0;
  if (!(file >> most) || most > 1 << 20) GTEST_SKIP() << "limit " << most;
  EXPECT_THROW(make_engine_factory("libaio")(most + 1), IoError);
}

TEST_F(LibaioEngineTest, EnginesLeaveNoDescriptorsBehind) {
  const auto count = [] {
    const std::filesystem::directory_iterator open("/proc/self/fd");
    return std::distance(begin(open), end(open));
  };
  engine_.reset();
  const auto before = count();
  for (int i = 0; i < 3; ++i) make_engine_factory("libaio")(4);
  {
    const AioRulesInForce full({.setup = [] { return -EAGAIN; }});
    EXPECT_THROW(make_engine_factory("libaio")(4), IoError);
  }
  EXPECT_EQ(count(), before);
}

// Also holds for a core that makes its system calls without libaio.
TEST(LibaioEngineRefusedTest, ASandboxedKernelIsTheReasonGiven) {
  for (const long call : {SYS_io_setup, SYS_io_submit}) {
    test::expect_well_in_child([call]() -> std::string {
      if (!test::refuse_syscall(call, EPERM)) return test::skip("no seccomp");
      const std::string reason = engine_unavailable_reason("libaio");
      return reason.find("EPERM") != std::string::npos ? ""
                                                       : "reason: " + reason;
    });
  }
}

}  // namespace
}  // namespace torch_ext
