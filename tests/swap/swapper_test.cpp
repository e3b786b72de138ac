#include "torch_ext/swap/swapper.h"

#include <gtest/gtest.h>

#include <initializer_list>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "support/swapper_test.h"

namespace torch_ext {
namespace {

using namespace test;  // NOLINT(google-build-using-namespace)

const std::size_t kSizes[] = {0,        1,        511,      4095,
                              4096,     4097,     65536,    65537,
                              3 * kMiB, 4 * kMiB, 9 * kMiB, 9 * kMiB + 4097};

TEST_F(SwapperTest, HostBytesOfAnySizeAndAlignmentComeBackExactly) {
  Swapper swapper(options());
  for (const std::size_t shift : std::initializer_list<std::size_t>{0, 64, 1}) {
    for (const std::size_t size : kSizes) {
      AlignedBuffer source(size + shift);
      test::fill_pattern(source.bytes(shift, size), size);
      swapper.swap_out("k", on_host(source.bytes(shift, size))).wait();
      AlignedBuffer back(size + shift);
      swapper.swap_in("k", on_host(back.bytes(shift, size))).wait();
      EXPECT_TRUE(test::holds_pattern(back.bytes(shift, size), size))
          << size << " bytes, shifted by " << shift;
    }
  }
}

TEST_F(SwapperTest, DeviceBytesOfAnySizeComeBackExactly) {
  Swapper swapper(options());
  for (const std::size_t size : kSizes) {
    const DeviceBytes source = on_device(size, size);
    swapper.swap_out("k", source).wait();
    const DeviceBytes back = on_device(size, 1000 + size);
    swapper.swap_in("k", back).wait();
    device_->synchronize();
    EXPECT_TRUE(holds(back, size)) << size << " bytes";
  }
}

// Removing the copy stream's wait for `start` makes this fail.
TEST_F(SwapperTest, SwapOutCopiesAfterTheWorkThatWasQueuedBeforeIt) {
  Swapper swapper(options());
  const DeviceBytes source = on_device(5 * kMiB, 1);
  device_->hold(Stream::kCurrent);
  device_->run_on_current([&] {
    test::fill_pattern({source.data, source.size}, 2);
  });
  const SwapTicket ticket = swapper.swap_out("k", source);
  EXPECT_TRUE(device_->await_copies(1));
  device_->settle(Stream::kCopy);
  device_->release(Stream::kCurrent);
  ticket.wait();
  EXPECT_TRUE(stored(swapper, "k", 2));
}

TEST_F(SwapperTest, SwapInWaitsForTheReadersOfItsDestination) {
  Swapper swapper(options());
  swapper.swap_out("k", on_device(5 * kMiB, 1)).wait();
  const DeviceBytes out = on_device(5 * kMiB, 2);
  bool reader_saw_old = false;
  device_->hold(Stream::kCurrent);
  device_->run_on_current([&] { reader_saw_old = holds(out, 2); });
  const SwapTicket ticket = swapper.swap_in("k", out);
  EXPECT_TRUE(device_->await_copies(3));
  device_->settle(Stream::kCopy);
  device_->release(Stream::kCurrent);
  ticket.wait();
  device_->synchronize();
  EXPECT_TRUE(reader_saw_old);
  EXPECT_TRUE(holds(out, 1));
}

// Removing the current stream's wait in wait_source makes this fail.
TEST_F(SwapperTest, AfterWaitSourceTheSourceMayBeOverwritten) {
  Swapper swapper(options());
  const DeviceBytes source = on_device(5 * kMiB, 1);
  device_->hold(Stream::kCopy);
  const SwapTicket ticket = swapper.swap_out("k", source);
  ticket.wait_source();
  device_->run_on_current([&] {
    test::fill_pattern({source.data, source.size}, 2);
  });
  device_->settle(Stream::kCurrent);
  device_->release(Stream::kCopy);
  ticket.wait();
  device_->synchronize();
  EXPECT_TRUE(stored(swapper, "k", 1));
}

TEST_F(SwapperTest, WaitSourceOfHostBytesAllowsOverwritingThem) {
  script_->set_plan(test::from(0, Fault::held()));
  for (const std::size_t shift : std::initializer_list<std::size_t>{0, 64}) {
    Swapper swapper(scripted());
    AlignedBuffer source(3 * kMiB + 100 + shift);
    auto bytes = source.bytes(shift, 3 * kMiB + 100);
    test::fill_pattern(bytes, 1);
    const SwapTicket ticket = swapper.swap_out("k", on_host(bytes));
    // Aligned memory is written in place: its guard holds until it is.
    const bool in_place = shift == 0;
    EXPECT_EQ(ticket.wait_source_for(milliseconds(in_place ? 20 : 20000)),
              !in_place);
    script_->release_all();
    ticket.wait_source();
    test::fill_pattern(bytes, 2);
    ticket.wait();
    EXPECT_TRUE(stored(swapper, "k", 1));
    script_->set_plan(nullptr);
  }
}

TEST_F(SwapperTest, WaitSourceWaitsForTheCopiesButNotForTheDisk) {
  script_->set_plan(test::from(0, Fault::held()));
  Swapper swapper(scripted());
  const SwapTicket ticket = swapper.swap_out("k", on_device(kMiB, 1));
  ticket.wait_source();
  device_->synchronize();
  EXPECT_FALSE(ticket.done());
  EXPECT_THROW(ticket.wait(milliseconds(1)), TimeoutError);
  script_->release_all();
  ticket.wait();
  EXPECT_TRUE(ticket.done());
}

TEST_F(SwapperTest, WorkQueuedAfterWaitSeesTheBytesThatSwapInBrings) {
  Swapper swapper(options());
  swapper.swap_out("k", on_device(5 * kMiB, 1)).wait();
  const DeviceBytes out = on_device(5 * kMiB, 2);
  device_->hold(Stream::kCopy);
  const SwapTicket ticket = swapper.swap_in("k", out);
  ticket.wait();
  EXPECT_FALSE(ticket.done());
  bool saw_new = false;
  device_->run_on_current([&] { saw_new = holds(out, 1); });
  device_->settle(Stream::kCurrent);
  device_->release(Stream::kCopy);
  device_->synchronize();
  EXPECT_TRUE(saw_new);
}

TEST_F(SwapperTest, ASwapInOvertakesSwapOutsThatAreNotInFlight) {
  SwapperOptions one_slot = scripted();
  one_slot.store.aio.queue_depth = 1;
  Swapper swapper(one_slot);
  constexpr std::size_t kBlock = 64 << 10;  // Host memory, moved in place.
  AlignedBuffer memory(4 * kBlock);
  swapper.swap_out("in", on_host(memory.bytes(0, kBlock))).wait();
  const std::size_t before = script_->requests();
  script_->set_plan(test::from(before, Fault::held()));
  std::vector<SwapTicket> tickets;
  for (std::size_t i = 1; i < 3; ++i) {
    tickets.push_back(swapper.swap_out(
        std::to_string(i), on_host(memory.bytes(i * kBlock, kBlock))));
  }
  while (script_->held() == 0) std::this_thread::yield();
  tickets.push_back(
      swapper.swap_in("in", on_host(memory.bytes(3 * kBlock, kBlock))));
  script_->release_all();
  for (const SwapTicket& ticket : tickets) ticket.wait();
  EXPECT_EQ(script_->log().at(before).op, IoRequest::Op::kWrite);
  EXPECT_EQ(script_->log().at(before + 1).op, IoRequest::Op::kRead);
  EXPECT_EQ(script_->log().at(before + 2).op, IoRequest::Op::kWrite);
}

TEST_F(SwapperTest, CopiesOfOneChunkOverlapTheWriteOfAnother) {
  script_->set_plan(test::from(0, Fault::held()));
  Swapper swapper(scripted());
  const SwapTicket ticket = swapper.swap_out("k", on_device(12 * kMiB, 1));
  while (script_->held() == 0) std::this_thread::yield();
  EXPECT_TRUE(device_->await_copies(3));
  script_->release_all();
  ticket.wait();
}

// Giving a buffer back before its write has ended makes this fail.
TEST_F(SwapperTest, ABufferIsNotUsedAgainWhileItsWriteIsInFlight) {
  SwapperOptions small = scripted();
  small.host_memory = 2 * small.store.aio.block_size;
  small.store.verify = false;
  script_->set_plan([](std::size_t index, const IoRequest&) {
    return index == 0 ? Fault::held() : Fault();
  });
  Swapper swapper(small);
  const SwapTicket first = swapper.swap_out("a", on_device(65536, 1));
  const SwapTicket second = swapper.swap_out("b", on_device(kMiB, 2));
  second.wait();
  script_->release_all();
  first.wait();
  EXPECT_TRUE(stored(swapper, "a", 1));
  EXPECT_TRUE(stored(swapper, "b", 2));
  EXPECT_LE(swapper.stats().host_bytes_peak, small.host_memory);
}

TEST_F(SwapperTest, ABufferIsNotUsedAgainWhileItsCopyIsInFlight) {
  SwapperOptions small = options();
  small.host_memory = 2 * small.store.aio.block_size;
  Swapper swapper(small);
  swapper.swap_out("a", on_device(kMiB, 1)).wait();
  swapper.swap_out("b", on_device(kMiB, 2)).wait();
  const DeviceBytes a = on_device(kMiB, 3);
  const DeviceBytes b = on_device(kMiB, 4);
  const std::size_t made = device_->counts().copies;
  device_->hold(Stream::kCopy);
  const SwapTicket first = swapper.swap_in("a", a);
  const SwapTicket second = swapper.swap_in("b", b);
  // Not ASSERT: the swapper would wait for the stream that is held.
  EXPECT_TRUE(device_->await_copies(made + 1));
  EXPECT_FALSE(second.wait_for(milliseconds(20)));
  device_->release(Stream::kCopy);
  first.wait();
  second.wait();
  device_->synchronize();
  EXPECT_TRUE(holds(a, 1));
  EXPECT_TRUE(holds(b, 2));
}

TEST_F(SwapperTest, AlignedHostBytesGoPastCopiesThatHoldAllBuffers) {
  SwapperOptions small = options();
  small.host_memory = small.store.aio.block_size;
  Swapper swapper(small);
  device_->hold(Stream::kCopy);
  const SwapTicket waiting = swapper.swap_out("a", on_device(kMiB, 1));
  EXPECT_TRUE(device_->await_copies(1));
  AlignedBuffer memory(kMiB);
  test::fill_pattern(memory.bytes(), 2);
  swapper.swap_out("b", on_host(memory.bytes())).wait();
  EXPECT_TRUE(stored(swapper, "b", 2));
  EXPECT_FALSE(waiting.done());
  device_->release(Stream::kCopy);
  waiting.wait();
  EXPECT_TRUE(stored(swapper, "a", 1));
}

TEST_F(SwapperTest, OnArrivalIsCalledOnceBeforeAnybodyHearsOfTheEnd) {
  Swapper swapper(options());
  const std::size_t size = 9 * kMiB + 100;
  swapper.swap_out("k", on_device(size, 1)).wait();
  AlignedBuffer memory(size + 64);
  for (DeviceBytes out : {on_device(size, 2), on_host(memory.bytes(0, size)),
                          on_host(memory.bytes(64, size))}) {
    std::atomic<int> calls = 0;
    device_->hold(Stream::kCopy);
    out.on_arrival = [&](Device& device) {
      EXPECT_EQ(&device, out.device.get());
      if (&device == device_.get()) {
        // Queued behind the copies, and waited for with them.
        device.copy(out.data, out.data + 1, 1, false);
      } else {
        EXPECT_TRUE(holds(out, 1));
      }
      ++calls;
    };
    const SwapTicket ticket = swapper.swap_in("k", out);
    ticket.wait();
    EXPECT_EQ(calls, 1);
    device_->release(Stream::kCopy);
    device_->synchronize();
    while (!ticket.done()) std::this_thread::yield();
    EXPECT_EQ(calls, 1);
  }
}

TEST_F(SwapperTest, WhatOnArrivalThrowsIsTheOperationsError) {
  Swapper swapper(options());
  swapper.swap_out("k", on_device(kMiB, 1)).wait();
  AlignedBuffer memory(kMiB);
  for (DeviceBytes out : {on_device(kMiB, 2), on_host(memory.bytes())}) {
    out.on_arrival = [](Device&) { throw std::domain_error("arrival"); };
    EXPECT_THROW(swapper.swap_in("k", out).wait(), std::domain_error);
  }
  EXPECT_TRUE(stored(swapper, "k", 1));
}

TEST_F(SwapperTest, SourceAndDestinationMayBeDroppedAtOnce) {
  Swapper swapper(options());
  device_->hold(Stream::kCopy);
  const SwapTicket out = swapper.swap_out("k", on_device(5 * kMiB, 1));
  device_->release(Stream::kCopy);
  out.wait();
  device_->hold(Stream::kCopy);
  static_cast<void>(swapper.swap_in("k", on_device(5 * kMiB, 2)));
  device_->release(Stream::kCopy);
  swapper.close();
  device_->synchronize();
  EXPECT_TRUE(device_->misuses().empty());
}

TEST_F(SwapperTest, KeepAlivesAreDroppedByTheCallersThreadsOnly) {
  std::set<std::thread::id> droppers;
  std::mutex mutex;
  const auto keep_alive = [&] {
    return std::shared_ptr<void>(nullptr, [&](void*) {
      std::lock_guard lock(mutex);
      droppers.insert(std::this_thread::get_id());
    });
  };
  Swapper swapper(options());
  AlignedBuffer memory(kMiB);
  const auto self = std::this_thread::get_id();
  for (int i = 0; i < 20; ++i) {
    DeviceBytes bytes = on_host(memory.bytes());
    bytes.keep_alive = keep_alive();
    swapper.swap_out("k" + std::to_string(i % 3), std::move(bytes));
  }
  swapper.close();
  EXPECT_EQ(droppers, std::set{self});
}

}  // namespace
}  // namespace torch_ext
