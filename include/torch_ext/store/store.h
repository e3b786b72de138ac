#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "torch_ext/config/aio_config.h"
#include "torch_ext/io/file.h"
#include "torch_ext/io/io_engine.h"
#include "torch_ext/io/io_queue.h"
#include "torch_ext/io/ticket.h"
#include "torch_ext/store/directories.h"

namespace torch_ext {

class Extent;

/// What a store's files are called once they have names.
struct StoreName {
  std::string name = "state";
  std::uint32_t rank = 0;
  std::uint32_t world = 1;
  std::uint32_t epoch = 0;  ///< Grows when the state is divided anew.

  /// "NAME.r0-of-1.e0.d0.store", in the directory of that number.
  std::string of_file(std::size_t directory) const;

  /// This name with the greatest epoch of which there is a first file in the
  /// first directory; with its own epoch if there is none.
  StoreName newest_in(const std::filesystem::path& directory) const;

  /// A file of a store, as far as its name tells.
  struct File;
  /// The files in a directory that have this `name`, of any rank, world and
  /// epoch. None if the directory cannot be listed.
  std::vector<File> files_in(const std::filesystem::path& directory) const;

  friend bool operator==(const StoreName&, const StoreName&) = default;
};

struct StoreName::File {
  StoreName store;
  std::uint32_t directory = 0;  ///< The store's directory of this number.
};

/// How to make a Store.
struct StoreOptions {
  /// On several drives, a store is as fast as all of them together. It is as
  /// large as the drive allows that is full first: see Store.
  DirectoryList directory = {};
  AioConfig aio = {};
  /// "auto", or one of engine_names(). "auto" takes libaio where it works, else
  /// io_uring, else threads.
  std::string engine = "auto";
  bool verify = true;  ///< Keep a checksum per block, compare on read.
  /// Empty, or for each directory the name of the file that the store takes
  /// over, in place of a scratch file. Its extents are those that adopt() gets.
  std::vector<std::string> files = {};
  /// Opens `files` to be read only. Then the file system may be mounted so, and
  /// writing fails.
  bool read_only = false;
  /// Overrides `engine` if it is set. Tests put a faulty engine in here.
  IoEngineFactory engine_factory = {};
};

/// Counters since the store was made.
struct StoreStats {
  std::uint64_t bytes_read = 0;     ///< Padded; of operations that ended well.
  std::uint64_t bytes_written = 0;  ///< As in IoOperation.
  std::uint64_t read_ops = 0;
  std::uint64_t write_ops = 0;
  std::uint64_t allocated = 0;  ///< Bytes in living extents, padded.
  std::uint64_t file_size = 0;  ///< Bytes of the scratch files.
};

/// Where an extent lies. With its checksums, all that adopt() needs.
struct Place {
  std::uint64_t size = 0;  ///< Bytes, as asked for.
  std::uint64_t first_slot = 0;
  /// In the file of each directory, in bytes; kNowhere if it has no part there.
  std::vector<std::uint64_t> offsets = {};
  static constexpr std::uint64_t kNowhere = ~std::uint64_t{0};
  bool operator==(const Place&) const = default;
};

/// Scratch space: extents of an unnamed file, which an IoQueue of the store's
/// own writes and reads. Nothing survives the process, unless the files get
/// names and what is needed to find the extents is kept (CommitLog).
///
/// With several directories there is a file in each, and a queue with all its
/// threads for each block device. The blocks (of block_size bytes) of an extent
/// go to the directories in turn, in proportion to their weights. The next
/// extent goes on where the last one ended. A directory that is full, or a
/// drive that fails, is an error that names it: the others do not take over its
/// share.
/// Threads: any. The destructor waits for operations in flight.
class Store {
 public:
  using Done = std::function<void(std::exception_ptr)>;

  /// Errors: std::invalid_argument (the config, a block_size that is no
  /// multiple of the granule, no directory, a weight out of range); IoError
  /// (directory).
  explicit Store(const StoreOptions& options);
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  /// Space for `bytes` (>= 0), rounded up to the granule and reserved on the
  /// disk. Freed space is used again before the file grows. The space is free
  /// again when the last reference is dropped; an operation holds one too.
  /// Errors: IoError (ENOSPC, ...). Nothing has changed then: what was taken of
  /// the disk is given back.
  std::shared_ptr<Extent> allocate(std::uint64_t bytes);

  /// The same, but only from space that the file has already. Returns null
  /// where the file would have to grow. It makes no system call.
  std::shared_ptr<Extent> try_allocate(std::uint64_t bytes);

  /// Gives the disk back what is free at the ends of the files. Only for after
  /// a failure, since growing again takes time.
  void trim() noexcept;

  /// Errors: IoError (ENOSPC) if a disk clearly has no room for its part of
  /// `bytes` bytes. Ask this before taking much, since taking may be slow where
  /// there is no fallocate.
  void check_room(std::uint64_t bytes) const;

  /// What shall move to or from an extent.
  struct Request {
    std::shared_ptr<Extent> extent;
    /// A multiple of block_size; so is the length, unless it reaches to the end
    /// of padded_size().
    std::uint64_t offset = 0;
    /// The address is a multiple of memory_alignment(). The bytes are borrowed
    /// until `done` has been called. A write does not change them.
    std::span<std::byte> bytes = {};
    /// Called on an I/O thread. It must not block or throw.
    Done done = {};
    IoPriority priority = IoPriority::kNow;  ///< As in IoOperation.
    std::uint64_t caller = 0;                ///< As in IoOperation.
  };

  /// Writes to an extent. Errors: std::invalid_argument and std::bad_alloc from
  /// this call; then nothing has begun and `done` is not called. Other errors
  /// come through `done` and the ticket.
  Ticket write(Request request);
  /// The same, with default priority and caller.
  Ticket write(std::shared_ptr<Extent> extent, std::uint64_t offset,
               std::span<const std::byte> bytes, Done done = {}) {
    auto* const data = const_cast<std::byte*>(bytes.data());
    return write(
        {std::move(extent), offset, {data, bytes.size()}, std::move(done)});
  }

  /// Reads what was written there, with the same rules. Bytes that do not match
  /// the checksum that write() kept are an EIO.
  Ticket read(Request request);
  /// The same, with default priority and caller.
  Ticket read(std::shared_ptr<Extent> extent, std::uint64_t offset,
              std::span<std::byte> bytes, Done done = {}) {
    return read({std::move(extent), offset, bytes, std::move(done)});
  }

  /// Gives a read or write of this store another priority, see
  /// IoQueue::promote(). Returns true if some of it was still to be taken.
  bool promote(const Ticket& ticket, IoPriority priority);

  /// The first bytes of each file belong to no extent.
  static constexpr std::uint64_t kHeadBytes = std::uint64_t{1} << 20;

  /// Writes or reads in the head of a directory's file, without a checksum.
  /// Offset and length are multiples of granule(); `bytes` as in Request.
  /// Errors: those of write() and read().
  Ticket write_head(std::size_t directory, std::uint64_t offset,
                    std::span<const std::byte> bytes);
  Ticket read_head(std::size_t directory, std::uint64_t offset,
                   std::span<std::byte> bytes);

  /// Returns when all writes that have ended are on the drives, or on that of
  /// one directory. The drives are asked side by side. Errors: IoError.
  void sync();
  void sync(std::size_t directory);

  /// Gives the scratch files of the directories these names, the first one
  /// last: see
  /// File::give_name(). After an error some may have theirs. Errors: IoError.
  void give_names(const std::vector<std::string>& names);

  /// An extent that was at `place` in these files, with the checksums that it
  /// had; without, they are zeros. The space is taken from then on. Errors:
  /// std::invalid_argument if the place is not within the files, not aligned,
  /// or not free. Nothing is allocated for it then.
  std::shared_ptr<Extent> adopt(const Place& place,
                                std::vector<std::uint64_t> checksums);

  /// Space for an extent as large as that at `place`, in a store of the same
  /// weights and block_size. Its blocks go to the directories in the same way.
  /// Errors: as allocate().
  std::shared_ptr<Extent> allocate_like(const Place& place);

  /// Gives an extent of this store the bytes and checksums of another store's,
  /// by sharing blocks: see File::share(). It was made by allocate_like().
  /// Returns false where that cannot be; its bytes are undefined then. Errors:
  /// IoError.
  bool share(const Extent& from, const std::shared_ptr<Extent>& extent);

  /// How to make a store in other directories that is like this one.
  StoreOptions options_for(const DirectoryList& directory) const;

  /// How many checksums an extent of `bytes` bytes has.
  std::uint64_t blocks_of(std::uint64_t bytes) const noexcept;

  /// Reads all of an extent, and does not compare checksums. `bytes` has its
  /// padded size.
  Ticket read_unchecked(const std::shared_ptr<Extent>& extent,
                        std::span<std::byte> bytes);

  /// Whether it keeps checksums.
  bool verifies() const noexcept;
  std::size_t directories() const noexcept;
  const File& file(std::size_t directory = 0) const;
  /// The directories' shares of the blocks, in lowest terms.
  std::vector<std::uint32_t> weights() const;

  const AioConfig& config() const noexcept;
  /// Bytes to which extents are padded: a multiple of 4096.
  std::size_t granule() const noexcept;
  std::size_t memory_alignment() const noexcept;
  /// The name of the engine; two names with a comma where drives differ.
  const std::string& engine() const noexcept;
  /// What a log should say: which engine was chosen and why not another; why
  /// I/O is buffered and not direct.
  const std::vector<std::string>& notes() const noexcept;
  StoreStats stats() const;

 private:
  friend class Extent;
  class Join;
  struct Impl;
  std::shared_ptr<Extent> allocate(std::uint64_t bytes, bool may_grow);
  std::shared_ptr<Extent> allocate_at(std::uint64_t first_slot,
                                      std::uint64_t bytes, bool may_grow);

  std::shared_ptr<Impl> impl_;
};

/// A piece of a Store's space. It may outlive the Store.
class Extent {
 public:
  ~Extent();
  Extent(const Extent&) = delete;
  Extent& operator=(const Extent&) = delete;

  std::uint64_t size() const noexcept { return size_; }  ///< As asked for.
  std::uint64_t padded_size() const noexcept { return padded_size_; }
  /// Where its part in the file of directory number `directory` begins, in
  /// bytes. Errors: std::out_of_range.
  std::uint64_t offset(std::size_t directory = 0) const;
  /// Where it lies, for Store::adopt().
  Place place() const;
  /// One for each block_size bytes; none in a store without `verify`. They are
  /// undefined while the extent is written.
  const std::vector<std::uint64_t>& checksums() const noexcept {
    return checksums_;
  }

 private:
  friend class Store;
  Extent() = default;

  std::shared_ptr<Store::Impl> store_;
  std::uint64_t size_ = 0;
  std::uint64_t padded_size_ = 0;
  std::uint64_t first_slot_ = 0;        ///< Its first block's: see StripeMap.
  std::vector<std::uint64_t> offsets_;  ///< By directory.
  bool quarantined_ = false;
  std::vector<std::uint64_t> checksums_;
};

}  // namespace torch_ext
