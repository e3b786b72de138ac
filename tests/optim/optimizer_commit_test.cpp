#include <gtest/gtest.h>
#include <sys/syscall.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <barrier>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "store/commit_reader.h"
#include "store/store_check.h"
#include "support/child.h"
#include "support/faulty_engine.h"
#include "support/forgetful_disk.h"
#include "support/temp_dir.h"
#include "support/trials.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"
#include "torch_ext/optim/optimizer_offload.h"

namespace torch_ext {
namespace {

using test::Fault;
using test::ForgetfulDisk;

constexpr std::uint64_t kBlock = 4096;
constexpr std::uint64_t kTile = 2 * kBlock;

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

struct Function final : UpdateKernel {
  explicit Function(std::function<void(const StateSegment&)> work)
      : work_(std::move(work)) {}
  void update(std::span<const StateSegment> segments) override {
    for (const StateSegment& segment : segments) work_(segment);
  }

 private:
  std::function<void(const StateSegment&)> work_;
};

/// What an element of a parameter's state is after so many steps, and its
/// value: each depends on the step before.
std::uint32_t next_state(std::uint32_t before, std::uint64_t element,
                         std::uint64_t step) {
  return before * 2'654'435'761u + static_cast<std::uint32_t>(element + step);
}
std::uint32_t next_value(std::uint32_t before, std::uint32_t state) {
  return before * 31 + state;
}

/// A training, and the same one in memory.
class Training {
 public:
  explicit Training(const TileOptions& options)
      : offload_(std::make_unique<OptimizerOffload>(options)) {
    for (const std::uint64_t size : kSizes) {
      offload_->add_parameter(size, StateFields::floats(1));
    }
    parameters_ = expected(0).second;
  }

  static std::unique_ptr<Training> resume(const TileOptions& options,
                                          std::uint64_t generation = 0) {
    return resume(options, {.generation = generation});
  }

  static std::unique_ptr<Training> resume(const TileOptions& options,
                                          const CommitChoice& choice) {
    std::unique_ptr<Training> training(new Training);
    training->offload_ = OptimizerOffload::resume(options, choice);
    for (const std::uint64_t size : kSizes) {
      training->parameters_.emplace_back(size);
    }
    training->take(choice.generation, [&](Function& reader) {
      training->offload_->read_values(reader);
    });
    return training;
  }

  void rollback(std::uint64_t generation) {
    take(generation,
         [&](Function& reader) { offload_->rollback(generation, reader); });
  }

  /// Says that the last step has failed and changed nothing.
  void take_back() { --step_; }

  /// Begins a step that is not ended.
  void begin_step() {
    offload_->begin_step(nothing_);
    offload_->release(0);
  }

  void step() {
    ++step_;
    std::vector<std::size_t> all(kSizes.size());
    std::iota(all.begin(), all.end(), 0);
    Function update([&](const StateSegment& segment) {
      for (std::uint64_t i = 0; i < segment.count; ++i) {
        const std::uint64_t element = segment.first + i;
        std::uint32_t& state = segment.field<std::uint32_t>(0)[i];
        state = next_state(state, element, segment.step);
        std::uint32_t& value = parameters_[segment.parameter][element];
        value = next_value(value, state);
      }
    });
    offload_->step(all, update);
  }

  CommitReport commit(std::size_t keep = 1, const CommitGroup& group = {}) {
    std::vector<CommittedValue> values;
    for (const std::uint64_t size : kSizes) values.push_back({size, 4});
    Function give([&](const StateSegment& segment) {
      std::copy_n(parameters_[segment.parameter].begin() +
                      static_cast<std::ptrdiff_t>(segment.first),
                  segment.count, segment.field<std::uint32_t>(0));
    });
    return offload_->commit(step_, "after " + std::to_string(step_), values,
                            give, keep, group);
  }

  /// Returns what is wrong, or an empty text if all is as in memory.
  std::string wrong() {
    const auto [states, values] = expected(step_);
    if (values != parameters_) return "a value is wrong";
    for (std::size_t i = 0; i < kSizes.size(); ++i) {
      if (offload_->step_of(i) != step_) return "a number of steps is wrong";
    }
    std::string found;
    Function compare([&](const StateSegment& segment) {
      const auto expected = states[segment.parameter].begin() +
                            static_cast<std::ptrdiff_t>(segment.first);
      if (!std::equal(expected,
                      expected + static_cast<std::ptrdiff_t>(segment.count),
                      segment.field<std::uint32_t>(0))) {
        found = "state of parameter " + std::to_string(segment.parameter) +
                " is wrong";
      }
    });
    offload_->read_state(compare);
    return found;
  }

  std::uint64_t steps() const { return step_; }
  OptimizerOffload& offload() { return *offload_; }

 private:
  static constexpr std::array<std::uint64_t, 5> kSizes = {5000, 300, 9000, 1,
                                                          12000};

  Training() = default;

  void take(std::uint64_t generation,
            const std::function<void(Function&)>& read) {
    Function reader([&](const StateSegment& segment) {
      std::copy_n(segment.field<std::uint32_t>(0), segment.count,
                  parameters_[segment.parameter].begin() +
                      static_cast<std::ptrdiff_t>(segment.first));
    });
    read(reader);
    const auto commits = offload_->commits();
    step_ = commits.back().step;
    for (const auto& commit : commits) {
      if (commit.generation == generation) step_ = commit.step;
    }
  }

  /// State and values after so many steps.
  using Arrays = std::vector<std::vector<std::uint32_t>>;
  static std::pair<Arrays, Arrays> expected(std::uint64_t steps) {
    thread_local std::map<std::uint64_t, std::pair<Arrays, Arrays>> known;
    const auto found = known.find(steps);
    if (found != known.end()) return found->second;
    std::pair<Arrays, Arrays> result;
    if (steps == 0) {
      for (const std::uint64_t size : kSizes) {
        result.first.emplace_back(size, 0);
        result.second.emplace_back(size, 7);
      }
    } else {
      result = expected(steps - 1);
      for (std::size_t i = 0; i < kSizes.size(); ++i) {
        for (std::uint64_t e = 0; e < kSizes[i]; ++e) {
          std::uint32_t& state = result.first[i][e];
          state = next_state(state, e, steps);
          result.second[i][e] = next_value(result.second[i][e], state);
        }
      }
    }
    return known[steps] = result;
  }

  Function nothing_{[](const StateSegment&) {}};  // Outlives the offload.
  std::unique_ptr<OptimizerOffload> offload_;
  Arrays parameters_;
  std::uint64_t step_ = 0;
};

/// How many buffers there are: none, some or all of the tiles stay in memory. A
/// training has 13 tiles.
class OptimizerCommitTest : public testing::TestWithParam<int> {
 protected:
  TileOptions options(IoEngineFactory factory = {}) const {
    return options_for(GetParam(), std::move(factory));
  }
  TileOptions options_for(int buffers, IoEngineFactory factory = {}) const {
    TileOptions options;
    options.store.directory = dir_.path();
    options.store.aio.block_size = static_cast<int>(kBlock);
    options.store.aio.queue_depth = 8;
    options.store.engine = "threads";  // libaio takes long to end.
    options.store.engine_factory = std::move(factory);
    options.tile_bytes = kTile;
    options.host_memory = static_cast<std::uint64_t>(buffers) * kTile;
    return options;
  }
  std::filesystem::path file() const {
    return dir_.path() / StoreName().of_file(0);
  }

  test::TempDir dir_;
};

INSTANTIATE_TEST_SUITE_P(Buffers, OptimizerCommitTest,
                         testing::Values(3, 10, 13, 40));

TEST_P(OptimizerCommitTest, TrainingGoesOnWhereItWasCommitted) {
  {
    Training training(options());
    for (int i = 0; i < 3; ++i) training.step();
    EXPECT_FALSE(std::filesystem::exists(file()));
    EXPECT_EQ(training.offload().stats().tiles, 13u);
    const CommitReport report = training.commit();
    EXPECT_EQ(report.generation, 1u);
    EXPECT_EQ(report.step, 3u);
    EXPECT_EQ(training.wrong(), "");
    training.step();
    EXPECT_EQ(training.wrong(), "");
  }
  const auto resumed = Training::resume(options());
  EXPECT_EQ(resumed->steps(), 3u);
  EXPECT_EQ(resumed->offload().commits().back().document, "after 3");
  EXPECT_EQ(resumed->wrong(), "");
  for (int i = 0; i < 3; ++i) {
    resumed->step();
    EXPECT_EQ(resumed->wrong(), "");
    resumed->commit();
    EXPECT_EQ(resumed->wrong(), "");
  }
}

TEST_P(OptimizerCommitTest, AStepMovesTheSameBytesAsWithoutCommits) {
  const auto bytes_of_a_step = [this](bool commits) {
    Training training(options());
    training.step();
    training.step();
    if (commits) {
      training.commit();
      training.step();
      training.commit();
    }
    const auto before = training.offload().stats();
    for (int i = 0; i < 10; ++i) training.step();
    // Up to eight tiles were in flight when the count began.
    training.offload().close();
    const auto after = training.offload().stats();
    return after.bytes_written - before.bytes_written;
  };
  const std::uint64_t without = bytes_of_a_step(false);
  const std::uint64_t with = bytes_of_a_step(true);
  EXPECT_LE(with, without + 8 * kTile);
  EXPECT_GE(with + 8 * kTile, without);
}

TEST_P(OptimizerCommitTest, ItTakesSpaceForASecondCopyAndNoMore) {
  Training training(options());
  training.step();
  training.commit();
  training.step();
  training.commit();
  const auto space = [this] { return std::filesystem::file_size(file()); };
  const std::uintmax_t before = space();
  for (int i = 0; i < 20; ++i) {
    training.step();
    if (i % 3 != 0) training.commit();
  }
  EXPECT_EQ(space(), before);
}

TEST_P(OptimizerCommitTest, MoreCommitsAreKept) {
  {
    Training training(options());
    for (int i = 0; i < 6; ++i) {
      training.step();
      training.commit(i < 4 ? 3 : 2);
      ASSERT_EQ(training.wrong(), "") << i;
    }
  }
  const auto resumed = Training::resume(options());
  EXPECT_EQ(resumed->steps(), 6u);
  EXPECT_EQ(resumed->wrong(), "");
}

TEST_P(OptimizerCommitTest, AnotherBudgetGoesOnTheSame) {
  {
    Training training(options());
    training.step();
    training.commit();
  }
  for (const int buffers : {3, 40, 10}) {
    const auto resumed = Training::resume(options_for(buffers));
    EXPECT_EQ(resumed->wrong(), "");
    resumed->step();
    resumed->commit();
    EXPECT_EQ(resumed->wrong(), "");
  }
}

TEST_P(OptimizerCommitTest, GoesBackToEachCommitThatIsKept) {
  Training training(options());
  EXPECT_THROW(training.rollback(1), std::invalid_argument);
  for (int i = 1; i <= 4; ++i) {
    training.step();
    training.commit(4);
  }
  training.step();
  for (const std::uint64_t generation : {4u, 2u, 2u, 1u, 3u}) {
    training.rollback(generation);
    EXPECT_EQ(training.steps(), generation);
    EXPECT_EQ(training.wrong(), "");
    training.step();
    training.step();
    EXPECT_EQ(training.wrong(), "");
  }
  EXPECT_EQ(training.offload().commits().size(), 4u);
  EXPECT_THROW(training.rollback(5), std::invalid_argument);
  training.step();
  EXPECT_EQ(training.wrong(), "");
}

TEST_P(OptimizerCommitTest, ACommitAfterARollbackFollowsAllOthers) {
  {
    Training training(options());
    for (int i = 1; i <= 3; ++i) {
      training.step();
      training.commit(3);
    }
    training.rollback(1);
    training.step();
    training.commit(3);  // There was one of step 2 before.
    EXPECT_EQ(training.wrong(), "");
    training.rollback(3);
    EXPECT_EQ(training.wrong(), "");
    training.step();
    training.step();
    training.commit(3);
    EXPECT_EQ(training.wrong(), "");
  }
  const std::vector<std::uint64_t> steps = {3, 2, 5};
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const auto resumed = Training::resume(options(), 3 + i);
    EXPECT_EQ(resumed->steps(), steps[i]);
    EXPECT_EQ(resumed->wrong(), "");
    resumed->step();
    EXPECT_EQ(resumed->wrong(), "");
  }
  EXPECT_THROW(Training::resume(options(), 1), std::invalid_argument);
  EXPECT_EQ(Training::resume(options())->steps(), 5u);
}

TEST_P(OptimizerCommitTest, GoesBackAgainAndAgainInTheSameSpace) {
  Training training(options());
  for (int i = 0; i < 2; ++i) {
    training.step();
    training.commit();
  }
  std::uintmax_t space = 0;
  for (std::uint64_t i = 0; i < 10; ++i) {
    training.step();
    training.rollback(2 + i);
    training.step();
    training.commit();
    if (i == 3) space = std::filesystem::file_size(file());
  }
  EXPECT_EQ(training.wrong(), "");
  EXPECT_EQ(std::filesystem::file_size(file()), space);
}

TEST_P(OptimizerCommitTest, AStepThatHasBegunIsGivenUp) {
  Training training(options());
  training.step();
  training.commit();
  training.step();
  training.begin_step();
  training.rollback(1);
  EXPECT_EQ(training.steps(), 1u);
  EXPECT_EQ(training.wrong(), "");
  training.step();
  EXPECT_EQ(training.wrong(), "");
}

TEST_P(OptimizerCommitTest, WhatJoinedLaterHasNoStateAfterARollback) {
  Training training(options());
  training.step();
  training.commit();
  OptimizerOffload& offload = training.offload();
  const std::size_t late = offload.add_parameter(3000, StateFields::floats(1));
  Function ones([](const StateSegment& segment) {
    std::fill_n(segment.field<std::uint32_t>(0), segment.count, 1);
  });
  offload.step({{late}}, ones);
  training.rollback(1);
  EXPECT_EQ(training.wrong(), "");
  EXPECT_FALSE(offload.has_state(late));
  bool zeros = true;
  Function look([&](const StateSegment& segment) {
    const auto* found = segment.field<std::uint32_t>(0);
    zeros = zeros && std::all_of(found, found + segment.count,
                                 [](std::uint32_t x) { return x == 0; });
  });
  offload.step({{late}}, look);
  EXPECT_TRUE(zeros);
  offload.forget_state({{late}});
  EXPECT_EQ(training.wrong(), "");
}

/// Draws what the drive forgets, after each event from the first commit on.
/// What is found is a whole step: that of the last commit that was
/// acknowledged, or of a later one. Training goes on from there.
class OptimizerCommitCutTest : public OptimizerCommitTest {
 protected:
  void acknowledge(Training& training, std::size_t keep = 1) {
    const CommitReport report = training.commit(keep);
    acknowledged_[disk_.events()] = report.generation;
  }

  void check_cuts() {
    std::mt19937_64 random(1);
    std::size_t states = 0;
    const std::size_t draws = test::all_faults() ? 400
                              : test::kSanitized ? 3
                                                 : 6;
    for (std::size_t events = acknowledged_.begin()->first;
         events <= disk_.events(); ++events) {
      std::uint64_t least = 0;
      for (const auto& [at, generation] : acknowledged_) {
        if (at <= events) least = generation;
      }
      for (std::size_t i = 0; i < draws; ++i) {
        const auto left =
            disk_.after_cut(events, ForgetfulDisk::any(i, random));
        ++states;
        const auto resumed = Training::resume(options(left->factory()));
        const auto commits = resumed->offload().commits();
        ASSERT_GE(commits.back().generation, least) << "after event " << events;
        ASSERT_EQ(resumed->wrong(), "") << "after event " << events;
        if (i % 4 != 0) continue;
        resumed->step();
        resumed->commit();
        resumed->step();
        ASSERT_EQ(resumed->wrong(), "") << "after event " << events;
      }
    }
    std::printf("%zu states of the drive\n", states);
  }

  ForgetfulDisk disk_;

 private:
  std::map<std::size_t, std::uint64_t> acknowledged_;
};

INSTANTIATE_TEST_SUITE_P(Buffers, OptimizerCommitCutTest,
                         testing::Values(3, 10, 13, 40));

TEST_P(OptimizerCommitCutTest, ACutAtAnyWriteLosesNoCommit) {
  {
    Training training(options(disk_.factory()));
    for (const bool commits : {true, false, true, true, true}) {
      training.step();
      if (commits) acknowledge(training);
    }
    training.step();
  }
  check_cuts();
}

TEST_P(OptimizerCommitCutTest, ACutAfterARollbackLosesNoCommit) {
  {
    Training training(options(disk_.factory()));
    for (int i = 0; i < 2; ++i) {
      training.step();
      acknowledge(training, 2);
    }
    training.step();
    training.rollback(1);
    training.step();
    acknowledge(training, 2);
    training.rollback(3);
    training.step();
  }
  check_cuts();
}

/// Two processes that commit together, each on a disk of its own.
class OptimizerGroupTest : public OptimizerCommitTest {
 protected:
  static constexpr std::size_t kRanks = 2;

  TileOptions options_of(std::size_t rank, ForgetfulDisk& disk) const {
    TileOptions options = options_for(GetParam(), disk.factory());
    options.name = {.rank = static_cast<std::uint32_t>(rank), .world = kRanks};
    return options;
  }

  /// Commits, or fails to: in its own part, or because it says so.
  void commit(std::size_t rank, Training& training, std::uint64_t generation,
              bool good) {
    const auto vote = [&](bool mine) {
      const std::lock_guard lock(mutex_);
      moments_[rank].push_back({disks_[rank].events(), 0});
      votes_[generation] = votes_[generation] && mine && good;
      return true;
    };
    const CommitGroup group{.generation = generation,
                            .vote = [&](const std::exception_ptr& error) {
                              vote(error == nullptr);
                              barrier_.arrive_and_wait();
                              return votes_[generation];
                            }};
    std::uint64_t acknowledged = 0;
    try {
      training.commit(1, group);
      acknowledged = generation;
      EXPECT_TRUE(good);
    } catch (const StateError& error) {
      EXPECT_STREQ(error.what(), "commit: another process could not commit");
    }
    moments_[rank].push_back({disks_[rank].events(), acknowledged});
    barrier_.arrive_and_wait();
  }

  void train(std::size_t rank) {
    Training training(options_of(rank, disks_[rank]));
    std::uint64_t generation = 0;
    for (const bool good : {true, true, false, true, false, false, true}) {
      training.step();
      commit(rank, training, ++generation, good || rank == 0);
    }
    training.step();
    EXPECT_EQ(training.wrong(), "");
  }

  /// How many events a disk had when its process voted, and when it knew the
  /// outcome; and the generation that it has acknowledged by then.
  struct Moment {
    std::size_t events = 0;
    std::uint64_t acknowledged = 0;
  };

  /// Whether a crash can find the disks after so many events. Nobody is past a
  /// vote that another has not reached.
  bool can_be(const std::array<std::size_t, kRanks>& events) const {
    for (std::size_t i = 0; i < moments_[0].size(); i += 2) {
      for (std::size_t rank = 0; rank < kRanks; ++rank) {
        const std::size_t other = 1 - rank;
        if (events[rank] > moments_[rank][i].events &&
            events[other] < moments_[other][i].events) {
          return false;
        }
      }
    }
    return true;
  }

  /// The last generation that a process may have acknowledged: all have voted.
  std::uint64_t acknowledged(
      const std::array<std::size_t, kRanks>& events) const {
    std::uint64_t last = 0;
    for (std::size_t i = 0; i < moments_[0].size(); i += 2) {
      bool all = true;
      for (std::size_t rank = 0; rank < kRanks; ++rank) {
        all = all && events[rank] >= moments_[rank][i].events;
      }
      if (all) last = std::max(last, moments_[0][i + 1].acknowledged);
    }
    return last;
  }

  std::array<ForgetfulDisk, kRanks> disks_;
  std::array<std::vector<Moment>, kRanks> moments_;
  std::mutex mutex_;
  std::map<std::uint64_t, bool> votes_ = {{1, true}, {2, true}, {3, true},
                                          {4, true}, {5, true}, {6, true},
                                          {7, true}};
  std::barrier<> barrier_{kRanks};
};

INSTANTIATE_TEST_SUITE_P(Buffers, OptimizerGroupTest, testing::Values(3, 13));

TEST_P(OptimizerGroupTest, ACrashLeavesTheSameCommitToAll) {
  {
    std::vector<std::jthread> threads;
    for (std::size_t rank = 0; rank < kRanks; ++rank) {
      threads.emplace_back([this, rank] { train(rank); });
    }
  }
  std::mt19937_64 random(2);
  std::size_t states = 0;
  const std::size_t wanted = test::all_faults() ? 20'000
                             : test::kSanitized ? 100
                                                : 300;
  std::map<bool, std::size_t> given_up;
  while (states < wanted) {
    std::array<std::size_t, kRanks> events;
    for (std::size_t rank = 0; rank < kRanks; ++rank) {
      const std::size_t first = moments_[rank][1].events;
      events[rank] = first + random() % (disks_[rank].events() - first + 1);
    }
    if (!can_be(events)) continue;
    ++states;
    const std::uint64_t least = acknowledged(events);
    std::array<std::unique_ptr<ForgetfulDisk>, kRanks> left;
    std::array<std::vector<std::uint64_t>, kRanks> roots;
    for (std::size_t rank = 0; rank < kRanks; ++rank) {
      constexpr std::size_t kDrawn = 2;
      left[rank] = disks_[rank].after_cut(events[rank],
                                          ForgetfulDisk::any(kDrawn, random));
      for (const auto& commits :
           OptimizerOffload::find_commits(options_of(rank, *left[rank]))) {
        roots[rank].push_back(commits.back().generation);
      }
    }
    std::uint64_t common = 0;
    for (const std::uint64_t root : roots[0]) {
      if (std::ranges::count(roots[1], root) > 0) {
        common = std::max(common, root);
      }
    }
    const std::string where = "after events " + std::to_string(events[0]) +
                              " and " + std::to_string(events[1]);
    ASSERT_GE(common, std::max<std::uint64_t>(least, 1)) << where;
    ++given_up[roots[0].front() != roots[1].front()];
    std::array<std::unique_ptr<Training>, kRanks> resumed;
    std::uint64_t next = 0;
    for (std::size_t rank = 0; rank < kRanks; ++rank) {
      resumed[rank] = Training::resume(options_of(rank, *left[rank]),
                                       CommitChoice{.newest = common});
      ASSERT_EQ(resumed[rank]->wrong(), "") << where;
      next = std::max(next, resumed[rank]->offload().next_generation());
    }
    ASSERT_EQ(resumed[0]->steps(), resumed[1]->steps()) << where;
    if (states % 4 != 0) continue;
    for (auto& training : resumed) {
      training->step();
      const CommitGroup all{.generation = next,
                            .vote = [](const auto&) { return true; }};
      ASSERT_EQ(training->commit(1, all).generation, next);
      training->step();
      ASSERT_EQ(training->wrong(), "") << where;
    }
  }
  EXPECT_GT(given_up[true], 0u);  // One had a commit that the other had not.
  std::printf("%zu states of two drives\n", states);
}

TEST_P(OptimizerGroupTest, IfNobodyKnowsTheOutcomeNothingIsWritten) {
  Training training(options());
  training.step();
  training.commit();
  training.step();
  const CommitGroup lost{.generation = 2, .vote = [](const auto&) -> bool {
                           throw StateError("the others are gone");
                         }};
  EXPECT_THROW(training.commit(1, lost), StateError);
  EXPECT_THROW(training.step(), StateError);
  EXPECT_THROW(training.commit(), StateError);
  EXPECT_THROW(training.rollback(1), StateError);
}

TEST_P(OptimizerGroupTest, AProcessThatFailsEarlyVotesToo) {
  Training training(options());
  training.step();
  std::vector<bool> votes;
  const CommitGroup group{.generation = 1,
                          .vote = [&](const std::exception_ptr& error) {
                            const bool good = error == nullptr;
                            votes.push_back(good);
                            return good;
                          }};
  EXPECT_THROW(training.commit(/*keep=*/0, group), std::invalid_argument);
  EXPECT_EQ(votes, std::vector<bool>{false});
  EXPECT_EQ(training.commit(1, group).generation, 1u);
  EXPECT_EQ(votes, (std::vector<bool>{false, true}));
  EXPECT_EQ(training.commit(1, {.generation = 9}).generation, 9u);
}

/// Parameters of which one is trained, one has state that no step has touched,
/// and one has room alone.
class Partly {
 public:
  explicit Partly(std::unique_ptr<OptimizerOffload> offload)
      : offload_(std::move(offload)) {}
  explicit Partly(const TileOptions& options)
      : Partly(std::make_unique<OptimizerOffload>(options)) {
    for (const std::uint64_t size : {5000u, 9000u, 12000u, 300u}) {
      offload_->add_parameter(size, StateFields::floats(1));
    }
    offload_->add_state(std::vector<std::size_t>{1});
    offload_->make_room(std::vector<std::size_t>{2});
  }
  void step(const std::vector<std::size_t>& parameters) {
    Function add([](const StateSegment& segment) {
      for (std::uint64_t i = 0; i < segment.count; ++i) {
        segment.field<std::uint32_t>(0)[i] += 1;
      }
    });
    offload_->step(parameters, add);
  }
  void commit() {
    Function nothing([](const StateSegment&) {});
    offload_->commit(1, "partly", {}, nothing, 1);
  }
  /// Whether all elements of a parameter's state are `value`.
  bool is(std::size_t parameter, std::uint32_t value) {
    std::uint64_t right = 0;
    std::uint64_t all = 0;
    Function compare([&](const StateSegment& segment) {
      for (std::uint64_t i = 0; i < segment.count; ++i, ++all) {
        right += segment.field<std::uint32_t>(0)[i] == value ? 1u : 0u;
      }
    });
    offload_->read_state(std::vector<std::size_t>{parameter}, compare);
    return all > 0 && right == all;
  }

 private:
  std::unique_ptr<OptimizerOffload> offload_;
};

TEST_P(OptimizerCommitTest, WhatNoStepHasTouchedIsInACommitToo) {
  const auto check = [this] {
    const StoreReport report = read_store({file()}, {.extents = true});
    EXPECT_TRUE(report.damage.empty()) << report.damage[0].what;
  };
  {
    Partly training(options());
    training.step({0, 3});
    training.commit();
    check();
    training.step({0});
    training.commit();
    check();
    EXPECT_TRUE(training.is(1, 0));
  }
  // While the next root was written, the power was cut.
  const CommitReader::Slot last = [this] {
    StoreOptions how = options().store;
    how.files = {StoreName().of_file(0)};
    how.read_only = true;
    Store store(how);
    return CommitReader(store).slots().at(0);
  }();
  std::fstream(file(), std::ios::in | std::ios::out | std::ios::binary)
          .seekp(static_cast<std::streamoff>(kRootOffsets[1 - last.number]))
      << "torn";
  Partly resumed(OptimizerOffload::resume(options()));
  EXPECT_TRUE(resumed.is(0, 2));
  EXPECT_TRUE(resumed.is(1, 0));
  EXPECT_TRUE(resumed.is(3, 1));
  resumed.step({0, 1, 2, 3});
  EXPECT_TRUE(resumed.is(0, 3));
  EXPECT_TRUE(resumed.is(1, 1));
  EXPECT_TRUE(resumed.is(2, 1));
}

class OptimizerCommitFaultTest : public OptimizerCommitTest {
 protected:
  TileOptions scripted() const {
    return options(test::faulty_factory("threads", script_));
  }
  std::shared_ptr<test::FaultScript> script_ =
      std::make_shared<test::FaultScript>();
};

INSTANTIATE_TEST_SUITE_P(Buffers, OptimizerCommitFaultTest,
                         testing::Values(3, 10, 13, 40));

// A commit writes each byte of the values, of resident tiles that have changed
// and of two tables once, a root, and nothing else.
TEST_P(OptimizerCommitFaultTest, ACommitWritesWhatItHasToAndNothingElse) {
  Training training(scripted());
  training.step();
  training.commit();  // The first one writes the header too.
  training.step();
  ASSERT_EQ(training.wrong(), "");
  const std::size_t first = script_->requests();
  const CommitReport made = training.commit();
  // A read ahead may have been asked for since.
  std::map<std::uint64_t, std::uint64_t> written;
  std::uint64_t all = 0;
  const std::vector<IoRequest> log = script_->log();
  for (std::size_t i = first; i < log.size(); ++i) {
    if (log[i].op != IoRequest::Op::kWrite) continue;
    EXPECT_TRUE(written.emplace(log[i].offset, log[i].length).second);
    all += log[i].length;
  }
  const auto take = [&](std::uint64_t offset, std::uint64_t bytes) {
    std::uint64_t taken = 0;
    while (taken < bytes) {
      const auto found = written.find(offset + taken);
      if (found == written.end()) break;
      taken += found->second;
      written.erase(found);
    }
    EXPECT_TRUE(taken == 0 || taken == bytes) << "a part at " << offset;
    return taken;
  };
  StoreOptions how = options().store;
  how.files = {StoreName().of_file(0)};
  how.read_only = true;
  Store store(how);
  const CommitReader::Slot last = CommitReader(store).slots().at(0);
  ASSERT_EQ(last.root.generation, 2u);
  const StoreReport report = read_store({file()}, {});
  const auto& extents = report.commits.back().commit.extents;
  ASSERT_EQ(extents.size(), 26u);  // 13 tiles, and 13 of values.
  std::uint64_t residents = 0;
  std::uint64_t values = 0;
  for (std::size_t i = 0; i < 13; ++i) {
    residents += take(extents[i]->offset(), extents[i]->padded_size());
    values += take(extents[13 + i]->offset(), extents[13 + i]->padded_size());
  }
  EXPECT_EQ(values, 13 * kTile);
  const auto stats = training.offload().stats();
  EXPECT_EQ(residents, align_up(stats.resident_bytes, kBlock));
  std::uint64_t tables = 0;
  for (const auto& table : last.root.tables) {
    const std::uint64_t bytes = align_up(table.size, kBlock);
    EXPECT_EQ(take(table.offsets[0], bytes), bytes);
    tables += bytes;
  }
  EXPECT_EQ(last.root.tables.size(), 2u);
  EXPECT_EQ(take(kRootOffsets[last.number], kBlock), kBlock);
  EXPECT_TRUE(written.empty()) << "bytes at " << written.begin()->first;
  EXPECT_EQ(all, values + residents + tables + kBlock);
  EXPECT_EQ(made.bytes_written, all);
}

TEST_P(OptimizerCommitFaultTest, AStepWritesWhatItWritesToScratch) {
  constexpr std::uint64_t kSteps = 5;
  const auto bytes_of_steps = [this](bool commits) {
    std::filesystem::remove(file());
    Training training(scripted());
    training.step();
    for (int i = 0; i < (commits ? 2 : 0); ++i) {
      training.commit();
      training.step();
    }
    // So that no write is in flight when the count begins, or ends.
    EXPECT_EQ(training.wrong(), "");
    const std::size_t first = script_->requests();
    for (std::uint64_t i = 0; i < kSteps; ++i) training.step();
    EXPECT_EQ(training.wrong(), "");
    std::uint64_t bytes = 0;
    const std::vector<IoRequest> log = script_->log();
    for (std::size_t i = first; i < log.size(); ++i) {
      if (log[i].op == IoRequest::Op::kWrite) bytes += log[i].length;
    }
    const auto stats = training.offload().stats();
    const std::uint64_t stay = align_up(stats.resident_bytes, kBlock);
    EXPECT_EQ(bytes, kSteps * (13 * kTile - stay));
    return bytes;
  };
  EXPECT_EQ(bytes_of_steps(true), bytes_of_steps(false));
}

// Each request of a commit fails in turn.
TEST_P(OptimizerCommitFaultTest, ACommitThatFailsLosesNothing) {
  std::size_t which = 0;
  for (;; ++which) {
    std::filesystem::remove(file());
    {
      Training training(scripted());
      training.step();
      training.commit();
      training.step();
      // So that the writes and reads of the step are not among them.
      ASSERT_EQ(training.wrong(), "");
      const std::size_t first = script_->requests();
      script_->set_plan(test::only(first + which, Fault::fail(EIO)));
      bool failed = false;
      try {
        training.commit();
      } catch (const IoError& error) {
        EXPECT_EQ(error.error(), EIO);
        failed = true;
      }
      const bool reached = script_->requests() > first + which;
      script_->set_plan(nullptr);
      if (!reached) break;
      // A read ahead that failed is made again, by the next call. If it fails
      // only then, in the midst of the step, there is the commit.
      const auto is_made = [&] {
        try {
          training.step();
          return true;
        } catch (const IoError&) {
          if (failed) throw;
          training.take_back();
          return false;
        }
      };
      if (!is_made() && !is_made()) {
        ASSERT_EQ(script_->log()[first + which].op, IoRequest::Op::kRead);
        training.rollback(training.offload().commits().back().generation);
        training.step();
      }
      ASSERT_EQ(training.wrong(), "") << "request " << which;
      if (!failed) training.commit();
    }
    const auto resumed = Training::resume(options());
    EXPECT_EQ(resumed->wrong(), "") << "request " << which;
  }
  EXPECT_GT(which, 8u);
}

// Values, resident tiles and tables are written once more, elsewhere.
TEST_P(OptimizerCommitFaultTest, AWriteThatFailsIsMadeElsewhere) {
  Training training(scripted());
  training.step();
  training.commit();
  std::size_t mended = 0;
  const std::size_t most = test::all_faults() ? 200 : 20;
  for (std::size_t which = 0; which < most; ++which) {
    training.step();
    // So that the writes and reads of the step are not among them.
    ASSERT_EQ(training.wrong(), "");
    const std::size_t first = script_->requests();
    // The roots have no other place.
    script_->set_plan([=](std::size_t i, const IoRequest& request) {
      const bool fails = i == first + which &&
                         request.op == IoRequest::Op::kWrite &&
                         request.offset >= Store::kHeadBytes;
      return fails ? Fault::fail(EIO) : Fault();
    });
    const std::uint64_t generation = training.commit().generation;
    script_->set_plan(nullptr);
    const std::vector<IoRequest> log = script_->log();
    if (log.size() <= first + which) break;
    const IoRequest& failed = log[first + which];
    if (failed.op == IoRequest::Op::kWrite &&
        failed.offset >= Store::kHeadBytes) {
      ++mended;
      // Nobody writes there again.
      const auto again = [&](const IoRequest& each) {
        return each.op == IoRequest::Op::kWrite && each.offset == failed.offset;
      };
      EXPECT_EQ(std::count_if(
                    log.begin() + static_cast<std::ptrdiff_t>(first + which),
                    log.end(), again),
                1);
    }
    ASSERT_EQ(training.wrong(), "") << "request " << which;
    ASSERT_EQ(training.offload().commits().back().generation, generation);
  }
  EXPECT_GT(mended, 3u);
  const StoreReport report = read_store({file()}, {.extents = true});
  EXPECT_TRUE(report.damage.empty()) << report.damage[0].what;
}

// As many writes fail at once as there are buffers. Nobody waits for ever, and
// what fails twice is an error.
TEST_P(OptimizerCommitFaultTest, WritesThatFailTogetherHoldNobodyUp) {
  Training training(scripted());
  training.step();
  training.commit();
  constexpr std::size_t kAll = 1000;
  for (const std::size_t many :
       std::array<std::size_t, 9>{1, 2, 3, 5, 10, 13, 20, 28, kAll}) {
    training.step();
    ASSERT_EQ(training.wrong(), "");
    auto left = std::make_shared<std::atomic<std::size_t>>(many);
    script_->set_plan([left](std::size_t, const IoRequest& request) {
      if (request.op != IoRequest::Op::kWrite ||
          request.offset < Store::kHeadBytes || *left == 0) {
        return Fault();
      }
      --*left;
      return Fault::fail(EIO);
    });
    int error = 0;
    try {
      training.commit();
    } catch (const IoError& failed) {
      error = failed.error();
    }
    script_->set_plan(nullptr);
    if (many == 1) {
      EXPECT_EQ(error, 0);
    }
    if (many == kAll) {
      EXPECT_EQ(error, EIO);
    }
    training.commit();
    ASSERT_EQ(training.wrong(), "") << many;
  }
}

// A tile whose place could not be written may have a spare already, and get
// another one back from the commit that goes. All requests of a commit fail
// from one of them on.
TEST_P(OptimizerCommitFaultTest, AfterFewerCommitsAreKeptAFaultLosesNothing) {
  std::size_t failures = 0;
  const std::size_t stride = test::all_faults() ? 1 : 5;
  for (std::size_t which = 0;; which += stride) {
    std::filesystem::remove(file());
    std::uint64_t steps = 0;
    {
      Training training(scripted());
      for (const std::size_t keep : {3u, 3u, 3u, 2u}) {
        training.step();
        training.commit(keep);
      }
      training.step();
      // So that the writes and reads of the step are not among them.
      ASSERT_EQ(training.wrong(), "");
      const std::size_t first = script_->requests();
      std::atomic<bool> reached = false;
      script_->set_plan([&](std::size_t i, const IoRequest& request) {
        // A read is made ahead of the next step.
        if (i < first + which || request.op == IoRequest::Op::kRead) {
          return Fault();
        }
        reached = true;
        return Fault::fail(EIO);
      });
      bool failed = false;
      try {
        training.commit(2);
      } catch (const IoError&) {
        failed = true;
      }
      script_->set_plan(nullptr);
      if (!reached) break;
      EXPECT_TRUE(failed);
      try {
        training.commit(2);
        ++failures;
      } catch (const IoError&) {
        // A flush has failed, or nobody knows which commit is there.
        continue;
      }
      ASSERT_EQ(training.wrong(), "") << "request " << which;
      for (int i = 0; i < 2; ++i) {
        training.step();
        training.commit(2);
        ASSERT_EQ(training.wrong(), "") << "request " << which;
      }
      steps = training.steps();
    }
    const auto resumed = Training::resume(options());
    EXPECT_EQ(resumed->steps(), steps);
    EXPECT_EQ(resumed->wrong(), "") << "request " << which;
  }
  EXPECT_GT(failures, 2u);
}

// What a commit's writes say after a read ahead has ended it is of that commit.
TEST_P(OptimizerCommitFaultTest, ACommitIsNotToldWhatTheOneBeforeHasMet) {
  std::size_t failures = 0;
  for (std::size_t which = 0; which < 12; ++which) {
    std::filesystem::remove(file());
    Training training(scripted());
    training.step();
    training.commit();
    training.step();
    ASSERT_EQ(training.wrong(), "");
    const std::size_t first = script_->requests();
    script_->set_plan(test::from(first + which, Fault::fail(ENOSPC)));
    EXPECT_THROW(training.commit(), IoError) << "request " << which;
    script_->set_plan(nullptr);
    try {
      training.commit();
    } catch (const IoError& error) {
      // Only a flush that failed is final.
      EXPECT_NE(error.failure().detail.find("no further commits"),
                std::string::npos)
          << "request " << which << ": " << error.what();
      ++failures;
    }
  }
  EXPECT_LT(failures, 12u);
}

// Each request of a first commit fails in turn.
TEST_P(OptimizerCommitFaultTest, ZerosThatCannotBeWrittenAreNotLost) {
  std::size_t which = 0;
  for (;; ++which) {
    std::filesystem::remove(file());
    Partly training(scripted());
    const std::size_t first = script_->requests();
    script_->set_plan(test::only(first + which, Fault::fail(EIO)));
    try {
      training.commit();
    } catch (const IoError& error) {
      EXPECT_EQ(error.error(), EIO);
    }
    const bool reached = script_->requests() > first + which;
    script_->set_plan(nullptr);
    EXPECT_TRUE(training.is(1, 0)) << "request " << which;
    training.step({0, 1, 2});
    EXPECT_TRUE(training.is(0, 1)) << "request " << which;
    EXPECT_TRUE(training.is(1, 1)) << "request " << which;
    EXPECT_TRUE(training.is(2, 1)) << "request " << which;
    if (!reached) break;
  }
  EXPECT_GT(which, 8u);
}

// Each request of a rollback fails in turn: it is refused, and can be repeated.
TEST_P(OptimizerCommitFaultTest, ARollbackThatFailsCanBeRepeated) {
  Training training(scripted());
  training.step();
  training.commit();
  std::size_t failures = 0;
  for (std::size_t which = 0;; ++which) {
    training.step();
    ASSERT_EQ(training.wrong(), "") << "request " << which;
    const std::size_t first = script_->requests();
    script_->set_plan(test::only(first + which, Fault::fail(EIO)));
    bool failed = false;
    try {
      training.rollback(1);
    } catch (const IoError& error) {
      failed = true;
      EXPECT_EQ(error.error(), EIO);
      EXPECT_THROW(training.step(), IoError);
      EXPECT_THROW(training.commit(), IoError);
    }
    const bool reached = script_->requests() > first + which;
    script_->set_plan(nullptr);
    failures += failed ? 1u : 0u;
    if (failed) training.rollback(1);
    ASSERT_EQ(training.wrong(), "") << "request " << which;
    if (!reached) break;
  }
  EXPECT_GE(failures, 1u);
}

// Training goes on from the last commit when a step has lost state.
TEST_P(OptimizerCommitFaultTest, ARollbackIsAWayOnAfterAFailedStep) {
  Training training(scripted());
  training.step();
  training.commit();
  ASSERT_EQ(training.wrong(), "");
  if (training.offload().stats().resident_bytes ==
      training.offload().stats().state_bytes) {
    return;  // No step does I/O.
  }
  script_->set_plan([](std::size_t, const IoRequest& request) {
    return request.op == IoRequest::Op::kWrite ? Fault::fail(EIO) : Fault();
  });
  EXPECT_THROW(
      {
        training.step();
        training.step();
      },
      IoError);
  script_->set_plan(nullptr);
  EXPECT_THROW(training.step(), IoError);
  EXPECT_THROW(training.commit(), IoError);
  training.rollback(1);
  EXPECT_EQ(training.steps(), 1u);
  EXPECT_EQ(training.wrong(), "");
  training.step();
  training.commit();
  EXPECT_EQ(training.wrong(), "");
}

TEST_P(OptimizerCommitTest, AFullDriveRefusesBeforeAByteIsWritten) {
  test::expect_well_in_child([this]() -> std::string {
    Training training(options());
    training.step();
    if (const std::string wrong = training.wrong(); !wrong.empty())
      return wrong;
    if (!test::refuse_syscall(SYS_fallocate, ENOSPC)) {
      return test::skip("no seccomp");
    }
    // More than the file has, which grows by 16 MiB.
    const CommittedValue large{std::uint64_t{8} << 20, 4};
    bool asked = false;
    Function give([&](const StateSegment&) { asked = true; });
    try {
      training.offload().commit(1, "", {&large, 1}, give);
      return "no error";
    } catch (const IoError& error) {
      if (error.error() != ENOSPC) return error.what();
    }
    if (asked || std::filesystem::exists(file())) return "it was begun";
    training.step();  // The drive is full, and training goes on.
    return training.wrong();
  });
}

TEST_P(OptimizerCommitTest, OtherDirectoriesAreRefusedWithTheStoresOwn) {
  const std::array<test::TempDir, 3> dirs;
  const auto in = [&](std::initializer_list<std::size_t> which) {
    TileOptions with = options();
    with.store.directory = {};
    for (const std::size_t i : which) {
      with.store.directory.all().push_back({dirs[i].path()});
    }
    return with;
  };
  {
    Training training(in({0, 1}));
    training.step();
    training.commit();
  }
  const auto text_of = [&](std::initializer_list<std::size_t> which) {
    try {
      Training::resume(in(which));
    } catch (const std::invalid_argument& error) {
      return std::string(error.what());
    }
    return std::string("nothing was thrown");
  };
  const std::string first = "drive 0: " + dirs[0].path().string();
  const std::string second = ", drive 1: " + dirs[1].path().string() + ")";
  for (const std::string& text : {text_of({1, 0}), text_of({0, 2})}) {
    EXPECT_TRUE(has(text, "not in its order")) << text;
    EXPECT_TRUE(has(text, "nvme_path=")) << text;
    EXPECT_TRUE(has(text, first)) << text;
    EXPECT_FALSE(has(text, "remove that file")) << text;
  }
  EXPECT_TRUE(has(text_of({1, 0}), first + second));
  EXPECT_TRUE(has(text_of({2, 0, 1}),
                  "the store is in 2 directories, and 3 were given"));
  EXPECT_TRUE(
      has(text_of({0}), "the store is in 2 directories, and 1 was given"));
  EXPECT_TRUE(has(text_of({0}), "nvme_path="));
  // A first commit that was cut off leaves such files too.
  EXPECT_TRUE(has(text_of({1}), "remove that file"));
  EXPECT_TRUE(has(text_of({2, 1}), "remove that file"));
  EXPECT_THROW(Training::resume(in({2})), IoError);
  EXPECT_EQ(Training::resume(in({0, 1}))->wrong(), "");
}

TEST_P(OptimizerCommitTest, WhoeverMeetsAnotherRunsStoreHearsWhatToDo) {
  Training training(options());
  training.step();
  training.commit();
  Training other(options());
  other.step();
  try {
    other.commit();
    FAIL() << "a store was replaced";
  } catch (const IoError& error) {
    EXPECT_EQ(error.error(), EEXIST);
    EXPECT_TRUE(
        has(error.what(), "resume it, remove it, or give another directory"))
        << error.what();
  }
}

TEST_P(OptimizerCommitTest, ADocumentMustBeInUtf8) {
  Training training(options());
  Function give([](const StateSegment&) {});
  EXPECT_THROW(training.offload().commit(1, "\xff", {}, give),
               std::invalid_argument);
  training.step();
  training.commit();
}

TEST_P(OptimizerCommitTest, RefusesWhatCannotBe) {
  EXPECT_THROW(Training::resume(options()), IoError);
  TileOptions unchecked = options();
  unchecked.store.verify = false;
  Training training(unchecked);
  training.step();
  EXPECT_THROW(training.commit(), StateError);
  training.step();
  EXPECT_EQ(training.wrong(), "");
}

}  // namespace
}  // namespace torch_ext
