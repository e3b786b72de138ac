#include "swap/file_order.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace torch_ext {
namespace {

struct Entered {
  FilePlace place;
  OperationPtr operation;
  FileOrder::Entry* entry = nullptr;
  std::set<OperationPtr> blockers = {};
};

bool same_file(const FilePlace& a, const FilePlace& b) {
  return (!a.path.empty() && a.path == b.path) || (a.file && a.file == b.file);
}

// Three files of which one has two names and one is a descriptor's only.
FilePlace draw(std::mt19937_64& random) {
  const auto below = [&](std::uint64_t n) { return random() % n; };
  FilePlace place;
  const std::uint64_t which = below(4);
  if (which < 3) place.path = "/file" + std::to_string(which);
  if (which != 0) {
    place.file = File::Identity{.device = 1, .inode = which == 1 ? 2 : which};
  }
  place.begin = below(100);
  const std::uint64_t kind = below(60);
  place.end = place.begin + (kind == 0  ? std::uint64_t{1} << 40
                             : kind < 4 ? 60
                                        : below(9));
  place.write = below(2) == 0;
  return place;
}

// Against the definition: an operation waits for all that entered before it and
// conflict with it, and for no other.
TEST(FileOrderTest, WhatConflictsComesInTheOrderOfEntering) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    std::mt19937_64 random(seed);
    FileOrder order;
    std::vector<Entered> inside;
    for (int step = 0; step < 400; ++step) {
      if (inside.empty() || random() % 5 < 3) {
        Entered next{.place = draw(random),
                     .operation = std::make_shared<SwapOperation>()};
        for (const Entered& other : inside) {
          if (same_file(other.place, next.place) &&
              other.place.conflicts_with(next.place)) {
            next.blockers.insert(other.operation);
          }
        }
        ASSERT_EQ(order.busy(next.place), !next.blockers.empty());
        const auto entered = order.enter(next.place, next.operation);
        ASSERT_EQ(entered.conflicts, !next.blockers.empty());
        if (entered.conflicts) {
          ASSERT_TRUE(order.wait(entered.entry));
        }
        next.entry = entered.entry;
        inside.push_back(std::move(next));
        continue;
      }
      const auto runs = [](const Entered& e) { return e.blockers.empty(); };
      auto ended = std::ranges::find_if(inside, runs);
      if (random() % 2 == 0) {
        ended = inside.end();
        while (!runs(*--ended)) continue;
      }
      std::set<OperationPtr> expected;
      for (Entered& other : inside) {
        if (other.blockers.erase(ended->operation) > 0 && runs(other)) {
          expected.insert(other.operation);
        }
      }
      const auto ready = order.leave(ended->entry);
      ASSERT_EQ(std::set<OperationPtr>(ready.begin(), ready.end()), expected)
          << "seed " << seed;
      inside.erase(ended);
    }
    // Those inside own themselves until they leave.
    while (!inside.empty()) {
      const auto ended = std::ranges::find_if(
          inside, [](const Entered& e) { return e.blockers.empty(); });
      order.leave(ended->entry);
      for (Entered& other : inside) other.blockers.erase(ended->operation);
      inside.erase(ended);
    }
  }
}

// Enters so many that pairs of them all would take minutes. None waits for more
// than `most`, each of which it finds by path and by file.
void expect_many_soon_entered(
    std::size_t most, const std::vector<FilePlace>& first,
    const std::function<FilePlace(std::uint64_t)>& place) {
  FileOrder order;
  std::vector<FileOrder::Entry*> entries;
  std::size_t blockers = 0;
  const auto enter = [&](FilePlace at) {
    at.path = "/file";
    at.file = File::Identity{.device = 1, .inode = 2};
    const auto entered = order.enter(at, nullptr);
    if (entered.conflicts) order.wait(entered.entry);
    entries.push_back(entered.entry);
    blockers = std::max(blockers, entries.back()->blockers);
  };
  for (const FilePlace& at : first) enter(at);
  for (std::uint64_t i = 0; i < 30000; ++i) enter(place(i));
  EXPECT_EQ(blockers, 2 * most);
  for (FileOrder::Entry* entry : entries) {
    ASSERT_EQ(entry->blockers, 0U);
    order.leave(entry);
  }
}

// Its thread still sets the operation up, so no other may have it.
TEST(FileOrderTest, NobodyGetsAnOperationBeforeItSaysThatItWaits) {
  const FilePlace place{.path = "/file", .end = 1, .write = true};
  const std::vector<OperationPtr> none;
  for (const bool ends_early : {false, true}) {
    FileOrder order;
    const auto second = std::make_shared<SwapOperation>();
    const auto before = order.enter(place, std::make_shared<SwapOperation>());
    ASSERT_FALSE(before.conflicts);
    const auto entered = order.enter(place, second);
    ASSERT_TRUE(entered.conflicts);
    if (ends_early) {
      EXPECT_EQ(order.leave(before.entry), none);
      EXPECT_FALSE(order.wait(entered.entry));
    } else {
      EXPECT_TRUE(order.wait(entered.entry));
      EXPECT_EQ(order.leave(before.entry), std::vector<OperationPtr>{second});
    }
    EXPECT_EQ(order.leave(entered.entry), none);
  }
}

FilePlace block(std::uint64_t i, bool write) {
  return {.begin = i * 4096, .end = (i + 1) * 4096, .write = write};
}

TEST(FileOrderTest, ManyRangesOfAFileAreSoonEntered) {
  expect_many_soon_entered(0, {}, [](auto i) { return block(i, true); });
}

TEST(FileOrderTest, ManyRangesBesideAVeryLongOneAreSoonEntered) {
  for (const bool write : {false, true}) {
    for (const bool is_long_write : {false, true}) {
      const FilePlace very_long{.end = std::uint64_t{1} << 40,
                                .write = is_long_write};
      expect_many_soon_entered(write || is_long_write ? 1 : 0, {very_long},
                               [&](auto i) { return block(i, write); });
    }
  }
}

TEST(FileOrderTest, ManyOnTheSameBytesAreSoonEntered) {
  expect_many_soon_entered(0, {}, [](auto) { return block(1, false); });
  expect_many_soon_entered(1, {}, [](auto) { return block(1, true); });
  expect_many_soon_entered(2, {}, [](auto i) { return block(1, i % 2 == 0); });
}

}  // namespace
}  // namespace torch_ext
