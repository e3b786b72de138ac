// Fails the first request of a commit, then the second, and so on until there
// is none left to fail. So too of a first commit, a resume, a rollback and a
// snapshot. Each fails with each errno, once and for good, short or refused.
//
// The operation has then ended well, or has thrown an IoError. Either way the
// last commit is whole, and training goes on where it may.

#include <gtest/gtest.h>
#include <sys/syscall.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "support/commit_training.h"
#include "support/failing_syscalls.h"
#include "support/fault_kinds.h"
#include "support/faulty_engine.h"
#include "support/forgetful_disk.h"
#include "support/temp_dir.h"
#include "support/trials.h"
#include "torch_ext/base/error.h"
#include "torch_ext/optim/optimizer_offload.h"

namespace torch_ext {
namespace {

using test::CommitTraining;
using test::Fault;
using test::FaultKind;
using test::FaultScript;
using test::ForgetfulDisk;
using Paths = std::vector<std::filesystem::path>;

enum class Operation { kFirst, kCommit, kResume, kRollback, kSnapshot };

constexpr std::array kOperations = {
    std::pair{Operation::kFirst, "first commit"},
    std::pair{Operation::kCommit, "commit"},
    std::pair{Operation::kResume, "resume"},
    std::pair{Operation::kRollback, "rollback"},
    std::pair{Operation::kSnapshot, "snapshot"},
};

/// How many buffers there are for 13 tiles, and how many drives.
struct Size {
  int buffers;
  std::size_t drives;
};
constexpr std::array kSizes = {Size{3, 1}, Size{10, 2}, Size{40, 1}};

/// What is known of the drive when the operation has ended.
struct Known {
  std::uint64_t acknowledged = 0;  ///< The step of the last commit; 0: none.
  std::uint64_t begun = 0;         ///< That of the last one that was tried.
  bool unsure = false;             ///< Either of them may be there.
};

/// A training, and an operation of it that may fail.
class Use {
 public:
  Use(Operation operation, const Size& size)
      : operation_(operation), size_(size) {
    for (std::size_t i = 0; i < size_.drives; ++i) {
      here_.push_back(dirs_.emplace_back().path());
    }
    if (operation_ != Operation::kSnapshot) return;
    for (std::size_t i = 0; i < size_.drives; ++i) {
      there_.push_back(dirs_.emplace_back().path());
    }
  }

  TileOptions options(const std::string& engine,
                      IoEngineFactory factory = {}) const {
    TileOptions options = CommitTraining::options(here_, size_.buffers, engine);
    options.store.engine_factory = std::move(factory);
    return options;
  }

  /// Goes as far as the operation.
  void prepare(const TileOptions& options) {
    options_ = options;
    training_ = std::make_unique<CommitTraining>(options);
    training_->step();
    if (operation_ != Operation::kFirst) {
      training_->commit(2);
      known_.acknowledged = 1;
      training_->step();
    }
    if (operation_ == Operation::kResume ||
        operation_ == Operation::kRollback) {
      training_->commit(2);
      known_.acknowledged = 2;
    }
    if (operation_ == Operation::kRollback) training_->step();
    // So that what the steps write is not part of the operation.
    const std::string wrong = training_->wrong();
    if (!wrong.empty()) throw std::runtime_error("before: " + wrong);
    known_.begun = training_->steps();
    if (operation_ == Operation::kResume) training_.reset();
  }

  /// Returns its errno, or 0. Exceptions: those that are no IoError.
  int attempt() {
    error_ = error_of([this] {
      switch (operation_) {
        case Operation::kFirst:
        case Operation::kCommit:
          return training_->commit(2);
        case Operation::kResume:
          training_ = CommitTraining::resume(options_);
          return;
        case Operation::kRollback:
          return training_->rollback(1);
        case Operation::kSnapshot:
          training_->offload().snapshot(listed(there_));
      }
    });
    return error_;
  }

  /// What may be after the fault is gone.
  struct May {
    bool stop = false;    ///< Nobody knows which commit the drive has.
    bool refuse = false;  ///< A flush has failed: no further commits.
    bool lost = false;    ///< The engine is gone: the object is of no use.
    bool half = false;    ///< A read of the next step has failed.
    bool named = false;   ///< A file has got its name, and the call has failed.
  };

  /// Looks at all that the operation has left. `clean`: options for another
  /// process. Returns what is wrong.
  std::string afterwards(const May& may, const TileOptions& clean) {
    std::string wrong = look(may, clean);
    if (!wrong.empty()) return wrong;
    if (training_ != nullptr && !may.lost) wrong = train_on(may);
    if (!wrong.empty()) return wrong;
    known_.unsure = known_.unsure || may.lost;
    training_.reset();
    return resume(clean);
  }

  std::size_t count_there() const {
    std::size_t all = 0;
    for (const auto& path : there_) {
      for ([[maybe_unused]] const auto& entry :
           std::filesystem::directory_iterator(path)) {
        ++all;
      }
    }
    return all;
  }

 private:
  template <typename Call>
  static int error_of(Call call) {
    try {
      call();
    } catch (const IoError& error) {
      return error.error() > 0 ? error.error() : -1;
    }
    return 0;
  }

  static DirectoryList listed(const Paths& paths) {
    std::vector<WeightedDirectory> all;
    for (const auto& path : paths) all.push_back({path});
    return all;
  }

  bool is_named() const {
    return std::filesystem::exists(here_[0] / StoreName().of_file(0));
  }

  /// What is special about each operation.
  std::string look(const May& may, const TileOptions& clean) {
    switch (operation_) {
      case Operation::kFirst:
      case Operation::kCommit:
        if (error_ == 0) known_.acknowledged = known_.begun;
        if (error_ != 0 && operation_ == Operation::kFirst && is_named()) {
          known_.unsure = true;
          if (!may.named) return "a file of a commit that failed has a name";
        }
        return "";
      case Operation::kResume: {
        if (training_ == nullptr) return "";
        const std::uint64_t step = training_->steps();
        // A root that cannot be read may be one that a power cut has torn.
        const bool is_older =
            step == 1 && !training_->offload().notes().empty();
        return step == 2 || is_older ? "" : "it went on from another step";
      }
      case Operation::kRollback:
        if (error_ == 0 || may.lost) return "";
        if (error_of([this] { training_->step(); }) == 0) {
          return "a step was made from half a rollback";
        }
        training_->take_back();
        training_->rollback(1);
        return training_->steps() == 1 ? "" : "it is at another step";
      case Operation::kSnapshot:
        return look_at_snapshot(may, clean);
    }
    return "";
  }

  std::string look_at_snapshot(const May& may, const TileOptions& clean) {
    if (error_ != 0) {
      if (count_there() != 0) return "a snapshot that failed has left a file";
      if (may.lost) return "";
      training_->offload().snapshot(listed(there_));
    }
    TileOptions options = clean;
    options.store.directory = listed(there_);
    const auto copy = CommitTraining::resume(options);
    if (copy->steps() != 1) return "the snapshot is of another step";
    return copy->wrong();
  }

  /// Steps and commits where the operation has left the training.
  std::string train_on(const May& may) {
    // A read ahead that failed is made again, by the next call.
    if (error_of([this] { training_->step(); }) != 0) {
      training_->take_back();
      if (error_of([this] { training_->step(); }) != 0) {
        training_->take_back();
        known_.unsure = may.stop;
        if (may.stop) return "";
        // It may have failed in the midst of the step.
        if (!may.half) return "training does not go on";
        if (training_->offload().commits().empty()) return "";
        training_->rollback(training_->generation());
        training_->step();
      }
    }
    if (std::string wrong = training_->wrong(); !wrong.empty()) return wrong;
    if (error_of([this] { training_->commit(2); }) != 0) {
      return may.refuse ? "" : "there are no further commits";
    }
    known_.acknowledged = known_.begun = training_->steps();
    return training_->wrong();
  }

  /// Another process finds the last commit, and goes on.
  std::string resume(const TileOptions& clean) const {
    std::unique_ptr<CommitTraining> training;
    if (known_.acknowledged == 0 && !(known_.unsure && is_named())) {
      if (is_named()) return "there is a file that nobody was told of";
      training = std::make_unique<CommitTraining>(clean);
    } else {
      training = CommitTraining::resume(clean);
      const std::uint64_t step = training->steps();
      if (step != known_.acknowledged &&
          !(known_.unsure && step == known_.begun)) {
        return "step " + std::to_string(step) + " was found, not " +
               std::to_string(known_.acknowledged);
      }
      if (std::string wrong = training->wrong(); !wrong.empty()) return wrong;
    }
    training->step();
    training->commit();
    return training->wrong();
  }

  const Operation operation_;
  const Size size_;
  std::vector<test::TempDir> dirs_;
  Paths here_;
  Paths there_;
  TileOptions options_;
  std::unique_ptr<CommitTraining> training_;
  int error_ = 0;
  Known known_;
};

bool is_root(const IoRequest& request) {
  return request.op == IoRequest::Op::kWrite &&
         (request.offset == 64u << 10 || request.offset == 128u << 10);
}

/// What a plan has met. Threads: any.
struct Met {
  std::atomic<bool> any = false;
  std::atomic<bool> sync = false;
  std::atomic<bool> read = false;
  std::atomic<bool> root = false;  ///< Written or flushed.
};

/// One trial: the fault, at request or poll `index`. False if none was hit.
bool try_fault(const std::pair<Operation, const char*>& operation,
               const Size& size, const std::string& engine,
               const FaultKind& kind, std::size_t index, test::Tally& tally) {
  const std::string name = std::string(operation.second) + " on " + engine +
                           " with " + std::to_string(size.buffers) +
                           " buffers, " + kind.name + ", number " +
                           std::to_string(index);
  const auto script = std::make_shared<FaultScript>();
  const auto met = std::make_shared<Met>();
  ForgetfulDisk disk;  // Where no engine is meant, bytes stay in memory.
  const bool in_memory = engine == "memory";
  const IoEngineFactory inner =
      in_memory ? disk.factory() : make_engine_factory(engine);
  int error = 0;
  std::string wrong;
  try {
    Use use(operation.first, size);
    use.prepare(use.options("threads", test::faulty_factory(inner, script)));
    if (kind.polls > 0) {
      script->fail_polls(kind.polls, index);
    } else {
      const std::size_t first = script->requests() + index;
      script->set_plan([=](std::size_t i, const IoRequest& request) {
        if (kind.for_good ? i < first : i != first) return Fault();
        met->any = true;
        if (request.op == IoRequest::Op::kSync) met->sync = true;
        if (is_root(request)) met->root = true;
        if (request.op == IoRequest::Op::kRead) met->read = true;
        return test::fault_of(kind, request);
      });
    }
    error = use.attempt();
    script->set_plan(nullptr);
    script->fail_polls(0);
    const bool survives = kind.survives && !(met->sync && kind.error != 0);
    if (survives && error != 0) {
      wrong = "an error, though it could have been tried again";
    } else if (met->sync && kind.error != 0 && error == 0) {
      wrong = "nobody was told of a sync that failed";
    } else if (error != 0 && kind.error != 0 && error != kind.error &&
               !kind.tries_patience &&
               !(operation.first == Operation::kResume && error == EIO)) {
      wrong = "it is another error: " + errno_name(error);
    } else {
      wrong =
          use.afterwards({.stop = kind.for_good && (met->root || met->sync),
                          .refuse = met->sync,
                          // Polls that fail for good cost the engine.
                          .lost = script->failed_polls() >= 100,
                          // Whatever waits behind a request that the
                          // kernel refuses may run out of patience too.
                          .half = met->read || kind.refusals == test::kForGood},
                         use.options("threads", inner));
    }
  } catch (const std::exception& exception) {
    wrong = std::string("exception: ") + exception.what();
  }
  if (!met->any && script->failed_polls() == 0) {
    EXPECT_EQ(error, 0) << name;
    EXPECT_EQ(wrong, "") << name;
    return false;
  }
  tally.add(name, error != 0, wrong);
  return true;
}

class CommitRequestFaults : public testing::TestWithParam<const char*> {};

TEST_P(CommitRequestFaults, LeaveTheLastCommitWhole) {
  const std::string engine = GetParam();
  const std::string reason =
      engine == "memory" ? "" : engine_unavailable_reason(engine);
  if (!reason.empty()) GTEST_SKIP() << reason;
  const bool all = test::all_faults();
  const bool in_memory = engine == "memory";
  test::Tally tally;
  test::Jobs jobs;
  std::size_t number = 0;
  for (const bool patient : {true, false}) {  // The longest first.
    for (const FaultKind& kind : test::fault_kinds()) {
      if (kind.tries_patience != patient) continue;
      // The disk in memory moves whole blocks only.
      const bool is_short = kind.error == 0 && kind.refusals + kind.polls == 0;
      if (in_memory && is_short && kind.transfer < 32u << 10) continue;
      for (const auto& operation : kOperations) {
        for (const Size& size : kSizes) {
          ++number;
          // The short form leaves out jobs and requests evenly. What tries the
          // library's patience takes seconds: one request of some will do.
          const std::size_t spread = number + number / 3 + number / 15;
          if (patient && !all && (!in_memory || number % 15 != 0)) continue;
          if (!patient && !all && spread % (in_memory ? 3 : 41) != 0) continue;
          const std::size_t stride = patient            ? 7
                                     : all              ? (in_memory ? 2 : 13)
                                     : test::kSanitized ? 97
                                     : in_memory        ? 8
                                                        : 31;
          jobs.add(engine + ", " + operation.second + ", " + kind.name,
                   [=, &tally, index = number % stride]() mutable {
                     const bool hit =
                         try_fault(operation, size, engine, kind, index, tally);
                     index += stride;
                     return hit && !(patient && !all);
                   });
        }
      }
    }
  }
  jobs.run(all ? 16 : 8);
  std::printf("[  FAULTS  ] commits on %s: %s\n", engine.c_str(),
              tally.text().c_str());
  RecordProperty("faults", static_cast<int>(tally.trials()));
  for (const std::string& broken : tally.broken()) ADD_FAILURE() << broken;
  if (!test::kSanitized) {
    EXPECT_GT(tally.trials(), all ? 2500u : in_memory ? 1800u : 20u);
  }
}

INSTANTIATE_TEST_SUITE_P(Engines, CommitRequestFaults,
                         testing::Values("libaio", "io_uring", "threads",
                                         "memory"),
                         [](const auto& info) {
                           return std::string(info.param);
                         });

/// One trial in a process of its own: system call `index` of a kind fails.
/// False if there was none.
bool try_call(const std::pair<Operation, const char*>& operation,
              const Size& size, const std::pair<const char*, long>& call,
              int error, bool for_good, std::size_t index, test::Tally& tally) {
  constexpr std::string_view kEarly = "early";
  const test::SyscallTrial trial = test::try_syscall(
      {call.second, error, index, for_good},
      [&](const std::function<void()>& repair) -> std::string {
        Use use(operation.first, size);
        const TileOptions options = use.options("threads");
        try {
          use.prepare(options);
        } catch (const std::exception&) {
          return std::string(kEarly);  // That is not what is tried here.
        }
        const bool failed = use.attempt() != 0;
        repair();
        const std::string wrong = use.afterwards(
            {.stop = for_good, .refuse = true, .half = true, .named = true},
            options);
        return (failed ? "1" : "0") + wrong;
      });
  const std::string name = std::string(operation.second) + ", " + call.first +
                           " number " + std::to_string(index) + " " +
                           errno_name(error) + (for_good ? " for good" : "");
  if (!trial.unavailable.empty()) {
    tally.add(name, 0, trial.unavailable);
    return false;
  }
  if (trial.text == kEarly) return true;
  const bool told = trial.ended_well && !trial.text.empty();
  const std::string wrong = told ? trial.text.substr(1) : trial.text;
  if (trial.failed == 0) {
    EXPECT_TRUE(told && wrong.empty()) << name << ": " << wrong;
    return false;
  }
  tally.add(name, !told || trial.text[0] == '1',
            told ? wrong : "the process: " + trial.text);
  return true;
}

TEST(CommitSyscallFaults, LeaveTheLastCommitWhole) {
  const test::SyscallTrial probe = test::try_syscall(
      {.number = SYS_statx, .error = EIO}, [](const auto&) { return ""; });
  if (!probe.unavailable.empty()) GTEST_SKIP() << probe.unavailable;
  constexpr std::array<std::pair<const char*, long>, 11> kCalls = {{
      {"openat", SYS_openat},
      {"linkat", SYS_linkat},
      {"fsync", SYS_fsync},
      {"fallocate", SYS_fallocate},
      {"ftruncate", SYS_ftruncate},
      {"flock", SYS_flock},
      {"fcntl", SYS_fcntl},
      {"newfstatat", SYS_newfstatat},
      {"fstatfs", SYS_fstatfs},
      {"pread64", SYS_pread64},
      {"pwrite64", SYS_pwrite64},
  }};
  const bool all = test::all_faults();
  const std::size_t stride = all ? 1 : test::kSanitized ? 97 : 13;
  test::Tally tally;
  test::Jobs jobs;
  std::size_t number = 0;
  for (const auto& call : kCalls) {
    for (const int error : {EIO, ENOSPC, EINTR}) {
      for (const bool for_good : {false, true}) {
        // Nobody interrupts a call for good.
        if (error == EINTR && for_good) continue;
        for (const auto& operation : kOperations) {
          const Size& size = kSizes[number % 2];
          ++number;
          const std::size_t spread = number + number / 5;
          if (!all && spread % 4 != 0) continue;
          jobs.add(std::string(operation.second) + ", " + call.first,
                   [=, &tally, index = number % stride]() mutable {
                     const bool hit = try_call(operation, size, call, error,
                                               for_good, index, tally);
                     index += stride;
                     return hit;
                   });
        }
      }
    }
  }
  test::kSanitized ? jobs.run_here() : jobs.run(4);
  std::printf("[  FAULTS  ] commits, system calls: %s\n", tally.text().c_str());
  RecordProperty("faults", static_cast<int>(tally.trials()));
  for (const std::string& broken : tally.broken()) ADD_FAILURE() << broken;
  EXPECT_GT(tally.trials(), test::kSanitized ? 5u : 40u);
}

}  // namespace
}  // namespace torch_ext
