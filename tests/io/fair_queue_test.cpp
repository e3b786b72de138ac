#include "io/fair_queue.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <deque>
#include <map>
#include <string>

namespace torch_ext {
namespace {

struct Item : FairQueue<Item>::Link {
  char name = '?';
};

class FairQueueTest : public testing::Test {
 protected:
  Item* push(FairQueue<Item>& queue, char name, IoPriority priority,
             std::uint64_t caller = 1) {
    Item& item = items_.emplace_back();
    item.name = name;
    queue.push(&item, priority, caller);
    return &item;
  }

  /// The names of those that get the next `count` shares and want more.
  static std::string shares(FairQueue<Item>& queue, int count,
                            FairQueue<Item>::Blocked blocked = {}) {
    std::string names;
    for (int i = 0; i < count; ++i) {
      Item* item = queue.next(blocked);
      if (item == nullptr) break;
      names += item->name;
      queue.served(item);
    }
    return names;
  }

  std::deque<Item> items_;
};

TEST_F(FairQueueTest, TheMostUrgentHasTheShareAndOneOfSixteenIsForEachOther) {
  FairQueue<Item> queue;
  push(queue, 'w', IoPriority::kWriteBack);
  push(queue, 'p', IoPriority::kPrefetch);
  push(queue, 'n', IoPriority::kNow);
  std::map<char, int> counts;
  for (const char name : shares(queue, 1600)) ++counts[name];
  EXPECT_NEAR(counts['p'], 100, 1);
  EXPECT_NEAR(counts['w'], 100, 1);
  EXPECT_NEAR(counts['n'], 1400, 2);
}

TEST_F(FairQueueTest, OfThoseThatAreOverdueTheMoreUrgentComesFirst) {
  FairQueue<Item> queue;
  push(queue, 'w', IoPriority::kWriteBack);
  push(queue, 'p', IoPriority::kPrefetch);
  push(queue, 'n', IoPriority::kNow);
  const std::string names = shares(queue, 17);
  EXPECT_EQ(names, std::string(15, 'n') + "pw");
}

TEST_F(FairQueueTest, WhatIsBlockedIsPassedOverAndLosesNothing) {
  FairQueue<Item> queue;
  push(queue, 'w', IoPriority::kWriteBack);
  push(queue, 'n', IoPriority::kNow);
  EXPECT_EQ(shares(queue, 3, {true, false, false}), "www");
  EXPECT_EQ(shares(queue, 1, {true, true, true}), "");
  EXPECT_EQ(shares(queue, 3), "nnn");
}

TEST_F(FairQueueTest, CallersTakeTurnsWhateverEachHasPushed) {
  FairQueue<Item> queue(1);
  push(queue, 'a', IoPriority::kNow, 1);
  push(queue, 'b', IoPriority::kNow, 1);
  push(queue, 'c', IoPriority::kNow, 1);
  push(queue, 'x', IoPriority::kNow, 2);
  EXPECT_EQ(shares(queue, 6), "axbxcx");
}

TEST_F(FairQueueTest, ATurnIsSoManySharesAndTheRestGoesToTheEndOfTheLine) {
  FairQueue<Item> queue(3);
  push(queue, 'a', IoPriority::kNow, 1);
  push(queue, 'b', IoPriority::kNow, 1);
  push(queue, 'x', IoPriority::kNow, 2);
  EXPECT_EQ(shares(queue, 12), "aaaxxxbbbxxx");
}

TEST_F(FairQueueTest, AnItemThatIsRemovedInItsTurnEndsTheTurn) {
  FairQueue<Item> queue(8);
  Item* a = push(queue, 'a', IoPriority::kNow, 1);
  push(queue, 'b', IoPriority::kNow, 1);
  push(queue, 'x', IoPriority::kNow, 2);
  EXPECT_EQ(shares(queue, 2), "aa");
  queue.remove(a);
  EXPECT_EQ(shares(queue, 1), "x");
  EXPECT_EQ(queue.size(), 2U);
}

TEST_F(FairQueueTest, OneThatHasHadNoShareCanBeRemovedWithoutATurnBeingLost) {
  FairQueue<Item> queue(2);
  push(queue, 'a', IoPriority::kNow, 1);
  Item* b = push(queue, 'b', IoPriority::kNow, 1);
  push(queue, 'x', IoPriority::kNow, 2);
  EXPECT_EQ(shares(queue, 1), "a");
  queue.remove(b);
  EXPECT_EQ(shares(queue, 3), "axx");
}

TEST_F(FairQueueTest, ItIsEmptyWhenAllAreRemoved) {
  FairQueue<Item> queue;
  Item* a = push(queue, 'a', IoPriority::kPrefetch, 65);
  Item* b = push(queue, 'b', IoPriority::kPrefetch, 1);
  queue.remove(b);
  queue.remove(a);
  EXPECT_TRUE(queue.empty());
  EXPECT_EQ(queue.next(), nullptr);
}

}  // namespace
}  // namespace torch_ext
