#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include "torch_ext/base/align.h"

namespace torch_ext {

/// Maps zeroed, private pages for `bytes` (> 0), to be given back with
/// unmap_pages(). A mapping of 2 MiB or more begins at a multiple of 2 MiB and
/// asks for huge pages: a drive moves what lies together in memory in fewer
/// requests. `page`: bytes of a page of the kernel, which may be more than
/// 4096. Errors: IoError ("mmap"). Threads: any.
std::byte* map_pages(std::size_t bytes, std::size_t page = page_size());

/// Gives pages back. `bytes` and `page` are those that map_pages() got.
void unmap_pages(std::byte* data, std::size_t bytes,
                 std::size_t page = page_size()) noexcept;

/// Zeroed memory that direct I/O can take, until its end. Errors:
/// map_pages()'s.
class Pages {
 public:
  explicit Pages(std::size_t bytes)
      : size_(align_up(std::max<std::size_t>(bytes, 1), page_size())),
        data_(map_pages(size_)) {}
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  ~Pages() { unmap_pages(data_, size_); }

  std::span<std::byte> first(std::size_t bytes) const { return {data_, bytes}; }

 private:
  std::size_t size_;
  std::byte* data_;
};

}  // namespace torch_ext
