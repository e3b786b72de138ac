#pragma once

#include <sys/types.h>

namespace torch_ext {

/// getpid(), without its system call. Threads: any.
pid_t process_id() noexcept;

/// Whether this process was forked from one that had loaded this library. A
/// forked child lacks the threads that others, such as PyTorch, had started
/// before. Whoever wakes or awaits one of those may wait for ever. Threads:
/// any.
bool is_forked_child() noexcept;

}  // namespace torch_ext
