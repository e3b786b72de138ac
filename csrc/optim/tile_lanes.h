#pragma once

#include <condition_variable>
#include <cstddef>
#include <exception>
#include <functional>
#include <mutex>
#include <vector>

#include "tile.h"
#include "torch_ext/memory/buffer_pool.h"
#include "torch_ext/optim/optimizer_offload.h"
#include "torch_ext/store/store.h"

namespace torch_ext {

/// Brings tiles into memory in the order of a round, hands them to the thread
/// that visits them one by one, and takes them away.
///
/// A buffer that becomes free is filled at once, on whichever thread freed
/// it, with the next tile; after the last of a round that repeats with the
/// first. So reads go on between rounds, with no thread of their own.
/// Threads: one begins rounds and one visits, or the same; the store's threads
/// report the ends of transfers.
class TileLanes {
 public:
  struct Round {
    std::vector<Tile*> tiles;  ///< In the order of their visits; none twice.
    bool read = true;          ///< Else they come with undefined bytes.
    bool write = true;         ///< Else changes are lost.
    bool repeat = true;        ///< The next round is expected to be the same.
    /// Tiles are visited once they have been released and are there, and the
    /// next round is expected in the order of the releases.
    bool open = false;
  };
  /// `fresh`: nothing is on disk yet, the bytes are undefined.
  using Work = std::function<void(Tile& tile, bool fresh)>;

  /// `lanes` buffers of the pool are never held by resident tiles while others
  /// are visited.
  TileLanes(Store& store, BufferPool& pool, std::size_t lanes);
  ~TileLanes();  ///< As clear().

  /// begin() and visit().
  void run(Round round, const Work& work);

  /// Has the first tiles read. Errors: failure(), until clear().
  void begin(Round round);

  /// Visits the tiles; the last writes may be in flight on return.
  /// Errors: the first failure, be it of the work or of a transfer.
  void visit(const Work& work);

  /// Of an open round, from any thread, before close_round().
  void release(Tile& tile);

  /// Tiles of the open round that have not been released are left out.
  void close_round();

  /// As if a transfer had failed.
  void abort(std::exception_ptr error);

  /// Tiles as they are expected in the next round.
  std::vector<Tile*> order() const;

  /// Takes a resident tile's state to the disk; it is not resident any more
  /// and has an extent. Between rounds.
  void evict(Tile& tile);

  /// Forgets tiles that hold no state any more, once their transfers have
  /// ended. Between rounds.
  void drop(const std::vector<Tile*>& tiles);

  /// Waits for all transfers, and forgets the tiles and the failure(), which it
  /// returns. The tiles' buffers go with the tiles.
  std::exception_ptr clear() noexcept;

  /// What has failed so that state may be half updated or lost: a write; work
  /// or a read in a round that writes, but for a read before the first visit.
  /// Null after any other failure: nothing has changed, the next round is as
  /// if the failed one had not been.
  std::exception_ptr failure() const;

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
    std::uint64_t hits = 0;  ///< Of tiles that had stayed in memory.
  };
  Visits visits() const;
  std::vector<LaneEvent> timeline() const;

 private:
  friend struct OptimizerOffloadProbe;  // Of tests.
  using Lock = std::unique_lock<std::mutex>;

  /// Adds up the time during which at least one of its things goes on.
  struct BusyClock {
    std::size_t running = 0;
    double since = 0;
    double total = 0;
    void start(double now);
    void stop(double now);
    double read(double now) const;
  };

  void keep_only(const std::vector<Tile*>& tiles);
  void dismiss(Tile& tile);
  void expect(std::vector<Tile*> tiles);
  Tile* next(Lock& lock);
  Tile* ready_tile();
  void work_on(Tile& tile, const Work& work);
  void finish(Tile& tile);
  void pump() noexcept;
  void start_read(Tile& tile);
  void start_write(Tile& tile);
  void read_ended(Tile& tile, std::exception_ptr error) noexcept;
  void write_ended(Tile& tile, std::exception_ptr error) noexcept;
  void let_go(Tile& tile);
  void fail(std::exception_ptr error, bool lost);
  void fail_read(std::exception_ptr error);
  void leave_round(Lock& lock);
  void note(LaneEvent::Lane lane, const Tile& tile, double end) noexcept;

  Store& store_;
  BufferPool& pool_;
  const std::size_t lanes_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Round round_;   ///< The one that runs, else the one that is expected.
  Round before_;  ///< What is expected after one that does not repeat.
  bool running_ = false;
  bool closed_ = true;  ///< Nothing is released any more.
  /// Its visits, and on to those of the next, whose tile has got a buffer.
  std::size_t fetched_ = 0;
  std::vector<Tile*> released_;  ///< In the order of the releases.
  std::size_t visited_ = 0;
  std::size_t first_ = 0;  ///< All before it have been visited.
  std::size_t in_flight_ = 0;
  std::exception_ptr failure_;  ///< Nothing goes on before the next round.
  bool lost_ = false;           ///< It is failure() as well.

  BusyClock reading_;
  BusyClock writing_;
  double update_seconds_ = 0;
  double wait_seconds_ = 0;
  Visits visits_;
  std::size_t steps_ = 0;  ///< Rounds that repeat, begun so far.
  double step_start_ = 0;
  double first_start_ = 0;
  struct Event {
    LaneEvent event;
    std::size_t step;
  };
  std::vector<Event> events_;  ///< Of the last and the next step.
};

}  // namespace torch_ext
