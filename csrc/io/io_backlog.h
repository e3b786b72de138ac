#pragma once

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "io_operation.h"

namespace torch_ext {

class IoWorker;

/// Operations in a row. Allocates nothing, so that the order can be changed
/// where no error can be reported.
class OperationList {
 public:
  bool empty() const { return first_ == nullptr; }
  RunningOperation* front() const { return first_; }
  void push_back(RunningOperation* operation);
  void remove(RunningOperation* operation);

 private:
  RunningOperation* first_ = nullptr;
  RunningOperation* last_ = nullptr;
};

/// Operations of one priority: a line for each caller, shared by those whose
/// numbers are equal modulo kLines. Lines take turns. A turn ends with the
/// remove() of the operation that has had pieces in it. Allocates nothing.
class CallerLines {
 public:
  bool empty() const { return waiting_ == 0; }
  /// The operation that has the next piece. There must be one.
  RunningOperation* front();
  /// front() was given a piece; returns how many that are in this turn.
  std::size_t count_piece() { return ++pieces_; }
  void push_back(RunningOperation* operation);
  void remove(RunningOperation* operation);

 private:
  static constexpr std::size_t kLines = 64;

  static std::size_t line_of(const RunningOperation& operation);

  std::array<OperationList, kLines> lines_;
  std::uint64_t waiting_ = 0;  ///< Bit i: line i is not empty.
  std::size_t current_ = 0;    ///< The line whose turn it is.
  std::size_t pieces_ = 0;     ///< Of the first in that line, in this turn.
};

/// Operations with pieces that no worker has taken yet, in the order that
/// IoQueue promises, and the workers that look for some.
class IoBacklog {
 public:
  /// `turn`: pieces of an operation after which it is another's turn.
  explicit IoBacklog(std::size_t turn) : turn_(turn) {}

  void push(const std::shared_ptr<RunningOperation>& operation);

  /// Up to `room` pieces, appended to `out`. With `block`, waits until there
  /// is one or the backlog is closed; false once it is closed and empty.
  bool take(std::size_t room, bool block, std::vector<RunningPiece>& out);

  /// As IoQueue::cancel.
  bool cancel(RunningOperation& operation);

  /// As IoQueue::stats(); `workers` are all there are.
  IoQueueStats stats(std::span<const std::unique_ptr<IoWorker>> workers) const;

  /// To be called before a poll that blocks while there is room for more:
  /// false if there is work already. push() will wake the worker's engine.
  bool announce_poll(IoWorker& worker);
  void end_poll(IoWorker& worker);

  void close();

 private:
  static constexpr std::size_t kClasses =
      static_cast<std::size_t>(IoPriority::kWriteBack) + 1;
  struct Class {
    CallerLines operations;
    std::size_t passed_over = 0;  ///< Pieces of others that it waited for.
  };

  Class& class_of(const RunningOperation& operation);
  Class& next_class();
  void cut_one(Class& from, std::vector<RunningPiece>& out);
  void remove(RunningOperation* operation);
  /// Unlocks before it calls one.
  void call_worker(std::unique_lock<std::mutex>& lock);

  const std::size_t turn_;
  IoCounters counters_;  ///< Of what ends here, with no worker's help.
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::array<Class, kClasses> classes_;  ///< Most urgent first.
  std::size_t queued_ = 0;               ///< Operations in all of them.
  std::uint64_t pushed_ = 0;             ///< Operations, ever.
  std::uint64_t pushed_bytes_ = 0;
  std::vector<IoWorker*> polling_;
  int idle_ = 0;
  bool closed_ = false;
};

}  // namespace torch_ext
