#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>

#include "torch_ext/io/file.h"

namespace torch_ext {

/// A file without a name that is written once and then used as memory.
/// Threads: one.
class SnapshotFile {
 public:
  /// Reserves `bytes` on the disk. Errors: IoError (ENOSPC, ...).
  SnapshotFile(const std::filesystem::path& directory, std::uint64_t bytes);

  /// Goes through the page cache. Errors: IoError.
  void write(std::uint64_t offset, std::span<const std::byte> bytes);

  /// The file as private memory: what is changed there stays in this process
  /// and is not written back. The file is gone with the last copy of the
  /// pointer. Null if it has no bytes. Errors: IoError ("mmap").
  std::shared_ptr<std::byte> map() const;

 private:
  File file_;
  std::uint64_t bytes_;
};

}  // namespace torch_ext
