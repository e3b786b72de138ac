#include "tensor/c10_device.h"

#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <thread>
#include <vector>

#include "support/fake_cuda.h"
#include "support/pattern.h"
#include "support/sim_machine.h"

namespace torch_ext {
namespace {

using Stream = Device::Stream;
constexpr auto kCurrent = Stream::kCurrent;
constexpr auto kCopy = Stream::kCopy;

test::SimMachine& machine() {
  static test::SimMachine only;
  return only;
}

std::byte* data_of(const at::Tensor& tensor) {
  return static_cast<std::byte*>(tensor.data_ptr());
}

class C10DeviceTest : public testing::Test {
 protected:
  C10DeviceTest() { machine().reset(); }
  ~C10DeviceTest() override { machine().reset(); }

  void fill_late(float value) {
    machine().hold(0, 0);
    tensor_.fill_(value);
  }
  void copy_out() {
    device_->copy(reinterpret_cast<std::byte*>(host_.data()), data_of(tensor_),
                  sizeof host_, /*to_host=*/true);
  }
  void copy_in() {
    device_->copy(data_of(tensor_),
                  reinterpret_cast<const std::byte*>(host_.data()),
                  sizeof host_, /*to_host=*/false);
  }
  bool settled(const EventPtr& event) {
    machine().settle();
    return device_->query(event);
  }

  const c10::Device sim_ = (machine(), c10::Device("sim:0"));
  std::shared_ptr<Device> device_ = device_for(sim_);
  at::Tensor tensor_ = at::zeros({100}, sim_);
  std::array<float, 100> host_{};
};

TEST_F(C10DeviceTest, CopyOutAfterAnEventSeesTheLateKernelsBefore) {
  fill_late(7);
  device_->wait(kCopy, device_->record(kCurrent));
  copy_out();
  const EventPtr copied = device_->record(kCopy);
  EXPECT_FALSE(settled(copied));
  machine().release(0, 0);
  EXPECT_TRUE(settled(copied));
  EXPECT_EQ(host_[99], 7);
}

TEST_F(C10DeviceTest, CopyOutWithoutAnEventDoesNot) {
  host_.fill(-1);
  fill_late(7);
  copy_out();
  EXPECT_TRUE(settled(device_->record(kCopy)));
  EXPECT_EQ(host_[99], 0);
}

TEST_F(C10DeviceTest, CopyReturnsBeforeItIsMade) {
  machine().hold_copies(true);
  host_.fill(3);
  copy_in();
  const EventPtr copied = device_->record(kCopy);
  EXPECT_FALSE(settled(copied));
  EXPECT_EQ(*static_cast<float*>(tensor_.data_ptr()), 0);
  machine().hold_copies(false);
  EXPECT_TRUE(settled(copied));
  EXPECT_EQ(tensor_[99].item<float>(), 3);
  EXPECT_EQ(machine().count("async_copies"), 1);
}

TEST_F(C10DeviceTest, CurrentStreamWaitsForAnEventOfTheCopyStream) {
  machine().hold_copies(true);
  host_.fill(3);
  copy_in();
  device_->wait(kCurrent, device_->record(kCopy));
  const at::Tensor seen = at::zeros({100}, sim_);
  seen.copy_(tensor_);
  const EventPtr used = device_->record(kCurrent);
  EXPECT_FALSE(settled(used));
  machine().hold_copies(false);
  EXPECT_TRUE(settled(used));
  EXPECT_EQ(seen[99].item<float>(), 3);
}

TEST_F(C10DeviceTest, CurrentIsTheStreamOfTheCallAndNotOfTheConstruction) {
  fill_late(7);
  const c10::impl::VirtualGuardImpl guard(sim_.type());
  const c10::StreamGuard on_side(guard.getNewStream(sim_));
  EXPECT_TRUE(settled(device_->record(kCurrent)));  // Stream 0 is held.
  machine().hold_copies(true);
  copy_in();
  device_->wait(kCurrent, device_->record(kCopy));
  EXPECT_FALSE(settled(device_->record(kCurrent)));
}

TEST_F(C10DeviceTest, EventKeepsItsPlaceWhenLaterOnesAreRecorded) {
  const EventPtr early = device_->record(kCurrent);
  EXPECT_TRUE(settled(early));
  fill_late(7);
  const EventPtr late = device_->record(kCurrent);
  EXPECT_TRUE(settled(early));
  EXPECT_FALSE(settled(late));
}

TEST_F(C10DeviceTest, DevicesMadeForTheSameGpuHaveCopyStreamsOfTheirOwn) {
  fill_late(7);
  device_->wait(kCopy, device_->record(kCurrent));
  const auto other = device_for(sim_);
  const EventPtr event = other->record(kCopy);
  machine().settle();
  EXPECT_TRUE(other->query(event));
  EXPECT_FALSE(settled(device_->record(kCopy)));
}

TEST_F(C10DeviceTest, CopiesExactlyTheBytesAskedForAtAnyAddress) {
  std::vector<std::byte> from(301);
  std::vector<std::byte> to(301);
  test::fill_pattern(from, 5);
  device_->copy(data_of(tensor_) + 1, from.data() + 2, 199, /*to_host=*/false);
  device_->copy(to.data() + 3, data_of(tensor_) + 1, 199, /*to_host=*/true);
  ASSERT_TRUE(settled(device_->record(kCopy)));
  EXPECT_TRUE(test::holds_pattern(std::span(to).subspan(3, 199), 5, 2));
  EXPECT_EQ(to[2], std::byte{0});
  EXPECT_EQ(to[202], std::byte{0});
  EXPECT_EQ(data_of(tensor_)[0], std::byte{0});
  EXPECT_EQ(data_of(tensor_)[200], std::byte{0});
}

TEST_F(C10DeviceTest, CopiesNothingWhenAskedTo) {
  device_->copy(nullptr, nullptr, 0, /*to_host=*/true);
  EXPECT_EQ(machine().count("async_copies"), 0);
}

TEST_F(C10DeviceTest, FailedCopyShowsWhenItsEventIsAsked) {
  machine().fail_copy(1);
  copy_out();
  const EventPtr good = device_->record(kCopy);
  copy_out();
  const EventPtr bad = device_->record(kCopy);
  EXPECT_TRUE(settled(good));
  EXPECT_THROW(device_->query(bad), c10::Error);
  EXPECT_TRUE(settled(device_->record(kCopy)));
}

TEST_F(C10DeviceTest, CopyLeavesTheThreadsDeviceAndStreamAlone) {
  const c10::impl::VirtualGuardImpl guard(sim_.type());
  const c10::Device other("sim:1");
  guard.setDevice(other);
  const c10::Stream before = guard.getStream(sim_);
  copy_out();
  EXPECT_EQ(guard.getDevice(), other);
  EXPECT_EQ(guard.getStream(sim_), before);
  guard.setDevice(sim_);
  EXPECT_TRUE(settled(device_->record(kCopy)));
}

TEST_F(C10DeviceTest, EnteringSelectsTheDeviceForTheThreadAlone) {
  const auto other = device_for(c10::Device("sim:1"));
  const c10::impl::VirtualGuardImpl guard(sim_.type());
  std::thread([&] {
    other->enter_thread();
    EXPECT_EQ(guard.getDevice().index(), 1);
  }).join();
  EXPECT_EQ(guard.getDevice().index(), 0);
}

TEST_F(C10DeviceTest, IsNamedWithItsIndex) {
  EXPECT_EQ(device_->name(), "sim:0");
  EXPECT_EQ(device_for(c10::Device("sim"))->name(), "sim:0");
  EXPECT_EQ(device_for(c10::Device("sim:1"))->name(), "sim:1");
  EXPECT_EQ(device_for(tensor_)->name(), "sim:0");
}

TEST_F(C10DeviceTest, TheCpuIsTheHostDevice) {
  EXPECT_EQ(device_for(at::zeros({1})), host_device());
}

TEST_F(C10DeviceTest, DeviceWithoutStreamsIsRefused) {
  EXPECT_THROW(device_for(c10::Device(c10::kMeta, 0)), c10::Error);
}

TEST_F(C10DeviceTest, WithoutARuntimePinningIsRefusedWithTheReason) {
  try {
    device_->pin(std::as_writable_bytes(std::span(host_)));
    FAIL();
  } catch (const StateError& error) {
    EXPECT_STREQ(error.what(), "not supported for devices of type sim");
  }
  device_->unpin(std::as_writable_bytes(std::span(host_)));
}

// Queued only: the fault takes the place of the copy itself.
TEST_F(C10DeviceTest, CopiesMayBeLargerThanAnIntCounts) {
  constexpr std::size_t kBytes = (std::size_t{5} << 30) + 3;
  void* reserved = mmap(nullptr, kBytes, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(reserved, MAP_FAILED);
  machine().fail_copy(0);
  device_->copy(static_cast<std::byte*>(reserved), data_of(tensor_), kBytes,
                /*to_host=*/true);
  EXPECT_EQ(machine().count("async_copies"), 1);
  EXPECT_EQ(machine().count("async_bytes"), std::int64_t{kBytes});
  machine().settle();
  munmap(reserved, kBytes);
}

class C10DeviceRuntimeTest : public C10DeviceTest {
 protected:
  C10DeviceRuntimeTest() {
    device_ = std::make_shared<C10Device>(
        sim_, C10Device::Runtime{CudaRuntime::open(fake_.path()), ""});
  }

  void* current_handle() {
    const c10::impl::VirtualGuardImpl guard(sim_.type());
    return guard.getStream(sim_).native_handle();
  }

  test::FakeCuda fake_;
};

TEST_F(C10DeviceRuntimeTest, PinsAndUnpinsThroughIt) {
  device_->pin(std::as_writable_bytes(std::span(host_)));
  EXPECT_EQ(fake_.registered_bytes(), sizeof host_);
  device_->unpin(std::as_writable_bytes(std::span(host_)));
  EXPECT_EQ(fake_.registered_bytes(), 0u);
  fake_.fail_next(2);
  EXPECT_THROW(device_->pin(std::as_writable_bytes(std::span(host_))), IoError);
}

TEST_F(C10DeviceRuntimeTest, StreamThatIsBeingCapturedIsRefusedUntouched) {
  const EventPtr event = device_->record(kCopy);
  fake_.set_capturing(current_handle(), true);
  EXPECT_THROW(device_->record(kCurrent), StateError);
  EXPECT_THROW(device_->wait(kCurrent, event), StateError);
  EXPECT_NO_THROW(device_->record(kCopy));
  fake_.set_capturing(current_handle(), false);
  EXPECT_TRUE(settled(device_->record(kCurrent)));
}

TEST_F(C10DeviceRuntimeTest, EnteringSetsThreadLocalCaptureModeForThatThread) {
  std::thread([this] {
    device_->enter_thread();
    EXPECT_EQ(fake_.capture_mode(), 1);
  }).join();
  device_->record(kCurrent);
  EXPECT_EQ(fake_.capture_mode(), 0);
}

}  // namespace
}  // namespace torch_ext
