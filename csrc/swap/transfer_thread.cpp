// How an operation passes through:
//
// submit() gives it its place in the target's order. If it must wait, the
// leave() of another operation brings it back. If it needs no copy it goes
// direct: the calling thread submits the I/O, and an I/O thread ends the
// operation. Every other operation is handed to this thread. It cuts the
// operation into chunks, and never waits for one of them:
//
// - A write's chunk takes a buffer, the device copies into it, it is written,
//   and it gives the buffer back.
// - A read's chunk takes a buffer, is read into it, the device copies out of
//   it, and it gives the buffer back.
// - A chunk in place is written from, or read into, the tensor's own memory.
//
// The loop in run() takes in new operations and chunks whose I/O has ended. It
// starts chunks while there are buffers. Then it asks the device which copies
// have ended. FairQueue says which operation has the next buffer. A quarter of
// the buffers is kept for operations that somebody waits for. An operation
// without a buffer blocks only its own priority.
//
// "Staged" means that the last copy is queued on the device's copy stream. From
// then on the streams keep the order. An operation ends when its last chunk is
// released and, for a write, its target has settled it. Every chunk is released
// exactly once, on error paths too, and only when neither kernel nor device can
// touch its memory any more.

#include "transfer_thread.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/thread.h"

namespace torch_ext {
namespace {

using std::chrono::microseconds;

// A 4 MiB copy over PCIe takes 0.15 ms and more.
constexpr microseconds kShortestNap{10};
constexpr microseconds kLongestNap{200};
constexpr microseconds kStarvedNap{10'000};

}  // namespace

TransferThread::TransferThread(
    BufferPool& pool, std::function<void(const OperationPtr&)> finished,
    std::function<void(std::string)> note)
    : pool_(pool),
      staging_(pool),
      finished_(std::move(finished)),
      note_(std::move(note)) {
  thread_ = start_thread("torch_ext swap", [this] { run(); });
}

TransferThread::~TransferThread() { stop(); }

void TransferThread::submit(OperationPtr operation) {
  {
    const MutexLock lock(mutex_);
    ++unfinished_;
  }
  // From here on, whatever fails is the operation's own error.
  try {
    if (operation->target->enter(operation)) return;
    operation->direct = can_go_direct(*operation);
    if (!operation->direct) operation->target->unprepare();
  } catch (...) {
    operation->error = std::current_exception();
    end(operation);
    return;
  }
  operation->direct ? start_direct(operation) : hand_over(std::move(operation));
}

// Whether all bytes can move in place, and now. The caller must wait neither
// for a file to grow nor for a descriptor.
bool TransferThread::can_go_direct(SwapOperation& operation) const {
  const DeviceBytes& bytes = operation.bytes;
  if (!operation.on_host || bytes.size == 0 || bytes.on_arrival != nullptr) {
    return false;
  }
  SwapTarget& target = *operation.target;
  if (!target.prepare(operation.op(), false)) return false;
  const ChunkShape all =
      target.chunk(bytes.data, 0, bytes.size, pool_.buffer_size());
  return all.in_place && all.length == bytes.size;
}

void TransferThread::hand_over(OperationPtr operation) {
  const MutexLock lock(mutex_);
  new_operations_.push_back(std::move(operation));
  changed_.notify_one();
}

// There is nothing to copy, so the caller submits the I/O, and an I/O thread
// ends the operation. A hand-over between threads costs more than copying 64
// KiB.
void TransferThread::start_direct(const OperationPtr& operation) {
  std::unique_ptr<Chunk> chunk;
  try {
    chunk = std::make_unique<Chunk>();
  } catch (...) {
    operation->error = std::current_exception();
    end(operation);
    return;
  }
  chunk->operation = operation;
  chunk->length = operation->bytes.size;
  chunk->host = {operation->bytes.data, operation->bytes.size};
  operation->in_place = true;
  operation->next = operation->bytes.size;
  operation->open_chunks = 1;
  queue_io(chunk.release());
}

void TransferThread::stop() {
  {
    const MutexLock lock(mutex_);
    stopping_ = true;
    changed_.notify_one();
  }
  if (thread_.joinable()) thread_.join();
}

void TransferThread::run() {
  for (;;) {
    take_inbox();
    bool progress = start_chunks();
    progress |= poll_copies();
    {
      const MutexLock lock(mutex_);
      if (stopping_ && unfinished_ == 0) return;
    }
    sleep(progress);
  }
}

void TransferThread::sleep(bool progress) {
  if (progress) {
    nap_ = kShortestNap;
    return;
  }
  MutexLock lock(mutex_);
  if (unfinished_ == 0) staging_.release();
  const auto called = [this]() REQUIRES(mutex_) {
    return !new_operations_.empty() || ended_io_ != nullptr ||
           (starved_ && finished_count_ != seen_finished_) ||
           (stopping_ && unfinished_ == 0);
  };
  awaits_end_ = starved_;
  if (!copying_.empty()) {
    // Events have no file descriptor to wait on, so ask again soon.
    changed_.wait_for(lock, nap_, called);
    nap_ = std::min(nap_ * 2, kLongestNap);
  } else {
    nap_ = kShortestNap;
    if (starved_) {
      // Nobody tells when a caller gives up and gives something back.
      changed_.wait_for(lock, kStarvedNap, called);
    } else {
      changed_.wait(lock, called);
    }
  }
  awaits_end_ = false;
}

void TransferThread::take_inbox() {
  Chunk* ended = nullptr;
  {
    const MutexLock lock(mutex_);
    taken_operations_.swap(new_operations_);
    seen_finished_ = finished_count_;
    starved_ = false;
    ended = std::exchange(ended_io_, nullptr);
  }
  while (ended != nullptr) io_ended(std::exchange(ended, ended->next));
  for (const OperationPtr& operation : taken_operations_) {
    operation->queued = operation;
    lines_.push(operation.get(), operation->priority, operation->caller);
  }
  taken_operations_.clear();
}

bool TransferThread::start_chunks() {
  bool progress = false;
  Lines::Blocked blocked = {};
  while (SwapOperation* next = lines_.next(blocked)) {
    const OperationPtr operation = next->queued;
    if (!operation->all_started()) {
      try {
        if (!start_chunk(operation)) {
          blocked[static_cast<std::size_t>(operation->priority)] = true;
          continue;
        }
        progress = true;
      } catch (...) {
        operation->error = std::current_exception();
      }
      lines_.served(next);
    }
    if (!operation->all_started()) continue;
    lines_.remove(next);
    operation->queued = nullptr;
    end_if_done(operation);
  }
  return progress;
}

/// False if the target needs something that other operations have.
bool TransferThread::prepare(SwapOperation& operation) {
  const auto& device = operation.bytes.device;
  if (!entered_.contains(device.get())) {
    device->enter_thread();
    entered_.insert(device.get());
    if (!operation.on_host) {
      std::string why_not = pool_.pin(device);
      if (!why_not.empty()) note_(std::move(why_not));
    }
  }
  starved_ = !operation.target->prepare(operation.op(), true);
  return !starved_;
}

// False if a buffer, or something else that the chunk needs, is missing.
bool TransferThread::start_chunk(const OperationPtr& operation) {
  if (operation->next == 0 && !prepare(*operation)) return false;
  std::byte* data = operation->bytes.data + operation->next;
  const ChunkShape shape = operation->target->chunk(
      operation->on_host ? data : nullptr, operation->next,
      operation->bytes.size - operation->next, pool_.buffer_size());
  auto chunk = std::make_unique<Chunk>();
  chunk->operation = operation;
  chunk->offset = operation->next;
  chunk->length = shape.length;
  if (shape.in_place) {
    operation->in_place = true;
    chunk->host = {data, shape.length};
  } else {
    const bool urgent = operation->priority == IoPriority::kNow;
    const auto staging = staging_.take(
        shape.room, urgent ? 0 : pool_.count() / 4, chunk->buffer);
    if (staging.empty()) return false;
    chunk->host = staging.subspan(shape.lead, shape.padded);
  }
  operation->next += chunk->length;
  ++operation->open_chunks;
  if (!operation->out()) ++operation->open_reads;
  // From here on, release() deletes the chunk.
  Chunk* started = chunk.release();
  if (operation->out() && started->buffer != nullptr) {
    queue_copy(started);
  } else {
    queue_io(started);
  }
  return true;
}

void TransferThread::queue_copy(Chunk* chunk) {
  SwapOperation& operation = *chunk->operation;
  Device& device = *operation.bytes.device;
  std::byte* data = operation.bytes.data + chunk->offset;
  // A later event of the stream covers every earlier copy. So the copy that is
  // queued last stands for all, whichever chunk it belongs to.
  const bool last = operation.error == nullptr &&
                    operation.next == operation.bytes.size &&
                    operation.open_reads == 0;
  try {
    if (operation.start != nullptr) {
      device.wait(Device::Stream::kCopy, operation.start);
      operation.start = nullptr;
    }
    if (operation.out()) {
      device.copy(chunk->host.data(), data, chunk->length, true);
    } else {
      device.copy(data, chunk->host.data(), chunk->length, false);
      if (last && !operation.on_host) arrive(operation);
    }
    chunk->copied = device.record(Device::Stream::kCopy);
  } catch (...) {
    // It is unknown what was queued before the failure. So the buffer waits for
    // an event that covers it, if the device can still give one.
    chunk->error = std::current_exception();
    if (operation.error == nullptr) operation.error = chunk->error;
    try {
      chunk->copied = device.record(Device::Stream::kCopy);
    } catch (...) {
      chunk->copied = nullptr;
    }
  }
  copying_.push_back(chunk);
  // Host memory that is read, or that moves in place, is staged when it ends.
  const bool later =
      operation.on_host && (!operation.out() || operation.in_place);
  if (last && chunk->error == nullptr && !later) {
    stage(operation, chunk->copied);
  }
}

void TransferThread::arrive(SwapOperation& operation) {
  const auto on_arrival = std::exchange(operation.bytes.on_arrival, nullptr);
  if (on_arrival != nullptr) on_arrival(*operation.bytes.device);
}

bool TransferThread::poll_copies() {
  bool progress = false;
  std::vector<const Device*> busy;
  for (std::size_t i = 0; i < copying_.size();) {
    Chunk* chunk = copying_[i];
    Device* device = chunk->operation->bytes.device.get();
    bool done = false;
    if (std::find(busy.begin(), busy.end(), device) == busy.end()) {
      try {
        done = chunk->copied == nullptr || device->query(chunk->copied);
      } catch (...) {
        if (chunk->error == nullptr) chunk->error = std::current_exception();
        done = true;
      }
      if (!done) busy.push_back(device);
    }
    if (!done) {
      ++i;
      continue;
    }
    copying_.erase(copying_.begin() + static_cast<std::ptrdiff_t>(i));
    progress = true;
    const bool write = chunk->operation->out() && chunk->error == nullptr &&
                       chunk->operation->error == nullptr;
    write ? queue_io(chunk) : release(chunk);
  }
  return progress;
}

void TransferThread::queue_io(Chunk* chunk) {
  const SwapOperation& operation = *chunk->operation;
  try {
    if (operation.out()) {
      // The file shall hold no bytes that the user did not store.
      std::memset(chunk->host.data() + chunk->length, 0,
                  chunk->host.size() - chunk->length);
    }
    operation.target->start(operation, chunk->offset, chunk->host,
                            end_of(chunk));
  } catch (...) {
    chunk->error = std::current_exception();
    operation.direct ? release(chunk) : io_ended(chunk);
  }
}

void TransferThread::io_ended(Chunk* chunk) {
  SwapOperation& operation = *chunk->operation;
  if (!operation.out()) --operation.open_reads;
  const bool copy_in = !operation.out() && chunk->buffer != nullptr &&
                       chunk->error == nullptr && operation.error == nullptr;
  copy_in ? queue_copy(chunk) : release(chunk);
}

void TransferThread::stage(SwapOperation& operation, EventPtr last_copy) {
  // From here on the streams keep the order, and the owner waits for them.
  operation.bytes.fixed.reset();
  operation.last_copy = std::move(last_copy);
  operation.staged.finish();
}

void TransferThread::release(Chunk* chunk) {
  const OperationPtr operation = chunk->operation;
  if (operation->error == nullptr) operation->error = chunk->error;
  delete chunk;
  --operation->open_chunks;
  end_if_done(operation);
}

void TransferThread::end_if_done(const OperationPtr& operation) {
  if (operation->phase == SwapOperation::Phase::kEnded ||
      !operation->all_started() || operation->open_chunks > 0 ||
      settle(operation)) {
    return;
  }
  end(operation);
}

// Called after the last byte of a write. True if its end comes later.
bool TransferThread::settle(const OperationPtr& operation) {
  if (!operation->out() || operation->error != nullptr ||
      operation->phase != SwapOperation::Phase::kMoving) {
    return false;
  }
  operation->phase = SwapOperation::Phase::kSettling;
  try {
    auto chunk = std::make_unique<Chunk>();
    chunk->operation = operation;
    ++operation->open_chunks;
    if (operation->target->settle(*operation, end_of(chunk.get()))) {
      static_cast<void>(chunk.release());  // Its end is still to come.
      return true;
    }
  } catch (...) {
    operation->error = std::current_exception();
  }
  --operation->open_chunks;
  return false;
}

SwapTarget::Done TransferThread::end_of(Chunk* chunk) {
  return [this, chunk](std::exception_ptr error) {
    chunk->error = std::move(error);
    if (chunk->operation->direct) {
      release(chunk);
      return;
    }
    const MutexLock lock(mutex_);
    chunk->next = std::exchange(ended_io_, chunk);
    changed_.notify_one();
  };
}

void TransferThread::end(const OperationPtr& operation) {
  operation->phase = SwapOperation::Phase::kEnded;
  if (operation->error == nullptr && !operation->out()) {
    try {
      arrive(*operation);
    } catch (...) {
      operation->error = std::current_exception();
    }
  }
  const std::exception_ptr error = operation->error;
  for (OperationPtr& next : operation->target->leave(*operation, error)) {
    hand_over(std::move(next));
  }
  finished_(operation);
  // Space and tensor are let go of before anybody hears of the end.
  operation->target.reset();
  operation->start.reset();
  operation->bytes.fixed.reset();
  operation->retired->add(std::move(operation->bytes.keep_alive));
  // The order matters: when wait() of a swap_in returns, done() is true.
  operation->ended.finish(error);
  if (!operation->staged.ticket().done()) operation->staged.finish(error);
  const MutexLock lock(mutex_);
  ++finished_count_;
  --unfinished_;
  if (awaits_end_ || (unfinished_ == 0 && stopping_)) changed_.notify_one();
}

}  // namespace torch_ext
