// Trainings with commits that are killed: at named points, and at random. What
// the next process finds is the last commit that was acknowledged, or the one
// that was being made. Its bytes are those of a training in memory.
//
// Each directory sees several kills. So later ones meet a store that earlier
// ones have left, and other slots, spares and numbers.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "base/cut_point.h"
#include "support/commit_training.h"
#include "support/temp_dir.h"
#include "support/trials.h"
#include "torch_ext/base/error.h"
#include "torch_ext/io/io_engine.h"

namespace torch_ext {
namespace {

using test::CommitTraining;

/// Where a child is killed: when it passes `point` for the `pass`-th time. With
/// no point, after a time that the parent draws.
struct Kill {
  std::string_view point = {};
  int pass = 1;
};

/// A torn root is what a kill cannot make: the test writes it.
constexpr std::string_view kTornRoot = "torn root";

/// Those of every commit.
constexpr std::array<std::string_view, 9> kOfEach = {
    "write issued",  "write ended",   "copy written",
    "table written", "table flushed", kTornRoot,
    "root written",  "root flushed",  "committed"};
/// Those of the first commit alone.
constexpr std::array<std::string_view, 4> kOfTheFirst = {
    "space reserved", "header written", "linked", "named"};

// What the child's hook knows. It is called on I/O threads too.
std::string_view wanted;
std::atomic<int> passes_left;
int root_file = -1;

/// Half of a root, where the next root will be written.
void tear_next_root() {
  const auto generation_at = [](off_t at) {
    std::uint64_t generation = 0;
    return pread(root_file, &generation, 8, at + 32) == 8 ? generation : 0;
  };
  const off_t places[] = {64 << 10, 128 << 10};
  const bool first = generation_at(places[0]) < generation_at(places[1]);
  std::array<char, 2048> half;
  half.fill('t');
  std::memcpy(half.data(), "txROOT \n", 8);
  const auto written =
      pwrite(root_file, half.data(), half.size(), places[first ? 0 : 1]);
  if (written != static_cast<ssize_t>(half.size())) _exit(4);
}

void kill_at(std::string_view name) {
  const bool torn = wanted == kTornRoot;
  if (name != (torn ? "table flushed" : wanted)) return;
  if (--passes_left != 0) return;
  if (torn) tear_next_root();
  kill(getpid(), SIGKILL);
  while (true) pause();
}

/// What a child says of the commit of a step.
struct Message {
  enum Kind : std::uint32_t { kBegins, kIsCommitted, kFailed } kind;
  std::uint32_t step;
};

/// Trains until it is killed, or 30 steps. Returns the exit status.
int train(const TileOptions& options, bool anew, std::size_t keep, int told) {
  const auto tell = [told](Message::Kind kind, std::uint64_t step) {
    const Message message{kind, static_cast<std::uint32_t>(step)};
    return write(told, &message, sizeof(message)) == sizeof(message);
  };
  try {
    const auto training = anew ? std::make_unique<CommitTraining>(options)
                               : CommitTraining::resume(options);
    on_cut_point = kill_at;
    for (int i = 0; i < 30; ++i) {
      training->step();
      if (i % 3 == 1) continue;  // Two steps between some commits.
      if (!tell(Message::kBegins, training->steps())) return 2;
      training->commit(keep);
      if (!tell(Message::kIsCommitted, training->steps())) return 2;
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "child: %s\n", error.what());
    tell(Message::kFailed, 0);
    return 3;
  }
  return 0;
}

/// A directory's training, killed time and again.
class Victim {
 public:
  Victim(std::size_t drives, int buffers, std::size_t keep, std::string engine)
      : dirs_(drives), keep_(keep) {
    std::vector<std::filesystem::path> paths;
    for (const test::TempDir& dir : dirs_) paths.push_back(dir.path());
    options_ = CommitTraining::options(paths, buffers, std::move(engine));
  }

  /// Kills one child and looks at what it has left. Returns what is wrong.
  std::string suffer(const Kill& kill, std::chrono::microseconds time) {
    if (std::string wrong = run_child(kill, time); !wrong.empty()) return wrong;
    if (acknowledged_ == 0 && !is_named(0)) return begin_anew();
    std::unique_ptr<CommitTraining> training;
    try {
      training = CommitTraining::resume(options_);
    } catch (const std::exception& error) {
      return std::string("resume: ") + error.what();
    }
    const std::uint64_t step = training->steps();
    if (step != acknowledged_ && step != begun_) {
      return "step " + std::to_string(step) + " was found, not " +
             std::to_string(acknowledged_) + " or " + std::to_string(begun_);
    }
    if (step != acknowledged_) ++being_made_;
    if (std::string wrong = training->wrong(); !wrong.empty()) return wrong;
    training->step();
    training->commit(keep_);
    training->step();
    if (std::string wrong = training->wrong(); !wrong.empty()) {
      return "afterwards: " + wrong;
    }
    acknowledged_ = begun_ = training->steps() - 1;
    return "";
  }

  std::size_t acknowledged() const { return heard_; }
  std::size_t being_made() const { return being_made_; }

 private:
  std::filesystem::path file(std::size_t drive) const {
    return dirs_[drive].path() / StoreName().of_file(drive);
  }
  bool is_named(std::size_t drive) const {
    return std::filesystem::exists(file(drive));
  }

  /// A first commit that was not acknowledged has left nothing; of several
  /// drives, some may have a file, which the next run names and does not
  /// replace.
  std::string begin_anew() {
    bool any = false;
    for (std::size_t i = 1; i < dirs_.size(); ++i) any = any || is_named(i);
    CommitTraining training(options_);
    training.step();
    if (any) {
      try {
        training.commit();
        return "a file that was left was replaced";
      } catch (const IoError& error) {
        if (error.error() != EEXIST ||
            error.failure().detail.find("while it made its first commit") ==
                std::string::npos) {
          return error.what();
        }
      }
      for (std::size_t i = 1; i < dirs_.size(); ++i) {
        std::filesystem::remove(file(i));
      }
    }
    training.commit(keep_);
    acknowledged_ = begun_ = training.steps();
    return training.wrong();
  }

  std::string run_child(const Kill& point, std::chrono::microseconds time) {
    const bool anew = !is_named(0);
    int ends[2];
    if (pipe(ends) != 0) return "pipe failed";
    const pid_t child = fork();
    if (child < 0) return "fork failed";
    if (child == 0) {
      close(ends[0]);
      wanted = point.point;
      passes_left = point.pass;
      if (point.point == kTornRoot) root_file = open(file(0).c_str(), O_RDWR);
      _exit(train(options_, anew, keep_, ends[1]));
    }
    close(ends[1]);
    if (point.point.empty()) {
      std::this_thread::sleep_for(time);
      ::kill(child, SIGKILL);
    }
    Message message;
    while (read(ends[0], &message, sizeof(message)) == sizeof(message)) {
      if (message.kind == Message::kFailed) break;
      begun_ = message.step;
      if (message.kind != Message::kIsCommitted) continue;
      acknowledged_ = message.step;
      ++heard_;
    }
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) return "";
    // A random moment may come too late.
    if (point.point.empty() && status == 0) return "";
    return "the child ended by itself: status " + std::to_string(status);
  }

  std::vector<test::TempDir> dirs_;
  const std::size_t keep_;
  TileOptions options_;
  std::uint64_t acknowledged_ = 0;
  std::uint64_t begun_ = 0;
  std::size_t heard_ = 0;
  std::size_t being_made_ = 0;
};

TEST(CommitKillFaults, AKillAtAnyPointLosesNoCommit) {
  std::mt19937_64 random(test::all_faults() ? std::random_device()() : 1);
  const std::size_t most = test::all_faults() ? 1000
                           : test::kSanitized ? 20
                                              : 54;
  std::vector<std::string> engines;
  for (const char* name : {"threads", "libaio", "io_uring"}) {
    if (engine_unavailable_reason(name).empty()) engines.emplace_back(name);
  }
  constexpr std::array kBuffers = {3, 13, 10, 40};
  std::size_t kills = 0;
  std::size_t acknowledged = 0;
  std::size_t being_made = 0;
  std::size_t next_point = 0;
  for (std::size_t round = 0; kills < most; ++round) {
    const std::size_t drives = 1 + round % 2;
    Victim victim(drives, kBuffers[round / 2 % kBuffers.size()],
                  1 + round / 3 % 2, engines[round % engines.size()]);
    // First a point of the first commit, then those of each, then a moment.
    std::vector<Kill> plan;
    const std::string_view first = kOfTheFirst[round % kOfTheFirst.size()];
    const bool of_each_drive = first == "linked" || first == "named";
    plan.push_back({first, of_each_drive && drives == 2
                               ? static_cast<int>(1 + round / 4 % 2)
                               : 1});
    for (int i = 0; i < 4; ++i) {
      const std::string_view name = kOfEach[next_point++ % kOfEach.size()];
      const bool often = name.starts_with("write");
      plan.push_back(
          {name, static_cast<int>(1 + random() % (often ? 100 : 4))});
    }
    plan.push_back({});
    for (const Kill& kill : plan) {
      const std::chrono::microseconds time(random() % 30'000);
      ASSERT_EQ(victim.suffer(kill, time), "")
          << "round " << round << ", kill at '" << kill.point << "', pass "
          << kill.pass << ", or after " << time.count() << " us";
      ++kills;
    }
    acknowledged += victim.acknowledged();
    being_made += victim.being_made();
  }
  std::printf(
      "[  FAULTS  ] %zu kills, %zu commits acknowledged, %zu times the one "
      "being made was found\n",
      kills, acknowledged, being_made);
  EXPECT_GT(acknowledged, kills / 2);
  EXPECT_GT(being_made, 0u);
}

}  // namespace
}  // namespace torch_ext
