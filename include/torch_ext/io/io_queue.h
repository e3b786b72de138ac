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

/// How soon an operation is needed; most urgent first.
enum class IoPriority {
  kNow,        ///< Somebody waits for it, or soon will.
  kPrefetch,   ///< Needed later: brought while the device has time.
  kWriteBack,  ///< Not needed again, but to free memory.
};

/// A number of this thread's own, not 0.
std::uint64_t this_caller() noexcept;

/// A read or write of any length, cut by the queue into requests of at most
/// block_size bytes.
struct IoOperation {
  IoRequest::Op op = IoRequest::Op::kRead;
  std::shared_ptr<const File> file = nullptr;
  std::uint64_t offset = 0;
  /// Borrowed until on_done has been called. Any alignment: what direct I/O
  /// cannot take goes through the file's buffered descriptor.
  std::span<std::byte> bytes = {};
  /// Empty, or one XXH3-64 per block_size bytes (the last block may be
  /// shorter): filled by a write before its request is made, compared by a
  /// read; a difference is an EIO. Borrowed like `bytes`.
  std::span<std::uint64_t> checksums = {};
  IoPriority priority = IoPriority::kNow;
  /// Whose turn it counts for, see IoQueue; 0: the submitting thread's.
  std::uint64_t caller = 0;
  /// Called once, on an I/O thread or in cancel(), after the last request has
  /// ended, the queue holds `file` no more, and before the ticket is done. Must
  /// not block or throw. Null: well.
  std::function<void(std::exception_ptr)> on_done = nullptr;
};

class RunningOperation;

/// What an IoQueue has to do, and what it has done since it was made.
struct IoQueueStats {
  std::uint64_t operations_queued = 0;  ///< With requests that no thread took.
  std::uint64_t operations_in_flight = 0;  ///< The others that have not ended.
  std::uint64_t bytes = 0;                 ///< Of both, in full.
  std::uint64_t requests = 0;  ///< Made of the kernel, repeated ones included.
  std::uint64_t retries = 0;   ///< After EINTR and the like.
  std::uint64_t short_transfers = 0;  ///< Fewer bytes than asked.
};

/// Keeps the device busy with the requests of all its owner's operations:
/// `thread_count` threads, each with one engine of `queue_depth` requests, that
/// submit and reap. What comes next is decided when a request has ended, so no
/// more than queue_depth * thread_count requests are ahead of an urgent one.
///
/// Order: the most urgent priority that waits has the next request; but of any
/// 16, one is for each less urgent priority that waits. Within a priority,
/// callers take turns, however much each has submitted. A turn is the first
/// operation in the caller's line, or 32 MiB of it (or queue_depth requests, if
/// that is more); what is left of it then goes to the end of that line. A line
/// is in the order of submission. A caller is a thread, unless the operation
/// names another; of more than 64 callers, some share a line.
/// Requests in flight end in any order.
///
/// A short transfer is continued, EINTR, EAGAIN, ENOMEM and ECANCELED are
/// tried again for some seconds (but a sync is not), a read that meets the end
/// of the file is an error. An operation reports its first error, after all its
/// requests have ended; requests not made by then are left out. A thread whose
/// engine the kernel disowns for good ends what it has, and all that it takes
/// from then on, with an error.
/// Threads: any may submit. The destructor waits for all operations.
class IoQueue {
 public:
  /// Errors: std::invalid_argument for the config, IoError from the factory.
  IoQueue(const AioConfig& config, const IoEngineFactory& factory);
  IoQueue(const IoQueue&) = delete;
  IoQueue& operator=(const IoQueue&) = delete;
  ~IoQueue();

  /// Returns at once, however much is queued: what bounds the operations, some
  /// 400 bytes each until they have ended and no ticket is left, is the memory
  /// that callers lend them. Errors: std::invalid_argument for a null file, a
  /// wrong number of checksums or an offset + length beyond 2^63 - 1; whatever
  /// the kernel says comes through the ticket.
  Ticket submit(IoOperation operation);

  /// An operation that lacks nothing but its start. Dropped, it never was:
  /// on_done is not called.
  class Prepared {
   private:
    friend class IoQueue;
    std::shared_ptr<RunningOperation> operation_;
  };

  /// submit() in two halves, for operations of which all are to be started or
  /// none. The first has all the errors, the second none.
  Prepared prepare(IoOperation operation);
  Ticket start(Prepared prepared) noexcept;

  /// Leaves out the requests of the ticket's operation that no I/O thread has
  /// taken yet. True: that were some, and the operation fails with ECANCELED
  /// (an IoError) once those that were made have ended, here if there are none;
  /// a write may be done in part. False: all were taken, or the operation has
  /// failed or ended or is not of this queue; nothing changes.
  bool cancel(const Ticket& ticket);

  /// An operation is counted until just before its ticket is done.
  IoQueueStats stats() const;

  const AioConfig& config() const noexcept;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace torch_ext
