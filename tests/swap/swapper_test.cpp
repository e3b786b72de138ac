#include "torch_ext/swap/swapper.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "support/aligned_buffer.h"
#include "support/faulty_engine.h"
#include "support/late_device.h"
#include "support/pattern.h"
#include "support/temp_dir.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

using std::chrono::milliseconds;
using test::AlignedBuffer;
using test::Fault;
using test::FaultScript;
using test::LateDevice;
using test::TempDir;
using Stream = Device::Stream;

constexpr std::size_t kMiB = 1 << 20;

class SwapperTest : public testing::Test {
 protected:
  ~SwapperTest() override { EXPECT_TRUE(device_->misuses().empty()); }

  SwapperOptions options() {
    SwapperOptions result;
    result.store.directory = dir_.path();
    result.store.aio.block_size = 64 << 10;
    result.host_memory = 16 * kMiB;
    return result;
  }
  SwapperOptions scripted() {
    SwapperOptions result = options();
    result.store.engine_factory = test::faulty_factory("memory", script_);
    return result;
  }

  // Bytes on the late device; the pattern is in place at once.
  DeviceBytes on_device(std::size_t bytes, std::uint64_t seed) {
    auto memory = device_->allocate(bytes);
    test::fill_pattern({memory.get(), bytes}, seed);
    return {device_, memory.get(), bytes, memory};
  }
  static DeviceBytes on_host(std::span<std::byte> bytes) {
    return {host_device(), bytes.data(), bytes.size(), nullptr};
  }
  static bool holds(const DeviceBytes& bytes, std::uint64_t seed) {
    return test::holds_pattern({bytes.data, bytes.size}, seed);
  }
  // What the key holds, brought to fresh host memory.
  static bool stored(Swapper& swapper, const std::string& key,
                     std::uint64_t seed) {
    AlignedBuffer memory(swapper.entry(key).size);
    swapper.swap_in(key, on_host(memory.bytes())).wait();
    return test::holds_pattern(memory.bytes(), seed);
  }

  TempDir dir_;
  std::shared_ptr<LateDevice> device_ = std::make_shared<LateDevice>();
  std::shared_ptr<FaultScript> script_ = std::make_shared<FaultScript>();
};

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
  ASSERT_TRUE(device_->await_copies(1));
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
  ASSERT_TRUE(device_->await_copies(3));
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
  device_->hold(Stream::kCopy);
  const SwapTicket first = swapper.swap_in("a", a);
  const SwapTicket second = swapper.swap_in("b", b);
  const std::size_t made = device_->counts().copies;
  ASSERT_TRUE(device_->await_copies(made + 1));
  EXPECT_FALSE(second.wait_for(milliseconds(20)));
  device_->release(Stream::kCopy);
  first.wait();
  second.wait();
  device_->synchronize();
  EXPECT_TRUE(holds(a, 1));
  EXPECT_TRUE(holds(b, 2));
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

TEST_F(SwapperTest, SpaceOfRewrittenAndRemovedKeysIsUsedAgain) {
  Swapper swapper(options());
  for (int i = 0; i < 50; ++i) {
    swapper.swap_out("k", on_device(kMiB, 1)).wait();
    swapper.swap_out("x" + std::to_string(i), on_device(kMiB, 1)).wait();
    swapper.remove("x" + std::to_string(i));
  }
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

TEST_F(SwapperTest, AForkedChildIsRefusedWithTheMakersProcess) {
  auto swapper = std::make_unique<Swapper>(options());
  AlignedBuffer memory(4096);
  swapper->swap_out("k", on_host(memory.bytes())).wait();
  const pid_t child = fork();
  if (child == 0) {
    int result = 1;
    try {
      swapper->swap_out("k", on_host(memory.bytes()));
    } catch (const StateError& error) {
      const std::string text = error.what();
      result = text.find(std::to_string(getppid())) == std::string::npos;
    }
    swapper.reset();
    _exit(result);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  swapper->swap_out("k", on_host(memory.bytes())).wait();
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
          const std::size_t size = random() % 300000;
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

}  // namespace
}  // namespace torch_ext
