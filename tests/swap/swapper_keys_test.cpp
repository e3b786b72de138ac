// Which value a key has, and who hears of an error.

#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <exception>
#include <thread>
#include <vector>

#include "support/swapper_test.h"

namespace torch_ext {
namespace {

using namespace test;  // NOLINT(google-build-using-namespace)

TEST_F(SwapperTest, CallsForOneKeyTakeEffectInTheirOrder) {
  Swapper swapper(options());
  AlignedBuffer back(kMiB);
  std::vector<SwapTicket> tickets;
  for (std::uint64_t i = 0; i < 20; ++i) {
    tickets.push_back(swapper.swap_out("k", on_device(kMiB, i)));
  }
  swapper.swap_in("k", on_host(back.bytes())).wait();
  EXPECT_TRUE(test::holds_pattern(back.bytes(), 19));
  for (const SwapTicket& ticket : tickets) ticket.wait();
}

TEST_F(SwapperTest, AReadSeesTheValueOfItsTimeThoughARewriteFollows) {
  Swapper swapper(options());
  AlignedBuffer back(kMiB);
  swapper.swap_out("k", on_device(kMiB, 1));
  const SwapTicket read = swapper.swap_in("k", on_host(back.bytes()));
  swapper.swap_out("k", on_device(2 * kMiB, 2)).wait();
  swapper.remove("k");
  read.wait();
  EXPECT_TRUE(test::holds_pattern(back.bytes(), 1));
  EXPECT_THROW(swapper.entry("k"), KeyError);
}

TEST_F(SwapperTest, ALaterWriteThatEndsFirstIsNotUndoneByAnEarlierOne) {
  script_->set_plan([](std::size_t index, const IoRequest&) {
    return index == 0 ? Fault::held() : Fault();
  });
  Swapper swapper(scripted());
  const SwapTicket first = swapper.swap_out("k", on_device(4096, 1));
  while (script_->held() == 0) std::this_thread::yield();
  swapper.swap_out("k", on_device(4096, 2)).wait();
  script_->release_all();
  first.wait();
  EXPECT_TRUE(stored(swapper, "k", 2));
}

TEST_F(SwapperTest, AnEntryIsReadThoughItsKeyIsRewrittenAndRemoved) {
  Swapper swapper(options());
  const auto tag = std::make_shared<const int>(7);
  swapper.swap_out("k", on_device(4096, 1), tag).wait();
  const Swapper::Entry entry = swapper.entry("k");
  swapper.swap_out("k", on_device(8192, 2)).wait();
  swapper.remove("k");
  swapper.swap_out("other", on_device(4096, 3)).wait();
  EXPECT_EQ(entry.size(), 4096u);
  EXPECT_EQ(entry.tag(), tag);
  AlignedBuffer back(4096);
  swapper.swap_in(entry, on_host(back.bytes())).wait();
  EXPECT_TRUE(test::holds_pattern(back.bytes(), 1));
}

TEST_F(SwapperTest, AnEntryWhoseWriteHasFailedGivesItsErrorAndCloseEnds) {
  script_->set_plan(test::only(0, {.error = EIO, .hold = true}));
  Swapper swapper(scripted());
  const SwapTicket write = swapper.swap_out("k", on_device(4096, 1));
  const Swapper::Entry entry = swapper.entry("k");
  while (script_->held() == 0) std::this_thread::yield();
  script_->release_all();
  EXPECT_THROW(write.wait(), IoError);
  AlignedBuffer back(4096);
  // Through the copy thread, and past it.
  EXPECT_THROW(swapper.swap_in(entry, on_device(4096, 2)).wait(), IoError);
  EXPECT_THROW(swapper.swap_in(entry, on_host(back.bytes())).wait(), IoError);
  EXPECT_EQ(swapper.stats().in_flight, 0u);
  EXPECT_EQ(swapper.stats().failures, 3u);
  swapper.close();
}

TEST_F(SwapperTest, AFailedRewriteThrowsAndLeavesTheOldValue) {
  Swapper swapper(scripted());
  swapper.swap_out("k", on_device(kMiB, 1)).wait();
  script_->set_plan([](std::size_t, const IoRequest& request) {
    return request.op == IoRequest::Op::kWrite ? Fault::fail(ENOSPC) : Fault();
  });
  const DeviceBytes source = on_device(kMiB, 2);
  const SwapTicket ticket = swapper.swap_out("k", source);
  try {
    ticket.wait();
    ADD_FAILURE() << "no error";
  } catch (const IoError& error) {
    EXPECT_EQ(error.error(), ENOSPC);
    EXPECT_TRUE(error.failure().offset.has_value());
    EXPECT_NE(error.failure().path.find(dir_.path()), std::string::npos);
  }
  EXPECT_THROW(ticket.wait(), IoError);
  EXPECT_TRUE(holds(source, 2));
  EXPECT_TRUE(stored(swapper, "k", 1));
  script_->set_plan(nullptr);
  swapper.swap_out("k", source).wait();
  EXPECT_TRUE(stored(swapper, "k", 2));
}

TEST_F(SwapperTest, AReadCalledAfterAWriteThatFailsFailsWithItsError) {
  script_->set_plan([](std::size_t index, const IoRequest&) {
    return index == 0 ? Fault::held() : Fault::fail(EIO);
  });
  Swapper swapper(scripted());
  swapper.swap_out("other", on_device(4096, 1));
  const SwapTicket write = swapper.swap_out("k", on_device(kMiB, 2));
  AlignedBuffer back(kMiB);
  try {
    swapper.swap_in("k", on_host(back.bytes())).wait();
    ADD_FAILURE() << "stale or missing data was handed out";
  } catch (const IoError& error) {
    EXPECT_EQ(error.error(), EIO);
  }
  script_->release_all();
}

TEST_F(SwapperTest, AHostReadCalledDuringItsWriteEndsAsTheWriteDoes) {
  for (const int error : {0, EIO}) {
    script_ = std::make_shared<FaultScript>(
        [error](std::size_t, const IoRequest& request) {
          return request.op == IoRequest::Op::kWrite
                     ? Fault{.error = error, .hold = true}
                     : Fault();
        });
    Swapper swapper(scripted());
    AlignedBuffer source(kMiB);
    AlignedBuffer back(kMiB);
    test::fill_pattern(source.bytes(), 1);
    const SwapTicket write = swapper.swap_out("k", on_host(source.bytes()));
    const SwapTicket read = swapper.swap_in("k", on_host(back.bytes()));
    EXPECT_FALSE(read.wait_for(milliseconds(20)));
    script_->release_all();
    if (error == 0) {
      read.wait();
      EXPECT_TRUE(test::holds_pattern(back.bytes(), 1));
    } else {
      EXPECT_THROW(read.wait(), IoError);
      EXPECT_THROW(write.wait(), IoError);
    }
  }
}

TEST_F(SwapperTest, AReadThatBringsWrongBytesFails) {
  SwapperOptions wrong = scripted();
  Swapper swapper(wrong);
  swapper.swap_out("k", on_device(kMiB, 1)).wait();
  script_->set_plan(test::from(0, Fault::fail(EIO)));
  const SwapTicket ticket = swapper.swap_in("k", on_device(kMiB, 2));
  EXPECT_THROW(ticket.wait(), IoError);
  EXPECT_TRUE(ticket.done());
  script_->set_plan(nullptr);
  EXPECT_TRUE(stored(swapper, "k", 1));
}

TEST_F(SwapperTest, AnErrorThatNobodyWaitedForIsThrownByTheKeysNextCallOnce) {
  Swapper swapper(scripted());
  swapper.swap_out("k", on_device(4096, 1)).wait();
  script_->set_plan(test::from(0, Fault::fail(EIO)));
  static_cast<void>(swapper.swap_out("k", on_device(4096, 2)));
  while (swapper.stats().in_flight > 0) std::this_thread::yield();
  script_->set_plan(nullptr);
  swapper.swap_out("other", on_device(4096, 3)).wait();
  EXPECT_THROW(swapper.swap_out("k", on_device(4096, 4)), IoError);
  EXPECT_TRUE(stored(swapper, "k", 1));
  swapper.close();
}

TEST_F(SwapperTest,
       AKeyIsRemovedWhateverFailedAndCloseThrowsWhatNobodyHasSeen) {
  Swapper swapper(scripted());
  swapper.swap_out("k", on_device(4096, 1)).wait();
  script_->set_plan(test::from(0, Fault{.error = EIO, .hold = true}));
  static_cast<void>(swapper.swap_out("k", on_device(4096, 2)));
  static_cast<void>(swapper.swap_in("k", on_device(4096, 2)));
  static_cast<void>(swapper.swap_out("never complete", on_device(4096, 3)));
  script_->release_all();
  while (swapper.stats().in_flight > 0) std::this_thread::yield();
  script_->set_plan(nullptr);
  swapper.remove("k");
  swapper.remove("never complete");
  EXPECT_TRUE(swapper.keys().empty());
  EXPECT_THROW(swapper.remove("k"), KeyError);
  EXPECT_THROW(swapper.remove("never complete"), KeyError);
  swapper.swap_out("k", on_device(4096, 4));
  EXPECT_TRUE(stored(swapper, "k", 4));
  EXPECT_THROW(swapper.close(), IoError);
}

TEST_F(SwapperTest, WhatFailsAfterItsKeyWasRemovedIsNoErrorOfTheNextValue) {
  Swapper swapper(scripted());
  script_->set_plan(test::from(0, Fault{.error = EIO, .hold = true}));
  static_cast<void>(swapper.swap_out("k", on_device(4096, 1)));
  while (script_->held() == 0) std::this_thread::yield();
  swapper.remove("k");
  script_->set_plan(nullptr);
  script_->release_all();
  while (swapper.stats().in_flight > 0) std::this_thread::yield();
  swapper.swap_out("k", on_device(4096, 2));
  EXPECT_TRUE(stored(swapper, "k", 2));
  EXPECT_THROW(swapper.close(), IoError);
}

TEST_F(SwapperTest, CloseThrowsTheErrorThatNobodyHasSeenAfterClosing) {
  Swapper swapper(scripted());
  script_->set_plan(test::from(0, Fault::fail(EIO)));
  static_cast<void>(swapper.swap_out("k", on_device(4096, 1)));
  EXPECT_THROW(swapper.close(), IoError);
  swapper.close();
  EXPECT_THROW(swapper.keys(), StateError);
  EXPECT_EQ(swapper.stats().failures, 1u);
}

TEST_F(SwapperTest, AnErrorSeenThroughATicketIsNotThrownAgain) {
  Swapper swapper(scripted());
  script_->set_plan(test::from(0, Fault::fail(EIO)));
  EXPECT_THROW(swapper.swap_out("k", on_device(4096, 1)).wait(), IoError);
  script_->set_plan(nullptr);
  EXPECT_TRUE(swapper.keys().empty());
  EXPECT_THROW(swapper.entry("k"), KeyError);
  swapper.swap_out("k", on_device(4096, 2)).wait();
  swapper.close();
}

TEST_F(SwapperTest, ACopyThatFailsIsTheOperationsErrorAndWritesNothing) {
  Swapper swapper(scripted());
  device_->fail_copy(1, std::make_exception_ptr(StateError("bad device")));
  const SwapTicket ticket = swapper.swap_out("k", on_device(9 * kMiB, 1));
  EXPECT_THROW(ticket.wait(), StateError);
  EXPECT_TRUE(swapper.keys().empty());
  device_->fail_copy_call(std::make_exception_ptr(StateError("no copy")));
  EXPECT_THROW(swapper.swap_out("k", on_device(4096, 1)).wait(), StateError);
  swapper.swap_out("k", on_device(4096, 2)).wait();
  device_->fail_copy(device_->counts().copies,
                     std::make_exception_ptr(StateError("bad device")));
  const SwapTicket in = swapper.swap_in("k", on_device(4096, 3));
  while (!in.done()) std::this_thread::yield();
  EXPECT_THROW(in.wait(), StateError);
  EXPECT_TRUE(stored(swapper, "k", 2));
}

TEST_F(SwapperTest, ACopyThatFailsIsNotHiddenByTheNextChunks) {
  Swapper swapper(scripted());
  swapper.swap_out("k", on_device(12 * kMiB, 1)).wait();
  for (int i = 0; i < 20; ++i) {
    std::atomic<int> arrivals = 0;
    DeviceBytes out = on_device(12 * kMiB, 2);
    out.on_arrival = [&](Device&) { ++arrivals; };
    device_->fail_copy_call(std::make_exception_ptr(StateError("no copy")));
    const SwapTicket ticket = swapper.swap_in("k", out);
    EXPECT_THROW(ticket.wait(), StateError);
    while (!ticket.done()) std::this_thread::yield();
    EXPECT_EQ(arrivals, 0);
  }
}

}  // namespace
}  // namespace torch_ext
