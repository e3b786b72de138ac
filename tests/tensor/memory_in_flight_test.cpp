#include "tensor/memory_in_flight.h"

#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <list>
#include <memory>
#include <random>
#include <stdexcept>

namespace torch_ext {
namespace {

TEST(MemoryInFlightTest, RefusesWhatAnotherWritesAndNothingElse) {
  struct Use {
    std::int64_t begin, end;
    bool writes;
    std::shared_ptr<void> kept;
  };
  const at::Tensor memory = at::zeros({64}, at::kByte);
  const MemoryInFlight in_flight;
  std::minstd_rand random(1);
  const auto draw = [&random](std::int64_t below) {
    return static_cast<std::int64_t>(random()) % below;
  };
  std::list<Use> uses;
  int refused = 0;
  for (int i = 0; i < 20'000; ++i) {
    if (uses.size() > 6 || (!uses.empty() && draw(3) == 0)) {
      uses.erase(std::next(uses.begin(), draw(std::ssize(uses))));
    }
    const std::int64_t begin = draw(60);
    Use use{begin, begin + draw(65 - begin), draw(2) == 0, nullptr};
    const bool conflicts = std::ranges::any_of(uses, [&use](const Use& other) {
      return std::max(use.begin, other.begin) < std::min(use.end, other.end) &&
             (use.writes || other.writes);
    });
    const at::Tensor part = memory.narrow(0, use.begin, use.end - use.begin);
    try {
      use.kept = use.writes ? in_flight.destination(part, "read")
                            : in_flight.source(part, "write");
      ASSERT_FALSE(conflicts) << i;
      uses.push_back(std::move(use));
    } catch (const std::invalid_argument&) {
      ASSERT_TRUE(conflicts) << i;
      ++refused;
    }
  }
  EXPECT_GT(refused, 1000);
  EXPECT_FALSE(memory.storage().resizable());
  uses.clear();
  EXPECT_TRUE(memory.storage().resizable());
  EXPECT_NO_THROW(in_flight.destination(memory, "read"));
}

}  // namespace
}  // namespace torch_ext
