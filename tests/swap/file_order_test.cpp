#include "swap/file_order.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
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
  place.end = place.begin + (below(20) == 0 ? 60 : below(8));
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
        ASSERT_EQ(entered.waits, !next.blockers.empty());
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

// Pairs of them all would take minutes.
TEST(FileOrderTest, AHundredThousandRangesOfAFileAreSoonEntered) {
  FileOrder order;
  std::vector<FileOrder::Entry*> entries;
  for (std::uint64_t i = 0; i < 100000; ++i) {
    const auto entered = order.enter({.path = "/file",
                                      .file = File::Identity{1, 2},
                                      .begin = i * 4096,
                                      .end = (i + 1) * 4096,
                                      .write = true},
                                     nullptr);
    ASSERT_FALSE(entered.waits);
    entries.push_back(entered.entry);
  }
  for (FileOrder::Entry* entry : entries)
    EXPECT_TRUE(order.leave(entry).empty());
}

}  // namespace
}  // namespace torch_ext
