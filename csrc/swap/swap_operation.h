#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "torch_ext/io/io_engine.h"
#include "torch_ext/io/io_queue.h"
#include "torch_ext/swap/swapper.h"

namespace torch_ext {

class SwapTarget;
struct Version;

/// Things that must not die on a copy or I/O thread, because dropping them
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
class SwapOperation {
 public:
  enum class Kind { kOut, kIn };

  // Set by the calling thread and then only read.
  Kind kind = Kind::kOut;
  const char* name = "";  ///< As its user calls it.
  std::string key;
  DeviceBytes bytes;
  bool on_host = false;
  EventPtr start;  ///< What the copy stream waits for before it touches bytes.
  std::shared_ptr<SwapTarget> target;
  std::shared_ptr<Version> version;  ///< The target, if it is a key's.
  std::shared_ptr<RetireList> retired;
  pid_t owner = 0;
  IoPriority priority = IoPriority::kNow;
  std::uint64_t caller = 0;  ///< this_caller() of the call.

  TicketSource staged;  ///< The last copy is queued.
  TicketSource ended;   ///< The last byte is in place.
  std::atomic<bool> error_seen = false;
  EventPtr last_copy;  ///< Written before `staged` is done.

  bool direct = false;  ///< Goes past the copy thread, in one chunk.

  // The copy thread's own; of a direct one, whoever has its chunk.
  std::uint64_t next = 0;  ///< First byte without a chunk.
  std::uint64_t open_chunks = 0;
  std::uint64_t open_reads = 0;  ///< Chunks whose read has not ended.
  bool in_place = false;         ///< Some of it moves without a host buffer.
  bool joined = false;           ///< The copy stream waits for `start`.
  bool is_staged = false;
  bool has_arrived = false;  ///< on_arrival was called.
  bool synced = false;       ///< As far as the target asks for it.
  bool finished = false;
  std::exception_ptr error;

  bool out() const { return kind == Kind::kOut; }
  IoRequest::Op op() const {
    return out() ? IoRequest::Op::kWrite : IoRequest::Op::kRead;
  }
  bool all_started() const { return error != nullptr || next == bytes.size; }
};
using OperationPtr = std::shared_ptr<SwapOperation>;

}  // namespace torch_ext
