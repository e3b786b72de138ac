#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

namespace torch_ext {

/// Two descriptors of one regular file, one for direct and one for buffered
/// I/O, and the alignment that direct I/O on this very file demands.
/// Ownership: move-only; closes both. Threads: const members from any.
class File {
 public:
  enum class Mode {
    kRead,       ///< Must exist.
    kWrite,      ///< Created 0600 if missing, never truncated.
    kReadWrite,  ///< As kWrite.
  };

  /// Opens a file by name. O_CLOEXEC; a link, FIFO, device or directory is
  /// refused. Where O_DIRECT is refused the file is buffered: see
  /// buffered_reason(). Errors: IoError; std::invalid_argument for a path that
  /// is empty or contains NUL.
  static File open(const std::filesystem::path& path, Mode mode);

  /// A new file without a name in `directory`, gone when closed or when the
  /// process ends: O_TMPFILE, else a random O_EXCL name unlinked at once.
  /// Errors: as open().
  static File scratch(const std::filesystem::path& directory);

  File(File&& other) noexcept;
  File& operator=(File&& other) noexcept;
  ~File();

  /// As given (made absolute), or "DIR/[scratch]".
  const std::string& path() const noexcept { return path_; }
  /// O_DIRECT descriptor; the buffered one where direct() is false.
  int fd() const noexcept {
    return direct_fd_ >= 0 ? direct_fd_ : buffered_fd_;
  }
  int buffered_fd() const noexcept { return buffered_fd_; }
  bool direct() const noexcept { return direct_fd_ >= 0; }
  /// Why direct() is false, in one sentence; empty if it is true.
  const std::string& buffered_reason() const noexcept { return reason_; }

  /// Bytes to which a direct request's memory address must be aligned.
  std::size_t memory_alignment() const noexcept { return memory_alignment_; }
  /// Bytes to which its offset and length must be aligned.
  std::size_t offset_alignment() const noexcept { return offset_alignment_; }
  /// max(4096, both): where direct and buffered I/O may meet in one file, and
  /// what scratch extents are padded to.
  std::size_t granule() const noexcept;

  /// Bytes, asked now. Errors: IoError.
  std::uint64_t size() const;
  /// Reserves the blocks of a range and grows the file to its end, so that
  /// ENOSPC comes before any byte is written; only the size is set where the
  /// file system has no fallocate. Bytes that were written stay.
  /// Errors: IoError, with the size as it was: so nobody else may grow the
  /// file meanwhile.
  void reserve(std::uint64_t offset, std::uint64_t length) const;
  /// Writes all of `bytes` at `offset`, in this thread and through the page
  /// cache. Errors: IoError, with a prefix written.
  void write(std::uint64_t offset, std::span<const std::byte> bytes) const;

 private:
  File(std::string path, int fd);

  void make_private() const;
  void add_direct(int access, const std::string& name);

  std::string path_;
  std::string reason_;
  int direct_fd_ = -1;
  int buffered_fd_ = -1;
  std::size_t memory_alignment_ = 1;
  std::size_t offset_alignment_ = 1;
};

}  // namespace torch_ext
