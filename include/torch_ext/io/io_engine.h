#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace torch_ext {

/// One transfer, at most kMaxTransfer bytes.
struct IoRequest {
  enum class Op { kRead, kWrite, kSync };
  /// The most bytes that Linux moves in one call.
  static constexpr std::size_t kMaxTransfer = 0x7ffff000;

  Op op = Op::kRead;
  int fd = -1;                ///< Borrowed until the completion is polled.
  std::uint64_t offset = 0;   ///< Bytes into the file.
  std::byte* data = nullptr;  ///< Borrowed likewise; not written by kWrite.
  std::size_t length = 0;     ///< Bytes; ignored by kSync.
  std::uint64_t cookie = 0;   ///< Handed back; the engine does not read it.
};

/// How a request ended. Moving fewer bytes than asked is not an error here.
struct IoCompletion {
  std::uint64_t cookie = 0;
  std::int64_t result = 0;  ///< Bytes moved, or -errno.
};

/// A way to have `depth()` requests in flight.
/// Threads: one thread owns the engine; only wake() may come from others.
/// The destructor waits until nothing is in flight. In a forked child, an
/// engine of the parent can only be destroyed, and its destructor then waits
/// for nothing.
class IoEngine {
 public:
  virtual ~IoEngine() = default;

  /// "libaio", "io_uring", "threads", "memory" or "null".
  virtual std::string_view name() const noexcept = 0;

  /// The most requests that may be in flight.
  virtual std::size_t depth() const noexcept = 0;

  /// Starts a prefix of `batch` and returns its length. Fewer than asked means
  /// "no room now": poll, then try the rest again. A request that the kernel
  /// refuses for its own sake counts as accepted, and completes with -errno.
  /// Nothing that the kernel does makes it throw.
  virtual std::size_t submit(std::span<const IoRequest> batch) = 0;

  /// Reaps up to out.size() completions, in any order. Blocks until `at_least`
  /// are there (0: never blocks), `timeout` is over, wake() is called, or
  /// nothing is in flight any more. Signals do not end it. Returns the number
  /// reaped. Errors: IoError if the kernel refuses to hand over completions.
  /// Nothing is then reaped, and the call can be made again.
  virtual std::size_t poll(std::span<IoCompletion> out, std::size_t at_least,
                           std::chrono::nanoseconds timeout) = 0;

  /// Makes a poll() that blocks return. If none does, the next one that would
  /// block returns.
  virtual void wake() noexcept = 0;
};

/// Makes one engine of the given depth. It is called once for each I/O thread.
using IoEngineFactory = std::function<std::unique_ptr<IoEngine>(int depth)>;

/// The names that make_engine_factory() takes.
std::span<const std::string_view> engine_names() noexcept;

/// An engine's factory, by name. Engines of one "memory" factory share one disk
/// in RAM, which tells files apart by device and inode. "null" moves no bytes
/// and reports that it did. "threads" makes at most 16 calls at a time, one on
/// each thread, whatever its depth.
/// Errors: std::invalid_argument for an unknown name. The factory itself throws
/// std::invalid_argument for a depth below 1, and IoError where the kernel
/// refuses. The IoError's detail names the setting that is the cause, where
/// that is known. "io_uring" throws IoError also where liburing was not built
/// in.
IoEngineFactory make_engine_factory(std::string_view name);

/// Why the engine cannot be used on this machine now; empty if it can.
/// Errors: std::invalid_argument for an unknown name.
std::string engine_unavailable_reason(std::string_view name);

}  // namespace torch_ext
