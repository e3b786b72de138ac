#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <vector>

#include "piece_cutter.h"
#include "torch_ext/io/io_queue.h"

namespace torch_ext {

/// An operation between submit() and its last completion.
class RunningOperation {
 public:
  /// Errors: std::invalid_argument, see IoQueue::submit.
  RunningOperation(IoOperation operation, std::uint64_t block_size);

  const IoOperation& io() const { return io_; }
  Ticket ticket() const { return source_.ticket(); }

  // Under the backlog's lock: ---------------------------------------------
  bool all_cut() const { return cut_ == total_; }
  Piece cut();
  /// Leaves out what is not cut yet; returns how many pieces that were.
  std::size_t abandon();

  // From any worker: ------------------------------------------------------
  bool failed() const { return failed_.load(std::memory_order_relaxed); }
  void fail(std::exception_ptr error);
  /// Counts ended pieces; true for the one call that ends the operation.
  bool end_pieces(std::size_t count);
  /// Tells the caller. The operation is not touched afterwards.
  void finish();

 private:
  IoOperation io_;
  PieceCutter cutter_;
  std::size_t total_;
  std::size_t cut_ = 0;
  std::atomic<std::size_t> open_;
  std::atomic<bool> failed_ = false;
  std::mutex mutex_;
  std::exception_ptr error_;
  TicketSource source_;
};

/// A piece on its way through a worker.
struct RunningPiece {
  RunningOperation* operation = nullptr;
  Piece piece;
  std::size_t moved = 0;   ///< Bytes of it that are done for good.
  int attempts = 0;        ///< In a row without progress.
  int idle_transfers = 0;  ///< Of these, transfers that moved too little.
  std::chrono::steady_clock::time_point not_before = {};  ///< Of the next.
  std::chrono::steady_clock::time_point not_after = {};   ///< Likewise.
};

class IoWorker;

/// Operations with pieces that no worker has taken yet, oldest first, and
/// the workers that look for some.
class IoBacklog {
 public:
  void push(std::unique_ptr<RunningOperation> operation);

  /// Up to `room` pieces, appended to `out`. With `block`, waits until there
  /// is one or the backlog is closed; false once it is closed and empty.
  bool take(std::size_t room, bool block, std::vector<RunningPiece>& out);

  /// To be called before a poll that blocks while there is room for more:
  /// false if there is work already. push() will wake the worker's engine.
  bool announce_poll(IoWorker& worker);
  void end_poll(IoWorker& worker);

  void close();

 private:
  /// Unlocks before it calls one.
  void call_worker(std::unique_lock<std::mutex>& lock);

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<RunningOperation*> operations_;
  std::vector<IoWorker*> polling_;
  int idle_ = 0;
  bool closed_ = false;
};

}  // namespace torch_ext
