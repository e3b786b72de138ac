// Fails the first request, then the second, and so on until there is none left
// to fail. Each fails with each errno, once and for good, short, late or
// refused. This is done on every engine, under small uses of each class.

#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "support/fault_kinds.h"
#include "support/fault_workloads.h"
#include "support/faulty_engine.h"
#include "support/temp_dir.h"
#include "support/trials.h"

namespace torch_ext {
namespace {

using test::Fault;
using test::FaultKind;
using test::FaultScript;
using test::Outcome;
using test::Workload;

/// One trial: the fault, at request or poll `index`. False if none was hit.
bool try_fault(const Workload& workload, const std::string& engine,
               const FaultKind& kind, std::size_t index, test::Tally& tally) {
  const auto script = std::make_shared<FaultScript>();
  const auto hit = std::make_shared<std::atomic<bool>>(false);
  const auto matters = std::make_shared<std::atomic<bool>>(false);
  const auto synced = std::make_shared<std::atomic<bool>>(false);
  if (kind.polls > 0) {
    script->fail_polls(kind.polls, index);
  } else {
    const bool reads_ahead = workload.reads_ahead;
    script->set_plan([=](std::size_t i, const IoRequest& request) {
      if (kind.for_good ? i < index : i != index) return Fault();
      *hit = true;
      if (request.op == IoRequest::Op::kSync) *synced = true;
      if (!reads_ahead || request.op != IoRequest::Op::kRead) *matters = true;
      return test::fault_of(kind, request);
    });
  }
  const test::TempDir directory;
  test::prepare(directory.path());
  const Outcome outcome = workload.run(
      {.directory = directory.path(),
       .engine = engine,
       .factory = test::faulty_factory(engine, script),
       .repair =
           [=] {
             script->set_plan(nullptr);
             script->fail_polls(0);
           },
       .repair_at_once = kind.tries_patience,
       // Polls that fail for good cost the engine.
       .engine_is_lost = [=] { return script->failed_polls() >= 100; }});
  if (!*hit && script->failed_polls() == 0) {
    EXPECT_EQ(outcome.errors, 0u);
    EXPECT_EQ(outcome.wrong, "");
    return false;
  }
  std::string wrong = outcome.wrong;
  // A failed sync is final, whatever the error: the kernel has dropped the
  // pages, and the next sync would succeed without them.
  const bool survives = kind.survives && !(*synced && kind.error != 0);
  const bool must_report = kind.error != 0 && !survives && *matters;
  if (wrong.empty() && survives && outcome.errors > 0) {
    wrong = "an error, though it could have been tried again";
  }
  if (wrong.empty() && must_report && outcome.errors == 0) {
    wrong = "nobody was told";
  }
  tally.add(std::string(workload.name) + " on " + engine + ", " + kind.name +
                ", number " + std::to_string(index),
            outcome.errors, wrong);
  return true;
}

class EnumeratedFaults : public testing::TestWithParam<const char*> {};

TEST_P(EnumeratedFaults, AreReportedOrSurvivedWithEveryByteRight) {
  const std::string engine = GetParam();
  const std::string reason = engine_unavailable_reason(engine);
  if (!reason.empty()) GTEST_SKIP() << reason;
  const bool all = test::all_faults();
  test::Tally tally;
  test::Jobs jobs;
  std::size_t number = 0;
  for (const bool patient : {true, false}) {  // The longest first.
    for (const FaultKind& kind : test::fault_kinds()) {
      if (kind.tries_patience != patient) continue;
      for (const Workload& workload : test::workloads()) {
        // The short form leaves out requests evenly, and tries the library's
        // patience, which takes seconds, with a class for each kind.
        const std::size_t stride = all ? 1 : 5;
        const std::size_t first = all ? 0 : number % stride;
        const bool once = patient && !all;
        ++number;
        if (once && number % 4 != 0) continue;
        // Those that take seconds are made side by side.
        const std::size_t lanes = patient && all ? 8 : 1;
        for (std::size_t lane = 0; lane < lanes; ++lane) {
          jobs.add(engine + ", " + workload.name + ", " + kind.name,
                   [&, kind, index = first + lane, step = stride * lanes, once,
                    engine]() mutable {
                     const bool hit =
                         try_fault(workload, engine, kind, index, tally);
                     index += step;
                     return hit && !once;
                   });
        }
      }
    }
  }
  jobs.run(all ? 96 : 32);
  std::printf("[  FAULTS  ] %s: %s\n", engine.c_str(), tally.text().c_str());
  RecordProperty("faults", static_cast<int>(tally.trials()));
  for (const std::string& broken : tally.broken()) ADD_FAILURE() << broken;
  EXPECT_GT(tally.trials(), all ? 2500u : 500u);
}

INSTANTIATE_TEST_SUITE_P(Engines, EnumeratedFaults,
                         testing::Values("libaio", "io_uring", "threads",
                                         "memory"),
                         [](const auto& info) {
                           return std::string(info.param);
                         });

}  // namespace
}  // namespace torch_ext
