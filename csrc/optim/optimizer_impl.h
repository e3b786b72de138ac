#pragma once

#include <future>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "base/owner_process.h"
#include "running_commit.h"
#include "store/commit_log.h"
#include "store/store_copy.h"
#include "tile_lanes.h"
#include "tile_layout.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"
#include "torch_ext/memory/buffer_pool.h"
#include "torch_ext/optim/optimizer_offload.h"
#include "updater.h"

namespace torch_ext {

inline std::vector<Tile*> tile_pointers(const TileList& tiles) {
  std::vector<Tile*> all;
  for (const auto& tile : tiles) all.push_back(tile.get());
  return all;
}

struct CommitDocument;

/// The error of a step, as later calls shall throw it.
std::exception_ptr with_remedy(const std::exception_ptr& error);

class OptimizerOffload::Impl {
 public:
  struct Parameter {
    std::uint64_t elements = 0;
    StateFields fields;
    std::uint64_t step = 0;
    bool placed = false;     ///< Has room in tiles.
    bool has_state = false;  ///< By a step, or because it was given.
    bool active = false;     ///< In the round that runs.
    std::vector<Tile*> tiles = {};
  };

  /// `wanted_tiles`: bytes of a tile, or 0.
  Impl(const TileOptions& options, std::unique_ptr<Store> its_store,
       std::uint64_t wanted_tiles)
      : host_memory(options.host_memory),
        scratch_bytes(align_up(options.scratch_bytes, page_size())),
        name(options.name),
        store(std::move(its_store)),
        granule(store->granule()),
        wanted_tile_bytes(wanted_tiles),
        plan(plan_tiles(options.host_memory, scratch_bytes, granule,
                        wanted_tiles)),
        pool(std::make_unique<BufferPool>(plan.tile_bytes, plan.buffers)),
        lanes(std::make_unique<TileLanes>(*store, *pool, plan.lanes)),
        notes(store->notes()),
        engine(store->engine()) {}

  explicit Impl(const TileOptions& options)
      : Impl(options, std::make_unique<Store>(options.store),
             options.tile_bytes) {}

  /// How far a commit that goes on must be before a call begins. See
  /// running_commit.cpp.
  enum class After {
    kCommit,      ///< It has ended.
    kWritten,     ///< It does not touch tiles any more.
    kNoCommit,    ///< Anywhere: the call touches nothing that it uses.
    kEvenClosed,  ///< Anywhere, and the object may be closed.
  };
  /// Takes the lock of the calls. Hold it while the object is used.
  /// Errors: StateError (forked, closed).
  class SCOPED_LOCK Call {
   public:
    explicit Call(Impl& impl, After after = After::kCommit) ACQUIRE(impl.calls)
        : lock_(impl.own_calls()) {
      if (impl.closed && after != After::kEvenClosed) {
        throw StateError("this optimizer is closed");
      }
      impl.wait_for_commit(after);
    }
    ~Call() RELEASE() = default;

   private:
    MutexLock lock_;
  };

  Mutex& own_calls() RETURNS_MUTEX(calls) {
    owner.check();  // First: nobody unlocks a mutex held at the fork.
    return calls;
  }

  void refuse_if_failed() REQUIRES(calls) {
    if (refusal != nullptr) {
      if (failed_commit != nullptr &&
          failed_commit->ended.ticket().error() == refusal) {
        failed_commit->error_seen = true;
      }
      std::rethrow_exception(refusal);
    }
    // A write, or a read ahead, may have failed since the last call.
    if (const auto error = lanes->failure()) {
      refusal = with_remedy(error);
      std::rethrow_exception(error);
    }
  }

  void refuse_in_step() const REQUIRES(calls) {
    if (open_kernel == nullptr) return;
    throw StateError("optimizer: a step has begun and has not ended");
  }

  Parameter& parameter(std::size_t number) REQUIRES(calls) {
    if (number >= parameters.size()) {
      throw std::invalid_argument("optimizer: there is no parameter " +
                                  std::to_string(number));
    }
    return parameters[number];
  }

  void place(std::span<const std::size_t> numbers) REQUIRES(calls);
  void forget(std::span<const std::size_t> numbers) REQUIRES(calls);
  /// Numbers of steps, and whether there is state. They are set back if a round
  /// fails without having changed anything.
  using Counts = std::vector<std::pair<std::uint64_t, bool>>;
  Counts counts(std::span<const std::size_t> numbers) const REQUIRES(calls);
  void set_counts(std::span<const std::size_t> numbers, const Counts& counts)
      REQUIRES(calls);
  /// Checks what a commit is asked for, lays out its values, and fills in its
  /// document.
  void prepare_commit(RunningCommit& commit,
                      std::span<const CommittedValue> wanted) REQUIRES(calls);
  /// Makes a commit. On the calling thread, or on a thread of its own that does
  /// not hold `calls`: running_commit.cpp says what keeps the calls away.
  CommitReport make_commit(RunningCommit& commit) UNCHECKED_THREADS;
  void run_commit(RunningCommit& commit) noexcept UNCHECKED_THREADS;
  void wait_for_commit(After after) REQUIRES(calls);
  void throw_unseen_error() REQUIRES(calls);
  void lay_out_values(RunningCommit& commit,
                      std::span<const CommittedValue> values) REQUIRES(calls);
  void put_back_values(RunningCommit& commit) REQUIRES(calls);
  /// `commits_now`: a commit follows, which writes values.
  void make_room_for_commit(std::size_t keep, bool commits_now) REQUIRES(calls);
  void write_untouched() REQUIRES(calls);
  void visit_values(TileLanes::Round round, UpdateKernel& kernel)
      REQUIRES(calls);
  std::string document_of(const std::string& of_caller) REQUIRES(calls);
  void clear_tiles() REQUIRES(calls);
  void take_commit(const Commit& commit, const CommitDocument& document)
      REQUIRES(calls);
  const Commit& kept_commit(std::uint64_t generation) const REQUIRES(calls);
  CommitDocument document_of(const Commit& commit) const REQUIRES(calls);
  void read_values(UpdateKernel& kernel) REQUIRES(calls);
  StoreCopy copy_to(const DirectoryList& directory, const std::string& place)
      REQUIRES(calls);
  /// Whether a commit writes it, to another place than its present one.
  static bool is_written_anew(const Tile& tile) {
    return tile.committed && (tile.dirty || !tile.holds_state);
  }
  /// The tiles are going: commits do not give their places back to them.
  void disown(const std::vector<Tile*>& gone) REQUIRES(calls);
  void activate(std::span<const std::size_t> numbers) REQUIRES(calls);
  void run(TileLanes::Round round, UpdateKernel& kernel) REQUIRES(calls);
  void release(std::size_t number) REQUIRES(calls);
  void finish_open_step() REQUIRES(calls);
  void give_up_open_step() REQUIRES(calls);
  /// Called on the updater's thread too, which does not hold `calls`.
  void show(const Tile& tile, bool fresh,
            UpdateKernel& kernel) UNCHECKED_THREADS;
  BufferPool* scratch_pool();
  bool is_active(const Tile& tile) const REQUIRES(calls) {
    for (const Segment& segment : tile.segments) {
      if (parameters[segment.parameter].active) return true;
    }
    return false;
  }
  TileList lay_out(std::span<const std::size_t> numbers,
                   std::uint64_t tile_bytes) REQUIRES(calls);
  void pin(BufferPool& memory, const std::shared_ptr<Device>& device)
      REQUIRES(calls);
  OptimizerOffloadStats snapshot() REQUIRES(calls);

  const OwnerProcess owner{"optimizer"};
  const std::uint64_t host_memory;
  const std::uint64_t scratch_bytes;
  const StoreName name;
  Mutex calls;  // Held by each.
  std::unique_ptr<Store> store GUARDED_BY(calls);
  const std::uint64_t granule;  ///< Tiles take multiples of it on the drive.
  const std::uint64_t wanted_tile_bytes;  ///< 0: by a rule.
  const TilePlan plan;
  std::unique_ptr<BufferPool> pool GUARDED_BY(calls);
  /// While a step is open, the updater reads them with the mutex below. A call
  /// that changes them holds both.
  std::vector<Parameter> parameters GUARDED_BY(calls);
  Mutex parameters_mutex;
  std::unique_ptr<BufferPool> scratch GUARDED_BY(parameters_mutex);
  /// Numbers of removed parameters.
  std::vector<std::size_t> unused GUARDED_BY(calls);
  TileList tiles GUARDED_BY(calls);
  std::vector<Tile*> order GUARDED_BY(calls);  ///< The visits'.
  std::unique_ptr<TileLanes> lanes GUARDED_BY(calls);
  /// Made by the first open step.
  std::unique_ptr<Updater> updater GUARDED_BY(calls);
  /// The open step's kernel, or null; its end; its parameters without state.
  UpdateKernel* open_kernel GUARDED_BY(calls) = nullptr;
  std::future<void> updated GUARDED_BY(calls);
  std::vector<std::size_t> newcomers GUARDED_BY(calls);
  /// Made by the first start_commit(). Its commit, until a call has found that
  /// it has ended. The last one that failed, if its error may be unseen.
  std::unique_ptr<Updater> committer GUARDED_BY(calls);
  std::unique_ptr<RunningCommit> running GUARDED_BY(calls);
  std::shared_ptr<CommitTicket::State> failed_commit GUARDED_BY(calls);
  /// Null before the first commit.
  std::unique_ptr<CommitLog> log GUARDED_BY(calls);
  std::vector<CommittedValue> values GUARDED_BY(calls);
  TileList value_tiles GUARDED_BY(calls);
  /// By generation, the tiles whose places its extents are. Null for one that
  /// has gone.
  std::map<std::uint64_t, std::vector<Tile*>> owners GUARDED_BY(calls);
  std::string layout GUARDED_BY(calls);  ///< Empty if it has changed.
  std::vector<std::string> notes;
  const std::string engine;
  std::exception_ptr refusal GUARDED_BY(calls);
  std::uint64_t steps GUARDED_BY(calls) = 0;
  bool closed GUARDED_BY(calls) = false;
  /// As they were at close().
  OptimizerOffloadStats last_stats GUARDED_BY(calls);
  std::vector<LaneEvent> last_timeline GUARDED_BY(calls);
};

}  // namespace torch_ext
