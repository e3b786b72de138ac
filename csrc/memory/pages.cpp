#include "pages.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <limits>

#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::byte* map(std::size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    throw IoError({.op = "mmap", .length = bytes, .error = errno});
  }
  return static_cast<std::byte*>(memory);
}

}  // namespace

std::byte* map_pages(std::size_t bytes, std::size_t page) {
  if (bytes > std::numeric_limits<std::size_t>::max() - kHugePage - page) {
    throw IoError({.op = "mmap", .length = bytes, .error = ENOMEM});
  }
  // munmap() refuses an address that is not the beginning of a page.
  bytes = align_up(bytes, page);
  if (bytes < kHugePage) return map(bytes);
  std::byte* const mapped = map(bytes + kHugePage);
  auto* const data = reinterpret_cast<std::byte*>(
      align_up(reinterpret_cast<std::uintptr_t>(mapped), kHugePage));
  const auto before = static_cast<std::size_t>(data - mapped);
  if (before > 0) munmap(mapped, before);
  munmap(data + bytes, kHugePage - before);
  // This only tunes. On a kernel without it the results are the same.
  madvise(data, bytes, MADV_HUGEPAGE);
  return data;
}

void unmap_pages(std::byte* data, std::size_t bytes,
                 std::size_t page) noexcept {
  munmap(data, align_up(bytes, page));
}

}  // namespace torch_ext
