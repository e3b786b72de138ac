#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/mutex.h"
#include "base/owner_process.h"
#include "swap_operation.h"
#include "torch_ext/config/aio_config.h"
#include "torch_ext/memory/buffer_pool.h"
#include "transfer_thread.h"
#include "unseen_errors.h"

namespace torch_ext {

/// The part that Swapper and FileTransfer share: buffers, a transfer thread,
/// counters, notes for the log, and the rules about processes and closing.
/// Threads: any.
class SwapCore {
 public:
  struct Counts {
    std::uint64_t bytes_out = 0;  ///< By operations that ended well.
    std::uint64_t bytes_in = 0;
    std::uint64_t operations = 0;  ///< Ended ones.
    std::uint64_t failures = 0;
    std::uint64_t in_flight = 0;
    std::uint64_t host_bytes = 0;
    std::uint64_t host_bytes_peak = 0;
  };

  /// `what` names the object in messages. Errors: std::invalid_argument if
  /// host_memory is below block_size; IoError ("mmap", "pthread_create").
  SwapCore(const char* what, const AioConfig& aio, std::uint64_t host_memory);
  ~SwapCore() = default;  ///< After close(); not in a forked child.
  SwapCore(const SwapCore&) = delete;
  SwapCore& operator=(const SwapCore&) = delete;

  const OwnerProcess& owner() const { return owner_; }
  /// The lock of the calls. Their order is the order of the operations.
  Mutex& calls() RETURNS_MUTEX(calls_) { return calls_; }
  /// Takes calls(). It calls `before` if it has to wait for that.
  /// Errors: StateError (forked, closed).
  class SCOPED_LOCK Call {
   public:
    template <typename Before>
    Call(SwapCore& core, Before before) ACQUIRE(core.calls_)
        : lock_(core.own_calls(), before) {
      core.check_open();
    }
    explicit Call(SwapCore& core) ACQUIRE(core.calls_) : Call(core, [] {}) {}
    ~Call() RELEASE() = default;

   private:
    MutexLock lock_;
  };

  /// Makes an operation, and records an event on the current stream. Errors:
  /// StateError (the stream is being captured).
  OperationPtr make_operation(SwapOperation::Kind kind, std::string key,
                              DeviceBytes bytes,
                              std::shared_ptr<SwapTarget> target) const;
  void start(OperationPtr operation) REQUIRES(calls_);

  void add_note(std::string note);
  std::vector<std::string> notes() const;
  Counts counts() const;
  UnseenErrors& unseen() { return unseen_; }

  /// Waits for all operations, frees the buffers, and calls `release`. Returns
  /// the first error that nobody has seen. Later calls return null at once.
  std::exception_ptr close(const std::function<void()>& release);

 private:
  Mutex& own_calls() RETURNS_MUTEX(calls_) {
    owner_.check();
    return calls_;
  }
  void check_open() const REQUIRES(calls_);
  Counts counts_locked() const REQUIRES(mutex_);
  void ended(const OperationPtr& operation);

  const char* const what_;
  const OwnerProcess owner_;
  UnseenErrors unseen_;
  std::shared_ptr<RetireList> retired_ = std::make_shared<RetireList>();
  Mutex calls_;
  bool closed_ GUARDED_BY(calls_) = false;
  mutable Mutex mutex_;
  Counts counts_ GUARDED_BY(mutex_);
  std::vector<std::string> notes_ GUARDED_BY(mutex_);
  std::unique_ptr<BufferPool> pool_ GUARDED_BY(mutex_);
  std::unique_ptr<TransferThread> thread_ GUARDED_BY(calls_);
};

}  // namespace torch_ext
