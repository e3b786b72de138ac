// Steps in which parameters become active one by one, as gradients come during
// a backward pass.
//
// begin_step() starts a round of all tiles that have state, and has the
// Updater's thread visit them. release() counts in each tile of the parameter;
// a tile is released when all its parameters are. The thread updates a released
// tile as soon as it is in memory. end_step() releases the tiles that have some
// active parameters, leaves out those that have none, and waits for the thread.
// The order of the releases is the order of the next step's reads. Parameters
// without state come last, in a round of their own on the calling thread.

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "optimizer_impl.h"

namespace torch_ext {

void OptimizerOffload::Impl::release(std::size_t number) {
  Parameter& p = parameter(number);
  if (p.active) {
    throw std::invalid_argument("optimizer: parameter " +
                                std::to_string(number) +
                                " is released twice in a step");
  }
  {
    const MutexLock lock(parameters_mutex);
    p.active = true;
    if (p.placed) {
      ++p.step;
      p.has_state = true;
    }
  }
  if (!p.placed) {
    newcomers.push_back(number);
    return;
  }
  for (Tile* tile : p.tiles) {
    if (++tile->active_segments == tile->segments.size()) lanes->release(*tile);
  }
}

void OptimizerOffload::Impl::finish_open_step() {
  for (Tile* tile : order) {
    const std::size_t active = tile->active_segments;
    if (active > 0 && active < tile->segments.size()) lanes->release(*tile);
  }
  lanes->close_round();
  try {
    updated.get();
  } catch (...) {
    refusal = with_remedy(std::current_exception());
    throw;
  }
  // Tiles that were left out come last in the next step.
  std::vector<Tile*> next = lanes->order();
  for (Tile* tile : order) {
    if (!tile->visited) next.push_back(tile);
  }
  order = std::move(next);
  if (newcomers.empty()) return;
  const bool alone = order.empty();
  activate(newcomers);
  place(newcomers);
  for (const std::size_t number : newcomers) {
    ++parameters[number].step;
    parameters[number].has_state = true;
  }
  // If these are all that have state, the next step will be the same round.
  TileLanes::Round round;
  round.repeat = alone;
  try {
    run(std::move(round), *open_kernel);
  } catch (...) {
    // The other parameters have been updated, so the state is half updated.
    if (refusal == nullptr) refusal = with_remedy(std::current_exception());
    throw;
  }
}

void OptimizerOffload::Impl::give_up_open_step() {
  if (open_kernel == nullptr) return;
  const auto error = std::make_exception_ptr(
      StateError("optimizer: the step was given up before its end"));
  // An earlier failure is thrown by close().
  if (lanes->failure() == nullptr) refusal = with_remedy(error);
  lanes->abort(error);
  updated.wait();
  open_kernel = nullptr;
}

void OptimizerOffload::begin_step(UpdateKernel& kernel) {
  const Impl::Call call(*impl_, Impl::After::kWritten);
  impl_->refuse_if_failed();
  impl_->refuse_in_step();
  impl_->activate({});
  for (Tile* tile : impl_->order) tile->active_segments = 0;
  if (impl_->updater == nullptr) impl_->updater = std::make_unique<Updater>();
  impl_->newcomers.clear();
  TileLanes::Round round;
  round.tiles = impl_->order;
  round.open = true;
  impl_->lanes->begin(std::move(round));
  Updater::Job job([impl = impl_.get(), &lanes = *impl_->lanes, &kernel] {
    kernel.enter_thread();
    lanes.visit([impl, &kernel](Tile& tile, bool fresh) {
      impl->show(tile, fresh, kernel);
    });
  });
  impl_->updated = job.get_future();
  impl_->updater->start(std::move(job));
  impl_->open_kernel = &kernel;
}

void OptimizerOffload::release(std::size_t parameter) {
  const Impl::Call call(*impl_, Impl::After::kNoCommit);
  if (impl_->open_kernel == nullptr) {
    throw StateError("optimizer: no step has begun");
  }
  impl_->release(parameter);
}

void OptimizerOffload::end_step() {
  const Impl::Call call(*impl_, Impl::After::kWritten);
  if (impl_->open_kernel == nullptr) {
    throw StateError("optimizer: no step has begun");
  }
  try {
    impl_->finish_open_step();
  } catch (...) {
    impl_->open_kernel = nullptr;
    throw;
  }
  impl_->open_kernel = nullptr;
  ++impl_->steps;
}

void OptimizerOffload::abandon_step() {
  const Impl::Call call(*impl_, Impl::After::kEvenClosed);
  impl_->give_up_open_step();
}

}  // namespace torch_ext
