#pragma once

#include <cstddef>

#include "torch_ext/base/align.h"

namespace torch_ext {

/// Zeroed pages of this process alone for `bytes` (> 0), to be given back with
/// unmap_pages(). 2 MiB and more begin at a multiple of 2 MiB and ask for huge
/// pages: a drive moves what lies together in memory in fewer requests. `page`:
/// the kernel's, which may be more than 4096. Errors: IoError ("mmap").
/// Threads: any.
std::byte* map_pages(std::size_t bytes, std::size_t page = page_size());

/// The same `bytes` and `page` as at map_pages().
void unmap_pages(std::byte* data, std::size_t bytes,
                 std::size_t page = page_size()) noexcept;

}  // namespace torch_ext
