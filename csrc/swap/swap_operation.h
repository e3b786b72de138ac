#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "base/owner_process.h"
#include "io/fair_queue.h"
#include "torch_ext/io/io_engine.h"
#include "torch_ext/io/io_queue.h"
#include "torch_ext/io/ticket.h"
#include "torch_ext/swap/device_bytes.h"

namespace torch_ext {

class SwapTarget;

/// Things that must not die on a transfer or I/O thread, because dropping them
/// may need the GIL. The owner's threads empty the list.
class RetireList {
 public:
  void add(std::shared_ptr<void> object) {
    if (object.use_count() == 0) return;
    const MutexLock lock(mutex_);
    objects_.push_back(std::move(object));
  }
  void clear() {
    std::vector<std::shared_ptr<void>> dropped;
    const MutexLock lock(mutex_);
    dropped.swap(objects_);
  }

 private:
  Mutex mutex_;
  std::vector<std::shared_ptr<void>> objects_ GUARDED_BY(mutex_);
};

/// One operation of a swapper, from the call to its last byte.
class SwapOperation : public FairQueue<SwapOperation>::Link {
 public:
  enum class Kind { kOut, kIn };
  enum class Phase {
    kMoving,    ///< Bytes will move, or are moving.
    kSettling,  ///< All bytes of a write have moved; its target sees to the
                ///< rest.
    kEnded,     ///< Nothing happens any more.
  };

  // Set by the calling thread, and then only read.
  Kind kind = Kind::kOut;
  const char* name = "";  ///< What its user calls it.
  std::string key;
  /// Whether the key has been removed since the call. Null for files.
  std::shared_ptr<std::atomic<bool>> key_removed;
  DeviceBytes bytes;
  bool on_host = false;
  EventPtr start;  ///< The copy stream must wait for it; null once it does.
  std::shared_ptr<SwapTarget> target;
  std::shared_ptr<RetireList> retired;
  const OwnerProcess owner{"ticket"};
  IoPriority priority = IoPriority::kNow;
  std::uint64_t caller = 0;  ///< this_caller() of the call.

  TicketSource staged;  ///< The last copy is queued.
  TicketSource ended;   ///< The last byte is in place.
  std::atomic<bool> error_seen = false;
  EventPtr last_copy;  ///< Set before `staged` is done.

  // The transfer thread's own. For a direct operation, whoever has its chunk.
  Phase phase = Phase::kMoving;
  bool direct = false;     ///< One chunk, without the transfer thread.
  bool in_place = false;   ///< Some of it moves without a host buffer.
  std::uint64_t next = 0;  ///< First byte without a chunk.
  std::uint64_t open_chunks = 0;
  std::uint64_t open_reads = 0;  ///< Chunks whose read has not ended.
  std::exception_ptr error;
  std::shared_ptr<SwapOperation> queued;  ///< Itself, while it is in a queue.

  bool out() const { return kind == Kind::kOut; }
  IoRequest::Op op() const {
    return out() ? IoRequest::Op::kWrite : IoRequest::Op::kRead;
  }
  bool all_started() const { return error != nullptr || next == bytes.size; }
};
using OperationPtr = std::shared_ptr<SwapOperation>;

}  // namespace torch_ext
