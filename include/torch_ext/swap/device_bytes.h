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
  /// Whatever keeps `data` valid; dropped by the owner's threads only, in
  /// the Swapper's next call, a ticket's wait or close().
  std::shared_ptr<void> keep_alive = nullptr;
  /// While it lives, `data` stays where it is. Dropped by any thread as soon as
  /// the last copy from or to `data` is queued, or nothing uses it any more,
  /// before anybody hears of it.
  std::shared_ptr<void> fixed = nullptr;
  /// swap_in only: called once, by a thread of the Swapper, when the last
  /// copy to `data` is queued, before anybody hears of it. What it queues on
  /// the copy stream is part of the operation, what it throws its error. It is
  /// dropped there: what must not be belongs into keep_alive.
  std::function<void(Device& device)> on_arrival = nullptr;
};

}  // namespace torch_ext
