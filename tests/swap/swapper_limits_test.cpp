// Bounded memory and space, wrong calls, other processes, many threads.

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support/swapper_test.h"

namespace torch_ext {
namespace {

using namespace test;  // NOLINT(google-build-using-namespace)

TEST_F(SwapperTest, WhatIsNeededNowGoesBeforeWhatIsPrefetched) {
  const std::size_t big = 32 * kMiB;
  const std::size_t small = 3 * kMiB;
  for (const bool on_host_memory : {true, false}) {
    SwapperOptions one_at_a_time = scripted();
    one_at_a_time.store.aio.queue_depth = 1;
    Swapper swapper(one_at_a_time);
    swapper.swap_out("big", on_device(big, 1)).wait();
    const std::size_t small_begins = script_->requests();
    swapper.swap_out("small", on_device(small, 2)).wait();
    const std::size_t reads_begin = script_->requests();
    script_->set_plan(test::only(reads_begin, Fault::held()));
    AlignedBuffer memory(big + small);
    const DeviceBytes big_back =
        on_host_memory ? on_host(memory.bytes(0, big)) : on_device(big, 3);
    const DeviceBytes small_back = on_host_memory
                                       ? on_host(memory.bytes(big, small))
                                       : on_device(small, 3);
    const SwapTicket later =
        swapper.swap_in("big", big_back, IoPriority::kPrefetch);
    while (script_->held() == 0) std::this_thread::yield();
    const SwapTicket now = swapper.swap_in("small", small_back);
    // The last buffer is not for what is prefetched.
    while (!on_host_memory &&
           swapper.stats().host_bytes_peak < swapper.stats().host_bytes) {
      std::this_thread::yield();
    }
    script_->release(reads_begin);
    now.wait();
    later.wait();
    const auto log = script_->log();
    std::size_t ahead = 0;
    while (log[reads_begin + ahead].offset != log[small_begins].offset) ++ahead;
    EXPECT_LE(ahead, on_host_memory ? 1u : 8u);
    device_->synchronize();
    EXPECT_TRUE(holds(big_back, 1));
    EXPECT_TRUE(holds(small_back, 2));
  }
}

TEST_F(SwapperTest, SpaceOfRewrittenAndRemovedKeysIsUsedAgain) {
  Swapper swapper(options());
  for (int i = 0; i < 50; ++i) {
    swapper.swap_out("k", on_device(kMiB, 1)).wait();
    swapper.swap_out("x" + std::to_string(i), on_device(kMiB, 1)).wait();
    swapper.remove("x" + std::to_string(i));
  }
  // The last operation's own reference goes with its thread.
  while (swapper.stats().store.allocated > kMiB) std::this_thread::yield();
  EXPECT_EQ(swapper.stats().store.allocated, kMiB);
  EXPECT_LE(swapper.stats().store.file_size, 16 * kMiB);
}

TEST_F(SwapperTest, ManySmallOperationsShareFewBuffers) {
  SwapperOptions small = scripted();
  small.host_memory = 8 * kMiB;  // Two buffers of 4 MiB.
  script_->set_plan(test::from(0, Fault::held()));
  Swapper swapper(small);
  std::vector<SwapTicket> tickets;
  for (std::uint64_t i = 0; i < 100; ++i) {
    tickets.push_back(swapper.swap_out(std::to_string(i), on_device(20000, i)));
    tickets.back().wait_source();
  }
  script_->release_all();
  for (const SwapTicket& ticket : tickets) ticket.wait();
  for (std::uint64_t i = 0; i < 100; ++i) {
    EXPECT_TRUE(stored(swapper, std::to_string(i), i));
  }
}

TEST_F(SwapperTest, OneBufferIsEnoughForAnyMixOfOperations) {
  SwapperOptions least = options();
  least.host_memory = least.store.aio.block_size;
  Swapper swapper(least);
  std::vector<SwapTicket> tickets;
  std::vector<DeviceBytes> back;
  for (std::uint64_t i = 0; i < 12; ++i) {
    const std::size_t size = i % 2 == 0 ? 300 : 300000;
    const std::string key = std::to_string(i);
    tickets.push_back(swapper.swap_out(key, on_device(size, i)));
    back.push_back(on_device(size, 99));
    tickets.push_back(swapper.swap_in(key, back.back()));
  }
  for (const SwapTicket& ticket : tickets) ticket.wait();
  device_->synchronize();
  for (std::uint64_t i = 0; i < 12; ++i) EXPECT_TRUE(holds(back[i], i));
  EXPECT_LE(swapper.stats().host_bytes_peak, least.host_memory);
}

TEST_F(SwapperTest, WrongCallsAreRefusedAndChangeNothing) {
  Swapper swapper(options());
  AlignedBuffer memory(4096);
  EXPECT_THROW(swapper.swap_in("none", on_host(memory.bytes())), KeyError);
  EXPECT_THROW(swapper.remove("none"), KeyError);
  swapper.swap_out("k", on_host(memory.bytes())).wait();
  EXPECT_THROW(swapper.swap_in("k", on_host(memory.bytes(0, 4095))),
               std::invalid_argument);
  device_->set_capturing(true);
  EXPECT_THROW(swapper.swap_out("g", on_device(4096, 1)), StateError);
  EXPECT_THROW(swapper.swap_in("k", on_device(4096, 1)), StateError);
  device_->set_capturing(false);
  EXPECT_EQ(swapper.keys(), std::vector<std::string>{"k"});
  swapper.close();
  EXPECT_THROW(swapper.swap_out("k", on_host(memory.bytes())), StateError);
  EXPECT_THROW(swapper.remove("k"), StateError);
}

TEST_F(SwapperTest, TooLittleHostMemoryIsRefusedWithTheLeast) {
  SwapperOptions bad = options();
  bad.host_memory = bad.store.aio.block_size - 1;
  EXPECT_THROW(Swapper{bad}, std::invalid_argument);
}

TEST_F(SwapperTest, APoolThatCannotBePinnedIsNotedAndWorks) {
  device_->refuse_pin("no room");
  Swapper swapper(options());
  swapper.swap_out("k", on_device(4096, 1)).wait();
  EXPECT_TRUE(stored(swapper, "k", 1));
  std::string notes;
  for (const std::string& note : swapper.notes()) notes += note;
  EXPECT_NE(notes.find("no room"), std::string::npos);
}

TEST_F(SwapperTest, BuffersArePinnedForTheDeviceAndUnpinnedAtClose) {
  Swapper swapper(options());
  swapper.swap_out("k", on_device(4096, 1)).wait();
  EXPECT_EQ(device_->counts().pinned_bytes, 16 * kMiB);
  swapper.close();
  EXPECT_EQ(device_->counts().pinned_bytes, 0u);
  device_->synchronize();
}

// Runs `call` in a forked child: true if it throws a StateError that names
// this process. A child that hangs is ended by its alarm.
bool refused_in_child(const std::function<void()>& call) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    try {
      call();
    } catch (const StateError& error) {
      const std::string text = error.what();
      _exit(text.find(std::to_string(getppid())) == std::string::npos);
    } catch (...) {
    }
    _exit(1);
  }
  int status = 0;
  return waitpid(child, &status, 0) == child && WIFEXITED(status) &&
         WEXITSTATUS(status) == 0;
}

TEST_F(SwapperTest, AForkedChildIsRefusedWithTheMakersProcess) {
  script_->set_plan(test::from(0, Fault::held()));
  auto swapper = std::make_unique<Swapper>(scripted());
  AlignedBuffer memory(4096);
  const DeviceBytes bytes = on_host(memory.bytes());
  const SwapTicket ticket = swapper->swap_out("k", bytes);
  // Another thread is inside a call, and holds its lock, for ever as it
  // looks from a child.
  std::thread closing([&] { swapper->close(); });
  std::this_thread::sleep_for(milliseconds(20));
  const std::vector<std::function<void()>> calls = {
      [&] { swapper->swap_out("k", bytes); },
      [&] { swapper->swap_in("k", bytes); },
      [&] { swapper->keys(); },
      [&] { swapper->stats(); },
      [&] { swapper->notes(); },
      [&] { swapper->close(); },
      [&] { ticket.wait(); },
      [&] { ticket.wait_source(); },
      [&] { static_cast<void>(ticket.wait_for(milliseconds(1))); },
      [&] { static_cast<void>(ticket.done()); }};
  for (std::size_t i = 0; i < calls.size(); ++i) {
    EXPECT_TRUE(refused_in_child(calls[i])) << "call " << i;
  }
  EXPECT_TRUE(refused_in_child([&] {
    swapper.reset();
    ticket.wait();
  }));
  script_->release_all();
  closing.join();
  ticket.wait();
}

TEST_F(SwapperTest, ThreadsWithRandomOperationsAndFaultsMatchAModel) {
  SwapperOptions mixed = scripted();
  mixed.store.aio.thread_count = 2;
  mixed.host_memory = 1 * kMiB;
  script_->set_plan([](std::size_t index, const IoRequest& request) {
    if (index % 5 == 0) return Fault::cut(request.length / 2);
    if (index % 37 == 0) return Fault::fail(EIO);
    return Fault();
  });
  script_->shuffle(3);
  Swapper swapper(mixed);
  std::atomic<int> wrong = 0;
  const auto work = [&](std::uint64_t seed) {
    std::mt19937_64 random(seed);
    std::map<std::string, std::pair<std::size_t, std::uint64_t>> model;
    for (int i = 0; i < 150; ++i) {
      const std::string key =
          std::to_string(seed) + "." + std::to_string(random() % 5);
      try {
        if (random() % 2 == 0 || !model.contains(key)) {
          // Every other one is aligned, and goes without a buffer.
          const std::size_t size =
              random() % 2 == 0 ? random() % 300000 : random() % 75 * 4096;
          AlignedBuffer memory(size);
          const std::uint64_t fill = random();
          test::fill_pattern(memory.bytes(), fill);
          swapper.swap_out(key, on_host(memory.bytes())).wait();
          model[key] = {size, fill};
        } else {
          AlignedBuffer memory(model[key].first);
          swapper.swap_in(key, on_host(memory.bytes())).wait();
          if (!test::holds_pattern(memory.bytes(), model[key].second)) ++wrong;
        }
      } catch (const IoError& error) {
        if (error.error() != EIO) ++wrong;
      }
    }
  };
  std::vector<std::thread> threads;
  for (std::uint64_t seed = 1; seed <= 4; ++seed) {
    threads.emplace_back(work, seed);
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(swapper.stats().failures, 0u);
}

TEST_F(SwapperTest, AReadPassesWriteBacksThatWaitForBuffers) {
  SwapperOptions deep = scripted();
  deep.store.aio.queue_depth = 4096;  // What is held here fills no queue.
  Swapper swapper(deep);
  swapper.swap_out("needed", on_device(kMiB, 1)).wait();
  script_->set_plan([](std::size_t, const IoRequest& request) {
    return request.op == IoRequest::Op::kWrite ? Fault::held() : Fault();
  });
  const SwapTicket away = swapper.swap_out("away", on_device(64 * kMiB, 2));
  while (script_->held() == 0) std::this_thread::yield();
  const DeviceBytes back = on_device(kMiB, 3);
  const SwapTicket read = swapper.swap_in("needed", back);
  EXPECT_TRUE(read.wait_for(std::chrono::minutes(1)));
  EXPECT_FALSE(away.done());
  script_->release_all();
  away.wait();
  read.wait();
  device_->settle(Stream::kCopy);
  EXPECT_TRUE(holds(back, 1));
}

}  // namespace
}  // namespace torch_ext
