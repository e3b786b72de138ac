#pragma once

#include <sys/types.h>

namespace torch_ext {

/// getpid(), without its system call. Threads: any.
pid_t process_id() noexcept;

}  // namespace torch_ext
