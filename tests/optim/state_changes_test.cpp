// State that is forgotten, made anew and changed between steps.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "support/scalar_adamw.h"
#include "support/temp_dir.h"
#include "torch_ext/base/error.h"
#include "torch_ext/optim/optimizer_offload.h"

namespace torch_ext {
namespace {

using test::FunctionKernel;
using test::ScalarAdamW;

constexpr std::uint64_t kTile = std::uint64_t{64} << 10;
constexpr std::uint64_t kPerTile = kTile / 8;

class StateChangesTest : public testing::Test {
 protected:
  TileOptions options(std::uint64_t buffers) const {
    return {.store = {.directory = temp_.path()},
            .host_memory = buffers * kTile,
            .tile_bytes = kTile};
  }

  static void forget(OptimizerOffload& offload, ScalarAdamW& adamw,
                     const std::vector<std::size_t>& numbers) {
    offload.forget_state(numbers);
    for (const std::size_t number : numbers) {
      test::ScalarParameter& p = adamw.parameters[number];
      std::fill(p.m.begin(), p.m.end(), 0.0f);
      std::fill(p.v.begin(), p.v.end(), 0.0f);
      p.step = 0;
      EXPECT_FALSE(offload.has_state(number));
    }
  }

  static void change(OptimizerOffload& offload, ScalarAdamW& adamw,
                     std::size_t number, float value) {
    test::ScalarParameter& p = adamw.parameters[number];
    FunctionKernel kernel([&](const StateSegment& segment) {
      ASSERT_EQ(segment.parameter, number);
      for (std::uint64_t i = 0; i < segment.count; ++i) {
        ASSERT_EQ(segment.field(1)[i], p.v[segment.first + i]);
        segment.field(0)[i] = p.m[segment.first + i] = value;
      }
    });
    p.step += 3;
    const std::vector<OptimizerOffload::ParameterStep> steps = {
        {number, p.step}};
    offload.change_state(steps, kernel);
  }

  static void look(OptimizerOffload& offload, const ScalarAdamW& adamw,
                   std::size_t number) {
    const test::ScalarParameter& p = adamw.parameters[number];
    std::uint64_t elements = 0;
    FunctionKernel kernel([&](const StateSegment& segment) {
      ASSERT_EQ(segment.parameter, number);
      for (std::uint64_t i = 0; i < segment.count; ++i) {
        ASSERT_EQ(segment.field(0)[i], p.m[segment.first + i]);
        ASSERT_EQ(segment.field(1)[i], p.v[segment.first + i]);
      }
      elements += segment.count;
    });
    offload.read_state(std::vector<std::size_t>{number}, kernel);
    EXPECT_EQ(elements, p.m.size());
  }

  test::TempDir temp_;
};

TEST_F(StateChangesTest, AnyOrderOfChangesEqualsStateInVectors) {
  for (const std::uint64_t buffers : {3u, 9u, 12u, 100u}) {
    for (std::uint32_t seed = 0; seed < 6; ++seed) {
      SCOPED_TRACE(std::to_string(buffers) + " buffers, seed " +
                   std::to_string(seed));
      std::mt19937 random(seed);
      OptimizerOffload offload(options(buffers));
      ScalarAdamW adamw(offload);
      for (const std::size_t size : {40000u, 17u, 1u, 0u, 9000u, 300u, 8192u}) {
        adamw.add(size);
      }
      const std::size_t count = adamw.parameters.size();
      for (int round = 0; round < 60; ++round) {
        std::vector<std::size_t> some;
        for (std::size_t i = 0; i < count; ++i) {
          if (random() % 2 == 0) some.push_back(i);
        }
        const std::size_t one = random() % count;
        switch (random() % 8) {
          case 0:
            forget(offload, adamw, some);
            break;
          case 1:
            change(offload, adamw, one, 0.25f);
            break;
          case 2:
            if (offload.has_state(one)) look(offload, adamw, one);
            break;
          case 3:
            offload.make_room(some);
            break;
          case 4: {
            ScalarAdamW& stepped = adamw;
            for (const std::size_t number : some) stepped.prepare(number);
            offload.begin_step(stepped);
            for (const std::size_t number : some) offload.release(number);
            offload.end_step();
            break;
          }
          default:
            adamw.step(some);
        }
        ASSERT_TRUE(adamw.equal());
        for (std::size_t i = 0; i < count; ++i) {
          ASSERT_EQ(offload.step_of(i), adamw.parameters[i].step);
        }
      }
      EXPECT_LE(offload.stats().host_bytes_peak, buffers * kTile);
    }
  }
}

TEST_F(StateChangesTest, AThousandResetsTakeNoMoreSpace) {
  for (const std::uint64_t buffers : {10u, 40u}) {
    OptimizerOffload offload(options(buffers));
    ScalarAdamW adamw(offload);
    adamw.add(20 * kPerTile);
    adamw.add(5);
    adamw.add(7);
    adamw.step_all();
    const OptimizerOffloadStats before = offload.stats();
    for (std::size_t i = 0; i < 1000; ++i) {
      forget(offload, adamw, {i % 50 == 0 ? 0 : 1 + i % 2});
      if (i % 40 == 0) adamw.step_all();
    }
    adamw.step_all();
    EXPECT_TRUE(adamw.equal());
    const OptimizerOffloadStats after = offload.stats();
    EXPECT_LE(after.tiles, before.tiles + 3);
    EXPECT_LE(after.state_bytes, before.state_bytes + 4096);
    // What had stayed in memory makes room for what stays now.
    EXPECT_GE(after.resident_bytes + 2 * kTile, before.resident_bytes);
  }
}

TEST_F(StateChangesTest, ARemovedParametersNumberAndSpaceAreUsedAgain) {
  OptimizerOffload offload(options(20));
  ScalarAdamW adamw(offload);
  const std::size_t kept = adamw.add(3 * kPerTile);
  adamw.step({kept});
  std::size_t other = offload.add_parameter(5000, StateFields::floats(2));
  const std::size_t first = other;
  for (int i = 0; i < 200; ++i) {
    offload.add_state(std::vector<std::size_t>{other});
    EXPECT_TRUE(offload.has_state(other));
    EXPECT_LE(offload.stats().tiles, 5u);
    offload.remove_parameter(other);
    offload.remove_parameter(other);
    other = offload.add_parameter(static_cast<std::uint64_t>(5000 + i),
                                  StateFields::floats(2));
    EXPECT_EQ(other, first);
    EXPECT_FALSE(offload.has_state(other));
  }
  adamw.step({kept});
  EXPECT_TRUE(adamw.equal());
}

TEST_F(StateChangesTest, ARedefinedParameterBeginsAnew) {
  OptimizerOffload offload(options(4));
  ScalarAdamW adamw(offload);
  adamw.add(3 * kPerTile);
  const std::size_t other = offload.add_parameter(5, StateFields::floats(1));
  adamw.step({0});
  offload.add_state(std::vector<std::size_t>{other});
  EXPECT_THROW(offload.redefine_parameter(other, 7, StateFields()),
               std::invalid_argument);
  EXPECT_TRUE(offload.has_state(other));
  offload.redefine_parameter(other, 2 * kPerTile, StateFields::floats(3));
  EXPECT_FALSE(offload.has_state(other));
  std::uint64_t elements = 0;
  FunctionKernel count([&](const StateSegment& segment) {
    EXPECT_NE(segment.fields[2], nullptr);
    EXPECT_EQ(segment.step, 1u);
    elements += segment.count;
  });
  offload.step(std::vector<std::size_t>{other}, count);
  EXPECT_EQ(elements, 2 * kPerTile);
  adamw.step({0});
  EXPECT_TRUE(adamw.equal());
}

TEST_F(StateChangesTest, WhatTakesNoPartInAnOpenStepCanBeRedefined) {
  OptimizerOffload offload(options(4));
  ScalarAdamW adamw(offload);
  adamw.add(3 * kPerTile);
  adamw.step_all();
  const std::size_t with_room =
      offload.add_parameter(5, StateFields::floats(1));
  const std::size_t other = offload.add_parameter(5, StateFields::floats(1));
  offload.make_room(std::vector<std::size_t>{with_room});
  const StateFields fields = StateFields::floats(2);
  adamw.prepare(0);
  offload.begin_step(adamw);
  EXPECT_THROW(offload.redefine_parameter(0, 9, fields), StateError);
  EXPECT_THROW(offload.redefine_parameter(with_room, 9, fields), StateError);
  offload.redefine_parameter(other, 9, fields);
  offload.release(0);
  offload.end_step();
  EXPECT_TRUE(adamw.equal());
}

TEST_F(StateChangesTest, RoomIsNoState) {
  OptimizerOffload offload(options(4));
  ScalarAdamW adamw(offload);
  adamw.add(9 * kPerTile);
  adamw.add(5);
  const std::vector<std::size_t> all = {0, 1};
  offload.make_room(all);
  EXPECT_FALSE(offload.has_state(0));
  std::size_t shown = 0;
  FunctionKernel count([&](const StateSegment&) { ++shown; });
  offload.read_state(count);
  EXPECT_EQ(shown, 0u);
  adamw.step({1});
  EXPECT_TRUE(offload.has_state(1));
  EXPECT_FALSE(offload.has_state(0));
  adamw.step_all();
  EXPECT_TRUE(adamw.equal());
}

TEST_F(StateChangesTest, StateIsLeftAloneInAStep) {
  OptimizerOffload offload(options(4));
  ScalarAdamW adamw(offload);
  adamw.add(1000);
  const std::vector<std::size_t> all = {0};
  adamw.prepare(0);
  offload.begin_step(adamw);
  EXPECT_THROW(offload.forget_state(all), StateError);
  EXPECT_THROW(offload.make_room(all), StateError);
  EXPECT_THROW(offload.remove_parameter(0), StateError);
  const std::vector<OptimizerOffload::ParameterStep> steps = {{0, 1}};
  EXPECT_THROW(offload.change_state(steps, adamw), StateError);
  offload.release(0);
  offload.end_step();
  EXPECT_TRUE(adamw.equal());
}

}  // namespace
}  // namespace torch_ext
