#pragma once

#include <sys/types.h>

namespace torch_ext {

/// getpid(), without its system call. Threads: any.
pid_t process_id() noexcept;

/// Whether a process that had loaded this library was forked to become this
/// one. Threads that others started before, such as PyTorch's, are missing
/// here, and who wakes or awaits one of them may wait for ever. Threads: any.
bool is_forked_child() noexcept;

}  // namespace torch_ext
