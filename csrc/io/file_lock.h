#pragma once

#include <string>

#include "torch_ext/io/file.h"

namespace torch_ext {

/// Who holds the lock of a file, as far as the kernel tells: "process 12
/// (python), on HOST since 2026-01-31 12:00:00 UTC". "another process" for one
/// that this process cannot see, as one in another container. Empty if nobody
/// on this machine holds it. It takes no lock.
std::string lock_owner(const File& file);

/// Makes this process the only owner of a file among those that ask so, until
/// the lock's end or the process's (flock). The file needs no name. A forked
/// child does not hold it. Ownership: move-only. Threads: one at a time.
class FileLock {
 public:
  FileLock() = default;
  /// Errors: IoError: EAGAIN, with the owner, if another process, or another
  /// lock of this one, has the file.
  explicit FileLock(const File& file);
  FileLock(FileLock&& other) noexcept;
  FileLock& operator=(FileLock&& other) noexcept;
  ~FileLock();

 private:
  int fd_ = -1;
};

}  // namespace torch_ext
