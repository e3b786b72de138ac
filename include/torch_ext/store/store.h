#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "torch_ext/config/aio_config.h"
#include "torch_ext/io/io_engine.h"
#include "torch_ext/io/io_queue.h"
#include "torch_ext/io/ticket.h"
#include "torch_ext/store/directories.h"

namespace torch_ext {

class Extent;

/// How to make a Store.
struct StoreOptions {
  /// On several drives a store is as fast as all together and as large as
  /// its share of the smallest allows: see Store.
  DirectoryList directory = {};
  AioConfig aio = {};
  /// "auto" (where it works libaio, else io_uring, else threads) or one of
  /// engine_names().
  std::string engine = "auto";
  bool verify = true;  ///< Keep a checksum per block and compare on read.
  /// Overrides `engine` where set: how tests put a faulty engine in.
  IoEngineFactory engine_factory = {};
};

/// Counters since the store was made.
struct StoreStats {
  std::uint64_t bytes_read = 0;     ///< Padded, of operations that ended well.
  std::uint64_t bytes_written = 0;  ///< Likewise.
  std::uint64_t read_ops = 0;
  std::uint64_t write_ops = 0;
  std::uint64_t allocated = 0;  ///< Bytes in living extents, padded.
  std::uint64_t file_size = 0;  ///< Bytes of the scratch files.
};

/// Scratch space: extents of an unnamed file, written and read by an IoQueue of
/// its own. Nothing survives the process.
///
/// In several directories there is a file in each, and a queue, with all its
/// threads, for each block device. The blocks (block_size) of an extent go to
/// them in turn, in proportion to their weights, and the next extent goes on
/// where the last one ended. A directory that is full, or a drive that fails,
/// is an error that names it: the others do not take over its share.
/// Threads: any. The destructor waits for operations in flight.
class Store {
 public:
  using Done = std::function<void(std::exception_ptr)>;

  /// Errors: std::invalid_argument (config; block_size not a multiple of the
  /// granule; no directory, a weight out of range), IoError (directory).
  explicit Store(const StoreOptions& options);
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  /// Space for `bytes` (>= 0), rounded up to the granule and reserved on the
  /// disk. Freed space is used again before the file grows. The space returns
  /// when the last reference, an operation's own included, is dropped.
  /// Errors: IoError (ENOSPC, ...), before anything has changed; what was taken
  /// of the disk is given back.
  std::shared_ptr<Extent> allocate(std::uint64_t bytes);

  /// The same from space that the file has already; null where it would have
  /// to grow. Makes no system call.
  std::shared_ptr<Extent> try_allocate(std::uint64_t bytes);

  /// Gives the disk back what is free at the ends of the files: after a
  /// failure, since growing again takes time.
  void trim() noexcept;

  /// Errors: IoError (ENOSPC) if a disk clearly has no room for its part of so
  /// many bytes. To be asked before many are taken, which may take long where
  /// there is no fallocate.
  void check_room(std::uint64_t bytes) const;

  /// Writes `bytes` at `offset` of the extent. `offset` is a multiple of
  /// block_size, the length too unless it reaches the end of padded_size();
  /// the address is a multiple of memory_alignment(). `bytes` is borrowed
  /// until `done` has been called, on an I/O thread: it must not block or
  /// throw. `caller`: as of IoOperation. Errors: std::invalid_argument and
  /// std::bad_alloc here, before anything has begun and without `done`; the
  /// rest through done and ticket.
  Ticket write(std::shared_ptr<Extent> extent, std::uint64_t offset,
               std::span<const std::byte> bytes, Done done = {},
               IoPriority priority = IoPriority::kNow,
               std::uint64_t caller = 0);

  /// Reads what was written there, with the same rules. Bytes that differ
  /// from the checksum kept by write() are an EIO, and are not published.
  Ticket read(std::shared_ptr<Extent> extent, std::uint64_t offset,
              std::span<std::byte> bytes, Done done = {},
              IoPriority priority = IoPriority::kNow, std::uint64_t caller = 0);

  const AioConfig& config() const noexcept;
  /// Bytes to which extents are padded: a multiple of 4096.
  std::size_t granule() const noexcept;
  std::size_t memory_alignment() const noexcept;
  /// Two names with a comma where drives differ.
  const std::string& engine() const noexcept;
  /// What a log should hold: chosen engine and why not another, buffered
  /// instead of direct I/O and why.
  const std::vector<std::string>& notes() const noexcept;
  StoreStats stats() const;

 private:
  friend class Extent;
  struct Impl;
  std::shared_ptr<Extent> allocate(std::uint64_t bytes, bool may_grow);

  std::shared_ptr<Impl> impl_;
};

/// A piece of a Store. Opaque but for its size; may outlive the Store.
class Extent {
 public:
  ~Extent();
  Extent(const Extent&) = delete;
  Extent& operator=(const Extent&) = delete;

  std::uint64_t size() const noexcept { return size_; }  ///< As asked for.
  std::uint64_t padded_size() const noexcept { return padded_size_; }
  /// Of its part in the file of the directory with this number.
  /// Errors: std::out_of_range.
  std::uint64_t offset(std::size_t directory = 0) const;

 private:
  friend class Store;
  Extent() = default;

  std::shared_ptr<Store::Impl> store_;
  std::uint64_t size_ = 0;
  std::uint64_t padded_size_ = 0;
  std::uint64_t first_slot_ = 0;        ///< Of its first block: see StripeMap.
  std::vector<std::uint64_t> offsets_;  ///< By directory.
  bool quarantined_ = false;
  std::vector<std::uint64_t> checksums_;
};

}  // namespace torch_ext
