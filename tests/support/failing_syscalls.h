#pragma once

#include <cstddef>
#include <functional>
#include <string>

namespace torch_ext::test {

/// Which system calls of a process fail, and how.
struct FailingSyscall {
  long number = 0;        ///< SYS_...
  int error = 0;          ///< errno.
  std::size_t index = 0;  ///< The first that fails, of all threads' calls.
  bool for_good = false;  ///< So do all that follow, until repair().
};

/// What came of a child.
struct SyscallTrial {
  std::string text = {};    ///< What `work` returned, or how the child ended.
  bool ended_well = false;  ///< It was not killed, and did not hang.
  std::size_t calls = 0;    ///< Calls with that number.
  std::size_t failed = 0;
  std::string unavailable = {};  ///< Why the system does not let us; or empty.
};

/// Runs `work` in a forked child, some of whose system calls fail. The kernel
/// asks this process about each call (seccomp's user notification). So it does
/// not matter which library makes them, or on which thread. `work` gets a
/// function that ends the failures, and returns a short text. A child that
/// takes more than a minute is killed.
SyscallTrial try_syscall(
    const FailingSyscall& failing,
    const std::function<std::string(const std::function<void()>& repair)>&
        work);

}  // namespace torch_ext::test
