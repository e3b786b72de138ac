#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "torch_ext/base/error.h"
#include "torch_ext/io/ticket.h"
#include "torch_ext/store/store.h"
#include "torch_ext/swap/device_bytes.h"

namespace torch_ext {

/// How to make a Swapper.
struct SwapperOptions {
  StoreOptions store = {};
  /// Bytes of all host buffers together; at least one block_size.
  std::uint64_t host_memory = std::uint64_t{256} << 20;
};

/// Counters since the swapper was made.
struct SwapperStats {
  std::uint64_t bytes_out = 0;  ///< Unpadded, ended well.
  std::uint64_t bytes_in = 0;
  std::uint64_t operations = 0;  ///< Ended, well or not.
  std::uint64_t failures = 0;
  std::uint64_t in_flight = 0;        ///< Operations, now.
  std::uint64_t host_bytes = 0;       ///< Size of the buffer pool.
  std::uint64_t host_bytes_peak = 0;  ///< Most of it in use at once.
  StoreStats store;
};

class SwapOperation;
class StoredValue;

/// An operation of a Swapper or FileTransfer. Copies share it. Dropping it is
/// always safe. Threads: any. Forked children: StateError.
class SwapTicket {
 public:
  using Timeout = Ticket::Timeout;

  /// For a swap_out, returns when the last copy from the source is queued, and
  /// makes the calling thread's current stream wait for that copy. From then on
  /// the source may be overwritten. For a swap_in, returns at once. Errors:
  /// those of wait().
  void wait_source(Timeout timeout = std::nullopt) const;

  /// For a swap_out, returns when all bytes are written. For a swap_in, returns
  /// when the last copy into the destination is queued, and makes the calling
  /// thread's current stream wait for that copy. Errors: the operation's
  /// (IoError, ...), at each call; TimeoutError after `timeout`.
  void wait(Timeout timeout = std::nullopt) const;

  /// Waits as wait() and wait_source() do, but only tells whether they would
  /// return or throw now. It throws no error of the operation, and touches no
  /// stream.
  bool wait_for(std::chrono::nanoseconds timeout) const;
  bool wait_source_for(std::chrono::nanoseconds timeout) const;
  /// The error that wait() throws after `timeout`, for callers of wait_for().
  TimeoutError timed_out(std::chrono::nanoseconds timeout) const;

  /// True once the bytes are in place, on disk or in the destination, or once
  /// the operation has failed. Never blocks.
  bool done() const;

 private:
  friend class FileTransfer;
  friend class Swapper;
  explicit SwapTicket(std::shared_ptr<SwapOperation> operation);
  std::shared_ptr<SwapOperation> operation_;
};

/// Moves named runs of bytes between devices and a scratch file, through one
/// bounded pool of page-locked host buffers.
///
/// swap_out and swap_in wait for neither memory nor disk. They record an event
/// on the calling thread's current stream and return. A transfer thread takes
/// buffers, makes the device's copy stream wait for the event, and copies in
/// chunks. The copy of one chunk overlaps with the I/O of others. Host memory
/// at an address that direct I/O can take is written and read in place. If its
/// length suits direct I/O too, it does not pass through the transfer thread.
///
/// Operations on one key take effect in the order of the calls. A rewrite goes
/// to new space, and the key moves there when its last byte is written. A
/// rewrite that fails leaves the old value. An error that no ticket has
/// reported is thrown by the key's next call, which then does nothing, or by
/// close().
/// Threads: any. Forked children: StateError.
class Swapper {
 public:
  /// A value of a key. Its disk space stays in use while there is an Entry.
  class Entry {
   public:
    std::uint64_t size() const;
    const std::shared_ptr<const void>& tag() const;  ///< From swap_out().

   private:
    friend class Swapper;
    Entry() = default;
    std::string key_;
    std::shared_ptr<StoredValue> value_;
  };

  /// Errors: those of Store; std::invalid_argument if host_memory is below
  /// block_size; IoError ("mmap") if the memory cannot be had.
  explicit Swapper(const SwapperOptions& options);
  ~Swapper();  ///< As close(), without its errors.
  Swapper(const Swapper&) = delete;
  Swapper& operator=(const Swapper&) = delete;

  /// Stores the bytes under the key. They must not change until wait_source()
  /// has returned. `tag` stays with the value. Errors of this call: StateError
  /// (closed, forked, the stream is being captured); an unreported error of the
  /// key.
  SwapTicket swap_out(const std::string& key, DeviceBytes source,
                      std::shared_ptr<const void> tag = nullptr);

  /// Brings the key's bytes back. `destination` has exactly the size of the
  /// entry. Between the call and wait() it belongs to the swapper. With
  /// kPrefetch, what is needed now goes first, whenever it was called. Writes
  /// come last. Each of the three has a share.
  /// Errors of this call: KeyError; std::invalid_argument (size); those of
  /// swap_out.
  SwapTicket swap_in(const std::string& key, DeviceBytes destination,
                     IoPriority priority = IoPriority::kNow);
  /// The same for the value that entry() found, even if the key has been
  /// rewritten or removed since.
  SwapTicket swap_in(const Entry& entry, DeviceBytes destination,
                     IoPriority priority = IoPriority::kNow);

  /// The value that a swap_in called now would bring. Errors: KeyError; an
  /// unreported error of the key.
  Entry entry(const std::string& key);

  /// Forgets the key at once, whatever became of its operations. Operations
  /// that were already called still end. If nobody has seen their error, it is
  /// thrown by close(), and no longer by the key's next call. Errors: KeyError.
  void remove(const std::string& key);

  std::vector<std::string> keys();
  SwapperStats stats() const;
  /// What a log should say, such as why direct I/O or page-locking is not used.
  std::vector<std::string> notes() const;
  /// The name of the I/O engine in use, such as "libaio".
  const std::string& engine() const noexcept;

  /// Waits for all operations, then frees memory and disk space. Later calls of
  /// anything but stats(), notes(), engine() and close() throw StateError.
  /// Errors: the first error that nobody has seen; everything is closed then.
  void close();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace torch_ext
