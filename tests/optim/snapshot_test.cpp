// A commit as a store of its own. What it must hold is computed in memory.

#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/cut_point.h"
#include "store/commit_reader.h"
#include "store/store_check.h"
#include "store/store_copy.h"
#include "support/child.h"
#include "support/commit_training.h"
#include "support/failing_syscalls.h"
#include "support/faulty_engine.h"
#include "support/forgetful_disk.h"
#include "support/temp_dir.h"
#include "support/trials.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

using test::CommitTraining;
using test::Fault;
using test::TempDir;
using Paths = std::vector<std::filesystem::path>;
using Place = OptimizerOffload::SnapshotPlace;

DirectoryList listed(const Paths& paths) {
  std::vector<WeightedDirectory> all;
  for (const auto& path : paths) all.push_back({path});
  return all;
}

Paths files_in(const Paths& directories) {
  Paths files;
  for (std::size_t i = 0; i < directories.size(); ++i) {
    files.push_back(directories[i] / StoreName().of_file(i));
  }
  return files;
}

std::string bytes_of(const std::filesystem::path& file) {
  std::string bytes(std::filesystem::file_size(file), '\0');
  std::ifstream(file, std::ios::binary)
      .read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return bytes;
}

/// How many files are in these directories.
std::size_t count(const Paths& directories) {
  std::size_t all = 0;
  for (const auto& path : directories) {
    all += static_cast<std::size_t>(
        std::distance(std::filesystem::directory_iterator(path), {}));
  }
  return all;
}

/// Returns what is wrong with a store that must have been committed after so
/// many steps. It trains on, too.
std::string wrong_with(const Paths& directories, std::uint64_t steps) {
  const StoreReport report =
      read_store(files_in(directories), {.extents = true});
  if (!report.damage.empty()) return report.damage[0].what;
  if (report.commits.size() != 1) return "it has other commits too";
  const auto training =
      CommitTraining::resume(CommitTraining::options(directories, 5));
  if (training->steps() != steps) {
    return "it is of step " + std::to_string(training->steps());
  }
  if (std::string wrong = training->wrong(); !wrong.empty()) return wrong;
  training->step();
  training->commit();
  training->step();
  return training->wrong();
}

int error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const IoError& error) {
    return error.error();
  }
  return 0;
}

/// With so many drives.
class SnapshotTest : public testing::TestWithParam<std::size_t> {
 protected:
  SnapshotTest() {
    for (std::size_t i = 0; i < GetParam(); ++i) {
      here_.push_back(dirs_[i].path());
      there_.push_back(dirs_[2 + i].path());
    }
  }
  ~SnapshotTest() override { on_cut_point = nullptr; }

  TileOptions options(int buffers = 5) const {
    return CommitTraining::options(here_, buffers);
  }
  /// A store of three steps, which nobody owns.
  void make_store() const {
    CommitTraining training(options());
    for (int i = 0; i < 3; ++i) training.step();
    training.commit();
  }

  std::array<TempDir, 4> dirs_;
  Paths here_;
  Paths there_;
};

TEST_P(SnapshotTest, IsAStoreOfItsOwnAndTheOriginalGoesOn) {
  for (const int buffers : {3, 10, 40}) {
    CommitTraining training(options(buffers));
    for (int i = 0; i < 3; ++i) training.step();
    training.commit(2);
    training.step();
    training.commit(2);
    std::vector<std::string> before;
    for (const auto& file : files_in(here_)) before.push_back(bytes_of(file));
    const SnapshotReport report = training.offload().snapshot(listed(there_));
    for (std::size_t i = 0; i < before.size(); ++i) {
      EXPECT_TRUE(bytes_of(files_in(here_)[i]) == before[i]) << "drive " << i;
    }
    EXPECT_EQ(report.step, 4u);
    EXPECT_GE(report.bytes, 2u * 26301 * 4) << "state and values";
    training.step();
    // Both have an owner now.
    EXPECT_EQ(wrong_with(there_, 4), "");
    EXPECT_EQ(training.wrong(), "");
    training.commit();
    EXPECT_EQ(training.wrong(), "");
    EXPECT_EQ(count(there_), there_.size());
    for (std::size_t i = 0; i < there_.size(); ++i) {
      std::filesystem::remove(files_in(there_)[i]);
      std::filesystem::remove(files_in(here_)[i]);
    }
  }
}

TEST_P(SnapshotTest, ItSaysWhatTheCommitSays) {
  CommitTraining training(options());
  training.step();
  training.commit();
  training.step();
  training.commit();
  training.offload().snapshot(listed(there_));
  const StoreReport mine = read_store(files_in(here_), {});
  const StoreReport its = read_store(files_in(there_), {});
  const Commit& commit = its.commits.back().commit;
  EXPECT_EQ(commit.generation, 2u);
  EXPECT_EQ(commit.time, mine.commits.back().commit.time);
  EXPECT_EQ(commit.document, mine.commits.back().commit.document);
  EXPECT_NE(its.header.store, mine.header.store);
  EXPECT_EQ(its.header.weights, mine.header.weights);
}

TEST_P(SnapshotTest, WhileAStepIsOpenItIsTheCommit) {
  struct Nothing final : UpdateKernel {
    void update(std::span<const StateSegment> segments) override {
      for (const StateSegment& each : segments) {
        std::fill_n(each.field<std::uint32_t>(0), each.count, 99u);
      }
    }
  } kernel;
  CommitTraining training(options(3));
  training.step();
  training.commit();
  training.offload().begin_step(kernel);
  training.offload().release(0);
  training.offload().release(2);
  training.offload().snapshot(listed(there_));
  training.offload().end_step();
  EXPECT_EQ(wrong_with(there_, 1), "");
}

TEST_P(SnapshotTest, AStoreThatIsThereIsNotReplaced) {
  make_store();
  const auto training = CommitTraining::resume(options());
  OptimizerOffload& offload = training->offload();
  EXPECT_EQ(offload.look_at_snapshot(listed(there_)), Place::kFree);
  offload.snapshot(listed(there_));
  EXPECT_EQ(offload.look_at_snapshot(listed(there_)), Place::kSnapshot);
  EXPECT_EQ(offload.look_at_snapshot(listed(here_)), Place::kOther);
  const std::string before = bytes_of(files_in(there_)[0]);
  for (const Paths& paths : {there_, here_}) {
    EXPECT_EQ(error_of([&] { offload.snapshot(listed(paths)); }), EEXIST);
  }
  EXPECT_TRUE(bytes_of(files_in(there_)[0]) == before);
  // Where there are several drives, another file may have one name only.
  for (const auto& file : files_in(there_)) std::filesystem::remove(file);
  std::ofstream(files_in(there_).back()) << "somebody's";
  EXPECT_EQ(offload.look_at_snapshot(listed(there_)), Place::kOther);
  EXPECT_EQ(error_of([&] { offload.snapshot(listed(there_)); }), EEXIST);
  EXPECT_EQ(bytes_of(files_in(there_).back()), "somebody's");
  EXPECT_EQ(training->wrong(), "");
}

// resume() would go on from the store of another epoch, world or drive.
TEST_P(SnapshotTest, AnotherStoreIsRefusedWhateverItsEpochAndWorld) {
  make_store();
  const auto training = CommitTraining::resume(options());
  OptimizerOffload& offload = training->offload();
  for (const StoreName& name :
       {StoreName{.epoch = 1}, StoreName{.rank = 1, .world = 2},
        StoreName{.world = 2, .epoch = 4}, StoreName{}}) {
    for (const auto& directory : there_) {
      // The snapshot's own name is that of a drive too many.
      const auto file = directory / name.of_file(name == StoreName() ? 7 : 0);
      std::ofstream(file) << "somebody's";
      EXPECT_EQ(offload.look_at_snapshot(listed(there_)), Place::kOther);
      for (const bool makes : {true, false}) {
        try {
          if (makes) {
            offload.snapshot(listed(there_));
          } else {
            offload.refuse_others_at_snapshot(listed(there_));
          }
          FAIL() << file;
        } catch (const IoError& error) {
          EXPECT_EQ(error.error(), EEXIST);
          EXPECT_EQ(error.failure().path, file.string());
          EXPECT_NE(std::string(error.what()).find("remove it, or give"),
                    std::string::npos);
        }
      }
      EXPECT_EQ(count(there_), 1u);
      std::filesystem::remove(file);
    }
  }
  // Nobody takes these for stores.
  for (const char* name :
       {"state.r0-of-1.e1.d0.store.old", "state.store",
        "other.r0-of-1.e1.d0.store", "state.r0-of-1.e01.d0.store"}) {
    std::ofstream(there_[0] / name) << "somebody's";
  }
  offload.snapshot(listed(there_));
  EXPECT_EQ(wrong_with(there_, 3), "");
}

TEST_P(SnapshotTest, WhatCannotBeIsRefused) {
  CommitTraining training(options());
  training.step();
  EXPECT_THROW(training.offload().snapshot(listed(there_)), StateError);
  training.commit();
  Paths more = there_;
  more.push_back(dirs_[0].path());
  EXPECT_THROW(training.offload().snapshot(listed(more)),
               std::invalid_argument);
  EXPECT_THROW(training.offload().snapshot(listed({})), std::invalid_argument);
  DirectoryList heavy = listed(there_);
  if (there_.size() == 2) {
    heavy.all()[0].weight = 3;
    EXPECT_THROW(training.offload().snapshot(heavy), std::invalid_argument);
  }
  Paths missing = there_;
  missing.back() = there_[0] / "missing";
  EXPECT_EQ(error_of([&] { training.offload().snapshot(listed(missing)); }),
            ENOENT);
  EXPECT_EQ(count(there_), 0u);
}

TEST_P(SnapshotTest, ADamagedTileIsAnErrorAndNothingIsThere) {
  make_store();
  const StoreReport report = read_store(files_in(here_), {});
  const Commit& commit = report.commits.back().commit;
  const auto& extent = commit.extents[2];
  std::size_t drive = 0;
  while (extent->place().offsets[drive] == ::torch_ext::Place::kNowhere) {
    ++drive;
  }
  {
    std::fstream file(files_in(here_)[drive],
                      std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(extent->offset(drive)) + 100);
    file.put('x');
  }
  const auto offload = OptimizerOffload::resume(options());
  EXPECT_EQ(error_of([&] { offload->snapshot(listed(there_)); }), EIO);
  EXPECT_EQ(count(there_), 0u);
}

TEST_P(SnapshotTest, AFullDriveRefusesBeforeAByte) {
  if (geteuid() != 0) GTEST_SKIP() << "mounting a tmpfs needs root";
  make_store();
  const std::string wrong = test::in_child([&]() -> std::string {
    if (!test::own_mounts()) return "";
    // It is smaller than the head and 26 tiles.
    if (mount("small", there_.back().c_str(), "tmpfs", 0, "size=96k") != 0) {
      return "mount";
    }
    auto script = std::make_shared<test::FaultScript>();
    TileOptions how = options();
    how.store.engine_factory = test::faulty_factory("threads", script);
    const auto training = CommitTraining::resume(how);
    const std::size_t before = script->requests();
    const int error =
        error_of([&] { training->offload().snapshot(listed(there_)); });
    if (error != ENOSPC) return "error " + std::to_string(error);
    if (script->requests() != before) return "something was written";
    if (count(there_) != 0) return "something is there";
    umount2(there_.back().c_str(), MNT_DETACH);
    training->offload().snapshot(listed(there_));
    return training->wrong();
  });
  EXPECT_EQ(wrong, "");
  EXPECT_EQ(wrong_with(there_, 3), "");
}

/// The points that a snapshot passes. A child is killed at one of them.
struct Points {
  static std::vector<std::string>& seen() {
    static std::vector<std::string> all;
    return all;
  }
  static inline std::mutex mutex;
  static inline std::size_t kill_at = 0;

  static void see(std::string_view name) {
    const std::lock_guard lock(mutex);
    seen().emplace_back(name);
    if (seen().size() != kill_at) return;
    kill(getpid(), SIGKILL);
    while (true) pause();
  }
};

TEST_P(SnapshotTest, AKillAtAnyPointLeavesAWholeOneOrNone) {
  make_store();
  std::vector<std::string> points;
  {
    const auto training = CommitTraining::resume(options());
    Points::seen().clear();
    Points::kill_at = 0;
    on_cut_point = Points::see;
    training->offload().snapshot(listed(there_));
    on_cut_point = nullptr;
    points = Points::seen();
    for (const auto& file : files_in(there_)) std::filesystem::remove(file);
  }
  std::size_t kills = 0;
  std::size_t unfinished = 0;
  for (std::size_t i = 1; i <= points.size(); ++i) {
    const bool is_write = points[i - 1].starts_with("write ");
    if (is_write && !test::all_faults() && i % 23 != 0) continue;
    const pid_t child = fork();
    if (child == 0) {
      try {
        const auto training = CommitTraining::resume(options());
        Points::seen().clear();
        Points::kill_at = i;
        on_cut_point = Points::see;
        training->offload().snapshot(listed(there_));
      } catch (...) {
        _exit(3);
      }
      _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    // Reads and writes may end in another order.
    ASSERT_TRUE(WIFSIGNALED(status)) << i << ": " << points[i - 1];
    ++kills;
    const auto training = CommitTraining::resume(options());
    ASSERT_EQ(training->wrong(), "") << points[i - 1];
    const Place left = training->offload().look_at_snapshot(listed(there_));
    if (left == Place::kSnapshot) {
      ASSERT_EQ(wrong_with(there_, 3), "") << points[i - 1];
      for (const auto& file : files_in(there_)) std::filesystem::remove(file);
    } else {
      ASSERT_NE(left, Place::kOther) << points[i - 1];
      ASSERT_FALSE(std::filesystem::exists(files_in(there_)[0]));
    }
    if (left == Place::kUnfinished) {
      // It may be a whole one whose first file is elsewhere.
      ++unfinished;
      ASSERT_EQ(error_of([&] { training->offload().snapshot(listed(there_)); }),
                EEXIST)
          << points[i - 1];
      for (const auto& file : files_in(there_)) std::filesystem::remove(file);
    }
    ASSERT_NO_THROW(training->offload().snapshot(listed(there_)))
        << points[i - 1];
    ASSERT_EQ(count(there_), there_.size());
    ASSERT_EQ(wrong_with(there_, 3), "") << points[i - 1];
    for (const auto& file : files_in(there_)) std::filesystem::remove(file);
  }
  std::printf("%zu kills, %zu of them between two names\n", kills, unfinished);
  EXPECT_EQ(unfinished > 0, there_.size() > 1);
}

// Each request fails in turn, of reads and of writes.
TEST_P(SnapshotTest, ARequestThatFailsLeavesNothing) {
  make_store();
  auto script = std::make_shared<test::FaultScript>();
  TileOptions how = options();
  how.store.engine_factory = test::faulty_factory("threads", script);
  const auto training = CommitTraining::resume(how);
  std::size_t failures = 0;
  const std::size_t step = test::all_faults() ? 1 : 3;
  for (const int error : {EIO, ENOSPC}) {
    for (std::size_t which = 0;; which += step) {
      const std::size_t first = script->requests();
      script->set_plan(test::only(first + which, Fault::fail(error)));
      const int raised =
          error_of([&] { training->offload().snapshot(listed(there_)); });
      const bool reached = script->requests() > first + which;
      script->set_plan(nullptr);
      ASSERT_TRUE(raised == 0 || raised == error) << raised;
      if (raised != 0) {
        ++failures;
        ASSERT_EQ(count(there_), 0u) << "request " << which;
      } else {
        ASSERT_EQ(wrong_with(there_, 3), "") << "request " << which;
        for (const auto& file : files_in(there_)) std::filesystem::remove(file);
      }
      if (!reached) break;
    }
  }
  EXPECT_GT(failures, 20u);
  EXPECT_EQ(training->wrong(), "");
  training->offload().snapshot(listed(there_));
  EXPECT_EQ(wrong_with(there_, 3), "");
}

TEST_P(SnapshotTest, ASystemCallThatFailsLeavesNothing) {
  const test::SyscallTrial probe = test::try_syscall(
      {.number = SYS_statx, .error = EIO}, [](const auto&) { return ""; });
  if (!probe.unavailable.empty()) GTEST_SKIP() << probe.unavailable;
  make_store();
  std::size_t failed = 0;
  const std::size_t stride = test::all_faults() ? 1 : 5;
  for (const long number : {SYS_linkat, SYS_fsync, SYS_fallocate, SYS_openat,
                            SYS_ioctl, SYS_fcntl, SYS_flock, SYS_fstatfs}) {
    for (std::size_t index = 0;; index += stride) {
      const test::SyscallTrial trial = test::try_syscall(
          {.number = number, .error = EIO, .index = index},
          [&](const auto& repair) -> std::string {
            std::unique_ptr<CommitTraining> training;
            try {
              training = CommitTraining::resume(options());
            } catch (const std::exception&) {
              return "";  // That is not what is tried here.
            }
            const int error =
                error_of([&] { training->offload().snapshot(listed(there_)); });
            repair();
            if (error != 0 && count(there_) != 0) {
              return "after an error something is there";
            }
            if (std::string wrong = training->wrong(); !wrong.empty()) {
              return wrong;
            }
            if (error != 0) training->offload().snapshot(listed(there_));
            return wrong_with(there_, 3);
          });
      ASSERT_TRUE(trial.ended_well) << number << ", " << index;
      ASSERT_EQ(trial.text, "") << number << ", " << index;
      for (const auto& file : files_in(there_)) std::filesystem::remove(file);
      failed += trial.failed;
      if (trial.failed == 0) break;
    }
  }
  EXPECT_GT(failed, 10u);
}

// When a file gets its name, a power cut that takes all that was not flushed
// must leave a whole snapshot.
TEST_P(SnapshotTest, WhatHasANameIsOnTheDrive) {
  test::ForgetfulDisk disk;
  TileOptions how = options();
  how.store.engine_factory = disk.factory();
  static const test::ForgetfulDisk* looked_at;
  static std::size_t linked;
  looked_at = &disk;
  linked = 0;
  {
    CommitTraining training(how);
    training.step();
    training.commit();
    on_cut_point = [](std::string_view name) {
      if (name == "linked" && linked == 0) linked = looked_at->events();
    };
    training.offload().snapshot(listed(there_));
    on_cut_point = nullptr;
  }
  ASSERT_GT(linked, 0u);
  const auto left = disk.after_cut(linked, [](const auto&, std::size_t) {
    return test::ForgetfulDisk::Kept::kNothing;
  });
  TileOptions again = CommitTraining::options(there_, 5);
  again.store.engine_factory = left->factory();
  const auto training = CommitTraining::resume(again);
  EXPECT_EQ(training->steps(), 1u);
  EXPECT_EQ(training->wrong(), "");
}

INSTANTIATE_TEST_SUITE_P(Drives, SnapshotTest, testing::Values(1, 2),
                         [](const auto& info) {
                           return std::to_string(info.param);
                         });

// Processes that make theirs together. Each has a store of its own.
TEST(SnapshotGroupTest, IfAnotherProcessFailsThereIsNone) {
  const std::array<TempDir, 2> dirs;
  CommitTraining training(CommitTraining::options({dirs[0].path()}, 5));
  training.step();
  training.commit();
  const DirectoryList there = dirs[1].path();
  std::vector<bool> told;
  SnapshotGroup group{.place = "both",
                      .vote = [&](const std::exception_ptr& error) {
                        told.push_back(error == nullptr);
                        return false;
                      }};
  EXPECT_THROW(training.offload().snapshot(there, group), StateError);
  EXPECT_EQ(told, std::vector<bool>{true});
  EXPECT_EQ(count({dirs[1].path()}), 0u);
  // What it cannot make, it says to the others.
  const DirectoryList missing = dirs[1].path() / "missing";
  EXPECT_THROW(training.offload().snapshot(missing, group), IoError);
  EXPECT_EQ(told, (std::vector<bool>{true, false}));
  group.vote = [](const auto& error) { return error == nullptr; };
  training.offload().snapshot(there, group);
  EXPECT_EQ(wrong_with({dirs[1].path()}, 1), "");
  // Another group's is not this one's.
  EXPECT_EQ(training.offload().look_at_snapshot(there), Place::kOther);
  EXPECT_EQ(training.offload().look_at_snapshot(there, group),
            Place::kSnapshot);
  // The others have none: theirs was killed. But somebody has gone on from it.
  group.replace = true;
  EXPECT_EQ(error_of([&] { training.offload().snapshot(there, group); }),
            EEXIST);
  EXPECT_EQ(training.offload().look_at_snapshot(there, group),
            Place::kSnapshot);
  std::filesystem::remove(files_in({dirs[1].path()})[0]);
  training.offload().snapshot(there, group);
  {
    const auto user =
        CommitTraining::resume(CommitTraining::options({dirs[1].path()}, 5));
    EXPECT_EQ(error_of([&] { training.offload().snapshot(there, group); }),
              EAGAIN);
  }
  training.step();
  training.commit();
  training.offload().snapshot(there, group);
  EXPECT_EQ(wrong_with({dirs[1].path()}, 2), "");
}

TEST(SnapshotGroupTest, ThoseOfOtherProcessesAreNotInTheWay) {
  const std::array<TempDir, 2> dirs;
  TileOptions options = CommitTraining::options({dirs[0].path()}, 5);
  options.name = {.rank = 1, .world = 2, .epoch = 3};
  CommitTraining training(options);
  training.step();
  training.commit();
  const auto file_of = [&](const StoreName& name) {
    return dirs[1] / name.of_file(0);
  };
  const StoreName older{.rank = 0, .world = 2, .epoch = 2};
  std::ofstream(file_of(older)) << "another run's";
  EXPECT_EQ(error_of([&] { training.offload().snapshot(dirs[1].path()); }),
            EEXIST);
  std::filesystem::rename(file_of(older),
                          file_of({.rank = 0, .world = 2, .epoch = 3}));
  training.offload().snapshot(dirs[1].path());
  EXPECT_TRUE(std::filesystem::exists(file_of(options.name)));
}

}  // namespace
}  // namespace torch_ext
