#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/StreamGuard.h>
#include <c10/util/Exception.h>
#include <sys/types.h>

#include <array>
#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../base/mutex.h"
#include "c10_device.h"
#include "torch_ext/base/error.h"
#include "torch_ext/base/process.h"

namespace torch_ext {

/// Events of one device. One is made when none is free. Threads: any.
class EventPool {
 public:
  /// Takes an event, which comes back when it is let go of.
  static std::shared_ptr<c10::Event> take(
      const std::shared_ptr<EventPool>& pool, c10::DeviceType type) {
    std::unique_ptr<c10::Event> event;
    {
      const MutexLock lock(pool->mutex_);
      if (!pool->free_.empty()) {
        event = std::move(pool->free_.back());
        pool->free_.pop_back();
      }
    }
    if (event == nullptr) event = std::make_unique<c10::Event>(type);
    return {event.release(), [pool](c10::Event* used) {
              std::unique_ptr<c10::Event> owned(used);
              const MutexLock lock(pool->mutex_);
              pool->free_.push_back(std::move(owned));
            }};
  }

 private:
  Mutex mutex_;
  std::vector<std::unique_ptr<c10::Event>> free_ GUARDED_BY(mutex_);
};

/// A device's copy stream as an optimizer uses it, and the events for that,
/// which are made once. Only enter() and leave() look at the calling thread's
/// current stream.
///
/// Errors: StateError with what the device says. Threads: any, one at a time.
class CopyStream {
 public:
  /// How many chunks may be on their way to the host.
  static constexpr std::size_t kSlots = 2;

  /// Errors: as C10Device.
  explicit CopyStream(c10::Device device)
      : device_(std::make_shared<C10Device>(device)),
        stream_(device_->stream(Device::Stream::kCopy)),
        ready_(device.type()),
        done_(device.type()),
        here_{c10::Event(device.type()), c10::Event(device.type())} {}

  const std::shared_ptr<C10Device>& device() const { return device_; }

  /// Marks the work that the thread has queued so far: see ready().
  void enter() { ready_.record(device_->stream(Device::Stream::kCurrent)); }
  /// The event that enter() has recorded.
  const c10::Event& ready() const { return ready_; }

  /// Records another event, after what the thread has queued so far.
  std::shared_ptr<const c10::Event> now() const {
    auto event = EventPool::take(events_, stream_.device_type());
    event->record(device_->stream(Device::Stream::kCurrent));
    return event;
  }

  /// Makes the thread's later work wait for all that has been queued here.
  void leave() {
    mark_end();
    done_.block(device_->stream(Device::Stream::kCurrent));
  }

  /// Makes what is queued here from now on wait for the event.
  void after(const c10::Event& event) { event.block(stream_); }

  /// Keeps a tensor's memory on the device until what is queued here now is
  /// done, whoever lets go of the tensor.
  void uses(const at::Tensor& tensor) { device_->uses(tensor); }

  /// Calls `work`. What PyTorch throws in it becomes a StateError.
  template <typename Work>
  void guarded(Work&& work) {
    try {
      std::forward<Work>(work)();
    } catch (const c10::Error& error) {
      throw StateError("optimizer: on " + device_->name() + ": " +
                       error.what_without_backtrace());
    }
  }

  /// Calls `work`. Its operators queue their work on this stream.
  template <typename Work>
  void queue(Work&& work) {
    queued_ = true;
    guarded([&] {
      const c10::StreamGuard here(stream_);
      std::forward<Work>(work)();
    });
  }

  /// Marks the end of the work that `slot` waits for.
  void mark(std::size_t slot) { here_.at(slot).record(stream_); }
  /// Returns when the marked work is done.
  void await(std::size_t slot) {
    guarded([&] { here_.at(slot).synchronize(); });
  }

  /// Throws the error of the work that was queued before leave(), if it met
  /// one.
  void check() {
    if (!std::exchange(unseen_, false)) return;
    guarded([&] { done_.synchronize(); });
  }

  /// Returns when all that was queued is done.
  void settle() {
    if (queued_) mark_end();
    check();
  }

 private:
  void mark_end() {
    done_.record(stream_);
    queued_ = false;
    unseen_ = true;
  }

  const std::shared_ptr<C10Device> device_;
  const c10::Stream stream_;
  const std::shared_ptr<EventPool> events_ = std::make_shared<EventPool>();
  c10::Event ready_;  ///< On the caller's stream.
  c10::Event done_;   ///< On this one, after all that was queued.
  std::array<c10::Event, kSlots> here_;
  bool queued_ = false;  ///< Since done_ was recorded.
  bool unseen_ = false;  ///< The host has not waited for done_.
};

/// The streams of an optimizer, one for each device that it has met. Threads:
/// any, but each stream is used by one at a time. Forked children: nothing
/// happens.
class CopyStreams {
 public:
  CopyStreams() = default;
  CopyStreams(const CopyStreams&) = delete;
  CopyStreams& operator=(const CopyStreams&) = delete;

  ~CopyStreams() {
    if (in_child()) {
      // The events belong to the parent.
      for (auto& stream : streams_) static_cast<void>(stream.release());
      return;
    }
    for (const auto& stream : streams_) settle_quietly(*stream);
  }

  /// The stream of the tensor's device. Null for the CPU.
  CopyStream* find(const at::Tensor& tensor) const {
    const MutexLock lock(mutex_);
    for (const auto& stream : streams_) {
      if (stream->device()->name() == tensor.device().str())
        return stream.get();
    }
    return nullptr;
  }

  CopyStream* add(c10::Device device) {
    auto stream = std::make_unique<CopyStream>(device);
    const MutexLock lock(mutex_);
    streams_.push_back(std::move(stream));
    return streams_.back().get();
  }

  /// A thread of the library calls this before it uses the streams.
  void enter_thread() {
    const MutexLock lock(mutex_);
    for (const auto& stream : streams_) stream->device()->enter_thread();
  }

  void enter() {
    const MutexLock lock(mutex_);
    for (const auto& stream : streams_) stream->enter();
  }
  void leave() {
    const MutexLock lock(mutex_);
    for (const auto& stream : streams_) stream->leave();
  }

  /// Calls `work` between enter() and leave(), whatever it throws.
  template <typename Work>
  void around(Work&& work) {
    enter();
    try {
      std::forward<Work>(work)();
    } catch (...) {
      leave_quietly();
      throw;
    }
    leave();
  }

  /// Gives the host memory that all share to `user`, or to the host if that is
  /// null.
  void make_way_for(const CopyStream* user) {
    const MutexLock lock(mutex_);
    for (const auto& stream : streams_) {
      if (stream.get() == user) {
        stream->check();
      } else {
        stream->settle();
      }
    }
  }

  /// Returns when all streams have done what was queued.
  void settle() {
    if (!in_child()) make_way_for(nullptr);
  }

  static void settle_quietly(CopyStream& stream) noexcept {
    try {
      stream.settle();
    } catch (...) {
      // Whoever asks has an earlier error to tell, or replaces the memory.
    }
  }

 private:
  bool in_child() const { return process_id() != owner_; }

  void leave_quietly() noexcept {
    try {
      leave();
    } catch (...) {
      // The error that is on its way says more.
    }
  }

  const pid_t owner_ = process_id();
  mutable Mutex mutex_;  // For the list.
  std::vector<std::unique_ptr<CopyStream>> streams_ GUARDED_BY(mutex_);
};

}  // namespace torch_ext
