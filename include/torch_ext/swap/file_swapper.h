#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "torch_ext/config/aio_config.h"
#include "torch_ext/io/io_engine.h"
#include "torch_ext/swap/swapper.h"

namespace torch_ext {

/// How to make a FileSwapper.
struct FileSwapperOptions {
  AioConfig aio = {};
  /// "auto" or one of engine_names(); see make_queue().
  std::string engine = "auto";
  /// Bytes of host buffers, all of them. Less than one block_size, in whole
  /// pages, counts as that. They take memory as they are used.
  std::uint64_t host_memory = std::uint64_t{256} << 20;
  /// Overrides `engine` where set: how tests put a faulty engine in.
  IoEngineFactory engine_factory = {};
};

/// Counters since the FileSwapper was made.
struct FileSwapperStats {
  std::uint64_t bytes_read = 0;  ///< Of operations that ended well.
  std::uint64_t bytes_written = 0;
  std::uint64_t operations = 0;  ///< That have ended, well or not.
  std::uint64_t failures = 0;
  std::uint64_t in_flight = 0;        ///< Operations, now.
  std::uint64_t host_bytes = 0;       ///< Size of the buffer pool.
  std::uint64_t host_bytes_peak = 0;  ///< Most of it in use at once.
  std::uint64_t descriptors = 0;      ///< Open now, at most 64.
};

/// Moves runs of bytes between devices and files of the caller, at any offset
/// and of any length, with the streams, buffers and tickets of a Swapper.
///
/// Files are opened without following links, and made 0600 where there is
/// none; they are never truncated. At most 64 descriptors are open; operations
/// beyond wait for others to end. What was written is not durable until the
/// caller has synced the file. Space is reserved before the first byte is
/// written, so a full disk leaves the file as it was; any other failure leaves
/// the range undefined.
///
/// Operations on the same bytes of a file, of which one writes, take effect in
/// the order of the calls, whether the one before fails or not. Others have no
/// order. Each block device has an I/O queue of its own.
/// Threads: any. Forked children: StateError.
class FileSwapper {
 public:
  /// Errors: std::invalid_argument; IoError ("mmap", "pthread_create").
  explicit FileSwapper(const FileSwapperOptions& options);
  ~FileSwapper();  ///< As close(), without its errors.
  FileSwapper(const FileSwapper&) = delete;
  FileSwapper& operator=(const FileSwapper&) = delete;

  /// Writes the bytes at `offset` of the file. They must not change until
  /// wait_source() of the ticket has returned.
  /// Errors here, with nothing done: those of File::open where the file can be
  /// opened at once and no other operation on these bytes goes first;
  /// std::invalid_argument for an offset beyond 2^63 - 1; StateError. Later
  /// ones through the ticket.
  SwapTicket write(const std::filesystem::path& path, std::uint64_t offset,
                   DeviceBytes source);
  /// The same through a descriptor that stays the caller's and stays open until
  /// the ticket's wait() has returned.
  SwapTicket write(int fd, std::uint64_t offset, DeviceBytes source);

  /// Reads bytes from `offset` on. Between the call and the ticket's wait()
  /// the destination belongs to the swapper. A file that ends before the last
  /// byte is an EIO, and nothing is read.
  SwapTicket read(const std::filesystem::path& path, std::uint64_t offset,
                  DeviceBytes destination);

  /// Closes files that are kept open, not in use and deleted meanwhile, whose
  /// space the disk has not got back yet.
  void drop_deleted();

  FileSwapperStats stats() const;
  /// What a log should hold, e.g. why direct I/O or page-locking is not used.
  std::vector<std::string> notes() const;

  /// Waits for all operations and frees memory and descriptors; later calls of
  /// anything but stats() and notes() throw StateError. Idempotent.
  /// Errors: the first error that no ticket has reported, after all is closed.
  void close();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace torch_ext
