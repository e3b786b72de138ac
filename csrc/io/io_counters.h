#pragma once

#include <atomic>
#include <cstdint>

namespace torch_ext {

/// What one thread has done for its queue. It has a cache line of its own, so
/// that no thread waits for another to count.
struct alignas(64) IoCounters {
  using Counter = std::atomic<std::uint64_t>;

  static void add(Counter& counter, std::uint64_t count) {
    counter.fetch_add(count, std::memory_order_relaxed);
  }

  Counter operations_ended = 0;
  Counter bytes_ended = 0;
  Counter requests = 0;
  Counter retries = 0;
  Counter short_transfers = 0;
};

}  // namespace torch_ext
