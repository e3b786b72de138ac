#include "torch_ext/optim/optimizer_offload.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "tile_lanes.h"
#include "tile_layout.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"
#include "torch_ext/base/process.h"
#include "torch_ext/memory/buffer_pool.h"

namespace torch_ext {
namespace {

constexpr std::uint64_t kPage = 4096;

struct Parameter {
  std::uint64_t elements = 0;
  StateFields fields;
  std::uint64_t step = 0;
  bool has_state = false;
  bool active = false;  ///< In the round that runs.
};

// An error as later calls shall see it.
std::exception_ptr with_remedy(const std::exception_ptr& error) {
  const std::string remedy =
      "the optimizer state may be half updated: load it anew";
  try {
    std::rethrow_exception(error);
  } catch (const IoError& e) {
    IoFailure failure = e.failure();
    if (!failure.detail.empty()) failure.detail += "; ";
    failure.detail += remedy;
    return std::make_exception_ptr(IoError(std::move(failure)));
  } catch (const std::exception& e) {
    return std::make_exception_ptr(
        StateError(std::string(e.what()) + "; " + remedy));
  } catch (...) {
    return error;
  }
}

}  // namespace

class OptimizerOffload::Impl {
 public:
  explicit Impl(const OptimizerOffloadOptions& options)
      : host_memory(options.host_memory),
        scratch_bytes(align_up(options.scratch_bytes, kPage)),
        store(std::make_unique<Store>(options.store)),
        granule(store->granule()),
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

  /// To be held while the object is used.
  std::unique_lock<std::mutex> enter(bool when_closed = false) {
    check_process();  // Nobody unlocks a mutex that was held at the fork.
    std::unique_lock lock(calls);
    if (closed && !when_closed) throw StateError("this optimizer is closed");
    return lock;
  }

  void refuse_if_failed() {
    if (refusal != nullptr) std::rethrow_exception(refusal);
    // A write or a read ahead that has ended since the last call.
    if (const auto error = lanes->failure()) {
      refusal = with_remedy(error);
      std::rethrow_exception(error);
    }
  }

  Parameter& parameter(std::size_t number) {
    if (number >= parameters.size()) {
      throw std::invalid_argument("optimizer: there is no parameter " +
                                  std::to_string(number));
    }
    return parameters[number];
  }

  void place(std::span<const std::size_t> numbers);
  void activate(std::span<const std::size_t> numbers);
  void run(TileLanes::Round round, UpdateKernel& kernel);
  void show(const Tile& tile, bool fresh, UpdateKernel& kernel);
  void pin(BufferPool& memory, const std::shared_ptr<Device>& device);
  OptimizerOffloadStats snapshot() const;

  const pid_t owner = process_id();
  const std::uint64_t host_memory;
  const std::uint64_t scratch_bytes;
  std::mutex calls;  // One at a time.
  std::unique_ptr<Store> store;
  const std::uint64_t granule;  ///< Tiles take multiples of it on the drive.
  const TilePlan plan;
  std::unique_ptr<BufferPool> pool;
  std::unique_ptr<BufferPool> scratch;
  std::vector<Parameter> parameters;
  TileList tiles;
  std::unique_ptr<TileLanes> lanes;
  std::vector<StateSegment> segments;
  std::vector<std::string> notes;
  const std::string engine;
  std::exception_ptr refusal;
  std::uint64_t steps = 0;
  bool closed = false;
  OptimizerOffloadStats last_stats;  // As they were at close().
  std::vector<LaneEvent> last_timeline;
};

// Gives space to parameters that have no state yet; all or none.
void OptimizerOffload::Impl::place(std::span<const std::size_t> numbers) {
  const std::size_t before = tiles.size();
  std::vector<Tile*> evicted;
  try {
    TileLayout layout(tiles, plan.tile_bytes);
    for (const std::size_t number : numbers) {
      const Parameter& p = parameter(number);
      if (!p.has_state) layout.add(number, p.elements, p.fields);
    }
    const std::size_t count = tiles.size();
    const std::size_t stay = plan.resident(count);
    // Once chosen they stay so, unless all could stay before and no longer can.
    const bool choose = before <= plan.buffers;
    for (std::size_t i = choose ? 0 : before; i < count; ++i) {
      Tile& tile = *tiles[i];
      const bool resident = choose && is_chosen(i, count, stay);
      if (i >= before) {
        tile.resident = resident;
      } else if (!resident) {
        evicted.push_back(&tile);
      }
      if (!resident) tile.extent = store->allocate(tile.bytes);
    }
  } catch (...) {
    for (Tile* tile : evicted) tile->extent.reset();
    tiles.resize(before);
    throw;
  }
  for (Tile* tile : evicted) lanes->evict(*tile);
  for (const std::size_t number : numbers) parameters[number].has_state = true;
}

void OptimizerOffload::Impl::activate(std::span<const std::size_t> numbers) {
  for (Parameter& p : parameters) p.active = false;
  for (const std::size_t number : numbers) {
    Parameter& p = parameter(number);
    if (p.active) {
      throw std::invalid_argument("optimizer: parameter " +
                                  std::to_string(number) + " is given twice");
    }
    p.active = true;
  }
}

void OptimizerOffload::Impl::run(TileLanes::Round round, UpdateKernel& kernel) {
  for (const auto& tile : tiles) {
    for (const Segment& segment : tile->segments) {
      if (!parameters[segment.parameter].active) continue;
      round.tiles.push_back(tile.get());
      break;
    }
  }
  if (round.tiles.empty()) return;
  try {
    lanes->run(std::move(round), [this, &kernel](Tile& tile, bool fresh) {
      show(tile, fresh, kernel);
    });
  } catch (...) {
    refusal = with_remedy(std::current_exception());
    throw;
  }
}

void OptimizerOffload::Impl::show(const Tile& tile, bool fresh,
                                  UpdateKernel& kernel) {
  std::byte* const data = tile.buffer.data();
  // Padding is written too.
  if (fresh) std::fill_n(data, tile.buffer.size(), std::byte{0});
  segments.clear();
  for (const Segment& in : tile.segments) {
    const Parameter& p = parameters[in.parameter];
    if (!p.active) continue;
    StateSegment out{in.parameter, in.first, in.count, p.step, {}};
    std::byte* next = data + in.offset;
    for (std::size_t i = 0; i < StateFields::kMax; ++i) {
      if (p.fields.bytes_per_cut[i] == 0) continue;
      out.fields[i] = next;
      next += TileLayout::bytes_of(p.fields, i, in.count);
    }
    segments.push_back(out);
  }
  kernel.update(segments);
}

void OptimizerOffload::Impl::pin(BufferPool& memory,
                                 const std::shared_ptr<Device>& device) {
  const std::string why_not = memory.pin(device);
  if (why_not.empty() || std::ranges::count(notes, why_not) > 0) return;
  notes.push_back(why_not);
}

OptimizerOffloadStats OptimizerOffload::Impl::snapshot() const {
  OptimizerOffloadStats now;
  const StoreStats io = store->stats();
  const TileLanes::Seconds seconds = lanes->seconds();
  now.steps = steps;
  now.bytes_read = io.bytes_read;
  now.bytes_written = io.bytes_written;
  now.read_seconds = seconds.read;
  now.update_seconds = seconds.update;
  now.write_seconds = seconds.write;
  now.wait_seconds = seconds.wait;
  now.elapsed_seconds = seconds.elapsed;
  now.host_memory = host_memory;
  now.host_bytes_peak = pool->peak_in_use() * plan.tile_bytes +
                        (scratch != nullptr ? scratch_bytes : 0);
  const TileLanes::Visits visits = lanes->visits();
  now.tile_visits = visits.all;
  now.tile_hits = visits.hits;
  for (const auto& tile : tiles) {
    now.state_bytes += tile->bytes;
    if (tile->resident) now.resident_bytes += tile->bytes;
  }
  now.tiles = tiles.size();
  now.tile_bytes = plan.tile_bytes;
  now.buffers = plan.buffers;
  return now;
}

OptimizerOffload::OptimizerOffload(const OptimizerOffloadOptions& options)
    : impl_(std::make_unique<Impl>(options)) {}

OptimizerOffload::~OptimizerOffload() {
  if (impl_->owner != process_id()) {
    // Threads, buffers and requests belong to the parent.
    static_cast<void>(impl_.release());
    return;
  }
  try {
    close();
  } catch (...) {
    // A destructor has nobody to tell; close() does.
  }
}

std::size_t OptimizerOffload::add_parameter(std::uint64_t elements,
                                            const StateFields& fields) {
  const auto lock = impl_->enter();
  constexpr std::uint64_t kMost = std::uint64_t{1} << 48;
  std::uint64_t bytes = 0;
  for (const std::uint32_t field : fields.bytes_per_cut) bytes += field;
  if (bytes == 0 || bytes > 64 * StateFields::kCut || elements > kMost) {
    throw std::invalid_argument("optimizer: a parameter of " +
                                std::to_string(elements) + " elements with " +
                                std::to_string(bytes) + " bytes for " +
                                std::to_string(StateFields::kCut));
  }
  impl_->parameters.push_back({.elements = elements, .fields = fields});
  return impl_->parameters.size() - 1;
}

void OptimizerOffload::step(std::span<const std::size_t> active,
                            UpdateKernel& kernel) {
  const auto lock = impl_->enter();
  impl_->refuse_if_failed();
  impl_->activate(active);
  impl_->place(active);
  for (const std::size_t number : active) ++impl_->parameters[number].step;
  impl_->run({}, kernel);
  ++impl_->steps;
}

void OptimizerOffload::add_state(std::span<const std::size_t> parameters) {
  const auto lock = impl_->enter();
  impl_->refuse_if_failed();
  impl_->activate(parameters);
  impl_->place(parameters);
}

void OptimizerOffload::read_state(UpdateKernel& kernel) {
  const auto lock = impl_->enter();
  impl_->refuse_if_failed();
  for (Parameter& p : impl_->parameters) p.active = p.has_state;
  impl_->run({.tiles = {}, .read = true, .write = false, .repeat = false},
             kernel);
}

void OptimizerOffload::write_state(std::span<const ParameterStep> parameters,
                                   UpdateKernel& kernel) {
  const auto lock = impl_->enter();
  std::vector<std::size_t> numbers;
  for (const ParameterStep& given : parameters) {
    numbers.push_back(given.parameter);
  }
  impl_->activate(numbers);
  impl_->lanes->clear();
  impl_->tiles.clear();
  for (Parameter& p : impl_->parameters) {
    p.has_state = false;
    p.step = 0;
  }
  impl_->refusal = nullptr;
  try {
    impl_->place(numbers);
  } catch (...) {
    impl_->refusal = with_remedy(std::current_exception());
    throw;
  }
  for (const ParameterStep& given : parameters) {
    impl_->parameters[given.parameter].step = given.step;
  }
  impl_->run({.tiles = {}, .read = false, .write = true, .repeat = false},
             kernel);
}

bool OptimizerOffload::has_state(std::size_t parameter) const {
  const auto lock = impl_->enter(/*when_closed=*/true);
  return impl_->parameter(parameter).has_state;
}

std::uint64_t OptimizerOffload::step_of(std::size_t parameter) const {
  const auto lock = impl_->enter(/*when_closed=*/true);
  return impl_->parameter(parameter).step;
}

std::span<std::byte> OptimizerOffload::scratch() {
  impl_->check_process();
  if (impl_->scratch_bytes == 0) return {};
  if (impl_->scratch == nullptr) {
    impl_->scratch = std::make_unique<BufferPool>(impl_->scratch_bytes, 1);
  }
  return impl_->scratch->memory();
}

void OptimizerOffload::pin_scratch(const std::shared_ptr<Device>& device) {
  const auto lock = impl_->enter();
  if (!scratch().empty()) impl_->pin(*impl_->scratch, device);
}

void OptimizerOffload::pin_tiles(const std::shared_ptr<Device>& device) {
  const auto lock = impl_->enter();
  impl_->pin(*impl_->pool, device);
}

OptimizerPlan OptimizerOffload::plan(
    std::span<const std::size_t> parameters) const {
  const auto lock = impl_->enter(/*when_closed=*/true);
  TileList tiles;
  TileLayout layout(tiles, impl_->plan.tile_bytes);
  OptimizerPlan plan;
  for (const std::size_t number : parameters) {
    const Parameter& p = impl_->parameter(number);
    layout.add(number, p.elements, p.fields);
  }
  const std::size_t count = tiles.size();
  plan.host_memory = impl_->host_memory;
  plan.scratch_bytes = impl_->scratch_bytes;
  plan.tile_bytes = impl_->plan.tile_bytes;
  plan.tiles = count;
  plan.resident_tiles = impl_->plan.resident(count);
  plan.lane_buffers = plan.resident_tiles == count ? 0 : impl_->plan.lanes;
  const std::uint64_t granule = impl_->granule;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint64_t bytes = tiles[i]->bytes;
    plan.state_bytes += bytes;
    if (is_chosen(i, count, plan.resident_tiles)) {
      plan.resident_bytes += bytes;
    } else {
      plan.step_bytes += 2 * align_up(bytes, granule);
    }
  }
  plan.host_memory_for_all =
      impl_->scratch_bytes + count * impl_->plan.tile_bytes;
  return plan;
}

OptimizerOffloadStats OptimizerOffload::stats() const {
  const auto lock = impl_->enter(/*when_closed=*/true);
  return impl_->closed ? impl_->last_stats : impl_->snapshot();
}

std::vector<LaneEvent> OptimizerOffload::timeline() const {
  const auto lock = impl_->enter(/*when_closed=*/true);
  return impl_->closed ? impl_->last_timeline : impl_->lanes->timeline();
}

const std::vector<std::string>& OptimizerOffload::notes() const noexcept {
  return impl_->notes;
}

const std::string& OptimizerOffload::engine() const noexcept {
  return impl_->engine;
}

void OptimizerOffload::close() {
  const auto lock = impl_->enter(/*when_closed=*/true);
  if (impl_->closed) return;
  impl_->closed = true;
  const std::exception_ptr error = impl_->lanes->clear();
  impl_->last_stats = impl_->snapshot();
  impl_->last_timeline = impl_->lanes->timeline();
  impl_->lanes.reset();
  impl_->tiles.clear();
  impl_->store.reset();
  impl_->pool.reset();
  impl_->scratch.reset();
  if (error != nullptr && impl_->refusal == nullptr) {
    std::rethrow_exception(error);
  }
}

}  // namespace torch_ext
