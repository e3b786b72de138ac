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

/// How to make a FileTransfer.
struct FileTransferOptions {
  AioConfig aio = {};
  /// "auto" or one of engine_names(); see make_queue().
  std::string engine = "auto";
  /// Bytes of all host buffers together. Less than one block_size, rounded up
  /// to whole pages, counts as that. The buffers take memory as they are used.
  std::uint64_t host_memory = std::uint64_t{256} << 20;
  /// Overrides `engine` if it is set. Tests put a faulty engine in here.
  IoEngineFactory engine_factory = {};
};

/// Counters since the FileTransfer was made.
struct FileTransferStats {
  std::uint64_t bytes_read = 0;  ///< By operations that ended well.
  std::uint64_t bytes_written = 0;
  std::uint64_t operations = 0;  ///< Ended, well or not.
  std::uint64_t failures = 0;
  std::uint64_t in_flight = 0;        ///< Operations, now.
  std::uint64_t host_bytes = 0;       ///< Size of the buffer pool.
  std::uint64_t host_bytes_peak = 0;  ///< Most of it in use at once.
  std::uint64_t descriptors = 0;      ///< Open now, at most 64.
};

/// Moves runs of bytes between devices and files of the caller, at any offset
/// and of any length. It has streams, buffers and tickets as a Swapper has.
///
/// Files are opened without following links. A file that is missing is made,
/// with mode 0600, for a write. Files are never truncated. At most 64
/// descriptors are open; operations that need more wait for others to end. What
/// was written is not durable until the caller has synced the file. Space is
/// reserved before the first byte is written, so a full disk leaves the file as
/// it was. Any other failure leaves the range undefined.
///
/// Operations on the same bytes of a file take effect in the order of the calls
/// if one of them writes, whether an earlier one fails or not. Other operations
/// have no order. Each block device has an I/O queue of its own.
/// Threads: any. Forked children: StateError.
class FileTransfer {
 public:
  /// Errors: std::invalid_argument; IoError ("mmap", "pthread_create").
  explicit FileTransfer(const FileTransferOptions& options);
  ~FileTransfer();  ///< As close(), without its errors.
  FileTransfer(const FileTransfer&) = delete;
  FileTransfer& operator=(const FileTransfer&) = delete;

  /// Writes the bytes at `offset` of the file. They must not change until
  /// wait_source() of the ticket has returned.
  /// Errors of this call, with nothing done: StateError; std::invalid_argument
  /// for an offset beyond 2^63 - 1; those of File::open. Errors of File::open
  /// come through the ticket if the file cannot be opened at once, or if
  /// another operation on these bytes goes first. So do all later errors.
  SwapTicket write(const std::filesystem::path& path, std::uint64_t offset,
                   DeviceBytes source);
  /// The same through a descriptor. It stays the caller's, and must stay open
  /// until the ticket's wait() has returned.
  SwapTicket write(int fd, std::uint64_t offset, DeviceBytes source);

  /// Reads bytes from `offset` on. Between the call and the ticket's wait() the
  /// destination belongs to the swapper. A file that ends before the last byte
  /// is an EIO, and nothing is read. Errors: as write().
  SwapTicket read(const std::filesystem::path& path, std::uint64_t offset,
                  DeviceBytes destination);
  /// The same through a descriptor, as write() does.
  SwapTicket read(int fd, std::uint64_t offset, DeviceBytes destination);

  /// Closes kept files that are not in use and have been deleted, so that the
  /// disk gets their space back. Does nothing after close().
  void drop_deleted();

  FileTransferStats stats() const;
  /// What a log should say, such as why direct I/O or page-locking is not used.
  std::vector<std::string> notes() const;

  /// Waits for all operations, then frees memory and descriptors. Later calls
  /// of write() and read() throw StateError. Errors: the first error that no
  /// ticket has reported; everything is closed then.
  void close();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace torch_ext
