#include "torch_ext/memory/buffer_pool.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

class PinningDevice : public Device {
 public:
  explicit PinningDevice(std::string name, bool refuse = false)
      : name_(std::move(name)), refuse_(refuse) {}
  std::string name() const override { return name_; }
  void enter_thread() override {}
  void pin(std::span<std::byte> memory) override {
    if (refuse_) throw StateError("no driver");
    ++pins;
    pinned = memory;
  }
  void unpin(std::span<std::byte> memory) noexcept override {
    if (memory.data() == pinned.data()) ++unpins;
  }
  EventPtr record(Stream) override { return nullptr; }
  void wait(Stream, const EventPtr&) override {}
  bool query(const EventPtr&) override { return true; }
  void copy(std::byte*, const std::byte*, std::size_t, bool) override {}

  int pins = 0;
  int unpins = 0;
  std::span<std::byte> pinned;

 private:
  std::string name_;
  bool refuse_;
};

TEST(BufferPoolTest, LeasesAreDistinctAlignedAndOfTheSizeAskedFor) {
  BufferPool pool(8192, 5);
  std::vector<Buffer> leases;
  std::set<std::byte*> places;
  for (int i = 0; i < 5; ++i) {
    Buffer lease = pool.try_take();
    ASSERT_TRUE(lease);
    EXPECT_EQ(lease.size(), 8192u);
    EXPECT_TRUE(is_aligned(lease.data(), 4096));
    std::memset(lease.data(), i, lease.size());
    places.insert(lease.data());
    leases.push_back(std::move(lease));
  }
  EXPECT_EQ(places.size(), 5u);
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(leases[static_cast<std::size_t>(i)].bytes().back(),
              static_cast<std::byte>(i));
  }
}

TEST(BufferPoolTest, IsBoundedAndGivesOutWhatComesBackLastFirst) {
  BufferPool pool(4096, 2);
  Buffer first = pool.try_take();
  Buffer second = pool.try_take();
  EXPECT_FALSE(pool.try_take());
  EXPECT_EQ(pool.in_use(), 2u);
  std::byte* place = second.data();
  first = Buffer();
  second = Buffer();
  EXPECT_EQ(pool.in_use(), 0u);
  EXPECT_EQ(pool.peak_in_use(), 2u);
  EXPECT_EQ(pool.try_take().data(), place);
}

TEST(BufferPoolTest, AssigningALeaseGivesTheOldOneBackOnce) {
  BufferPool pool(4096, 2);
  Buffer lease = pool.try_take();
  lease = pool.try_take();
  EXPECT_EQ(pool.in_use(), 1u);
  Buffer moved = std::move(lease);
  EXPECT_FALSE(lease);
  EXPECT_EQ(pool.in_use(), 1u);
}

TEST(BufferPoolTest, ALeaseKeepsTheMemoryWhenThePoolIsGone) {
  auto pool = std::make_unique<BufferPool>(4096, 1);
  Buffer lease = pool->try_take();
  pool.reset();
  std::memset(lease.data(), 1, lease.size());
}

TEST(BufferPoolTest, RefusesSizesThatCannotWork) {
  EXPECT_THROW(BufferPool(0, 1), std::invalid_argument);
  EXPECT_THROW(BufferPool(4095, 1), std::invalid_argument);
  EXPECT_THROW(BufferPool(4096, 0), std::invalid_argument);
  EXPECT_THROW(BufferPool(std::size_t{1} << 62, 1 << 10),
               std::invalid_argument);
  EXPECT_THROW(BufferPool(std::size_t{1} << 60, 1), IoError);
}

TEST(BufferPoolTest, PinsOncePerDeviceTypeAndUnpinsWithTheMemory) {
  auto first = std::make_shared<PinningDevice>("cuda:0");
  auto second = std::make_shared<PinningDevice>("cuda:1");
  {
    BufferPool pool(4096, 4);
    EXPECT_EQ(pool.pin(first), "");
    EXPECT_EQ(pool.pin(first), "");
    EXPECT_EQ(pool.pin(second), "");
    EXPECT_EQ(first->pins, 1);
    EXPECT_EQ(second->pins, 0);
    EXPECT_EQ(first->pinned.size(), 4 * 4096u);
    EXPECT_EQ(first->unpins, 0);
  }
  EXPECT_EQ(first->unpins, 1);
}

TEST(BufferPoolTest, SaysWhyMemoryStaysUnpinnedAndStillWorks) {
  auto device = std::make_shared<PinningDevice>("cuda:0", true);
  BufferPool pool(4096, 1);
  EXPECT_NE(pool.pin(device).find("no driver"), std::string::npos);
  EXPECT_TRUE(pool.try_take());
}

TEST(BufferPoolTest, IsNotInheritedByAForkedChild) {
  BufferPool pool(4096, 1);
  std::byte* data = pool.memory().data();
  const pid_t child = fork();
  if (child == 0) {
    unsigned char resident = 0;
    const bool mapped = mincore(data, 4096, &resident) == 0;
    _exit(mapped ? 1 : 0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

}  // namespace
}  // namespace torch_ext
