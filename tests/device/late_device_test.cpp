#include "support/late_device.h"

#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <memory>
#include <stdexcept>
#include <vector>

// The core's tests stand on this device, so it must be late where it says so.
namespace torch_ext::test {
namespace {

using Stream = Device::Stream;
constexpr auto kCurrent = Stream::kCurrent;
constexpr auto kCopy = Stream::kCopy;

class LateDeviceTest : public testing::Test {
 protected:
  void SetUp() override { device_.enter_thread(); }
  void TearDown() override {
    device_.synchronize();
    EXPECT_EQ(device_.misuses(), expected_);
  }

  void copy_out() {
    device_.copy(host_.data(), memory_.get(), kSize, /*to_host=*/true);
  }
  void copy_in() {
    device_.copy(memory_.get(), host_.data(), kSize, /*to_host=*/false);
  }

  static constexpr std::size_t kSize = 64;
  LateDevice device_;
  std::shared_ptr<std::byte> memory_ = device_.allocate(kSize);
  std::array<std::byte, kSize> host_{};
  std::vector<std::string> expected_;
};

TEST_F(LateDeviceTest, CopyReadsItsSourceOnlyWhenItsStreamGetsThere) {
  device_.hold(kCopy);
  copy_out();
  const EventPtr copied = device_.record(kCopy);
  memory_.get()[0] = std::byte{7};
  EXPECT_FALSE(device_.query(copied));
  device_.release(kCopy);
  device_.settle(kCopy);
  EXPECT_TRUE(device_.query(copied));
  EXPECT_EQ(host_[0], std::byte{7});
}

TEST_F(LateDeviceTest, CopyWritesItsDestinationOnlyWhenItsStreamGetsThere) {
  device_.hold(kCopy);
  host_[0] = std::byte{1};
  copy_in();
  EXPECT_EQ(memory_.get()[0], LateDevice::kFresh);
  host_[0] = std::byte{2};  // A host buffer that was reused too early.
  device_.release(kCopy);
  device_.settle(kCopy);
  EXPECT_EQ(memory_.get()[0], std::byte{2});
}

TEST_F(LateDeviceTest, StreamsAreNotOrderedWithoutAnEvent) {
  device_.hold(kCurrent);
  device_.run_on_current([this] { memory_.get()[0] = std::byte{7}; });
  copy_out();
  device_.settle(kCopy);
  EXPECT_EQ(host_[0], LateDevice::kFresh);
  device_.release(kCurrent);
  device_.synchronize();
  EXPECT_EQ(host_[0], LateDevice::kFresh);
}

TEST_F(LateDeviceTest, EventOrdersTheCopyStreamAfterTheCurrentOne) {
  device_.hold(kCurrent);
  device_.run_on_current([this] { memory_.get()[0] = std::byte{7}; });
  device_.wait(kCopy, device_.record(kCurrent));
  copy_out();
  device_.settle(kCopy);
  EXPECT_EQ(device_.counts().copies_made, 0u);
  device_.release(kCurrent);
  device_.synchronize();
  EXPECT_EQ(host_[0], std::byte{7});
}

TEST_F(LateDeviceTest, EventOrdersTheCurrentStreamAfterTheCopyStream) {
  device_.hold(kCopy);
  copy_out();
  device_.wait(kCurrent, device_.record(kCopy));
  device_.run_on_current([this] { memory_.get()[0] = std::byte{7}; });
  device_.settle(kCurrent);
  EXPECT_EQ(memory_.get()[0], LateDevice::kFresh);
  device_.release(kCopy);
  device_.synchronize();
  EXPECT_EQ(host_[0], LateDevice::kFresh);
  EXPECT_EQ(memory_.get()[0], std::byte{7});
}

TEST_F(LateDeviceTest, EventCoversOnlyWhatWasQueuedBeforeIt) {
  device_.hold(kCopy);
  copy_out();
  const EventPtr first = device_.record(kCopy);
  copy_out();
  const EventPtr second = device_.record(kCopy);
  device_.release_copies(1);
  device_.settle(kCopy);
  EXPECT_TRUE(device_.query(first));
  EXPECT_FALSE(device_.query(second));
  EXPECT_EQ(device_.counts().copies_made, 1u);
  device_.release_copies(1);
  device_.settle(kCopy);
  EXPECT_TRUE(device_.query(second));
}

TEST_F(LateDeviceTest, HoldStopsAStreamThatWasLetRunOn) {
  device_.hold(kCopy);
  device_.release(kCopy);
  device_.hold(kCopy);
  copy_out();
  device_.settle(kCopy);
  EXPECT_EQ(device_.counts().copies_made, 0u);
  device_.release(kCopy);
  device_.synchronize();
  EXPECT_EQ(device_.counts().copied_bytes, kSize);
}

TEST_F(LateDeviceTest, FreedMemoryIsOverwrittenOnceTheCurrentStreamGetsThere) {
  device_.hold(kCurrent);
  const std::byte* data = memory_.get();
  device_.run_on_current([this, data] { host_[0] = *data; });
  memory_.reset();
  EXPECT_EQ(*data, LateDevice::kFresh);
  device_.release(kCurrent);
  device_.settle(kCurrent);
  EXPECT_EQ(host_[0], LateDevice::kFresh);
  EXPECT_EQ(*data, LateDevice::kFreed);
}

TEST_F(LateDeviceTest, CopyOfFreedMemoryIsAMisuse) {
  device_.hold(kCopy);
  copy_out();
  memory_.reset();
  device_.settle(kCurrent);
  device_.release(kCopy);
  device_.synchronize();
  EXPECT_EQ(host_[0], LateDevice::kFreed);
  expected_ = {"copy 0 touches freed memory"};
}

TEST_F(LateDeviceTest, FailedCopyShowsInTheNextEventAndNoOther) {
  device_.fail_copy(1, std::make_exception_ptr(std::runtime_error("bus")));
  copy_out();
  const EventPtr before = device_.record(kCopy);
  copy_out();
  const EventPtr failed = device_.record(kCopy);
  const EventPtr after = device_.record(kCopy);
  device_.synchronize();
  EXPECT_TRUE(device_.query(before));
  EXPECT_THROW(device_.query(failed), std::runtime_error);
  EXPECT_THROW(device_.query(failed), std::runtime_error);
  EXPECT_TRUE(device_.query(after));
  EXPECT_EQ(device_.counts().copied_bytes, kSize);
}

TEST_F(LateDeviceTest, CallsThatFailQueueNothing) {
  const auto error = std::make_exception_ptr(std::runtime_error("no"));
  device_.fail_copy_call(error);
  EXPECT_THROW(copy_out(), std::runtime_error);
  device_.fail_record(error);
  EXPECT_THROW(device_.record(kCopy), std::runtime_error);
  device_.synchronize();
  EXPECT_EQ(device_.counts().copies, 0u);
  EXPECT_EQ(device_.counts().events, 0u);
  copy_out();
  EXPECT_NE(device_.record(kCopy), nullptr);
  EXPECT_TRUE(device_.await_copies(1));
}

TEST_F(LateDeviceTest, CaptureForbidsToRecordTheCurrentStream) {
  device_.set_capturing(true);
  EXPECT_THROW(device_.record(kCurrent), StateError);
  device_.record(kCopy);
  device_.set_capturing(false);
  device_.record(kCurrent);
}

TEST_F(LateDeviceTest, PinsAreCountedAndChecked) {
  device_.pin(host_);
  EXPECT_EQ(device_.counts().pinned_bytes, kSize);
  device_.hold(kCopy);
  copy_out();
  device_.unpin(host_);
  EXPECT_EQ(device_.counts().pinned_bytes, 0u);
  device_.unpin(host_);
  device_.refuse_pin("memlock");
  EXPECT_THROW(device_.pin(host_), StateError);
  EXPECT_EQ(device_.counts().pins, 1u);
  device_.release(kCopy);
  device_.synchronize();
  expected_ = {"unpin of memory that a queued copy uses",
               "unpin of memory that is not pinned"};
}

TEST_F(LateDeviceTest, MixedUpThreadsAndDevicesAreMisuses) {
  std::thread([this] { copy_out(); }).join();
  LateDevice other("late:1");
  device_.query(other.record(kCurrent));
  device_.synchronize();
  ASSERT_EQ(device_.misuses().size(), 2u);
  expected_ = {
      "copy on the copy stream by a thread that was not the last to enter",
      "an event of another device"};
}

TEST_F(LateDeviceTest, CountsTheEventsThatAreAlive) {
  EventPtr event = device_.record(kCopy);
  device_.synchronize();
  EXPECT_EQ(device_.counts().events_alive, 1u);
  event.reset();
  EXPECT_EQ(device_.counts().events_alive, 0u);
}

TEST_F(LateDeviceTest, DestructionFinishesWhatIsHeld) {
  std::array<std::byte, 4> from{std::byte{1}};
  std::array<std::byte, 4> to{};
  {
    LateDevice device;
    device.enter_thread();
    device.hold(kCurrent);
    device.hold(kCopy);
    device.wait(kCopy, device.record(kCurrent));
    device.copy(to.data(), from.data(), 4, /*to_host=*/true);
  }
  EXPECT_EQ(to[0], std::byte{1});
}

}  // namespace
}  // namespace torch_ext::test
