#pragma once

#include <signal.h>

#include <cerrno>
#include <ctime>

namespace torch_ext {

/// Blocks SIGXFSZ for the calling thread while it lives, then drops the signal.
/// SIGXFSZ would end a process whose call exceeds RLIMIT_FSIZE; the call's
/// EFBIG says it all. A signal that was pending before stays pending.
class FileSizeSignalBlocked {
 public:
  FileSizeSignalBlocked() {
    sigset_t pending;
    sigpending(&pending);
    was_pending_ = sigismember(&pending, SIGXFSZ) == 1;
    sigemptyset(&signal_);
    sigaddset(&signal_, SIGXFSZ);
    pthread_sigmask(SIG_BLOCK, &signal_, &before_);
  }
  FileSizeSignalBlocked(const FileSizeSignalBlocked&) = delete;
  FileSizeSignalBlocked& operator=(const FileSizeSignalBlocked&) = delete;
  ~FileSizeSignalBlocked() {
    const timespec no_time = {};
    while (!was_pending_ && sigtimedwait(&signal_, nullptr, &no_time) < 0 &&
           errno == EINTR) {
    }
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }

 private:
  sigset_t signal_;
  sigset_t before_;
  bool was_pending_;
};

}  // namespace torch_ext
