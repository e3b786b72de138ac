#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "support/aligned_buffer.h"
#include "support/faulty_engine.h"
#include "support/late_device.h"
#include "support/pattern.h"
#include "support/temp_dir.h"
#include "torch_ext/base/error.h"
#include "torch_ext/swap/swapper.h"

namespace torch_ext::test {

using std::chrono::milliseconds;
using Stream = Device::Stream;

inline constexpr std::size_t kMiB = 1 << 20;

/// A directory, a device whose work is late, and a script of I/O faults.
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
    AlignedBuffer memory(swapper.entry(key).size());
    swapper.swap_in(key, on_host(memory.bytes())).wait();
    return test::holds_pattern(memory.bytes(), seed);
  }

  TempDir dir_;
  std::shared_ptr<LateDevice> device_ = std::make_shared<LateDevice>();
  std::shared_ptr<FaultScript> script_ = std::make_shared<FaultScript>();
};

}  // namespace torch_ext::test
