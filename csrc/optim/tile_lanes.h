#pragma once

#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "tile.h"
#include "torch_ext/memory/buffer_pool.h"
#include "torch_ext/optim/optimizer_offload.h"
#include "torch_ext/store/store.h"

namespace torch_ext {

/// Brings tiles into memory in the order of a round, hands them one by one to
/// the thread that visits them, and takes them away. tile_lanes.cpp tells the
/// rule that keeps a visit from waiting for ever.
///
/// A buffer that becomes free is filled with the next tile at once, on the
/// thread that freed it. After the last tile of a round that repeats, it is
/// filled with the first. So reads go on between rounds, without a thread of
/// their own.
/// Threads: one begins rounds and one visits; it may be the same. The store's
/// threads report the ends of transfers.
class TileLanes {
 public:
  struct Round {
    std::vector<Tile*> tiles;  ///< In the order of visits; none twice.
    bool read = true;          ///< Else their bytes are undefined.
    bool write = true;         ///< Else changes are lost.
    bool repeat = true;        ///< The next round will be the same.
    /// Tiles are visited once they have been released and are in memory. The
    /// next round is expected in the order of the releases.
    bool open = false;
    /// The tiles are written for a commit and hold no state. If a write fails,
    /// nothing is lost: it is made once more elsewhere, and settle() throws
    /// what fails then.
    bool for_commit = false;
  };
  /// `fresh`: nothing is on disk yet, so the bytes are undefined.
  using Work = std::function<void(Tile& tile, bool fresh)>;

  /// Resident tiles leave `lanes` buffers of the pool to others while those are
  /// visited.
  TileLanes(Store& store, BufferPool& pool, std::size_t lanes);
  ~TileLanes();  ///< As clear().

  /// Calls begin() and visit().
  void run(Round round, const Work& work);

  /// Begins a round: the first tiles are read. Errors: failure(), until
  /// clear().
  void begin(Round round);

  /// Visits the tiles. The last writes may be in flight when it returns.
  /// Errors: the first failure of the work or of a transfer.
  void visit(const Work& work);

  /// Releases a tile of an open round. Called on any thread, before
  /// close_round().
  void release(Tile& tile);

  /// Leaves out the tiles of the open round that have not been released.
  void close_round();

  /// Ends the round as if a transfer had failed with `error`.
  void abort(std::exception_ptr error);

  /// The tiles that are expected in the next round, in its order.
  std::vector<Tile*> order() const;

  /// Takes a resident tile's state to the disk. The tile has an extent, and
  /// stops being resident. Called between rounds.
  void evict(Tile& tile);

  /// Begins to write the resident tiles that have changed. They stay in memory.
  /// Called between rounds; settle() throws what fails, at the second place.
  void write_residents(const TileList& tiles);

  /// Sees to it that a round of other tiles finds `count` buffers: resident
  /// tiles that are on disk as they are give theirs back until their next
  /// visit. Returns false if that is not enough. Called between rounds.
  bool make_way(const TileList& tiles, std::size_t count);

  /// Returns when all writes have ended. Errors: the first failure of what was
  /// written for a commit, after which nothing is lost; failure().
  void settle();

  /// A commit in the making refers to the present extents of these tiles.
  /// Their next writes go to spares, or are held where there is none. Called
  /// after settle(), on any thread.
  void begin_commit(const std::vector<Tile*>& tiles);

  /// How the commit has ended.
  struct CommitEnd {
    bool made = false;  ///< Else `tiles` may be written where they are.
    /// If set, no extent may be written any more: it becomes failure().
    std::exception_ptr must_stop = nullptr;
    /// What no commit needs now, unless somebody else refers to it, and the
    /// tiles whose places these were; null if a tile has gone.
    std::vector<std::pair<Tile*, std::shared_ptr<Extent>>> freed = {};
    std::size_t most_spares = 1;  ///< A tile has so many.
  };
  /// Ends what begin_commit() began, for the same tiles, and begins the writes
  /// that were held. Called on any thread.
  void end_commit(const std::vector<Tile*>& tiles, CommitEnd end);

  /// Forgets tiles that hold no state any more, once their transfers have
  /// ended. Called between rounds.
  void drop(const std::vector<Tile*>& tiles);

  /// Waits for all transfers, then forgets the tiles and the failure(), which
  /// it returns. The tiles' buffers go with the tiles.
  std::exception_ptr clear() noexcept;

  /// The error after which state may be half updated or lost. That is a failed
  /// write, or failed work or a failed read in a round that writes, except a
  /// read before the first visit. Null after any other failure: then nothing
  /// has changed, and the next round goes as if the failed one had not been.
  std::exception_ptr failure() const;

  /// Counts the tiles anew. Transfers in flight note a tile's number when they
  /// end.
  void renumber(const TileList& tiles);

  struct Seconds {
    double read = 0;
    double update = 0;
    double write = 0;
    double wait = 0;
    double elapsed = 0;  ///< Since the first step began.
  };
  Seconds seconds() const;
  struct Visits {
    std::uint64_t all = 0;
    std::uint64_t hits = 0;  ///< Found their tile in memory.
  };
  Visits visits() const;
  std::vector<LaneEvent> timeline() const;

 private:
  friend struct OptimizerOffloadProbe;  // For tests.

  /// Adds up the time during which at least one transfer is running.
  struct BusyClock {
    std::size_t running = 0;
    double since = 0;
    double total = 0;
    void start(double now);
    void stop(double now);
    double read(double now) const;
  };

  void keep_only(const std::vector<Tile*>& tiles) REQUIRES(mutex_);
  void dismiss(Tile& tile) REQUIRES(mutex_);
  void expect(std::vector<Tile*> tiles) REQUIRES(mutex_);
  Tile* next(MutexLock& lock) REQUIRES(mutex_);
  Tile* ready_tile() REQUIRES(mutex_);
  void give_up(Tile& tile, std::exception_ptr error) REQUIRES(mutex_);
  void finish(Tile& tile) REQUIRES(mutex_);
  void pump() noexcept REQUIRES(mutex_);
  void start_read(Tile& tile) REQUIRES(mutex_);
  void start_write(Tile& tile) REQUIRES(mutex_);
  void read_ended(Tile& tile, std::exception_ptr error) noexcept;
  void write_ended(Tile& tile, std::exception_ptr error) noexcept;
  void let_go(Tile& tile) REQUIRES(mutex_);
  void write_failed(Tile& tile, std::exception_ptr error) REQUIRES(mutex_);
  bool put_off(Tile& tile, const std::exception_ptr& error) REQUIRES(mutex_);
  void write_elsewhere() REQUIRES(mutex_);
  void lose_place(Tile& tile) REQUIRES(mutex_);
  void fail(std::exception_ptr error, bool lost) REQUIRES(mutex_);
  void fail_read(std::exception_ptr error) REQUIRES(mutex_);
  void move_from_commit(Tile& tile) REQUIRES(mutex_);
  void begin_write(Tile& tile) REQUIRES(mutex_);
  void leave_round(MutexLock& lock) REQUIRES(mutex_);
  void note(LaneEvent::Lane lane, const Tile& tile, double end) noexcept
      REQUIRES(mutex_);

  Store& store_;
  BufferPool& pool_;
  const std::size_t lanes_;

  mutable Mutex mutex_;
  CondVar changed_;
  Round round_ GUARDED_BY(mutex_);  ///< The one that runs, or the next one.
  /// Comes after one that does not repeat.
  Round before_ GUARDED_BY(mutex_);
  bool running_ GUARDED_BY(mutex_) = false;
  bool closed_ GUARDED_BY(mutex_) = true;  ///< Nothing more is released.
  /// How many visits have got a buffer for their tile. It counts on into the
  /// visits of the next round.
  std::size_t fetched_ GUARDED_BY(mutex_) = 0;
  /// In the order of the releases.
  std::vector<Tile*> released_ GUARDED_BY(mutex_);
  std::size_t visited_ GUARDED_BY(mutex_) = 0;
  /// All tiles before it are visited.
  std::size_t first_ GUARDED_BY(mutex_) = 0;
  std::size_t in_flight_ GUARDED_BY(mutex_) = 0;
  std::size_t writes_in_flight_ GUARDED_BY(mutex_) = 0;
  std::exception_ptr commit_failure_ GUARDED_BY(mutex_);
  /// Between begin_commit() and end_commit().
  bool committing_ GUARDED_BY(mutex_) = false;
  /// Tiles whose writes wait for end_commit().
  std::vector<Tile*> held_ GUARDED_BY(mutex_);
  /// Tiles that a commit could not write, and why. Empty after settle().
  std::vector<std::pair<Tile*, std::exception_ptr>> unwritten_
      GUARDED_BY(mutex_);
  /// Stops all until the next round.
  std::exception_ptr failure_ GUARDED_BY(mutex_);
  bool lost_ GUARDED_BY(mutex_) = false;  ///< It is failure() too.

  BusyClock reading_ GUARDED_BY(mutex_);
  BusyClock writing_ GUARDED_BY(mutex_);
  double update_seconds_ GUARDED_BY(mutex_) = 0;
  double wait_seconds_ GUARDED_BY(mutex_) = 0;
  Visits visits_ GUARDED_BY(mutex_);
  /// Rounds that repeat, begun so far.
  std::size_t steps_ GUARDED_BY(mutex_) = 0;
  double step_start_ GUARDED_BY(mutex_) = 0;
  double first_start_ GUARDED_BY(mutex_) = 0;
  struct Event {
    LaneEvent event;
    std::size_t step;
  };
  /// The last step's and the next one's.
  std::vector<Event> events_ GUARDED_BY(mutex_);
};

}  // namespace torch_ext
