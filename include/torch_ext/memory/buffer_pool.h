#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "torch_ext/device/device.h"

namespace torch_ext {

/// A lease of one of a pool's buffers. Its destructor gives the buffer back.
/// Ownership: move-only; keeps the pool's memory alive.
/// Threads: any, one at a time.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();

  explicit operator bool() const noexcept { return data_ != nullptr; }
  std::byte* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }
  std::span<std::byte> bytes() const noexcept { return {data_, size_}; }

 private:
  friend class BufferPool;
  std::shared_ptr<void> pool_;
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

/// `count` buffers of `buffer_size` bytes in one anonymous mapping. The mapping
/// has exactly that size, is aligned to pages, and uses huge pages where they
/// help. A forked child does not inherit it. The pool never grows. The buffer
/// that was given back last is taken first.
/// Threads: any.
class BufferPool {
 public:
  /// `buffer_size` must be a multiple of page_size().
  /// Errors: std::invalid_argument; IoError ("mmap") when memory is refused.
  BufferPool(std::size_t buffer_size, std::size_t count);
  BufferPool(const BufferPool&) = delete;
  BufferPool& operator=(const BufferPool&) = delete;

  /// A buffer with undefined content, or an empty lease if all are taken.
  Buffer try_take();

  /// Page-locks the memory for `device` and all others of its type, which is
  /// the part of its name before ':'. This is done once for each type, and
  /// undone when the memory is freed. Returns an empty string, or why the
  /// memory stays unlocked.
  std::string pin(std::shared_ptr<Device> device);

  std::size_t buffer_size() const noexcept;
  std::size_t count() const noexcept;
  std::size_t in_use() const noexcept;
  std::size_t peak_in_use() const noexcept;
  std::span<std::byte> memory() const noexcept;

 private:
  friend class Buffer;
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace torch_ext
