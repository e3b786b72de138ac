// Fails the first call of a system call, then the second, and so on until there
// is none left to fail. It does so below everything, whatever library makes the
// call, on whatever thread. Each trial has a process of its own, so that one
// that aborts or hangs is seen.

#include <gtest/gtest.h>
#include <sys/syscall.h>

#include <cerrno>
#include <cstdio>
#include <string>
#include <vector>

#include "support/failing_syscalls.h"
#include "support/fault_workloads.h"
#include "support/temp_dir.h"
#include "support/trials.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

using test::Outcome;
using test::Workload;

bool is_transient(int error) {
  return error == EINTR || error == EAGAIN || error == ENOMEM ||
         error == ECANCELED;
}

struct Call {
  const char* name;
  long number;
  /// The engine that makes it; empty: all.
  const char* engine = "";
  /// Waits for completions: failing for good, it costs the engine.
  bool waits = false;
  /// Empty: all of kErrors.
  std::vector<int> errors = {};
};

const std::vector<int> kErrors = {
    EIO,    ENOSPC, EAGAIN, EINTR,     ENOMEM,    EDQUOT,    EROFS,
    ENODEV, EBADF,  EPERM,  ETIMEDOUT, ECANCELED, EINVAL,    ENOSYS,
    EACCES, EMFILE, EFBIG,  EFAULT,    EBUSY,     EOPNOTSUPP};

const std::vector<Call>& calls() {
  static const std::vector<Call> all = {
      {"openat", SYS_openat},
      {"fcntl", SYS_fcntl},
      {"fallocate", SYS_fallocate},
      {"ftruncate", SYS_ftruncate},
      {"newfstatat", SYS_newfstatat},
      {"statx", SYS_statx},
      {"statfs", SYS_fstatfs},
      {"fchmod", SYS_fchmod},
      {"madvise", SYS_madvise},
      {"clone3", SYS_clone3, "", false, {EAGAIN, ENOMEM, EPERM}},
      {"mmap", SYS_mmap, "", false, {ENOMEM}},
      {"io_setup", SYS_io_setup, "libaio"},
      {"io_submit", SYS_io_submit, "libaio"},
      {"io_getevents", SYS_io_getevents, "libaio", true},
      {"memfd_create", SYS_memfd_create, "libaio"},
      {"io_uring_setup", SYS_io_uring_setup, "io_uring"},
      {"io_uring_enter", SYS_io_uring_enter, "io_uring", true},
      {"eventfd2", SYS_eventfd2, "io_uring"},
      {"pread64", SYS_pread64, "threads"},
      {"pwrite64", SYS_pwrite64, "threads"},
  };
  return all;
}

/// The short form makes one job of so many. A process with a sanitizer takes
/// long to fork.
constexpr std::size_t kShare = test::kSanitized ? 151 : 13;
constexpr std::size_t kFewest = test::kSanitized ? 5 : 200;
constexpr bool kForksFromThreads = !test::kSanitized;

struct Trial {
  const Workload& workload;
  std::string engine;
  const Call& call;
  int error;
  bool for_good;

  std::string name(std::size_t index) const {
    return std::string(workload.name) + " on " + engine + ", " + call.name +
           " number " + std::to_string(index) + " " + errno_name(error) +
           (for_good ? " for good" : " once");
  }
};

std::string text_of(const Outcome& outcome) {
  return std::to_string(outcome.errors) + " errors: " + outcome.wrong;
}

/// False if there was no call to fail.
bool try_trial(const Trial& trial, std::size_t index, test::Tally& tally) {
  const test::TempDir directory;
  test::prepare(directory.path());
  const bool lost = trial.call.waits && trial.for_good;
  const test::SyscallTrial result = test::try_syscall(
      {trial.call.number, trial.error, index, trial.for_good},
      [&](const std::function<void()>& repair) {
        return text_of(
            trial.workload.run({.directory = directory.path(),
                                .engine = trial.engine,
                                .repair = repair,
                                .repair_at_once = trial.for_good,
                                .engine_is_lost = [lost] { return lost; }}));
      });
  if (!result.unavailable.empty()) {
    tally.add(trial.name(index), 0, result.unavailable);
    return false;
  }
  const std::size_t end = result.text.find(" errors: ");
  const bool told = result.ended_well && end != std::string::npos;
  const std::string wrong = told ? result.text.substr(end + 9) : result.text;
  if (result.failed == 0) {
    EXPECT_TRUE(told && wrong.empty()) << trial.name(index) << ": " << wrong;
    return false;
  }
  tally.add(trial.name(index), result.text[0] != '0' || !told,
            told ? wrong : "the process: " + result.text);
  return true;
}

class SyscallFaults : public testing::TestWithParam<const char*> {};

TEST_P(SyscallFaults, AreReportedOrSurvivedAndNeverEndTheProcess) {
  const std::string engine = GetParam();
  const std::string reason = engine_unavailable_reason(engine);
  if (!reason.empty()) GTEST_SKIP() << reason;
  const test::SyscallTrial probe = test::try_syscall(
      {.number = SYS_statx, .error = EIO}, [](const auto&) { return ""; });
  if (!probe.unavailable.empty()) GTEST_SKIP() << probe.unavailable;
  const bool all = test::all_faults();
  test::Tally tally;
  test::Jobs jobs;
  std::size_t number = 0;
  for (const Call& call : calls()) {
    if (call.engine[0] != '\0' && call.engine != engine) continue;
    for (const int error : call.errors.empty() ? kErrors : call.errors) {
      for (const bool for_good : {false, true}) {
        // The threads that wait for the kernel block all signals: they can be
        // interrupted (when a debugger stops them), but not for good.
        if (call.waits && for_good && error == EINTR) continue;
        for (const Workload& workload : test::workloads()) {
          // The short form leaves out most, evenly, and what takes long.
          const bool slow = for_good && (call.waits || is_transient(error));
          if (!all && (++number % kShare != 0 || slow)) continue;
          const Trial trial{workload, engine, call, error, for_good};
          jobs.add(trial.name(0), [trial, &tally, index = 0u]() mutable {
            return try_trial(trial, index++, tally);
          });
        }
      }
    }
  }
  kForksFromThreads ? jobs.run(all ? 8 : 4) : jobs.run_here();
  std::printf("[  FAULTS  ] %s, system calls: %s\n", engine.c_str(),
              tally.text().c_str());
  RecordProperty("faults", static_cast<int>(tally.trials()));
  for (const std::string& broken : tally.broken()) ADD_FAILURE() << broken;
  EXPECT_GT(tally.trials(), kFewest);
}

INSTANTIATE_TEST_SUITE_P(Engines, SyscallFaults,
                         testing::Values("libaio", "io_uring", "threads"),
                         [](const auto& info) {
                           return std::string(info.param);
                         });

}  // namespace
}  // namespace torch_ext
