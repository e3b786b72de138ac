#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "torch_ext/device/device.h"

namespace torch_ext {

/// Bytes that a device holds or shall hold.
struct DeviceBytes {
  std::shared_ptr<Device> device = nullptr;
  std::byte* data = nullptr;  ///< On the device; not written by swap_out.
  std::uint64_t size = 0;
  /// What keeps `data` valid. Only the owner's threads drop it, in the
  /// Swapper's next call, in a ticket's wait or in close().
  std::shared_ptr<void> keep_alive = nullptr;
  /// While it lives, `data` stays where it is. Any thread may drop it. It is
  /// dropped as soon as the last copy from or to `data` is queued, or nothing
  /// uses `data` any more, and before anybody hears of that.
  std::shared_ptr<void> fixed = nullptr;
  /// swap_in only. A thread of the Swapper calls it once, when the last copy to
  /// `data` is queued and before anybody hears of that. What it queues on the
  /// copy stream is part of the operation; what it throws is the operation's
  /// error. That thread also drops it. What must not be dropped there belongs
  /// into keep_alive.
  std::function<void(Device& device)> on_arrival = nullptr;
};

}  // namespace torch_ext
