#include <gtest/gtest.h>

#include <array>
#include <cstddef>

#include "support/pattern.h"
#include "torch_ext/device/device.h"

namespace torch_ext {
namespace {

TEST(HostDeviceTest, CopiesBeforeItReturns) {
  std::array<std::byte, 1000> from;
  std::array<std::byte, 1000> to{};
  test::fill_pattern(from, 1);
  host_device()->copy(to.data(), from.data(), 999, /*to_host=*/true);
  EXPECT_TRUE(test::holds_pattern(std::span(to).first(999), 1));
  EXPECT_EQ(to[999], std::byte{0});  // And no byte more.
}

TEST(HostDeviceTest, CopiesNothingWhenAskedTo) {
  host_device()->copy(nullptr, nullptr, 0, /*to_host=*/false);
}

TEST(HostDeviceTest, EventsAreAlwaysDone) {
  const auto device = host_device();
  const EventPtr event = device->record(Device::Stream::kCurrent);
  ASSERT_NE(event, nullptr);
  device->wait(Device::Stream::kCopy, event);
  EXPECT_TRUE(device->query(event));
}

TEST(HostDeviceTest, PinningIsAcceptedAndChangesNothing) {
  std::array<std::byte, 16> memory{};
  host_device()->pin(memory);
  host_device()->unpin(memory);
}

TEST(HostDeviceTest, IsOneDeviceCalledCpu) {
  EXPECT_EQ(host_device()->name(), "cpu");
  EXPECT_EQ(host_device(), host_device());
}

}  // namespace
}  // namespace torch_ext
