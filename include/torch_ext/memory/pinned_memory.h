#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "torch_ext/device/cuda_runtime.h"

namespace torch_ext {

/// Host memory that is handed to users. It has whole pages of its own, exactly
/// as many as `bytes` need. They are zeroed, and present in memory (Linux 5.14
/// and later). With 2 MiB or more they are huge pages, where there are some.
/// Forked children inherit them. With `cuda` the memory is page-locked for all
/// GPUs, if the run-time can do that; `why_not` (may be null) says why it could
/// not. The last reference frees the memory.
/// Errors: IoError ("mmap"). Threads: any.
std::shared_ptr<std::byte> allocate_pinned(std::size_t bytes,
                                           std::shared_ptr<CudaRuntime> cuda,
                                           std::string* why_not = nullptr);

/// Whether all the bytes lie in one living allocation of allocate_pinned() that
/// disown_pinned() has not been called for. Threads: any.
bool is_pinned(const void* data, std::size_t bytes);

/// Makes is_pinned() forget the allocation whose first byte is `data`. Its last
/// reference frees it all the same. Returns whether there was one. Threads:
/// any.
bool disown_pinned(const void* data);

}  // namespace torch_ext
