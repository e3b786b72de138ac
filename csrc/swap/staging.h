#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include "torch_ext/memory/buffer_pool.h"

namespace torch_ext {

/// Hands out memory of a pool's buffers for chunks. Small chunks share a
/// buffer; otherwise each would hold 4 MiB of the pool. Threads: one.
class Staging {
 public:
  explicit Staging(BufferPool& pool) : pool_(pool) {}

  /// Memory for `bytes` bytes; empty if there is none now. At least `spare`
  /// buffers stay in the pool. Keep `buffer` as long as the memory is used.
  std::span<std::byte> take(std::uint64_t bytes, std::size_t spare,
                            std::shared_ptr<Buffer>& buffer) {
    const std::size_t size = pool_.buffer_size();
    const bool small = bytes <= size / 2;
    if (small && shared_ != nullptr && used_ + bytes <= size) {
      buffer = shared_;
    } else {
      // The last user of the old buffer gives it back.
      if (small) shared_.reset();
      const auto lease = [&] {
        return pool_.in_use() + spare < pool_.count() ? pool_.try_take()
                                                      : Buffer();
      };
      Buffer taken = lease();
      if (!taken && shared_ != nullptr) {
        shared_.reset();
        taken = lease();
      }
      if (!taken) return {};
      buffer = std::make_shared<Buffer>(std::move(taken));
      if (!small) return buffer->bytes().first(bytes);
      shared_ = buffer;
      used_ = 0;
    }
    const std::span<std::byte> span = buffer->bytes().subspan(used_, bytes);
    used_ += bytes;
    return span;
  }

  /// Keeps no buffer for small chunks to come.
  void release() { shared_.reset(); }

 private:
  BufferPool& pool_;
  std::shared_ptr<Buffer> shared_;
  std::size_t used_ = 0;
};

}  // namespace torch_ext
