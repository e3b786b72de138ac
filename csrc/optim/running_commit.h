#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/owner_process.h"
#include "store/commit_log.h"
#include "tile.h"
#include "torch_ext/io/ticket.h"
#include "torch_ext/optim/optimizer_offload.h"
#include "torch_ext/optim/update_kernel.h"

namespace torch_ext {

/// What a ticket shares with the commit. Threads: any.
struct CommitTicket::State {
  const OwnerProcess owner{"commit"};
  std::uint64_t generation = 0;
  TicketSource copied;
  TicketSource ended;
  CommitReport report;  ///< Once it has ended well.
  /// Somebody has got the error that it ended with.
  std::atomic<bool> error_seen = false;
};

/// Values in tiles of their own.
struct ValueLayout {
  std::vector<CommittedValue> values;
  TileList tiles;
};

/// A commit that is being made: what it was asked for, and how far it is.
struct RunningCommit {
  std::uint64_t step = 0;
  std::string document;
  std::size_t keep = 1;
  CommitGroup group;
  CommitLog::Vote vote;  ///< The group's, while the commit is made.
  /// What lay_out_values() has replaced, until there is room for the new.
  std::optional<ValueLayout> replaced;
  UpdateKernel* reader = nullptr;
  std::unique_ptr<UpdateKernel> own_reader;  ///< start_commit() has one.

  std::shared_ptr<CommitTicket::State> state =
      std::make_shared<CommitTicket::State>();
  /// Ends when the tiles are the calls' again.
  TicketSource written = {};
};

/// Returns what `call` returns. If it fails before it has voted, this does.
template <typename Call>
auto voted(const GroupVote& of_group, Call call) {
  bool has_voted = false;
  CommitLog::Vote vote;
  if (of_group) {
    vote = [&] {
      has_voted = true;
      return of_group(nullptr);
    };
  }
  try {
    return call(vote);
  } catch (...) {
    // The others wait for this process's vote.
    if (of_group && !has_voted) {
      try {
        of_group(std::current_exception());
      } catch (...) {
        // The first error says more.
      }
    }
    throw;
  }
}

}  // namespace torch_ext
