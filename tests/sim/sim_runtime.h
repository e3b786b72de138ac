#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <set>
#include <stdexcept>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "support/late_stream.h"

// The machine under the simulated device: two devices whose memory is host
// memory and whose streams are threads. No torch here.
namespace torch_ext::sim {

using test::LateClock;
using test::LateEvent;
using test::LateEventPtr;
using test::LateStream;

inline constexpr int kDevices = 2;
inline constexpr std::int64_t kPoolSize = 32;
inline constexpr std::byte kFreed{0xdb};  ///< What freed memory holds.
inline constexpr std::byte kFresh{0xcd};  ///< What new memory holds.

/// What tests look at. All since the last reset, but for the live ones.
struct Counts {
  std::atomic<std::int64_t> async_copies = 0;  ///< Queued.
  std::atomic<std::int64_t> async_bytes = 0;   ///< In these.
  std::atomic<std::int64_t> sync_copies = 0;
  std::atomic<std::int64_t> stale_copies = 0;  ///< Touched freed memory.
  std::atomic<std::int64_t> live_bytes = 0;    ///< On the devices.
  std::atomic<std::int64_t> reused_blocks = 0;
  std::atomic<std::int64_t> urgent_streams = 0;  ///< High priority, given.

  /// One of them; -1 if there is none of that name.
  std::int64_t named(std::string_view name) const {
    if (name == "async_copies") return async_copies;
    if (name == "async_bytes") return async_bytes;
    if (name == "sync_copies") return sync_copies;
    if (name == "stale_copies") return stale_copies;
    if (name == "live_bytes") return live_bytes;
    if (name == "reused_blocks") return reused_blocks;
    if (name == "urgent_streams") return urgent_streams;
    return -1;
  }
};

/// A device's streams. 0 is the default one, 1 to kPoolSize the pool's,
/// later ones are made by new_stream().
class Streams {
 public:
  explicit Streams(std::shared_ptr<LateClock> clock)
      : clock_(std::move(clock)) {
    streams_.resize(kPoolSize + 1);
  }

  LateStream& at(std::int64_t id) {
    std::lock_guard lock(mutex_);
    auto& stream = streams_.at(static_cast<std::size_t>(id));
    if (stream == nullptr) stream = std::make_unique<LateStream>(clock_);
    return *stream;
  }

  std::int64_t next_of_pool() {
    std::lock_guard lock(mutex_);
    return 1 + pool_turn_++ % kPoolSize;
  }

  std::int64_t add() {
    std::lock_guard lock(mutex_);
    streams_.push_back(nullptr);
    return static_cast<std::int64_t>(streams_.size()) - 1;
  }

  void for_each(const std::function<void(LateStream&)>& visit) {
    std::vector<LateStream*> all;
    {
      std::lock_guard lock(mutex_);
      for (const auto& stream : streams_) {
        if (stream != nullptr) all.push_back(stream.get());
      }
    }
    for (LateStream* stream : all) visit(*stream);
  }

 private:
  const std::shared_ptr<LateClock> clock_;
  std::mutex mutex_;
  std::deque<std::unique_ptr<LateStream>> streams_;
  std::int64_t pool_turn_ = 0;
};

/// A piece of a device's memory.
struct Block {
  std::byte* data = nullptr;
  std::size_t size = 0;
  int device = 0;
  std::int64_t stream = 0;               ///< The one it was allocated on.
  std::set<std::int64_t> other_streams;  ///< See Machine::use_on.
  std::atomic<bool> live = true;         ///< Changes when `stream` gets there.
};

/// The only machine there is. Threads: any.
class Machine {
 public:
  /// Never destroyed, as its threads end with the process only.
  static Machine& get() {
    static auto* const only = new Machine;
    return *only;
  }

  LateClock& clock() { return *clock_; }
  Streams& streams(int device) {
    return streams_.at(static_cast<std::size_t>(device));
  }
  Counts& counts() { return counts_; }

  /// The calling thread's device.
  int& current_device() {
    thread_local int device = 0;
    return device;
  }
  std::int64_t& current_stream(int device) {
    thread_local std::array<std::int64_t, kDevices> ids{};
    return ids.at(static_cast<std::size_t>(device));
  }
  LateStream& current(int device) {
    return streams(device).at(current_stream(device));
  }

  /// Memory for the current stream of the current device. As with CUDA's
  /// caching allocator, what was freed on that stream is handed out again at
  /// once, for whatever used it on that stream comes first.
  Block* allocate(std::size_t bytes) {
    const std::size_t size = (bytes + 511) / 512 * 512;
    const int device = current_device();
    const std::int64_t stream = current_stream(device);
    std::lock_guard lock(memory_mutex_);
    recycle_unused();
    counts_.live_bytes += static_cast<std::int64_t>(size);
    auto& free = free_[{device, stream, size}];
    if (!free.empty()) {
      Block* block = free.back();
      free.pop_back();
      streams(device).at(stream).run([block] { block->live = true; });
      ++counts_.reused_blocks;
      return block;
    }
    auto block = std::make_unique<Block>();
    block->data = static_cast<std::byte*>(std::aligned_alloc(512, size));
    if (block->data == nullptr) throw std::bad_alloc();
    block->size = size;
    block->device = device;
    block->stream = stream;
    std::fill_n(block->data, size, kFresh);
    return (blocks_[block->data] = std::move(block)).get();
  }

  /// Overwritten, and free for the next one, as soon as the streams that used
  /// it are through.
  void free(Block* block) {
    std::lock_guard lock(memory_mutex_);
    counts_.live_bytes -= static_cast<std::int64_t>(block->size);
    Unused unused{.block = block, .events = {}};
    for (const std::int64_t id : block->other_streams) {
      unused.events.push_back(streams(block->device).at(id).record());
    }
    block->other_streams.clear();
    unused_.push_back(std::move(unused));
    recycle_unused();
  }

  /// The block is used on a stream that it was not allocated on.
  void use_on(const void* data, std::int64_t stream) {
    std::lock_guard lock(memory_mutex_);
    Block* block = find(data);
    if (block != nullptr && block->stream != stream) {
      block->other_streams.insert(stream);
    }
  }

  /// Queues `copy` as one that release_copies and fail_copy know.
  /// `on_device`: the memory of the device that it touches.
  void queue_async_copy(LateStream& stream, const void* on_device,
                        std::size_t bytes, std::function<void()> copy) {
    const bool fails = copies_until_failure_.fetch_sub(1) == 0;
    if (copies_until_hold_.fetch_sub(1) == 0) clock_->hold_copies(true);
    stream.run_copy([this, on_device, fails, copy = std::move(copy)] {
      if (fails) {
        throw std::runtime_error("sim: an injected fault: the copy failed");
      }
      check_live(on_device);
      copy();
    });
    // Under the clock's mutex: somebody may wait for it.
    std::lock_guard lock(clock_->mutex);
    ++counts_.async_copies;
    counts_.async_bytes += static_cast<std::int64_t>(bytes);
    clock_->changed.notify_all();
  }

  /// After `more` asynchronous copies one fails: its bytes do not arrive and
  /// the next event on its stream throws.
  void fail_copy(std::int64_t more) { copies_until_failure_ = more; }

  /// When `more` asynchronous copies have been queued and another one is, the
  /// copies are held: see LateClock::hold_copies.
  void hold_copies_after(std::int64_t more) { copies_until_hold_ = more; }

  /// Returns when all streams have done all that they can.
  void settle() {
    std::unique_lock lock(clock_->mutex);
    clock_->changed.wait(lock, [this] {
      bool settled = true;
      for (Streams& streams : streams_) {
        streams.for_each(
            [&](LateStream& stream) { settled &= stream.is_settled(); });
      }
      return settled;
    });
  }

  /// As after a start, but memory and streams stay.
  void reset() {
    fail_copy(-1);
    hold_copies_after(-1);
    clock_->hold_copies(false);
    for (Streams& streams : streams_) {
      streams.for_each([](LateStream& stream) { stream.release(); });
    }
    for (Streams& streams : streams_) {
      streams.for_each([](LateStream& stream) {
        try {
          stream.synchronize();
        } catch (const std::exception&) {
          // The error of a test that is over.
        }
      });
    }
    counts_.async_copies = counts_.async_bytes = counts_.sync_copies = 0;
    counts_.stale_copies = counts_.reused_blocks = 0;
    counts_.urgent_streams = 0;
  }

 private:
  struct Unused {
    Block* block;
    std::vector<LateEventPtr> events;  ///< For streams that may still use it.
  };

  Machine() = default;

  // With memory_mutex_ held, as for the two below.
  void recycle_unused() {
    std::erase_if(unused_, [this](const Unused& unused) {
      {
        std::lock_guard lock(clock_->mutex);
        for (const auto& event : unused.events) {
          if (!event->done) return false;
        }
      }
      Block* block = unused.block;
      streams(block->device).at(block->stream).run([block] {
        block->live = false;
        std::fill_n(block->data, block->size, kFreed);
      });
      free_[{block->device, block->stream, block->size}].push_back(block);
      return true;
    });
  }

  Block* find(const void* data) {
    const auto* address = static_cast<const std::byte*>(data);
    auto next = blocks_.upper_bound(address);
    if (next == blocks_.begin()) return nullptr;
    Block* block = std::prev(next)->second.get();
    return address < block->data + block->size ? block : nullptr;
  }

  void check_live(const void* data) {
    std::lock_guard lock(memory_mutex_);
    const Block* block = find(data);
    if (block == nullptr || !block->live) ++counts_.stale_copies;
  }

  const std::shared_ptr<LateClock> clock_ = std::make_shared<LateClock>();
  std::array<Streams, kDevices> streams_{Streams(clock_), Streams(clock_)};
  Counts counts_;
  std::atomic<std::int64_t> copies_until_failure_ = -1;
  std::atomic<std::int64_t> copies_until_hold_ = -1;

  std::mutex memory_mutex_;
  std::map<const std::byte*, std::unique_ptr<Block>> blocks_;
  std::map<std::tuple<int, std::int64_t, std::size_t>, std::vector<Block*>>
      free_;
  std::vector<Unused> unused_;
};

}  // namespace torch_ext::sim
