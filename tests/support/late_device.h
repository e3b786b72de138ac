#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support/late_stream.h"
#include "torch_ext/base/error.h"
#include "torch_ext/device/device.h"

namespace torch_ext::test {

/// A Device whose work is done late: nothing but events orders its
/// two streams, which are threads, one after the other. Its memory is ordinary
/// memory; a copy reads and writes only when its stream gets to it. The
/// current stream is the same for all threads.
/// Tests decide when a stream goes on: hold, release, release_copies, settle;
/// see LateStream.
/// What the contract of Device forbids is collected in misuses().
/// Threads: any.
class LateDevice final : public Device {
 public:
  /// What freed memory holds, and memory never written.
  static constexpr std::byte kFreed{0xdb};
  static constexpr std::byte kFresh{0xcd};

  struct Counts {
    std::size_t copies = 0;       ///< Queued.
    std::size_t copies_made = 0;  ///< Executed ones, also failed ones.
    std::size_t copied_bytes = 0;
    std::size_t events = 0;  ///< Recorded, on either stream.
    std::size_t events_alive = 0;
    std::size_t current_waits = 0;  ///< wait(kCurrent, ...)
    std::size_t copy_waits = 0;     ///< wait(kCopy, ...)
    std::size_t queries = 0;
    std::size_t pinned_bytes = 0;  ///< Now.
    std::size_t pins = 0;          ///< Calls that succeeded.
  };

  explicit LateDevice(std::string name = "late:0") : name_(std::move(name)) {}

  /// Finishes what is queued, held or not.
  ~LateDevice() override {
    current_.release();
    copy_.release();
  }

  // Device:
  std::string name() const override { return name_; }

  void enter_thread() override {
    std::lock_guard lock(mutex_);
    copy_thread_ = std::this_thread::get_id();
  }

  void pin(std::span<std::byte> memory) override {
    std::lock_guard lock(mutex_);
    if (pin_refusal_) throw StateError(*pin_refusal_);
    if (!pinned_.emplace(memory.data(), memory.size()).second) {
      misuse("pin of memory that is pinned");
    }
    counts_.pins += 1;
    counts_.pinned_bytes += memory.size();
  }

  void unpin(std::span<std::byte> memory) noexcept override {
    std::lock_guard lock(mutex_);
    const auto entry = pinned_.find(memory.data());
    if (entry == pinned_.end() || entry->second != memory.size()) {
      misuse("unpin of memory that is not pinned");
      return;
    }
    for (const auto& [host, bytes] : hosts_in_flight_) {
      if (host < memory.data() + memory.size() &&
          memory.data() < host + bytes) {
        misuse("unpin of memory that a queued copy uses");
      }
    }
    counts_.pinned_bytes -= memory.size();
    pinned_.erase(entry);
  }

  EventPtr record(Stream stream) override {
    std::lock_guard lock(mutex_);
    if (stream == Stream::kCurrent && capturing_) {
      throw StateError(name_ + ": the current stream is being captured");
    }
    check_thread(stream, "record");
    if (auto error = std::exchange(record_error_, nullptr)) {
      std::rethrow_exception(error);
    }
    counts_.events += 1;
    auto event = std::make_shared<Event>(this, alive_);
    stream_of(stream).record(event->late);
    return event;
  }

  void wait(Stream stream, const EventPtr& event) override {
    std::lock_guard lock(mutex_);
    check_thread(stream, "wait");
    ++(stream == Stream::kCurrent ? counts_.current_waits : counts_.copy_waits);
    if (const auto late = own(event)) stream_of(stream).wait(late);
  }

  bool query(const EventPtr& event) override {
    std::lock_guard lock(mutex_);
    counts_.queries += 1;
    const std::shared_ptr<const LateEvent> late = own(event);
    if (late == nullptr) return true;
    std::lock_guard clock(clock_->mutex);
    if (late->error != nullptr) std::rethrow_exception(late->error);
    return late->done;
  }

  void copy(std::byte* to, const std::byte* from, std::size_t bytes,
            bool to_host) override {
    std::lock_guard lock(mutex_);
    check_thread(Stream::kCopy, "copy");
    if (auto error = std::exchange(copy_call_error_, nullptr)) {
      std::rethrow_exception(error);
    }
    const std::size_t index = counts_.copies++;
    const std::byte* on_device = to_host ? from : to;
    const auto host = hosts_in_flight_.emplace(to_host ? to : from, bytes);
    copy_.run_copy([=, this] {
      const std::exception_ptr fault = start_copy(index, on_device, bytes);
      if (fault == nullptr && bytes > 0) std::memcpy(to, from, bytes);
      std::lock_guard inner(mutex_);
      hosts_in_flight_.erase(host);
      if (fault != nullptr) std::rethrow_exception(fault);
      counts_.copied_bytes += bytes;
    });
    copies_queued_.notify_all();
  }

  // Memory:
  /// Memory of the device, filled with kFresh; drop it before the device.
  /// Dropping it does what a
  /// caching allocator may do: once the current stream gets there, somebody
  /// else's kernel overwrites it (with kFreed). A copy that touches it after
  /// that is a misuse.
  std::shared_ptr<std::byte> allocate(std::size_t bytes) {
    std::lock_guard lock(mutex_);
    auto block = std::make_shared<Block>();
    block->bytes.assign(bytes, kFresh);
    std::byte* data = block->bytes.data();
    blocks_.push_back(block);
    return {data, [this, block](std::byte*) {
              run_on_current([this, block] {
                std::fill(block->bytes.begin(), block->bytes.end(), kFreed);
                std::lock_guard inner(mutex_);
                block->freed = true;
              });
            }};
  }

  // Control:
  /// Queues `kernel` on the current stream.
  void run_on_current(std::function<void()> kernel) {
    current_.run(std::move(kernel));
  }

  /// See LateStream.
  void hold(Stream stream) { stream_of(stream).hold(); }
  void release(Stream stream) { stream_of(stream).release(); }
  void settle(Stream stream) { stream_of(stream).settle(); }
  void release_copies(std::size_t more) { copy_.release_copies(more); }

  /// Returns when both streams are empty.
  void synchronize() {
    std::unique_lock lock(clock_->mutex);
    clock_->changed.wait(
        lock, [this] { return current_.is_idle() && copy_.is_idle(); });
  }

  /// True once `count` copies have been queued since the device was made;
  /// false after 20 seconds.
  bool await_copies(std::size_t count) {
    std::unique_lock lock(mutex_);
    return copies_queued_.wait_for(lock, std::chrono::seconds(20),
                                   [&] { return counts_.copies >= count; });
  }

  // Faults:
  /// Copy number `index` (0 is the device's first) is not made; the next event
  /// recorded on the copy stream throws `error` when queried.
  void fail_copy(std::size_t index, std::exception_ptr error) {
    std::lock_guard lock(mutex_);
    failing_[index] = std::move(error);
  }
  /// The next call of copy() queues nothing and throws.
  void fail_copy_call(std::exception_ptr error) {
    std::lock_guard lock(mutex_);
    copy_call_error_ = std::move(error);
  }
  /// The next call of record() records nothing and throws.
  void fail_record(std::exception_ptr error) {
    std::lock_guard lock(mutex_);
    record_error_ = std::move(error);
  }
  void refuse_pin(std::string why) {
    std::lock_guard lock(mutex_);
    pin_refusal_ = std::move(why);
  }
  /// As if a graph were being recorded on the current stream.
  void set_capturing(bool capturing) {
    std::lock_guard lock(mutex_);
    capturing_ = capturing;
  }

  Counts counts() const {
    std::lock_guard lock(mutex_);
    Counts now = counts_;
    now.events_alive = alive_->load();
    return now;
  }
  std::vector<std::string> misuses() const {
    std::lock_guard lock(mutex_);
    return misuses_;
  }

 private:
  struct Event final : DeviceEvent {
    Event(const LateDevice* device,
          std::shared_ptr<std::atomic<std::size_t>> alive_count)
        : owner(device), alive(std::move(alive_count)) {
      ++*alive;
    }
    ~Event() override { --*alive; }

    const LateDevice* const owner;
    const std::shared_ptr<std::atomic<std::size_t>> alive;
    const LateEventPtr late = std::make_shared<LateEvent>();
  };

  struct Block {
    std::vector<std::byte> bytes;
    bool freed = false;
  };

  LateStream& stream_of(Stream stream) {
    return stream == Stream::kCurrent ? current_ : copy_;
  }

  // The fault that it shall meet, or null.
  std::exception_ptr start_copy(std::size_t index, const std::byte* on_device,
                                std::size_t bytes) {
    std::lock_guard lock(mutex_);
    counts_.copies_made += 1;
    if (auto fault = failing_.find(index); fault != failing_.end()) {
      return fault->second;
    }
    if (touches_freed(on_device, bytes)) {
      misuse("copy " + std::to_string(index) + " touches freed memory");
    }
    return nullptr;
  }

  bool touches_freed(const std::byte* data, std::size_t bytes) const {
    for (const auto& block : blocks_) {
      const std::byte* begin = block->bytes.data();
      if (block->freed && data < begin + block->bytes.size() &&
          begin < data + bytes) {
        return true;
      }
    }
    return false;
  }

  // With the lock held.
  void check_thread(Stream stream, const char* what) {
    if (stream == Stream::kCurrent) return;
    if (std::this_thread::get_id() != copy_thread_) {
      misuse(std::string(what) +
             " on the copy stream by a thread that was not the last to enter");
    }
  }

  LateEventPtr own(const EventPtr& event) {
    const auto* mine = dynamic_cast<const Event*>(event.get());
    if (mine != nullptr && mine->owner == this) return mine->late;
    misuse("an event of another device");
    return nullptr;
  }

  void misuse(std::string what) { misuses_.push_back(std::move(what)); }

  const std::string name_;
  mutable std::mutex mutex_;
  std::condition_variable copies_queued_;
  Counts counts_;
  std::shared_ptr<std::atomic<std::size_t>> alive_ =
      std::make_shared<std::atomic<std::size_t>>(0);
  std::vector<std::string> misuses_;
  std::thread::id copy_thread_;  // The last that entered.
  std::map<const std::byte*, std::size_t> pinned_;
  std::multimap<const std::byte*, std::size_t> hosts_in_flight_;
  std::vector<std::shared_ptr<Block>> blocks_;  // Kept: late access is seen.
  std::map<std::size_t, std::exception_ptr> failing_;
  std::exception_ptr copy_call_error_;
  std::exception_ptr record_error_;
  std::optional<std::string> pin_refusal_;
  bool capturing_ = false;

  const std::shared_ptr<LateClock> clock_ = std::make_shared<LateClock>();
  LateStream current_{clock_};  // Last: their threads use all the others.
  LateStream copy_{clock_};
};

}  // namespace torch_ext::test
