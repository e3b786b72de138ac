#pragma once

#include <algorithm>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "remedy.h"
#include "tile_lanes.h"
#include "tile_layout.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"
#include "torch_ext/base/process.h"
#include "torch_ext/memory/buffer_pool.h"
#include "torch_ext/optim/optimizer_offload.h"
#include "updater.h"

namespace torch_ext {

class OptimizerOffload::Impl {
 public:
  static constexpr std::uint64_t kPage = 4096;

  struct Parameter {
    std::uint64_t elements = 0;
    StateFields fields;
    std::uint64_t step = 0;
    bool placed = false;     ///< Has room in tiles.
    bool has_state = false;  ///< By a step, or because it was given.
    bool active = false;     ///< In the round that runs.
    std::vector<Tile*> tiles = {};
  };

  explicit Impl(const OptimizerOffloadOptions& options)
      : host_memory(options.host_memory),
        scratch_bytes(align_up(options.scratch_bytes, kPage)),
        store(std::make_unique<Store>(options.store)),
        granule(store->granule()),
        wanted_tile_bytes(options.tile_bytes),
        plan(plan_tiles(options.host_memory, scratch_bytes, granule,
                        options.tile_bytes)),
        pool(std::make_unique<BufferPool>(plan.tile_bytes, plan.buffers)),
        lanes(std::make_unique<TileLanes>(*store, *pool, plan.lanes)),
        notes(store->notes()),
        engine(store->engine()) {}

  void check_process() const {
    if (process_id() != owner) {
      throw StateError("this optimizer was created in process " +
                       std::to_string(owner) +
                       " and cannot be used in a forked child; create one "
                       "in the child");
    }
  }

  /// Takes the lock of the calls. Hold it while the object is used.
  std::unique_lock<std::mutex> enter(bool when_closed = false) {
    check_process();  // First: nobody unlocks a mutex held at the fork.
    std::unique_lock lock(calls);
    if (closed && !when_closed) throw StateError("this optimizer is closed");
    return lock;
  }

  void refuse_if_failed() {
    if (refusal != nullptr) std::rethrow_exception(refusal);
    // A write, or a read ahead, may have failed since the last call.
    if (const auto error = lanes->failure()) {
      refusal = with_remedy(error);
      std::rethrow_exception(error);
    }
  }

  void refuse_in_step() const {
    if (open_kernel == nullptr) return;
    throw StateError("optimizer: a step has begun and has not ended");
  }

  Parameter& parameter(std::size_t number) {
    if (number >= parameters.size()) {
      throw std::invalid_argument("optimizer: there is no parameter " +
                                  std::to_string(number));
    }
    return parameters[number];
  }

  void place(std::span<const std::size_t> numbers);
  void forget(std::span<const std::size_t> numbers);
  /// Numbers of steps, and whether there is state. They are set back if a round
  /// fails without having changed anything.
  using Counts = std::vector<std::pair<std::uint64_t, bool>>;
  Counts counts(std::span<const std::size_t> numbers) const;
  void set_counts(std::span<const std::size_t> numbers, const Counts& counts);
  void activate(std::span<const std::size_t> numbers);
  void run(TileLanes::Round round, UpdateKernel& kernel);
  void release(std::size_t number);
  void finish_open_step();
  void give_up_open_step();
  void show(const Tile& tile, bool fresh, UpdateKernel& kernel);
  bool is_active(const Tile& tile) const {
    return std::any_of(tile.segments.begin(), tile.segments.end(),
                       [this](const Segment& segment) {
                         return parameters[segment.parameter].active;
                       });
  }
  TileList lay_out(std::span<const std::size_t> numbers,
                   std::uint64_t tile_bytes);
  void pin(BufferPool& memory, const std::shared_ptr<Device>& device);
  OptimizerOffloadStats snapshot() const;

  const pid_t owner = process_id();
  const std::uint64_t host_memory;
  const std::uint64_t scratch_bytes;
  std::mutex calls;  // Held by each.
  std::unique_ptr<Store> store;
  const std::uint64_t granule;  ///< Tiles take multiples of it on the drive.
  const std::uint64_t wanted_tile_bytes;  ///< 0: by a rule.
  const TilePlan plan;
  std::unique_ptr<BufferPool> pool;
  std::unique_ptr<BufferPool> scratch;
  std::vector<Parameter> parameters;
  std::vector<std::size_t> unused;  ///< Numbers of removed parameters.
  std::mutex parameters_mutex;      // For what the updater reads.
  TileList tiles;
  std::vector<Tile*> order;  ///< The visits'.
  std::unique_ptr<TileLanes> lanes;
  std::unique_ptr<Updater> updater;     // Made by the first open step.
  UpdateKernel* open_kernel = nullptr;  // The open step's, or null.
  std::vector<std::size_t> newcomers;   // Its parameters without state.
  std::vector<std::string> notes;
  const std::string engine;
  std::exception_ptr refusal;
  std::uint64_t steps = 0;
  bool closed = false;
  OptimizerOffloadStats last_stats;  // As they were at close().
  std::vector<LaneEvent> last_timeline;
};

}  // namespace torch_ext
