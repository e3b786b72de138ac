#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <exception>
#include <memory>

#include "fair_queue.h"
#include "io_counters.h"
#include "piece_cutter.h"
#include "ticket_state.h"
#include "torch_ext/io/io_queue.h"

namespace torch_ext {

class IoBacklog;

/// The name of the system call that does what `op` says.
const char* name_of(IoRequest::Op op);

/// An operation between submit() and its last completion. It is also what its
/// tickets share, so it can be found from a ticket. It keeps itself alive from
/// IoBacklog::push() until it has ended.
class RunningOperation final
    : public Ticket::State,
      public FairQueue<RunningOperation>::Link,
      public std::enable_shared_from_this<RunningOperation> {
 public:
  /// Errors: std::invalid_argument, see IoQueue::submit.
  RunningOperation(IoOperation operation, std::uint64_t block_size);

  /// Empty once it has ended.
  const IoOperation& io() const { return io_; }
  Ticket ticket() { return Ticket(shared_from_this()); }

  // Called under the backlog's lock, or by whoever took it out of there: ----
  bool all_cut() const { return cut_ == total_; }
  Piece cut();
  /// Leaves out what is not cut yet. Returns how many pieces that is.
  std::size_t abandon();

  // Called on any thread while it has pieces that have not ended: -----------
  bool failed() const { return failed_.load(std::memory_order_relaxed); }
  /// Only the first error counts: the call returns true for it alone.
  bool fail(std::exception_ptr failure);
  /// Counts ended pieces. True for the one call that ends the operation.
  bool end_pieces(std::size_t count);

  /// Tells the caller, and counts the end. The operation may be gone
  /// afterwards.
  void finish(IoCounters& counters) UNCHECKED_THREADS;

 private:
  friend class IoBacklog;

  IoOperation io_;
  PieceCutter cutter_;
  std::size_t total_;
  std::size_t cut_ = 0;
  std::atomic<std::size_t> open_;
  std::atomic<bool> failed_ = false;

  // The backlog's part: ------------------------------------------------------
  const IoBacklog* backlog_ = nullptr;  ///< Set once, before it is shared.
  bool queued_ = false;
  std::shared_ptr<RunningOperation> self_;
};

/// A piece on its way through a worker.
struct RunningPiece {
  RunningOperation* operation = nullptr;
  Piece piece;
  std::size_t moved = 0;   ///< Bytes that are done for good.
  int attempts = 0;        ///< In a row without progress.
  int idle_transfers = 0;  ///< Those that moved too little.
  std::chrono::steady_clock::time_point not_before = {};  ///< Next attempt.
  std::chrono::steady_clock::time_point not_after = {};   ///< Last one.
};

}  // namespace torch_ext
