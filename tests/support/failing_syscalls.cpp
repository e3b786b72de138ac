#include "support/failing_syscalls.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
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
#include <mutex>

namespace torch_ext::test {
namespace {

constexpr char kRepair = 'R';  ///< From the child: to be answered.
constexpr char kResult = '=';  ///< From the child: the text follows.

/// A descriptor that tells of this process's calls from now on; -1: refused.
int watch_calls(long number) {
  std::array<sock_filter, 4> program = {{
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<std::uint32_t>(number), 0,
               1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  }};
  const sock_fprog filter = {program.size(), program.data()};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return -1;
  return static_cast<int>(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER,
                                  SECCOMP_FILTER_FLAG_NEW_LISTENER, &filter));
}

union ControlMessage {
  cmsghdr header;
  std::array<char, CMSG_SPACE(sizeof(int))> space;
};

bool send_descriptor(int socket, int fd) {
  char byte = fd >= 0 ? 'F' : 'N';
  iovec data = {&byte, 1};
  ControlMessage control = {};
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (fd >= 0) {
    message.msg_control = &control;
    message.msg_controllen = sizeof(control);
    control.header.cmsg_level = SOL_SOCKET;
    control.header.cmsg_type = SCM_RIGHTS;
    control.header.cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(&control.header), &fd, sizeof(fd));
  }
  return sendmsg(socket, &message, 0) == 1;
}

int receive_descriptor(int socket) {
  char byte = 'N';
  iovec data = {&byte, 1};
  ControlMessage control = {};
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = &control;
  message.msg_controllen = sizeof(control);
  if (recvmsg(socket, &message, MSG_CMSG_CLOEXEC) != 1 || byte != 'F') {
    return -1;
  }
  int fd = -1;
  std::memcpy(&fd, CMSG_DATA(&control.header), sizeof(fd));
  return fd;
}

[[noreturn]] void run_child(
    int socket, long number,
    const std::function<std::string(const std::function<void()>&)>& work) {
  const int listener = watch_calls(number);
  std::string text(1, kResult);
  if (send_descriptor(socket, listener) && listener >= 0) {
    close(listener);
    try {
      text += work([socket] {
        char answer = kRepair;
        if (send(socket, &answer, 1, 0) == 1) recv(socket, &answer, 1, 0);
      });
    } catch (const std::exception& error) {
      text += std::string("exception: ") + error.what();
    }
    send(socket, text.data(), text.size(), 0);
  }
  // Not _exit: sanitizers would do what they do at the end of a process.
  syscall(SYS_exit_group, 0);
  __builtin_unreachable();
}

/// Decides about the one call that the listener tells of.
void answer_call(int listener, const FailingSyscall& failing, bool repaired,
                 SyscallTrial& trial) {
  seccomp_notif call = {};
  if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &call) != 0) return;
  const std::size_t index = trial.calls++;
  seccomp_notif_resp answer = {};
  answer.id = call.id;
  const bool fails = !repaired && (failing.for_good ? index >= failing.index
                                                    : index == failing.index);
  if (fails) {
    ++trial.failed;
    answer.error = -failing.error;
  } else {
    answer.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
  }
  ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &answer);
}

/// Until the child has told its result or is gone: false after a minute.
bool supervise(int listener, int socket, const FailingSyscall& failing,
               SyscallTrial& trial) {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + std::chrono::minutes(1);
  bool repaired = false;
  while (Clock::now() < deadline) {
    std::array<pollfd, 2> ready = {
        {{listener, POLLIN, 0}, {socket, POLLIN, 0}}};
    if (poll(ready.data(), ready.size(), 1000) <= 0) continue;
    if ((ready[0].revents & POLLIN) != 0) {
      answer_call(listener, failing, repaired, trial);
    }
    if (ready[1].revents == 0) continue;
    std::array<char, 4096> text;
    const ssize_t length = recv(socket, text.data(), text.size(), 0);
    if (length <= 0) return true;
    if (text[0] == kRepair) {
      repaired = true;
      send(socket, &kRepair, 1, 0);
    } else {
      trial.text.assign(text.data() + 1, static_cast<std::size_t>(length) - 1);
    }
  }
  return false;
}

}  // namespace

SyscallTrial try_syscall(
    const FailingSyscall& failing,
    const std::function<std::string(const std::function<void()>&)>& work) {
  SyscallTrial trial;
  int sockets[2];
  // No child is to inherit the other end of another's.
  static std::mutex one_at_a_time;
  std::unique_lock lock(one_at_a_time);
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets) != 0) {
    trial.unavailable = "no socket pair";
    return trial;
  }
  const pid_t child = fork();
  if (child < 0) {
    trial.unavailable = "no child";
    return trial;
  }
  if (child == 0) {
    close(sockets[0]);
    run_child(sockets[1], failing.number, work);
  }
  close(sockets[1]);
  lock.unlock();
  const int listener = receive_descriptor(sockets[0]);
  bool in_time = true;
  if (listener < 0) {
    trial.unavailable = "seccomp user notification is refused";
  } else {
    in_time = supervise(listener, sockets[0], failing, trial);
  }
  if (!in_time) kill(child, SIGKILL);
  if (listener >= 0) close(listener);
  close(sockets[0]);
  int status = 0;
  waitpid(child, &status, 0);
  trial.ended_well = in_time && WIFEXITED(status) && WEXITSTATUS(status) == 0;
  if (!in_time) {
    trial.text = "the child did not end";
  } else if (WIFSIGNALED(status)) {
    trial.text = std::string("killed: ") + strsignal(WTERMSIG(status));
  } else if (WEXITSTATUS(status) != 0) {
    trial.text = "exit status " + std::to_string(WEXITSTATUS(status));
  }
  return trial;
}

}  // namespace torch_ext::test
