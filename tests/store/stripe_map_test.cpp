#include "store/stripe_map.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

namespace torch_ext {
namespace {

class StripeMapTest : public testing::TestWithParam<std::vector<int>> {};

TEST_P(StripeMapTest, EveryPeriodHasEachDriveAsOftenAsItWeighs) {
  const std::vector<int>& weights = GetParam();
  const StripeMap map(weights);
  ASSERT_EQ(map.drives(), weights.size());
  std::uint64_t sum = 0;
  for (const int weight : weights) sum += static_cast<std::uint64_t>(weight);
  EXPECT_EQ(sum % map.period(), 0u);
  for (std::size_t drive = 0; drive < weights.size(); ++drive) {
    EXPECT_EQ(map.count(drive, 0, map.period()) * sum,
              map.period() * static_cast<std::uint64_t>(weights[drive]));
  }
}

TEST_P(StripeMapTest, CountsWhatItDeals) {
  const StripeMap map(GetParam());
  for (std::uint64_t first = 0; first < map.period(); ++first) {
    std::vector<std::uint64_t> dealt(map.drives(), 0);
    for (std::uint64_t slot = first; slot < first + 3 * map.period(); ++slot) {
      for (std::size_t drive = 0; drive < map.drives(); ++drive) {
        ASSERT_EQ(map.count(drive, first, slot), dealt[drive]);
      }
      ++dealt[map.drive_of(slot)];
    }
  }
}

TEST_P(StripeMapTest, NoDriveIsEverTwoSlotsFromItsShare) {
  const std::vector<int>& weights = GetParam();
  const StripeMap map(weights);
  double sum = 0;
  for (const int weight : weights) sum += weight;
  for (std::uint64_t slots = 0; slots <= map.period(); ++slots) {
    for (std::size_t drive = 0; drive < map.drives(); ++drive) {
      const double share = static_cast<double>(slots) * weights[drive] / sum;
      EXPECT_LT(
          std::abs(static_cast<double>(map.count(drive, 0, slots)) - share), 2);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Weights, StripeMapTest,
    testing::Values(std::vector<int>{1}, std::vector<int>{7},
                    std::vector<int>{1, 1}, std::vector<int>{3, 1},
                    std::vector<int>{2, 4, 6}, std::vector<int>{100, 1, 99},
                    std::vector<int>{5, 3, 2, 1, 1}));

}  // namespace
}  // namespace torch_ext
