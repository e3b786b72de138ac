#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>

namespace torch_ext {

/// A point in a stream's work; made by Device::record. Never changes, so
/// threads may share it; may be dropped at any time, on any thread.
class DeviceEvent {
 public:
  virtual ~DeviceEvent() = default;
};
using EventPtr = std::shared_ptr<const DeviceEvent>;

/// Where a tensor's bytes live: streams, events and copies, behind eight
/// virtuals. "Current" is the calling thread's current stream on this device,
/// "copy" the stream that the device keeps for torch_ext.
/// Threads: any; record, wait and copy on kCopy come from one thread at a
/// time, which has called enter_thread().
class Device {
 public:
  enum class Stream { kCurrent, kCopy };

  virtual ~Device() = default;

  /// "cpu", "cuda:0", ...: for messages.
  virtual std::string name() const = 0;

  /// Called once by each of torch_ext's own threads before it uses the
  /// device; never by the user's, whose settings it would change.
  virtual void enter_thread() = 0;

  /// Page-locks whole pages of host memory for this device and all others of
  /// its type. Errors: any exception; the memory then stays usable, only
  /// slower.
  virtual void pin(std::span<std::byte> memory) = 0;
  virtual void unpin(std::span<std::byte> memory) noexcept = 0;

  /// Marks the work queued on the stream so far. Never null.
  /// Errors: StateError if the stream is being captured into a graph.
  virtual EventPtr record(Stream stream) = 0;

  /// Makes the stream's later work wait for the event, which this device has
  /// recorded, not the host.
  /// Errors: StateError if the stream is being captured into a graph.
  virtual void wait(Stream stream, const EventPtr& event) = 0;

  /// True once the marked work is done. Never blocks. Errors: whatever the
  /// work met.
  virtual bool query(const EventPtr& event) = 0;

  /// Queues a copy on the copy stream between device memory and host memory,
  /// in either direction, and may return before it is made: both must stay
  /// valid until an event recorded after it is done.
  virtual void copy(std::byte* to, const std::byte* from, std::size_t bytes,
                    bool to_host) = 0;
};

/// Host memory as a device: copies are made before copy() returns, events are
/// always done.
std::shared_ptr<Device> host_device();

}  // namespace torch_ext
