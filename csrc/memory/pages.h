#pragma once

#include <cstddef>

namespace torch_ext {

/// Zeroed pages of this process alone, exactly `bytes` (a positive multiple of
/// 4096), to be given back with munmap(). 2 MiB and more begin at a multiple
/// of 2 MiB and ask for huge pages: a drive moves what lies together in memory
/// in fewer requests. Errors: IoError ("mmap"). Threads: any.
std::byte* map_pages(std::size_t bytes);

}  // namespace torch_ext
