// The commit protocol, in every state that a crash can leave.
//
// This is a model of the protocol and not the code that runs it. A store has
// extents and two roots. A step writes each tile to a free extent if its
// present one is committed. A commit goes on so:
//
//   table -> flush -> root -> flush -> vote -> extents of the commit before are
//   free
//
// If the vote fails, each rank that wrote a root overwrites it with a
// tombstone, flushes, and waits for the others. A disk may keep any subset of
// what was written since its last flush, and may tear any of it. A crash stops
// all ranks. Each may be anywhere between two points at which they wait for
// each other.
//
// After each crash the ranks resume the newest generation that all have. It
// must be the last one that was acknowledged, or a newer one. Each tile of it
// must be whole, and all ranks must be at the same step.
//
// A mutant leaves one rule out. The model must then find states that are wrong,
// or it proves nothing.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <map>
#include <set>
#include <utility>
#include <vector>

namespace torch_ext {
namespace {

constexpr int kTiles = 2;
constexpr int kExtents = 2 * kTiles + 4;
constexpr int kNone = -1;  ///< No extent, or nothing written.
constexpr int kTorn = -2;

enum class Rule {
  kAll,  ///< Nothing is left out.
  kFirstFlush,
  kSecondFlush,
  kNeverInPlace,
  kOtherSlot,
  kReleaseAfterVote,
  kTombstone,
};

/// What a rank does. In the last three a commit fails: on another rank, here
/// before a root is written, or here because the root's flush fails.
enum class Act { kStep, kCommit, kFailsElsewhere, kNoSpace, kFlushFails };

/// Something that a rank has written. Its number is its place in `written_`.
struct Content {
  enum class Kind { kTile, kTable, kRoot, kTombstone };
  Kind kind = Kind::kTile;
  int generation = 0;
  int step = 0;
  /// A table's tiles, or a root's table: extents and contents.
  std::vector<std::pair<int, int>> refers = {};
};

/// Places are extents, and then the two roots.
constexpr int kRoots = kExtents;

class Disk {
 public:
  void write(int place, int content) { unsynced_[place].push_back(content); }
  void flush() {
    for (const auto& [place, contents] : unsynced_) {
      stable_[place] = contents.back();
    }
    unsynced_.clear();
  }

  /// Calls `see` with each content that a crash may leave. Places that were
  /// never written have none.
  void crash(const std::function<void(const std::map<int, int>&)>& see) const {
    std::map<int, int> left = stable_;
    crash(unsynced_.begin(), left, see);
  }

 private:
  using Unsynced = std::map<int, std::vector<int>>;

  void crash(Unsynced::const_iterator next, std::map<int, int>& left,
             const std::function<void(const std::map<int, int>&)>& see) const {
    if (next == unsynced_.end()) return see(left);
    const auto& [place, contents] = *next;
    const auto before = stable_.find(place);
    std::vector<int> choices = contents;
    choices.push_back(before == stable_.end() ? kNone : before->second);
    choices.push_back(kTorn);
    for (const int choice : choices) {
      left[place] = choice;
      crash(std::next(next), left, see);
    }
  }

  std::map<int, int> stable_;
  Unsynced unsynced_;
};

/// A commit that a rank finds after a crash.
struct Found {
  int generation = 0;
  int step = 0;
  bool whole = false;
  auto operator<=>(const Found&) const = default;
};

class Rank {
 public:
  /// What has happened up to a point at which ranks wait for each other.
  struct Segment {
    std::vector<Disk> disks;  ///< After each write and flush.
    bool is_vote = false;     ///< Else it is a wait, or the end.
    bool votes_for = false;
    int generation = 0;
  };

  Rank(const std::vector<Act>& script, Rule without) : without_(without) {
    current_.fill(kNone);
    content_.fill(kNone);
    note();
    for (const Act act : script) {
      act == Act::kStep ? step() : commit(act);
    }
  }

  const std::vector<Segment>& segments() const { return segments_; }

  std::vector<Found> find(const std::map<int, int>& left) const {
    const auto at = [&left](int place) {
      const auto found = left.find(place);
      return found == left.end() ? kNone : found->second;
    };
    std::vector<Found> all;
    for (const int slot : {kRoots, kRoots + 1}) {
      if (at(slot) < 0) continue;
      const Content& root = written_[static_cast<std::size_t>(at(slot))];
      if (root.kind != Content::Kind::kRoot) continue;
      const auto [place, number] = root.refers.front();
      if (at(place) != number) continue;
      const Content& table = written_[static_cast<std::size_t>(number)];
      const bool whole = std::all_of(
          table.refers.begin(), table.refers.end(),
          [&](const auto& tile) { return at(tile.first) == tile.second; });
      all.push_back({table.generation, table.step, whole});
    }
    std::sort(all.begin(), all.end());
    return all;
  }

 private:
  bool keeps(Rule rule) const { return rule != without_; }

  void note() { segments_.back().disks.push_back(disk_); }
  void write(int place, Content content) {
    written_.push_back(std::move(content));
    disk_.write(place, static_cast<int>(written_.size()) - 1);
  }
  void flush() {
    disk_.flush();
    note();
  }
  void meet(bool is_vote, bool votes_for) {
    segments_.back().is_vote = is_vote;
    segments_.back().votes_for = votes_for;
    segments_.back().generation = generation_;
    segments_.emplace_back();
  }

  bool is_used(int extent) const {
    return pinned_.contains(extent) || std::ranges::count(current_, extent) > 0;
  }
  int free_extent() const {
    int extent = 0;
    while (is_used(extent)) ++extent;
    EXPECT_LT(extent, kExtents);
    return extent;
  }

  void step() {
    ++step_;
    for (std::size_t i = 0; i < kTiles; ++i) {
      const bool pinned = pinned_.contains(current_[i]);
      if (current_[i] == kNone || (pinned && keeps(Rule::kNeverInPlace))) {
        current_[i] = free_extent();
      }
      write(current_[i], {.kind = Content::Kind::kTile, .step = step_});
      content_[i] = static_cast<int>(written_.size()) - 1;
      note();
    }
  }

  void commit(Act act) {
    ++generation_;
    if (act == Act::kNoSpace) {
      meet(/*is_vote=*/true, /*votes_for=*/false);
      if (keeps(Rule::kTombstone)) meet(/*is_vote=*/false, false);
      return;
    }
    const int place = free_extent();
    Content table{Content::Kind::kTable, generation_, step_};
    for (std::size_t i = 0; i < kTiles; ++i) {
      table.refers.emplace_back(current_[i], content_[i]);
    }
    write(place, table);
    note();
    const int number = static_cast<int>(written_.size()) - 1;
    if (keeps(Rule::kFirstFlush)) flush();
    const std::size_t slot = slot_to_write();
    write(kRoots + static_cast<int>(slot),
          {Content::Kind::kRoot, generation_, step_, {{place, number}}});
    in_slot_[slot] = generation_;
    note();
    const bool fails = act == Act::kFlushFails;
    if (!fails && keeps(Rule::kSecondFlush)) flush();
    std::set<int> pinned(current_.begin(), current_.end());
    pinned.insert(place);
    if (!keeps(Rule::kReleaseAfterVote)) {
      pinned_ = pinned;
      note();
      step();
    }
    meet(/*is_vote=*/true, /*votes_for=*/!fails);
    if (act == Act::kCommit) {
      committed_ = generation_;
      if (keeps(Rule::kReleaseAfterVote)) pinned_ = pinned;
      note();
    } else if (keeps(Rule::kTombstone)) {
      write(kRoots + static_cast<int>(slot),
            {Content::Kind::kTombstone, generation_, step_});
      in_slot_[slot] = kNone;
      note();
      if (!fails) flush();
      meet(/*is_vote=*/false, false);
    }
  }

  std::size_t slot_to_write() const {
    const bool first_has_it = in_slot_[0] == committed_;
    const bool second_has_it = in_slot_[1] == committed_;
    if (!keeps(Rule::kOtherSlot)) return second_has_it && !first_has_it ? 1 : 0;
    return first_has_it ? 1 : 0;
  }

  const Rule without_;
  Disk disk_;
  std::vector<Segment> segments_ = std::vector<Segment>(1);
  std::vector<Content> written_;
  std::array<int, kTiles> current_;  ///< The tiles' extents.
  std::array<int, kTiles> content_;
  std::array<int, 2> in_slot_ = {kNone, kNone};
  std::set<int> pinned_;  ///< Extents of the last commit.
  int committed_ = 0;
  int generation_ = 0;
  int step_ = 0;
};

struct Outcome {
  std::uint64_t states = 0;
  std::uint64_t lost = 0;
  std::uint64_t damaged = 0;
  std::uint64_t mixed = 0;
  std::uint64_t bad() const { return lost + damaged + mixed; }
};

/// How often a rank finds what, over all states of one disk.
using Finds = std::map<std::vector<Found>, std::uint64_t>;

void judge(const std::vector<const std::vector<Found>*>& ranks,
           std::uint64_t count, int acknowledged, Outcome& outcome) {
  outcome.states += count;
  int common = 0;
  for (const Found& candidate : *ranks.front()) {
    const auto has = [&candidate](const std::vector<Found>* rank) {
      return std::ranges::count(*rank, candidate.generation,
                                &Found::generation) > 0;
    };
    if (std::ranges::all_of(ranks, has)) {
      common = std::max(common, candidate.generation);
    }
  }
  if (common < acknowledged) {
    outcome.lost += count;
    return;
  }
  if (common == 0) return;
  std::set<int> steps;
  bool whole = true;
  for (const std::vector<Found>* rank : ranks) {
    const auto found = std::ranges::find(*rank, common, &Found::generation);
    steps.insert(found->step);
    whole = whole && found->whole;
  }
  if (!whole) {
    outcome.damaged += count;
  } else if (steps.size() > 1) {
    outcome.mixed += count;
  }
}

/// Takes one disk state of each rank, in every combination.
void combine(const std::vector<std::vector<Finds>>& of_ranks,
             std::vector<const std::vector<Found>*>& chosen,
             std::uint64_t count, int acknowledged, Outcome& outcome) {
  if (chosen.size() == of_ranks.size()) {
    return judge(chosen, count, acknowledged, outcome);
  }
  for (const Finds& disk : of_ranks[chosen.size()]) {
    for (const auto& [found, times] : disk) {
      chosen.push_back(&found);
      combine(of_ranks, chosen, count * times, acknowledged, outcome);
      chosen.pop_back();
    }
  }
}

Outcome crash_everywhere(const std::vector<std::vector<Act>>& scripts,
                         Rule without = Rule::kAll) {
  std::vector<Rank> ranks;
  for (const std::vector<Act>& script : scripts) {
    ranks.emplace_back(script, without);
  }
  Outcome outcome;
  int acknowledged = 0;
  std::vector<std::vector<Disk>> last(ranks.size());
  for (std::size_t k = 0; k < ranks.front().segments().size(); ++k) {
    std::vector<std::vector<Finds>> finds(ranks.size());
    bool all_agree = true;
    for (std::size_t r = 0; r < ranks.size(); ++r) {
      const Rank::Segment& segment = ranks[r].segments().at(k);
      all_agree = all_agree && segment.is_vote && segment.votes_for;
      // Others may go on before this rank has done anything.
      std::vector<Disk> disks = last[r];
      disks.insert(disks.end(), segment.disks.begin(), segment.disks.end());
      for (const Disk& disk : disks) {
        Finds& seen = finds[r].emplace_back();
        disk.crash([&](const std::map<int, int>& left) {
          ++seen[ranks[r].find(left)];
        });
      }
      if (!disks.empty()) last[r] = {disks.back()};
    }
    std::vector<const std::vector<Found>*> chosen;
    combine(finds, chosen, 1, acknowledged, outcome);
    if (all_agree) acknowledged = ranks.front().segments()[k].generation;
  }
  return outcome;
}

using enum Act;
const std::vector<Act> kTraining = {kStep,   kCommit, kStep,   kStep,
                                    kCommit, kStep,   kCommit, kStep};

/// A training whose second commit ends so.
std::vector<Act> second_commit(Act act) {
  return {kStep,   kCommit, kStep, act,     kStep,
          kCommit, kStep,   kStep, kCommit, kStep};
}

std::vector<std::vector<Act>> ranks(std::size_t count) {
  return std::vector<std::vector<Act>>(count, kTraining);
}

struct Case {
  std::vector<std::vector<Act>> scripts;
  std::uint64_t states;
};

TEST(CommitModelTest, NoCrashLosesDamagesOrMixesACommit) {
  for (const Case& each :
       {Case{ranks(1), 200}, Case{ranks(2), 13'362}, Case{ranks(3), 1'048'580},
        Case{ranks(4), 90'067'122}, Case{ranks(5), 8'128'838'300}}) {
    const Outcome outcome = crash_everywhere(each.scripts);
    EXPECT_EQ(outcome.states, each.states);
    EXPECT_EQ(outcome.bad(), 0u) << each.scripts.size() << " ranks";
  }
}

TEST(CommitModelTest, ACommitThatFailsOnOneRankIsThereOnNone) {
  const auto other = second_commit(kFailsElsewhere);
  const auto no_space = second_commit(kNoSpace);
  const auto flush = second_commit(kFlushFails);
  for (const Case& each :
       {Case{{other, no_space}, 15'985}, Case{{other, flush}, 20'776},
        Case{{other, other, flush}, 1'380'764}}) {
    const Outcome outcome = crash_everywhere(each.scripts);
    EXPECT_EQ(outcome.states, each.states);
    EXPECT_EQ(outcome.bad(), 0u) << each.scripts.size() << " ranks";
  }
}

// So a store refuses steps after a root whose flush failed, until a tombstone
// is durable.
TEST(CommitModelTest, TrainingMustNotGoOnAfterARootOfUnknownFate) {
  const Outcome outcome = crash_everywhere({second_commit(kFlushFails)});
  EXPECT_EQ(outcome.states, 371u);
  EXPECT_EQ(outcome.damaged, 18u);
}

TEST(CommitModelTest, WithoutOneOfItsRulesItLosesDamagesOrMixes) {
  const auto bad = [](Rule without) {
    return crash_everywhere(ranks(2), without).bad();
  };
  EXPECT_EQ(bad(Rule::kFirstFlush), 477u);
  EXPECT_EQ(bad(Rule::kSecondFlush), 81'912u);
  EXPECT_EQ(bad(Rule::kNeverInPlace), 11'183u);
  EXPECT_EQ(bad(Rule::kOtherSlot), 820u);
  EXPECT_EQ(bad(Rule::kReleaseAfterVote), 5'320u);
  const auto fails = {second_commit(kFailsElsewhere),
                      second_commit(kFlushFails)};
  EXPECT_EQ(crash_everywhere(fails, Rule::kTombstone).bad(), 468u);
}

}  // namespace
}  // namespace torch_ext
