#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>

namespace torch_ext {

/// A point in a stream's work. Device::record makes it. It never changes, so
/// threads may share it. It may be dropped at any time, on any thread.
class DeviceEvent {
 public:
  virtual ~DeviceEvent() = default;
};
using EventPtr = std::shared_ptr<const DeviceEvent>;

/// Where a tensor's bytes live: streams, events and copies, behind eight
/// virtual functions. "Current" is the calling thread's current stream on this
/// device. "Copy" is the stream that the device keeps for torch_ext.
/// Threads: any. Calls of record, wait and copy on kCopy come from one thread
/// at a time, and it has called enter_thread().
class Device {
 public:
  enum class Stream { kCurrent, kCopy };

  virtual ~Device() = default;

  /// "cpu", "cuda:0", ...: for messages.
  virtual std::string name() const = 0;

  /// Each of torch_ext's own threads calls this once, before it uses the
  /// device. It is never called on a user's thread, since it changes a thread's
  /// settings.
  virtual void enter_thread() = 0;

  /// Page-locks whole pages of host memory for this device and all others of
  /// its type. Errors: any exception. The memory then stays usable, but copies
  /// are slower.
  virtual void pin(std::span<std::byte> memory) = 0;
  virtual void unpin(std::span<std::byte> memory) noexcept = 0;

  /// Marks the work that is queued on the stream so far. Never returns null.
  /// Errors: StateError if the stream is being captured into a graph.
  virtual EventPtr record(Stream stream) = 0;

  /// Makes the stream's later work wait for the event. The host does not wait.
  /// This device has recorded the event.
  /// Errors: StateError if the stream is being captured into a graph.
  virtual void wait(Stream stream, const EventPtr& event) = 0;

  /// True once the marked work is done. Never blocks. Errors: whatever went
  /// wrong in that work.
  virtual bool query(const EventPtr& event) = 0;

  /// Queues a copy of `bytes` bytes on the copy stream, between device memory
  /// and host memory. `to_host` tells the direction. It may return before the
  /// copy is made. Both sides must stay valid until an event that was recorded
  /// after it is done.
  virtual void copy(std::byte* to, const std::byte* from, std::size_t bytes,
                    bool to_host) = 0;
};

/// Host memory as a device. Copies are made before copy() returns, and events
/// are always done.
std::shared_ptr<Device> host_device();

}  // namespace torch_ext
