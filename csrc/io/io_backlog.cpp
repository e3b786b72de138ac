#include "io_backlog.h"

#include <algorithm>
#include <cerrno>
#include <exception>

#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

std::exception_ptr canceled(const IoOperation& io) {
  try {
    throw IoError({.op = name_of(io.op),
                   .path = io.file->path(),
                   .offset = io.offset,
                   .length = io.bytes.size(),
                   .error = ECANCELED});
  } catch (...) {
    // The operation must hear of whatever came out, even of a bad_alloc.
    return std::current_exception();
  }
}

}  // namespace

void IoBacklog::push(const std::shared_ptr<RunningOperation>& operation) {
  operation->backlog_ = this;
  MutexLock lock(mutex_);
  // From here on the operation lives until it has ended.
  operation->self_ = operation;
  operation->queued_ = true;
  const IoOperation& io = operation->io();
  queue_.push(operation.get(), io.priority, io.caller);
  ++pushed_;
  pushed_bytes_ += io.bytes.size();
  Wakeable* const next = next_to_wake();
  lock.unlock();
  if (next != nullptr) next->wake();
}

void IoBacklog::remove(RunningOperation* operation) {
  queue_.remove(operation);
  operation->queued_ = false;
}

bool IoBacklog::take(std::size_t room, bool block,
                     std::vector<RunningPiece>& out) {
  std::vector<RunningOperation*> ended;
  bool open = true;
  Wakeable* next = nullptr;
  {
    MutexLock lock(mutex_);
    if (block) {
      ++sleepers_.count;
      while (queue_.empty() && !closed_) sleepers_.changed.wait(lock);
      --sleepers_.count;
    }
    while (room > 0 && !queue_.empty()) {
      RunningOperation* operation = queue_.next();
      if (!operation->failed() && !operation->all_cut()) {
        out.push_back({operation, operation->cut()});
        queue_.served(operation);
        if (operation->all_cut()) remove(operation);
        --room;
        continue;
      }
      remove(operation);
      if (operation->end_pieces(operation->abandon())) {
        ended.push_back(operation);
      }
    }
    open = !closed_ || !queue_.empty();
    if (!queue_.empty()) next = next_to_wake();
  }
  if (next != nullptr) next->wake();
  for (RunningOperation* operation : ended) operation->finish(counters_);
  return open || !out.empty();
}

bool IoBacklog::cancel(RunningOperation& operation) {
  if (operation.backlog_ != this) return false;
  {
    const MutexLock lock(mutex_);
    if (!waits(operation)) return false;
    remove(&operation);
  }
  // The operation cannot end yet: some of its pieces are not cut.
  const bool first = operation.fail(canceled(operation.io()));
  if (operation.end_pieces(operation.abandon())) operation.finish(counters_);
  return first;
}

// Whoever polls need not be woken: the operation is in the queue already.
bool IoBacklog::promote(RunningOperation& operation, IoPriority priority) {
  if (operation.backlog_ != this) return false;
  const MutexLock lock(mutex_);
  if (!waits(operation)) return false;
  queue_.remove(&operation);
  queue_.push(&operation, priority, operation.io().caller);
  return true;
}

bool IoBacklog::waits(const RunningOperation& operation) const {
  return operation.queued_ && !operation.all_cut() && !operation.failed();
}

IoQueueStats IoBacklog::stats(
    std::span<const IoCounters* const> workers) const {
  IoQueueStats stats;
  // Nothing can be pushed while the lock is held. So no more can have ended
  // than was pushed.
  const MutexLock lock(mutex_);
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
  for (const IoCounters* worker : workers) add(*worker);
  stats.operations_queued = queue_.size();
  stats.operations_in_flight = running - queue_.size();
  return stats;
}

bool IoBacklog::announce_poll(Wakeable& worker) {
  const MutexLock lock(mutex_);
  if (!queue_.empty()) return false;
  polling_.push_back(&worker);
  return true;
}

void IoBacklog::end_poll(Wakeable& worker) {
  const MutexLock lock(mutex_);
  polling_.erase(std::remove(polling_.begin(), polling_.end(), &worker),
                 polling_.end());
}

Wakeable* IoBacklog::next_to_wake() {
  if (sleepers_.count > 0) return &sleepers_;
  if (polling_.empty()) return nullptr;
  Wakeable* const worker = polling_.back();
  polling_.pop_back();
  return worker;
}

void IoBacklog::close() {
  const MutexLock lock(mutex_);
  closed_ = true;
  sleepers_.changed.notify_all();
}

}  // namespace torch_ext
