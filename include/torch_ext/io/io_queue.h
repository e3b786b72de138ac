#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <span>

#include "torch_ext/config/aio_config.h"
#include "torch_ext/io/file.h"
#include "torch_ext/io/io_engine.h"
#include "torch_ext/io/ticket.h"

namespace torch_ext {

/// How soon an operation is needed, most urgent first.
enum class IoPriority {
  kNow,        ///< Somebody waits for it, or soon will.
  kPrefetch,   ///< Needed later: brought while the device has time.
  kWriteBack,  ///< Not needed again, but to free memory.
};

/// The calling thread's own number, which is not 0.
std::uint64_t this_caller() noexcept;

/// A read or write of any length, or a sync. The queue cuts it into requests of
/// at most block_size bytes.
struct IoOperation {
  IoRequest::Op op = IoRequest::Op::kRead;
  std::shared_ptr<const File> file = nullptr;
  std::uint64_t offset = 0;
  /// Borrowed until on_done has been called. Any alignment will do: what direct
  /// I/O cannot take goes through the file's buffered descriptor.
  std::span<std::byte> bytes = {};
  /// Empty, or one XXH3-64 for each block_size bytes (the last block may be
  /// shorter). A write fills it in before its request is made. A read compares
  /// it; a difference is an EIO. Borrowed like `bytes`.
  std::span<std::uint64_t> checksums = {};
  IoPriority priority = IoPriority::kNow;
  /// Whose turn the operation takes, see IoQueue. 0: the submitting thread's.
  std::uint64_t caller = 0;
  /// Called once, on an I/O thread or in cancel(). By then the last request has
  /// ended and the queue holds `file` no more; the ticket is not done yet. It
  /// must not block or throw. A null argument means that all went well.
  std::function<void(std::exception_ptr)> on_done = nullptr;
};

class RunningOperation;

/// What an IoQueue has to do, and what it has done since it was made.
struct IoQueueStats {
  std::uint64_t operations_queued = 0;     ///< Some requests not taken yet.
  std::uint64_t operations_in_flight = 0;  ///< The others that have not ended.
  std::uint64_t bytes = 0;                 ///< All bytes of both.
  std::uint64_t requests = 0;  ///< Made of the kernel, repeated ones included.
  std::uint64_t retries = 0;   ///< After EINTR and the like.
  std::uint64_t short_transfers = 0;  ///< Fewer bytes than asked.
};

/// Keeps the device busy with the requests of all its owner's operations. It
/// has `thread_count` threads, which submit and reap. Each has one engine of
/// `queue_depth` requests. A request is chosen only when another has ended, so
/// at most queue_depth * thread_count requests are ahead of an urgent one.
///
/// Order: the most urgent priority that waits has the next request. But each
/// less urgent priority that waits has one request in 16. Within a priority,
/// callers take turns, however much each has submitted. A turn is the first
/// operation in the caller's line, or 32 MiB of it (or queue_depth requests, if
/// that is more). The rest of the operation then goes to the end of that line.
/// A line is in the order of submission. A caller is a thread, unless the
/// operation names another. With more than 64 callers, some share a line.
/// Requests in flight end in any order.
///
/// Errors: a short transfer is continued. EINTR, EAGAIN, ENOMEM and ECANCELED
/// are tried again for some seconds, but not for a sync. A read that meets the
/// end of the file is an error. An operation reports its first error after all
/// its requests have ended; requests that were not made by then are left out.
/// If the kernel refuses an engine's polls for good, its thread ends what it
/// has, and all that it takes later, with an error.
/// Threads: any may submit. The destructor waits for all operations.
class IoQueue {
 public:
  /// Errors: std::invalid_argument for the config, IoError from the factory.
  IoQueue(const AioConfig& config, const IoEngineFactory& factory);
  IoQueue(const IoQueue&) = delete;
  IoQueue& operator=(const IoQueue&) = delete;
  ~IoQueue();

  /// Returns at once, however much is queued. Only the memory that callers lend
  /// bounds the number of operations. Each takes some 400 bytes until it has
  /// ended and no ticket of it is left. Errors: std::invalid_argument for a
  /// null file, a wrong number of checksums, or an offset + length beyond 2^63
  /// - 1. The kernel's errors come through the ticket.
  Ticket submit(IoOperation operation);

  /// An operation that only has to be started. If it is dropped instead,
  /// nothing has happened: on_done is not called.
  class Prepared {
   private:
    friend class IoQueue;
    std::shared_ptr<RunningOperation> operation_;
  };

  /// submit() in two halves, for several operations of which all or none shall
  /// start. Only prepare() can fail; its errors are those of submit().
  Prepared prepare(IoOperation operation);
  Ticket start(Prepared prepared) noexcept;

  /// Leaves out the requests of the ticket's operation that no I/O thread has
  /// taken yet. Returns true if there were some. The operation then fails with
  /// ECANCELED (an IoError). It ends once the requests that were made have
  /// ended, or in this call if there are none. A write may be done in part.
  /// Returns false, and changes nothing, if all requests were taken, or if the
  /// operation has failed or ended or is not this queue's.
  bool cancel(const Ticket& ticket);

  /// Gives the ticket's operation another priority. It goes to the end of its
  /// caller's line there. Returns true if some of its requests are still to be
  /// taken. Returns false, and changes nothing, where cancel() does. Allocates
  /// nothing.
  bool promote(const Ticket& ticket, IoPriority priority);

  /// What there is to do and was done. An operation is counted as running until
  /// just before its ticket is done.
  IoQueueStats stats() const;

  const AioConfig& config() const noexcept;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace torch_ext
