#include "io_operation.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

#include "io_worker.h"

namespace torch_ext {
namespace {

const IoOperation& checked(const IoOperation& operation) {
  if (operation.file == nullptr) {
    throw std::invalid_argument("I/O operation without a file");
  }
  constexpr std::uint64_t kMax = std::numeric_limits<std::int64_t>::max();
  if (operation.offset > kMax ||
      operation.bytes.size() > kMax - operation.offset) {
    throw std::invalid_argument("I/O operation beyond 2^63 - 1: offset=" +
                                std::to_string(operation.offset) + " length=" +
                                std::to_string(operation.bytes.size()));
  }
  return operation;
}

}  // namespace

RunningOperation::RunningOperation(IoOperation operation,
                                   std::uint64_t block_size)
    : io_(std::move(operation)),
      cutter_(checked(io_), block_size),
      total_(io_.op == IoRequest::Op::kSync ? 1 : cutter_.count()),
      open_(total_) {
  if (io_.checksums.empty()) return;
  const std::uint64_t blocks = (io_.bytes.size() + block_size - 1) / block_size;
  if (io_.checksums.size() != blocks || !cutter_.uniform() ||
      total_ != blocks) {
    throw std::invalid_argument(
        "I/O operation with checksums: one per block and aligned memory, "
        "offset and length are needed; got " +
        std::to_string(io_.checksums.size()) + " for " +
        std::to_string(blocks) +
        " blocks, offset=" + std::to_string(io_.offset) +
        " length=" + std::to_string(io_.bytes.size()));
  }
}

Piece RunningOperation::cut() {
  ++cut_;
  if (io_.op != IoRequest::Op::kSync) return cutter_.next();
  Piece piece;
  piece.fd = io_.file->fd();
  return piece;
}

std::size_t RunningOperation::abandon() {
  return total_ - std::exchange(cut_, total_);
}

void RunningOperation::fail(std::exception_ptr error) {
  std::lock_guard lock(mutex_);
  if (error_ == nullptr) error_ = std::move(error);
  failed_ = true;
}

bool RunningOperation::end_pieces(std::size_t count) {
  return open_.fetch_sub(count) == count;
}

void RunningOperation::finish() {
  // All pieces have ended: no other thread is left to lock out.
  if (io_.on_done) io_.on_done(error_);
  // What the callback holds is gone before the ticket is done.
  io_.on_done = nullptr;
  source_.finish(error_);
}

void IoBacklog::push(std::unique_ptr<RunningOperation> operation) {
  std::unique_lock lock(mutex_);
  operations_.push_back(operation.get());
  // From here on the worker that ends the operation deletes it.
  static_cast<void>(operation.release());
  call_worker(lock);
}

bool IoBacklog::take(std::size_t room, bool block,
                     std::vector<RunningPiece>& out) {
  std::vector<RunningOperation*> ended;
  bool open = true;
  {
    std::unique_lock lock(mutex_);
    if (block) {
      ++idle_;
      changed_.wait(lock, [this] { return !operations_.empty() || closed_; });
      --idle_;
    }
    while (room > 0 && !operations_.empty()) {
      RunningOperation* operation = operations_.front();
      bool last = false;
      if (operation->failed() || operation->all_cut()) {
        last = operation->end_pieces(operation->abandon());
      }
      if (operation->all_cut()) {
        operations_.pop_front();
        if (last) ended.push_back(operation);
        continue;
      }
      out.push_back({operation, operation->cut()});
      --room;
      if (operation->all_cut()) operations_.pop_front();
    }
    open = !closed_ || !operations_.empty();
    if (!operations_.empty()) call_worker(lock);
  }
  for (RunningOperation* operation : ended) {
    operation->finish();
    delete operation;
  }
  return open || !out.empty();
}

bool IoBacklog::announce_poll(IoWorker& worker) {
  std::lock_guard lock(mutex_);
  if (!operations_.empty()) return false;
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
