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

/// How the next bytes of an operation move between the disk and host memory.
struct ChunkShape {
  std::uint64_t length = 0;  ///< Bytes of the tensor.
  /// They move straight to or from the tensor's own memory. The rest says how
  /// they lie in a host buffer otherwise.
  bool in_place = false;
  std::size_t lead = 0;      ///< Bytes left free before them.
  std::uint64_t padded = 0;  ///< Bytes that move: zeros after the tensor's.
  std::uint64_t room = 0;    ///< Bytes of the buffer, the free ones included.

  /// `bytes` of host memory that move as they are.
  static ChunkShape straight(std::uint64_t bytes) {
    return {.length = bytes, .in_place = true};
  }
  /// As much of `rest` as a buffer of `buffer_size` takes, in whole granules
  /// and after `lead` bytes. Errors: std::invalid_argument if it takes none.
  static ChunkShape buffered(std::uint64_t rest, std::size_t lead,
                             std::size_t granule, std::size_t buffer_size);
};

/// Where the bytes of an operation lie on disk, in which order operations on
/// them take effect, and how the bytes get there. An operation has one of its
/// own. Offsets count from the operation's first byte.
///
/// The calls, in this order: enter(); prepare() until it says yes; chunk() and
/// start() for each part; settle() for a write; leave().
class SwapTarget {
 public:
  using Done = std::function<void(std::exception_ptr)>;
  using Operations = std::vector<std::shared_ptr<SwapOperation>>;

  virtual ~SwapTarget() = default;

  /// Gives the operation its place in the order. True: others come first, and
  /// the leave() of one of them returns it, maybe before this returns.
  /// Errors: the one that a write which comes first has failed with.
  /// Threads: the calls of one owner, one at a time.
  virtual bool enter(const std::shared_ptr<SwapOperation>& operation) = 0;
  /// The operation has ended, with its error or null. Returns those that waited
  /// for that alone; one that cannot succeed any more has its error set.
  virtual Operations leave(const SwapOperation& operation,
                           std::exception_ptr error) = 0;

  /// Gets what the I/O needs: space, an open file. Once it has returned true
  /// it does so at once. False: with `may_block`, only the end of another
  /// operation can help; without, it would have to wait.
  /// Errors: IoError. Threads: with `may_block`, the transfer thread.
  virtual bool prepare(IoRequest::Op op, bool may_block) = 0;
  /// Lets go of what others may need before this operation's turn comes, when
  /// prepare() is to be called again.
  virtual void unprepare() {}

  // Once it is prepared: ---------------------------------------------------

  /// How some of the `rest` bytes from `offset` on move. `data` is where they
  /// are in host memory, null if they are elsewhere. Errors:
  /// std::invalid_argument if host buffers are too small.
  virtual ChunkShape chunk(const std::byte* data, std::uint64_t offset,
                           std::uint64_t rest,
                           std::size_t buffer_size) const = 0;

  /// Starts the I/O. `bytes` is borrowed until `done` has been called, on an
  /// I/O thread. Errors: what is known at once.
  virtual void start(const SwapOperation& operation, std::uint64_t offset,
                     std::span<std::byte> bytes, Done done) = 0;

  /// All bytes of a write have been moved: sees to it that they stay, and are
  /// where they were meant to be. False: they do, and `done` is not called;
  /// else it is, on an I/O thread or before this returns. Errors: what is known
  /// at once.
  virtual bool settle(const SwapOperation& /*operation*/, Done /*done*/) {
    return false;
  }
};

}  // namespace torch_ext
