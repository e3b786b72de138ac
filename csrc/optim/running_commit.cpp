// How a commit is made, and what may go on beside it.
//
// The invariant: no write goes to an extent that a durable root refers to, or
// one that may become durable. From the end of phase 1 on, the extents that the
// tiles then have are the commit's. Nobody writes there again before phase 3
// has said whose they are.
//
// A commit has three phases:
//
// 1. The last step's writes end. Every tile gets a place and a spare. Values,
//    and resident tiles that have changed, are written.
// 2. CommitLog makes it durable: table, flush, root, flush.
// 3. If that went well, the places of commits that are dropped become spares of
//    their tiles. If not, the commit's own places are free. Tile writes that
//    were held begin.
//
// commit() goes through them on the calling thread, with the lock of the calls.
// start_commit() leaves them to the thread of `committer`, which never takes
// that lock: a step that holds it may wait for phase 3. So who may touch what
// is a matter of turns:
//
// - In phase 1, the commit alone touches the lanes, all tiles, the log and the
//   owners of extents, and reads the caller's values.
// - In phases 2 and 3, it alone touches the log, the owners and the tiles of
//   values. A tile's places are guarded by the lock of the lanes. Calls may
//   visit the tiles of state and add some. They may not take any away: the
//   commit knows them by address.
//
// Impl::Call keeps the turns. It waits for the end of the commit, unless the
// call says that less will do. After::kWritten is the end of phase 1, for calls
// that visit state. After::kNoCommit is for those that touch none of all that.
// Therefore a step never updates a parameter or a resident tile that the commit
// has not yet copied or written. And TileLanes holds the write of a tile that
// has no spare until phase 3.
//
// Nobody waits for ever: phase 1 finds all buffers free but those of resident
// tiles, since no call visits tiles meanwhile. Phases 2 and 3 need neither a
// buffer nor the lock of the calls.

#include "running_commit.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "optimizer_impl.h"

namespace torch_ext {

CommitTicket::CommitTicket(std::shared_ptr<State> state)
    : state_(std::move(state)) {}

bool CommitTicket::wait_for(std::chrono::nanoseconds timeout) const {
  state_->owner.check();
  return state_->ended.ticket().wait_for(timeout);
}

bool CommitTicket::wait_source_for(std::chrono::nanoseconds timeout) const {
  state_->owner.check();
  return state_->copied.ticket().wait_for(timeout);
}

TimeoutError CommitTicket::timed_out(std::chrono::nanoseconds timeout) {
  return TimeoutError(
      "the commit has not got so far within " +
      std::to_string(static_cast<double>(timeout.count()) / 1e9) +
      " s; it goes on");
}

void CommitTicket::wait_source(Timeout timeout) const {
  if (!wait_source_for(timeout.value_or(std::chrono::nanoseconds::max()))) {
    throw timed_out(*timeout);
  }
  if (const auto error = state_->copied.ticket().error()) {
    state_->error_seen = true;
    std::rethrow_exception(error);
  }
}

CommitReport CommitTicket::wait(Timeout timeout) const {
  if (!wait_for(timeout.value_or(std::chrono::nanoseconds::max()))) {
    throw timed_out(*timeout);
  }
  if (const auto error = state_->ended.ticket().error()) {
    state_->error_seen = true;
    std::rethrow_exception(error);
  }
  return state_->report;
}

std::uint64_t CommitTicket::generation() const { return state_->generation; }

bool CommitTicket::done() const {
  state_->owner.check();
  return state_->ended.ticket().done();
}

std::optional<CommitReport> CommitTicket::report() const {
  if (!done() || state_->ended.ticket().error() != nullptr) return {};
  return state_->report;
}

void OptimizerOffload::Impl::prepare_commit(
    RunningCommit& commit, std::span<const CommittedValue> wanted) {
  if (!store->verifies()) {
    throw StateError(
        "commit: this optimizer was made without checksums (verify=false), "
        "without which a commit could not be trusted");
  }
  if (commit.keep < 1) {
    throw std::invalid_argument("commit: keep must be at least 1, got 0");
  }
  if (log == nullptr) log = std::make_unique<CommitLog>(*store, name);
  log->check();  // Before values are written.
  commit.state->generation =
      std::max(log->next_generation(), commit.group.generation);
  lay_out_values(commit, wanted);
  try {
    // The next step changes what it says.
    commit.document = document_of(commit.document);
  } catch (...) {
    put_back_values(commit);
    throw;
  }
}

CommitReport OptimizerOffload::Impl::make_commit(RunningCommit& commit) {
  const auto start = std::chrono::steady_clock::now();
  const auto written = [this]() REQUIRES(calls) {
    return store->stats().bytes_written;
  };
  const auto last = [this]() REQUIRES(calls) {
    return log->commits().empty() ? 0 : log->commits().back().generation;
  };

  // Phase 1.
  const std::uint64_t tiles_before = [&]() REQUIRES(calls) {
    try {
      lanes->settle();  // Writes of the last step.
      const std::uint64_t before = written();
      make_room_for_commit(commit.keep, /*commits_now=*/true);
      return before;
    } catch (...) {
      put_back_values(commit);
      throw;
    }
  }();
  if (commit.replaced) disown(tile_pointers(commit.replaced->tiles));
  commit.replaced.reset();
  write_untouched();
  TileLanes::Round round;
  round.read = round.repeat = false;
  round.for_commit = true;
  try {
    visit_values(std::move(round), *commit.reader);
  } catch (...) {
    // If a read ahead has ended it, writes may have failed too. Those are this
    // commit's errors, and not the next one's.
    try {
      lanes->settle();
    } catch (...) {
    }
    throw;
  }
  commit.state->copied.finish();
  lanes->write_residents(tiles);
  lanes->settle();
  std::vector<Tile*> all = tile_pointers(tiles);
  for (const auto& tile : value_tiles) all.push_back(tile.get());
  std::vector<std::shared_ptr<Extent>> extents;
  for (const Tile* tile : all) extents.push_back(tile->extent);
  const std::uint64_t bytes_of_tiles = written() - tiles_before;
  lanes->begin_commit(all);
  commit.written.finish();

  // Phase 2. Steps may write tiles now, which are not counted.
  const std::uint64_t before = last();
  const std::uint64_t log_before = log->bytes_written();
  TileLanes::CommitEnd end{.most_spares = commit.keep};
  std::exception_ptr error;
  try {
    for (Commit& dropped :
         log->add(commit.step, std::move(commit.document), std::move(extents),
                  commit.keep, commit.group.generation, commit.vote)) {
      const std::vector<Tile*>& owners_of_it = owners[dropped.generation];
      for (std::size_t i = 0; i < owners_of_it.size(); ++i) {
        end.freed.emplace_back(owners_of_it[i], std::move(dropped.extents[i]));
      }
      owners.erase(dropped.generation);
    }
  } catch (...) {
    error = std::current_exception();
  }

  // Phase 3.
  end.made = last() != before;
  end.must_stop = log->must_stop();
  lanes->end_commit(all, std::move(end));
  if (last() != before) owners[last()] = std::move(all);
  if (error != nullptr) std::rethrow_exception(error);
  const std::chrono::duration<double> seconds =
      std::chrono::steady_clock::now() - start;
  return {.generation = last(),
          .step = commit.step,
          .time = log->commits().back().time,
          .bytes_written = bytes_of_tiles + log->bytes_written() - log_before,
          .seconds = seconds.count()};
}

// On the thread of `committer`.
void OptimizerOffload::Impl::run_commit(RunningCommit& commit) noexcept {
  // `commit` may go as soon as a call learns that it has ended.
  const std::shared_ptr<CommitTicket::State> state = commit.state;
  std::exception_ptr error;
  try {
    commit.reader->enter_thread();
    voted(commit.group.vote, [&](const CommitLog::Vote& vote) {
      commit.vote = vote;
      state->report = make_commit(commit);
    });
  } catch (...) {
    error = std::current_exception();
  }
  if (!state->copied.ticket().done()) state->copied.finish(error);
  if (!commit.written.ticket().done()) commit.written.finish();
  state->ended.finish(error);
}

void OptimizerOffload::Impl::wait_for_commit(After after) {
  if (running == nullptr) return;
  const Ticket ended = running->state->ended.ticket();
  if (after == After::kCommit) ended.wait_for(std::chrono::nanoseconds::max());
  if (after == After::kWritten) {
    running->written.ticket().wait_for(std::chrono::nanoseconds::max());
  }
  if (after > After::kWritten || !ended.done()) return;
  if (log->must_stop() != nullptr) refusal = log->must_stop();
  if (ended.error() != nullptr) failed_commit = running->state;
  // What it has read is let go of here, and not on its thread: Python may have
  // to be asked.
  running.reset();
}

void OptimizerOffload::Impl::throw_unseen_error() {
  const auto failed = std::exchange(failed_commit, nullptr);
  if (failed == nullptr || failed->error_seen.exchange(true)) return;
  std::rethrow_exception(failed->ended.ticket().error());
}

CommitReport OptimizerOffload::commit(std::uint64_t step, std::string document,
                                      std::span<const CommittedValue> values,
                                      UpdateKernel& reader, std::size_t keep,
                                      const CommitGroup& group) {
  RunningCommit commit{.step = step,
                       .document = std::move(document),
                       .keep = keep,
                       .group = group,
                       .vote = {},
                       .replaced = {},
                       .reader = &reader,
                       .own_reader = nullptr};
  return voted(group.vote, [&](const CommitLog::Vote& vote) {
    commit.vote = vote;
    const Impl::Call call(*impl_);
    impl_->refuse_if_failed();
    impl_->refuse_in_step();
    impl_->throw_unseen_error();
    impl_->prepare_commit(commit, values);
    try {
      return impl_->make_commit(commit);
    } catch (...) {
      if (impl_->log->must_stop()) impl_->refusal = impl_->log->must_stop();
      throw;
    }
  });
}

CommitTicket OptimizerOffload::start_commit(
    std::uint64_t step, std::string document,
    std::span<const CommittedValue> values,
    std::unique_ptr<UpdateKernel> reader, std::size_t keep,
    const CommitGroup& group) {
  return voted(group.vote, [&](const CommitLog::Vote&) {
    const Impl::Call call(*impl_);
    impl_->refuse_if_failed();
    impl_->refuse_in_step();
    impl_->throw_unseen_error();
    if (impl_->committer == nullptr) {
      impl_->committer = std::make_unique<Updater>("torch_ext flush");
    }
    auto commit = std::make_unique<RunningCommit>();
    commit->step = step;
    commit->document = std::move(document);
    commit->keep = keep;
    commit->group = group;
    commit->reader = reader.get();
    commit->own_reader = std::move(reader);
    impl_->prepare_commit(*commit, values);
    impl_->running = std::move(commit);
    impl_->committer->start(
        Updater::Job([impl = impl_.get(), &running = *impl_->running] {
          impl->run_commit(running);
        }));
    return CommitTicket(impl_->running->state);
  });
}

}  // namespace torch_ext
