#include "memory/arena.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <random>

namespace torch_ext {
namespace {

constexpr std::uint64_t kPage = 4096;

TEST(ArenaTest, ItHasAsManyPagesAsWereAskedForAndNoByteMore) {
  Arena arena(10 * kPage + kPage / 2);
  EXPECT_EQ(arena.size(), 10 * kPage);
  EXPECT_TRUE(arena.take_at(0, 10 * kPage));
  std::memset(arena.at(0), 1, 10 * kPage);
  EXPECT_FALSE(arena.take_at(10 * kPage, kPage));
  EXPECT_EQ(Arena(1).size(), kPage);
}

// Against a map of pages.
TEST(ArenaTest, RunsNeverOverlapAndFreeOnesCanAlwaysBeTaken) {
  constexpr std::uint64_t kPages = 32;
  std::minstd_rand random(1);
  Arena arena(kPages * kPage);
  std::map<std::uint64_t, std::uint64_t> runs;
  std::uint64_t peak = 0;
  for (int step = 0; step < 5000; ++step) {
    if (random() % 2 == 0 && !runs.empty()) {
      auto run = runs.begin();
      std::advance(run, random() % runs.size());
      arena.give(run->first * kPage, run->second * kPage);
      runs.erase(run);
    } else {
      const std::uint64_t begin = random() % kPages;
      const std::uint64_t pages = 1 + random() % 6;
      bool is_free = begin + pages <= kPages;
      for (const auto& [first, count] : runs) {
        is_free &= begin + pages <= first || first + count <= begin;
      }
      ASSERT_EQ(arena.take_at(begin * kPage, pages * kPage), is_free);
      if (is_free) runs[begin] = pages;
    }
    std::uint64_t in_use = 0;
    for (const auto& [first, count] : runs) in_use += count * kPage;
    peak = std::max(peak, in_use);
    ASSERT_EQ(arena.in_use(), in_use);
    ASSERT_EQ(arena.peak(), peak);
  }
}

}  // namespace
}  // namespace torch_ext
