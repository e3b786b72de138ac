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
// Replacing. What is to be replaced is not read. Until it is pinned it is
// blank: it has a run and no bytes, and whoever else needs it reads it. As long
// as nobody else has pinned it since, undo_replaced() evicts it.
//
// Writing. A unit that has changed is written back once another one is touched,
// so what is evicted is mostly clean. It is not changed while it is written,
// nor written while it is pinned to be changed. Residents are written only if
// they are evicted, or by flush(). A unit whose write failed stays, and is
// written elsewhere when it has to go.

#include "torch_ext/paging/pager.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <utility>

#include "pager_impl.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kSlice{100};

// Pins of operators that this thread is in, of all pagers.
thread_local std::size_t pinned_by_thread = 0;

}  // namespace

Pager::Unit Pager::Impl::add(std::uint64_t bytes, std::string name,
                             OnPinned on_pinned) {
  if (bytes == 0) throw std::invalid_argument("pager: a unit of 0 bytes");
  auto unit = std::make_unique<Paged>();
  unit->extent = store_.allocate(bytes);
  unit->name = std::move(name);
  unit->bytes = bytes;
  unit->room = align_up(unit->extent->padded_size(), page_size());
  unit->on_pinned = std::move(on_pinned);
  return add(std::move(unit));
}

Pager::Unit Pager::Impl::add(FileRange range, std::string name,
                             OnPinned on_pinned) {
  if (range.file == nullptr || options_.files == nullptr) {
    throw std::invalid_argument("pager: '" + name +
                                "' needs a file, and a queue that reads it");
  }
  if (range.bytes == 0) throw std::invalid_argument("pager: a unit of 0 bytes");
  auto unit = std::make_unique<Paged>();
  unit->name = std::move(name);
  unit->bytes = range.bytes;
  unit->source = std::make_unique<FileSource>(std::move(range), options_.files,
                                              store_.verifies());
  unit->skew = unit->source->skew();
  unit->room =
      align_up(std::max(unit->source->room(),
                        align_up(unit->skew + unit->bytes, store_.granule())),
               page_size());
  unit->on_drive = true;
  unit->on_pinned = std::move(on_pinned);
  return add(std::move(unit));
}

Pager::Unit Pager::Impl::add(std::unique_ptr<Paged> unit) {
  Places places{{0, unit.get()}};
  unit->place = places.extract(places.begin());
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
  if (unit.pins > 0 || unit.wanted > 0 || unit.claimed > 0) {
    throw StateError("pager: unit '" + unit.name + "' is in use");
  }
  // Nobody may begin another transfer meanwhile.
  removed = std::move(units_[number]);
  if (std::exchange(unit.resident, false)) resident_bytes_ -= unit.room;
  ++waiters_;
  while (unit.state == State::kReading || unit.state == State::kWriting) {
    changed_.wait(lock);
  }
  --waiters_;
  if (unit.here()) evict(unit);
  pump();
  something_ended();
}

void Pager::Impl::note_touch(const Paged& unit, bool forward) {
  const TouchPlan::Counts before = plan_.counts();
  const Unit last = plan_.last();
  const std::size_t places = plan_.touch(unit.number, forward);
  ahead_ -= std::min(ahead_, places);
  stall_.ahead -= std::min(stall_.ahead, places);
  if (places == TouchPlan::kNever) stall_.known = false;
  for (std::size_t back = 1; stall_.known && back <= places; ++back) {
    const Paged* const passed = units_[plan_.next(plan_.size() - back)].get();
    if (passed != nullptr) loosened(*passed);
  }
  if (last < units_.size() && units_[last] != nullptr) loosened(*units_[last]);
  if (plan_.counts().plans != before.plans) choose_residents();
  if (plan_.counts().touches == before.touches) return;
  if (unit.here()) {
    ++counts_.hits;
  } else {
    ++(unit.state == State::kReading ? counts_.late : counts_.misses);
  }
}

void Pager::Impl::pin(Pins& pins, std::span<const Touch> touches, bool held,
                      bool planned) {
  owner_.check();
  pins.touches_.assign(touches.begin(), touches.end());
  pins.unread_.assign(touches.size(), false);
  MutexLock lock(mutex_);
  for (const Touch& touch : touches) {
    const Paged& unit = at(touch.unit);
    if (planned) note_touch(unit, touch.forward);
  }
  const bool all_here =
      std::ranges::all_of(touches, [&](const Touch& touch) REQUIRES(mutex_) {
        return usable(at(touch.unit), touch.access);
      });
  if (!all_here) bring(touches, lock);
  for (const Touch& touch : touches) {
    // Its first pin is not the only one that sees it.
    if (at(touch.unit).pins > 0) at(touch.unit).blank = false;
  }
  for (std::size_t i = 0; i < touches.size(); ++i) {
    Paged& unit = at(touches[i].unit);
    pins.unread_[i] = unit.blank;
    if (touches[i].access != Access::kRead) {
      unit.dirty = true;
      ++unit.writers;
    }
    if (unit.pins++ == 0 && unit.on_pinned) unit.on_pinned(data_of(unit));
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
  if (!pins.held_) {
    pinned_by_thread -= std::min(pinned_by_thread, pins.touches_.size());
  }
  // In a forked child, the lock's holder may not exist.
  if (!owner_.is_this()) return;
  const MutexLock lock(mutex_);
  for (const Touch& touch : pins.touches_) {
    if (touch.unit == kNoUnit) continue;
    Paged& unit = *units_[touch.unit];
    if (touch.access != Access::kRead) --unit.writers;
    if (--unit.pins > 0) continue;
    unit.blank = false;
    if (unit.on_pinned) unit.on_pinned(nullptr);
    loosened(unit);
    if (!unit.dirty) continue;
    try {
      changed_units_.push_back(unit.number);
    } catch (...) {
      // It is written when its room is needed.
    }
  }
  if (!pins.held_) operator_pins_ -= pins.touches_.size();
  something_ended();
}

void Pager::Impl::something_ended() noexcept {
  ++ended_;
  if (waiters_ > 0) changed_.notify_all();
}

void Pager::Impl::undo_replaced(Pins& pins) noexcept {
  if (!owner_.is_this()) return;
  const MutexLock lock(mutex_);
  for (std::size_t i = 0; i < pins.touches_.size(); ++i) {
    const Unit number = pins.touches_[i].unit;
    if (!pins.unread_[i] || number == kNoUnit) continue;
    Paged& unit = *units_[number];
    // Whoever else has pinned it has seen the new bytes.
    if (!unit.blank) continue;
    for (Touch& touch : pins.touches_) {
      if (touch.unit == number) touch.unit = kNoUnit;
    }
    unit.pins = unit.writers = 0;
    unit.dirty = false;
    if (unit.on_pinned) unit.on_pinned(nullptr);
    evict(unit);
  }
  something_ended();
}

// Waits until all the touches' units can be used. Other threads that need
// something wait for their turn meanwhile.
void Pager::Impl::bring(std::span<const Touch> touches, MutexLock& lock) {
  const Clock::time_point start = Clock::now();
  Visit visit{.touches = touches, .nested = pinned_by_thread > 0};
  Wait wait{.touches = touches, .nested = visit.nested};
  begin(visit, lock);
  try {
    // Nobody is in the way of what can never fit.
    if (room_of(units_of(touches)) > arena_.size()) refuse(touches);
    for (;;) {
      check_written(wait);
      if (wait.clears) {
        set_room(visit, false);
        if (give_own_back(wait)) {
          wait_for_transfer(lock);
          continue;
        }
        wait.clears = false;
      }
      const Progress progress = request(wait);
      if (progress == Progress::kDone) break;
      set_room(visit, progress == Progress::kMoving);
      if (progress != Progress::kNoRoom || in_flight_ > 0) {
        wait_for_transfer(lock);
      } else if (!wait.packs || wait.ended != ended_) {
        // Packed around what has ended since, they may lie apart.
        wait.packs = wait.clears = true;
        wait.ended = ended_;
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
    for (const Touch& touch : touches) {
      Paged* const unit = units_[touch.unit].get();
      if (unit != nullptr && unit->blank && unit->evictable()) evict(*unit);
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
  for (const Touch& touch : visit.touches) {
    Paged& unit = *units_[touch.unit];
    ++(visit.nested ? unit.claimed : unit.wanted);
    // To read it ahead may have failed.
    unit.read_error = nullptr;
  }
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
  for (const Touch& touch : visit.touches) {
    Paged& unit = *units_[touch.unit];
    --(visit.nested ? unit.claimed : unit.wanted);
    loosened(unit);
  }
  if (!visit.nested) turn_taken_ = false;
  something_ended();
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
  for (const Touch& touch : wait.touches) {
    Paged& unit = *units_[touch.unit];
    if (usable(unit, touch.access)) continue;
    if (unit.state == State::kAway) {
      if (unit.read_error) {
        std::rethrow_exception(std::exchange(unit.read_error, nullptr));
      }
      const Progress progress = fetch(unit, touch.access, wait);
      if (progress > Progress::kMoving) return progress;
      result = std::max(result, progress);
      continue;
    }
    if (unit.blank) {
      // Somebody was to replace it, and has not pinned it yet.
      result = std::max(result, fill(unit));
      continue;
    }
    result = std::max(result, Progress::kMoving);
    if (unit.state == State::kWriting ||
        std::exchange(unit.prefetched, false)) {
      promote(unit);
    }
  }
  return result;
}

// Begins to bring a unit that is away, or to make room for it.
Pager::Impl::Progress Pager::Impl::fetch(Paged& unit, Access access,
                                         Wait& wait) {
  const std::optional<Hole> hole =
      find_hole(unit, {.rule = wait.packs ? Rule::kPacked : Rule::kNeeded,
                       .nested = wait.nested});
  if (!hole) return Progress::kNoRoom;
  bool clear = true;
  for (Paged* other : hole->evicted) {
    if (other->evictable()) continue;
    clear = false;
    if (other->state == State::kHere) {
      start_write(*other, IoPriority::kNow);
    } else {
      promote(*other);
    }
    if (other->state != State::kReading) {
      wait.written.push_back(other->number);
    }
  }
  if (!clear) return Progress::kClearing;
  take(unit, *hole);
  if (access != Access::kReplace) return fill(unit);
  unit.state = State::kHere;
  unit.blank = true;
  return Progress::kDone;
}

// Brings the bytes of a unit that has a run.
Pager::Impl::Progress Pager::Impl::fill(Paged& unit) {
  unit.blank = false;
  if (unit.on_drive) {
    start_read(unit, IoPriority::kNow);
    return Progress::kMoving;
  }
  std::memset(arena_.at(unit.run), 0, unit.room);
  unit.state = State::kHere;
  return Progress::kDone;
}

// Lets go of the touches' own units, so that they can be packed. Returns
// whether it has to be called again.
bool Pager::Impl::give_own_back(Wait& wait) {
  bool again = false;
  for (const Touch& touch : wait.touches) {
    Paged& unit = *units_[touch.unit];
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

// A write that could not begin is no transfer, but an error already.
void Pager::Impl::wait_for_transfer(MutexLock& lock) {
  if (in_flight_ > 0) wait_some(lock);
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

// Nobody waits for a thread that waits, so one in an operator may have what
// it wants: that one takes it again.
bool Pager::Impl::may_go(const Paged& unit, const Search& search) const {
  if (unit.pins > 0 || unit.claimed > 0) return false;
  if (unit.wanted > 0 && !search.nested) return false;
  if (search.rule != Rule::kAhead) return true;
  return unit.evictable() && distance(unit) > search.ahead;
}

// Looks at all places, or at those that have a part of one of `near`.
std::optional<Pager::Impl::Hole> Pager::Impl::find_hole(
    const Paged& unit, const Search& search,
    const std::vector<Range>* near) const {
  std::optional<Best> best;
  if (near == nullptr) {
    look_near({.begin = 0, .end = arena_.size()}, unit, search, best);
  } else {
    for (const Range& range : *near) look_near(range, unit, search, best);
  }
  if (!best) return std::nullopt;
  return hole_at(best->begin, unit.room);
}

// Every place that will do can be moved down to the end of a unit, or to 0,
// without that more units have to go. Residents are moved up instead.
void Pager::Impl::look_near(const Range& range, const Paged& unit,
                            const Search& search,
                            std::optional<Best>& best) const {
  const std::uint64_t size = unit.room;
  const std::uint64_t highest = arena_.size() - size;
  if (unit.resident && search.rule != Rule::kPacked) {
    if (range.end > highest) weigh(highest, size, search, best);
    auto each = by_place_.lower_bound(range.end + size);
    while (each != by_place_.begin()) {
      --each;
      if (each->first <= range.begin || each->first < size) break;
      weigh(each->first - size, size, search, best);
    }
    return;
  }
  if (range.begin < size) weigh(0, size, search, best);
  auto each = by_place_.upper_bound(range.begin - std::min(range.begin, size));
  if (each != by_place_.begin()) --each;
  for (; each != by_place_.end(); ++each) {
    const std::uint64_t begin = each->first + each->second->room;
    if (begin >= range.end || begin > highest) break;
    if (search.rule == Rule::kPacked && best) break;
    weigh(begin, size, search, best);
  }
}

void Pager::Impl::weigh(std::uint64_t begin, std::uint64_t size,
                        const Search& search, std::optional<Best>& best) const {
  Best found{.begin = begin, .soonest = TouchPlan::kNever};
  auto each = by_place_.upper_bound(begin);
  if (each != by_place_.begin()) {
    const auto before = std::prev(each);
    if (before->first + before->second->room > begin) each = before;
  }
  for (; each != by_place_.end() && each->first < begin + size; ++each) {
    const Paged& other = *each->second;
    if (!may_go(other, search)) return;
    found.soonest = std::min(found.soonest, distance(other));
    found.bytes += other.room;
    if (best && found.soonest < best->soonest) return;
  }
  const bool better =
      !best || found.soonest > best->soonest || found.bytes < best->bytes;
  if (better) best = found;
}

Pager::Impl::Hole Pager::Impl::hole_at(std::uint64_t begin,
                                       std::uint64_t size) const {
  Hole hole{.begin = begin, .evicted = {}};
  auto each = by_place_.upper_bound(begin);
  if (each != by_place_.begin()) --each;
  for (; each != by_place_.end() && each->first < begin + size; ++each) {
    if (each->first + each->second->room > begin) {
      hole.evicted.push_back(each->second);
    }
  }
  return hole;
}

// Looked for at each touch, among all units, room would cost more than most
// operators.
std::optional<Pager::Impl::Hole> Pager::Impl::find_room_ahead(
    const Paged& unit) {
  const Search search{.rule = Rule::kAhead, .ahead = ahead_};
  const bool stalled =
      stall_.known && unit.room >= stall_.room && ahead_ >= stall_.ahead;
  std::optional<Hole> hole =
      find_hole(unit, search, stalled ? &stall_.loosened : nullptr);
  if (!hole && (!stalled || unit.room == stall_.room)) {
    stall_.known = true;
    stall_.room = unit.room;
    stall_.ahead = ahead_;
    stall_.loosened.clear();
  }
  return hole;
}

// A unit can go, or is needed later, or has gone.
void Pager::Impl::loosened(const Paged& unit) noexcept {
  if (!stall_.known || unit.state == State::kAway) return;
  stall_.known = stall_.loosened.size() < kMostLoosened;
  if (!stall_.known) return;
  stall_.loosened.push_back({unit.run, unit.run + unit.room});
}

void Pager::Impl::take(Paged& unit, const Hole& hole) noexcept {
  for (Paged* other : hole.evicted) evict(*other);
  unit.run = hole.begin;
  unit.place.key() = unit.run;
  by_place_.insert(std::move(unit.place));
  arena_.take(unit.room);
}

void Pager::Impl::evict(Paged& unit) noexcept {
  loosened(unit);
  unit.place = by_place_.extract(unit.run);
  arena_.give(unit.room);
  unit.state = State::kAway;
  unit.blank = false;
  ahead_ = 0;
}

void Pager::Impl::start_read(Paged& unit, IoPriority priority) {
  unit.state = State::kReading;
  unit.prefetched = priority == IoPriority::kPrefetch;
  const auto done = [this, &unit](std::exception_ptr error) {
    read_ended(unit, std::move(error));
  };
  try {
    if (unit.source != nullptr) {
      unit.source->read(arena_.at(unit.run), priority, caller_, done);
    } else {
      unit.transfer = store_.read(
          {.extent = unit.extent,
           .bytes = {arena_.at(unit.run), unit.extent->padded_size()},
           .done = done,
           .priority = priority,
           .caller = caller_});
    }
    ++in_flight_;
  } catch (...) {
    evict(unit);
    throw;
  }
}

void Pager::Impl::promote(Paged& unit) {
  if (unit.state == State::kReading && unit.source != nullptr) {
    unit.source->promote(IoPriority::kNow);
  } else {
    store_.promote(unit.transfer, IoPriority::kNow);
  }
}

void Pager::Impl::start_write(Paged& unit, IoPriority priority) noexcept {
  try {
    // A drive that refused to write there may write elsewhere.
    if (unit.write_error != nullptr || unit.extent == nullptr) {
      unit.extent = store_.allocate(unit.skew + unit.bytes);
    }
    unit.write_error = nullptr;
    unit.transfer = store_.write(
        {.extent = unit.extent,
         .bytes = {arena_.at(unit.run), unit.extent->padded_size()},
         .done = [this, &unit](
                     std::exception_ptr error) { write_ended(unit, error); },
         .priority = priority,
         .caller = caller_});
    unit.state = State::kWriting;
    unit.dirty = false;
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
    counts_.bytes_read += unit.source != nullptr ? unit.source->room()
                                                 : unit.extent->padded_size();
    unit.state = State::kHere;
    loosened(unit);
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
    unit.source = nullptr;
    loosened(unit);
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
    // A pinned unit comes again when its last pin ends.
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
      const std::optional<Hole> hole = find_room_ahead(*unit);
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
  stall_.known = false;
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
  // Exactly 1 where all fit.
  const double part = static_cast<double>(wanted) / static_cast<double>(total);
  std::uint64_t seen = 0;
  for (const Unit number : order) {
    Paged* const unit = units_[number].get();
    if (unit == nullptr) continue;
    seen += unit->room;
    // As large a part of the plan's first `seen` bytes as of all.
    const auto due =
        static_cast<std::uint64_t>(static_cast<double>(seen) * part);
    if (resident_bytes_ + unit->room > std::min(due, wanted)) continue;
    unit->resident = true;
    resident_bytes_ += unit->room;
  }
  // They come again, each at its end of the memory. What stays no longer has to
  // be written before it can go.
  for (const auto& unit : units_) {
    if (unit == nullptr) continue;
    if (unit->evictable()) evict(*unit);
    if (unit->dirty) changed_units_.push_back(unit->number);
  }
}

void Pager::Impl::flush() {
  owner_.check();
  MutexLock lock(mutex_);
  // By number: while this waits, units may come and go.
  for (Unit number = 0; number < units_.size(); ++number) {
    while (is_writing(number)) wait_some(lock);
    Paged* const unit = units_[number].get();
    if (unit == nullptr || !unit->dirty || unit->writers > 0) continue;
    start_write(*unit, IoPriority::kNow);
  }
  std::exception_ptr error;
  for (Unit number = 0; number < units_.size(); ++number) {
    while (is_writing(number)) wait_some(lock);
    const Paged* const unit = units_[number].get();
    if (unit == nullptr || unit->writers > 0) continue;
    if (error == nullptr) error = unit->write_error;
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

// Each unit once.
std::vector<const Pager::Impl::Paged*> Pager::Impl::units_of(
    std::span<const Touch> touches) const {
  std::vector<const Paged*> units;
  for (const Touch& touch : touches) {
    const Paged* const unit = units_[touch.unit].get();
    if (std::ranges::count(units, unit) == 0) units.push_back(unit);
  }
  return units;
}

std::uint64_t Pager::Impl::room_of(const std::vector<const Paged*>& units) {
  std::uint64_t bytes = 0;
  for (const Paged* unit : units) bytes += unit->room;
  return bytes;
}

void Pager::Impl::refuse(std::span<const Touch> touches) const {
  const std::vector<const Paged*> own = units_of(touches);
  std::string names;
  for (std::size_t i = 0; i < std::min<std::size_t>(own.size(), 3); ++i) {
    names += (i > 0 ? ", '" : "'") + own[i]->name + "'";
  }
  if (own.size() > 3) names += ", ...";
  std::vector<const Paged*> others;
  for (const auto& unit : units_) {
    if (unit == nullptr || unit->pins == 0) continue;
    if (std::ranges::count(own, unit.get()) == 0) others.push_back(unit.get());
  }
  throw BudgetError(
      std::to_string(room_of(own)) + " bytes are needed at once (" + names +
      "), and host_memory has " + std::to_string(arena_.size()) +
      (others.empty()
           ? ""
           : ", of which " + std::to_string(room_of(others)) + " are in use"));
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

Pager::Unit Pager::add(FileRange range, std::string name, OnPinned on_pinned) {
  impl_->owner_.check();
  return impl_->add(std::move(range), std::move(name), std::move(on_pinned));
}

void Pager::remove(Unit unit) {
  impl_->owner_.check();
  impl_->remove(unit);
}

Pager::Pins Pager::pin(std::span<const Touch> touches) {
  Pins pins;
  impl_->pin(pins, touches, /*held=*/false, /*planned=*/true);
  pins.pager_ = this;
  return pins;
}

Pager::Pins Pager::hold(std::span<const Touch> touches, bool planned) {
  Pins pins;
  impl_->pin(pins, touches, /*held=*/true, planned);
  pins.pager_ = this;
  return pins;
}

void Pager::begin_round() { impl_->begin_round(); }

void Pager::flush() { impl_->flush(); }

PagerStats Pager::stats() const { return impl_->stats(); }

std::uint64_t Pager::bytes(Unit unit) const {
  impl_->owner_.check();
  const MutexLock lock(impl_->mutex_);
  return impl_->at(unit).bytes;
}

const std::string& Pager::name(Unit unit) const {
  impl_->owner_.check();
  const MutexLock lock(impl_->mutex_);
  return impl_->at(unit).name;
}

bool Pager::in_memory(Unit unit) const {
  impl_->owner_.check();
  const MutexLock lock(impl_->mutex_);
  return impl_->at(unit).here();
}

bool Pager::resident(Unit unit) const {
  impl_->owner_.check();
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
  impl.owner_.check();
  const MutexLock lock(impl.mutex_);
  return impl.data_of(impl.at(touches_.at(i).unit));
}

void Pager::Pins::undo_replaced() noexcept {
  if (pager_ != nullptr) pager_->impl_->undo_replaced(*this);
}

}  // namespace torch_ext
