#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>

namespace torch_ext {

/// Makes a path absolute. Errors: std::invalid_argument for a path that is
/// empty or contains NUL; IoError ("getcwd").
std::string absolute_path(const std::filesystem::path& path);

/// Makes the names in a directory durable. Errors: IoError.
void sync_directory(const std::filesystem::path& directory);

/// A regular file, open for direct I/O where that is possible, and the
/// alignment that this demands. A second descriptor, for buffered I/O, is
/// opened when it is first needed. Ownership: move-only; the destructor closes
/// both. Threads: const members from any.
class File {
 public:
  /// Tells files apart, whatever their names: st_dev and st_ino.
  struct Identity {
    std::uint64_t device = 0;
    std::uint64_t inode = 0;
    bool operator==(const Identity&) const = default;
  };

  enum class Mode {
    kRead,       ///< Must exist.
    kWrite,      ///< Created 0600 if missing, never truncated.
    kReadWrite,  ///< As kWrite.
    kExisting,   ///< To read and write. Must exist.
  };

  /// Opens a file by name, with O_CLOEXEC. A link, FIFO, device or directory is
  /// refused. Where the file system refuses O_DIRECT, the file is buffered: see
  /// buffered_reason(). Errors: IoError; std::invalid_argument for a path that
  /// is empty or contains NUL.
  static File open(const std::filesystem::path& path, Mode mode);

  /// Opens the file behind a descriptor again, with the same access and
  /// durability (O_SYNC, O_DSYNC). The descriptor stays the caller's. Offsets
  /// are honoured even if it has O_APPEND. Closing the File drops the process's
  /// POSIX record locks on the file, as closing any descriptor of a file does.
  /// Errors: IoError (EBADF; EINVAL if it is no regular file).
  static File open(int fd);

  /// Whether there is something of this name. Links are not followed. Errors:
  /// IoError if that cannot be told; std::invalid_argument as open().
  static bool exists(const std::filesystem::path& path);
  /// The file that has this name now, if there is one, and its size in bytes.
  /// Nothing too if that cannot be told. Links are not followed. Errors:
  /// std::invalid_argument as open().
  static std::optional<Identity> identify(const std::filesystem::path& path,
                                          std::uint64_t* size = nullptr);
  /// The file behind a descriptor; none if the descriptor is not open.
  static std::optional<Identity> identify(int fd) noexcept;

  /// Makes a file without a name in `directory`. It is gone when it is closed
  /// or when the process ends, unless give_name() is called. It is made with
  /// O_TMPFILE, or else with O_EXCL and a random name that is unlinked at once.
  /// Errors: as open().
  static File scratch(const std::filesystem::path& directory);

  /// Gives a scratch file a name in its directory, and makes file and name
  /// durable. path() is the whole name from then on. It may be called again
  /// with the same name, after an error. Threads: one at a time. Errors:
  /// IoError (EEXIST; EOPNOTSUPP where the file system has no O_TMPFILE). The
  /// file has no name then, or one that may not be durable.
  void give_name(const std::string& name);

  File(File&& other) noexcept;
  File& operator=(File&& other) noexcept;
  ~File();

  /// The absolute path; for a scratch file "DIR/[scratch]".
  const std::string& path() const noexcept {
    const std::string* const name = name_.load();
    return name != nullptr ? *name : path_;
  }
  const Identity& identity() const noexcept { return identity_; }
  /// The descriptor with O_DIRECT; the buffered one where direct() is false.
  int fd() const noexcept {
    return direct_fd_ >= 0 ? direct_fd_ : buffered_fd_.load();
  }
  /// The buffered descriptor. Errors: IoError if it cannot be opened now.
  int buffered_fd() const;
  /// How many descriptors are open: 1 or 2.
  int descriptors() const noexcept;
  bool direct() const noexcept { return direct_fd_ >= 0; }
  /// Why direct() is false, in one sentence; empty if it is true.
  const std::string& buffered_reason() const noexcept { return reason_; }

  /// How many names the file has, and its size.
  struct Presence {
    std::uint64_t links = 0;  ///< 0: it has no name any more.
    std::uint64_t size = 0;   ///< Bytes.
  };
  /// Errors: IoError.
  Presence presence() const;

  /// Whether the file system keeps files in memory, as tmpfs and ramfs do.
  bool in_memory() const noexcept;

  /// Bytes to which a direct request's memory address must be aligned.
  std::size_t memory_alignment() const noexcept { return memory_alignment_; }
  /// Bytes to which a direct request's offset and length must be aligned.
  std::size_t offset_alignment() const noexcept { return offset_alignment_; }
  /// Bytes: the most of a page and the two alignments. Direct and buffered I/O
  /// may meet in one file only at its multiples. Scratch extents are padded to
  /// it.
  std::size_t granule() const noexcept;

  /// Bytes in the file, asked of the kernel now. Errors: IoError.
  std::uint64_t size() const;
  /// False once the file system has said that it has no fallocate (ext2, NFS
  /// before 4.2, some FUSE systems). From then on, space is made sure of by
  /// writing zeros. A scratch file asks when it is made, other files when they
  /// first grow.
  bool reserves() const noexcept { return reserves_; }
  /// What a log should say about a file for which reserves() is false.
  std::string unreserved_note() const;
  /// Errors: IoError (ENOSPC) where the file system clearly has no room for
  /// `bytes` more bytes.
  void check_room(std::uint64_t bytes) const;
  /// Gives a range its blocks and makes the file reach to the range's end, so
  /// that ENOSPC comes before any byte is written. Bytes that were written
  /// stay. Without fallocate, zeros are written and synced from the old end on;
  /// holes before it stay. Errors: IoError; the size is then set back to what
  /// it was. So nobody else may grow the file meanwhile.
  void reserve(std::uint64_t offset, std::uint64_t length) const;
  /// Cuts the file to `size` bytes. Errors: IoError.
  void shrink(std::uint64_t size) const;
  /// Whether writing to a range may take space on the disk. It may if the range
  /// reaches beyond the end, or if the file has holes. Errors: IoError.
  bool needs_space(std::uint64_t offset, std::uint64_t length) const;
  /// Gives a range the blocks that it lacks, and makes the file reach to the
  /// range's end, so that ENOSPC comes before any byte is written. It never
  /// shrinks the file, whoever else changes its size meanwhile. Without
  /// fallocate, zeros are written and synced beyond the end, and to holes that
  /// the file system knows of (FIEMAP). Nobody else may write to the range
  /// meanwhile.
  /// Errors: IoError, with size, bytes and blocks as they were.
  void grow(std::uint64_t offset, std::uint64_t length) const;
  /// Gives a range the bytes of another file's range by sharing its blocks
  /// (FICLONERANGE). Whoever writes there first gets blocks of its own. Returns
  /// false, with nothing changed, where that cannot be: on most file systems,
  /// from one to another, or for offsets that are no multiples of a block.
  /// Errors: IoError.
  bool share(const File& from, std::uint64_t from_offset, std::uint64_t offset,
             std::uint64_t length) const;
  /// Writes all of `bytes` at `offset`, on this thread and through the page
  /// cache. Errors: IoError; a prefix may then be written.
  void write(std::uint64_t offset, std::span<const std::byte> bytes) const;
  /// Reads from `offset` on, on this thread. If direct(), it reads from the
  /// drive and not from the page cache; offset, length and address must then be
  /// multiples of granule(). Returns the number of bytes read: fewer than asked
  /// only at the end of the file. Errors: IoError.
  std::size_t read(std::uint64_t offset, std::span<std::byte> bytes) const;
  /// Asks the page cache to forget the file's pages that are synced.
  void drop_cache() const;
  /// Waits until the file's pages in the page cache are on the drive.
  /// Errors: IoError, also for earlier writes that failed on their way there.
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
  /// Given later, while others may read it.
  std::atomic<const std::string*> name_ = nullptr;
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
