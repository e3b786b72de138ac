#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <vector>

#include "torch_ext/io/file.h"

namespace torch_ext {

/// A file without a name that is written once and then used as memory.
/// Threads: one.
class SnapshotFile {
 public:
  /// Makes sure of `bytes` on the disk, as far as the file system can say.
  /// Errors: IoError (ENOSPC, ...).
  SnapshotFile(const std::filesystem::path& directory, std::uint64_t bytes);

  /// Goes through the page cache; no byte is written twice. Errors: IoError.
  void write(std::uint64_t offset, std::span<const std::byte> bytes);

  /// The file as private memory, after all of it has been synced and what
  /// write() was given has been read back from the drive: what was lost on the
  /// way is this call's error. What is changed in the memory stays in this
  /// process and is not written back. The file is gone with the last copy of
  /// the pointer. Null if it has no bytes. A drive that fails later is SIGBUS
  /// to whoever reads the memory, as with every mapped file.
  /// Errors: IoError (EIO if the bytes differ; those of fdatasync, pread and
  /// mmap).
  std::shared_ptr<std::byte> map() const;

 private:
  struct Written {
    std::uint64_t offset = 0;
    std::uint64_t length = 0;
    std::uint64_t checksum = 0;
  };

  void check_written() const;

  File file_;
  std::uint64_t bytes_;
  std::vector<Written> written_;
};

}  // namespace torch_ext
