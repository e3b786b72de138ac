// The lock has a descriptor of its own. A forked child inherits it, and would
// go on holding the lock when the parent has ended, as a worker of a data
// loader may outlive its trainer. So a child closes the descriptors of all
// locks.
//
// The kernel tells who holds a lock, so nothing about the owner is written, and
// nothing is left that would be wrong after a crash. /proc/locks has the number
// of the process and that of the inode. The number of the device there is not
// always that of stat(): btrfs and overlayfs have two. So a process counts as
// the owner only if it has the very file open.

#include "file_lock.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdint>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <set>
#include <sstream>
#include <string>
#include <system_error>
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

/// Whether the process has this file open, as far as it can be seen.
bool has_open(const std::string& process, const File::Identity& file) {
  std::error_code error;
  const std::filesystem::path folder = "/proc/" + process + "/fd";
  for (std::filesystem::directory_iterator it(folder, error), end;
       !error && it != end; it.increment(error)) {
    struct stat status;
    if (::stat(it->path().c_str(), &status) == 0 &&
        File::Identity{status.st_dev, status.st_ino} == file) {
      return true;
    }
  }
  return false;
}

/// The rest of the first line of a file that begins with `key`.
std::string line_of(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(key)) return line.substr(key.size());
  }
  return "";
}

/// When the process began: " since ...", or nothing if that is not known.
std::string since(const std::string& process) {
  const std::string stat = line_of("/proc/" + process + "/stat", "");
  // The name stands in brackets, and may contain any character. The start is
  // the 20th word after it, in ticks since the machine's start.
  const std::size_t name = stat.rfind(')');
  if (name == std::string::npos) return "";
  std::istringstream words(stat.substr(name + 1));
  std::string word;
  for (int i = 0; i < 20; ++i) words >> word;
  std::istringstream began(line_of("/proc/stat", "btime "));
  std::int64_t seconds = 0;
  began >> seconds;
  std::int64_t ticks = 0;
  std::istringstream(word) >> ticks;
  const long per_second = sysconf(_SC_CLK_TCK);
  if (seconds == 0 || per_second <= 0) return "";
  const auto time = static_cast<std::time_t>(seconds + ticks / per_second);
  std::tm utc = {};
  char text[40];
  if (gmtime_r(&time, &utc) == nullptr ||
      strftime(text, sizeof(text), " since %Y-%m-%d %H:%M:%S UTC", &utc) == 0) {
    return "";
  }
  return text;
}

std::string describe(const std::string& process) {
  char host[HOST_NAME_MAX + 1] = {};
  const bool known = gethostname(host, HOST_NAME_MAX) == 0;
  return "process " + process + " (" +
         line_of("/proc/" + process + "/comm", "") + ")" +
         (process == std::to_string(getpid()) ? ", this one," : ",") + " on " +
         (known ? host : "this machine") + since(process);
}

}  // namespace

std::string lock_owner(const File& file) {
  std::ifstream locks("/proc/locks");
  const std::string inode = std::to_string(file.identity().inode);
  const std::string device =
      (std::ostringstream() << std::hex << std::setfill('0') << std::setw(2)
                            << major(file.identity().device) << ":"
                            << std::setw(2) << minor(file.identity().device))
          .str();
  bool is_held = false;
  for (std::string line; std::getline(locks, line);) {
    // "1: FLOCK  ADVISORY  WRITE 12 08:01:1234 0 EOF"; "->" comes before the
    // kind in the line of one that waits.
    std::istringstream words(line);
    std::string number, kind, advisory, access, process, place;
    words >> number >> kind >> advisory >> access >> process >> place;
    if (kind != "FLOCK" || !place.ends_with(":" + inode)) continue;
    if (has_open(process, file.identity())) return describe(process);
    is_held = is_held || place == device + ":" + inode;
  }
  return is_held ? "another process" : "";
}

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
    if (error != EWOULDBLOCK) {
      throw IoError({.op = "flock", .path = name, .error = error});
    }
    const std::string owner = lock_owner(file);
    throw IoError(
        {.op = "flock",
         .path = name,
         .error = EAGAIN,
         .detail = "another process uses this store" +
                   (owner.starts_with("process") ? ": " + owner : "")});
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
  if (all.held.erase(fd_) == 0) return;
  // A child that has just been forked may not have closed its copy yet.
  flock(fd_, LOCK_UN);
  close(fd_);
}

}  // namespace torch_ext
