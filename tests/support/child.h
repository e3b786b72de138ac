#pragma once

#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <fstream>
#include <functional>
#include <string>
#include <thread>

namespace torch_ext::test {

/// Runs `work` in a forked child and returns what it returns: by convention a
/// text, which is empty if all was well. An exception, a signal, or a child
/// that does not end within a minute gives a text too. What `work` does to the
/// process stays in the child, which ends without running any destructors.
inline std::string in_child(const std::function<std::string()>& work) {
  int ends[2];
  if (pipe(ends) != 0) return "pipe failed";
  const pid_t child = fork();
  if (child < 0) return "fork failed";
  if (child == 0) {
    close(ends[0]);
    std::string text;
    try {
      text = work();
    } catch (const std::exception& error) {
      text = std::string("exception: ") + error.what();
    }
    // Not _exit: sanitizers would do what they do at the end of a process.
    const bool told = write(ends[1], text.data(), text.size()) >= 0;
    syscall(SYS_exit_group, told ? 0 : 3);
  }
  close(ends[1]);
  int status = 0;
  const auto deadline =
      std::chrono::steady_clock::now() + std::chrono::seconds(100);
  while (waitpid(child, &status, WNOHANG) == 0) {
    if (std::chrono::steady_clock::now() > deadline) {
      kill(child, SIGKILL);
      waitpid(child, &status, 0);
      close(ends[0]);
      return "the child did not end";
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  std::array<char, 4096> text;
  const ssize_t length = read(ends[0], text.data(), text.size());
  close(ends[0]);
  if (WIFSIGNALED(status)) {
    return std::string("killed: ") + strsignal(WTERMSIG(status));
  }
  std::string result(text.data(),
                     length > 0 ? static_cast<std::size_t>(length) : 0);
  if (result.empty() && WEXITSTATUS(status) != 0) {
    return "exit status " + std::to_string(WEXITSTATUS(status));
  }
  return result;
}

/// What `work` returns where the system does not allow what it needs.
inline std::string skip(const std::string& reason) { return "skip: " + reason; }

/// Holds in_child(work) to be well, or skips the test.
inline void expect_well_in_child(const std::function<std::string()>& work) {
  const std::string result = in_child(work);
  if (result.starts_with("skip: ")) GTEST_SKIP() << result.substr(6);
  EXPECT_EQ(result, "");
}

/// From now on this process's calls of system call `number` fail with `error`
/// if argument `argument` has one of the bits in `mask` set (0: always). For
/// children: it cannot be undone. False if the system does not let us.
inline bool refuse_syscall(long number, int error, unsigned argument = 0,
                           std::uint32_t mask = 0) {
  const auto argument_at =
      static_cast<std::uint32_t>(offsetof(seccomp_data, args) + 8 * argument);
  std::array<sock_filter, 7> program = {{
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<std::uint32_t>(number), 0,
               4),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, argument_at),
      BPF_JUMP(BPF_JMP | BPF_JA, 0, 0, 0),
      BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, mask, 0, 1),
      BPF_STMT(BPF_RET | BPF_K,
               SECCOMP_RET_ERRNO | static_cast<std::uint32_t>(error)),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  }};
  if (mask == 0) program[3].k = 1;  // Jumps over the test.
  const sock_fprog filter = {program.size(), program.data()};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

/// Gives this process mounts of its own, that others do not see, and the right
/// to mount. For children. False if the system does not let us.
inline bool own_mounts() {
  if (unshare(CLONE_NEWNS) != 0) {
    const auto user = std::to_string(getuid());
    const auto group = std::to_string(getgid());
    if (unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) return false;
    std::ofstream("/proc/self/setgroups") << "deny";
    std::ofstream("/proc/self/uid_map") << user + " " + user + " 1";
    std::ofstream("/proc/self/gid_map") << group + " " + group + " 1";
  }
  return mount("none", "/", "", MS_REC | MS_PRIVATE, "") == 0;
}

}  // namespace torch_ext::test
