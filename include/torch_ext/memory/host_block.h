#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "torch_ext/io/file.h"

namespace torch_ext {

/// Zeroed, private host memory that begins at a page's beginning. Its pages
/// are taken when they are first touched. Returns null for 0 bytes.
/// Errors: IoError ("mmap"). Threads: any.
std::shared_ptr<std::byte> allocate_block(std::uint64_t bytes);

/// Makes pages of a block present now, on this thread, so that no I/O has to
/// wait for them. `data` begins a page. Linux before 5.14 leaves it to whoever
/// touches them. Threads: any; never fails.
void populate(std::byte* data, std::uint64_t bytes) noexcept;

/// The whole file as private memory: changes stay in this process, and are not
/// written back. If the file is cut, or its drive fails, whoever reads the
/// memory gets SIGBUS. Returns null for an empty file.
/// Errors: IoError ("mmap"). Threads: any.
std::shared_ptr<std::byte> map_block(const File& file);

/// A part of a block, which lives as long as its parts. When a part ends, the
/// pages that it alone covers go back at once. So parts may not overlap.
std::shared_ptr<std::byte> part_of(const std::shared_ptr<std::byte>& block,
                                   std::uint64_t offset, std::uint64_t bytes);

}  // namespace torch_ext
