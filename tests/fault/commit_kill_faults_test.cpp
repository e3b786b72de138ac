// Trainings with commits that are killed: at named points, and at random.
//
// Each directory sees several kills. So later ones meet a store that earlier
// ones have left, and other slots, spares and numbers.

#include <gtest/gtest.h>

#include <array>
#include <cstdio>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "support/commit_victim.h"
#include "support/temp_dir.h"
#include "support/trials.h"
#include "torch_ext/io/io_engine.h"

namespace torch_ext {
namespace {

TEST(CommitKillFaults, AKillAtAnyPointLosesNoCommit) {
  std::mt19937_64 random(test::all_faults() ? std::random_device()() : 1);
  const std::size_t most = test::all_faults() ? 1000
                           : test::kSanitized ? 20
                                              : 54;
  std::vector<std::string> engines;
  for (const char* name : {"threads", "libaio", "io_uring"}) {
    if (engine_unavailable_reason(name).empty()) engines.emplace_back(name);
  }
  constexpr std::array kBuffers = {3, 13, 10, 40};
  std::size_t kills = 0;
  std::size_t acknowledged = 0;
  std::size_t being_made = 0;
  std::size_t left_in_part = 0;
  for (std::size_t round = 0; kills < most; ++round) {
    const std::array<test::TempDir, 2> dirs;
    std::vector<std::filesystem::path> paths = {dirs[0].path()};
    if (round % 2 == 1) paths.push_back(dirs[1].path());
    test::CommitVictim victim(paths, kBuffers[round / 2 % kBuffers.size()],
                              1 + round / 3 % 2,
                              engines[round % engines.size()]);
    for (const auto& kill : test::plan_kills(round, paths.size(), random)) {
      ASSERT_EQ(victim.suffer(kill), "")
          << "round " << round << ", kill at '" << kill.point << "', pass "
          << kill.pass << ", or after " << kill.time.count() << " us";
      ++kills;
    }
    acknowledged += victim.acknowledged();
    being_made += victim.being_made();
    left_in_part += victim.left_in_part();
  }
  std::printf(
      "[  FAULTS  ] %zu kills, %zu commits acknowledged, %zu times the one "
      "being made was found\n",
      kills, acknowledged, being_made);
  EXPECT_GT(acknowledged, kills / 4);
  EXPECT_GT(being_made, 0u);
  if (!test::kSanitized) {
    EXPECT_GT(left_in_part, 0u);
  }
}

TEST(CommitKillFaults, AKillBesideARollbackLosesNoCommit) {
  std::mt19937_64 random(test::all_faults() ? std::random_device()() : 1);
  const std::size_t most = test::all_faults() ? 300 : test::kSanitized ? 5 : 20;
  constexpr std::array kBuffers = {3, 13, 10, 40};
  std::size_t kills = 0;
  for (std::size_t round = 0; kills < most; ++round) {
    const std::array<test::TempDir, 2> dirs;
    std::vector<std::filesystem::path> paths = {dirs[0].path()};
    if (round % 2 == 1) paths.push_back(dirs[1].path());
    test::CommitVictim victim(paths, kBuffers[round % kBuffers.size()],
                              1 + round % 3, "threads");
    victim.rolls_back = true;
    for (const auto& kill : test::plan_rollback_kills(round, random)) {
      ASSERT_EQ(victim.suffer(kill), "")
          << "round " << round << ", kill at '" << kill.point << "', pass "
          << kill.pass;
      ++kills;
    }
  }
  std::printf("[  FAULTS  ] %zu kills beside rollbacks\n", kills);
  RecordProperty("faults", static_cast<int>(kills));
}

}  // namespace
}  // namespace torch_ext
