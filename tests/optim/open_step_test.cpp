#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

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
using Numbers = std::vector<std::size_t>;

constexpr std::uint64_t kTile = std::uint64_t{64} << 10;
constexpr std::size_t kPerTile = 8192;  // Elements of 8 bytes.

bool eventually(const std::function<bool()>& condition) {
  const auto deadline =
      std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

class OpenStepTest : public testing::Test {
 protected:
  TileOptions options(std::size_t buffers = 3) {
    TileOptions options;
    options.store.directory = temp_.path();
    options.store.aio.block_size = kTile;
    options.store.engine_factory = [this](int depth) {
      return std::make_unique<test::FaultyEngine>(memory_(depth), script_);
    };
    options.host_memory = buffers * kTile;
    options.tile_bytes = kTile;
    return options;
  }

  /// A step whose parameters are released in this order.
  static void open_step(OptimizerOffload& offload, ScalarAdamW& adamw,
                        const Numbers& order) {
    offload.begin_step(adamw);
    for (const std::size_t number : order) {
      adamw.prepare(number);
      offload.release(number);
    }
    offload.end_step();
  }

  /// Tiles, by their place on the drive, that were read or written since.
  std::vector<std::uint64_t> tiles_of(IoRequest::Op op, std::size_t since) {
    std::vector<std::uint64_t> tiles;
    const auto log = script_->log();
    for (std::size_t i = since; i < log.size(); ++i) {
      if (log[i].op == op)
        tiles.push_back((log[i].offset - Store::kHeadBytes) / kTile);
    }
    return tiles;
  }

  test::TempDir temp_;
  IoEngineFactory memory_ = make_engine_factory("memory");
  std::shared_ptr<FaultScript> script_ = std::make_shared<FaultScript>();
};

TEST_F(OpenStepTest, AnyOrderOfAnyParametersEqualsTheOneInMemory) {
  std::mt19937 random(5);
  for (const std::size_t buffers : {3U, 5U, 9U, 20U, 200U}) {
    OptimizerOffload offload(options(buffers));
    ScalarAdamW adamw(offload, 3);
    FunctionKernel ignore([](const StateSegment&) {});
    for (int step = 0; step < 60; ++step) {
      if (step % 7 == 0) {
        for (int i = 0; i < 4; ++i) adamw.add(random() % (3 * kPerTile));
      }
      Numbers active;
      for (std::size_t i = 0; i < adamw.parameters.size(); ++i) {
        if (random() % 4 > 0) active.push_back(i);
      }
      std::shuffle(active.begin(), active.end(), random);
      if (random() % 5 == 0) {
        adamw.step(active);
      } else {
        open_step(offload, adamw, active);
      }
      ASSERT_TRUE(adamw.equal()) << buffers << " at step " << step;
      if (random() % 8 == 0) offload.read_state(ignore);
    }
    EXPECT_EQ(adamw.mismatches, 0u);
    EXPECT_LE(offload.stats().host_bytes_peak, offload.stats().host_memory);
  }
}

TEST_F(OpenStepTest, ATileIsUpdatedBeforeTheEndOnceAllItsParametersMayBe) {
  OptimizerOffload offload(options(4));
  ScalarAdamW adamw(offload);
  const Numbers all = {adamw.add(kPerTile / 2), adamw.add(kPerTile / 2),
                       adamw.add(kPerTile)};
  adamw.step(all);
  std::atomic<std::size_t> updates = 0;
  adamw.on_update = [&](std::span<const StateSegment> segments) {
    updates += segments.size();
  };
  offload.begin_step(adamw);
  for (const std::size_t number : all) adamw.prepare(number);
  offload.release(all[2]);
  EXPECT_TRUE(eventually([&] { return updates == 1; }));
  offload.release(all[0]);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(updates, 1u);  // Its neighbour in the tile may not be.
  offload.release(all[1]);
  EXPECT_TRUE(eventually([&] { return updates == 3; }));
  offload.end_step();
  EXPECT_EQ(updates, 3u);
  EXPECT_TRUE(adamw.equal());
}

TEST_F(OpenStepTest, OfATileOnlyTheParametersThatMayBeAreUpdated) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  const Numbers all = {adamw.add(1000), adamw.add(1000), adamw.add(1000)};
  adamw.step(all);
  open_step(offload, adamw, {all[1]});
  EXPECT_EQ(offload.step_of(all[0]), 1u);
  EXPECT_EQ(offload.step_of(all[1]), 2u);
  EXPECT_TRUE(adamw.equal());
}

TEST_F(OpenStepTest, TilesAreReadInTheOrderOfTheLastStepsReleases) {
  constexpr std::size_t kTiles = 12;
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  Numbers forwards(kTiles);
  for (std::size_t& number : forwards) number = adamw.add(kPerTile);
  adamw.step(forwards);
  const Numbers backwards(forwards.rbegin(), forwards.rend());
  open_step(offload, adamw, backwards);
  std::size_t since = script_->log().size();
  open_step(offload, adamw, backwards);
  since = script_->log().size();
  open_step(offload, adamw, backwards);
  // What was read ahead of the step lies before; three tiles of the next one
  // may lie behind.
  std::vector<std::uint64_t> reads = tiles_of(IoRequest::Op::kRead, since);
  reads.resize(std::min<std::size_t>(reads.size(), kTiles - 3));
  EXPECT_TRUE(std::is_sorted(reads.rbegin(), reads.rend()));
  EXPECT_TRUE(adamw.equal());
}

TEST_F(OpenStepTest, NewStateLiesInTheOrderInWhichItsParametersCame) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  Numbers numbers(8);
  for (std::size_t& number : numbers) number = adamw.add(kPerTile);
  const Numbers order = {5, 1, 7, 0, 6, 3, 2, 4};
  open_step(offload, adamw, order);
  Numbers seen;
  adamw.on_update = [&](std::span<const StateSegment> segments) {
    seen.push_back(segments[0].parameter);
  };
  adamw.step(numbers);
  EXPECT_EQ(seen, order);
}

TEST_F(OpenStepTest, TilesThatNobodyAsksForAreNotWrittenAndHoldNobodyUp) {
  constexpr std::size_t kTiles = 10;
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  Numbers all(kTiles);
  for (std::size_t& number : all) number = adamw.add(kPerTile);
  adamw.step(all);
  // The three buffers hold the first three tiles.
  adamw.step(all);
  const std::size_t since = script_->log().size();
  open_step(offload, adamw, {9, 8, 7});
  offload.close();
  std::vector<std::uint64_t> written = tiles_of(IoRequest::Op::kWrite, since);
  EXPECT_TRUE(adamw.equal());
  // Writes of the step before may have been on their way.
  for (const std::uint64_t tile : {7U, 8U, 9U}) {
    EXPECT_GE(std::count(written.begin(), written.end(), tile), 1);
  }
  EXPECT_LE(written.size(), 3u + 3u);
}

TEST_F(OpenStepTest, AFailureOfTheKernelIsTheEndsToThrow) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  const Numbers all = {adamw.add(kPerTile), adamw.add(kPerTile)};
  adamw.step(all);
  adamw.on_update = [](std::span<const StateSegment>) {
    throw std::runtime_error("no such day");
  };
  offload.begin_step(adamw);
  for (const std::size_t number : all) offload.release(number);
  EXPECT_THROW(offload.end_step(), std::runtime_error);
  EXPECT_THROW(offload.begin_step(adamw), StateError);
  EXPECT_THROW(offload.step(all, adamw), StateError);
}

TEST_F(OpenStepTest, AFailedTransferIsTheEndsToThrowAndAStateMendsIt) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  Numbers all(8);
  for (std::size_t& number : all) number = adamw.add(kPerTile);
  adamw.step(all);
  script_->set_plan([](std::size_t, const IoRequest& request) {
    return request.op == IoRequest::Op::kWrite ? Fault::fail(EIO) : Fault();
  });
  EXPECT_THROW(
      {
        open_step(offload, adamw, all);
        open_step(offload, adamw, all);
      },
      IoError);
  script_->set_plan(nullptr);
  std::vector<OptimizerOffload::ParameterStep> steps;
  for (const std::size_t number : all) {
    test::ScalarParameter& p = adamw.parameters[number];
    p.weights = p.expected;
    steps.push_back({number, p.step});
  }
  FunctionKernel fill([&](const StateSegment& segment) {
    const test::ScalarParameter& p = adamw.parameters[segment.parameter];
    for (std::size_t i = 0; i < segment.count; ++i) {
      segment.field(0)[i] = p.m[segment.first + i];
      segment.field(1)[i] = p.v[segment.first + i];
    }
  });
  offload.write_state(steps, fill);
  open_step(offload, adamw, all);
  EXPECT_TRUE(adamw.equal());
}

TEST_F(OpenStepTest, CallsThatDoNotFitAreRefusedAndChangeNothing) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  const Numbers all = {adamw.add(kPerTile), adamw.add(100)};
  EXPECT_THROW(offload.release(0), StateError);
  EXPECT_THROW(offload.end_step(), StateError);
  adamw.step(all);
  offload.begin_step(adamw);
  EXPECT_THROW(offload.begin_step(adamw), StateError);
  EXPECT_THROW(offload.step(all, adamw), StateError);
  EXPECT_THROW(offload.read_state(adamw), StateError);
  EXPECT_THROW(offload.add_state(all), StateError);
  EXPECT_THROW(offload.release(2), std::invalid_argument);
  for (const std::size_t number : all) {
    adamw.prepare(number);
    offload.release(number);
    EXPECT_THROW(offload.release(number), std::invalid_argument);
  }
  offload.end_step();
  EXPECT_TRUE(adamw.equal());
}

TEST_F(OpenStepTest, AStepMayBeGivenUpByClosingOrByLoadingAState) {
  for (const bool close : {true, false}) {
    OptimizerOffload offload(options());
    ScalarAdamW adamw(offload);
    Numbers all(8);
    for (std::size_t& number : all) number = adamw.add(kPerTile);
    adamw.step(all);
    offload.begin_step(adamw);
    for (std::size_t i = 0; i < 4; ++i) {
      adamw.prepare(i);
      offload.release(i);
    }
    if (close) {
      offload.close();
      continue;
    }
    FunctionKernel nothing([](const StateSegment&) {});
    offload.write_state({}, nothing);
    EXPECT_FALSE(offload.has_state(0));
    adamw.forget();
    open_step(offload, adamw, all);
    EXPECT_TRUE(adamw.equal());
  }
}

TEST_F(OpenStepTest, ParametersMayJoinWhileTilesAreUpdated) {
  OptimizerOffload offload(options(6));
  ScalarAdamW adamw(offload);
  Numbers all(40);
  for (std::size_t& number : all) number = adamw.add(kPerTile / 2);
  adamw.step(all);
  offload.begin_step(adamw);
  for (const std::size_t number : all) {
    adamw.prepare(number);
    offload.release(number);
    offload.add_parameter(100, StateFields::floats(2));
  }
  offload.end_step();
  EXPECT_TRUE(adamw.equal());
}

}  // namespace
}  // namespace torch_ext
