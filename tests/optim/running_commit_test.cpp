// Commits that go on behind their caller: start_commit().

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support/child.h"
#include "support/commit_training.h"
#include "support/faulty_engine.h"
#include "support/forgetful_disk.h"
#include "support/temp_dir.h"
#include "support/trials.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

using test::CommitTraining;
using test::Fault;
using test::FaultScript;
using test::ForgetfulDisk;

bool eventually(const std::function<bool()>& condition) {
  const auto deadline =
      std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

/// Gives something that must not happen some time to happen.
bool never(const std::function<bool()>& condition) {
  for (int i = 0; i < 30; ++i) {
    if (condition()) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

template <typename Call>
std::future<void> in_thread(Call call) {
  return std::async(std::launch::async, std::move(call));
}

bool is_ready(const std::future<void>& call) {
  return call.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
}

/// Holds requests of a kind, as long as it is told to.
class Holds {
 public:
  explicit Holds(std::shared_ptr<FaultScript> script)
      : script_(std::move(script)) {
    script_->set_plan([this](std::size_t index, const IoRequest& request) {
      const std::lock_guard lock(mutex_);
      if (request.op != op_ || left_ == 0) return Fault();
      if (skip_ > 0) {
        --skip_;
        return Fault();
      }
      --left_;
      held_.push_back(index);
      return Fault::held();
    });
  }
  ~Holds() { script_->set_plan(nullptr); }

  /// Holds the next `count` requests that do this, after `skip` that do.
  void hold(IoRequest::Op op, std::size_t count, std::size_t skip = 0) {
    const std::lock_guard lock(mutex_);
    op_ = op;
    left_ = count;
    skip_ = skip;
  }
  bool has_one() {
    const std::lock_guard lock(mutex_);
    return !held_.empty();
  }
  /// Lets those go that are held, and holds no further ones.
  void release() {
    std::vector<std::size_t> all;
    {
      const std::lock_guard lock(mutex_);
      left_ = 0;
      all.swap(held_);
    }
    for (const std::size_t index : all) script_->release(index);
  }

 private:
  const std::shared_ptr<FaultScript> script_;
  std::mutex mutex_;
  IoRequest::Op op_ = IoRequest::Op::kSync;
  std::size_t left_ = 0;
  std::size_t skip_ = 0;
  std::vector<std::size_t> held_;
};

/// How many of the 13 tiles may be in memory: none stays, some do, all do.
class RunningCommitTest : public testing::TestWithParam<int> {
 protected:
  TileOptions options(IoEngineFactory factory = {}) const {
    TileOptions options = CommitTraining::options({dir_.path()}, GetParam());
    options.store.engine_factory = std::move(factory);
    return options;
  }
  TileOptions scripted() const {
    return options(test::faulty_factory("threads", script_));
  }

  /// A training whose tiles have two places each. One is the last commit's, and
  /// the other one is written.
  static void settle(CommitTraining& training) {
    for (int i = 0; i < 2; ++i) {
      training.step();
      training.commit();
    }
    training.step();
    ASSERT_EQ(training.wrong(), "");
  }

  static bool all_stay() { return GetParam() >= 13; }
  /// How many elements a step updates at least, while it can write no tile. The
  /// 13 tiles have 2,048, but for the gaps between parameters. Eight buffers,
  /// or all three, are for tiles that do not stay.
  static std::size_t updatable() {
    constexpr std::size_t kAll = 26301;
    return all_stay() ? kAll : GetParam() == 3 ? 2 * 2048 : 7 * 2048;
  }

  test::TempDir dir_;
  std::shared_ptr<FaultScript> script_ = std::make_shared<FaultScript>();
};

INSTANTIATE_TEST_SUITE_P(Buffers, RunningCommitTest,
                         testing::Values(3, 10, 13, 40));

TEST_P(RunningCommitTest, StepsAndCommitsFollowEachOtherWithoutAWait) {
  {
    CommitTraining training(options());
    std::vector<CommitTicket> tickets;
    for (int i = 0; i < 6; ++i) {
      training.step();
      tickets.push_back(training.start_commit(i < 3 ? 1 : 2));
      i % 2 == 0 ? training.step() : training.open_step();
    }
    for (std::size_t i = 0; i < tickets.size(); ++i) {
      tickets[i].wait_source();
      const CommitReport report = tickets[i].wait();
      EXPECT_EQ(report.generation, i + 1);
      EXPECT_EQ(report.generation, tickets[i].generation());
      EXPECT_EQ(report.step, 2 * i + 1);
      EXPECT_TRUE(tickets[i].done());
      EXPECT_EQ(tickets[i].report()->seconds, report.seconds);
    }
    EXPECT_EQ(training.wrong(), "");
    training.rollback(5);
    EXPECT_EQ(training.steps(), 9u);
    EXPECT_EQ(training.wrong(), "");
  }
  const auto resumed = CommitTraining::resume(options());
  EXPECT_EQ(resumed->steps(), 11u);
  EXPECT_EQ(resumed->wrong(), "");
}

TEST_P(RunningCommitTest,
       ItTakesNoMoreSpaceAndWritesNoMoreThanOneThatIsWaitedFor) {
  std::vector<std::uint64_t> sizes;
  std::vector<std::uint64_t> written;
  for (const bool waits : {true, false}) {
    CommitTraining training(options());
    settle(training);
    std::uint64_t bytes = 0;
    for (int i = 0; i < 8; ++i) {
      const CommitTicket ticket = training.start_commit();
      if (waits) ticket.wait();
      training.step();
      bytes += ticket.wait().bytes_written;
    }
    training.offload().close();
    sizes.push_back(
        std::filesystem::file_size(dir_.path() / StoreName().of_file(0)));
    written.push_back(bytes);
    std::filesystem::remove(dir_.path() / StoreName().of_file(0));
  }
  EXPECT_EQ(sizes[0], sizes[1]);
  EXPECT_EQ(written[0], written[1]);
}

// Its tile writes are held: there is no space for them but the last commit's.
TEST_P(RunningCommitTest, AStepReadsAndUpdatesWhileTheFlushIsHeld) {
  CommitTraining training(scripted());
  settle(training);
  Holds holds(script_);
  for (const std::size_t flush : {0U, 1U}) {  // The table's, or the root's.
    SCOPED_TRACE(flush);
    holds.hold(IoRequest::Op::kSync, 1, /*skip=*/flush);
    std::atomic<std::size_t> elements = 0;
    training.on_update = [&](const StateSegment& segment) {
      elements += segment.count;
    };
    const CommitTicket ticket = training.start_commit();
    ASSERT_TRUE(eventually([&] { return holds.has_one(); }));
    const std::size_t first = script_->requests();
    std::future<void> step = in_thread([&] { training.step(); });
    EXPECT_TRUE(eventually([&] { return elements >= updatable(); }));
    EXPECT_TRUE(never([&] { return is_ready(step) && !all_stay(); }));
    EXPECT_FALSE(ticket.done());
    const std::vector<IoRequest> log = script_->log();
    EXPECT_TRUE(std::none_of(
        log.begin() + static_cast<std::ptrdiff_t>(first), log.end(),
        [](const auto& r) { return r.op == IoRequest::Op::kWrite; }));
    holds.release();
    step.get();
    EXPECT_EQ(ticket.wait().step + 1, training.steps());
    EXPECT_EQ(training.wrong(), "");
  }
}

TEST_P(RunningCommitTest, AnOpenStepUpdatesWhileTheFlushIsHeld) {
  CommitTraining training(scripted());
  settle(training);
  Holds holds(script_);
  holds.hold(IoRequest::Op::kSync, 1);
  const CommitTicket ticket = training.start_commit();
  ASSERT_TRUE(eventually([&] { return holds.has_one(); }));
  std::atomic<std::size_t> elements = 0;
  training.on_update = [&](const StateSegment& segment) {
    elements += segment.count;
  };
  std::future<void> step = in_thread([&] { training.open_step(); });
  EXPECT_TRUE(eventually([&] { return elements >= updatable(); }));
  EXPECT_FALSE(ticket.done());
  holds.release();
  step.get();
  EXPECT_EQ(training.wrong(), "");
}

// The commit has the values from before the step.
TEST_P(RunningCommitTest, AStepWaitsUntilTheValuesHaveBeenRead) {
  {
    CommitTraining training(options());
    settle(training);
    std::atomic<bool> updated = false;
    training.on_update = [&](const StateSegment&) { updated = true; };
    training.on_read = [&](const StateSegment& segment) {
      // Gives a step that does not wait the time to update.
      if (segment.parameter == 0) never([&] { return updated.load(); });
      EXPECT_FALSE(updated);
    };
    for (const bool open : {false, true}) {
      updated = false;
      const CommitTicket ticket = training.start_commit();
      open ? training.open_step() : training.step();
      EXPECT_TRUE(ticket.wait_source_for(std::chrono::seconds(0)));
      ticket.wait();
    }
  }
  const auto resumed = CommitTraining::resume(options());
  EXPECT_EQ(resumed->steps(), 4u);
  EXPECT_EQ(resumed->wrong(), "");
}

// The disk may still take from its buffer.
TEST_P(RunningCommitTest, AVisitOfAResidentTileWaitsForItsOwnWrite) {
  {
    CommitTraining training(scripted());
    settle(training);
    Holds holds(script_);
    std::atomic<bool> updated = false;
    training.on_update = [&](const StateSegment&) { updated = true; };
    std::atomic<bool> read = false;
    training.on_read = [&](const StateSegment& segment) {
      // The last value's: the writes that follow are those of tiles.
      if (segment.parameter == 4 && !read.exchange(true)) {
        holds.hold(IoRequest::Op::kWrite, 1000);
      }
    };
    const CommitTicket ticket = training.start_commit();
    ASSERT_TRUE(eventually([&] { return holds.has_one(); }));
    std::future<void> step = in_thread([&] { training.step(); });
    EXPECT_TRUE(never([&] { return updated.load(); }));
    holds.release();
    step.get();
    ticket.wait();
  }
  const auto resumed = CommitTraining::resume(options());
  EXPECT_EQ(resumed->wrong(), "");
}

TEST_P(RunningCommitTest, OtherCallsWaitForItsEnd) {
  CommitTraining training(scripted());
  settle(training);
  Holds holds(script_);
  OptimizerOffload& offload = training.offload();
  const std::size_t late = offload.add_parameter(3000, StateFields::floats(1));
  const std::vector<std::pair<const char*, std::function<void()>>> calls = {
      {"commit", [&] { training.commit(); }},
      {"start_commit", [&] { training.start_commit().wait(); }},
      {"commits", [&] { EXPECT_EQ(offload.commits().size(), 1u); }},
      {"make_room", [&] { offload.make_room({{late}}); }},
      {"add_state", [&] { offload.add_state({{late}}); }},
      {"forget", [&] { offload.forget_state({{late}}); }},
      {"redefine",
       [&] { offload.redefine_parameter(late, 2000, StateFields::floats(1)); }},
      {"remove", [&] { offload.remove_parameter(late); }},
      {"rollback", [&] { training.rollback(offload.next_generation() - 1); }},
      {"close", [&] { offload.close(); }},
  };
  for (const auto& [name, call] : calls) {
    SCOPED_TRACE(name);
    holds.hold(IoRequest::Op::kSync, 1);
    const CommitTicket ticket = training.start_commit();
    ASSERT_TRUE(eventually([&] { return holds.has_one(); }));
    // These do not.
    EXPECT_EQ(offload.step_of(0), training.steps());
    EXPECT_EQ(offload.stats().steps, offload.stats().steps);
    EXPECT_TRUE(ticket.wait_source_for(std::chrono::seconds(30)));
    EXPECT_THROW(ticket.wait(std::chrono::milliseconds(1)), TimeoutError);
    std::future<void> other = in_thread(call);
    EXPECT_TRUE(never([&] { return is_ready(other); }));
    EXPECT_FALSE(ticket.done());
    holds.release();
    other.get();
    EXPECT_TRUE(ticket.done());
  }
}

TEST_P(RunningCommitTest, AForkedChildCannotWaitForIt) {
  CommitTraining training(options());
  settle(training);
  const CommitTicket ticket = training.start_commit();
  test::expect_well_in_child([&]() -> std::string {
    try {
      ticket.wait();
      return "no error";
    } catch (const StateError&) {
      return "";
    }
  });
  ticket.wait();
}

/// Where the power is cut while steps go on beside commits.
class RunningCommitCutTest : public RunningCommitTest {
 protected:
  void check_cuts(const ForgetfulDisk& disk,
                  const std::map<std::size_t, std::uint64_t>& acknowledged) {
    std::mt19937_64 random(3);
    std::size_t states = 0;
    const std::size_t draws = test::all_faults() ? 200
                              : test::kSanitized ? 2
                                                 : 4;
    for (std::size_t events = acknowledged.begin()->first;
         events <= disk.events(); ++events) {
      std::uint64_t least = 0;
      for (const auto& [at, generation] : acknowledged) {
        if (at <= events) least = generation;
      }
      for (std::size_t i = 0; i < draws; ++i) {
        const auto left = disk.after_cut(events, ForgetfulDisk::any(i, random));
        ++states;
        const auto resumed = CommitTraining::resume(options(left->factory()));
        ASSERT_GE(resumed->offload().commits().back().generation, least)
            << "after event " << events;
        ASSERT_EQ(resumed->wrong(), "") << "after event " << events;
      }
    }
    std::printf("%zu states of the drive\n", states);
  }
};

INSTANTIATE_TEST_SUITE_P(Buffers, RunningCommitCutTest,
                         testing::Values(3, 10, 13, 40));

TEST_P(RunningCommitCutTest, ACutBesideStepsLosesNoCommit) {
  ForgetfulDisk disk;
  std::map<std::size_t, std::uint64_t> acknowledged;
  {
    CommitTraining training(
        options(test::faulty_factory(disk.factory(), script_)));
    training.step();
    training.commit();
    acknowledged[disk.events()] = 1;
    training.step();
    Holds holds(script_);
    for (const std::size_t keep : {1U, 1U, 2U, 2U, 1U}) {
      std::atomic<std::size_t> elements = 0;
      training.on_update = [&](const StateSegment& segment) {
        elements += segment.count;
      };
      // The step goes as far as it can before the table is flushed, and again
      // before the root is. What it may write now, the drive gets now.
      holds.hold(IoRequest::Op::kSync, 1);
      const CommitTicket ticket = training.start_commit(keep);
      ASSERT_TRUE(eventually([&] { return holds.has_one(); }));
      std::future<void> step = in_thread([&] { training.step(); });
      ASSERT_TRUE(eventually([&] { return elements >= updatable(); }));
      never([&] { return is_ready(step); });
      holds.release();
      step.get();
      acknowledged[disk.events()] = 0;  // A number for the time before.
      const std::uint64_t generation = ticket.wait().generation;
      acknowledged[disk.events()] = generation;
      training.on_update = {};  // The number goes.
    }
    std::erase_if(acknowledged, [](const auto& at) { return at.second == 0; });
    training.step();
    EXPECT_EQ(training.wrong(), "");
  }
  check_cuts(disk, acknowledged);
}

class RunningCommitFaultTest : public RunningCommitTest {
 protected:
  static bool changes(const IoRequest& request) {
    return request.op != IoRequest::Op::kRead;
  }
  /// Fails the write or sync number `which` from now on, or all from then on.
  void fail(std::size_t which, bool all = false) {
    const auto count = std::make_shared<std::atomic<std::size_t>>(0);
    script_->set_plan([=](std::size_t, const IoRequest& request) {
      if (!changes(request)) return Fault();
      const std::size_t now = (*count)++;
      const bool fails = now == which || (all && now > which);
      // After an EIO, one more would be tried elsewhere.
      return fails ? Fault::fail(ENXIO) : Fault();
    });
  }
  std::size_t changes() const {
    const std::vector<IoRequest> log = script_->log();
    return static_cast<std::size_t>(std::count_if(
        log.begin(), log.end(), [](const auto& r) { return changes(r); }));
  }
};

INSTANTIATE_TEST_SUITE_P(Buffers, RunningCommitFaultTest,
                         testing::Values(3, 10, 13, 40));

// Each write and flush of a commit fails in turn, while a step goes on.
TEST_P(RunningCommitFaultTest, ACommitThatFailsLosesNothing) {
  std::size_t failures = 0;
  std::size_t requests = 1;
  for (std::size_t which = 0; which < requests; ++which) {
    SCOPED_TRACE(which);
    std::filesystem::remove(dir_.path() / StoreName().of_file(0));
    std::uint64_t good = 2;
    {
      CommitTraining training(scripted());
      settle(training);
      if (which == 0) {
        const std::size_t before = changes();
        training.commit();
        requests = changes() - before;
        training.step();
        ASSERT_EQ(training.wrong(), "");
      }
      fail(which);
      const CommitTicket ticket = training.start_commit();
      training.step();
      bool failed = false;
      try {
        ticket.wait();
        good = training.steps() - 1;
      } catch (const IoError& error) {
        EXPECT_EQ(error.error(), ENXIO);
        failed = true;
        ++failures;
        good = which == 0 ? 3 : 2;
      }
      script_->set_plan(nullptr);
      ASSERT_EQ(training.wrong(), "");
      training.step();
      ASSERT_EQ(training.wrong(), "");
      // After a failed flush there are no more commits.
      bool refused = false;
      try {
        training.commit();
        good = training.steps();
      } catch (const IoError&) {
        refused = true;
      }
      EXPECT_TRUE(!refused || failed);
      ASSERT_EQ(training.wrong(), "");
    }
    const auto resumed = CommitTraining::resume(options());
    EXPECT_EQ(resumed->steps(), good);
    EXPECT_EQ(resumed->wrong(), "");
  }
  EXPECT_GT(requests, 8u);
  EXPECT_GT(failures, 4u);
}

TEST_P(RunningCommitFaultTest, AnErrorThatNobodyHasSeenIsThrownOnce) {
  CommitTraining training(scripted());
  settle(training);
  for (const bool closes : {false, true}) {
    fail(0, /*all=*/true);
    const CommitTicket ticket = training.start_commit();
    ASSERT_TRUE(eventually([&] { return ticket.done(); }));
    script_->set_plan(nullptr);
    EXPECT_FALSE(ticket.report());
    training.step();  // Is not stopped by it.
    ASSERT_EQ(training.wrong(), "");
    if (closes) {
      EXPECT_THROW(training.offload().close(), IoError);
      training.offload().close();
    } else {
      EXPECT_THROW(training.commit(), IoError);
      training.commit();
    }
  }
}

TEST_P(RunningCommitFaultTest, AnErrorThatWasSeenIsNotThrownAgain) {
  CommitTraining training(scripted());
  settle(training);
  fail(0, /*all=*/true);
  const CommitTicket ticket = training.start_commit();
  EXPECT_THROW(ticket.wait(), IoError);
  EXPECT_THROW(ticket.wait(), IoError);
  script_->set_plan(nullptr);
  training.commit();
  training.offload().close();
}

// The root and its tombstone fail, so nobody knows which commit there is.
TEST_P(RunningCommitFaultTest, IfNobodyKnowsTheOutcomeNothingIsWritten) {
  CommitTraining training(scripted());
  settle(training);
  Holds holds(script_);
  holds.hold(IoRequest::Op::kSync, 1);
  std::atomic<std::size_t> elements = 0;
  training.on_update = [&](const StateSegment& segment) {
    elements += segment.count;
  };
  const CommitTicket ticket = training.start_commit();
  ASSERT_TRUE(eventually([&] { return holds.has_one(); }));
  std::string error;
  std::future<void> step = in_thread([&] {
    try {
      training.step();
    } catch (const IoError& failed) {
      error = failed.what();
    }
  });
  ASSERT_TRUE(eventually([&] { return elements >= updatable(); }));
  const std::size_t before = script_->requests();
  fail(0, /*all=*/true);
  holds.release();
  step.get();
  EXPECT_THROW(ticket.wait(), IoError);
  const std::string unknown =
      "whether this commit is on the drive is not known";
  if (!all_stay()) {
    EXPECT_NE(error.find(unknown), std::string::npos) << error;
  }
  EXPECT_THROW(training.step(), IoError);
  EXPECT_THROW(training.commit(), IoError);
  EXPECT_THROW(training.rollback(2), IoError);
  const std::vector<IoRequest> log = script_->log();
  const auto writes = std::count_if(
      log.begin() + static_cast<std::ptrdiff_t>(before), log.end(),
      [](const auto& request) { return changes(request); });
  EXPECT_EQ(writes, 2);  // The root and the tombstone.
  training.offload().close();
}

// A read that fails, and a kernel that throws, while a commit goes on.
TEST_P(RunningCommitFaultTest, AStepThatFailsDoesNotHarmTheCommit) {
  {
    CommitTraining training(scripted());
    settle(training);
    Holds holds(script_);
    holds.hold(IoRequest::Op::kSync, 1);
    const CommitTicket ticket = training.start_commit();
    ASSERT_TRUE(eventually([&] { return holds.has_one(); }));
    training.on_update = [](const StateSegment& segment) {
      if (segment.parameter > 0) throw std::runtime_error("the kernel failed");
    };
    EXPECT_THROW(training.step(), std::runtime_error);
    EXPECT_THROW(training.step(), std::runtime_error);
    training.on_update = {};
    holds.release();
    EXPECT_EQ(ticket.wait().step, 3u);
    training.rollback(3);
    EXPECT_EQ(training.wrong(), "");
    training.step();
    EXPECT_EQ(training.wrong(), "");
  }
  const auto resumed = CommitTraining::resume(options());
  EXPECT_EQ(resumed->steps(), 3u);
  EXPECT_EQ(resumed->wrong(), "");
}

}  // namespace
}  // namespace torch_ext
