#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "io/fair_queue.h"
#include "torch_ext/io/io_engine.h"
#include "torch_ext/io/io_queue.h"
#include "torch_ext/io/ticket.h"
#include "torch_ext/swap/device_bytes.h"

namespace torch_ext {

class SwapTarget;

/// Things that must not die on a transfer or I/O thread, because dropping them
/// may need the GIL; emptied by the owner's threads.
class RetireList {
 public:
  void add(std::shared_ptr<void> object) {
    if (object.use_count() == 0) return;
    std::lock_guard lock(mutex_);
    objects_.push_back(std::move(object));
  }
  void clear() {
    std::vector<std::shared_ptr<void>> dropped;
    std::lock_guard lock(mutex_);
    dropped.swap(objects_);
  }

 private:
  std::mutex mutex_;
  std::vector<std::shared_ptr<void>> objects_;
};

/// One swap_out or swap_in, from the call to its last byte.
class SwapOperation : public FairQueue<SwapOperation>::Link {
 public:
  enum class Kind { kOut, kIn };
  enum class Phase {
    kMoving,    ///< Bytes are to move, or do.
    kSettling,  ///< A write's are there; its target may see to the rest.
    kEnded,     ///< Nothing is to happen any more.
  };

  // Set by the calling thread and then only read.
  Kind kind = Kind::kOut;
  const char* name = "";  ///< As its user calls it.
  std::string key;
  /// Whether the key has been removed since the call; null: a file's.
  std::shared_ptr<std::atomic<bool>> key_removed;
  DeviceBytes bytes;
  bool on_host = false;
  EventPtr
      start;  ///< What comes first; null once the copy stream waits for it.
  std::shared_ptr<SwapTarget> target;
  std::shared_ptr<RetireList> retired;
  pid_t owner = 0;
  IoPriority priority = IoPriority::kNow;
  std::uint64_t caller = 0;  ///< this_caller() of the call.

  TicketSource staged;  ///< The last copy is queued.
  TicketSource ended;   ///< The last byte is in place.
  std::atomic<bool> error_seen = false;
  EventPtr last_copy;  ///< Written before `staged` is done.

  // The transfer thread's own; of a direct one, whoever has its chunk.
  Phase phase = Phase::kMoving;
  bool direct = false;     ///< Goes past the transfer thread, in one chunk.
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
