#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "torch_ext/io/io_queue.h"

namespace torch_ext {

class SwapOperation;

/// Where the bytes of an operation lie on disk, and how they get there.
/// Offsets count from the operation's first byte.
class SwapTarget {
 public:
  using Done = std::function<void(std::exception_ptr)>;

  virtual ~SwapTarget() = default;

  /// Gets what the I/O needs: space, an open file. Once it has returned true
  /// it does so at once. False: with `may_block`, only the end of another
  /// operation can help; without, it would have to wait.
  /// Errors: IoError. Threads: with `may_block`, the copy thread.
  virtual bool prepare(IoRequest::Op op, bool may_block) = 0;

  /// Whether the operation has to wait for others before it may be prepared:
  /// then the ended() of another target returns it.
  virtual bool park(const std::shared_ptr<SwapOperation>& /*operation*/) {
    return false;
  }
  /// Lets go of what others may need before this operation's turn comes, when
  /// prepare() is to be called again.
  virtual void unprepare() {}
  /// The operation has ended: those that waited for it alone.
  virtual std::vector<std::shared_ptr<SwapOperation>> ended() { return {}; }

  // Once it is prepared: ---------------------------------------------------

  /// Whether `rest` bytes from `offset` on can move straight between the disk
  /// and host memory at `data`: how many of them.
  virtual std::uint64_t in_place(const std::byte* data, std::uint64_t offset,
                                 std::uint64_t rest) const = 0;
  /// Bytes to leave free at the beginning of a host buffer for those from
  /// `offset` on, so that their addresses suit direct I/O.
  virtual std::size_t lead(std::uint64_t offset) const = 0;
  /// Bytes that move for the last `length` of the operation; zeros at their
  /// end where that is more.
  virtual std::uint64_t padded(std::uint64_t length) const = 0;
  /// What host buffers are shared in multiples of.
  virtual std::size_t granule() const = 0;

  /// All of a write has been moved: starts a sync of what would not be on the
  /// drive else, before it ends; false: there is none. `done` as below. Errors:
  /// what is known at once.
  virtual bool sync(const SwapOperation& /*operation*/, Done /*done*/) {
    return false;
  }
  /// Throws if what was written is not where it was meant to be.
  virtual void check_written() const {}

  /// Starts the I/O. `bytes` is borrowed until `done` has been called, on an
  /// I/O thread. Errors: what is known at once.
  virtual void start(const SwapOperation& operation, std::uint64_t offset,
                     std::span<std::byte> bytes, Done done) = 0;
};

}  // namespace torch_ext
