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

/// Whoever polls for completions and shall look for new pieces too.
class Wakeable {
 public:
  virtual void wake() noexcept = 0;

 protected:
  ~Wakeable() = default;
};

/// Operations with pieces that no worker has taken yet, in the order that
/// IoQueue promises, and the workers that look for some.
class IoBacklog {
 public:
  /// `turn`: pieces of an operation after which it is another's turn.
  explicit IoBacklog(std::size_t turn) : queue_(turn) {}

  void push(const std::shared_ptr<RunningOperation>& operation);

  /// Up to `room` pieces, appended to `out`. With `block`, waits until there
  /// is one or the backlog is closed; false once it is closed and empty.
  bool take(std::size_t room, bool block, std::vector<RunningPiece>& out);

  /// As IoQueue::cancel.
  bool cancel(RunningOperation& operation);

  /// As IoQueue::stats(); `workers` are the counters of all there are.
  IoQueueStats stats(std::span<const IoCounters* const> workers) const;

  /// To be called before a poll that blocks while there is room for more:
  /// false if there is work already. push() will wake whoever polls.
  bool announce_poll(Wakeable& worker);
  void end_poll(Wakeable& worker);

  void close();

 private:
  void remove(RunningOperation* operation);
  /// Unlocks before it calls one.
  void call_worker(std::unique_lock<std::mutex>& lock);

  IoCounters counters_;  ///< Of what ends here, with no worker's help.
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
