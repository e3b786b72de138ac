#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <vector>

#include "torch_ext/io/file.h"

namespace torch_ext {

/// A file without a name that is written once, and then used as memory.
/// Threads: one.
class SnapshotFile {
 public:
  /// Makes the file, and makes sure of `bytes` bytes on the disk as far as the
  /// file system can say. Errors: IoError (ENOSPC, ...).
  SnapshotFile(const std::filesystem::path& directory, std::uint64_t bytes);

  /// Writes through the page cache. No byte may be written twice. Errors:
  /// IoError.
  void write(std::uint64_t offset, std::span<const std::byte> bytes);

  /// Syncs the file, reads back from the drive what write() was given, and maps
  /// the file as private memory. So bytes that were lost on the way are this
  /// call's error. Changes to the memory stay in this process, and are not
  /// written back. The file is gone with the last copy of the pointer. Returns
  /// null if the file has no bytes. If the drive fails later, whoever reads the
  /// memory gets SIGBUS, as with every mapped file.
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
