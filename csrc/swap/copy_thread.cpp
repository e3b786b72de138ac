#include "copy_thread.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

using std::chrono::microseconds;

// A 4 MiB copy over PCIe takes 0.15 ms and more.
constexpr microseconds kShortestNap{10};
constexpr microseconds kLongestNap{200};
constexpr microseconds kStarvedNap{10'000};

// Of so many chunks one is for each less urgent line: the share that the I/O
// queue gives it too.
constexpr int kShare = 16;

}  // namespace

CopyThread::CopyThread(BufferPool& pool, KeyTable& keys,
                       std::function<void(const SwapOperation&)> finished,
                       std::function<void(std::string)> note)
    : pool_(pool),
      staging_(pool),
      keys_(keys),
      finished_(std::move(finished)),
      note_(std::move(note)) {
  // Signals belong to the application's threads.
  sigset_t all;
  sigset_t old;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  int error = 0;
  try {
    thread_ = std::thread([this] { run(); });
    pthread_setname_np(thread_.native_handle(), "torch_ext copy");
  } catch (const std::system_error& refused) {
    error = refused.code().value();
  }
  pthread_sigmask(SIG_SETMASK, &old, nullptr);
  if (error != 0) throw IoError({.op = "pthread_create", .error = error});
}

CopyThread::~CopyThread() { stop(); }

void CopyThread::submit(OperationPtr operation) {
  const DeviceBytes& bytes = operation->bytes;
  SwapTarget& target = *operation->target;
  {
    std::lock_guard lock(mutex_);
    ++unfinished_;
  }
  // From here on what fails is the operation's own error.
  try {
    {
      std::lock_guard lock(mutex_);
      if (target.park(operation)) return;
    }
    // The caller does not wait: not for a file to grow, nor for a descriptor.
    operation->direct =
        operation->on_host && bytes.size > 0 && bytes.on_arrival == nullptr &&
        target.prepare(operation->op(), false) &&
        target.in_place(bytes.data, 0, bytes.size) == bytes.size;
    std::lock_guard lock(mutex_);
    if (operation->version != nullptr && !operation->out() &&
        keys_.park(operation)) {
      return;
    }
    if (!operation->direct) {
      target.unprepare();
      new_operations_.push_back(operation);
      changed_.notify_one();
      return;
    }
  } catch (...) {
    operation->error = std::current_exception();
    finish(operation);
    return;
  }
  start_direct(operation);
}

// Nothing to copy, so the caller submits the I/O and an I/O thread ends the
// operation: a hand-over between threads costs more than 64 KiB of copying.
void CopyThread::start_direct(const OperationPtr& operation) {
  std::unique_ptr<Chunk> chunk;
  try {
    chunk = std::make_unique<Chunk>();
  } catch (...) {
    operation->error = std::current_exception();
    finish(operation);
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

void CopyThread::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    changed_.notify_one();
  }
  if (thread_.joinable()) thread_.join();
}

void CopyThread::run() {
  for (;;) {
    take_inbox();
    bool progress = start_chunks();
    progress |= poll_copies();
    {
      std::lock_guard lock(mutex_);
      if (stopping_ && unfinished_ == 0) return;
    }
    sleep(progress);
  }
}

void CopyThread::sleep(bool progress) {
  if (progress) {
    nap_ = kShortestNap;
    return;
  }
  std::unique_lock lock(mutex_);
  if (unfinished_ == 0) staging_.release();
  const auto called = [this] {
    return !new_operations_.empty() || ended_io_ != nullptr ||
           (starved_ && finished_count_ != seen_finished_) ||
           (stopping_ && unfinished_ == 0);
  };
  awaits_end_ = starved_;
  if (!copying_.empty()) {
    // Events have no file descriptor to wait on: ask again soon.
    changed_.wait_for(lock, nap_, called);
    nap_ = std::min(nap_ * 2, kLongestNap);
  } else {
    nap_ = kShortestNap;
    if (starved_) {
      // Nobody tells of what a caller has given back that gave up.
      changed_.wait_for(lock, kStarvedNap, called);
    } else {
      changed_.wait(lock, called);
    }
  }
  awaits_end_ = false;
}

void CopyThread::take_inbox() {
  Chunk* ended = nullptr;
  {
    std::lock_guard lock(mutex_);
    taken_operations_.swap(new_operations_);
    seen_finished_ = finished_count_;
    starved_ = false;
    ended = std::exchange(ended_io_, nullptr);
  }
  while (ended != nullptr) io_ended(std::exchange(ended, ended->next));
  for (OperationPtr& operation : taken_operations_) {
    line_of(*operation).operations.push(std::move(operation));
  }
  taken_operations_.clear();
}

CopyThread::Line& CopyThread::line_of(const SwapOperation& operation) {
  return lines_[static_cast<std::size_t>(operation.priority)];
}

/// The line whose chunk is next; null: none can go on.
CopyThread::Line* CopyThread::next_line() {
  Line* next = nullptr;
  for (Line& line : lines_) {
    if (line.operations.empty() || line.stuck) continue;
    if (next == nullptr || ++line.passed_over >= kShare) next = &line;
  }
  if (next != nullptr) next->passed_over = 0;
  return next;
}

bool CopyThread::start_chunks() {
  bool progress = false;
  for (Line& line : lines_) line.stuck = false;
  while (Line* line = next_line()) {
    const OperationPtr operation = line->operations.front();
    if (!operation->all_started()) {
      try {
        if (!start_chunk(operation)) {
          line->stuck = true;
          continue;
        }
        progress = true;
      } catch (...) {
        operation->error = std::current_exception();
      }
    }
    if (!operation->all_started()) continue;
    line->operations.pop();
    finish_if_done(operation);
  }
  return progress;
}

/// False if the target needs what other operations have.
bool CopyThread::prepare(SwapOperation& operation) {
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

// False if all buffers are out, or what else there is not enough of.
bool CopyThread::start_chunk(const OperationPtr& operation) {
  if (operation->next == 0 && !prepare(*operation)) return false;
  const SwapTarget& target = *operation->target;
  const std::uint64_t rest = operation->bytes.size - operation->next;
  auto chunk = std::make_unique<Chunk>();
  chunk->operation = operation;
  chunk->offset = operation->next;
  std::byte* data = operation->bytes.data + operation->next;
  const std::uint64_t in_place =
      operation->on_host ? target.in_place(data, chunk->offset, rest) : 0;
  if (in_place > 0) {
    operation->in_place = true;
    chunk->length = in_place;
    chunk->host = {data, in_place};
  } else {
    const std::size_t lead = target.lead(chunk->offset);
    const std::size_t room = align_down(pool_.buffer_size(), target.granule());
    if (room == 0) {
      throw std::invalid_argument(
          "host buffers of " + std::to_string(pool_.buffer_size()) +
          " bytes are too small for this file system's unit of " +
          std::to_string(target.granule()) +
          ": raise block_size, and host_memory if need be");
    }
    chunk->length = std::min<std::uint64_t>(rest, room - lead);
    const std::uint64_t padded = target.padded(chunk->length);
    const auto staging = staging_.take(
        align_up(lead + padded, target.granule()),
        operation->priority == IoPriority::kNow ? 0 : pool_.count() / 4,
        chunk->buffer);
    if (staging.empty()) return false;
    chunk->host = staging.subspan(lead, padded);
  }
  operation->next += chunk->length;
  ++operation->open_chunks;
  if (!operation->out()) ++operation->open_reads;
  // From here on the chunk is deleted by release().
  Chunk* started = chunk.release();
  if (operation->out() && started->buffer != nullptr) {
    queue_copy(started);
  } else {
    queue_io(started);
  }
  return true;
}

void CopyThread::queue_copy(Chunk* chunk) {
  SwapOperation& operation = *chunk->operation;
  Device& device = *operation.bytes.device;
  std::byte* data = operation.bytes.data + chunk->offset;
  // A later event of the stream covers every earlier copy, so the last one
  // queued stands for all, whichever chunk it belongs to.
  const bool last = operation.error == nullptr &&
                    operation.next == operation.bytes.size &&
                    operation.open_reads == 0;
  try {
    if (!operation.joined) {
      device.wait(Device::Stream::kCopy, operation.start);
      operation.joined = true;
    }
    if (operation.out()) {
      device.copy(chunk->host.data(), data, chunk->length, true);
    } else {
      device.copy(data, chunk->host.data(), chunk->length, false);
      if (last && !operation.on_host) arrive(operation);
    }
    chunk->copied = device.record(Device::Stream::kCopy);
  } catch (...) {
    // What was queued before it failed is unknown: the buffer waits for an
    // event that covers it where the device can still give one.
    chunk->error = std::current_exception();
    if (operation.error == nullptr) operation.error = chunk->error;
    try {
      chunk->copied = device.record(Device::Stream::kCopy);
    } catch (...) {
      chunk->copied = nullptr;
    }
  }
  copying_.push_back(chunk);
  // Host memory that is read or written in place is staged when it is done.
  const bool later =
      operation.on_host && (!operation.out() || operation.in_place);
  if (last && chunk->error == nullptr && !later) {
    stage(operation, chunk->copied);
  }
}

void CopyThread::arrive(SwapOperation& operation) {
  const auto& on_arrival = operation.bytes.on_arrival;
  if (on_arrival == nullptr || operation.has_arrived) return;
  operation.has_arrived = true;
  on_arrival(*operation.bytes.device);
}

bool CopyThread::poll_copies() {
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

void CopyThread::queue_io(Chunk* chunk) {
  const SwapOperation& operation = *chunk->operation;
  try {
    if (operation.out()) {
      // The file holds no bytes that the user did not store.
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

void CopyThread::io_ended(Chunk* chunk) {
  SwapOperation& operation = *chunk->operation;
  if (!operation.out()) --operation.open_reads;
  const bool copy_in = !operation.out() && chunk->buffer != nullptr &&
                       chunk->error == nullptr && operation.error == nullptr;
  copy_in ? queue_copy(chunk) : release(chunk);
}

void CopyThread::stage(SwapOperation& operation, EventPtr last_copy) {
  // From here on the streams see to the order, and the owner waits for them.
  operation.bytes.fixed.reset();
  operation.last_copy = std::move(last_copy);
  operation.is_staged = true;
  operation.staged.finish();
}

void CopyThread::release(Chunk* chunk) {
  const OperationPtr operation = chunk->operation;
  if (operation->error == nullptr) operation->error = chunk->error;
  delete chunk;
  --operation->open_chunks;
  finish_if_done(operation);
}

void CopyThread::finish_if_done(const OperationPtr& operation) {
  if (operation->finished || !operation->all_started() ||
      operation->open_chunks > 0 || start_sync(operation)) {
    return;
  }
  finish(operation);
}

// After the last byte of a write; false if there is nothing to sync.
bool CopyThread::start_sync(const OperationPtr& operation) {
  if (!operation->out() || operation->synced || operation->error != nullptr) {
    return false;
  }
  operation->synced = true;
  try {
    auto chunk = std::make_unique<Chunk>();
    chunk->operation = operation;
    ++operation->open_chunks;
    if (operation->target->sync(*operation, end_of(chunk.get()))) {
      static_cast<void>(chunk.release());  // Until it has been called.
      return true;
    }
  } catch (...) {
    operation->error = std::current_exception();
  }
  --operation->open_chunks;
  return false;
}

SwapTarget::Done CopyThread::end_of(Chunk* chunk) {
  return [this, chunk](std::exception_ptr error) {
    chunk->error = std::move(error);
    if (chunk->operation->direct) {
      release(chunk);
      return;
    }
    std::lock_guard lock(mutex_);
    chunk->next = std::exchange(ended_io_, chunk);
    changed_.notify_one();
  };
}

void CopyThread::finish(const OperationPtr& operation) {
  operation->finished = true;
  if (operation->error == nullptr) {
    try {
      if (operation->out()) {
        operation->target->check_written();
      } else {
        arrive(*operation);
      }
    } catch (...) {
      operation->error = std::current_exception();
    }
  }
  const std::exception_ptr error = operation->error;
  auto version = std::exchange(operation->version, nullptr);
  if (error != nullptr) keys_.add_failure(operation);
  if (operation->out() && version != nullptr) {
    for (const OperationPtr& reader : keys_.resolve(version, error)) {
      if (reader->direct && error == nullptr) {
        start_direct(reader);
        continue;
      }
      // If it asked for a value that was not written, it fails: an older one
      // would be stale data in silence.
      reader->error = error;
      std::lock_guard lock(mutex_);
      new_operations_.push_back(reader);
      changed_.notify_one();
    }
  }
  for (OperationPtr& next : operation->target->ended()) {
    std::lock_guard lock(mutex_);
    new_operations_.push_back(std::move(next));
    changed_.notify_one();
  }
  finished_(*operation);
  // Space and tensor are free before anybody hears of the end.
  version.reset();
  operation->target.reset();
  operation->start.reset();
  operation->bytes.fixed.reset();
  operation->retired->add(std::move(operation->bytes.keep_alive));
  // In this order, so that wait() of a swap_in never ends before done().
  operation->ended.finish(error);
  if (!operation->is_staged) operation->staged.finish(error);
  std::lock_guard lock(mutex_);
  ++finished_count_;
  --unfinished_;
  if (awaits_end_ || (unfinished_ == 0 && stopping_)) changed_.notify_one();
}

}  // namespace torch_ext
