// Devices and disks that are slow, silent, out of order or not what they were.

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "support/child.h"
#include "support/swapper_test.h"
#include "torch_ext/base/error.h"
#include "torch_ext/swap/file_transfer.h"

namespace torch_ext {
namespace {

namespace fs = std::filesystem;
using namespace test;  // NOLINT(google-build-using-namespace)

class DeviceFaults : public SwapperTest {
 protected:
  FileTransferOptions file_options() {
    FileTransferOptions options;
    options.aio.block_size = 64 << 10;
    options.host_memory = kMiB;
    return options;
  }
};

TEST_F(DeviceFaults, ASilentDeviceIsATimeoutAndWhatItTakesLaterCounts) {
  Swapper swapper(scripted());
  AlignedBuffer memory(200'000);
  fill_pattern(memory.bytes(), 1);
  script_->set_plan(from(0, Fault::held()));
  const SwapTicket ticket = swapper.swap_out("k", on_host(memory.bytes()));
  EXPECT_THROW(ticket.wait(milliseconds(20)), TimeoutError);
  EXPECT_THROW(ticket.wait(milliseconds(1)), TimeoutError);
  EXPECT_FALSE(ticket.done());
  EXPECT_EQ(swapper.stats().in_flight, 1u);
  // The device may touch the buffers still: they are not given away.
  AlignedBuffer other(200'000);
  fill_pattern(other.bytes(), 2);
  const SwapTicket next = swapper.swap_out("other", on_host(other.bytes()));
  EXPECT_FALSE(next.wait_for(milliseconds(1)));
  script_->release_all();
  ticket.wait();
  next.wait();
  EXPECT_TRUE(stored(swapper, "k", 1));
  EXPECT_TRUE(stored(swapper, "other", 2));
}

TEST_F(DeviceFaults, OneRequestThatIsVerySlowHoldsUpNoOther) {
  script_->set_plan(only(0, Fault::held()));
  Swapper swapper(scripted());
  AlignedBuffer slow(kMiB);
  const SwapTicket last = swapper.swap_out("slow", on_host(slow.bytes()));
  while (script_->held() == 0) std::this_thread::yield();
  for (std::uint64_t i = 0; i < 100; ++i) {
    swapper.swap_out(std::to_string(i), on_device(20'000, i)).wait();
    EXPECT_TRUE(stored(swapper, std::to_string(i), i));
  }
  EXPECT_FALSE(last.done());
  script_->release_all();
  last.wait();
}

TEST_F(DeviceFaults, CompletionsInEveryOrderGiveTheSameBytes) {
  constexpr std::size_t kRequests = 5;
  std::array<std::size_t, kRequests> order;
  std::iota(order.begin(), order.end(), 0u);
  int orders = 0;
  do {
    script_ = std::make_shared<FaultScript>();
    Swapper swapper(scripted());
    AlignedBuffer memory(kRequests * (64 << 10) - 100);
    fill_pattern(memory.bytes(), 1);
    for (const bool out : {true, false}) {
      const std::size_t first = script_->requests();
      script_->set_plan(from(first, Fault::held()));
      const DeviceBytes bytes = on_host(memory.bytes());
      const SwapTicket ticket =
          out ? swapper.swap_out("k", bytes) : swapper.swap_in("k", bytes);
      while (script_->held() < kRequests) std::this_thread::yield();
      EXPECT_FALSE(ticket.done());
      for (const std::size_t index : order) script_->release(first + index);
      ticket.wait();
      if (out) fill_pattern(memory.bytes(), 2);
    }
    EXPECT_TRUE(holds_pattern(memory.bytes(), 1));
    ++orders;
  } while (std::next_permutation(order.begin(), order.end()));
  EXPECT_EQ(orders, 120);
}

TEST_F(DeviceFaults, AStaleOrMisdirectedBlockIsAnErrorAndNotReturned) {
  for (const bool stale : {true, false}) {
    script_ = std::make_shared<FaultScript>();
    Swapper swapper(scripted());
    AlignedBuffer memory(128 << 10);
    fill_pattern(memory.bytes(), 1);
    swapper.swap_out("k", on_host(memory.bytes())).wait();
    const std::uint64_t place = script_->log()[0].offset;
    if (stale) {
      // The device says that it has written, and has not.
      script_->set_plan(from(0, Fault::claimed(64 << 10)));
      fill_pattern(memory.bytes(), 2);
      swapper.swap_out("k", on_host(memory.bytes())).wait();
      script_->set_plan(nullptr);
    } else {
      // What was meant for another place has landed here.
      script_->set_plan([place](std::size_t, const IoRequest& request) {
        const bool read = request.op == IoRequest::Op::kRead;
        return read && request.offset == place ? Fault::claimed(request.length)
                                               : Fault();
      });
    }
    fill_pattern(memory.bytes(), 3);  // As if it had come from elsewhere.
    try {
      swapper.swap_in("k", on_host(memory.bytes())).wait();
      ADD_FAILURE() << "returned";
    } catch (const IoError& error) {
      EXPECT_EQ(error.error(), EIO);
      EXPECT_TRUE(error.failure().offset.has_value());
    }
  }
}

TEST_F(DeviceFaults, TwoSwappersInOneDirectoryKeepApart) {
  Swapper first(options());
  Swapper second(options());
  first.swap_out("k", on_device(100'000, 1)).wait();
  second.swap_out("k", on_device(100'000, 2)).wait();
  EXPECT_TRUE(stored(first, "k", 1));
  second.close();
  EXPECT_TRUE(stored(first, "k", 1));
  EXPECT_TRUE(fs::is_empty(dir_.path()));
}

TEST_F(DeviceFaults, AFileOfAnOpenHandleMayBeDeletedRenamedReplacedOrCut) {
  FileTransfer files(file_options());
  AlignedBuffer memory(100'000);
  const fs::path path = dir_ / "x";
  const auto write = [&](std::uint64_t seed) {
    fill_pattern(memory.bytes(), seed);
    files.write(path, 0, on_host(memory.bytes())).wait();
  };
  const auto holds = [&](const fs::path& file, std::uint64_t seed) {
    AlignedBuffer bytes(100'000);
    std::ifstream(file, std::ios::binary)
        .read(reinterpret_cast<char*>(bytes.data()), 100'000);
    return holds_pattern(bytes.bytes(), seed);
  };
  const auto read_error = [&] {
    try {
      files.read(path, 0, on_host(memory.bytes())).wait();
    } catch (const IoError& error) {
      return error.error();
    }
    return 0;
  };
  write(1);
  fs::remove(path);
  EXPECT_EQ(read_error(), ENOENT);
  write(2);
  EXPECT_TRUE(holds(path, 2));
  fs::rename(path, dir_ / "y");
  EXPECT_EQ(read_error(), ENOENT);
  write(3);
  EXPECT_TRUE(holds(path, 3));
  EXPECT_TRUE(holds(dir_ / "y", 2));
  fs::rename(dir_ / "y", path);
  EXPECT_EQ(read_error(), 0);
  EXPECT_TRUE(holds_pattern(memory.bytes(), 2));
  fs::resize_file(path, 5000);
  EXPECT_EQ(read_error(), EIO);
  write(4);
  EXPECT_TRUE(holds(path, 4));
  fs::remove(path);
  fs::create_symlink(dir_ / "elsewhere", path);
  EXPECT_EQ(read_error(), ELOOP);
  EXPECT_THROW(write(5), IoError);
  EXPECT_FALSE(fs::exists(dir_ / "elsewhere"));
}

TEST_F(DeviceFaults, AUserWhoMayLockNoMemoryIsNoWorseOff) {
  ASSERT_EQ(chmod(dir_.path().c_str(), 0777), 0);
  for (const char* engine : {"auto", "threads"}) {
    expect_well_in_child([&]() -> std::string {
      const rlimit none = {0, 0};
      if (setrlimit(RLIMIT_MEMLOCK, &none) != 0) return skip("setrlimit");
      // Root may lock memory all the same.
      if (geteuid() == 0 && setresuid(65534, 65534, 65534) != 0) {
        return skip("setresuid");
      }
      SwapperOptions plain = options();
      plain.store.engine = engine;
      Swapper swapper(plain);
      AlignedBuffer memory(200'000);
      fill_pattern(memory.bytes(), 1);
      swapper.swap_out("k", on_host(memory.bytes())).wait();
      return stored(swapper, "k", 1) ? "" : "wrong bytes";
    });
  }
}

TEST_F(DeviceFaults, ADestinationThatCannotBeWrittenIsAnErrorOfTheTicket) {
  FileTransfer files(file_options());
  AlignedBuffer memory(8192);
  files.write(dir_ / "x", 0, on_host(memory.bytes())).wait();
  ASSERT_EQ(mprotect(memory.data(), 8192, PROT_READ), 0);
  int error = 0;
  try {
    files.read(dir_ / "x", 0, on_host(memory.bytes())).wait();
  } catch (const IoError& failed) {
    error = failed.error();
  }
  ASSERT_EQ(mprotect(memory.data(), 8192, PROT_READ | PROT_WRITE), 0);
  EXPECT_EQ(error, EFAULT);
}

TEST_F(DeviceFaults, AThousandOfThemMayLive) {
  const auto before = std::distance(fs::directory_iterator("/proc/self/fd"),
                                    fs::directory_iterator{});
  {
    std::vector<std::unique_ptr<FileTransfer>> all;
    for (int i = 0; i < 1000; ++i) {
      all.push_back(std::make_unique<FileTransfer>(file_options()));
    }
    AlignedBuffer memory(4096);
    fill_pattern(memory.bytes(), 1);
    all.front()->write(dir_ / "x", 0, on_host(memory.bytes())).wait();
    fill_pattern(memory.bytes(), 2);
    all.back()->read(dir_ / "x", 0, on_host(memory.bytes())).wait();
    EXPECT_TRUE(holds_pattern(memory.bytes(), 1));
  }
  EXPECT_EQ(std::distance(fs::directory_iterator("/proc/self/fd"),
                          fs::directory_iterator{}),
            before);
}

}  // namespace
}  // namespace torch_ext
