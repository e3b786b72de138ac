#include "torch_ext/memory/pinned_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <functional>
#include <iterator>
#include <map>
#include <utility>

#include "base/mutex.h"
#include "pages.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"
#include "torch_ext/base/process.h"

namespace torch_ext {
namespace {

/// The first byte of each allocation, and its size in bytes.
struct Registry {
  Mutex mutex;
  std::map<const std::byte*, std::size_t, std::less<>> sizes GUARDED_BY(mutex);
};

Registry& registry() {
  // This is never destroyed: tensors may die after everything static.
  static auto* const all = new Registry;
  return *all;
}

}  // namespace

std::shared_ptr<std::byte> allocate_pinned(std::size_t bytes,
                                           std::shared_ptr<CudaRuntime> cuda,
                                           std::string* why_not) {
  const std::size_t size =
      align_up(std::max<std::size_t>(bytes, 1), page_size());
  if (size < bytes) {
    throw IoError({.op = "mmap", .length = bytes, .error = ENOMEM});
  }
  std::byte* const data = map_pages(size);
  // From here on the deleter frees what there is, even if something throws.
  auto locked = std::make_shared<bool>(false);
  std::shared_ptr<std::byte> allocation(
      data, [size, cuda, locked, owner = process_id()](std::byte* freed) {
        disown_pinned(freed);
        // A forked child has the memory, but not the GPU.
        if (*locked && process_id() == owner) cuda->host_unregister(freed);
        unmap_pages(freed, size);
      });
#ifdef MADV_POPULATE_WRITE
  // This makes the pages present now, one after the other, also where nothing
  // locks them. Pages that several threads touch first lie scattered, which
  // makes I/O slower. Kernels before 5.14 leave it to whoever touches them.
  madvise(data, size, MADV_POPULATE_WRITE);
#endif
  if (cuda != nullptr) {
    try {
      cuda->host_register(data, size);
      *locked = true;
    } catch (const IoError& error) {
      if (why_not != nullptr) *why_not = error.what();
    }
  }
  const MutexLock lock(registry().mutex);
  registry().sizes[data] = size;
  return allocation;
}

bool is_pinned(const void* data, std::size_t bytes) {
  const auto* first = static_cast<const std::byte*>(data);
  const MutexLock lock(registry().mutex);
  auto after = registry().sizes.upper_bound(first);
  if (after == registry().sizes.begin()) return false;
  const auto& [begin, size] = *std::prev(after);
  const auto offset = static_cast<std::size_t>(first - begin);
  return offset < size && bytes <= size - offset;
}

bool disown_pinned(const void* data) {
  const MutexLock lock(registry().mutex);
  return registry().sizes.erase(static_cast<const std::byte*>(data)) > 0;
}

}  // namespace torch_ext
