// Two processes that commit together. One of them is killed at a named point,
// or both are, each at its own. Afterwards both have a commit in common: the
// last one that either has acknowledged, or the one that was being made.

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "base/cut_point.h"
#include "support/commit_training.h"
#include "support/commit_victim.h"
#include "support/temp_dir.h"
#include "support/trials.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

using test::CommitTraining;
using test::Kill;

constexpr std::size_t kRanks = 2;

/// The first three are the test's own, in the vote.
constexpr std::array<std::string_view, 12> kPoints = {
    "before the vote", "vote given",   "vote known",   "voted",
    "committed",       "root flushed", "root written", "table flushed",
    "table written",   "copy written", "write issued", "write ended"};
/// Those of a first commit alone.
constexpr std::array<std::string_view, 4> kFirstPoints = {
    "space reserved", "header written", "linked", "named"};

/// Where this process is killed.
Kill& planned() {
  static Kill only;
  return only;
}

std::atomic<int>& passes_left() {
  static std::atomic<int> only;
  return only;
}

void kill_at(std::string_view name) {
  if (name != planned().point || --passes_left() != 0) return;
  ::kill(getpid(), SIGKILL);
  while (true) pause();
}

/// The other process. Errors: StateError if it is gone.
class Peer {
 public:
  explicit Peer(int socket) : socket_(socket) {}

  void send(std::uint64_t value) const {
    const auto sent = ::send(socket_, &value, sizeof(value), MSG_NOSIGNAL);
    if (sent != sizeof(value)) throw StateError("the other is gone");
  }
  std::uint64_t receive() const {
    std::uint64_t value = 0;
    if (recv(socket_, &value, sizeof(value), MSG_WAITALL) != sizeof(value)) {
      throw StateError("the other is gone");
    }
    return value;
  }

 private:
  const int socket_;
};

/// What a process says of a commit.
struct Message {
  enum Kind : std::uint32_t { kBegins, kIsCommitted } kind;
  std::uint32_t generation;
};

/// The stores of both, which see kill after kill.
class Victims {
 public:
  Victims(int buffers, std::size_t keep) : keep_(keep) {
    for (std::size_t rank = 0; rank < kRanks; ++rank) {
      options_[rank] =
          CommitTraining::options({dir_.path()}, buffers, "threads");
      options_[rank].name = {.rank = static_cast<std::uint32_t>(rank),
                             .world = kRanks};
    }
  }

  /// Kills as planned (no point: not), and looks at what is left. Returns what
  /// is wrong.
  std::string suffer(const std::array<Kill, kRanks>& kills) {
    if (std::string wrong = run(kills); !wrong.empty()) return wrong;
    std::array<std::vector<std::uint64_t>, kRanks> roots;
    for (std::size_t rank = 0; rank < kRanks; ++rank) {
      if (!is_named(rank)) continue;
      for (const auto& kept : OptimizerOffload::find_commits(options_[rank])) {
        roots[rank].push_back(kept.back().generation);
      }
    }
    std::uint64_t common = 0;
    for (const std::uint64_t root : roots[0]) {
      if (std::ranges::count(roots[1], root) > 0) {
        common = std::max(common, root);
      }
    }
    if (common == 0 && acknowledged_ == 0) {
      // No first commit: whoever begins anew removes what is left.
      for (std::size_t rank = 0; rank < kRanks; ++rank) {
        std::filesystem::remove(file(rank));
      }
      return "";
    }
    if (common != acknowledged_ && common != begun_) {
      return "commit " + std::to_string(common) + " was found, not " +
             std::to_string(acknowledged_) + " or " + std::to_string(begun_);
    }
    if (common != acknowledged_) ++being_made_;
    if (roots[0].front() != roots[1].front()) ++given_up_;
    return go_on(common);
  }

  std::size_t being_made() const { return being_made_; }
  /// How often one had a commit that the other had not.
  std::size_t given_up() const { return given_up_; }

 private:
  std::filesystem::path file(std::size_t rank) const {
    return dir_.path() / options_[rank].name.of_file(0);
  }
  bool is_named(std::size_t rank) const {
    return std::filesystem::exists(file(rank));
  }

  std::string go_on(std::uint64_t common) {
    std::array<std::unique_ptr<CommitTraining>, kRanks> both;
    std::uint64_t next = 0;
    for (std::size_t rank = 0; rank < kRanks; ++rank) {
      both[rank] = CommitTraining::resume(options_[rank], {.newest = common});
      if (std::string wrong = both[rank]->wrong(); !wrong.empty()) return wrong;
      next = std::max(next, both[rank]->offload().next_generation());
    }
    if (both[0]->steps() != both[1]->steps()) return "their steps differ";
    for (const auto& training : both) {
      training->step();
      training->commit(keep_, {.generation = next,
                               .vote = [](const auto&) { return true; }});
      training->step();
      if (std::string wrong = training->wrong(); !wrong.empty()) {
        return "afterwards: " + wrong;
      }
    }
    acknowledged_ = begun_ = common_ = next;
    return "";
  }

  /// Trains until the process is killed, or the other one is. Returns the exit
  /// status.
  int train(std::size_t rank, const Peer& peer, int told) const {
    const auto tell = [told](Message::Kind kind, std::uint64_t generation) {
      const Message message{kind, static_cast<std::uint32_t>(generation)};
      return write(told, &message, sizeof(message)) == sizeof(message);
    };
    CommitGroup group;
    group.vote = [&](const std::exception_ptr& error) {
      cut_point("before the vote");
      peer.send(error == nullptr ? 1 : 0);
      cut_point("vote given");
      const bool all = peer.receive() == 1 && error == nullptr;
      cut_point("vote known");
      return all;
    };
    try {
      const auto training =
          common_ == 0
              ? std::make_unique<CommitTraining>(options_[rank])
              : CommitTraining::resume(options_[rank], {.newest = common_});
      on_cut_point = kill_at;
      for (int i = 0; i < 8; ++i) {
        training->step();
        if (i % 3 == 1) continue;  // Two steps between some commits.
        const std::uint64_t mine = training->offload().next_generation();
        peer.send(mine);
        group.generation = std::max(mine, peer.receive());
        if (!tell(Message::kBegins, group.generation)) return 2;
        training->commit(keep_, group);
        if (!tell(Message::kIsCommitted, group.generation)) return 2;
      }
    } catch (const StateError&) {
      return 0;  // The other was killed.
    } catch (const std::exception& error) {
      std::fprintf(stderr, "rank %zu: %s\n", rank, error.what());
      return 3;
    }
    return 0;
  }

  std::string run(const std::array<Kill, kRanks>& kills) {
    int between[kRanks];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, between) != 0) return "socketpair";
    std::array<pid_t, kRanks> children;
    std::array<int, kRanks> told;
    for (std::size_t rank = 0; rank < kRanks; ++rank) {
      int ends[2];
      if (pipe(ends) != 0) return "pipe failed";
      children[rank] = fork();
      if (children[rank] < 0) return "fork failed";
      if (children[rank] == 0) {
        alarm(100);  // If it hangs.
        close(ends[0]);
        close(between[1 - rank]);
        planned() = kills[rank];
        passes_left() = kills[rank].pass;
        _exit(train(rank, Peer(between[rank]), ends[1]));
      }
      close(ends[1]);
      told[rank] = ends[0];
      if (rank == 0) close(between[0]);
    }
    close(between[1]);
    std::string wrong;
    for (std::size_t rank = 0; rank < kRanks; ++rank) {
      Message message;
      while (read(told[rank], &message, sizeof(message)) == sizeof(message)) {
        const std::uint64_t generation = message.generation;
        begun_ = std::max(begun_, generation);
        if (message.kind == Message::kIsCommitted) {
          acknowledged_ = std::max(acknowledged_, generation);
        }
      }
      close(told[rank]);
      int status = 0;
      waitpid(children[rank], &status, 0);
      const bool was_killed =
          WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
      // A point may come too late.
      const bool ended = WIFEXITED(status) && WEXITSTATUS(status) == 0;
      if (!was_killed && !ended) {
        wrong = "rank " + std::to_string(rank) + " ended by itself: status " +
                std::to_string(status);
      }
    }
    return wrong;
  }

  const test::TempDir dir_;
  const std::size_t keep_;
  std::array<TileOptions, kRanks> options_;
  std::uint64_t acknowledged_ = 0;  ///< The last generation, of either.
  std::uint64_t begun_ = 0;
  std::uint64_t common_ = 0;  ///< What both go on from. 0: they begin.
  std::size_t being_made_ = 0;
  std::size_t given_up_ = 0;
};

TEST(CommitRankFaults, AKillLeavesTheSameCommitToAll) {
  std::mt19937_64 random(test::all_faults() ? std::random_device()() : 1);
  const std::size_t most = test::all_faults() ? 500 : test::kSanitized ? 6 : 30;
  constexpr std::array kBuffers = {3, 13, 10, 40};
  std::size_t kills = 0;
  std::size_t being_made = 0;
  std::size_t given_up = 0;
  for (std::size_t round = 0; kills < most; ++round) {
    Victims victims(kBuffers[round % kBuffers.size()], 1 + round % 2);
    for (std::size_t i = 0; i < 5; ++i) {
      const std::size_t which = round * 4 + i - 1;
      const std::string_view name =
          i == 0 ? kFirstPoints[round % kFirstPoints.size()]
                 : kPoints[which % kPoints.size()];
      const bool often = name.starts_with("write");
      const Kill at{
          name,
          i == 0 ? 1 : static_cast<int>(1 + random() % (often ? 100 : 4))};
      std::array<Kill, kRanks> plan;
      plan[random() % kRanks] = at;
      if (random() % 3 == 0) {
        // The other too, where it may be by then.
        Kill& other = plan[plan[0].point.empty() ? 0 : 1];
        other = {kPoints[random() % 6], at.pass};
      }
      ASSERT_EQ(victims.suffer(plan), "")
          << "round " << round << ", kills at '" << plan[0].point << "' ("
          << plan[0].pass << ") and '" << plan[1].point << "' (" << plan[1].pass
          << ")";
      ++kills;
    }
    being_made += victims.being_made();
    given_up += victims.given_up();
  }
  std::printf(
      "[  FAULTS  ] %zu times one of two processes or both were killed: %zu "
      "times the commit being made was found, %zu times it was given up\n",
      kills, being_made, given_up);
  RecordProperty("faults", static_cast<int>(kills));
  if (!test::kSanitized) {
    EXPECT_GT(being_made, 0u);
    EXPECT_GT(given_up, 0u);
  }
}

}  // namespace
}  // namespace torch_ext
