#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "torch_ext/io/file.h"
#include "torch_ext/io/io_queue.h"
#include "torch_ext/store/store.h"

namespace torch_ext {

/// What a touch does with the bytes of a unit.
enum class Access {
  kRead,
  kWrite,    ///< Reads and changes them.
  kReplace,  ///< Overwrites all of them, so they need not be read first.
};

/// Bytes of a file that is only read. Nobody may write to it.
struct FileRange {
  std::shared_ptr<const File> file = nullptr;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;  ///< > 0
};

/// How to make a Pager.
struct PagerOptions {
  std::shared_ptr<Store> store = nullptr;
  /// Bytes of host memory for all units that are not on the drive alone. It is
  /// rounded down to whole pages, and is a limit: the pager takes no byte more.
  std::uint64_t memory = 0;
  /// Reads the files that units are ranges of. It may be null without any.
  std::shared_ptr<IoQueue> files = nullptr;
  /// Called on a thread that waits in pin() or flush(), without a lock: ten
  /// times a second, and whenever something ends. What it throws leaves that
  /// call. It may be empty.
  std::function<void()> while_waiting = {};
};

/// Counters since a pager was made.
struct PagerStats {
  std::uint64_t touches = 0;        ///< Repeated ones of a unit count once.
  std::uint64_t foreseen = 0;       ///< Touches that the plan knew.
  std::uint64_t plans = 0;          ///< How often a plan was made.
  std::uint64_t hits = 0;           ///< Pins that found their unit in memory.
  std::uint64_t late = 0;           ///< Pins that found it being read.
  std::uint64_t misses = 0;         ///< Pins that had to begin to read it.
  double wait_seconds = 0;          ///< In pin(), added up over threads.
  std::uint64_t bytes_read = 0;     ///< Padded to the store's granule.
  std::uint64_t bytes_written = 0;  ///< As bytes_read.
  std::uint64_t memory = 0;         ///< Bytes that it has, and
  std::uint64_t in_use = 0;         ///< that hold units now, and
  std::uint64_t peak = 0;           ///< that held units at most.
  std::uint64_t resident = 0;       ///< Bytes of units that are to stay.
};

/// Memory for more than fits: units of bytes that lie on the drive and come
/// when they are touched. A unit has one address while it is pinned, and none
/// that counts while it is not.
///
/// The pager notes the order of the touches. From the second round on it reads
/// ahead, and keeps a part of the units in memory for good. What it expects
/// costs time where it is wrong, and never changes a byte. pager.cpp tells the
/// rules.
///
/// Errors: a unit that cannot be read is an error of the pin that needs it, and
/// the next pin tries again. A unit that cannot be written stays in memory; the
/// pin that needs its room, or flush(), has the error, and the next one tries
/// another place. So no byte is lost.
/// Threads: any. The destructor waits for transfers; no pin may be left.
class Pager {
 public:
  using Unit = std::uint32_t;

  struct Touch {
    Unit unit = 0;
    Access access = Access::kRead;
    bool forward = false;  ///< A forward pass reads it.
  };

  /// Told where a unit's bytes are when its first pin begins, and null when its
  /// last pin ends. Called under the pager's lock, on the thread that pins. It
  /// must not block, throw or call the pager.
  using OnPinned = std::function<void(std::byte* data)>;

  /// Keeps units where they are, until its end. Move-only. What pin() returned
  /// ends on the thread that called it.
  class Pins {
   public:
    Pins() = default;
    Pins(Pins&& other) noexcept { *this = std::move(other); }
    Pins& operator=(Pins&& other) noexcept;
    ~Pins() { release(); }

    /// Ends it early. Does nothing at a second call.
    void release() noexcept;
    /// Where the bytes of touch number `i` are: at a multiple of 4096, or of 64
    /// for a unit with the bytes of a file.
    std::byte* data(std::size_t i) const;
    /// What should have replaced the bytes has failed. Units that were taken
    /// for it without being read, and that nobody else has pinned since, have
    /// their old bytes again. They are pinned no more: data() of them throws
    /// std::invalid_argument.
    void undo_replaced() noexcept;

   private:
    friend class Pager;
    Pager* pager_ = nullptr;
    bool held_ = false;
    std::vector<Touch> touches_;
    std::vector<bool> unread_;  ///< By touch.
  };

  /// Errors: std::invalid_argument; IoError (memory).
  explicit Pager(PagerOptions options);
  Pager(const Pager&) = delete;
  Pager& operator=(const Pager&) = delete;
  ~Pager();

  /// A new unit of `bytes` (> 0) bytes, with space on the drive. Their content
  /// is zeros until they are written. `name` is for messages. Errors: IoError
  /// (ENOSPC and others); std::invalid_argument if it is larger than memory.
  Unit add(std::uint64_t bytes, std::string name, OnPinned on_pinned = {});

  /// A new unit with the bytes of a file. They are read there until the unit
  /// has changed. Only then it has space on the drive, and a drive without room
  /// is an error of writing. After a read with an error, or if the file has
  /// changed, its pin is an EIO. Errors: IoError; std::invalid_argument if the
  /// file ends before, or the unit is larger than memory.
  Unit add(FileRange range, std::string name, OnPinned on_pinned = {});

  /// Forgets a unit that is not pinned. Its space is free again. Waits for its
  /// transfers.
  void remove(Unit unit);

  /// Brings units into memory and keeps them there. Blocks until all are there.
  /// An operator pins all that it needs at once: a thread that waits here holds
  /// nothing that others wait for.
  ///
  /// Nothing is pinned after an error. Errors: IoError; what while_waiting
  /// throws; StateError in a forked child. BudgetError if the units do not fit
  /// beside those that hold() keeps. Where this thread has pinned something
  /// already, all that is pinned counts as held.
  Pins pin(std::span<const Touch> touches);

  /// The same, for longer than an operator. Others do not wait for its end:
  /// where it is in their way they get a BudgetError. With `planned`, it comes
  /// at its place in every round, as an operator does, so it is read ahead.
  Pins hold(std::span<const Touch> touches, bool planned = false);

  /// Says that the touches begin anew. Where they say which of them are of a
  /// forward pass, the pager notices that by itself.
  void begin_round();

  /// Returns when all that has changed is on the drive (written, not synced).
  /// A unit that is pinned to be changed is written after that. Errors: the
  /// first IoError; all others are written all the same; what while_waiting
  /// throws.
  void flush();

  PagerStats stats() const;
  std::uint64_t bytes(Unit unit) const;
  const std::string& name(Unit unit) const;
  /// Whether its bytes are in memory now.
  bool in_memory(Unit unit) const;
  /// Whether it is one of those that stay.
  bool resident(Unit unit) const;

 private:
  friend struct PagerProbe;  // For tests.
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace torch_ext
