#include "paging/touch_plan.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <new>
#include <vector>

#include "support/failing_new.h"

namespace torch_ext {
namespace {

using Units = std::vector<TouchPlan::Unit>;

void touch(TouchPlan& plan, const Units& units) {
  for (const TouchPlan::Unit unit : units) plan.touch(unit);
}

Units next(const TouchPlan& plan, std::size_t count) {
  Units units;
  for (std::size_t i = 0; i < count; ++i) units.push_back(plan.next(i));
  return units;
}

/// Two layers, there and back, with repetitions.
TouchPlan there_and_back() {
  TouchPlan plan;
  plan.begin_round();
  touch(plan, {0, 0, 1, 2, 2, 2, 1, 0, 0});
  plan.begin_round();
  return plan;
}

TEST(TouchPlanTest, TheFirstRoundIsThePlanForTheNext) {
  TouchPlan plan = there_and_back();
  EXPECT_EQ(plan.size(), 5U);
  EXPECT_EQ(next(plan, 5), (Units{0, 1, 2, 1, 0}));
  EXPECT_EQ(plan.units(), (Units{0, 1, 2}));
}

TEST(TouchPlanTest, TouchesMoveItAndRepeatedOnesDoNot) {
  TouchPlan plan = there_and_back();
  EXPECT_EQ(plan.touch(0), 1U);
  EXPECT_EQ(plan.touch(0), 0U);
  EXPECT_EQ(plan.touch(1), 1U);
  EXPECT_EQ(next(plan, 5), (Units{2, 1, 0, 0, 1}));
  EXPECT_EQ(plan.distance(2), 0U);
  EXPECT_EQ(plan.distance(0), 2U);
  // It may be touched once more before another one is.
  EXPECT_EQ(plan.distance(1), 0U);
  EXPECT_EQ(plan.distance(9), TouchPlan::kNever);
}

TEST(TouchPlanTest, AUnitThatWasLeftOutIsPassedOver) {
  TouchPlan plan = there_and_back();
  plan.touch(0);
  EXPECT_EQ(plan.touch(2), 2U);
  EXPECT_EQ(plan.next(0), 1U);
}

TEST(TouchPlanTest, AnUnknownUnitAndOneTouchedOnceMoreLeaveIt) {
  TouchPlan plan;
  Units many;
  for (TouchPlan::Unit i = 0; i < 40; ++i) many.push_back(i);
  touch(plan, many);
  plan.begin_round();
  touch(plan, {0, 1, 2, 3});
  EXPECT_EQ(plan.touch(99), 0U);
  EXPECT_EQ(plan.touch(1), 0U);
  EXPECT_EQ(plan.next(0), 4U);
}

TEST(TouchPlanTest, AJumpTakesItAlong) {
  TouchPlan plan;
  Units many;
  for (TouchPlan::Unit i = 0; i < 40; ++i) many.push_back(i);
  touch(plan, many);
  plan.begin_round();
  touch(plan, {0, 1});
  EXPECT_EQ(plan.touch(30), TouchPlan::kNever);
  EXPECT_EQ(plan.next(0), 31U);
}

TEST(TouchPlanTest, ARoundBeginsAtTheFirstTouch) {
  TouchPlan plan = there_and_back();
  touch(plan, {0, 1, 2});  // An evaluation: all of it was foreseen.
  plan.begin_round();
  EXPECT_EQ(plan.next(0), 0U);
  EXPECT_EQ(plan.size(), 5U);
}

TEST(TouchPlanTest, ARoundThatWasNotForeseenIsTheNextPlan) {
  TouchPlan plan;
  touch(plan, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9});
  plan.begin_round();
  touch(plan, {9, 4, 0, 7, 2});
  plan.begin_round();
  EXPECT_EQ(next(plan, 5), (Units{9, 4, 0, 7, 2}));
  EXPECT_EQ(plan.counts().plans, 2U);
}

TEST(TouchPlanTest, WhereMemoryRunsOutThePlanStays) {
  TouchPlan plan = there_and_back();
  touch(plan, {9, 4, 0, 7, 2});
  bool thrown = true;
  for (std::size_t good = 0; thrown; ++good) {
    thrown = false;
    try {
      const test::FailingNew failing(good);
      plan.begin_round();
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    if (thrown) {
      EXPECT_EQ(plan.units(), (Units{0, 1, 2})) << good;
    }
    ASSERT_LT(good, 1000U);
  }
  EXPECT_EQ(next(plan, 5), (Units{9, 4, 0, 7, 2}));
}

TEST(TouchPlanTest, WithoutAPlanWhatWasTouchedLastIsNearest) {
  TouchPlan plan;
  touch(plan, {0, 1, 0});
  EXPECT_LT(plan.distance(0), plan.distance(1));
  EXPECT_LT(plan.distance(1), plan.distance(2));
}

/// A step of three layers: forward, back, and an update of each.
void train(TouchPlan& plan) {
  for (const TouchPlan::Unit unit : {0U, 1U, 2U}) plan.touch(unit, true);
  touch(plan, {2, 1, 0});
  touch(plan, {0, 1, 2});
}

TEST(TouchPlanTest, NobodyHasToSayWhereAForwardPassBegins) {
  TouchPlan plan;
  touch(plan, {0, 1, 2});  // The bytes are copied in.
  train(plan);
  EXPECT_TRUE(plan.empty());
  train(plan);
  EXPECT_EQ(plan.size(), 7U);
  for (int i = 0; i < 3; ++i) {
    const auto before = plan.counts();
    train(plan);
    EXPECT_EQ(plan.counts().foreseen - before.foreseen,
              plan.counts().touches - before.touches);
  }
  EXPECT_EQ(plan.counts().plans, 1U);
}

TEST(TouchPlanTest, TheWayBackMayEndWhereTheNextPassBegins) {
  TouchPlan plan;
  for (int i = 0; i < 3; ++i) {
    for (const TouchPlan::Unit unit : {0U, 1U, 2U}) plan.touch(unit, true);
    touch(plan, {2, 1, 0, 0});  // Updated on the way.
  }
  EXPECT_EQ(plan.size(), 4U);
  EXPECT_EQ(plan.counts().plans, 1U);
}

TEST(TouchPlanTest, APassOfInferenceIsARoundToo) {
  TouchPlan plan;
  for (int i = 0; i < 3; ++i) {
    for (const TouchPlan::Unit unit : {5U, 6U, 7U, 5U}) plan.touch(unit, true);
  }
  // The head is the embedding: one touch with the next pass.
  EXPECT_EQ(plan.size(), 3U);
  EXPECT_EQ(plan.counts().plans, 1U);
}

TEST(TouchPlanTest, TouchesWithoutRoundsAreForgotten) {
  TouchPlan plan;
  for (int i = 0; i < 1000; ++i) touch(plan, {0, 1, 2});
  EXPECT_TRUE(plan.empty());
  train(plan);
  train(plan);
  train(plan);
  EXPECT_EQ(plan.size(), 7U);
}

}  // namespace
}  // namespace torch_ext
