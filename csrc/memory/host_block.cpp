#include "torch_ext/memory/host_block.h"

#include <sys/mman.h>

#include <cerrno>

#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

std::shared_ptr<std::byte> unmapped_at_end(void* memory, std::uint64_t bytes) {
  return {static_cast<std::byte*>(memory),
          [bytes](std::byte* mapped) { munmap(mapped, bytes); }};
}

}  // namespace

// It does not ask for huge pages. Taking them may last longer than reading: in
// a virtual machine, or where the page cache has filled the memory. It took 0.7
// to 3 s for a GiB, beside 0.45 s in small pages.
std::shared_ptr<std::byte> allocate_block(std::uint64_t bytes) {
  if (bytes == 0) return nullptr;
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    throw IoError({.op = "mmap", .length = bytes, .error = errno});
  }
  return unmapped_at_end(memory, bytes);
}

void populate([[maybe_unused]] std::byte* data,
              [[maybe_unused]] std::uint64_t bytes) noexcept {
#ifdef MADV_POPULATE_WRITE
  madvise(data, bytes, MADV_POPULATE_WRITE);
#endif
}

std::shared_ptr<std::byte> map_block(const File& file) {
  const std::uint64_t bytes = file.size();
  if (bytes == 0) return nullptr;
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_NORESERVE, file.buffered_fd(), 0);
  if (memory == MAP_FAILED) {
    throw IoError(
        {.op = "mmap", .path = file.path(), .length = bytes, .error = errno});
  }
  return unmapped_at_end(memory, bytes);
}

std::shared_ptr<std::byte> part_of(const std::shared_ptr<std::byte>& block,
                                   std::uint64_t offset, std::uint64_t bytes) {
  return {block.get() + offset, [block, bytes](std::byte* begin) {
            const auto first = reinterpret_cast<std::uintptr_t>(begin);
            const std::uintptr_t from = align_up(first, page_size());
            const std::uintptr_t to = align_down(first + bytes, page_size());
            if (from >= to) return;
            // This only saves memory; what the kernel refuses, such as locked
            // pages, ends with the block.
            madvise(begin + (from - first), to - from, MADV_DONTNEED);
          }};
}

}  // namespace torch_ext
