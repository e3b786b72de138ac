// The lock has a descriptor of its own. A forked child inherits it, and would
// go on holding the lock when the parent has ended, as a worker of a data
// loader may outlive its trainer. So a child closes the descriptors of all
// locks.

#include "file_lock.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <set>
#include <string>
#include <utility>

#include "base/mutex.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

struct Locks {
  Mutex mutex;
  std::set<int> held GUARDED_BY(mutex);
};

// Never destroyed: a lock may be held when everything static ends.
Locks& locks();

void before_fork() UNCHECKED_THREADS { locks().mutex.lock(); }
void in_parent() UNCHECKED_THREADS { locks().mutex.unlock(); }
void in_child() UNCHECKED_THREADS {
  for (const int fd : locks().held) close(fd);
  locks().held.clear();
  locks().mutex.unlock();
}

Locks& locks() {
  static Locks* const only = [] {
    auto* const made = new Locks;
    pthread_atfork(before_fork, in_parent, in_child);
    return made;
  }();
  return *only;
}

}  // namespace

FileLock::FileLock(const File& file) {
  const std::string& name = file.path();
  const std::string link = "/proc/self/fd/" + std::to_string(file.fd());
  Locks& all = locks();
  const MutexLock lock(all.mutex);
  const int fd = ::open(link.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    throw IoError({.op = "open", .path = name, .error = errno});
  }
  if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
    const int error = errno;
    close(fd);
    const bool taken = error == EWOULDBLOCK;
    throw IoError({.op = "flock",
                   .path = name,
                   .error = taken ? EAGAIN : error,
                   .detail = taken ? "another process uses this store" : ""});
  }
  all.held.insert(fd);
  fd_ = fd;
}

FileLock::FileLock(FileLock&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)) {}

FileLock& FileLock::operator=(FileLock&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

FileLock::~FileLock() {
  if (fd_ < 0) return;
  Locks& all = locks();
  const MutexLock lock(all.mutex);
  // In a forked child it is closed already, and the number may be another's.
  if (all.held.erase(fd_) > 0) close(fd_);
}

}  // namespace torch_ext
