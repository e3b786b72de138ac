#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/mutex.h"
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

  /// As IoQueue::promote().
  bool promote(RunningOperation& operation, IoPriority priority);

  /// As IoQueue::stats(). `workers`: the counters of all workers.
  IoQueueStats stats(std::span<const IoCounters* const> workers) const;

  /// A worker calls this before a poll that blocks while it has room for more.
  /// False if there is work already; otherwise push() will wake the worker.
  bool announce_poll(Wakeable& worker);
  void end_poll(Wakeable& worker);

  void close();

 private:
  /// The workers that wait in take().
  class Sleepers final : public Wakeable {
   public:
    void wake() noexcept override { changed.notify_one(); }
    CondVar changed;
    int count = 0;
  };

  void remove(RunningOperation* operation) REQUIRES(mutex_);
  /// Whether some of its pieces are still to be taken.
  bool waits(const RunningOperation& operation) const REQUIRES(mutex_);
  /// The worker to wake, or null if nobody waits. Wake it without the lock,
  /// since it would wait for the lock at once.
  Wakeable* next_to_wake() REQUIRES(mutex_);

  IoCounters counters_;  ///< For what ends without a worker.
  mutable Mutex mutex_;
  Sleepers sleepers_ GUARDED_BY(mutex_);
  /// A share is a piece.
  FairQueue<RunningOperation> queue_ GUARDED_BY(mutex_);
  std::uint64_t pushed_ GUARDED_BY(mutex_) = 0;  ///< Operations, ever.
  std::uint64_t pushed_bytes_ GUARDED_BY(mutex_) = 0;
  std::vector<Wakeable*> polling_ GUARDED_BY(mutex_);
  bool closed_ GUARDED_BY(mutex_) = false;
};

}  // namespace torch_ext
