// State of parameters in tiles, and the calls that work on it.
//
// Parameters have numbers. A parameter gets room when it first needs it.
// place() cuts its elements into segments and fills tiles with them
// (TileLayout). It chooses the tiles that stay in memory, and takes an extent
// for every other tile. A full drive refuses there, before anything has
// changed. Tiles never move afterwards; forget() leaves gaps, and drops tiles
// that become empty.
//
// A call that reads or changes state marks its parameters as active, and runs a
// round. TileLanes visits the tiles that have an active parameter. show() hands
// the segments of active parameters to the kernel.
//
// - step() reads and writes, and the next step is expected to visit the same
//   tiles.
// - read_state() reads only.
// - change_state() reads and writes too, but no step is expected to repeat it.
// - write_state() forgets everything first, and writes only.
//
// open_step.cpp has the step in which parameters become active one by one.
//
// If a round fails before it has changed anything, the counts are set back.
// After any other failure the state may be half updated: `refusal` holds the
// error, and every later call throws it until write_state() has succeeded.

#include "torch_ext/optim/optimizer_offload.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "base/error_detail.h"
#include "base/mutex.h"
#include "optimizer_impl.h"

namespace torch_ext {

std::exception_ptr with_remedy(const std::exception_ptr& error) {
  return with_detail(error,
                     "the optimizer state may be half updated: load it anew");
}

// Gives space to those of the parameters that have none: to all of them or to
// none.
void OptimizerOffload::Impl::place(std::span<const std::size_t> numbers) {
  const std::size_t before = tiles.size();
  std::vector<Tile*> evicted;
  std::vector<Tile*> on_drive;
  layout.clear();
  try {
    TileLayout filler(tiles, plan.tile_bytes);
    for (const std::size_t number : numbers) {
      const Parameter& p = parameter(number);
      if (!p.placed) filler.add(number, p.elements, p.fields);
    }
    const std::size_t count = tiles.size();
    const std::size_t stay = plan.resident(count);
    // Tiles that were chosen stay chosen, unless all could stay before and now
    // they cannot.
    const bool choose = before <= plan.buffers;
    std::uint64_t bytes = 0;
    std::size_t residents = 0;
    for (std::size_t i = 0; i < count; ++i) {
      Tile& tile = *tiles[i];
      const bool chosen = choose && is_chosen(i, count, stay);
      if (i >= before) {
        // There may be room for more where others have been forgotten.
        tile.resident = choose ? chosen : residents + (i - before) < stay;
        if (tile.resident) continue;
      } else if (tile.resident && choose && !chosen) {
        evicted.push_back(&tile);
      } else {
        if (tile.resident) ++residents;
        continue;
      }
      if (tile.extent != nullptr) continue;  // A commit has given it one.
      on_drive.push_back(&tile);
      bytes += align_up(tile.bytes, granule);
    }
    // Refuse what cannot be before it takes time.
    store->check_room(bytes);
    for (Tile* tile : on_drive) tile->extent = store->allocate(tile->bytes);
  } catch (...) {
    for (Tile* tile : on_drive) tile->extent.reset();
    tiles.resize(before);
    store->trim();
    throw;
  }
  for (Tile* tile : evicted) lanes->evict(*tile);
  for (const std::size_t number : numbers) parameters[number].placed = true;
  for (std::size_t i = before; i < tiles.size(); ++i) {
    Tile* tile = tiles[i].get();
    order.push_back(tile);
    for (const Segment& segment : tile->segments) {
      parameters[segment.parameter].tiles.push_back(tile);
    }
  }
}

// Forgets all state, wherever it is, and an error with it.
void OptimizerOffload::Impl::clear_tiles() {
  lanes->clear();
  order.clear();
  disown(tile_pointers(tiles));
  layout.clear();
  tiles.clear();
  for (Parameter& p : parameters) {
    p.placed = p.has_state = p.active = false;
    p.step = 0;
    p.tiles.clear();
  }
}

// Gives the parameters' space back. A tile that other parameters share keeps a
// gap.
void OptimizerOffload::Impl::forget(std::span<const std::size_t> numbers) {
  std::vector<Tile*> emptied;
  layout.clear();
  for (const std::size_t number : numbers) {
    Parameter& p = parameters[number];
    for (Tile* tile : p.tiles) {
      std::erase_if(tile->segments, [number](const Segment& segment) {
        return segment.parameter == number;
      });
      if (tile->segments.empty()) emptied.push_back(tile);
    }
    p.tiles.clear();
    p.placed = p.has_state = p.active = false;
    p.step = 0;
  }
  if (emptied.empty()) return;
  lanes->drop(emptied);
  const auto is_empty = [](const Tile& tile) { return tile.segments.empty(); };
  std::erase_if(order, [&](const Tile* tile) { return is_empty(*tile); });
  disown(emptied);
  std::erase_if(tiles, [&](const auto& tile) { return is_empty(*tile); });
  lanes->renumber(tiles);
}

OptimizerOffload::Impl::Counts OptimizerOffload::Impl::counts(
    std::span<const std::size_t> numbers) const {
  Counts counts;
  for (const std::size_t number : numbers) {
    counts.emplace_back(parameters[number].step, parameters[number].has_state);
  }
  return counts;
}

void OptimizerOffload::Impl::set_counts(std::span<const std::size_t> numbers,
                                        const Counts& counts) {
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    std::tie(parameters[numbers[i]].step, parameters[numbers[i]].has_state) =
        counts[i];
  }
}

// Lays out tiles for parameters, as if none had state yet.
TileList OptimizerOffload::Impl::lay_out(std::span<const std::size_t> numbers,
                                         std::uint64_t tile_bytes) {
  TileList list;
  TileLayout layout(list, tile_bytes);
  for (const std::size_t number : numbers) {
    const Parameter& p = parameter(number);
    layout.add(number, p.elements, p.fields);
  }
  return list;
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
  for (Tile* tile : order) {
    if (is_active(*tile)) round.tiles.push_back(tile);
  }
  if (round.tiles.empty()) return;
  try {
    lanes->run(std::move(round), [this, &kernel](Tile& tile, bool fresh) {
      show(tile, fresh, kernel);
    });
  } catch (...) {
    // After any other failure, all is as it was.
    if (const auto error = lanes->failure()) refusal = with_remedy(error);
    throw;
  }
}

void OptimizerOffload::Impl::show(const Tile& tile, bool fresh,
                                  UpdateKernel& kernel) {
  std::byte* const data = tile.buffer.data();
  // The whole buffer, since padding is written too.
  if (fresh) std::fill_n(data, tile.buffer.size(), std::byte{0});
  std::vector<StateSegment> segments;
  MutexLock lock(parameters_mutex);
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
  lock.unlock();
  kernel.update(segments);
}

void OptimizerOffload::Impl::pin(BufferPool& memory,
                                 const std::shared_ptr<Device>& device) {
  const std::string why_not = memory.pin(device);
  if (why_not.empty() || std::ranges::count(notes, why_not) > 0) return;
  notes.push_back(why_not);
}

/// The scratch of the kernels. Null if they want none.
BufferPool* OptimizerOffload::Impl::scratch_pool() {
  const MutexLock lock(parameters_mutex);
  if (scratch == nullptr && scratch_bytes > 0) {
    scratch = std::make_unique<BufferPool>(scratch_bytes, 1);
  }
  return scratch.get();
}

OptimizerOffloadStats OptimizerOffload::Impl::snapshot() {
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
  now.host_bytes_peak = pool->peak_in_use() * plan.tile_bytes;
  {
    const MutexLock lock(parameters_mutex);
    if (scratch != nullptr) now.host_bytes_peak += scratch_bytes;
  }
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

OptimizerOffload::OptimizerOffload(const TileOptions& options)
    : impl_(std::make_unique<Impl>(options)) {}

OptimizerOffload::~OptimizerOffload() {
  impl_->owner.end(impl_, [this] { close(); });
}

namespace {

void check_definition(std::uint64_t elements, const StateFields& fields) {
  constexpr std::uint64_t kMost = std::uint64_t{1} << 48;
  std::uint64_t bytes = 0;
  for (const std::uint32_t field : fields.bytes_per_cut) bytes += field;
  if (bytes == 0 || bytes > 64 * StateFields::kCut || elements > kMost) {
    throw std::invalid_argument("optimizer: a parameter of " +
                                std::to_string(elements) + " elements with " +
                                std::to_string(bytes) + " bytes for " +
                                std::to_string(StateFields::kCut));
  }
}

}  // namespace

std::size_t OptimizerOffload::add_parameter(std::uint64_t elements,
                                            const StateFields& fields) {
  const Impl::Call call(*impl_, Impl::After::kNoCommit);
  check_definition(elements, fields);
  const MutexLock parameters_lock(impl_->parameters_mutex);
  Impl::Parameter parameter{.elements = elements, .fields = fields};
  if (!impl_->unused.empty()) {
    const std::size_t number = impl_->unused.back();
    impl_->unused.pop_back();
    impl_->parameters[number] = std::move(parameter);
    return number;
  }
  impl_->parameters.push_back(std::move(parameter));
  return impl_->parameters.size() - 1;
}

void OptimizerOffload::redefine_parameter(std::size_t parameter,
                                          std::uint64_t elements,
                                          const StateFields& fields) {
  check_definition(elements, fields);
  const Impl::Call call(*impl_);
  Impl::Parameter& p = impl_->parameter(parameter);
  if (p.placed || p.has_state || p.active) {
    impl_->refuse_in_step();
    impl_->forget({&parameter, 1});
  }
  const MutexLock parameters_lock(impl_->parameters_mutex);
  p.elements = elements;
  p.fields = fields;
}

void OptimizerOffload::remove_parameter(std::size_t parameter) {
  const std::vector<std::size_t> numbers{parameter};
  forget_state(numbers);
  const Impl::Call call(*impl_);
  if (std::ranges::count(impl_->unused, parameter) > 0) return;
  impl_->unused.push_back(parameter);
}

void OptimizerOffload::step(std::span<const std::size_t> active,
                            UpdateKernel& kernel) {
  const Impl::Call call(*impl_, Impl::After::kWritten);
  impl_->refuse_if_failed();
  impl_->refuse_in_step();
  impl_->activate(active);
  impl_->place(active);
  const Impl::Counts before = impl_->counts(active);
  for (const std::size_t number : active) {
    ++impl_->parameters[number].step;
    impl_->parameters[number].has_state = true;
  }
  try {
    impl_->run({}, kernel);
  } catch (...) {
    if (impl_->refusal == nullptr) impl_->set_counts(active, before);
    throw;
  }
  ++impl_->steps;
}

void OptimizerOffload::add_state(std::span<const std::size_t> parameters) {
  const Impl::Call call(*impl_);
  impl_->refuse_if_failed();
  impl_->refuse_in_step();
  impl_->activate(parameters);
  impl_->place(parameters);
  for (const std::size_t number : parameters) {
    impl_->parameters[number].has_state = true;
  }
}

void OptimizerOffload::make_room(std::span<const std::size_t> parameters) {
  const Impl::Call call(*impl_);
  impl_->refuse_if_failed();
  impl_->refuse_in_step();
  impl_->activate(parameters);
  impl_->place(parameters);
}

void OptimizerOffload::forget_state(std::span<const std::size_t> parameters) {
  const Impl::Call call(*impl_);
  for (const std::size_t number : parameters) impl_->parameter(number);
  impl_->refuse_in_step();
  impl_->forget(parameters);
}

void OptimizerOffload::change_state(std::span<const ParameterStep> parameters,
                                    UpdateKernel& kernel) {
  const Impl::Call call(*impl_);
  impl_->refuse_if_failed();
  impl_->refuse_in_step();
  std::vector<std::size_t> numbers;
  for (const ParameterStep& given : parameters) {
    numbers.push_back(given.parameter);
  }
  impl_->activate(numbers);
  impl_->place(numbers);
  const Impl::Counts before = impl_->counts(numbers);
  for (const ParameterStep& given : parameters) {
    impl_->parameters[given.parameter].step = given.step;
    impl_->parameters[given.parameter].has_state = true;
  }
  try {
    impl_->run({.tiles = {}, .read = true, .write = true, .repeat = false},
               kernel);
  } catch (...) {
    if (impl_->refusal == nullptr) impl_->set_counts(numbers, before);
    throw;
  }
}

void OptimizerOffload::read_state(UpdateKernel& kernel) {
  std::vector<std::size_t> all;
  {
    const Impl::Call call(*impl_, Impl::After::kNoCommit);
    for (std::size_t i = 0; i < impl_->parameters.size(); ++i) {
      if (impl_->parameters[i].has_state) all.push_back(i);
    }
  }
  read_state(all, kernel);
}

void OptimizerOffload::read_state(std::span<const std::size_t> parameters,
                                  UpdateKernel& kernel) {
  const Impl::Call call(*impl_, Impl::After::kWritten);
  impl_->refuse_if_failed();
  impl_->refuse_in_step();
  impl_->activate(parameters);
  impl_->run({.tiles = {}, .read = true, .write = false, .repeat = false},
             kernel);
}

void OptimizerOffload::write_state(std::span<const ParameterStep> parameters,
                                   UpdateKernel& kernel) {
  const Impl::Call call(*impl_);
  std::vector<std::size_t> numbers;
  for (const ParameterStep& given : parameters) {
    numbers.push_back(given.parameter);
  }
  for (const std::size_t number : numbers) impl_->parameter(number);
  if (impl_->log != nullptr && impl_->log->must_stop() != nullptr) {
    std::rethrow_exception(impl_->log->must_stop());
  }
  impl_->give_up_open_step();
  impl_->clear_tiles();
  impl_->activate(numbers);
  impl_->refusal = nullptr;
  try {
    impl_->place(numbers);
  } catch (...) {
    impl_->refusal = with_remedy(std::current_exception());
    throw;
  }
  for (const ParameterStep& given : parameters) {
    impl_->parameters[given.parameter].step = given.step;
    impl_->parameters[given.parameter].has_state = true;
  }
  impl_->run({.tiles = {}, .read = false, .write = true, .repeat = false},
             kernel);
}

bool OptimizerOffload::has_state(std::size_t parameter) const {
  const Impl::Call call(*impl_, Impl::After::kEvenClosed);
  return impl_->parameter(parameter).has_state;
}

std::uint64_t OptimizerOffload::step_of(std::size_t parameter) const {
  const Impl::Call call(*impl_, Impl::After::kEvenClosed);
  return impl_->parameter(parameter).step;
}

std::span<std::byte> OptimizerOffload::scratch() {
  impl_->owner.check();
  BufferPool* const pool = impl_->scratch_pool();
  return pool != nullptr ? pool->memory() : std::span<std::byte>();
}

void OptimizerOffload::pin_scratch(const std::shared_ptr<Device>& device) {
  const Impl::Call call(*impl_, Impl::After::kWritten);
  BufferPool* const pool = impl_->scratch_pool();
  if (pool != nullptr) impl_->pin(*pool, device);
}

void OptimizerOffload::pin_tiles(const std::shared_ptr<Device>& device) {
  const Impl::Call call(*impl_, Impl::After::kWritten);
  impl_->pin(*impl_->pool, device);
}

OptimizerPlan OptimizerOffload::plan(std::span<const std::size_t> parameters,
                                     const ScratchFor& scratch_for) const {
  const Impl::Call call(*impl_, Impl::After::kEvenClosed);
  OptimizerPlan plan =
      describe(impl_->plan, impl_->lay_out(parameters, impl_->plan.tile_bytes),
               impl_->host_memory, impl_->scratch_bytes, impl_->granule);
  plan.host_memory_for_all = budget_for_all(
      plan.state_bytes, impl_->granule, impl_->wanted_tile_bytes,
      [&](std::uint64_t budget) {
        return scratch_for ? scratch_for(budget) : impl_->scratch_bytes;
      },
      [&](std::uint64_t tile_bytes) REQUIRES(impl_->calls) {
        return impl_->lay_out(parameters, tile_bytes).size();
      });
  return plan;
}

OptimizerOffloadStats OptimizerOffload::stats() const {
  const Impl::Call call(*impl_, Impl::After::kEvenClosed);
  return impl_->closed ? impl_->last_stats : impl_->snapshot();
}

std::vector<LaneEvent> OptimizerOffload::timeline() const {
  const Impl::Call call(*impl_, Impl::After::kEvenClosed);
  return impl_->closed ? impl_->last_timeline : impl_->lanes->timeline();
}

const std::vector<std::string>& OptimizerOffload::notes() const noexcept {
  return impl_->notes;
}

const std::string& OptimizerOffload::engine() const noexcept {
  return impl_->engine;
}

void OptimizerOffload::close() {
  const Impl::Call call(*impl_, Impl::After::kEvenClosed);
  if (impl_->closed) return;
  impl_->wait_for_commit(Impl::After::kCommit);
  impl_->closed = true;
  impl_->give_up_open_step();
  impl_->updater.reset();
  impl_->committer.reset();
  const std::exception_ptr error = impl_->lanes->clear();
  impl_->last_stats = impl_->snapshot();
  impl_->last_timeline = impl_->lanes->timeline();
  impl_->lanes.reset();
  impl_->order.clear();
  impl_->tiles.clear();
  impl_->value_tiles.clear();
  impl_->log.reset();
  impl_->store.reset();
  impl_->pool.reset();
  {
    const MutexLock scratch_lock(impl_->parameters_mutex);
    impl_->scratch.reset();
  }
  if (error != nullptr && impl_->refusal == nullptr) {
    std::rethrow_exception(error);
  }
  impl_->throw_unseen_error();
}

}  // namespace torch_ext
