#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "base/space_map.h"
#include "pages.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/process.h"

namespace torch_ext {

/// One anonymous mapping, of which parts of any size are taken and given back.
/// The mapping is as large as was asked for, to the page, and never grows. Its
/// pages stay: bytes that are given back are not zeroed. A forked child does
/// not inherit it. Offsets and sizes are multiples of the page size.
/// Threads: one at a time.
class Arena {
 public:
  /// `bytes` is rounded down to whole pages. Errors: IoError ("mmap").
  explicit Arena(std::uint64_t bytes)
      : size_(std::max(align_down(bytes, page_size()), page_size())),
        base_(map_pages(size_)) {
    // This only tunes. On a kernel without it the results are the same.
    madvise(base_, size_, MADV_DONTFORK);
    free_.give(0, size_);
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

  /// Takes these bytes. Returns false, and takes nothing, if some are not free.
  bool take_at(std::uint64_t offset, std::uint64_t bytes) {
    if (!free_.take_at(offset, bytes)) return false;
    in_use_ += bytes;
    peak_ = std::max(peak_, in_use_);
    return true;
  }

  void give(std::uint64_t offset, std::uint64_t bytes) {
    free_.give(offset, bytes);
    in_use_ -= bytes;
  }

 private:
  const std::uint64_t size_;
  std::byte* const base_;
  const pid_t owner_ = process_id();
  SpaceMap free_;
  std::uint64_t in_use_ = 0;
  std::uint64_t peak_ = 0;
};

}  // namespace torch_ext
