#include "torch_ext/paging/pager.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support/child.h"
#include "support/failing_new.h"
#include "support/faulty_engine.h"
#include "support/io_queue_test.h"
#include "support/pattern.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

using test::failure_of;
using test::Fault;
using test::kBlock;

using Unit = Pager::Unit;
using Units = std::vector<Unit>;

class PagerTest : public test::IoQueueTest {
 protected:
  ~PagerTest() override { script_->release_all(); }

  void make(std::uint64_t memory, int queue_depth = 8,
            std::function<void()> while_waiting = {}) {
    StoreOptions options{
        .directory = dir_.path(),
        .aio = test::small_blocks(),
        .engine_factory = test::faulty_factory("memory", script_)};
    options.aio.queue_depth = queue_depth;
    pager_.emplace(PagerOptions{.store = std::make_shared<Store>(options),
                                .memory = memory,
                                .while_waiting = std::move(while_waiting)});
  }

  /// So many units of a block, each with the pattern of its number.
  void add(std::size_t count, std::uint64_t bytes = kBlock) {
    for (std::size_t i = 0; i < count; ++i) {
      const Unit unit =
          pager_->add(bytes, "unit " + std::to_string(units_.size()));
      units_.push_back(unit);
      write(unit, unit);
    }
  }

  Pager::Pins pin(Unit unit, Access access = Access::kRead) {
    const Pager::Touch touch{unit, access};
    return pager_->pin({&touch, 1});
  }
  Pager::Pins pin(const Units& units) {
    std::vector<Pager::Touch> touches;
    for (const Unit unit : units) touches.push_back({unit});
    return pager_->pin(touches);
  }

  std::span<std::byte> bytes_of(const Pager::Pins& pins, Unit unit,
                                std::size_t i = 0) const {
    return {pins.data(i), pager_->bytes(unit)};
  }
  void write(Unit unit, std::uint64_t seed, Access access = Access::kReplace) {
    const Pager::Pins pins = pin(unit, access);
    test::fill_pattern(bytes_of(pins, unit), seed);
  }
  bool holds(Unit unit, std::uint64_t seed) {
    const Pager::Pins pins = pin(unit);
    return test::holds_pattern(bytes_of(pins, unit), seed);
  }

  void round(const Units& units) {
    pager_->begin_round();
    for (const Unit unit : units) EXPECT_TRUE(holds(unit, unit)) << unit;
  }

  /// From now on, until script_->release_all().
  void hold_reads() const {
    script_->set_plan([](std::size_t, const IoRequest& request) {
      return request.op == IoRequest::Op::kRead ? Fault::held() : Fault();
    });
  }

  std::size_t reads() const {
    const auto log = script_->log();
    return static_cast<std::size_t>(
        std::ranges::count(log, IoRequest::Op::kRead, &IoRequest::op));
  }

  void settle() const {
    // What was read ahead has ended once nothing more is asked for.
    std::uint64_t before = 0;
    do {
      before = pager_->stats().bytes_read;
      std::this_thread::sleep_for(std::chrono::milliseconds(30));
    } while (pager_->stats().bytes_read != before);
  }

  std::optional<Pager> pager_;
  Units units_;
};

TEST_F(PagerTest, MoreThanFitsComesBackAsWritten) {
  make(4 * kBlock);
  for (const std::uint64_t bytes : {1UL, 4096UL, 5000UL, kBlock, 3 * kBlock}) {
    add(3, bytes);
  }
  for (int round = 0; round < 3; ++round) {
    for (const Unit unit : units_) EXPECT_TRUE(holds(unit, unit));
  }
  for (const Unit unit : units_) write(unit, unit + 100, Access::kWrite);
  for (const Unit unit : units_) EXPECT_TRUE(holds(unit, unit + 100));
  EXPECT_LE(pager_->stats().peak, 4 * kBlock);
  EXPECT_EQ(pager_->stats().memory, 4 * kBlock);
}

TEST_F(PagerTest, ANewUnitIsZeros) {
  make(2 * kBlock);
  const Unit unit = pager_->add(5000, "new");
  add(3);
  const Pager::Pins pins = pin(unit);
  const auto bytes = bytes_of(pins, unit);
  EXPECT_EQ(std::ranges::count(bytes, std::byte{0}), 5000);
}

TEST_F(PagerTest, AllThatAnOperatorNeedsIsThereAtOnce) {
  make(4 * kBlock);
  add(8);
  const Pager::Pins pins = pin({7, 0, 3, 5});
  const Unit order[] = {7, 0, 3, 5};
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_TRUE(test::holds_pattern(bytes_of(pins, order[i], i), order[i]));
  }
}

// Whatever was where before. Only packing them anew makes room for all.
TEST_F(PagerTest, UnitsOfAnySizeFitWhereTheirSumDoes) {
  make(8 * kBlock);
  std::vector<std::uint64_t> sizes;
  for (const std::uint64_t blocks : {1U, 2U, 3U, 1U, 4U, 1U, 2U, 5U, 1U, 6U}) {
    add(1, blocks * kBlock);
    sizes.push_back(blocks);
  }
  std::minstd_rand random(1);
  for (int step = 0; step < 400; ++step) {
    Units wanted;
    std::uint64_t sum = 0;
    for (int tries = 0; tries < 12; ++tries) {
      const auto unit = static_cast<Unit>(random() % units_.size());
      if (sum + sizes[unit] > 8 || std::ranges::count(wanted, unit) > 0) {
        continue;
      }
      sum += sizes[unit];
      wanted.push_back(unit);
    }
    const Pager::Pins pins = pin(wanted);
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      ASSERT_TRUE(test::holds_pattern(bytes_of(pins, wanted[i], i), wanted[i]));
    }
  }
}

TEST_F(PagerTest, WhatNeedsMoreThanThereIsSaysSoAndChangesNothing) {
  make(3 * kBlock);
  add(5);
  try {
    pin({0, 1, 2, 3});
    FAIL();
  } catch (const BudgetError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find(std::to_string(4 * kBlock)), std::string::npos) << text;
    EXPECT_NE(text.find("'unit 0', 'unit 1', 'unit 2', ..."), std::string::npos)
        << text;
  }
  EXPECT_THROW(pager_->add(4 * kBlock, "large"), std::invalid_argument);
  for (const Unit unit : units_) EXPECT_TRUE(holds(unit, unit));
}

TEST_F(PagerTest, WhatCanNeverFitWaitsForNobodyAndLeavesOthersThere) {
  make(3 * kBlock);
  add(5);
  pager_->flush();
  std::optional<Pager::Pins> pins = pin({3, 4});
  const std::size_t requests = script_->requests();
  std::thread([&] { EXPECT_THROW(pin({0, 1, 2, 3}), BudgetError); }).join();
  pins.reset();
  EXPECT_EQ(script_->requests(), requests);
  EXPECT_TRUE(pager_->in_memory(3));
}

TEST_F(PagerTest, WhatIsHeldIsInTheWay) {
  make(3 * kBlock);
  add(5);
  const Pager::Touch held[] = {{0}, {1}};
  {
    const Pager::Pins hold = pager_->hold(held);
    EXPECT_TRUE(holds(4, 4));
    EXPECT_THROW(pin({2, 3}), BudgetError);
    EXPECT_TRUE(test::holds_pattern(bytes_of(hold, 1, 1), 1));
  }
  pin({2, 3, 4});
}

TEST_F(PagerTest, AThreadWaitsForTheOperatorsOfOthers) {
  make(2 * kBlock);
  add(4);
  std::optional<Pager::Pins> first = pin({0, 1});
  std::atomic<bool> pinned = false;
  std::thread other([&] {
    const Pager::Pins pins = pin({2, 3});
    pinned = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_FALSE(pinned);
  // This one is in an operator: for others it does not wait.
  EXPECT_THROW(pin(2), BudgetError);
  first.reset();
  other.join();
  EXPECT_TRUE(pinned);
}

TEST_F(PagerTest, TheSecondRoundIsReadAhead) {
  make(4 * kBlock);
  add(12);
  const Units order = units_;
  round(order);
  for (int i = 0; i < 3; ++i) {
    const std::uint64_t misses = pager_->stats().misses;
    round(order);
    EXPECT_LE(pager_->stats().misses, misses + 1);
  }
  EXPECT_EQ(pager_->stats().plans, 1U);
  EXPECT_GE(pager_->stats().foreseen, 36U);
}

TEST_F(PagerTest, WhatComesNextIsReadWhileNobodyAsks) {
  make(4 * kBlock);
  add(12);
  round(units_);
  pager_->begin_round();
  EXPECT_TRUE(holds(0, 0));
  settle();
  EXPECT_TRUE(pager_->in_memory(1));
  EXPECT_TRUE(pager_->in_memory(2));
}

// A cache of what was used last would read all of it each time.
TEST_F(PagerTest, ResidentsAreReadOnce) {
  make(10 * kBlock);
  add(20);
  round(units_);
  round(units_);
  settle();
  EXPECT_EQ(pager_->stats().resident, 7 * kBlock);
  for (int i = 0; i < 3; ++i) {
    const std::uint64_t before = pager_->stats().bytes_read;
    round(units_);
    settle();
    EXPECT_LE(pager_->stats().bytes_read - before, (20 - 7 + 1) * kBlock);
  }
  std::size_t first_half = 0;
  for (const Unit unit : units_) {
    if (pager_->resident(unit) && unit < 10) ++first_half;
  }
  EXPECT_GE(first_half, 3U);
  EXPECT_LE(first_half, 4U);
}

TEST_F(PagerTest, WhatFitsIsReadOnceAndWrittenByFlushOnly) {
  make(10 * kBlock);
  add(6);
  round(units_);
  round(units_);
  settle();
  const PagerStats before = pager_->stats();
  EXPECT_EQ(before.resident, 6 * kBlock);
  for (int i = 0; i < 3; ++i) {
    pager_->begin_round();
    for (const Unit unit : units_)
      write(unit, unit + static_cast<Unit>(i), Access::kWrite);
  }
  EXPECT_EQ(pager_->stats().bytes_read, before.bytes_read);
  EXPECT_EQ(pager_->stats().bytes_written, before.bytes_written);
  pager_->flush();
  EXPECT_EQ(pager_->stats().bytes_written, before.bytes_written + 6 * kBlock);
  pager_->flush();
  EXPECT_EQ(pager_->stats().bytes_written, before.bytes_written + 6 * kBlock);
}

TEST_F(PagerTest, WhatWasTouchedLastIsNotEvictedToReadAhead) {
  make(3 * kBlock);
  add(8);
  round(units_);
  pager_->begin_round();
  for (const Unit unit : units_) {
    EXPECT_TRUE(holds(unit, unit));
    settle();
    EXPECT_TRUE(pager_->in_memory(unit));
  }
}

// 1.0 / 49 * 49 is less than 1.
TEST_F(PagerTest, WhereAllFitAllStay) {
  make(49 * kBlock);
  add(49);
  pager_->begin_round();
  EXPECT_EQ(pager_->stats().resident, 49 * kBlock);
}

TEST_F(PagerTest, OnlyWhatHasChangedIsWritten) {
  make(3 * kBlock);
  add(8);
  pager_->flush();
  const std::uint64_t written = pager_->stats().bytes_written;
  for (const Unit unit : units_) EXPECT_TRUE(holds(unit, unit));
  EXPECT_EQ(pager_->stats().bytes_written, written);
  write(5, 105, Access::kWrite);
  pager_->flush();
  EXPECT_EQ(pager_->stats().bytes_written, written + kBlock);
}

TEST_F(PagerTest, WhatIsBeingWrittenIsReadButNotChanged) {
  make(4 * kBlock);
  script_->set_plan(test::from(0, Fault::held()));
  add(2);  // The second one's touch has the first one written.
  while (script_->held() == 0) std::this_thread::yield();
  EXPECT_TRUE(holds(0, 0));
  std::atomic<bool> changed = false;
  std::thread changing([&] {
    write(0, 100, Access::kWrite);
    changed = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_FALSE(changed);
  script_->release_all();
  changing.join();
  EXPECT_TRUE(holds(0, 100));
}

TEST_F(PagerTest, WhatIsReplacedIsNotRead) {
  make(3 * kBlock);
  add(8);
  pager_->flush();
  for (Unit unit = 1; unit < 8; ++unit) EXPECT_TRUE(holds(unit, unit));
  const std::size_t before = reads();
  write(0, 100);
  EXPECT_EQ(reads(), before);
  EXPECT_TRUE(holds(0, 100));
}

TEST_F(PagerTest, WhatWasToReplaceItMayFail) {
  make(3 * kBlock);
  add(8);
  for (Unit unit = 1; unit < 8; ++unit) EXPECT_TRUE(holds(unit, unit));
  {
    Pager::Pins pins = pin(0, Access::kReplace);
    bytes_of(pins, 0)[0] = std::byte{1};
    pins.undo_replaced();
  }
  EXPECT_TRUE(holds(0, 0));
}

// Another one has not been asked for it, but it can be in memory already.
TEST_F(PagerTest, WhatIsToBeReplacedIsOldUntilThen) {
  make(4 * kBlock);
  add(8);
  pager_->flush();
  hold_reads();
  const Pager::Touch touches[] = {{0, Access::kReplace}, {1}};
  std::atomic<bool> seen = false;
  std::thread replacing([&] {
    const Pager::Pins pins = pager_->pin(touches);
    while (!seen) std::this_thread::yield();
    test::fill_pattern(bytes_of(pins, 0), 100);
  });
  while (script_->held() == 0) std::this_thread::yield();
  EXPECT_TRUE(pager_->in_memory(0));
  // It is in an operator, and so it waits for no turn.
  const Pager::Pins outer = pin(7);
  std::thread releasing([&] {
    while (script_->held() < 2 && !seen) std::this_thread::yield();
    script_->release_all();
  });
  EXPECT_TRUE(holds(0, 0));
  seen = true;
  releasing.join();
  replacing.join();
  EXPECT_TRUE(holds(0, 100));
}

TEST_F(PagerTest, WhatIsReplacedAndReadAtOnceIsRead) {
  make(3 * kBlock);
  add(8);
  const Pager::Touch touches[] = {{0, Access::kReplace}, {0, Access::kRead}};
  const Pager::Pins pins = pager_->pin(touches);
  EXPECT_TRUE(test::holds_pattern(bytes_of(pins, 0), 0));
}

TEST_F(PagerTest, AFlushDoesNotWriteWhatIsHalfReplaced) {
  make(3 * kBlock);
  add(8);
  pager_->flush();
  const std::uint64_t written = pager_->stats().bytes_written;
  Pager::Pins pins = pin(0, Access::kReplace);
  bytes_of(pins, 0)[0] = std::byte{1};
  pager_->flush();
  EXPECT_EQ(pager_->stats().bytes_written, written);
  pins.undo_replaced();
  EXPECT_THROW(pins.data(0), std::invalid_argument);
  EXPECT_TRUE(holds(0, 0));
  pins.release();
  EXPECT_TRUE(holds(0, 0));
}

TEST_F(PagerTest, AFlushWritesWhatIsOnlyReadOnce) {
  make(3 * kBlock);
  add(1);
  const Pager::Pins pins = pin(0);
  pager_->flush();
  EXPECT_EQ(pager_->stats().bytes_written, kBlock);
  pager_->flush();
  EXPECT_EQ(pager_->stats().bytes_written, kBlock);
}

TEST_F(PagerTest, WhatOthersHaveChangedSinceIsNotUndone) {
  make(3 * kBlock);
  add(8);
  pager_->flush();
  Pager::Pins pins = pin(0, Access::kReplace);
  write(0, 100, Access::kWrite);
  pins.undo_replaced();
  pins.release();
  EXPECT_TRUE(holds(0, 100));
}

TEST_F(PagerTest, WhatWasUndoneIsPinnedAnewByTheNextPin) {
  make(4 * kBlock);
  std::vector<std::byte*> told;
  const Unit unit = pager_->add(kBlock, "unit",
                                [&](std::byte* data) { told.push_back(data); });
  write(unit, 5);
  add(8);
  told.clear();
  Pager::Pins outer = pin(unit, Access::kReplace);
  outer.undo_replaced();
  const Pager::Pins inner = pin(unit);
  ASSERT_EQ(told.size(), 3U);
  EXPECT_EQ(told[2], inner.data(0));
  outer.release();
  EXPECT_EQ(told.size(), 3U);
  EXPECT_TRUE(test::holds_pattern(bytes_of(inner, unit), 5));
}

// Packed around what was pinned, they lie apart when that is gone.
TEST_F(PagerTest, WhatFitsOnceAPinHasEndedIsPackedAgain) {
  make(8 * kBlock);
  for (const std::uint64_t blocks : {3U, 1U, 2U, 3U, 3U}) {
    add(1, blocks * kBlock);
  }
  pager_->flush();
  pager_->remove(0);
  pager_->remove(2);
  const Unit low = pager_->add(3 * kBlock, "low");
  std::optional<Pager::Pins> pins;
  {
    const Pager::Touch touches[] = {{low}, {1}};
    pins = pager_->pin(touches);
    EXPECT_EQ(pins->data(1) - pins->data(0), 3 * kBlock);
    pins = pin(1);
  }
  const Unit two = pager_->add(2 * kBlock, "two");
  write(two, two);
  pager_->flush();
  // It reads three times and packs, which is to read again.
  std::atomic<std::size_t> read = 0;
  script_->set_plan([&](std::size_t, const IoRequest& request) {
    if (request.op != IoRequest::Op::kRead) return Fault();
    return ++read > 2 * 2 ? Fault::held() : Fault();
  });
  std::thread packing([&] { EXPECT_NO_THROW(pin({two, 3, 4})); });
  while (script_->held() == 0) std::this_thread::yield();
  pins.reset();
  script_->release_all();
  packing.join();
}

TEST_F(PagerTest, AnOperatorMayHaveWhatAThreadThatWaitsWants) {
  std::atomic<bool> stopped = false, go_on = false;
  std::thread::id waiting;
  make(4 * kBlock, 8, [&] {
    if (std::this_thread::get_id() != waiting) return;
    stopped = true;
    while (!go_on) std::this_thread::yield();
  });
  add(8);
  pager_->flush();
  const Pager::Pins outer = pin(0);
  hold_reads();
  std::thread other([&] {
    waiting = std::this_thread::get_id();
    pin({1, 2, 3});
  });
  while (script_->held() < 3) std::this_thread::yield();
  script_->release_all();
  while (!stopped) std::this_thread::yield();
  settle();
  EXPECT_NO_THROW(EXPECT_TRUE(holds(4, 4)));
  go_on = true;
  other.join();
}

TEST_F(PagerTest, AUnitThatIsRemovedWhileOthersAreChosenDoesNotStay) {
  make(6 * kBlock);
  add(4);
  pager_->flush();
  hold_reads();
  pager_->begin_round();  // All stay, and are read.
  while (script_->held() < 4) std::this_thread::yield();
  std::thread removing([&] { pager_->remove(1); });
  const auto is_gone = [&] {
    try {
      return pager_->bytes(1) == 0;
    } catch (const std::invalid_argument&) {
      return true;
    }
  };
  while (!is_gone()) std::this_thread::yield();
  for (Unit unit = 4; unit < 6; ++unit) {
    write(pager_->add(kBlock, "new"), unit);
  }
  pager_->begin_round();
  script_->release_all();
  removing.join();
  EXPECT_EQ(pager_->stats().resident, 2 * kBlock);
}

TEST_F(PagerTest, WhatStaysNoLongerIsWrittenBack) {
  make(8 * kBlock);
  add(12);
  round(units_);
  pager_->begin_round();
  Unit resident = 0;
  while (!pager_->resident(resident)) ++resident;
  write(resident, 100, Access::kWrite);
  Units others = units_;
  std::erase(others, resident);
  std::ranges::reverse(others);
  round(others);
  pager_->begin_round();
  ASSERT_FALSE(pager_->resident(resident));
  const std::uint64_t written = pager_->stats().bytes_written;
  pin(others[0]);
  settle();
  EXPECT_EQ(pager_->stats().bytes_written, written + kBlock);
}

// Whichever allocation fails, on a way that evicts, writes and reads.
TEST_F(PagerTest, WhereMemoryRunsOutNoByteIsLostAndNobodyWaits) {
  std::atomic<std::size_t> waits = 0;
  make(kBlock, 8, [&] { ++waits; });
  add(4);
  pager_->flush();
  bool thrown = true;
  for (std::size_t good = 0; thrown; ++good) {
    write(0, 100);
    const std::size_t requests = script_->requests();
    waits = 0;
    thrown = false;
    try {
      const test::FailingNew failing(good);
      pin(3);
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    if (script_->requests() == requests) {
      EXPECT_EQ(waits, 0U) << good;
    }
    for (const Unit unit : units_) {
      EXPECT_TRUE(holds(unit, unit == 0 ? 100 : unit)) << good;
    }
    ASSERT_LT(good, 1000U);
  }
}

TEST_F(PagerTest, ItSaysWhereAUnitIsWhileItIsPinned) {
  make(2 * kBlock);
  std::vector<std::byte*> told;
  const Unit unit =
      pager_->add(100, "unit", [&](std::byte* data) { told.push_back(data); });
  {
    const Pager::Pins outer = pin(unit);
    const Pager::Pins inner = pin(unit);
    EXPECT_EQ(told, std::vector{outer.data(0)});
  }
  ASSERT_EQ(told.size(), 2U);
  EXPECT_EQ(told[1], nullptr);
}

TEST_F(PagerTest, WhatIsNeededNowOvertakesWhatIsReadAhead) {
  make(6 * kBlock, /*queue_depth=*/1);
  add(12);
  pager_->flush();
  script_->set_plan(test::from(0, Fault::held()));
  // The writes were the first round. Now six units are read ahead, the first
  // of them at once.
  pager_->begin_round();
  while (script_->held() == 0) std::this_thread::yield();
  const std::size_t first = script_->log().size() - 1;
  std::thread needing([&] { EXPECT_TRUE(holds(4, 4)); });
  while (pager_->stats().late == 0) std::this_thread::yield();
  // Its pin has noted the touch, and then waits.
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  script_->release(first);
  while (script_->log().size() < first + 2) std::this_thread::yield();
  // They lie on the drive in the order of their numbers.
  const auto log = script_->log();
  EXPECT_EQ(log[first + 1].offset - log[first].offset, 4 * kBlock);
  script_->release_all();
  needing.join();
}

TEST_F(PagerTest, AReadThatFailsIsAnErrorOfItsPinAndCanBeTriedAgain) {
  make(2 * kBlock);
  add(6);
  pager_->flush();
  script_->set_plan([](std::size_t, const IoRequest& request) {
    return request.op == IoRequest::Op::kRead ? Fault::fail(EIO) : Fault();
  });
  const IoFailure failure = failure_of([&] { pin(0); });
  EXPECT_EQ(failure.error, EIO);
  EXPECT_EQ(failure.op, "pread");
  EXPECT_FALSE(failure.path.empty());
  EXPECT_FALSE(pager_->in_memory(0));
  script_->set_plan(nullptr);
  for (const Unit unit : units_) EXPECT_TRUE(holds(unit, unit));
}

TEST_F(PagerTest, AFailureToReadAheadIsNoError) {
  make(4 * kBlock);
  add(12);
  round(units_);
  script_->set_plan([](std::size_t, const IoRequest& request) {
    return request.op == IoRequest::Op::kRead ? Fault::fail(EIO) : Fault();
  });
  pager_->begin_round();
  settle();
  script_->set_plan(nullptr);
  for (const Unit unit : units_) EXPECT_TRUE(holds(unit, unit));
}

TEST_F(PagerTest, AWriteThatFailsLosesNothing) {
  make(3 * kBlock);
  add(6);
  pager_->flush();
  script_->set_plan([](std::size_t, const IoRequest& request) {
    return request.op == IoRequest::Op::kWrite ? Fault::fail(EIO) : Fault();
  });
  write(0, 100, Access::kWrite);
  write(1, 101, Access::kWrite);
  write(2, 102, Access::kWrite);
  EXPECT_EQ(failure_of([&] { pin({3, 4, 5}); }).error, EIO);
  EXPECT_EQ(failure_of([&] { pager_->flush(); }).error, EIO);
  script_->set_plan(nullptr);
  // The drive's other places are sound.
  for (const Unit unit : units_) {
    EXPECT_TRUE(holds(unit, unit < 3 ? unit + 100 : unit)) << unit;
  }
  pager_->flush();
}

TEST_F(PagerTest, AnInterruptLeavesTheWait) {
  std::atomic<bool> interrupt = false;
  make(2 * kBlock, 8, [&] {
    if (interrupt) throw std::runtime_error("interrupted");
  });
  add(4);
  pager_->flush();
  script_->set_plan(test::from(0, Fault::held()));
  interrupt = true;
  EXPECT_THROW(pin(0), std::runtime_error);
  interrupt = false;
  script_->release_all();
  for (const Unit unit : units_) EXPECT_TRUE(holds(unit, unit));
}

TEST_F(PagerTest, ARemovedUnitsSpaceIsFree) {
  make(4 * kBlock);
  add(4);
  pager_->begin_round();
  pager_->remove(2);
  EXPECT_THROW(pin(2), std::invalid_argument);
  EXPECT_LE(pager_->stats().in_use, 3 * kBlock);
  add(1);
  for (const Unit unit : {0U, 1U, 3U, 4U}) EXPECT_TRUE(holds(unit, unit));
  const Pager::Pins pins = pin(0);
  EXPECT_THROW(pager_->remove(0), StateError);
}

TEST_F(PagerTest, AForkedChildIsRefused) {
  make(2 * kBlock);
  add(1);
  EXPECT_EQ(test::in_child([&]() -> std::string {
              try {
                pin(0);
              } catch (const StateError& error) {
                return "";
              }
              return "no error";
            }),
            "");
}

// Another thread may have the lock then, and is not there.
TEST_F(PagerTest, PinsEndInAForkedChildWithoutALock) {
  make(2 * kBlock);
  add(1);
  std::optional<Pager::Pins> pins = pin(0);
  std::string wrong = "not forked";
  const Unit forking = pager_->add(100, "forking", [&](std::byte* data) {
    if (data == nullptr) return;
    wrong = test::in_child([&]() -> std::string {
      alarm(20);
      pins->undo_replaced();
      pins.reset();
      return "";
    });
  });
  pin(forking);
  EXPECT_EQ(wrong, "");
}

TEST_F(PagerTest, BadOptionsAreRefused) {
  EXPECT_THROW(Pager({.memory = kBlock}), std::invalid_argument);
  EXPECT_THROW(make(100), std::invalid_argument);
  make(kBlock);
  EXPECT_THROW(pager_->add(0, "nothing"), std::invalid_argument);
}

}  // namespace
}  // namespace torch_ext
