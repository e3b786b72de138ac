// A process makes many operations (100,000 in the long form), and some of them
// fail. It then has as many descriptors, as much memory and as much page-locked
// memory as after a few operations, on every engine.

#include <gtest/gtest.h>
#include <malloc.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "support/aligned_buffer.h"
#include "support/late_device.h"
#include "support/temp_dir.h"
#include "support/trials.h"
#include "torch_ext/base/error.h"
#include "torch_ext/swap/file_transfer.h"
#include "torch_ext/swap/swapper.h"

namespace torch_ext {
namespace {

namespace fs = std::filesystem;
using test::AlignedBuffer;

// A sanitizer keeps freed memory for a while.
constexpr long kMemory = test::kSanitized ? 256L << 20 : 2L << 20;

int operations() { return test::all_faults() ? 100'000 : 10'000; }

long open_descriptors() {
  return std::distance(fs::directory_iterator("/proc/self/fd"),
                       fs::directory_iterator{});
}

long threads() {
  return std::distance(fs::directory_iterator("/proc/self/task"),
                       fs::directory_iterator{});
}

/// Some ends are seen late: a joined thread's in /proc, a copy's in the stats.
template <typename Count>
void expect_at_most(long most, Count count) {
  for (int i = 0; i < 1000 && count() > most; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  EXPECT_LE(count(), most);
}

/// Bytes of memory in use, without what the C library keeps for later.
long resident() {
  malloc_trim(0);
  long pages = 0;
  std::ifstream("/proc/self/statm") >> pages >> pages;
  return pages * sysconf(_SC_PAGESIZE);
}

/// Does what another engine does, but every 97th request fails.
class SometimesFailing final : public IoEngine {
 public:
  explicit SometimesFailing(std::unique_ptr<IoEngine> inner)
      : inner_(std::move(inner)) {}

  std::string_view name() const noexcept override { return inner_->name(); }
  std::size_t depth() const noexcept override { return inner_->depth(); }
  std::size_t submit(std::span<const IoRequest> batch) override {
    const std::size_t taken = inner_->submit(batch);
    for (const IoRequest& request : batch.first(taken)) {
      if (++count_ % 97 == 0) failing_.insert(request.cookie);
    }
    return taken;
  }
  std::size_t poll(std::span<IoCompletion> out, std::size_t at_least,
                   std::chrono::nanoseconds timeout) override {
    const std::size_t count = inner_->poll(out, at_least, timeout);
    for (IoCompletion& done : out.first(count)) {
      if (failing_.erase(done.cookie) > 0) done.result = -ENOSPC;
    }
    return count;
  }
  void wake() noexcept override { inner_->wake(); }

 private:
  const std::unique_ptr<IoEngine> inner_;
  std::size_t count_ = 0;
  std::set<std::uint64_t> failing_;
};

IoEngineFactory sometimes_failing(const std::string& engine) {
  return [inner = make_engine_factory(engine)](int depth) {
    return std::make_unique<SometimesFailing>(inner(depth));
  };
}

/// Counts the IoErrors of calls.
template <typename Call>
void attempt(int& failures, Call call) {
  try {
    call();
  } catch (const IoError&) {
    ++failures;
  } catch (const KeyError&) {  // The key's first write has failed.
    ++failures;
  }
}

/// Makes `count` operations on few keys, in memory of host or device.
int use_swapper(Swapper& swapper, const DeviceBytes& bytes, int count) {
  int failures = 0;
  for (int i = 0; i < count; i += 4) {
    const std::string key = std::to_string(i % 32);
    std::vector<SwapTicket> tickets;
    attempt(failures, [&] { tickets.push_back(swapper.swap_out(key, bytes)); });
    attempt(failures, [&] { tickets.push_back(swapper.swap_in(key, bytes)); });
    for (const SwapTicket& ticket : tickets) {
      attempt(failures, [&] { ticket.wait(); });
    }
    attempt(failures, [&] { swapper.swap_in(key, bytes).wait(); });
    attempt(failures, [&] { swapper.remove(key); });
  }
  return failures;
}

class LeakFaults : public testing::TestWithParam<const char*> {
 protected:
  static constexpr std::size_t kPinned = 1 << 20;

  // Sanitizers start a thread of their own with a process's first.
  LeakFaults() {
    std::thread([] {}).join();
  }

  void SetUp() override {
    const std::string reason = engine_unavailable_reason(GetParam());
    if (!reason.empty()) GTEST_SKIP() << reason;
  }

  SwapperOptions options() const {
    SwapperOptions options;
    options.store.directory = dir_.path();
    options.store.aio.block_size = 64 << 10;
    options.store.engine_factory = sometimes_failing(GetParam());
    options.host_memory = kPinned;
    return options;
  }

  const test::TempDir dir_;
};

TEST_P(LeakFaults, ASwapperHoldsNothingMoreAfterManyOperations) {
  const long descriptors_before = open_descriptors();
  const long threads_before = threads();
  AlignedBuffer memory(4096 + 100);
  {
    const auto device = std::make_shared<test::LateDevice>();
    const auto on_device = device->allocate(4096);
    Swapper swapper(options());
    const auto use = [&](int count) {
      // The second goes past the buffers, the third through pinned ones.
      return use_swapper(swapper, {host_device(), memory.data(), memory.size()},
                         count / 4) +
             use_swapper(swapper, {host_device(), memory.data(), 4096},
                         count / 2) +
             use_swapper(swapper, {device, on_device.get(), 4096, on_device},
                         count / 4);
    };
    EXPECT_GT(use(operations() / 10), 0);
    const long descriptors = open_descriptors();
    const long memory_before = resident();
    EXPECT_EQ(device->counts().pinned_bytes, kPinned);
    const int failures = use(operations());
    EXPECT_GT(failures, operations() / 200);
    EXPECT_EQ(device->counts().pinned_bytes, kPinned);
    EXPECT_EQ(open_descriptors(), descriptors);
    EXPECT_LE(resident() - memory_before, kMemory);
    expect_at_most(
        0, [&] { return static_cast<long>(swapper.stats().in_flight); });
    EXPECT_TRUE(swapper.keys().empty());
    EXPECT_LE(swapper.stats().store.file_size, 64u << 20);
    std::printf(
        "[  FAULTS  ] %s: %d operations of a Swapper, %d failures, %ld KiB "
        "more memory\n",
        GetParam(), operations(), failures,
        (resident() - memory_before) / 1024);
    swapper.close();
    EXPECT_EQ(device->counts().pinned_bytes, 0u);
  }
  EXPECT_EQ(open_descriptors(), descriptors_before);
  expect_at_most(threads_before, threads);
}

TEST_P(LeakFaults, AFileTransferHoldsNothingMoreAfterManyOperations) {
  const long descriptors_before = open_descriptors();
  const long threads_before = threads();
  AlignedBuffer memory(4096 + 100);
  FileTransferOptions options;
  options.aio.block_size = 64 << 10;
  options.engine_factory = sometimes_failing(GetParam());
  options.host_memory = kPinned;
  {
    const auto device = std::make_shared<test::LateDevice>();
    const auto on_device = device->allocate(4096);
    FileTransfer files(options);
    const auto use = [&](int count) {
      int failures = 0;
      for (int i = 0; i < count; i += 4) {
        // More files than may be open, and one that is replaced.
        const fs::path path = dir_ / std::to_string(i % 400);
        const std::size_t size = i % 8 == 0 ? 4096 : 4000;
        const DeviceBytes bytes =
            i % 16 < 8 ? DeviceBytes{host_device(), memory.data(), size}
                       : DeviceBytes{device, on_device.get(), size, on_device};
        const std::uint64_t offset = i % 3 == 0 ? 0 : 10;
        if (i % 400 == 0) fs::remove(path);
        attempt(failures, [&] { files.write(path, offset, bytes).wait(); });
        attempt(failures, [&] { files.read(path, offset, bytes).wait(); });
        attempt(failures, [&] { files.read(dir_ / "none", 0, bytes); });
        attempt(failures, [&] { files.read(path, 1 << 20, bytes).wait(); });
      }
      return failures;
    };
    // Without those of files, which are as many as fit.
    const auto descriptors = [&] {
      return open_descriptors() - static_cast<long>(files.stats().descriptors);
    };
    use(operations() / 10);
    const long own_descriptors = descriptors();
    const long memory_before = resident();
    EXPECT_EQ(device->counts().pinned_bytes, kPinned);
    const int failures = use(operations());
    EXPECT_GT(failures, operations() / 3);
    EXPECT_LE(resident() - memory_before, kMemory);
    EXPECT_EQ(device->counts().pinned_bytes, kPinned);
    EXPECT_EQ(descriptors(), own_descriptors);
    EXPECT_LE(files.stats().descriptors, 64u);
    expect_at_most(0,
                   [&] { return static_cast<long>(files.stats().in_flight); });
    std::printf(
        "[  FAULTS  ] %s: %d operations of a FileTransfer, %d failures, "
        "%ld KiB more memory\n",
        GetParam(), operations(), failures,
        (resident() - memory_before) / 1024);
    files.close();
    EXPECT_EQ(device->counts().pinned_bytes, 0u);
    EXPECT_EQ(open_descriptors(), descriptors_before);
  }
  EXPECT_EQ(open_descriptors(), descriptors_before);
  expect_at_most(threads_before, threads);
}

TEST_P(LeakFaults, PinnedBytesComeBackWithEachSwapper) {
  const auto device = std::make_shared<test::LateDevice>();
  const long descriptors_before = open_descriptors();
  for (int i = 0; i < 20; ++i) {
    Swapper swapper(options());
    const std::size_t size = 5000;
    auto memory = device->allocate(size);
    use_swapper(swapper, {device, memory.get(), size, memory}, 40);
    EXPECT_EQ(device->counts().pinned_bytes, kPinned);
    swapper.close();
    EXPECT_EQ(device->counts().pinned_bytes, 0u);
  }
  device->synchronize();
  EXPECT_EQ(open_descriptors(), descriptors_before);
}

INSTANTIATE_TEST_SUITE_P(Engines, LeakFaults,
                         testing::Values("libaio", "io_uring", "threads"),
                         [](const auto& info) {
                           return std::string(info.param);
                         });

}  // namespace
}  // namespace torch_ext
