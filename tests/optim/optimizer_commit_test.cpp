#include <gtest/gtest.h>
#include <sys/syscall.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "support/child.h"
#include "support/faulty_engine.h"
#include "support/forgetful_disk.h"
#include "support/temp_dir.h"
#include "support/trials.h"
#include "torch_ext/base/error.h"
#include "torch_ext/optim/optimizer_offload.h"

namespace torch_ext {
namespace {

using test::Fault;
using test::ForgetfulDisk;

constexpr std::uint64_t kBlock = 4096;
constexpr std::uint64_t kTile = 2 * kBlock;

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

  static std::unique_ptr<Training> resume(const TileOptions& options) {
    std::unique_ptr<Training> training(new Training);
    training->offload_ = OptimizerOffload::resume(options);
    training->step_ = training->offload_->committed().step;
    for (const std::uint64_t size : kSizes) {
      training->parameters_.emplace_back(size);
    }
    Function take([&](const StateSegment& segment) {
      std::copy_n(segment.field<std::uint32_t>(0), segment.count,
                  training->parameters_[segment.parameter].begin() +
                      static_cast<std::ptrdiff_t>(segment.first));
    });
    training->offload_->read_values(take);
    return training;
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

  CommitReport commit(std::size_t keep = 1) {
    std::vector<CommittedValue> values;
    for (const std::uint64_t size : kSizes) values.push_back({size, 4});
    Function give([&](const StateSegment& segment) {
      std::copy_n(parameters_[segment.parameter].begin() +
                      static_cast<std::ptrdiff_t>(segment.first),
                  segment.count, segment.field<std::uint32_t>(0));
    });
    return offload_->commit(step_, "after " + std::to_string(step_), values,
                            give, keep);
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

  /// State and values after so many steps.
  using Arrays = std::vector<std::vector<std::uint32_t>>;
  static std::pair<Arrays, Arrays> expected(std::uint64_t steps) {
    static std::map<std::uint64_t, std::pair<Arrays, Arrays>> known;
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
  EXPECT_EQ(resumed->offload().committed().document, "after 3");
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

// Whatever the drive forgets, what is found is a whole step, and the last that
// was acknowledged or a later one; and training goes on from there.
TEST_P(OptimizerCommitTest, ACutAtAnyWriteLosesNoCommit) {
  ForgetfulDisk disk;
  std::map<std::size_t, std::uint64_t> acknowledged;
  {
    Training training(options(disk.factory()));
    for (const bool commits : {true, false, true, true, true}) {
      training.step();
      if (!commits) continue;
      training.commit();
      acknowledged[disk.events()] = training.steps();
    }
    training.step();
  }
  std::mt19937_64 random(1);
  std::size_t states = 0;
  const std::size_t draws = test::all_faults() ? 400 : test::kSanitized ? 3 : 6;
  for (std::size_t events = acknowledged.begin()->first;
       events <= disk.events(); ++events) {
    std::uint64_t least = 0;
    for (const auto& [at, step] : acknowledged) {
      if (at <= events) least = step;
    }
    for (std::size_t i = 0; i < draws; ++i) {
      const auto left = disk.after_cut(
          events, [&](const ForgetfulDisk::Unsynced&, std::size_t) {
            using Kept = ForgetfulDisk::Kept;
            if (i == 0) return Kept::kNothing;
            if (i == 1) return Kept::kAll;
            const auto drawn = random() % 8;
            return drawn == 0  ? Kept::kTorn
                   : drawn % 2 ? Kept::kAll
                               : Kept::kNothing;
          });
      ++states;
      const auto resumed = Training::resume(options(left->factory()));
      ASSERT_GE(resumed->steps(), least) << "after event " << events;
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

// Each request of a commit fails in turn.
TEST_P(OptimizerCommitFaultTest, ACommitThatFailsLosesNothing) {
  std::size_t which = 0;
  for (;; ++which) {
    std::filesystem::remove(file());
    bool steps_go_on = false;
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
      try {
        training.step();
        steps_go_on = true;
        ASSERT_EQ(training.wrong(), "") << "request " << which;
        if (!failed) training.commit();
      } catch (const IoError& error) {
        EXPECT_TRUE(failed) << error.what();
      }
      EXPECT_TRUE(steps_go_on) << "request " << which;
    }
    const auto resumed = Training::resume(options());
    EXPECT_EQ(resumed->wrong(), "") << "request " << which;
  }
  EXPECT_GT(which, 8u);
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
