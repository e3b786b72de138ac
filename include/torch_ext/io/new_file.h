#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

#include "torch_ext/io/file.h"

namespace torch_ext {

/// A file that takes its name when it is complete. Until then, whatever has the
/// name stays as it is. Once publish() has returned, the new file survives a
/// power cut. After a power cut before that, the name has the old file or the
/// new one.
///
/// The file has no name at first (O_TMPFILE), so a process that is killed
/// leaves nothing behind. Two exceptions leave a file ".NAME.HEX.torch_ext-new"
/// in the directory: a file system without O_TMPFILE, and a kill in the moment
/// between linkat() and rename(). The next NewFile of that name removes it, if
/// no living process has it.
/// Ownership: not movable; the destructor drops the file unless it was
/// published. Threads: one at a time.
class NewFile {
 public:
  /// Makes the file and reserves `bytes` bytes for it. A file that has the name
  /// must be a regular one that this process may write, and no link. The new
  /// one gets its permissions, or else what the umask leaves of 0666.
  /// Errors: IoError with `path` (ENOSPC, EACCES, EISDIR, ...);
  /// std::invalid_argument for a path that is empty or contains NUL.
  NewFile(const std::filesystem::path& path, std::uint64_t bytes);
  ~NewFile();
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  /// The name that the file will have, absolute.
  const std::string& path() const noexcept { return path_; }
  /// To write to. Its own path() is of no use to a reader.
  const File& file() const noexcept;

  /// Makes the bytes durable, gives the file its name and makes that durable.
  /// Called once. Errors: IoError with `path`. The old file is then in place,
  /// unless the error's operation is "fsync" of the directory. Then the new one
  /// is, but may not survive a power cut.
  void publish();

 private:
  class Impl;
  std::string path_;
  std::unique_ptr<Impl> impl_;
};

}  // namespace torch_ext
