#pragma once

#include <cstddef>

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

}  // namespace torch_ext
