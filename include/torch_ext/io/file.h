#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>

namespace torch_ext {

/// The path from the root. Errors: std::invalid_argument for a path that is
/// empty or contains NUL; IoError ("getcwd").
std::string absolute_path(const std::filesystem::path& path);

/// A regular file, open for direct I/O where it can be, and the alignment that
/// this demands; a second descriptor, for buffered I/O, is opened when it is
/// first needed. Ownership: move-only; closes both. Threads: const members
/// from any.
class File {
 public:
  /// Which file it is, whatever its name: st_dev and st_ino.
  struct Identity {
    std::uint64_t device = 0;
    std::uint64_t inode = 0;
    bool operator==(const Identity&) const = default;
  };

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

  /// The file behind a descriptor, which stays the caller's: opened again with
  /// the same access and durability (O_SYNC, O_DSYNC); offsets are honoured
  /// though it be O_APPEND. Closing it drops the process's POSIX record locks
  /// on the file, as the closing of any descriptor of it does.
  /// Errors: IoError (EBADF; EINVAL if it is no regular file).
  static File open(int fd);

  /// The file that now has this name, if one has, and its size in bytes; links
  /// are not followed. Errors: std::invalid_argument as open().
  static std::optional<Identity> identify(const std::filesystem::path& path,
                                          std::uint64_t* size = nullptr);
  /// That behind a descriptor, if it is one.
  static std::optional<Identity> identify(int fd) noexcept;

  /// A new file without a name in `directory`, gone when closed or when the
  /// process ends: O_TMPFILE, else a random O_EXCL name unlinked at once.
  /// Errors: as open().
  static File scratch(const std::filesystem::path& directory);

  File(File&& other) noexcept;
  File& operator=(File&& other) noexcept;
  ~File();

  /// As given (made absolute), or "DIR/[scratch]".
  const std::string& path() const noexcept { return path_; }
  const Identity& identity() const noexcept { return identity_; }
  /// O_DIRECT descriptor; the buffered one where direct() is false.
  int fd() const noexcept {
    return direct_fd_ >= 0 ? direct_fd_ : buffered_fd_.load();
  }
  /// Errors: IoError if it cannot be opened now.
  int buffered_fd() const;
  /// How many are open: 1 or 2.
  int descriptors() const noexcept;
  bool direct() const noexcept { return direct_fd_ >= 0; }
  /// Why direct() is false, in one sentence; empty if it is true.
  const std::string& buffered_reason() const noexcept { return reason_; }

  /// What has become of the file under its names.
  struct Presence {
    std::uint64_t links = 0;  ///< 0: it has no name any more.
    std::uint64_t size = 0;   ///< Bytes.
  };
  /// Errors: IoError.
  Presence presence() const;

  /// Whether the file system is one that keeps files in memory: tmpfs, ramfs.
  bool in_memory() const noexcept;

  /// Bytes to which a direct request's memory address must be aligned.
  std::size_t memory_alignment() const noexcept { return memory_alignment_; }
  /// Bytes to which its offset and length must be aligned.
  std::size_t offset_alignment() const noexcept { return offset_alignment_; }
  /// max(4096, both): where direct and buffered I/O may meet in one file, and
  /// what scratch extents are padded to.
  std::size_t granule() const noexcept;

  /// Bytes, asked now. Errors: IoError.
  std::uint64_t size() const;
  /// False once the file system has said that it has no fallocate (ext2, NFS
  /// before 4.2, some of FUSE): then space is made sure of by writing zeros.
  /// scratch() asks; other files when they first grow.
  bool reserves() const noexcept { return reserves_; }
  /// What a log should hold of a file of which reserves() is false.
  std::string unreserved_note() const;
  /// Errors: IoError (ENOSPC) where the file system clearly has no room for so
  /// many bytes more.
  void check_room(std::uint64_t bytes) const;
  /// Gives a range its blocks and grows the file to its end, so that ENOSPC
  /// comes before any byte is written. Bytes that were written stay. Without
  /// fallocate zeros are written, and synced, from the old end on; holes before
  /// it stay. Errors: IoError, with the size as it was: so nobody else may grow
  /// the file meanwhile.
  void reserve(std::uint64_t offset, std::uint64_t length) const;
  /// Cuts the file to `size` bytes. Errors: IoError.
  void shrink(std::uint64_t size) const;
  /// Whether writing to a range may take space on the disk: it reaches beyond
  /// the end, or the file has holes. Errors: IoError.
  bool needs_space(std::uint64_t offset, std::uint64_t length) const;
  /// Gives a range the blocks that it lacks, and makes the file reach to its
  /// end, so that ENOSPC comes before any byte is written. Never shrinks it,
  /// whoever else changes its size meanwhile. Without fallocate zeros are
  /// written, and synced, beyond the end and to holes that the file system
  /// knows of (FIEMAP). Nobody else may write to the range meanwhile.
  /// Errors: IoError, with size, bytes and blocks as they were.
  void grow(std::uint64_t offset, std::uint64_t length) const;
  /// Writes all of `bytes` at `offset`, in this thread and through the page
  /// cache. Errors: IoError, with a prefix written.
  void write(std::uint64_t offset, std::span<const std::byte> bytes) const;
  /// Reads from `offset` on, in this thread and, if direct(), from the drive
  /// and not the page cache: then offset, length and address are multiples of
  /// granule(). Returns how many bytes there are before the end of the file.
  /// Errors: IoError.
  std::size_t read(std::uint64_t offset, std::span<std::byte> bytes) const;
  /// Asks the page cache to forget what it has of the file and has synced.
  void drop_cache() const;
  /// Waits until what the page cache has of the file is on the drive.
  /// Errors: IoError, also of earlier writes that failed on their way there.
  void sync() const;

 private:
  File(std::string path, int fd);

  void take_regular(int access);
  void make_private() const;
  void add_direct();
  int allocate(int mode, std::uint64_t offset, std::uint64_t length) const;
  void write_zeros(std::uint64_t offset, std::uint64_t length) const;
  void give_back(std::uint64_t old_size, std::uint64_t begin,
                 std::uint64_t end) const;

  std::string path_;
  std::string reason_;
  Identity identity_;
  int access_ = 0;  ///< O_RDONLY, O_WRONLY or O_RDWR; O_SYNC or O_DSYNC.
  int direct_fd_ = -1;
  mutable std::atomic<int> buffered_fd_ = -1;
  mutable std::atomic<bool> reserves_ = true;
  std::size_t memory_alignment_ = 1;
  std::size_t offset_alignment_ = 1;
};

}  // namespace torch_ext
