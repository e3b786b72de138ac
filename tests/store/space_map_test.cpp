#include "store/space_map.h"

#include <gtest/gtest.h>

namespace torch_ext {
namespace {

TEST(SpaceMapTest, TakesTheLowestSpaceThatFits) {
  SpaceMap map;
  map.give(0, 10);
  map.give(20, 30);
  map.give(60, 10);
  EXPECT_EQ(map.take(20), 20u);
  EXPECT_EQ(map.take(10), 0u);
  EXPECT_EQ(map.take(10), 40u);
  EXPECT_EQ(map.take(11), std::nullopt);
  EXPECT_EQ(map.take(10), 60u);
  EXPECT_EQ(map.take(1), std::nullopt);
}

TEST(SpaceMapTest, JoinsNeighboursInAnyOrderOfReturn) {
  for (const bool middle_last : {true, false}) {
    SpaceMap map;
    map.give(0, 10);
    if (!middle_last) map.give(10, 10);
    map.give(20, 10);
    if (middle_last) map.give(10, 10);
    EXPECT_EQ(map.tail(30), 30u);
    EXPECT_EQ(map.take(30), 0u);
  }
}

TEST(SpaceMapTest, KnowsWhatGrowingAtTheEndWouldJoin) {
  SpaceMap map;
  EXPECT_EQ(map.tail(0), 0u);
  map.give(10, 10);
  EXPECT_EQ(map.tail(20), 10u);
  EXPECT_EQ(map.tail(30), 0u);
}

}  // namespace
}  // namespace torch_ext
