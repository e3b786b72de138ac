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
  /// Bytes of host buffers, all of them; at least one block_size.
  std::uint64_t host_memory = std::uint64_t{256} << 20;
};

/// Counters since the swapper was made.
struct SwapperStats {
  std::uint64_t bytes_out = 0;  ///< Of operations that ended well, unpadded.
  std::uint64_t bytes_in = 0;
  std::uint64_t operations = 0;  ///< That have ended, well or not.
  std::uint64_t failures = 0;
  std::uint64_t in_flight = 0;        ///< Operations, now.
  std::uint64_t host_bytes = 0;       ///< Size of the buffer pool.
  std::uint64_t host_bytes_peak = 0;  ///< Most of it in use at once.
  StoreStats store;
};

class SwapOperation;
class StoredValue;

/// An operation of a Swapper. Copies share it; dropping it is always safe.
/// Threads: any. Forked children: StateError.
class SwapTicket {
 public:
  using Timeout = Ticket::Timeout;

  /// swap_out: returns when the last copy from the source is queued, and
  /// makes the calling thread's current stream wait for it: from then on the
  /// source may be overwritten. swap_in: returns at once.
  /// Errors: those of wait().
  void wait_source(Timeout timeout = std::nullopt) const;

  /// swap_out: returns when all bytes are written. swap_in: returns when the
  /// last copy into the destination is queued, and makes the calling thread's
  /// current stream wait for it.
  /// Errors: the operation's (IoError, ...), each time; TimeoutError.
  void wait(Timeout timeout = std::nullopt) const;

  /// As wait() and wait_source(), but only tells whether it would return or
  /// throw now; throws no error of the operation, never touches a stream.
  bool wait_for(std::chrono::nanoseconds timeout) const;
  bool wait_source_for(std::chrono::nanoseconds timeout) const;
  /// What wait() throws after `timeout`, for callers of wait_for().
  TimeoutError timed_out(std::chrono::nanoseconds timeout) const;

  /// True once the bytes are in place, on disk or in the destination, or the
  /// operation has failed. Never blocks.
  bool done() const;

 private:
  friend class FileSwapper;
  friend class Swapper;
  explicit SwapTicket(std::shared_ptr<SwapOperation> operation);
  std::shared_ptr<SwapOperation> operation_;
};

/// Moves named runs of bytes between devices and a scratch file, through one
/// bounded pool of page-locked host buffers.
///
/// swap_out and swap_in wait for neither memory nor disk: they record an
/// event on the calling thread's current stream and return; a transfer thread
/// takes buffers, makes the device's copy stream wait for the event, copies
/// in chunks, and overlaps the copy of one chunk with the I/O of others.
/// Host memory at an address that direct I/O can take is written and read in
/// place; where its length allows that too, it goes past that thread.
///
/// Operations on one key take effect in the order of the calls. A rewrite goes
/// to new space, and the key moves to it when its last byte is written; one
/// that fails leaves the old value. An error that no ticket has reported is
/// thrown by the key's next call, which then does nothing, and by close().
/// Threads: any. Forked children: StateError.
class Swapper {
 public:
  /// A value of a key. Its disk space is in use while there is an Entry.
  class Entry {
   public:
    std::uint64_t size() const;
    const std::shared_ptr<const void>& tag() const;  ///< swap_out's.

   private:
    friend class Swapper;
    Entry() = default;
    std::string key_;
    std::shared_ptr<StoredValue> value_;
  };

  /// Errors: those of Store; std::invalid_argument if host_memory is below
  /// block_size; IoError ("mmap") if it cannot be had.
  explicit Swapper(const SwapperOptions& options);
  ~Swapper();  ///< As close(), without its errors.
  Swapper(const Swapper&) = delete;
  Swapper& operator=(const Swapper&) = delete;

  /// Stores the bytes under the key. They must not change until
  /// wait_source() has returned. Errors here: StateError (closed, forked, the
  /// stream is being captured), an unreported error of the key.
  SwapTicket swap_out(const std::string& key, DeviceBytes source,
                      std::shared_ptr<const void> tag = nullptr);

  /// Brings them back. `size` is the entry's. Between the call and wait()
  /// the destination belongs to the swapper. kPrefetch: what is needed now goes
  /// first, whenever it was called; writes come last. Each has a share.
  /// Errors here: KeyError, std::invalid_argument (size), as swap_out.
  SwapTicket swap_in(const std::string& key, DeviceBytes destination,
                     IoPriority priority = IoPriority::kNow);
  /// The same for the value that entry() found, though the key may have been
  /// rewritten or removed since.
  SwapTicket swap_in(const Entry& entry, DeviceBytes destination,
                     IoPriority priority = IoPriority::kNow);

  /// What a swap_in called now would bring. Errors: KeyError; an unreported
  /// error of the key.
  Entry entry(const std::string& key);

  /// Forgets the key at once, whatever became of its operations; those already
  /// called still end. An error of theirs that nobody has seen is close()'s,
  /// no longer the key's. Errors: KeyError.
  void remove(const std::string& key);

  std::vector<std::string> keys();
  SwapperStats stats() const;
  /// What a log should hold, e.g. why direct I/O or page-locking is not used.
  std::vector<std::string> notes() const;
  /// The I/O engine in use, e.g. "libaio".
  const std::string& engine() const noexcept;

  /// Waits for all operations, frees memory and disk space; later calls of
  /// anything but stats() and close() throw StateError. Idempotent.
  /// Errors: the first error that nobody has seen, after all is closed.
  void close();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace torch_ext
