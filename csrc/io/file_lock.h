#pragma once

#include "torch_ext/io/file.h"

namespace torch_ext {

/// Makes this process the only owner of a file among those that ask so, until
/// the lock's end or the process's (flock). The file needs no name. A forked
/// child does not hold it. Ownership: move-only. Threads: one at a time.
class FileLock {
 public:
  FileLock() = default;
  /// Errors: IoError: EAGAIN if another process, or another lock of this one,
  /// has the file.
  explicit FileLock(const File& file);
  FileLock(FileLock&& other) noexcept;
  FileLock& operator=(FileLock&& other) noexcept;
  ~FileLock();

 private:
  int fd_ = -1;
};

}  // namespace torch_ext
