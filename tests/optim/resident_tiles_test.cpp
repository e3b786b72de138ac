#include <gtest/gtest.h>
#include <sys/syscall.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "optim/tile_layout.h"
#include "support/child.h"
#include "support/faulty_engine.h"
#include "support/scalar_adamw.h"
#include "support/temp_dir.h"
#include "torch_ext/base/error.h"
#include "torch_ext/optim/optimizer_offload.h"

namespace torch_ext {
namespace {

using test::Fault;
using test::FaultScript;
using test::FunctionKernel;
using test::ScalarAdamW;

constexpr std::uint64_t kTile = std::uint64_t{64} << 10;
constexpr std::size_t kPerTile = 8192;  // Elements of 8 bytes.
constexpr std::size_t kThird = 5376;    // 12 bytes each, cut at 256.
constexpr std::size_t kLanes = 8;

/// Budgets of whole tiles of 64 KiB: eight for those on their way, the others
/// for those that stay.
class ResidentTilesTest : public testing::Test {
 protected:
  TileOptions options(std::size_t buffers) {
    TileOptions options;
    options.store.directory = temp_.path();
    options.store.aio.block_size = kTile;
    options.store.aio.queue_depth = 4;
    options.store.engine_factory = [this](int depth) {
      return std::make_unique<test::FaultyEngine>(memory_(depth), script_);
    };
    options.host_memory = buffers * kTile;
    options.tile_bytes = kTile;
    return options;
  }

  /// Makes a step. Returns the tiles that it wrote, by their place on the
  /// drive.
  std::multiset<std::uint64_t> written_by(OptimizerOffload& offload,
                                          ScalarAdamW& adamw) {
    const std::uint64_t before = settled(offload);
    const std::size_t first = script_->log().size();
    adamw.step_all();
    EXPECT_GE(settled(offload), before);
    std::multiset<std::uint64_t> tiles;
    const auto log = script_->log();
    for (std::size_t i = first; i < log.size(); ++i) {
      if (log[i].op == IoRequest::Op::kWrite) {
        tiles.insert((log[i].offset - Store::kHeadBytes) / kTile);
      }
    }
    return tiles;
  }

  /// Waits until nothing is transferred any more.
  static std::uint64_t settled(OptimizerOffload& offload) {
    std::uint64_t last = 0;
    for (int same = 0; same < 20;) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      const OptimizerOffloadStats stats = offload.stats();
      const std::uint64_t now = stats.bytes_read + stats.bytes_written;
      same = now == last ? same + 1 : 0;
      last = now;
    }
    return last;
  }

  test::TempDir temp_;
  IoEngineFactory memory_ = make_engine_factory("memory");
  std::shared_ptr<FaultScript> script_ = std::make_shared<FaultScript>();
};

TEST_F(ResidentTilesTest, StateThatFitsIsNeverTransferred) {
  OptimizerOffload offload(options(5));
  ScalarAdamW adamw(offload, 3);
  adamw.add(5 * kThird);
  for (int step = 0; step < 10; ++step) adamw.step_all();
  const OptimizerOffloadStats stats = offload.stats();
  EXPECT_EQ(stats.bytes_read + stats.bytes_written, 0u);
  EXPECT_EQ(stats.tiles, 5u);
  EXPECT_EQ(stats.resident_bytes, stats.state_bytes);
  EXPECT_EQ(stats.tile_visits, 50u);
  EXPECT_EQ(stats.tile_hits, 45u);
  EXPECT_EQ(adamw.mismatches, 0u);
  EXPECT_TRUE(adamw.equal());
}

TEST_F(ResidentTilesTest, WhatStaysIsNotTransferredAndTheRestOnceEachWay) {
  for (const std::size_t stay : {0u, 1u, 5u, 20u}) {
    constexpr std::size_t kTiles = 40;
    OptimizerOffload offload(options(kLanes + stay));
    ScalarAdamW adamw(offload);
    adamw.add(kTiles * kPerTile);
    adamw.step_all();
    for (int step = 0; step < 3; ++step) {
      const std::uint64_t read = offload.stats().bytes_read;
      const std::multiset<std::uint64_t> written = written_by(offload, adamw);
      EXPECT_EQ(written.size(), kTiles - stay);
      EXPECT_EQ(std::set(written.begin(), written.end()).size(), kTiles - stay);
      EXPECT_LE(offload.stats().bytes_read - read,
                (kTiles - stay + kLanes) * kTile);
    }
    const OptimizerOffloadStats stats = offload.stats();
    EXPECT_EQ(stats.resident_bytes, stay * kTile);
    EXPECT_EQ(stats.tile_visits, 4 * kTiles);
    EXPECT_EQ(stats.tile_hits, 3 * stay);
    EXPECT_LE(stats.host_bytes_peak, stats.host_memory);
    EXPECT_TRUE(adamw.equal());
  }
}

TEST_F(ResidentTilesTest, HalfTheStateInMemoryHalvesTheBytes) {
  constexpr std::size_t kTiles = 200;
  std::vector<std::uint64_t> bytes;
  for (const std::size_t stay : {std::size_t{0}, kTiles / 2}) {
    OptimizerOffload offload(options(kLanes + stay));
    ScalarAdamW adamw(offload);
    adamw.add(kTiles * kPerTile);
    adamw.step_all();
    const std::uint64_t before = settled(offload);
    adamw.step_all();
    adamw.step_all();
    bytes.push_back(settled(offload) - before);
  }
  EXPECT_EQ(bytes[0], std::uint64_t{2} * 2 * kTiles * kTile);
  EXPECT_EQ(2 * bytes[1], bytes[0]);
}

TEST_F(ResidentTilesTest, OfALargeBudgetNearlyAllIsForTilesThatStay) {
  for (std::uint64_t budget = std::uint64_t{256} << 20;
       budget < std::uint64_t{1} << 42; budget *= 3) {
    const TilePlan plan = plan_tiles(budget, 12 << 20, 4096);
    const std::uint64_t stays = plan.tile_bytes * (plan.buffers - plan.lanes);
    EXPECT_GE(static_cast<double>(stays),
              0.96 * static_cast<double>(budget - (12 << 20)));
    EXPECT_GE(plan.tile_bytes, std::uint64_t{1} << 20);
    EXPECT_LE(plan.tile_bytes, std::uint64_t{16} << 20);
    // Half the state in the budget: half the bytes, within 5 %.
    const std::size_t tiles = 2 * budget / plan.tile_bytes;
    const double moved = 1 - static_cast<double>(plan.resident(tiles)) /
                                 static_cast<double>(tiles);
    if (budget >= std::uint64_t{1} << 30) {
      EXPECT_LE(moved, 0.525);
    }
  }
}

TEST_F(ResidentTilesTest, ThoseThatStayAreSpreadEvenlyOverTheVisits) {
  for (const std::size_t tiles : {1U, 7U, 30U, 101U}) {
    for (std::size_t stay = 0; stay <= tiles; ++stay) {
      std::size_t chosen = 0;
      for (std::size_t i = 0; i < tiles; ++i) {
        chosen += is_chosen(i, tiles, stay) ? 1U : 0U;
        const double even =
            static_cast<double>((i + 1) * stay) / static_cast<double>(tiles);
        EXPECT_LE(std::abs(static_cast<double>(chosen) - even), 1.0);
      }
      EXPECT_EQ(chosen, stay);
    }
  }
}

TEST_F(ResidentTilesTest, ParametersThatJoinTakeTheMemoryOfThoseThatStayed) {
  OptimizerOffload offload(options(kLanes + 4));
  ScalarAdamW adamw(offload, 3);
  adamw.add(12 * kThird);
  for (int step = 0; step < 3; ++step) adamw.step_all();
  EXPECT_EQ(offload.stats().bytes_written, 0u);
  adamw.add(30 * kThird);
  for (int step = 0; step < 3; ++step) {
    adamw.step_all();
    ASSERT_TRUE(adamw.equal());
  }
  EXPECT_EQ(offload.stats().resident_bytes / kTile, 3u);
  EXPECT_LE(offload.stats().host_bytes_peak, offload.stats().host_memory);
  adamw.add(5 * kThird);
  for (int step = 0; step < 3; ++step) adamw.step_all();
  EXPECT_EQ(adamw.mismatches, 0u);
  EXPECT_TRUE(adamw.equal());
}

TEST_F(ResidentTilesTest, AFailedEvictionIsReported) {
  OptimizerOffload offload(options(4));
  ScalarAdamW adamw(offload);
  adamw.add(4 * kPerTile);
  adamw.step_all();
  adamw.add(kPerTile);
  script_->set_plan(test::from(0, Fault::fail(EIO)));
  EXPECT_THROW(
      {
        adamw.step_all();
        adamw.step_all();
      },
      IoError);
  EXPECT_THROW(adamw.step_all(), IoError);
}

TEST_F(ResidentTilesTest, WithoutRoomOnTheDriveNothingChanges) {
  EXPECT_EQ(test::in_child([this]() -> std::string {
              OptimizerOffload offload(options(4));
              ScalarAdamW adamw(offload);
              const std::size_t small = adamw.add(4 * kPerTile);
              const std::size_t large = adamw.add(300 * kPerTile);
              adamw.step({small});
              if (!test::refuse_syscall(SYS_fallocate, ENOSPC)) return "";
              try {
                offload.add_state(std::vector<std::size_t>{large});
                return "no error";
              } catch (const IoError& error) {
                if (error.error() != ENOSPC) return error.what();
              }
              if (offload.has_state(large)) return "it has state";
              const OptimizerOffloadStats stats = offload.stats();
              if (stats.resident_bytes != 4 * kTile) return "not resident";
              adamw.step({small});
              if (offload.stats().bytes_written > 0) return "written";
              return adamw.equal() ? "" : "not equal";
            }),
            "");
}

TEST_F(ResidentTilesTest, StateIsReadAndWrittenWhereverItIs) {
  OptimizerOffload offload(options(kLanes + 6));
  ScalarAdamW adamw(offload);
  adamw.add(25 * kPerTile);
  const auto look = [&] {
    std::uint64_t elements = 0;
    FunctionKernel kernel([&](const StateSegment& segment) {
      const test::ScalarParameter& p = adamw.parameters[0];
      for (std::uint64_t i = 0; i < segment.count; ++i) {
        ASSERT_EQ(segment.field(0)[i], p.m[segment.first + i]);
        ASSERT_EQ(segment.field(1)[i], p.v[segment.first + i]);
      }
      elements += segment.count;
    });
    offload.read_state(kernel);
    EXPECT_EQ(elements, 25 * kPerTile);
  };
  for (int step = 0; step < 3; ++step) {
    adamw.step_all();
    look();
  }
  test::ScalarParameter& p = adamw.parameters[0];
  FunctionKernel fill([&](const StateSegment& segment) {
    for (std::uint64_t i = 0; i < segment.count; ++i) {
      EXPECT_EQ(segment.field(0)[i], 0.0f);
      segment.field(0)[i] = p.m[segment.first + i] = 0.25f;
      segment.field(1)[i] = p.v[segment.first + i] = 0.5f;
    }
  });
  p.step = 9;
  const std::vector<OptimizerOffload::ParameterStep> steps = {{0, 9}};
  offload.write_state(steps, fill);
  look();
  adamw.step_all();
  look();
  EXPECT_TRUE(adamw.equal());
}

TEST_F(ResidentTilesTest, AStateThatWasNeverSteppedIsZerosWhereverItIs) {
  OptimizerOffload offload(options(kLanes + 6));
  ScalarAdamW adamw(offload, 3);
  adamw.add(10 * kPerTile);
  offload.add_state(std::vector<std::size_t>{0});
  FunctionKernel spoil([&](const StateSegment& segment) {
    for (std::uint64_t i = 0; i < segment.count; ++i) {
      ASSERT_EQ(segment.field(2)[i], 0.0f);
      segment.field(2)[i] = 5;  // Not kept.
    }
  });
  offload.read_state(spoil);
  offload.read_state(spoil);
  for (int step = 0; step < 3; ++step) adamw.step_all();
  EXPECT_EQ(adamw.mismatches, 0u);
  EXPECT_TRUE(adamw.equal());
}

TEST_F(ResidentTilesTest, ThePlanIsWhatHappens) {
  for (const std::size_t buffers : {3u, 7u, 8u, 13u, 40u, 100u}) {
    OptimizerOffload offload(options(buffers));
    ScalarAdamW adamw(offload);
    adamw.add(25 * kPerTile);
    adamw.add(8 * kPerTile - 300);
    const OptimizerPlan plan = offload.plan(std::vector<std::size_t>{0, 1});
    adamw.step_all();
    adamw.step_all();
    const std::uint64_t before = settled(offload);
    adamw.step_all();
    const std::uint64_t moved = settled(offload) - before;
    const OptimizerOffloadStats stats = offload.stats();
    EXPECT_EQ(moved, plan.step_bytes);
    EXPECT_EQ(stats.tiles, plan.tiles);
    EXPECT_EQ(stats.state_bytes, plan.state_bytes);
    EXPECT_EQ(stats.resident_bytes, plan.resident_bytes);
    EXPECT_EQ(plan.host_memory, buffers * kTile);
    EXPECT_LE(plan.lane_buffers + plan.resident_tiles,
              std::max<std::uint64_t>(buffers, plan.tiles));
    // With what it says would be enough, nothing is transferred.
    EXPECT_EQ(plan.host_memory_for_all, 34 * kTile);
    EXPECT_EQ(plan.step_bytes == 0, buffers >= 33);
  }
}

}  // namespace
}  // namespace torch_ext
