#include "memory/arena.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace torch_ext {
namespace {

constexpr std::uint64_t kPage = 4096;

TEST(ArenaTest, ItHasAsManyPagesAsWereAskedForAndNoByteMore) {
  const Arena arena(10 * kPage + kPage / 2);
  EXPECT_EQ(arena.size(), 10 * kPage);
  std::memset(arena.at(0), 1, 10 * kPage);
  EXPECT_EQ(Arena(1).size(), kPage);
}

TEST(ArenaTest, ItCountsWhatIsTaken) {
  Arena arena(10 * kPage);
  arena.take(3 * kPage);
  arena.take(kPage);
  arena.give(3 * kPage);
  EXPECT_EQ(arena.in_use(), kPage);
  EXPECT_EQ(arena.peak(), 4 * kPage);
}

}  // namespace
}  // namespace torch_ext
