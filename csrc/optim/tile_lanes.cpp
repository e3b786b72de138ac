// How tiles come and go
//
// State that is larger than memory is cut into tiles. A round is a list of
// tiles that are visited one by one. Each needs a buffer for its visit. There
// are fewer buffers than tiles, so a buffer goes from tile to tile:
//
//   kIdle -> kReading -> kReady -> kBusy -> kWriting -> kIdle
//
// pump() hands out buffers in the order of the visits. It stops at the first
// tile that cannot have one. Whoever frees a buffer calls it again. After the
// last visit of a round it goes on with the first of the next, so the drive
// reads while nobody visits. Nothing else takes a buffer.
//
// No visit may wait without end. So one rule holds: a tile that has a buffer
// gives it back without help, or is visited before all tiles that wait for one.
//   - A transfer in flight ends; a tile that is written gives its buffer back.
//     So does one whose write is held: the commit ends, and needs no buffer for
//     that. So does one that a commit could not write: whoever visits, or
//     settles, begins to write it elsewhere before he waits.
//   - A tile that the round waits for is visited. A tile that was read ahead
//     for another order is kept only if its place is among the first `lanes_`.
//   - A resident tile keeps its buffer while that holds the only copy of its
//     state. OptimizerOffload sees to it that `lanes_` buffers are left to
//     others, or that all tiles are resident. Before a round of other tiles it
//     calls make_way().
// Every other tile is dismissed: it gives its buffer back at once, or when its
// read ends. A tile leaves a round only through dismiss() or after its visit.
//
// What a commit refers to is never written, and neither is what one in the
// making will refer to. Between begin_commit() and end_commit() a tile's write
// goes to one of its spares. If it has none, its only other place is that of
// the commit before, which a crash may still need: the write is held (kHeld)
// until the commit has ended. After a commit there is a spare: the commit has
// seen to it. running_commit.cpp tells the rest.

#include "tile_lanes.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <utility>

#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

using Lane = LaneEvent::Lane;

double now() {
  return std::chrono::duration<double>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

void TileLanes::BusyClock::start(double now) {
  if (running++ == 0) since = now;
}

void TileLanes::BusyClock::stop(double now) {
  if (--running == 0) total += now - since;
}

double TileLanes::BusyClock::read(double now) const {
  return running > 0 ? total + now - since : total;
}

TileLanes::TileLanes(Store& store, BufferPool& pool, std::size_t lanes)
    : store_(store), pool_(pool), lanes_(lanes) {}

TileLanes::~TileLanes() { clear(); }

void TileLanes::run(Round round, const Work& work) {
  begin(std::move(round));
  visit(work);
}

void TileLanes::begin(Round round) {
  MutexLock lock(mutex_);
  if (lost_) std::rethrow_exception(failure_);
  failure_ = nullptr;  // A failed round is tried again.
  if (round.repeat) {
    ++steps_;
    step_start_ = now();
    if (steps_ == 1) first_start_ = step_start_;
    std::erase_if(events_, [this](const Event& event) REQUIRES(mutex_) {
      return event.step < steps_;
    });
  } else {
    before_ = round_;
  }
  for (Tile* tile : round.tiles) tile->released = tile->visited = false;
  visited_ = 0;
  released_.clear();
  first_ = 0;
  keep_only(round.tiles);
  round_ = std::move(round);
  running_ = true;
  closed_ = !round_.open;
  fetched_ = 0;
  pump();
}

void TileLanes::visit(const Work& work) {
  MutexLock lock(mutex_);
  try {
    while (Tile* tile = next(lock)) {
      tile->visited = true;
      ++visited_;
      tile->state = Tile::State::kBusy;
      tile->step = round_.repeat ? steps_ : 0;
      const bool fresh = !round_.read || !(tile->on_disk || tile->in_memory);
      lock.unlock();
      const double start = now();
      std::exception_ptr error;
      try {
        work(*tile, fresh);
      } catch (...) {
        error = std::current_exception();
      }
      const double end = now();
      lock.lock();
      if (error != nullptr) {
        give_up(*tile, std::move(error));
      } else {
        update_seconds_ += end - start;
        tile->start = start;
        note(Lane::kUpdate, *tile, end);
        finish(*tile);
      }
    }
    if (failure_ != nullptr) std::rethrow_exception(failure_);
  } catch (...) {
    if (!lost_) leave_round(lock);
    throw;
  }
  running_ = false;
  if (!round_.repeat) {
    round_ = std::exchange(before_, {});
    fetched_ = 0;
    pump();
  } else if (round_.open) {
    expect(std::exchange(released_, {}));
  } else {
    fetched_ -= round_.tiles.size();
  }
}

// Ends a round that has failed and has changed nothing. Its tiles are let go
// of, since the round that is expected next need not have them. It waits for
// the round's transfers, so that none of them can fail later, in another round.
void TileLanes::leave_round(MutexLock& lock) {
  running_ = false;
  for (Tile* tile : round_.tiles) dismiss(*tile);
  while (in_flight_ > 0) changed_.wait(lock);
  for (const auto& [tile, error] : std::exchange(unwritten_, {})) {
    lose_place(*tile);
  }
  if (!round_.repeat) round_ = std::exchange(before_, {});
  fetched_ = 0;
}

void TileLanes::release(Tile& tile) {
  const MutexLock lock(mutex_);
  tile.released = true;
  released_.push_back(&tile);
  changed_.notify_all();
}

void TileLanes::close_round() {
  const MutexLock lock(mutex_);
  closed_ = true;
  std::vector<Tile*> kept;
  std::size_t fetched = 0;
  const std::size_t count = round_.tiles.size();
  for (std::size_t i = 0; i < count; ++i) {
    Tile& tile = *round_.tiles[i];
    if (tile.released || tile.visited) {
      kept.push_back(&tile);
      fetched += (i < fetched_ ? 1U : 0U) + (i + count < fetched_ ? 1U : 0U);
    } else {
      dismiss(tile);
    }
  }
  round_.tiles = std::move(kept);
  fetched_ = fetched;
  first_ = 0;
  pump();
  changed_.notify_all();
}

void TileLanes::abort(std::exception_ptr error) {
  const MutexLock lock(mutex_);
  fail(std::move(error), true);
}

std::vector<Tile*> TileLanes::order() const {
  const MutexLock lock(mutex_);
  return round_.tiles;
}

// Keeps a tile that was read ahead only if all tiles before it can have buffers
// too. Otherwise it might hold the buffer that the first tile needs.
void TileLanes::keep_only(const std::vector<Tile*>& tiles) {
  for (Tile* tile : round_.tiles) tile->rank = Tile::kUnranked;
  std::size_t rank = 0;
  for (Tile* tile : tiles) tile->rank = tile->resident ? 0 : rank++;
  for (Tile* tile : round_.tiles) {
    if (tile->rank >= lanes_) dismiss(*tile);
  }
}

// Lets go of a tile that no round waits for.
void TileLanes::dismiss(Tile& tile) {
  if (tile.in_memory) return;
  if (tile.state == Tile::State::kReady) let_go(tile);
  if (tile.state == Tile::State::kReading) tile.unwanted = true;
}

void TileLanes::expect(std::vector<Tile*> tiles) {
  keep_only(tiles);
  round_.tiles = std::move(tiles);
  fetched_ = 0;
  pump();
}

// Waits for the next tile to visit, and returns it. Null after the last.
Tile* TileLanes::next(MutexLock& lock) {
  for (;;) {
    if (failure_ != nullptr) std::rethrow_exception(failure_);
    write_elsewhere();
    if (Tile* tile = ready_tile()) return tile;
    if (closed_ && visited_ == round_.tiles.size()) return nullptr;
    const bool for_transfer = closed_;
    const double start = now();
    changed_.wait(lock);
    if (for_transfer) wait_seconds_ += now() - start;
  }
}

Tile* TileLanes::ready_tile() {
  const std::vector<Tile*>& tiles = round_.tiles;
  while (first_ < tiles.size() && tiles[first_]->visited) ++first_;
  const std::size_t end = round_.open ? std::min(fetched_, tiles.size())
                                      : std::min(first_ + 1, tiles.size());
  for (std::size_t i = first_; i < end; ++i) {
    Tile& tile = *tiles[i];
    const bool may = tile.released || !round_.open;
    if (may && !tile.visited && tile.state == Tile::State::kReady) {
      return &tile;
    }
  }
  return nullptr;
}

// Ends the visit of a tile that has failed.
void TileLanes::give_up(Tile& tile, std::exception_ptr error) {
  fail(std::move(error), round_.write && !round_.for_commit);
  if (tile.in_memory && !round_.write) {
    tile.state = Tile::State::kReady;
  } else {
    let_go(tile);
  }
}

void TileLanes::finish(Tile& tile) {
  if (round_.repeat) ++visits_.all;
  const bool changed = round_.write && failure_ == nullptr;
  if (tile.resident && (tile.in_memory || changed)) {
    if (round_.repeat && tile.in_memory) ++visits_.hits;
    tile.in_memory = true;
    if (changed) tile.dirty = true;
    tile.state = Tile::State::kReady;
  } else if (changed) {
    start_write(tile);
  } else {
    let_go(tile);
  }
  pump();
}

void TileLanes::pump() noexcept {
  const std::size_t count = round_.tiles.size();
  // Between rounds, the visits are those of the next round.
  const std::size_t end = running_ && round_.repeat ? 2 * count : count;
  while (failure_ == nullptr && fetched_ < end) {
    const bool this_round = fetched_ < count;
    Tile& tile = *round_.tiles[this_round ? fetched_ : fetched_ - count];
    const bool read_ahead = tile.state == Tile::State::kReading ||
                            tile.state == Tile::State::kReady;
    if ((this_round && read_ahead) || tile.in_memory) {
      tile.unwanted = false;
    } else {
      // If it is not idle, its visit in this round, or its write, comes first.
      if (tile.state != Tile::State::kIdle) return;
      Buffer buffer = pool_.try_take();
      if (!buffer) return;
      tile.buffer = std::move(buffer);
      const bool this_step = running_ && this_round;
      tile.step = !round_.repeat ? 0 : this_step ? steps_ : steps_ + 1;
      if (round_.read && tile.on_disk) {
        start_read(tile);
      } else {
        tile.state = Tile::State::kReady;
      }
    }
    ++fetched_;
  }
}

void TileLanes::evict(Tile& tile) {
  MutexLock lock(mutex_);
  tile.resident = false;
  if (!tile.in_memory) return dismiss(tile);
  tile.in_memory = false;
  tile.step = 0;
  start_write(tile);
}

void TileLanes::write_residents(const TileList& tiles) {
  const MutexLock lock(mutex_);
  for (const auto& tile : tiles) {
    const bool has_place = tile->extent != nullptr;
    if (tile->in_memory && tile->dirty && has_place) start_write(*tile);
  }
}

bool TileLanes::make_way(const TileList& tiles, std::size_t count) {
  const MutexLock lock(mutex_);
  std::size_t available = pool_.count();
  for (const auto& tile : tiles) {
    if (tile->in_memory) --available;
  }
  for (const auto& tile : tiles) {
    if (available >= count) return true;
    if (!tile->in_memory || tile->dirty || !tile->on_disk) continue;
    let_go(*tile);
    ++available;
  }
  return available >= count;
}

void TileLanes::settle() {
  MutexLock lock(mutex_);
  for (;;) {
    write_elsewhere();
    if (writes_in_flight_ == 0) break;
    changed_.wait(lock);
  }
  const auto error = std::exchange(commit_failure_, nullptr);
  if (lost_) std::rethrow_exception(failure_);
  if (error != nullptr) std::rethrow_exception(error);
}

void TileLanes::begin_commit(const std::vector<Tile*>& tiles) {
  const MutexLock lock(mutex_);
  committing_ = true;
  for (Tile* tile : tiles) {
    if (!tile->committed) tile->proposed = tile->extent;
    tile->committed = true;
  }
}

void TileLanes::end_commit(const std::vector<Tile*>& tiles, CommitEnd end) {
  const MutexLock lock(mutex_);
  committing_ = false;
  for (Tile* tile : tiles) {
    const std::shared_ptr<Extent> proposed = std::move(tile->proposed);
    if (end.made || proposed == nullptr) continue;
    if (tile->extent == proposed) {
      tile->committed = false;
    } else {
      tile->spares.push_back(proposed);  // It was written elsewhere meanwhile.
    }
  }
  for (auto& [tile, freed] : end.freed) {
    const std::shared_ptr<Extent> extent = std::move(freed);
    // It may be a later commit's, too.
    if (tile != nullptr && extent.use_count() == 1 &&
        tile->spares.size() < end.most_spares) {
      tile->spares.push_back(extent);
    }
  }
  if (end.must_stop != nullptr) fail(end.must_stop, true);
  for (Tile* tile : std::exchange(held_, {})) {
    if (lost_) {
      let_go(*tile);
    } else {
      begin_write(*tile);
    }
  }
  pump();
  changed_.notify_all();
}

// Gives a tile another place if its present one is a commit's.
void TileLanes::move_from_commit(Tile& tile) {
  if (!tile.committed) return;
  if (tile.spares.empty()) {
    tile.extent = store_.allocate(tile.bytes);
  } else {
    tile.extent = std::move(tile.spares.back());
    tile.spares.pop_back();
  }
  tile.committed = false;
}

void TileLanes::drop(const std::vector<Tile*>& tiles) {
  MutexLock lock(mutex_);
  std::vector<Tile*> kept;
  std::size_t fetched = 0;
  for (std::size_t i = 0; i < round_.tiles.size(); ++i) {
    Tile* const tile = round_.tiles[i];
    if (std::ranges::count(tiles, tile) > 0) continue;
    kept.push_back(tile);
    if (i < fetched_) ++fetched;
  }
  round_.tiles = std::move(kept);
  fetched_ = fetched;
  for (Tile* tile : tiles) {
    if (tile->state == Tile::State::kReading) tile->unwanted = true;
    changed_.wait(lock, [tile] {
      return tile->state != Tile::State::kReading &&
             tile->state != Tile::State::kWriting;
    });
    let_go(*tile);
  }
  pump();
}

void TileLanes::start_read(Tile& tile) {
  tile.state = Tile::State::kReading;
  tile.start = now();
  try {
    store_.read({.extent = tile.extent,
                 .bytes = tile.buffer.bytes().first(tile.extent->padded_size()),
                 .done =
                     [this, &tile](std::exception_ptr error) {
                       read_ended(tile, std::move(error));
                     },
                 .priority = IoPriority::kPrefetch});
    reading_.start(tile.start);
    ++in_flight_;
  } catch (...) {
    fail_read(std::current_exception());
    let_go(tile);
  }
}

void TileLanes::start_write(Tile& tile) {
  tile.second_write = false;
  if (committing_ && tile.committed && tile.spares.empty()) {
    tile.state = Tile::State::kHeld;
    held_.push_back(&tile);
  } else {
    begin_write(tile);
  }
}

void TileLanes::begin_write(Tile& tile) {
  tile.state = Tile::State::kWriting;
  tile.start = now();
  try {
    move_from_commit(tile);
    store_.write(
        {.extent = tile.extent,
         .bytes = tile.buffer.bytes().first(tile.extent->padded_size()),
         .done =
             [this, &tile](std::exception_ptr error) {
               write_ended(tile, std::move(error));
             },
         .priority = IoPriority::kWriteBack});
    writing_.start(tile.start);
    ++in_flight_;
    ++writes_in_flight_;
  } catch (...) {
    write_failed(tile, std::current_exception());
  }
}

void TileLanes::read_ended(Tile& tile, std::exception_ptr error) noexcept {
  MutexLock lock(mutex_);
  const double end = now();
  reading_.stop(end);
  note(Lane::kRead, tile, end);
  // What no round needs fails none.
  if (error != nullptr && !tile.unwanted) fail_read(std::move(error));
  if (tile.unwanted || failure_ != nullptr) {
    let_go(tile);
    pump();
  } else {
    tile.state = Tile::State::kReady;
  }
  --in_flight_;
  changed_.notify_all();
}

void TileLanes::write_ended(Tile& tile, std::exception_ptr error) noexcept {
  MutexLock lock(mutex_);
  const double end = now();
  writing_.stop(end);
  note(Lane::kWrite, tile, end);
  if (error != nullptr) {
    write_failed(tile, std::move(error));
  } else {
    tile.on_disk = true;
    tile.dirty = false;
    if (tile.in_memory) {
      tile.state = Tile::State::kReady;
    } else {
      let_go(tile);
    }
  }
  pump();
  --in_flight_;
  --writes_in_flight_;
  changed_.notify_all();
}

// Nothing is lost if the tile holds no state, or is in memory still.
void TileLanes::write_failed(Tile& tile, std::exception_ptr error) {
  if (!tile.in_memory && tile.holds_state) {
    fail(std::move(error), true);
    let_go(tile);
    return;
  }
  if (put_off(tile, error)) return;
  if (commit_failure_ == nullptr) commit_failure_ = std::move(error);
  lose_place(tile);
}

// Whether a commit's write will be made once more. Not at once: it takes space,
// for which the store's threads must not wait.
bool TileLanes::put_off(Tile& tile, const std::exception_ptr& error) {
  if (tile.second_write || tile.extent == nullptr) return false;
  try {
    std::rethrow_exception(error);
  } catch (const IoError& failed) {
    if (failed.error() != EIO) return false;
  } catch (...) {
    return false;
  }
  try {
    unwritten_.emplace_back(&tile, error);
  } catch (...) {
    return false;
  }
  tile.state = Tile::State::kHeld;
  return true;
}

// It takes new space: after the commit there must be as many spares as it has
// seen to.
void TileLanes::write_elsewhere() {
  if (unwritten_.empty()) return;
  for (const auto& [tile, error] : std::exchange(unwritten_, {})) {
    try {
      tile->extent = store_.allocate(tile->bytes);
    } catch (...) {
      if (commit_failure_ == nullptr) commit_failure_ = error;
      lose_place(*tile);
      continue;
    }
    tile->committed = false;
    tile->second_write = true;
    begin_write(*tile);
  }
  pump();
}

// The next commit writes the tile, which holds no state or is in memory, to
// another place.
void TileLanes::lose_place(Tile& tile) {
  tile.extent.reset();
  tile.committed = false;
  if (tile.in_memory) {
    tile.state = Tile::State::kReady;
  } else {
    let_go(tile);
  }
}

void TileLanes::let_go(Tile& tile) {
  tile.buffer = Buffer();
  tile.in_memory = tile.dirty = false;
  tile.state = Tile::State::kIdle;
  tile.unwanted = false;
}

void TileLanes::fail(std::exception_ptr error, bool lost) {
  if (failure_ == nullptr || (lost && !lost_)) failure_ = std::move(error);
  lost_ = lost_ || lost;
  changed_.notify_all();
}

// Whether a failed read loses state: in an open round it does, since the
// gradients are gone with the round.
void TileLanes::fail_read(std::exception_ptr error) {
  const bool updates = running_ && round_.write && !round_.for_commit;
  fail(std::move(error), updates && (visited_ > 0 || round_.open));
}

void TileLanes::note(Lane lane, const Tile& tile, double end) noexcept {
  if (tile.step == 0) return;
  try {
    events_.push_back({{lane, tile.number, tile.start, end}, tile.step});
  } catch (...) {
    // A timeline without this event is better than a step that fails.
  }
}

std::exception_ptr TileLanes::clear() noexcept {
  MutexLock lock(mutex_);
  round_ = before_ = {};
  released_.clear();
  running_ = false;
  fetched_ = 0;
  while (in_flight_ > 0) changed_.wait(lock);
  unwritten_.clear();
  const std::exception_ptr error = std::exchange(failure_, nullptr);
  return std::exchange(lost_, false) ? error : nullptr;
}

void TileLanes::renumber(const TileList& tiles) {
  MutexLock lock(mutex_);
  for (std::size_t i = 0; i < tiles.size(); ++i) tiles[i]->number = i;
}

std::exception_ptr TileLanes::failure() const {
  MutexLock lock(mutex_);
  return lost_ ? failure_ : nullptr;
}

TileLanes::Seconds TileLanes::seconds() const {
  MutexLock lock(mutex_);
  const double time = now();
  return {reading_.read(time), update_seconds_, writing_.read(time),
          wait_seconds_, steps_ > 0 ? time - first_start_ : 0};
}

TileLanes::Visits TileLanes::visits() const {
  MutexLock lock(mutex_);
  return visits_;
}

std::vector<LaneEvent> TileLanes::timeline() const {
  MutexLock lock(mutex_);
  std::vector<LaneEvent> timeline;
  for (const Event& found : events_) {
    if (found.step != steps_) continue;
    LaneEvent event = found.event;
    event.start -= step_start_;
    event.end -= step_start_;
    timeline.push_back(event);
  }
  lock.unlock();
  std::sort(
      timeline.begin(), timeline.end(),
      [](const LaneEvent& a, const LaneEvent& b) { return a.start < b.start; });
  return timeline;
}

}  // namespace torch_ext
