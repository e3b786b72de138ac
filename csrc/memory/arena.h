#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "pages.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/process.h"

namespace torch_ext {

/// One anonymous mapping, and how many of its bytes are in use. Its owner knows
/// which. The mapping is as large as was asked for, to the page, and never
/// grows. Its pages stay: bytes that are given back are not zeroed. A forked
/// child does not inherit it. Threads: one at a time.
class Arena {
 public:
  /// `bytes` is rounded down to whole pages. Errors: IoError ("mmap").
  explicit Arena(std::uint64_t bytes)
      : size_(std::max(align_down(bytes, page_size()), page_size())),
        base_(map_pages(size_)) {
    // This only tunes. On a kernel without it the results are the same.
    madvise(base_, size_, MADV_DONTFORK);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    if (process_id() == owner_) unmap_pages(base_, size_);
  }

  std::uint64_t size() const { return size_; }
  std::uint64_t in_use() const { return in_use_; }
  std::uint64_t peak() const { return peak_; }
  std::byte* at(std::uint64_t offset) const { return base_ + offset; }

  void take(std::uint64_t bytes) noexcept {
    in_use_ += bytes;
    peak_ = std::max(peak_, in_use_);
  }
  void give(std::uint64_t bytes) noexcept { in_use_ -= bytes; }

 private:
  const std::uint64_t size_;
  std::byte* const base_;
  const pid_t owner_ = process_id();
  std::uint64_t in_use_ = 0;
  std::uint64_t peak_ = 0;
};

}  // namespace torch_ext
