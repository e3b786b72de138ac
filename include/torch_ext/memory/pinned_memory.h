#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "torch_ext/device/cuda_runtime.h"

namespace torch_ext {

/// Host memory that is handed to users: whole pages of its own, exactly as
/// many as `bytes` need, zeroed, present in memory (Linux 5.14 and later),
/// in huge pages where there are some and `bytes` is 2 MiB or more, inherited
/// by forked children. With `cuda` it
/// is page-locked for all GPUs, where the run-time can; `why_not` (may be
/// null) says why it could not. Freed with the last reference.
/// Errors: IoError ("mmap"). Threads: any.
std::shared_ptr<std::byte> allocate_pinned(std::size_t bytes,
                                           std::shared_ptr<CudaRuntime> cuda,
                                           std::string* why_not = nullptr);

/// Whether all the bytes lie in one living allocation of allocate_pinned()
/// that disown_pinned() has not been called for. Threads: any.
bool is_pinned(const void* data, std::size_t bytes);

/// Takes an allocation out of what is_pinned() knows, if `data` is the first
/// byte of one; it is freed with its last reference all the same. Returns
/// whether there was one. Threads: any.
bool disown_pinned(const void* data);

}  // namespace torch_ext
