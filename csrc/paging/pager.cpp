// How units come and go
//
// A unit is away (on the drive alone), being read, or here. While it is here it
// may be written, and it has a run of bytes in the arena:
//
//   kAway -> kReading -> kHere <-> kWriting -> ... -> kAway
//
// Who is pinned stays. Any other that is on the drive as it is here may go at
// once, on any thread.
//
// Reading ahead. TouchPlan foresees the touches. pump() reads the units along
// it, and makes room by evicting those whose next touch is farther than that of
// the unit that comes. It stops at the first that finds no room so. Each touch
// and each end of a transfer calls it again.
//
// Residents. Under a cyclic order, a cache of what was used last never hits,
// and neither does the best choice when all is changed on the way back. So a
// part of the units stays for good: as many bytes as memory has beyond a
// window, spread evenly over the plan, so that the drive is busy evenly. Only a
// pin that finds no other room evicts one.
//
// Room. A run is contiguous, so to make room is to choose a place. find_hole()
// looks at every place where the run could begin, and takes the one whose units
// are all needed latest. Residents lie at the high end, so that the window is
// in one piece.
//
// Waiting. Whoever needs units that are not here waits in bring(), one thread
// at a time. It has pinned nothing of what it asked for. Reading ahead stops as
// long as it has no room. It waits for transfers, which end by themselves, or
// for operators of other threads, which end without it. If neither is left, it
// packs its own units anew, at the low end. If they do not fit even so, that is
// a BudgetError. A thread that has pinned something already does not wait for
// others, so there is no circle.
//
// Writing. A unit that has changed is written back once another one is touched,
// so what is evicted is mostly clean. It is not changed while it is written.
// Residents are written only if they are evicted, or by flush(). A unit whose
// write failed stays, and is written elsewhere when it has to go.

#include "torch_ext/paging/pager.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <optional>
#include <stdexcept>
#include <utility>

#include "base/mutex.h"
#include "base/owner_process.h"
#include "memory/arena.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"
#include "touch_plan.h"

namespace torch_ext {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kSlice{100};

// Pins of operators that this thread is in, of all pagers.
thread_local std::size_t pinned_by_thread = 0;

}  // namespace

class Pager::Impl {
 public:
  explicit Impl(PagerOptions options)
      : options_(std::move(options)),
        store_(*checked(options_).store),
        arena_(options_.memory) {}

  ~Impl() {
    MutexLock lock(mutex_);
    closing_ = true;
    while (in_flight_ > 0) changed_.wait(lock);
  }

  Unit add(std::uint64_t bytes, std::string name, OnPinned on_pinned);
  void remove(Unit unit);
  void pin(Pins& pins, std::span<const Touch> touches, bool held);
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

  struct Paged {
    Unit number = 0;
    std::string name;
    std::uint64_t bytes = 0;
    std::uint64_t room = 0;  ///< Bytes of its run.
    OnPinned on_pinned;
    std::shared_ptr<Extent> extent;
    State state = State::kAway;
    std::uint64_t run = 0;  ///< Where it is in the arena, unless it is away.
    std::size_t pins = 0;
    std::size_t wanted = 0;  ///< Threads that wait to pin it.
    bool on_drive = false;   ///< The extent has bytes of it.
    bool dirty = false;      ///< Has changed since its last write began.
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

  enum class Progress { kDone, kMoving, kClearing, kNoRoom };

  /// A thread that waits in bring().
  struct Wait {
    std::span<const Touch> touches;
    std::vector<bool>& unread;
    bool packs = false;   ///< Puts its units side by side, at the low end,
    bool clears = false;  ///< and lets go of them first.
    std::vector<Unit> written = {};  ///< Units that it made be written.
  };

  /// The turn of a thread in bring(). A thread that is in an operator already
  /// takes none: others may wait for it.
  struct Visit {
    std::span<const Touch> touches;
    const bool nested = pinned_by_thread > 0;
    bool running = false;
    bool has_room = true;  ///< Else nothing is read ahead.
  };

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
    return unit.state == State::kHere ||
           (unit.state == State::kWriting && access == Access::kRead);
  }

  void note_touch(const Paged& unit, bool forward) REQUIRES(mutex_);
  void bring(std::span<const Touch> touches, std::vector<bool>& unread,
             MutexLock& lock) REQUIRES(mutex_);
  Progress request(Wait& wait) REQUIRES(mutex_);
  Progress fetch(Paged& unit, std::size_t touch, Wait& wait) REQUIRES(mutex_);
  bool give_own_back(Wait& wait) REQUIRES(mutex_);
  void check_written(Wait& wait) const REQUIRES(mutex_);
  void begin(Visit& visit, MutexLock& lock) REQUIRES(mutex_);
  void set_room(Visit& visit, bool has_room) REQUIRES(mutex_);
  void end(Visit& visit) REQUIRES(mutex_);
  void wait_some(MutexLock& lock) REQUIRES(mutex_) UNCHECKED_THREADS;
  std::optional<Hole> find_hole(const Paged& unit, Rule rule,
                                std::size_t ahead = 0) const REQUIRES(mutex_);
  bool may_go(const Paged& unit, Rule rule, std::size_t farther_than) const
      REQUIRES(mutex_);
  std::size_t distance(const Paged& unit) const REQUIRES(mutex_);
  void take(Paged& unit, const Hole& hole) REQUIRES(mutex_);
  void evict(Paged& unit) REQUIRES(mutex_);
  void start_read(Paged& unit, IoPriority priority) REQUIRES(mutex_);
  void start_write(Paged& unit, IoPriority priority) noexcept REQUIRES(mutex_);
  void read_ended(Paged& unit, std::exception_ptr error) noexcept;
  void write_ended(Paged& unit, std::exception_ptr error) noexcept;
  void write_back() REQUIRES(mutex_);
  bool is_writing(Unit number) const REQUIRES(mutex_);
  void pump() noexcept REQUIRES(mutex_);
  void choose_residents() REQUIRES(mutex_);
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
  std::map<std::uint64_t, Paged*> by_place_ GUARDED_BY(mutex_);
  TouchPlan plan_ GUARDED_BY(mutex_);
  /// So many places of the plan, from the cursor on, need no read.
  std::size_t ahead_ GUARDED_BY(mutex_) = 0;
  /// Units that have changed, for write_back().
  std::vector<Unit> changed_units_ GUARDED_BY(mutex_);
  std::size_t in_flight_ GUARDED_BY(mutex_) = 0;
  std::size_t waiters_ GUARDED_BY(mutex_) = 0;
  bool turn_taken_ GUARDED_BY(mutex_) = false;  ///< Somebody is in bring().
  /// Threads in bring() that have no room yet.
  std::size_t without_room_ GUARDED_BY(mutex_) = 0;
  std::size_t operator_pins_ GUARDED_BY(mutex_) = 0;
  std::uint64_t resident_bytes_ GUARDED_BY(mutex_) = 0;
  bool closing_ GUARDED_BY(mutex_) = false;
  PagerStats counts_ GUARDED_BY(mutex_);
};

Pager::Unit Pager::Impl::add(std::uint64_t bytes, std::string name,
                             OnPinned on_pinned) {
  if (bytes == 0) throw std::invalid_argument("pager: a unit of 0 bytes");
  auto unit = std::make_unique<Paged>();
  unit->extent = store_.allocate(bytes);
  unit->name = std::move(name);
  unit->bytes = bytes;
  unit->room = align_up(unit->extent->padded_size(), page_size());
  unit->on_pinned = std::move(on_pinned);
  const MutexLock lock(mutex_);
  if (unit->room > arena_.size()) {
    throw std::invalid_argument("host_memory is too small: '" + unit->name +
                                "' needs " + std::to_string(unit->room) +
                                " bytes at once, and it has " +
                                std::to_string(arena_.size()));
  }
  unit->number = static_cast<Unit>(units_.size());
  units_.push_back(std::move(unit));
  return units_.back()->number;
}

void Pager::Impl::remove(Unit number) {
  std::unique_ptr<Paged> removed;
  MutexLock lock(mutex_);
  Paged& unit = at(number);
  if (unit.pins > 0 || unit.wanted > 0) {
    throw StateError("pager: unit '" + unit.name + "' is in use");
  }
  // Nobody may begin another transfer meanwhile.
  removed = std::move(units_[number]);
  ++waiters_;
  while (unit.state == State::kReading || unit.state == State::kWriting) {
    changed_.wait(lock);
  }
  --waiters_;
  if (unit.resident) resident_bytes_ -= unit.room;
  if (unit.here()) evict(unit);
}

void Pager::Impl::note_touch(const Paged& unit, bool forward) {
  const TouchPlan::Counts before = plan_.counts();
  const std::size_t places = plan_.touch(unit.number, forward);
  ahead_ -= std::min(ahead_, places);
  if (plan_.counts().plans != before.plans) choose_residents();
  if (plan_.counts().touches == before.touches) return;
  if (unit.here()) {
    ++counts_.hits;
  } else {
    ++(unit.state == State::kReading ? counts_.late : counts_.misses);
  }
}

void Pager::Impl::pin(Pins& pins, std::span<const Touch> touches, bool held) {
  owner_.check();
  pins.touches_.assign(touches.begin(), touches.end());
  pins.unread_.assign(touches.size(), false);
  MutexLock lock(mutex_);
  for (const Touch& touch : touches) {
    const Paged& unit = at(touch.unit);
    if (!held) note_touch(unit, touch.forward);
  }
  const bool all_here =
      std::ranges::all_of(touches, [&](const Touch& touch) REQUIRES(mutex_) {
        return usable(at(touch.unit), touch.access);
      });
  if (!all_here) bring(touches, pins.unread_, lock);
  for (const Touch& touch : touches) {
    Paged& unit = at(touch.unit);
    if (touch.access != Access::kRead) unit.dirty = true;
    if (unit.pins++ == 0 && unit.on_pinned) unit.on_pinned(arena_.at(unit.run));
  }
  if (!held) {
    operator_pins_ += touches.size();
    pinned_by_thread += touches.size();
  }
  pins.held_ = held;
  write_back();
  pump();
}

void Pager::Impl::unpin(const Pins& pins) noexcept {
  const MutexLock lock(mutex_);
  for (const Touch& touch : pins.touches_) {
    Paged& unit = *units_[touch.unit];
    if (--unit.pins > 0) continue;
    if (unit.on_pinned) unit.on_pinned(nullptr);
    if (!unit.dirty) continue;
    try {
      changed_units_.push_back(unit.number);
    } catch (...) {
      // It is written when its room is needed.
    }
  }
  if (!pins.held_) {
    operator_pins_ -= pins.touches_.size();
    pinned_by_thread -= std::min(pinned_by_thread, pins.touches_.size());
  }
  if (waiters_ > 0) changed_.notify_all();
}

void Pager::Impl::undo_replaced(Pins& pins) noexcept {
  const MutexLock lock(mutex_);
  for (std::size_t i = 0; i < pins.touches_.size(); ++i) {
    if (!pins.unread_[i]) continue;
    Paged& unit = *units_[pins.touches_[i].unit];
    const auto own = static_cast<std::size_t>(
        std::ranges::count(pins.touches_, unit.number, &Touch::unit));
    // Whoever else has pinned it has seen the new bytes.
    if (unit.pins > own) continue;
    unit.dirty = false;
    pins.unread_[i] = false;
    if (unit.on_pinned) unit.on_pinned(nullptr);
    // The pins go on counting, for unpin().
    evict(unit);
  }
}

// Waits until all the touches' units can be used. Other threads that need
// something wait for their turn meanwhile.
void Pager::Impl::bring(std::span<const Touch> touches,
                        std::vector<bool>& unread, MutexLock& lock) {
  const Clock::time_point start = Clock::now();
  Visit visit{.touches = touches};
  Wait wait{touches, unread};
  begin(visit, lock);
  for (const Touch& touch : touches) {
    units_[touch.unit]->read_error = nullptr;
  }
  try {
    for (;;) {
      check_written(wait);
      if (wait.clears) {
        set_room(visit, false);
        if (give_own_back(wait)) {
          wait_some(lock);
          continue;
        }
        wait.clears = false;
      }
      const Progress progress = request(wait);
      if (progress == Progress::kDone) break;
      set_room(visit, progress == Progress::kMoving);
      if (progress != Progress::kNoRoom || in_flight_ > 0) {
        wait_some(lock);
      } else if (!wait.packs) {
        wait.packs = wait.clears = true;
      } else if (!visit.nested && operator_pins_ > 0) {
        end(visit);
        wait_some(lock);
        begin(visit, lock);
        wait.packs = false;
      } else {
        refuse(touches);
      }
    }
  } catch (...) {
    for (std::size_t i = 0; i < touches.size(); ++i) {
      Paged* const unit = units_[touches[i].unit].get();
      if (unread[i] && unit != nullptr && unit->evictable()) evict(*unit);
      unread[i] = false;
    }
    end(visit);
    throw;
  }
  end(visit);
  counts_.wait_seconds +=
      std::chrono::duration<double>(Clock::now() - start).count();
}

// Errors: what while_waiting throws; a unit has gone.
void Pager::Impl::begin(Visit& visit, MutexLock& lock) {
  while (turn_taken_ && !visit.nested) wait_some(lock);
  for (const Touch& touch : visit.touches) at(touch.unit);
  for (const Touch& touch : visit.touches) ++at(touch.unit).wanted;
  if (!visit.nested) turn_taken_ = true;
  visit.running = true;
}

void Pager::Impl::set_room(Visit& visit, bool has_room) {
  if (has_room == visit.has_room) return;
  visit.has_room = has_room;
  has_room ? --without_room_ : ++without_room_;
}

void Pager::Impl::end(Visit& visit) {
  set_room(visit, true);
  if (!std::exchange(visit.running, false)) return;
  for (const Touch& touch : visit.touches) --units_[touch.unit]->wanted;
  if (!visit.nested) turn_taken_ = false;
  if (waiters_ > 0) changed_.notify_all();
}

// Errors: that of a unit that could not be written, and has to go.
void Pager::Impl::check_written(Wait& wait) const {
  std::erase_if(wait.written, [this](Unit number) REQUIRES(mutex_) {
    const Paged* const unit = units_[number].get();
    if (unit == nullptr) return true;
    if (unit->write_error) std::rethrow_exception(unit->write_error);
    return unit->state != State::kWriting;
  });
}

// Begins what the touches still need, as far as there is room.
Pager::Impl::Progress Pager::Impl::request(Wait& wait) {
  Progress result = Progress::kDone;
  for (std::size_t i = 0; i < wait.touches.size(); ++i) {
    Paged& unit = *units_[wait.touches[i].unit];
    if (usable(unit, wait.touches[i].access)) continue;
    if (unit.state == State::kAway) {
      if (unit.read_error) {
        std::rethrow_exception(std::exchange(unit.read_error, nullptr));
      }
      const Progress progress = fetch(unit, i, wait);
      if (progress > Progress::kMoving) return progress;
      result = std::max(result, progress);
      continue;
    }
    result = std::max(result, Progress::kMoving);
    if (unit.state == State::kWriting ||
        std::exchange(unit.prefetched, false)) {
      store_.promote(unit.transfer, IoPriority::kNow);
    }
  }
  return result;
}

// Begins to bring a unit that is away, or to make room for it.
Pager::Impl::Progress Pager::Impl::fetch(Paged& unit, std::size_t touch,
                                         Wait& wait) {
  const std::optional<Hole> hole =
      find_hole(unit, wait.packs ? Rule::kPacked : Rule::kNeeded);
  if (!hole) return Progress::kNoRoom;
  bool clear = true;
  for (Paged* other : hole->evicted) {
    if (other->evictable()) continue;
    clear = false;
    if (other->state == State::kHere) {
      start_write(*other, IoPriority::kNow);
    } else {
      store_.promote(other->transfer, IoPriority::kNow);
    }
    if (other->state != State::kReading) {
      wait.written.push_back(other->number);
    }
  }
  if (!clear) return Progress::kClearing;
  take(unit, *hole);
  if (wait.touches[touch].access == Access::kReplace || !unit.on_drive) {
    if (wait.touches[touch].access != Access::kReplace) {
      std::memset(arena_.at(unit.run), 0, unit.room);
    }
    wait.unread[touch] = true;
    unit.state = State::kHere;
    return Progress::kDone;
  }
  start_read(unit, IoPriority::kNow);
  return Progress::kMoving;
}

// Lets go of the touches' own units, so that they can be packed. Returns
// whether it has to be called again.
bool Pager::Impl::give_own_back(Wait& wait) {
  bool again = false;
  for (std::size_t i = 0; i < wait.touches.size(); ++i) {
    Paged& unit = *units_[wait.touches[i].unit];
    wait.unread[i] = false;
    if (unit.state == State::kAway || unit.pins > 0) continue;
    if (unit.evictable()) {
      evict(unit);
      continue;
    }
    again = true;
    if (unit.state != State::kHere) continue;
    start_write(unit, IoPriority::kNow);
    wait.written.push_back(unit.number);
  }
  return again;
}

void Pager::Impl::wait_some(MutexLock& lock) {
  ++waiters_;
  changed_.wait_for(lock, kSlice);
  if (options_.while_waiting) {
    lock.unlock();
    try {
      options_.while_waiting();
    } catch (...) {
      lock.lock();
      --waiters_;
      throw;
    }
    lock.lock();
  }
  --waiters_;
}

std::size_t Pager::Impl::distance(const Paged& unit) const {
  return unit.resident ? 0 : plan_.distance(unit.number);
}

bool Pager::Impl::may_go(const Paged& unit, Rule rule,
                         std::size_t farther_than) const {
  if (unit.pins > 0 || unit.wanted > 0) return false;
  if (rule != Rule::kAhead) return true;
  return unit.evictable() && distance(unit) > farther_than;
}

// Every place that will do can be moved down to the end of a unit, or to 0,
// without that more units have to go. Residents are moved up instead.
std::optional<Pager::Impl::Hole> Pager::Impl::find_hole(
    const Paged& unit, Rule rule, std::size_t ahead) const {
  struct Best {
    std::uint64_t begin = 0;
    std::size_t soonest = 0;  ///< Distance of the unit that is needed first.
    std::uint64_t bytes = 0;  ///< That have to go.
  };
  std::optional<Best> best;
  const std::uint64_t size = unit.room;
  const auto look_at = [&](std::uint64_t begin) REQUIRES(mutex_) {
    if (begin + size > arena_.size()) return;
    Best found{.begin = begin, .soonest = TouchPlan::kNever};
    auto each = by_place_.upper_bound(begin);
    if (each != by_place_.begin()) {
      const auto before = std::prev(each);
      if (before->first + before->second->room > begin) each = before;
    }
    for (; each != by_place_.end() && each->first < begin + size; ++each) {
      const Paged& other = *each->second;
      if (!may_go(other, rule, ahead)) return;
      found.soonest = std::min(found.soonest, distance(other));
      found.bytes += other.room;
      if (best && found.soonest < best->soonest) return;
    }
    const bool better =
        !best || found.soonest > best->soonest || found.bytes < best->bytes;
    if (better) best = found;
  };
  const bool from_above = unit.resident && rule != Rule::kPacked;
  if (from_above) {
    if (arena_.size() >= size) look_at(arena_.size() - size);
    for (auto each = by_place_.rbegin(); each != by_place_.rend(); ++each) {
      if (each->first >= size) look_at(each->first - size);
    }
  } else {
    look_at(0);
    for (const auto& [begin, other] : by_place_) {
      if (rule == Rule::kPacked && best) break;
      look_at(begin + other->room);
    }
  }
  if (!best) return std::nullopt;
  Hole hole{.begin = best->begin, .evicted = {}};
  for (const auto& [begin, other] : by_place_) {
    if (begin < best->begin + size && best->begin < begin + other->room) {
      hole.evicted.push_back(other);
    }
  }
  return hole;
}

void Pager::Impl::take(Paged& unit, const Hole& hole) {
  for (Paged* other : hole.evicted) evict(*other);
  by_place_[hole.begin] = &unit;
  arena_.take_at(hole.begin, unit.room);
  unit.run = hole.begin;
}

void Pager::Impl::evict(Paged& unit) {
  by_place_.erase(unit.run);
  arena_.give(unit.run, unit.room);
  unit.state = State::kAway;
  ahead_ = 0;
}

void Pager::Impl::start_read(Paged& unit, IoPriority priority) {
  unit.state = State::kReading;
  unit.prefetched = priority == IoPriority::kPrefetch;
  try {
    unit.transfer = store_.read(
        {.extent = unit.extent,
         .bytes = {arena_.at(unit.run), unit.extent->padded_size()},
         .done = [this,
                  &unit](std::exception_ptr error) { read_ended(unit, error); },
         .priority = priority,
         .caller = caller_});
    ++in_flight_;
  } catch (...) {
    evict(unit);
    throw;
  }
}

void Pager::Impl::start_write(Paged& unit, IoPriority priority) noexcept {
  try {
    // A drive that refused to write there may write elsewhere.
    if (unit.write_error) unit.extent = store_.allocate(unit.bytes);
    unit.write_error = nullptr;
    unit.transfer = store_.write(
        {.extent = unit.extent,
         .bytes = {arena_.at(unit.run), unit.extent->padded_size()},
         .done = [this, &unit](
                     std::exception_ptr error) { write_ended(unit, error); },
         .priority = priority,
         .caller = caller_});
    unit.state = State::kWriting;
    // Whoever has it pinned may go on changing it.
    unit.dirty = unit.pins > 0;
    ++in_flight_;
  } catch (...) {
    unit.write_error = std::current_exception();
  }
}

void Pager::Impl::read_ended(Paged& unit, std::exception_ptr error) noexcept {
  const MutexLock lock(mutex_);
  --in_flight_;
  unit.transfer = {};
  unit.unreadable = error != nullptr;
  if (error == nullptr) {
    counts_.bytes_read += unit.extent->padded_size();
    unit.state = State::kHere;
  } else {
    unit.read_error = std::move(error);
    evict(unit);
  }
  pump();
  changed_.notify_all();
}

void Pager::Impl::write_ended(Paged& unit, std::exception_ptr error) noexcept {
  const MutexLock lock(mutex_);
  --in_flight_;
  unit.transfer = {};
  unit.state = State::kHere;
  if (error == nullptr) {
    counts_.bytes_written += unit.extent->padded_size();
    unit.on_drive = true;
  } else {
    unit.write_error = std::move(error);
    unit.dirty = true;
  }
  pump();
  changed_.notify_all();
}

void Pager::Impl::write_back() {
  if (changed_units_.empty()) return;
  for (const Unit number : std::exchange(changed_units_, {})) {
    if (units_[number] == nullptr) continue;
    Paged& unit = *units_[number];
    // What is pinned comes again when its last pin ends.
    if (unit.pins > 0 || !unit.dirty || unit.state != State::kHere ||
        unit.resident || unit.write_error) {
      continue;
    }
    start_write(unit, IoPriority::kWriteBack);
  }
}

void Pager::Impl::pump() noexcept {
  if (closing_ || without_room_ > 0) return;
  try {
    for (; ahead_ < plan_.size(); ++ahead_) {
      Paged* const unit = units_[plan_.next(ahead_)].get();
      if (unit == nullptr || unit->state != State::kAway || unit->unreadable ||
          !unit->on_drive) {
        continue;
      }
      const std::optional<Hole> hole = find_hole(*unit, Rule::kAhead, ahead_);
      if (!hole) return;
      const std::size_t ahead = ahead_;
      take(*unit, *hole);
      start_read(*unit, IoPriority::kPrefetch);
      // What was evicted is needed later than this.
      ahead_ = ahead;
    }
  } catch (...) {
    // Whoever needs the unit tries again, and gets the error.
  }
}

void Pager::Impl::begin_round() {
  owner_.check();
  const MutexLock lock(mutex_);
  ahead_ = 0;
  const std::uint64_t before = plan_.counts().plans;
  plan_.begin_round();
  if (plan_.counts().plans != before) choose_residents();
  pump();
}

// Those chosen before stay as long as nine in ten of their bytes are still
// touched.
void Pager::Impl::choose_residents() {
  const std::vector<Unit> order = plan_.units();
  std::uint64_t total = 0;
  std::uint64_t largest = 0;
  std::uint64_t kept = 0;
  for (const Unit number : order) {
    const Paged* unit = units_[number].get();
    if (unit == nullptr) continue;
    total += unit->room;
    largest = std::max(largest, unit->room);
    if (unit->resident) kept += unit->room;
  }
  if (resident_bytes_ > 0 && kept >= resident_bytes_ / 10 * 9) return;
  const std::uint64_t window =
      total <= arena_.size() ? 0 : std::max(3 * largest, arena_.size() / 4);
  const std::uint64_t wanted =
      arena_.size() > window ? std::min(arena_.size() - window, total) : 0;
  for (const auto& unit : units_) {
    if (unit != nullptr) unit->resident = false;
  }
  resident_bytes_ = 0;
  std::uint64_t seen = 0;
  for (const Unit number : order) {
    Paged* const unit = units_[number].get();
    if (unit == nullptr) continue;
    seen += unit->room;
    // As large a part of the plan's first `seen` bytes as of all.
    const auto due = static_cast<std::uint64_t>(static_cast<double>(seen) /
                                                static_cast<double>(total) *
                                                static_cast<double>(wanted));
    if (resident_bytes_ + unit->room > std::min(due, wanted)) continue;
    unit->resident = true;
    resident_bytes_ += unit->room;
  }
  // They come again, each at its end of the memory.
  for (const auto& unit : units_) {
    if (unit != nullptr && unit->evictable()) evict(*unit);
  }
}

void Pager::Impl::flush() {
  owner_.check();
  MutexLock lock(mutex_);
  // By number: while this waits, units may come and go.
  for (Unit number = 0; number < units_.size(); ++number) {
    while (is_writing(number)) wait_some(lock);
    Paged* const unit = units_[number].get();
    if (unit != nullptr && unit->dirty) start_write(*unit, IoPriority::kNow);
  }
  std::exception_ptr error;
  for (Unit number = 0; number < units_.size(); ++number) {
    while (is_writing(number)) wait_some(lock);
    const Paged* const unit = units_[number].get();
    if (error == nullptr && unit != nullptr) error = unit->write_error;
  }
  if (error != nullptr) std::rethrow_exception(error);
}

bool Pager::Impl::is_writing(Unit number) const {
  const Paged* const unit = units_[number].get();
  return unit != nullptr && unit->state == State::kWriting;
}

PagerStats Pager::Impl::stats() const {
  owner_.check();
  const MutexLock lock(mutex_);
  PagerStats stats = counts_;
  stats.touches = plan_.counts().touches;
  stats.foreseen = plan_.counts().foreseen;
  stats.plans = plan_.counts().plans;
  stats.memory = arena_.size();
  stats.in_use = arena_.in_use();
  stats.peak = arena_.peak();
  stats.resident = resident_bytes_;
  return stats;
}

void Pager::Impl::refuse(std::span<const Touch> touches) const {
  std::uint64_t needed = 0;
  std::string names;
  for (std::size_t i = 0; i < touches.size(); ++i) {
    const Paged& unit = *units_[touches[i].unit];
    const bool seen = std::ranges::any_of(
        touches.first(i),
        [&](const Touch& other) { return other.unit == touches[i].unit; });
    if (seen) continue;
    needed += unit.room;
    if (i < 3) names += (i > 0 ? ", '" : "'") + unit.name + "'";
    if (i == 3) names += ", ...";
  }
  std::uint64_t others = 0;
  for (const auto& unit : units_) {
    const bool own = unit != nullptr &&
                     std::ranges::any_of(touches, [&](const Touch& touch) {
                       return touch.unit == unit->number;
                     });
    if (unit != nullptr && unit->pins > 0 && !own) others += unit->room;
  }
  throw BudgetError(
      std::to_string(needed) + " bytes are needed at once (" + names +
      "), and host_memory has " + std::to_string(arena_.size()) +
      (others > 0 ? ", of which " + std::to_string(others) + " are in use"
                  : ""));
}

Pager::Pager(PagerOptions options)
    : impl_(std::make_unique<Impl>(std::move(options))) {}

Pager::~Pager() {
  impl_->owner_.end(impl_, [] {});
}

Pager::Unit Pager::add(std::uint64_t bytes, std::string name,
                       OnPinned on_pinned) {
  impl_->owner_.check();
  return impl_->add(bytes, std::move(name), std::move(on_pinned));
}

void Pager::remove(Unit unit) {
  impl_->owner_.check();
  impl_->remove(unit);
}

Pager::Pins Pager::pin(std::span<const Touch> touches) {
  Pins pins;
  impl_->pin(pins, touches, /*held=*/false);
  pins.pager_ = this;
  return pins;
}

Pager::Pins Pager::hold(std::span<const Touch> touches) {
  Pins pins;
  impl_->pin(pins, touches, /*held=*/true);
  pins.pager_ = this;
  return pins;
}

void Pager::begin_round() { impl_->begin_round(); }

void Pager::flush() { impl_->flush(); }

PagerStats Pager::stats() const { return impl_->stats(); }

std::uint64_t Pager::bytes(Unit unit) const {
  const MutexLock lock(impl_->mutex_);
  return impl_->at(unit).bytes;
}

const std::string& Pager::name(Unit unit) const {
  const MutexLock lock(impl_->mutex_);
  return impl_->at(unit).name;
}

bool Pager::in_memory(Unit unit) const {
  const MutexLock lock(impl_->mutex_);
  return impl_->at(unit).here();
}

bool Pager::resident(Unit unit) const {
  const MutexLock lock(impl_->mutex_);
  return impl_->at(unit).resident;
}

Pager::Pins& Pager::Pins::operator=(Pins&& other) noexcept {
  if (this == &other) return *this;
  release();
  pager_ = std::exchange(other.pager_, nullptr);
  held_ = other.held_;
  touches_ = std::move(other.touches_);
  unread_ = std::move(other.unread_);
  return *this;
}

void Pager::Pins::release() noexcept {
  if (pager_ == nullptr) return;
  std::exchange(pager_, nullptr)->impl_->unpin(*this);
  touches_.clear();
}

std::byte* Pager::Pins::data(std::size_t i) const {
  Impl& impl = *pager_->impl_;
  const MutexLock lock(impl.mutex_);
  return impl.arena_.at(impl.at(touches_.at(i).unit).run);
}

void Pager::Pins::undo_replaced() noexcept {
  if (pager_ != nullptr) pager_->impl_->undo_replaced(*this);
}

}  // namespace torch_ext
