#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "io/fair_queue.h"
#include "staging.h"
#include "swap_operation.h"
#include "swap_target.h"
#include "torch_ext/memory/buffer_pool.h"

namespace torch_ext {

/// A part of an operation that moves through one host buffer, or in place.
struct Chunk {
  OperationPtr operation;
  std::uint64_t offset = 0;
  std::uint64_t length = 0;        ///< Bytes of the tensor.
  std::span<std::byte> host;       ///< Padded, or the tensor's own.
  std::shared_ptr<Buffer> buffer;  ///< Null if in place.
  EventPtr copied;
  std::exception_ptr error;
  Chunk* next = nullptr;  ///< Whose I/O has ended, too.
};

/// The thread that moves the chunks of operations between devices, buffers and
/// the disk. transfer_thread.cpp tells how. When all buffers are taken, this
/// thread waits, and no caller.
class TransferThread {
 public:
  /// `finished` is called for each operation before its tickets are done. The
  /// thread that ends the operation calls it: this one, an I/O thread or the
  /// caller's. `note` takes what a log should say.
  TransferThread(BufferPool& pool,
                 std::function<void(const OperationPtr&)> finished,
                 std::function<void(std::string)> note);
  ~TransferThread();  ///< As stop().

  /// Takes over an operation that has its target. Whatever goes wrong is the
  /// operation's error.
  void submit(OperationPtr operation);
  /// Returns when all operations have ended.
  void stop();

 private:
  using Lines = FairQueue<SwapOperation>;

  bool can_go_direct(SwapOperation& operation) const;
  void start_direct(const OperationPtr& operation);
  void hand_over(OperationPtr operation);
  void run();
  void take_inbox();
  bool start_chunks();
  bool start_chunk(const OperationPtr& operation);
  bool prepare(SwapOperation& operation);
  void queue_copy(Chunk* chunk);
  void queue_io(Chunk* chunk);
  bool settle(const OperationPtr& operation);
  SwapTarget::Done end_of(Chunk* chunk);
  void arrive(SwapOperation& operation);
  void io_ended(Chunk* chunk);
  bool poll_copies();
  void stage(SwapOperation& operation, EventPtr last_copy);
  void release(Chunk* chunk);
  void end_if_done(const OperationPtr& operation);
  void end(const OperationPtr& operation);
  void sleep(bool progress);

  BufferPool& pool_;
  Staging staging_;  ///< The thread's own.
  std::function<void(const OperationPtr&)> finished_;
  std::function<void(std::string)> note_;

  Mutex mutex_;
  CondVar changed_;
  std::vector<OperationPtr> new_operations_ GUARDED_BY(mutex_);
  Chunk* ended_io_ GUARDED_BY(mutex_) = nullptr;
  /// Operations, waiting ones included.
  std::size_t unfinished_ GUARDED_BY(mutex_) = 0;
  std::uint64_t finished_count_ GUARDED_BY(mutex_) = 0;
  /// The thread sleeps until one more ends.
  bool awaits_end_ GUARDED_BY(mutex_) = false;
  bool stopping_ GUARDED_BY(mutex_) = false;

  // The thread's own.
  Lines lines_;                 ///< With chunks to start. A share is a chunk.
  std::deque<Chunk*> copying_;  ///< Oldest first.
  std::set<const Device*> entered_;
  std::chrono::microseconds nap_{0};
  std::vector<OperationPtr> taken_operations_;
  bool starved_ = false;  ///< Another operation's end would help.
  std::uint64_t seen_finished_ = 0;

  std::thread thread_;
};

}  // namespace torch_ext
