#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "base/owner_process.h"
#include "file_source.h"
#include "memory/arena.h"
#include "torch_ext/base/error.h"
#include "torch_ext/paging/pager.h"
#include "touch_plan.h"

namespace torch_ext {

/// What a Pager has. pager.cpp tells the rules.
class Pager::Impl {
 public:
  explicit Impl(PagerOptions options)
      : options_(std::move(options)),
        store_(*checked(options_).store),
        arena_(options_.memory) {
    stall_.loosened.reserve(kMostLoosened);
  }

  ~Impl() {
    MutexLock lock(mutex_);
    closing_ = true;
    while (in_flight_ > 0) changed_.wait(lock);
  }

  Unit add(std::uint64_t bytes, std::string name, OnPinned on_pinned);
  Unit add(FileRange range, std::string name, OnPinned on_pinned);
  void remove(Unit unit);
  void pin(Pins& pins, std::span<const Touch> touches, bool held, bool planned);
  void unpin(const Pins& pins) noexcept;
  void undo_replaced(Pins& pins) noexcept;
  void begin_round();
  void flush();
  PagerStats stats() const;

  const OwnerProcess owner_{"pager"};

 private:
  friend class Pager;
  friend struct PagerProbe;

  enum class State { kAway, kReading, kHere, kWriting };

  struct Paged;
  using Places = std::map<std::uint64_t, Paged*>;

  struct Paged {
    Unit number = 0;
    std::string name;
    std::uint64_t bytes = 0;
    std::uint64_t room = 0;  ///< Bytes of its run.
    OnPinned on_pinned;
    std::uint64_t skew = 0;  ///< Where its bytes begin in its run.
    /// Has the run up to the end of the bytes. Null before the first write of a
    /// unit that has a source.
    std::shared_ptr<Extent> extent;
    std::unique_ptr<FileSource> source;  ///< Until the extent has the bytes.
    State state = State::kAway;
    std::uint64_t run = 0;  ///< Where it is in the arena, unless it is away.
    /// Its entry of by_place_ while it is away, so that to take a run and to
    /// give it back allocates nothing.
    Places::node_type place;
    std::size_t pins = 0;
    std::size_t writers = 0;  ///< Those pins that change it.
    std::size_t wanted = 0;   ///< By the thread whose turn it is in bring().
    std::size_t claimed = 0;  ///< By threads there that are in an operator.
    bool on_drive = false;    ///< The source or extent has bytes of it.
    bool dirty = false;       ///< Has changed since its last write began.
    /// Was taken to be replaced and not read. Its memory has no bytes of it,
    /// and nobody but its first pin has seen it.
    bool blank = false;
    bool resident = false;
    bool prefetched = false;        ///< Is being read, and nobody waits for it.
    bool unreadable = false;        ///< Reading it ahead has failed.
    Ticket transfer;                ///< While it is read or written.
    std::exception_ptr read_error;  ///< What its last read met.
    std::exception_ptr write_error;  ///< What its last write met. It is dirty.

    bool here() const {
      return state == State::kHere || state == State::kWriting;
    }
    bool evictable() const {
      return state == State::kHere && !dirty && pins == 0;
    }
  };

  /// A place in the arena, and who has to go.
  struct Hole {
    std::uint64_t begin = 0;
    std::vector<Paged*> evicted;
  };
  /// Which places will do.
  enum class Rule {
    kAhead,   ///< Units that can go now, and are needed later than this one.
    kNeeded,  ///< All but pinned ones; those that are needed latest.
    kPacked,  ///< All but pinned ones; the lowest.
  };
  /// Bytes of the arena, from begin to end.
  struct Range {
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
  };
  struct Search {
    Rule rule = Rule::kNeeded;
    std::size_t ahead = 0;  ///< As in pump(), for kAhead.
    bool nested = false;    ///< The thread is in an operator.
  };
  /// The best place so far.
  struct Best {
    std::uint64_t begin = 0;
    std::size_t soonest = 0;  ///< Distance of the unit that is needed first.
    std::uint64_t bytes = 0;  ///< That have to go.
  };

  /// What pump() has found no room for. Until something changes, nothing that
  /// is as large and comes as late has room, but where `loosened` says.
  struct Stall {
    bool known = false;
    std::uint64_t room = 0;
    std::size_t ahead = 0;
    std::vector<Range> loosened = {};
  };
  /// With more, all places are looked at again.
  static constexpr std::size_t kMostLoosened = 32;

  enum class Progress { kDone, kMoving, kClearing, kNoRoom };

  /// A thread that waits in bring().
  struct Wait {
    std::span<const Touch> touches;
    const bool nested = false;  ///< As in Visit.
    bool packs = false;       ///< Puts its units side by side, at the low end,
    bool clears = false;      ///< and lets go of them first.
    std::uint64_t ended = 0;  ///< What ended_ was when it began to.
    std::vector<Unit> written = {};  ///< Units that it made be written.
  };

  /// The turn of a thread in bring(). A thread that is in an operator already
  /// takes none: others may wait for it.
  struct Visit {
    std::span<const Touch> touches;
    const bool nested = false;
    bool running = false;
    bool has_room = true;  ///< Else nothing is read ahead.
  };

  /// A touch that undo_replaced() has ended has this unit.
  static constexpr Unit kNoUnit = std::numeric_limits<Unit>::max();

  static const PagerOptions& checked(const PagerOptions& options) {
    if (options.store == nullptr) {
      throw std::invalid_argument("pager: there is no store");
    }
    if (options.memory < page_size()) {
      throw std::invalid_argument("pager: memory must be at least " +
                                  std::to_string(page_size()) + ", got " +
                                  std::to_string(options.memory));
    }
    return options;
  }

  Paged& at(Unit unit) const REQUIRES(mutex_) {
    if (unit >= units_.size() || units_[unit] == nullptr) {
      throw std::invalid_argument("pager: there is no unit " +
                                  std::to_string(unit));
    }
    return *units_[unit];
  }

  static bool usable(const Paged& unit, Access access) {
    if (unit.state == State::kWriting) return access == Access::kRead;
    const bool has_bytes = !unit.blank || unit.pins > 0;
    return unit.state == State::kHere &&
           (has_bytes || access == Access::kReplace);
  }

  Unit add(std::unique_ptr<Paged> unit);
  std::byte* data_of(const Paged& unit) const REQUIRES(mutex_) {
    return arena_.at(unit.run) + unit.skew;
  }
  void promote(Paged& unit) REQUIRES(mutex_);
  void note_touch(const Paged& unit, bool forward) REQUIRES(mutex_);
  void bring(std::span<const Touch> touches, MutexLock& lock) REQUIRES(mutex_);
  Progress request(Wait& wait) REQUIRES(mutex_);
  Progress fetch(Paged& unit, Access access, Wait& wait) REQUIRES(mutex_);
  Progress fill(Paged& unit) REQUIRES(mutex_);
  bool give_own_back(Wait& wait) REQUIRES(mutex_);
  void check_written(Wait& wait) const REQUIRES(mutex_);
  void begin(Visit& visit, MutexLock& lock) REQUIRES(mutex_);
  void set_room(Visit& visit, bool has_room) REQUIRES(mutex_);
  void end(Visit& visit) REQUIRES(mutex_);
  void something_ended() noexcept REQUIRES(mutex_);
  void wait_for_transfer(MutexLock& lock) REQUIRES(mutex_);
  void wait_some(MutexLock& lock) REQUIRES(mutex_) UNCHECKED_THREADS;
  std::optional<Hole> find_hole(const Paged& unit, const Search& search,
                                const std::vector<Range>* near = nullptr) const
      REQUIRES(mutex_);
  void look_near(const Range& range, const Paged& unit, const Search& search,
                 std::optional<Best>& best) const REQUIRES(mutex_);
  void weigh(std::uint64_t begin, std::uint64_t size, const Search& search,
             std::optional<Best>& best) const REQUIRES(mutex_);
  Hole hole_at(std::uint64_t begin, std::uint64_t size) const REQUIRES(mutex_);
  std::optional<Hole> find_room_ahead(const Paged& unit) REQUIRES(mutex_);
  void loosened(const Paged& unit) noexcept REQUIRES(mutex_);
  bool may_go(const Paged& unit, const Search& search) const REQUIRES(mutex_);
  std::size_t distance(const Paged& unit) const REQUIRES(mutex_);
  void take(Paged& unit, const Hole& hole) noexcept REQUIRES(mutex_);
  void evict(Paged& unit) noexcept REQUIRES(mutex_);
  void start_read(Paged& unit, IoPriority priority) REQUIRES(mutex_);
  void start_write(Paged& unit, IoPriority priority) noexcept REQUIRES(mutex_);
  void read_ended(Paged& unit, std::exception_ptr error) noexcept;
  void write_ended(Paged& unit, std::exception_ptr error) noexcept;
  void write_back() REQUIRES(mutex_);
  bool is_writing(Unit number) const REQUIRES(mutex_);
  void pump() noexcept REQUIRES(mutex_);
  void choose_residents() REQUIRES(mutex_);
  std::vector<const Paged*> units_of(std::span<const Touch> touches) const
      REQUIRES(mutex_);
  static std::uint64_t room_of(const std::vector<const Paged*>& units);
  [[noreturn]] void refuse(std::span<const Touch> touches) const
      REQUIRES(mutex_);

  const PagerOptions options_;
  Store& store_;
  /// One for all that it submits, on whichever thread.
  const std::uint64_t caller_ = this_caller();

  mutable Mutex mutex_;
  CondVar changed_;
  Arena arena_ GUARDED_BY(mutex_);
  std::vector<std::unique_ptr<Paged>> units_ GUARDED_BY(mutex_);
  Places by_place_ GUARDED_BY(mutex_);
  TouchPlan plan_ GUARDED_BY(mutex_);
  /// So many places of the plan, from the cursor on, need no read.
  std::size_t ahead_ GUARDED_BY(mutex_) = 0;
  Stall stall_ GUARDED_BY(mutex_);
  /// Units that have changed, for write_back().
  std::vector<Unit> changed_units_ GUARDED_BY(mutex_);
  std::size_t in_flight_ GUARDED_BY(mutex_) = 0;
  std::size_t waiters_ GUARDED_BY(mutex_) = 0;
  bool turn_taken_ GUARDED_BY(mutex_) = false;  ///< Somebody is in bring().
  /// Threads in bring() that have no room yet.
  std::size_t without_room_ GUARDED_BY(mutex_) = 0;
  std::size_t operator_pins_ GUARDED_BY(mutex_) = 0;
  /// How often something that was in others' way has ended.
  std::uint64_t ended_ GUARDED_BY(mutex_) = 0;
  std::uint64_t resident_bytes_ GUARDED_BY(mutex_) = 0;
  bool closing_ GUARDED_BY(mutex_) = false;
  PagerStats counts_ GUARDED_BY(mutex_);
};

}  // namespace torch_ext
