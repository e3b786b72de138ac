#include "io_backlog.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <exception>

#include "io_worker.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

// One of so many pieces is for each less urgent class that waits.
constexpr std::size_t kShare = 16;

std::exception_ptr canceled(const IoOperation& io) {
  try {
    throw IoError({.op = name_of(io.op),
                   .path = io.file->path(),
                   .offset = io.offset,
                   .length = io.bytes.size(),
                   .error = ECANCELED});
  } catch (...) {
    // Whatever came out, were it bad_alloc, the operation must hear of it.
    return std::current_exception();
  }
}

}  // namespace

void OperationList::push_back(RunningOperation* operation) {
  operation->previous_ = last_;
  operation->next_ = nullptr;
  (last_ != nullptr ? last_->next_ : first_) = operation;
  last_ = operation;
}

void OperationList::remove(RunningOperation* operation) {
  RunningOperation* previous = operation->previous_;
  RunningOperation* next = operation->next_;
  (previous != nullptr ? previous->next_ : first_) = next;
  (next != nullptr ? next->previous_ : last_) = previous;
}

std::size_t CallerLines::line_of(const RunningOperation& operation) {
  return operation.io().caller % kLines;
}

RunningOperation* CallerLines::front() {
  // An empty line has no turn. In the middle of a turn the line is not empty.
  const int empty_lines =
      std::countr_zero(std::rotr(waiting_, static_cast<int>(current_)));
  current_ = (current_ + static_cast<std::size_t>(empty_lines)) % kLines;
  return lines_[current_].front();
}

void CallerLines::push_back(RunningOperation* operation) {
  const std::size_t line = line_of(*operation);
  lines_[line].push_back(operation);
  waiting_ |= std::uint64_t{1} << line;
}

void CallerLines::remove(RunningOperation* operation) {
  if (pieces_ > 0 && operation == lines_[current_].front()) {
    pieces_ = 0;
    current_ = (current_ + 1) % kLines;
  }
  const std::size_t line = line_of(*operation);
  lines_[line].remove(operation);
  if (lines_[line].empty()) waiting_ &= ~(std::uint64_t{1} << line);
}

IoBacklog::Class& IoBacklog::class_of(const RunningOperation& operation) {
  return classes_[static_cast<std::size_t>(operation.io().priority)];
}

void IoBacklog::push(const std::shared_ptr<RunningOperation>& operation) {
  operation->backlog_ = this;
  std::unique_lock lock(mutex_);
  // From here on it lives until it has ended.
  operation->self_ = operation;
  operation->queued_ = true;
  class_of(*operation).operations.push_back(operation.get());
  ++pushed_;
  pushed_bytes_ += operation->io().bytes.size();
  ++queued_;
  call_worker(lock);
}

void IoBacklog::remove(RunningOperation* operation) {
  class_of(*operation).operations.remove(operation);
  operation->queued_ = false;
  --queued_;
}

/// The most urgent one that waits, unless one below has waited too long.
IoBacklog::Class& IoBacklog::next_class() {
  Class* next = nullptr;
  bool waited_too_long = false;
  for (Class& each : classes_) {
    if (each.operations.empty()) continue;
    if (next == nullptr) {
      next = &each;
    } else if (++each.passed_over >= kShare && !waited_too_long) {
      waited_too_long = true;
      next = &each;
    }
  }
  next->passed_over = 0;
  return *next;
}

void IoBacklog::cut_one(Class& from, std::vector<RunningPiece>& out) {
  RunningOperation* operation = from.operations.front();
  out.push_back({operation, operation->cut()});
  const std::size_t pieces = from.operations.count_piece();
  if (operation->all_cut()) {
    remove(operation);
  } else if (pieces == turn_) {
    from.operations.remove(operation);
    from.operations.push_back(operation);
  }
}

bool IoBacklog::take(std::size_t room, bool block,
                     std::vector<RunningPiece>& out) {
  std::vector<RunningOperation*> ended;
  bool open = true;
  {
    std::unique_lock lock(mutex_);
    if (block) {
      ++idle_;
      changed_.wait(lock, [this] { return queued_ > 0 || closed_; });
      --idle_;
    }
    while (room > 0 && queued_ > 0) {
      Class& next = next_class();
      RunningOperation* operation = next.operations.front();
      if (!operation->failed() && !operation->all_cut()) {
        cut_one(next, out);
        --room;
        continue;
      }
      remove(operation);
      if (operation->end_pieces(operation->abandon())) {
        ended.push_back(operation);
      }
    }
    open = !closed_ || queued_ > 0;
    if (queued_ > 0) call_worker(lock);
  }
  for (RunningOperation* operation : ended) operation->finish(counters_);
  return open || !out.empty();
}

bool IoBacklog::cancel(RunningOperation& operation) {
  if (operation.backlog_ != this) return false;
  {
    std::lock_guard lock(mutex_);
    const bool something_left = operation.queued_ && !operation.all_cut();
    if (!something_left || operation.failed()) return false;
    remove(&operation);
  }
  // It cannot end before its pieces that are not cut.
  const bool first = operation.fail(canceled(operation.io()));
  if (operation.end_pieces(operation.abandon())) operation.finish(counters_);
  return first;
}

IoQueueStats IoBacklog::stats(
    std::span<const std::unique_ptr<IoWorker>> workers) const {
  IoQueueStats stats;
  // While nothing can be pushed, no more can have ended than was.
  std::lock_guard lock(mutex_);
  std::uint64_t running = pushed_;
  stats.bytes = pushed_bytes_;
  const auto add = [&](const IoCounters& counters) {
    running -= counters.operations_ended;
    stats.bytes -= counters.bytes_ended;
    stats.requests += counters.requests;
    stats.retries += counters.retries;
    stats.short_transfers += counters.short_transfers;
  };
  add(counters_);
  for (const auto& worker : workers) add(worker->counters());
  stats.operations_queued = queued_;
  stats.operations_in_flight = running - queued_;
  return stats;
}

bool IoBacklog::announce_poll(IoWorker& worker) {
  std::lock_guard lock(mutex_);
  if (queued_ > 0) return false;
  polling_.push_back(&worker);
  return true;
}

void IoBacklog::end_poll(IoWorker& worker) {
  std::lock_guard lock(mutex_);
  polling_.erase(std::remove(polling_.begin(), polling_.end(), &worker),
                 polling_.end());
}

// Unlocks first: who wakes would wait for the lock at once.
void IoBacklog::call_worker(std::unique_lock<std::mutex>& lock) {
  if (idle_ > 0) {
    lock.unlock();
    changed_.notify_one();
  } else if (!polling_.empty()) {
    IoWorker* worker = polling_.back();
    polling_.pop_back();
    lock.unlock();
    worker->wake();
  }
}

void IoBacklog::close() {
  std::lock_guard lock(mutex_);
  closed_ = true;
  changed_.notify_all();
}

}  // namespace torch_ext
