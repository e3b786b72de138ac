#include "io_operation.h"

#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "base/mutex.h"

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
  if (operation.priority < IoPriority::kNow ||
      operation.priority > IoPriority::kWriteBack) {
    throw std::invalid_argument("I/O operation of an unknown priority");
  }
  return operation;
}

}  // namespace

const char* name_of(IoRequest::Op op) {
  switch (op) {
    case IoRequest::Op::kRead:
      return "pread";
    case IoRequest::Op::kWrite:
      return "pwrite";
    case IoRequest::Op::kSync:
      return "fsync";
  }
  return "io";
}

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

bool RunningOperation::fail(std::exception_ptr failure) {
  const MutexLock lock(mutex);
  if (error == nullptr) error = std::move(failure);
  return !failed_.exchange(true);
}

bool RunningOperation::end_pieces(std::size_t count) {
  return open_.fetch_sub(count) == count;
}

void RunningOperation::finish(IoCounters& counters) {
  // All pieces have ended, so no other thread is left to lock out.
  const std::shared_ptr<RunningOperation> self = std::move(self_);
  // Whoever learns of the end can count on the file being let go of.
  io_.file = nullptr;
  if (io_.on_done) io_.on_done(error);
  // Whoever learns of the end finds it counted.
  IoCounters::add(counters.bytes_ended, io_.bytes.size());
  IoCounters::add(counters.operations_ended, 1);
  // A ticket that is kept keeps no file open. What the callback holds is gone
  // before the ticket is done.
  io_ = {};
  State::finish(error);
}

}  // namespace torch_ext
