// The scripted engine of the tests above I/O does what its scripts say.

#include "support/faulty_engine.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <chrono>
#include <set>
#include <thread>
#include <vector>

#include "support/aligned_buffer.h"
#include "support/pattern.h"
#include "support/temp_dir.h"
#include "torch_ext/base/error.h"
#include "torch_ext/io/file.h"

namespace torch_ext {
namespace {

using namespace std::chrono_literals;
using test::AlignedBuffer;
using test::Fault;
using test::FaultScript;

constexpr std::chrono::nanoseconds kLong = 60s;

class FaultyEngineTest : public testing::Test {
 protected:
  std::vector<IoRequest> writes(std::size_t count, std::size_t first = 0) {
    std::vector<IoRequest> requests;
    for (std::size_t i = first; i < first + count; ++i) {
      requests.push_back({.op = IoRequest::Op::kWrite,
                          .fd = file_.fd(),
                          .offset = i * 4096,
                          .data = buffer_.data() + i * 4096,
                          .length = 4096,
                          .cookie = i});
    }
    return requests;
  }

  std::vector<IoCompletion> poll(std::size_t at_least,
                                 std::chrono::nanoseconds timeout = kLong) {
    std::vector<IoCompletion> done(16);
    done.resize(engine_->poll(done, at_least, timeout));
    return done;
  }

  const test::TempDir directory_;
  const File file_ = File::scratch(directory_.path());
  AlignedBuffer buffer_{16 * 4096};
  const std::shared_ptr<FaultScript> script_ = std::make_shared<FaultScript>();
  const IoEngineFactory factory_ = test::faulty_factory("memory", script_);
  const std::unique_ptr<IoEngine> engine_ = factory_(8);
};

TEST_F(FaultyEngineTest, WithoutFaultsItIsTheEngineWithin) {
  EXPECT_EQ(engine_->name(), "memory");
  EXPECT_EQ(engine_->submit(writes(10)), 8u);
  EXPECT_EQ(poll(8).size(), 8u);
  EXPECT_EQ(engine_->submit(writes(2, 8)), 2u);
  EXPECT_EQ(poll(2).size(), 2u);
  EXPECT_EQ(script_->submits(), 2u);
  EXPECT_EQ(script_->requests(), 10u);
  EXPECT_EQ(script_->max_in_flight(), 8u);
  EXPECT_EQ(script_->batches(), (std::vector<std::size_t>{8, 2}));
  EXPECT_EQ(script_->log().at(9).offset, 9u * 4096);
}

TEST_F(FaultyEngineTest, AFailureCompletesWithItsErrnoAndMovesNothing) {
  script_->set_plan(test::only(1, Fault::fail(EIO)));
  ASSERT_EQ(engine_->submit(writes(3)), 3u);
  std::int64_t results[3] = {};
  for (const IoCompletion& done : poll(3)) results[done.cookie] = done.result;
  EXPECT_EQ(results[0], 4096);
  EXPECT_EQ(results[1], -EIO);
  EXPECT_EQ(results[2], 4096);
  script_->set_plan(test::from(3, Fault::fail(ENOSPC)));
  ASSERT_EQ(engine_->submit(writes(2)), 2u);
  for (const IoCompletion& done : poll(2)) EXPECT_EQ(done.result, -ENOSPC);
}

TEST_F(FaultyEngineTest, ACutRequestReallyMovesOnlyItsFirstBytes) {
  test::fill_pattern(buffer_.bytes(), 1);
  script_->set_plan(test::only(0, Fault::cut(1000)));
  ASSERT_EQ(engine_->submit(writes(1)), 1u);
  EXPECT_EQ(poll(1).at(0).result, 1000);
  IoRequest read = writes(1).at(0);
  read.op = IoRequest::Op::kRead;
  ASSERT_EQ(engine_->submit({&read, 1}), 1u);
  EXPECT_EQ(poll(1).at(0).result, 1000);
}

TEST_F(FaultyEngineTest, ARefusedRequestIsTakenAfterSoManyTries) {
  script_->set_plan(test::only(2, Fault::refuse(2)));
  EXPECT_EQ(engine_->submit(writes(4)), 2u);
  EXPECT_EQ(engine_->submit(writes(2, 2)), 0u);
  EXPECT_EQ(engine_->submit(writes(2, 2)), 2u);
  EXPECT_EQ(poll(4).size(), 4u);
}

TEST_F(FaultyEngineTest, AHeldRequestIsInFlightUntilReleased) {
  script_->set_plan(test::from(1, Fault::held()));
  ASSERT_EQ(engine_->submit(writes(3)), 3u);
  EXPECT_EQ(poll(3, 10ms).at(0).cookie, 0u);
  EXPECT_EQ(script_->held(), 2u);
  std::thread releaser([this] {
    std::this_thread::sleep_for(5ms);
    script_->release(2);
  });
  const auto done = poll(1);
  releaser.join();
  ASSERT_EQ(done.size(), 1u);
  EXPECT_EQ(done[0].cookie, 2u);
  script_->release_all();
  EXPECT_EQ(poll(1).size(), 1u);
}

TEST_F(FaultyEngineTest, AWakeEndsAPollOfHeldRequestsOnce) {
  script_->set_plan(test::from(0, Fault::held()));
  ASSERT_EQ(engine_->submit(writes(1)), 1u);
  engine_->wake();
  EXPECT_EQ(poll(1).size(), 0u);
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(poll(1, 20ms).size(), 0u);
  EXPECT_GE(std::chrono::steady_clock::now() - start, 20ms);
  script_->release_all();
}

TEST_F(FaultyEngineTest, AFailingPollLosesNothing) {
  ASSERT_EQ(engine_->submit(writes(3)), 3u);
  script_->fail_polls(2);
  EXPECT_THROW(poll(3), IoError);
  EXPECT_THROW(poll(3), IoError);
  EXPECT_EQ(poll(3).size(), 3u);
  EXPECT_EQ(script_->engines(), 1u);
}

TEST_F(FaultyEngineTest, ShufflingChangesTheOrderButLosesNothing) {
  script_->shuffle(1);
  std::set<std::vector<std::uint64_t>> orders;
  for (int round = 0; round < 10; ++round) {
    ASSERT_EQ(engine_->submit(writes(8)), 8u);
    std::vector<std::uint64_t> order;
    for (const IoCompletion& done : poll(8)) order.push_back(done.cookie);
    orders.insert(order);
    std::set<std::uint64_t> all(order.begin(), order.end());
    EXPECT_EQ(all.size(), 8u);
  }
  EXPECT_GT(orders.size(), 5u);
}

}  // namespace
}  // namespace torch_ext
