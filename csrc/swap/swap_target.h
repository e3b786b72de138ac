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
  /// True if they move straight to or from the tensor's own memory. Otherwise
  /// the other members say how they lie in a host buffer.
  bool in_place = false;
  std::size_t lead = 0;      ///< Bytes left free before them.
  std::uint64_t padded = 0;  ///< Bytes that move, with zeros at the end.
  std::uint64_t room = 0;    ///< Bytes of the buffer, with the lead.

  /// `bytes` bytes of host memory that move as they are.
  static ChunkShape straight(std::uint64_t bytes) {
    return {.length = bytes, .in_place = true};
  }
  /// As much of `rest` as a buffer of `buffer_size` bytes takes, in whole
  /// granules and after `lead` bytes. Errors: std::invalid_argument if it takes
  /// none.
  static ChunkShape buffered(std::uint64_t rest, std::size_t lead,
                             std::size_t granule, std::size_t buffer_size);
};

/// The disk's side of an operation: where its bytes lie, in which order
/// operations on them take effect, and how the bytes get there. Each operation
/// has its own. Offsets count from the operation's first byte.
///
/// The calls come in this order: enter(); prepare() until it returns true;
/// chunk() and start() for each part; settle() for a write; leave().
class SwapTarget {
 public:
  using Done = std::function<void(std::exception_ptr)>;
  using Operations = std::vector<std::shared_ptr<SwapOperation>>;

  virtual ~SwapTarget() = default;

  /// Gives the operation its place in the order. Returns true if others come
  /// first. The leave() of one of them then returns the operation, maybe before
  /// this call returns. Errors: the error of a write that comes first and has
  /// failed. Threads: the calls of one owner, one at a time.
  virtual bool enter(const std::shared_ptr<SwapOperation>& operation) = 0;
  /// The operation has ended, with `error` or null. Returns the operations that
  /// have nothing else to wait for. If one of them cannot succeed any more, its
  /// error is set.
  virtual Operations leave(const SwapOperation& operation,
                           std::exception_ptr error) = 0;

  /// Gets what the I/O needs: space, an open file. After it has returned true
  /// once, it returns true at once. With `may_block`, false means that only the
  /// end of another operation can help. Without, false means that it would have
  /// to wait. Errors: IoError. Threads: with `may_block`, only the transfer
  /// thread.
  virtual bool prepare(IoRequest::Op op, bool may_block) = 0;
  /// Lets go of what prepare() got, since others may need it before this
  /// operation's turn comes. prepare() is then called again.
  virtual void unprepare() {}

  // Called once it is prepared: --------------------------------------------

  /// How some of the `rest` bytes from `offset` on move. `data` is where they
  /// are in host memory, or null if they are elsewhere. Errors:
  /// std::invalid_argument if host buffers are too small.
  virtual ChunkShape chunk(const std::byte* data, std::uint64_t offset,
                           std::uint64_t rest,
                           std::size_t buffer_size) const = 0;

  /// Starts the I/O. `bytes` is borrowed until `done` has been called, on an
  /// I/O thread. Errors: those that are known at once.
  virtual void start(const SwapOperation& operation, std::uint64_t offset,
                     std::span<std::byte> bytes, Done done) = 0;

  /// All bytes of a write have moved. Sees to it that they stay, and are where
  /// they were meant to be. Returns false if that is so already; `done` is then
  /// not called. Otherwise `done` is called, on an I/O thread or before this
  /// returns. Errors: those that are known at once.
  virtual bool settle(const SwapOperation& /*operation*/, Done /*done*/) {
    return false;
  }
};

}  // namespace torch_ext
