#include "torch_ext/optim/optimizer_offload.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <random>
#include <set>
#include <string>
#include <thread>

#include "support/faulty_engine.h"
#include "support/scalar_adamw.h"
#include "support/temp_dir.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

using test::FaultScript;
using test::FunctionKernel;
using test::ScalarAdamW;

constexpr std::uint64_t kKiB = 1024;

// The smallest budget: three buffers of 64 KiB, so 8192 elements a tile.
constexpr std::uint64_t kThreeBuffers = 192 * kKiB;
constexpr std::size_t kPerTile = 8192;

bool eventually(const std::function<bool()>& condition) {
  const auto deadline =
      std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

class OptimizerOffloadTest : public testing::Test {
 protected:
  TileOptions options(std::uint64_t host_memory = kThreeBuffers) {
    TileOptions options;
    options.store.directory = temp_.path();
    options.store.aio.block_size = 16 * kKiB;
    options.store.aio.queue_depth = 4;
    options.store.engine_factory = [this](int depth) {
      return std::make_unique<test::FaultyEngine>(memory_(depth), script_);
    };
    options.host_memory = host_memory;
    return options;
  }

  std::size_t count_requests(IoRequest::Op op) const {
    const auto log = script_->log();
    return static_cast<std::size_t>(
        std::count_if(log.begin(), log.end(),
                      [op](const IoRequest& r) { return r.op == op; }));
  }

  test::TempDir temp_;
  IoEngineFactory memory_ = make_engine_factory("memory");
  std::shared_ptr<FaultScript> script_ = std::make_shared<FaultScript>();
};

TEST_F(OptimizerOffloadTest, StepsOverManyTilesEqualTheSameStepsInMemory) {
  for (const char* engine : {"memory", "threads", "libaio", "io_uring"}) {
    if (!engine_unavailable_reason(engine).empty()) continue;
    TileOptions with = options();
    with.store.engine = engine;
    with.store.engine_factory = nullptr;
    OptimizerOffload offload(with);
    ScalarAdamW adamw(offload);
    for (const int size : {1, 17, 63, 64, 65, 100000, 0, 4096, 3}) {
      adamw.add(static_cast<std::size_t>(size));
    }
    for (int step = 0; step < 5; ++step) adamw.step_all();
    EXPECT_TRUE(adamw.equal()) << engine;
    EXPECT_EQ(adamw.updates, 5 * offload.stats().tiles) << engine;
    EXPECT_GT(offload.stats().tiles, 10u) << engine;
  }
}

TEST_F(OptimizerOffloadTest, CompletionsInAnyOrderGiveTheSameResult) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    script_->shuffle(seed);
    OptimizerOffload offload(options(seed % 2 ? kThreeBuffers : 400 * kKiB));
    ScalarAdamW adamw(offload, /*fields=*/3);
    for (const int size : {50000, 30, 20000})
      adamw.add(static_cast<std::size_t>(size));
    for (int step = 0; step < 4; ++step) adamw.step_all();
    ASSERT_TRUE(adamw.equal()) << seed;
    ASSERT_EQ(adamw.mismatches, 0u) << seed;
  }
}

TEST_F(OptimizerOffloadTest, ParametersAreCutAtMultiplesOf256AndFieldsAligned) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload, 3);
  const std::vector<std::size_t> sizes = {1, 65, 30000, 63, 7000, 12345, 64};
  for (const std::size_t size : sizes) adamw.add(size);
  std::map<std::size_t, std::uint64_t> seen;
  adamw.on_update = [&](std::span<const StateSegment> segments) {
    for (const StateSegment& segment : segments) {
      EXPECT_EQ(segment.first, seen[segment.parameter]);
      EXPECT_EQ(segment.first % 256, 0u);
      seen[segment.parameter] += segment.count;
      if (seen[segment.parameter] != sizes[segment.parameter]) {
        EXPECT_EQ(segment.count % 256, 0u);
      }
      for (const std::byte* field : segment.fields) {
        EXPECT_TRUE(is_aligned(field, 64));
      }
    }
  };
  adamw.step_all();
  for (std::size_t i = 0; i < sizes.size(); ++i) EXPECT_EQ(seen[i], sizes[i]);
  EXPECT_GT(offload.stats().tiles, 8u);
}

TEST_F(OptimizerOffloadTest, SmallParametersShareATile) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  for (int i = 0; i < 100; ++i) adamw.add(10);
  adamw.step_all();
  EXPECT_EQ(offload.stats().tiles, 1u);
}

TEST_F(OptimizerOffloadTest, AStepReadsAndWritesEachTileOnceAndTheFirstReads) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  adamw.add(20 * kPerTile);
  adamw.step_all();
  // What is read ahead is of the second step; it may be under way.
  const std::uint64_t state = 20 * kPerTile * 8;
  ASSERT_TRUE(
      eventually([&] { return offload.stats().bytes_written == state; }));
  EXPECT_LE(offload.stats().bytes_read, 3 * 64 * kKiB);
  for (int step = 0; step < 3; ++step) adamw.step_all();
  ASSERT_TRUE(eventually([&] {
    return offload.stats().bytes_written == 4 * state &&
           offload.stats().bytes_read == 3 * state + 3 * 64 * kKiB;
  }));
  EXPECT_TRUE(adamw.equal());
}

TEST_F(OptimizerOffloadTest, TilesWithoutAnActiveParameterCostNoTransfer) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  const std::size_t frozen = adamw.add(10 * kPerTile);
  const std::size_t trained = adamw.add(2 * kPerTile);
  adamw.step({trained, frozen});
  for (int step = 0; step < 3; ++step) adamw.step({trained});
  offload.close();
  EXPECT_EQ(offload.stats().bytes_written, (12 + 3 * 2) * 64 * kKiB);
  EXPECT_EQ(offload.step_of(frozen), 1u);
  EXPECT_EQ(offload.step_of(trained), 4u);
  EXPECT_TRUE(adamw.equal());
}

TEST_F(OptimizerOffloadTest, AParameterThatNeverStepsTakesNoSpace) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  adamw.add(100 * kPerTile);
  const std::size_t trained = adamw.add(kPerTile);
  adamw.step({trained});
  EXPECT_EQ(offload.stats().tiles, 1u);
  EXPECT_FALSE(offload.has_state(0));
  EXPECT_TRUE(offload.has_state(trained));
}

TEST_F(OptimizerOffloadTest, AnySequenceOfActiveSetsEqualsTheOneInMemory) {
  std::mt19937 random(3);
  for (const std::uint64_t budget :
       {kThreeBuffers, 330 * kKiB, 640 * kKiB, 1024 * kKiB, 2048 * kKiB}) {
    OptimizerOffload offload(options(budget));
    ScalarAdamW adamw(offload, 3);
    FunctionKernel ignore([](const StateSegment&) {});
    for (int step = 0; step < 60; ++step) {
      if (step % 5 == 0) adamw.add(random() % (4 * kPerTile));
      std::vector<std::size_t> active;
      for (std::size_t i = 0; i < adamw.parameters.size(); ++i) {
        if (random() % 3 == 0) active.push_back(i);
      }
      std::shuffle(active.begin(), active.end(), random);
      adamw.step(active);
      ASSERT_TRUE(adamw.equal()) << budget << " at step " << step;
      if (random() % 8 == 0) offload.read_state(ignore);
    }
    EXPECT_EQ(adamw.mismatches, 0u);
  }
}

TEST_F(OptimizerOffloadTest, TheNextTilesAreReadWhileATileIsUpdated) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  adamw.add(6 * kPerTile);
  adamw.step_all();
  bool overlapped = false;
  adamw.on_update = [&](std::span<const StateSegment> segments) {
    if (segments[0].first != 0) return;
    // Tile 0 is in hand; the other two buffers fill without any help.
    overlapped = eventually(
        [&] { return count_requests(IoRequest::Op::kRead) >= 3 * 4; });
  };
  adamw.step_all();
  EXPECT_TRUE(overlapped);
}

TEST_F(OptimizerOffloadTest, ATileIsUpdatedWhileTheOneBeforeIsWritten) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  adamw.add(6 * kPerTile);
  // The first tile's write does not end before the second is updated.
  script_->set_plan(test::only(0, test::Fault::held()));
  bool held = false;
  adamw.on_update = [&](std::span<const StateSegment> segments) {
    if (segments[0].first != kPerTile) return;
    held = eventually([&] { return script_->held() == 1; });
    script_->release_all();
  };
  adamw.step_all();
  EXPECT_TRUE(held);
  adamw.on_update = nullptr;
  adamw.step_all();
  EXPECT_TRUE(adamw.equal());
}

TEST_F(OptimizerOffloadTest, ATileIsReadBeforeThoseThatWaitToBeWritten) {
  TileOptions one_slot = options();
  one_slot.store.aio.block_size = 64 * kKiB;  // A tile is one request.
  one_slot.store.aio.queue_depth = 1;
  OptimizerOffload offload(one_slot);
  ScalarAdamW adamw(offload);
  adamw.add(6 * kPerTile);
  adamw.step_all();
  ASSERT_TRUE(eventually([&] { return script_->requests() == 6 + 3; }));
  // Three writes, of which the first is in flight when the others are queued.
  // Its end frees a buffer, when the second has taken its place already.
  script_->set_plan(test::only(9, test::Fault::held()));
  adamw.on_update = [&](std::span<const StateSegment> segments) {
    if (segments[0].first != 2 * kPerTile) return;
    EXPECT_TRUE(eventually([&] { return script_->held() == 1; }));
    script_->release_all();
  };
  adamw.step_all();
  EXPECT_EQ(script_->log().at(9).op, IoRequest::Op::kWrite);
  EXPECT_EQ(script_->log().at(10).op, IoRequest::Op::kWrite);
  EXPECT_EQ(script_->log().at(11).op, IoRequest::Op::kRead);
  EXPECT_TRUE(adamw.equal());
}

TEST_F(OptimizerOffloadTest, StepReturnsWithItsLastWritesInFlight) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  adamw.add(4 * kPerTile);
  // The fourth tile's; the first three's make room for it.
  script_->set_plan([](std::size_t, const IoRequest& request) {
    const bool last = request.op == IoRequest::Op::kWrite &&
                      request.offset >= Store::kHeadBytes + 3 * 64 * kKiB;
    return last ? test::Fault::held() : test::Fault();
  });
  adamw.step_all();
  EXPECT_TRUE(eventually([&] { return script_->held() > 0; }));
  script_->release_all();
  adamw.step_all();
  EXPECT_TRUE(adamw.equal());
}

TEST_F(OptimizerOffloadTest, BuffersThatBecomeFreeAfterAStepAreReadInto) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  adamw.add(6 * kPerTile);
  adamw.step_all();
  // Nobody calls, and yet all three buffers fill with the next step's tiles.
  EXPECT_TRUE(eventually(
      [&] { return count_requests(IoRequest::Op::kRead) == 3 * 4; }));
  const std::size_t before = count_requests(IoRequest::Op::kRead);
  adamw.on_update = [&](std::span<const StateSegment> segments) {
    if (segments[0].first != 0) return;
    EXPECT_EQ(count_requests(IoRequest::Op::kRead), before);
  };
  adamw.step_all();
  EXPECT_TRUE(adamw.equal());
}

TEST_F(OptimizerOffloadTest, ReadAheadThatTheStepDoesNotWantGivesWay) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  const std::size_t early = adamw.add(2 * kPerTile);
  const std::size_t late = adamw.add(5 * kPerTile);
  const auto tiles_read = [&] { return offload.stats().bytes_read / 65536; };
  adamw.step({early, late});
  ASSERT_TRUE(eventually([&] { return tiles_read() == 3; }));
  adamw.step({late});
  ASSERT_TRUE(eventually([&] { return tiles_read() == 3 + 4 + 3; }));
  // All three buffers hold tiles of `late`, while `early` comes first.
  adamw.step({early, late});
  adamw.step({early});
  adamw.step({late, early});
  EXPECT_TRUE(adamw.equal());
}

TEST_F(OptimizerOffloadTest, MemoryStaysWithinTheBudgetWhateverItIs) {
  for (std::uint64_t budget = kThreeBuffers; budget < 3000 * kKiB;
       budget = budget * 7 / 4 + 1) {
    TileOptions with = options(budget);
    with.scratch_bytes = budget > 300 * kKiB ? 10000 : 0;
    OptimizerOffload offload(with);
    ScalarAdamW adamw(offload);
    adamw.add(60 * kPerTile);
    EXPECT_EQ(offload.scratch().size(), with.scratch_bytes > 0 ? 12288u : 0u);
    adamw.step_all();
    adamw.step_all();
    const OptimizerOffloadStats stats = offload.stats();
    EXPECT_LE(stats.host_bytes_peak, budget);
    EXPECT_GT(stats.host_bytes_peak, budget / 2);
    EXPECT_GE(stats.buffers, 3u);
    EXPECT_TRUE(adamw.equal());
  }
}

TEST_F(OptimizerOffloadTest, ABudgetTooSmallIsRefusedWithWhatIsNeeded) {
  TileOptions with = options(kThreeBuffers + 4095);
  with.scratch_bytes = 100;
  try {
    OptimizerOffload offload(with);
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find("at least 200704 bytes"),
              std::string::npos)
        << error.what();
  }
  with.host_memory += 1;
  OptimizerOffload offload(with);
}

TEST_F(OptimizerOffloadTest, LargeBudgetsGiveTilesOf16MiB) {
  OptimizerOffload offload(options(std::uint64_t{8} << 30));
  EXPECT_EQ(offload.stats().tile_bytes, std::uint64_t{16} << 20);
  EXPECT_EQ(offload.stats().buffers, 512u);
}

TEST_F(OptimizerOffloadTest, ReadStateShowsWhatTheLastStepLeft) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  adamw.add(5 * kPerTile + 5);
  const std::size_t never = adamw.add(10);
  adamw.step({0});
  adamw.step({0});
  for (int repeat = 0; repeat < 2; ++repeat) {
    std::uint64_t elements = 0;
    FunctionKernel look([&](const StateSegment& segment) {
      ASSERT_NE(segment.parameter, never);
      EXPECT_EQ(segment.step, 2u);
      const test::ScalarParameter& p = adamw.parameters[segment.parameter];
      for (std::uint64_t i = 0; i < segment.count; ++i) {
        ASSERT_EQ(segment.field(0)[i], p.m[segment.first + i]);
        ASSERT_EQ(segment.field(1)[i], p.v[segment.first + i]);
        segment.field(0)[i] = 99;  // Not kept.
      }
      elements += segment.count;
    });
    offload.read_state(look);
    EXPECT_EQ(elements, 5 * kPerTile + 5);
  }
  adamw.step_all();
  EXPECT_TRUE(adamw.equal());
}

TEST_F(OptimizerOffloadTest, WrittenStateTakesThePlaceOfAllThatWasThere) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  for (const int size : {30000, 20000, 10})
    adamw.add(static_cast<std::size_t>(size));
  adamw.step_all();
  adamw.step_all();
  // As if 1 and 2 had been trained elsewhere, and 0 not at all.
  FunctionKernel fill([&](const StateSegment& segment) {
    EXPECT_EQ(segment.step, segment.parameter + 10);
    test::ScalarParameter& p = adamw.parameters[segment.parameter];
    for (std::uint64_t i = 0; i < segment.count; ++i) {
      EXPECT_EQ(segment.field(0)[i], 0.0f);
      segment.field(0)[i] = p.m[segment.first + i] = 0.25f;
      segment.field(1)[i] = p.v[segment.first + i] = 0.5f;
    }
  });
  offload.write_state(
      std::vector<OptimizerOffload::ParameterStep>{{1, 11}, {2, 12}}, fill);
  EXPECT_FALSE(offload.has_state(0));
  EXPECT_EQ(offload.step_of(0), 0u);
  EXPECT_EQ(offload.step_of(2), 12u);
  test::ScalarParameter& fresh = adamw.parameters[0];
  std::fill(fresh.m.begin(), fresh.m.end(), 0.0f);
  std::fill(fresh.v.begin(), fresh.v.end(), 0.0f);
  for (std::size_t i = 0; i < 3; ++i) {
    adamw.parameters[i].step = offload.step_of(i);
  }
  for (int step = 0; step < 3; ++step) adamw.step_all();
  EXPECT_TRUE(adamw.equal());
}

TEST_F(OptimizerOffloadTest, AddedStateIsZerosAndNoStep) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  for (const int size : {30000, 0, 5})
    adamw.add(static_cast<std::size_t>(size));
  const std::vector<std::size_t> all = {0, 1, 2};
  offload.add_state(all);
  offload.add_state(all);
  EXPECT_TRUE(offload.has_state(1));
  std::uint64_t elements = 0;
  FunctionKernel look([&](const StateSegment& segment) {
    EXPECT_EQ(segment.step, 0u);
    for (std::uint64_t i = 0; i < segment.count; ++i) {
      ASSERT_EQ(segment.field(0)[i], 0.0f);
    }
    elements += segment.count;
  });
  offload.read_state(look);
  EXPECT_EQ(elements, 30005u);
  for (int step = 0; step < 3; ++step) adamw.step_all();
  EXPECT_EQ(offload.step_of(0), 3u);
  EXPECT_TRUE(adamw.equal());
}

TEST_F(OptimizerOffloadTest, WrongArgumentsChangeNothing) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  adamw.add(1000);
  EXPECT_THROW(offload.add_parameter(1, {}), std::invalid_argument);
  EXPECT_THROW(offload.add_parameter(1, {{65 * 256}}), std::invalid_argument);
  EXPECT_THROW(
      offload.add_parameter(std::uint64_t{1} << 60, StateFields::floats(2)),
      std::invalid_argument);
  const std::vector<std::size_t> unknown = {0, 1};
  const std::vector<std::size_t> twice = {0, 0};
  EXPECT_THROW(offload.step(unknown, adamw), std::invalid_argument);
  EXPECT_THROW(offload.step(twice, adamw), std::invalid_argument);
  EXPECT_THROW(offload.add_state(unknown), std::invalid_argument);
  EXPECT_FALSE(offload.has_state(0));
  EXPECT_THROW(offload.step_of(1), std::invalid_argument);
  adamw.step_all();
  EXPECT_EQ(offload.step_of(0), 1u);
  EXPECT_TRUE(adamw.equal());
}

TEST_F(OptimizerOffloadTest, AStepOfNothingIsAStep) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  adamw.add(0);
  adamw.step({});
  adamw.step({0});
  EXPECT_EQ(offload.stats().steps, 2u);
  EXPECT_EQ(offload.step_of(0), 1u);
  EXPECT_EQ(offload.stats().tiles, 0u);
}

TEST_F(OptimizerOffloadTest, TheTimelineHasEveryTileInEveryLane) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  adamw.add(6 * kPerTile);
  for (int step = 0; step < 2; ++step) adamw.step_all();
  ASSERT_TRUE(eventually(
      [&] { return offload.stats().bytes_read == (6 + 3) * 64 * kKiB; }));
  adamw.step_all();
  offload.close();
  std::map<LaneEvent::Lane, std::map<std::size_t, LaneEvent>> lanes;
  for (const LaneEvent& event : offload.timeline()) {
    EXPECT_LE(event.start, event.end);
    EXPECT_TRUE(lanes[event.lane].emplace(event.tile, event).second);
  }
  for (const auto lane : {LaneEvent::Lane::kRead, LaneEvent::Lane::kUpdate,
                          LaneEvent::Lane::kWrite}) {
    EXPECT_EQ(lanes[lane].size(), 6u);
  }
  for (std::size_t tile = 0; tile < 6; ++tile) {
    const LaneEvent& update = lanes[LaneEvent::Lane::kUpdate][tile];
    EXPECT_LE(lanes[LaneEvent::Lane::kRead][tile].end, update.start);
    EXPECT_GE(lanes[LaneEvent::Lane::kWrite][tile].start, update.end);
    EXPECT_GE(update.start, 0.0);
  }
  EXPECT_LT(lanes[LaneEvent::Lane::kRead][0].start, 0.0);
  const OptimizerOffloadStats stats = offload.stats();
  EXPECT_GT(stats.read_seconds, 0.0);
  EXPECT_GT(stats.update_seconds, 0.0);
  EXPECT_GT(stats.write_seconds, 0.0);
}

}  // namespace
}  // namespace torch_ext
