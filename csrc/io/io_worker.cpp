// An I/O thread goes round and round. A piece passes through a round like this:
//
// 1. take_pieces() gets pieces from the backlog, as many as the engine has room
//    for. Each gets a slot. With nothing to do, the thread sleeps here.
// 2. take_due() makes pieces ready again whose pause after a refusal is over.
// 3. submit_ready() hashes writes and gives the engine a batch of requests.
// 4. end_arrived() compares the checksums of pieces that an earlier round
//    reaped, and ends them. It runs after the submitting, so that the drive
//    does not wait for it.
// 5. reap() sleeps in the engine until requests have ended, or until a push to
//    the backlog wakes it. complete() then sends each piece on: arrived, ready
//    again (a short transfer), later (a transient error), or failed.
//
// There are twice as many slots as requests in flight, since pieces that have
// arrived keep theirs until step 4. Without overlap_events, a round takes
// pieces only when all earlier ones have ended. If polls fail for good, the
// engine is given up: this thread then answers every piece with that error.

#include "io_worker.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <string>
#include <utility>

#include "base/mutex.h"
#include "base/thread.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/checksum.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

using std::chrono::microseconds;
using Clock = std::chrono::steady_clock;

// How many transfers in a row may end without a byte and without an error.
constexpr int kMaxIdleTransfers = 8;

// How many polls in a row may throw before the engine is given up. With the
// pauses below, that is after about a second.
constexpr int kMaxFailedPolls = 100;

// How many bytes of writes are hashed before they are submitted, while the
// device has less than that to do.
constexpr std::uint64_t kHashAhead = std::uint64_t{256} << 10;

// While every slot is in flight, the thread sleeps until a quarter of them, or
// so many bytes, have ended. The device stays busy, and small pieces share the
// cost of a round. A slow device is not waited for beyond kReapPatience.
constexpr std::size_t kReapTogether = std::size_t{512} << 10;
constexpr std::chrono::nanoseconds kReapPatience = std::chrono::milliseconds(1);

/// The pause before the next attempt, after so many. It is short, since new
/// pieces may wait for its end.
std::chrono::nanoseconds pause_after(int attempts) {
  if (attempts <= 1) return {};
  return std::min(microseconds(50) * (1 << std::min(attempts, 8)),
                  microseconds(10000));
}

bool is_transient(int error) {
  // io_uring reports ECANCELED for a request that it has not carried out.
  return error == EINTR || error == EAGAIN || error == ENOMEM ||
         error == ECANCELED;
}

bool is_hashed(const IoOperation& io, IoRequest::Op op) {
  return io.op == op && !io.checksums.empty();
}

}  // namespace

IoWorker::IoWorker(IoBacklog& backlog, const AioConfig& config,
                   std::unique_ptr<IoEngine> engine,
                   std::chrono::nanoseconds patience)
    : backlog_(backlog),
      config_(config),
      patience_(patience),
      engine_(std::move(engine)),
      to_wake_(engine_.get()),
      depth_(engine_->depth()) {
  // As many pieces may have arrived as are in flight again.
  slots_.resize(2 * depth_);
  for (auto* list : {&free_, &ready_, &later_, &arrived_}) {
    list->reserve(slots_.size());
  }
  taken_.reserve(depth_);
  batch_.reserve(depth_);
  completions_.resize(depth_);
  for (std::size_t i = slots_.size(); i > 0; --i) free_.push_back(i - 1);
}

void IoWorker::start() {
  thread_ = start_thread("torch_ext io", [this] { run(); });
}

void IoWorker::join() {
  if (thread_.joinable()) thread_.join();
}

void IoWorker::wake() noexcept {
  const MutexLock lock(wake_mutex_);
  if (to_wake_ != nullptr) to_wake_->wake();
}

void IoWorker::run() {
  while (take_pieces()) {
    if (engine_ == nullptr) {
      refuse_pieces();
      continue;
    }
    take_due();
    submit_ready();
    end_arrived();
    reap();
  }
}

bool IoWorker::take_pieces() {
  if (room() == 0 || (!config_.overlap_events && busy() > 0)) return true;
  taken_.clear();
  const bool open = backlog_.take(room(), busy() == 0, taken_);
  for (const RunningPiece& piece : taken_) {
    const std::size_t slot = free_.back();
    free_.pop_back();
    slots_[slot] = piece;
    ready_.push_back(slot);
  }
  return open || busy() > 0;
}

/// Ends the pieces whose operations have failed. None of `slots` is in flight.
void IoWorker::drop_failed(std::vector<std::size_t>& slots) {
  std::erase_if(slots, [&](std::size_t slot) {
    if (!slots_[slot].operation->failed()) return false;
    end(slot);
    return true;
  });
}

/// Adds to the ready pieces those whose pause is over.
void IoWorker::take_due() {
  drop_failed(ready_);
  drop_failed(later_);
  if (later_.empty()) return;
  const Clock::time_point now = Clock::now();
  std::erase_if(later_, [&](std::size_t slot) {
    if (slots_[slot].not_before > now) return false;
    ready_.push_back(slot);
    return true;
  });
}

void IoWorker::submit_ready() {
  std::size_t submitted = 0;
  while (submitted < ready_.size()) {
    batch_.clear();
    // Hashing is quicker than drives write. While one batch is hashed, as much
    // in flight keeps the device busy.
    const std::uint64_t hash_ahead = std::max(kHashAhead, bytes_in_flight_);
    std::uint64_t hashed = 0;
    while (submitted + batch_.size() < ready_.size()) {
      const std::size_t slot = ready_[submitted + batch_.size()];
      batch_.push_back(request_of(slot));
      if (is_hashed(slots_[slot].operation->io(), IoRequest::Op::kWrite)) {
        hashed += batch_.back().length;
      }
      if (config_.single_submit || hashed >= hash_ahead) break;
    }
    const std::size_t accepted = engine_->submit(batch_);
    in_flight_ += accepted;
    for (std::size_t i = 0; i < accepted; ++i)
      bytes_in_flight_ += batch_[i].length;
    IoCounters::add(counters_.requests, accepted);
    submitted += accepted;
    if (accepted < batch_.size()) break;
  }
  ready_.erase(ready_.begin(),
               ready_.begin() + static_cast<std::ptrdiff_t>(submitted));
  if (in_flight_ > 0) return;
  // Others have used up what the kernel has for everybody.
  for (const std::size_t slot : ready_) {
    try_again(slot, EAGAIN, "the kernel took no request for seconds");
  }
  ready_.clear();
}

IoRequest IoWorker::request_of(std::size_t slot) {
  const RunningPiece& running = slots_[slot];
  const IoOperation& io = running.operation->io();
  const Piece& piece = running.piece;
  if (is_hashed(io, IoRequest::Op::kWrite)) {
    // This is done again after a refusal: the checksum must be that of the
    // bytes that the kernel is given.
    io.checksums[piece.block] = checksum({piece.data, piece.length});
  }
  return {.op = io.op,
          .fd = piece.fd,
          .offset = piece.offset + running.moved,
          .data = piece.data + running.moved,
          .length = piece.length - running.moved,
          .cookie = slot};
}

/// Ends the pieces whose bytes have moved. This comes after the next pieces
/// were submitted, so that the device does not wait for checksums and
/// callbacks.
void IoWorker::end_arrived() {
  for (const std::size_t slot : arrived_) {
    if (matches_checksum(slots_[slot])) {
      end(slot);
    } else {
      fail(slot, EIO, "checksum mismatch: these are not the bytes written");
    }
  }
  arrived_.clear();
}

void IoWorker::reap() {
  if (in_flight_ == 0) {
    if (!later_.empty()) std::this_thread::sleep_for(until_due());
    return;
  }
  std::size_t at_least = config_.overlap_events ? 1 : in_flight_;
  std::chrono::nanoseconds patience = until_due();
  const bool wants_more =
      config_.overlap_events && room() > 0 && ready_.empty();
  const bool announced = wants_more && backlog_.announce_poll(*this);
  if (wants_more && !announced) at_least = 0;
  if (config_.overlap_events && in_flight_ == depth_) {
    at_least = reap_together();
    if (at_least > 1) patience = std::min(patience, kReapPatience);
  }
  const std::size_t count = poll(at_least, patience);
  if (announced) backlog_.end_poll(*this);
  for (std::size_t i = 0; i < count; ++i) complete(completions_[i]);
}

/// How many completions are worth a round while all slots are in flight.
std::size_t IoWorker::reap_together() const {
  const std::size_t length =
      std::max<std::size_t>(1, bytes_in_flight_ / in_flight_);
  return std::clamp<std::size_t>(kReapTogether / length, 1,
                                 std::max<std::size_t>(1, in_flight_ / 4));
}

std::size_t IoWorker::poll(std::size_t at_least,
                           std::chrono::nanoseconds patience) {
  try {
    const std::size_t count = engine_->poll(completions_, at_least, patience);
    failed_polls_ = 0;
    return count;
  } catch (...) {
    // Nothing is lost if a later poll succeeds.
    if (++failed_polls_ < kMaxFailedPolls) {
      std::this_thread::sleep_for(pause_after(failed_polls_));
    } else {
      give_up_engine(std::current_exception());
    }
    return 0;
  }
}

/// No completion can be had any more. Without its engine, this worker ends what
/// it has, and all that comes later, with an error.
void IoWorker::give_up_engine(std::exception_ptr error) {
  {
    const MutexLock lock(wake_mutex_);
    to_wake_ = nullptr;
  }
  // This waits until the kernel is done with the requests in flight. Only then
  // may their memory go back to its owners.
  engine_.reset();
  engine_error_ = std::move(error);
  in_flight_ = 0;
  bytes_in_flight_ = 0;
  later_.clear();
  refuse_pieces();
}

/// Ends all pieces with the error that ended the engine.
void IoWorker::refuse_pieces() {
  int error = EIO;
  std::string why = "the I/O engine is lost";
  try {
    std::rethrow_exception(engine_error_);
  } catch (const IoError& failed) {
    error = failed.error();
    why += std::string(": ") + failed.what();
  } catch (...) {
  }
  ready_.clear();
  for (std::size_t slot = 0; slot < slots_.size(); ++slot) {
    if (slots_[slot].operation != nullptr) fail(slot, error, why);
  }
}

void IoWorker::complete(const IoCompletion& completion) {
  const std::size_t slot = completion.cookie;
  if (slot >= slots_.size() || slots_[slot].operation == nullptr) return;
  --in_flight_;
  bytes_in_flight_ -= slots_[slot].piece.length - slots_[slot].moved;
  const bool sync = slots_[slot].operation->io().op == IoRequest::Op::kSync;
  if (completion.result < 0) {
    const auto error = static_cast<int>(-completion.result);
    // A failed sync is final: the kernel has dropped the pages, and the next
    // sync would succeed without them.
    if (is_transient(error) && !sync) {
      try_again(slot, error, "");
    } else {
      fail(slot, error, "");
    }
  } else if (sync) {
    end(slot);
  } else {
    advance(slot, static_cast<std::size_t>(completion.result));
  }
}

void IoWorker::advance(std::size_t slot, std::size_t bytes) {
  RunningPiece& running = slots_[slot];
  const IoOperation& io = running.operation->io();
  const std::size_t reached = running.moved + bytes;
  if (reached >= running.piece.length) {
    arrived_.push_back(slot);
    return;
  }
  IoCounters::add(counters_.short_transfers, 1);
  const std::size_t aligned = align_down(reached, running.piece.unit);
  if (aligned > running.moved) {
    running.moved = aligned;
    running.attempts = 0;
    running.idle_transfers = 0;
    ready_.push_back(slot);
    return;
  }
  std::uint64_t size = 0;
  try {
    size = io.file->size();
  } catch (const IoError& error) {
    fail(slot, error.error(), "asking for the file's size");
    return;
  }
  const std::uint64_t end_of_data = running.piece.offset + reached;
  if (io.op == IoRequest::Op::kRead && size <= end_of_data) {
    fail(slot, EIO, "the file ends at byte " + std::to_string(size));
  } else if (++running.idle_transfers > kMaxIdleTransfers) {
    fail(slot, EIO, "short transfers without progress");
  } else {
    try_again(slot, EIO, "short transfers without progress");
  }
}

bool IoWorker::matches_checksum(const RunningPiece& running) const {
  const IoOperation& io = running.operation->io();
  if (!is_hashed(io, IoRequest::Op::kRead)) return true;
  const Piece& piece = running.piece;
  return io.checksums[piece.block] == checksum({piece.data, piece.length});
}

/// Tries the piece again after a pause, in which others go on. Once the
/// patience is used up, the piece fails with `error` and `detail`.
void IoWorker::try_again(std::size_t slot, int error, const char* detail) {
  RunningPiece& running = slots_[slot];
  const Clock::time_point now = Clock::now();
  if (running.attempts++ == 0) running.not_after = now + patience_;
  if (now > running.not_after) {
    fail(slot, error, detail);
    return;
  }
  IoCounters::add(counters_.retries, 1);
  running.not_before = now + pause_after(running.attempts);
  later_.push_back(slot);
}

/// The time until a piece is tried again; nanoseconds::max() if there is none.
std::chrono::nanoseconds IoWorker::until_due() const {
  if (later_.empty()) return std::chrono::nanoseconds::max();
  Clock::time_point first = Clock::time_point::max();
  for (const std::size_t slot : later_) {
    first = std::min(first, slots_[slot].not_before);
  }
  return std::max(first - Clock::now(), Clock::duration(0));
}

void IoWorker::fail(std::size_t slot, int error, const std::string& detail) {
  const RunningPiece& running = slots_[slot];
  const IoOperation& io = running.operation->io();
  try {
    throw IoError({.op = name_of(io.op),
                   .path = io.file->path(),
                   .offset = running.piece.offset + running.moved,
                   .length = running.piece.length - running.moved,
                   .error = error,
                   .detail = detail});
  } catch (...) {
    // The operation must hear of whatever came out, even of a bad_alloc.
    running.operation->fail(std::current_exception());
  }
  end(slot);
}

void IoWorker::end(std::size_t slot) {
  RunningOperation* operation = std::exchange(slots_[slot].operation, nullptr);
  free_.push_back(slot);
  if (operation->end_pieces(1)) operation->finish(counters_);
}

}  // namespace torch_ext
