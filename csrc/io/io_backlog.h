#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "fair_queue.h"
#include "io_operation.h"

namespace torch_ext {

/// Somebody who polls for completions, and shall look for new pieces too.
class Wakeable {
 public:
  virtual void wake() noexcept = 0;

 protected:
  ~Wakeable() = default;
};

/// Operations with pieces that no worker has taken yet, in the order that
/// IoQueue promises, and the workers that look for pieces.
///
/// push() puts an operation into a FairQueue whose shares are pieces, and wakes
/// one worker. A worker that has nothing to do sleeps in take(). A worker with
/// requests in flight sleeps in its engine's poll(): it says so with
/// announce_poll(), and push() then wakes the engine. Whoever takes pieces and
/// leaves some calls the next worker, so one push wakes as many workers as
/// there is work for. An operation keeps itself alive from push() until it has
/// ended.
/// Threads: any.
class IoBacklog {
 public:
  /// `turn`: how many pieces of an operation go before another's turn comes.
  explicit IoBacklog(std::size_t turn) : queue_(turn) {}

  void push(const std::shared_ptr<RunningOperation>& operation);

  /// Appends up to `room` pieces to `out`. With `block`, it first waits until
  /// there is an operation or the backlog is closed. False once it is closed
  /// and empty, and nothing was appended.
  bool take(std::size_t room, bool block, std::vector<RunningPiece>& out);

  /// As IoQueue::cancel().
  bool cancel(RunningOperation& operation);

  /// As IoQueue::stats(). `workers`: the counters of all workers.
  IoQueueStats stats(std::span<const IoCounters* const> workers) const;

  /// A worker calls this before a poll that blocks while it has room for more.
  /// False if there is work already; otherwise push() will wake the worker.
  bool announce_poll(Wakeable& worker);
  void end_poll(Wakeable& worker);

  void close();

 private:
  void remove(RunningOperation* operation);
  /// Wakes one worker, if one waits. It unlocks first, since the worker would
  /// wait for the lock at once.
  void call_worker(std::unique_lock<std::mutex>& lock);

  IoCounters counters_;  ///< For what ends without a worker.
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  FairQueue<RunningOperation> queue_;  ///< A share is a piece.
  std::uint64_t pushed_ = 0;           ///< Operations, ever.
  std::uint64_t pushed_bytes_ = 0;
  std::vector<Wakeable*> polling_;
  int idle_ = 0;
  bool closed_ = false;
};

}  // namespace torch_ext
