#pragma once

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "base/cut_point.h"
#include "support/commit_training.h"
#include "torch_ext/base/error.h"

namespace torch_ext::test {

/// Where a child is killed: when it passes `point` for the `pass`-th time. With
/// no point, after so much time.
struct Kill {
  std::string_view point = {};
  int pass = 1;
  std::chrono::microseconds time = {};
};

/// A torn root is what a kill cannot make: the test writes it.
inline constexpr std::string_view kTornRoot = "torn root";

/// The points of every commit.
inline constexpr std::array<std::string_view, 9> kPointsOfEachCommit = {
    "write issued",  "write ended",   "copy written",
    "table written", "table flushed", kTornRoot,
    "root written",  "root flushed",  "committed"};
/// Those of the first commit alone, and the test's own, when it has told.
inline constexpr std::array<std::string_view, 5> kPointsOfTheFirst = {
    "space reserved", "header written", "linked", "named", "acknowledged"};

/// Those of a rollback.
inline constexpr std::array<std::string_view, 3> kPointsOfARollback = {
    "state given up", "commit taken", "rolled back"};

/// Points for a training that goes back now and then.
inline std::vector<Kill> plan_rollback_kills(std::size_t round,
                                             std::mt19937_64& random) {
  std::vector<Kill> plan;
  for (const std::string_view name : kPointsOfARollback) {
    plan.push_back({name, static_cast<int>(1 + random() % 3)});
  }
  // What comes after one writes where others were.
  const auto& each = kPointsOfEachCommit;
  plan.push_back({each[round % each.size()], 4});
  plan.push_back({"write ended", static_cast<int>(60 + random() % 300)});
  return plan;
}

/// Points for the training of one directory: first one of the first commit,
/// then some of each commit, then a moment.
inline std::vector<Kill> plan_kills(std::size_t round, std::size_t drives,
                                    std::mt19937_64& random) {
  const std::string_view first =
      kPointsOfTheFirst[round % kPointsOfTheFirst.size()];
  const bool of_each_drive = first == "linked" || first == "named";
  const bool of_the_last = of_each_drive && drives == 2 && round / 10 % 2 == 1;
  std::vector<Kill> plan = {{first, of_the_last ? 2 : 1}};
  constexpr std::size_t kSome = 4;
  for (std::size_t i = 0; i < kSome; ++i) {
    const std::string_view name =
        kPointsOfEachCommit[(round * kSome + i) % kPointsOfEachCommit.size()];
    const bool often = name.starts_with("write");
    plan.push_back({name, static_cast<int>(1 + random() % (often ? 100 : 4))});
  }
  plan.push_back({.time = std::chrono::microseconds(random() % 30'000)});
  return plan;
}

/// A training that is killed time and again. Each time, the last commit that
/// was acknowledged must be found, or the one that was being made. Its bytes
/// must be those of a training in memory, and training must go on.
class CommitVictim {
 public:
  CommitVictim(const std::vector<std::filesystem::path>& directories,
               int buffers, std::size_t keep, std::string engine)
      : options_(
            CommitTraining::options(directories, buffers, std::move(engine))),
        keep_(keep) {}

  /// It goes back to a commit that is kept, after some of its commits.
  bool rolls_back = false;
  /// What happens just before the kill, in the child or in this process.
  std::function<void()> cut;
  /// What happens after it.
  std::function<void()> restart;

  /// Kills one child and looks at what it has left. Returns what is wrong.
  std::string suffer(const Kill& kill) {
    if (std::string wrong = run_child(kill); !wrong.empty()) return wrong;
    if (restart) restart();
    if (acknowledged_ == 0 && !is_named(0)) return begin_anew();
    std::unique_ptr<CommitTraining> training;
    try {
      training = CommitTraining::resume(options_);
    } catch (const std::exception& error) {
      return std::string("resume: ") + error.what();
    }
    const std::uint64_t found = training->generation();
    if (found != acknowledged_ && found != begun_) {
      return "commit " + std::to_string(found) + " was found, not " +
             std::to_string(acknowledged_) + " or " + std::to_string(begun_);
    }
    if (found != acknowledged_) ++being_made_;
    if (std::string wrong = training->wrong(); !wrong.empty()) return wrong;
    training->step();
    training->commit(keep_);
    training->step();
    if (std::string wrong = training->wrong(); !wrong.empty()) {
      return "afterwards: " + wrong;
    }
    acknowledged_ = begun_ = training->generation();
    return "";
  }

  std::size_t acknowledged() const { return heard_; }
  std::size_t being_made() const { return being_made_; }
  /// How often a kill has left files of some drives only.
  std::size_t left_in_part() const { return left_in_part_; }

 private:
  /// What a child says of a commit.
  struct Message {
    enum Kind : std::uint32_t { kBegins, kIsCommitted } kind;
    std::uint32_t generation;
  };
  /// What the hook of a child knows. It is called on I/O threads too.
  struct Wanted {
    std::string_view point;
    std::atomic<int> passes_left;
    int root_file = -1;
    std::function<void()> cut;
  };
  static Wanted& wanted() {
    static Wanted only;
    return only;
  }

  std::size_t drives() const { return options_.store.directory.all().size(); }
  std::filesystem::path file(std::size_t drive) const {
    return options_.store.directory.all()[drive].path /
           StoreName().of_file(drive);
  }
  bool is_named(std::size_t drive) const {
    return std::filesystem::exists(file(drive));
  }

  /// A first commit that was not acknowledged has left nothing; of several
  /// drives, some may have a file, which the next run names and does not
  /// replace.
  std::string begin_anew() {
    bool any = false;
    for (std::size_t i = 1; i < drives(); ++i) any = any || is_named(i);
    CommitTraining training(options_);
    training.step();
    if (any) {
      ++left_in_part_;
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
      for (std::size_t i = 1; i < drives(); ++i) {
        std::filesystem::remove(file(i));
      }
    }
    training.commit(keep_);
    acknowledged_ = begun_ = training.generation();
    return training.wrong();
  }

  /// Half of a root, where the next root will be written.
  static void tear_next_root(int file) {
    const auto generation_at = [file](off_t at) {
      std::uint64_t generation = 0;
      return pread(file, &generation, 8, at + 32) == 8 ? generation : 0;
    };
    const std::array<off_t, 2> places = {64 << 10, 128 << 10};
    const bool first = generation_at(places[0]) < generation_at(places[1]);
    std::array<char, 2048> half;
    half.fill('t');
    std::memcpy(half.data(), "txROOT \n", 8);
    const auto written =
        pwrite(file, half.data(), half.size(), places[first ? 0 : 1]);
    if (written != static_cast<ssize_t>(half.size())) _exit(4);
  }

  static void kill_at(std::string_view name) {
    Wanted& how = wanted();
    const bool torn = how.point == kTornRoot;
    if (name != (torn ? "table flushed" : how.point)) return;
    if (--how.passes_left != 0) return;
    if (torn) tear_next_root(how.root_file);
    if (how.cut) how.cut();
    ::kill(getpid(), SIGKILL);
    while (true) pause();
  }

  /// Trains until it is killed, or 30 steps. Returns the exit status.
  int train(bool anew, int told) const {
    const auto tell = [told](Message::Kind kind, std::uint64_t generation) {
      const Message message{kind, static_cast<std::uint32_t>(generation)};
      return write(told, &message, sizeof(message)) == sizeof(message);
    };
    try {
      const auto training = anew ? std::make_unique<CommitTraining>(options_)
                                 : CommitTraining::resume(options_);
      on_cut_point = kill_at;
      for (int i = 0; i < 30; ++i) {
        training->step();
        if (i % 3 == 1) continue;  // Two steps between some commits.
        OptimizerOffload& offload = training->offload();
        if (!tell(Message::kBegins, offload.next_generation())) return 2;
        training->commit(keep_);
        if (!tell(Message::kIsCommitted, training->generation())) return 2;
        cut_point("acknowledged");
        if (!rolls_back || i % 4 != 0) continue;
        const auto kept = offload.commits();
        const auto which = static_cast<std::size_t>(i / 4) % kept.size();
        training->rollback(kept[which].generation);
      }
    } catch (const std::exception& error) {
      // Where the drive is cut off, this is what happens.
      if (!cut) std::fprintf(stderr, "child: %s\n", error.what());
      return kFailed;
    }
    return 0;
  }

  std::string run_child(const Kill& how) {
    const bool anew = !is_named(0);
    int ends[2];
    if (pipe(ends) != 0) return "pipe failed";
    const pid_t child = fork();
    if (child < 0) return "fork failed";
    if (child == 0) {
      close(ends[0]);
      wanted().point = how.point;
      wanted().passes_left = how.pass;
      wanted().cut = cut;
      if (how.point == kTornRoot) {
        wanted().root_file = open(file(0).c_str(), O_RDWR);
      }
      _exit(train(anew, ends[1]));
    }
    close(ends[1]);
    if (how.point.empty()) {
      std::this_thread::sleep_for(how.time);
      if (cut) cut();
      ::kill(child, SIGKILL);
    }
    Message message;
    while (read(ends[0], &message, sizeof(message)) == sizeof(message)) {
      begun_ = message.generation;
      if (message.kind != Message::kIsCommitted) continue;
      acknowledged_ = message.generation;
      ++heard_;
    }
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) return "";
    // A moment may come too late, and a child may hear of a cut.
    if (how.point.empty() && status == 0) return "";
    if (cut && WIFEXITED(status) && WEXITSTATUS(status) == kFailed) return "";
    return "the child ended by itself: status " + std::to_string(status);
  }

  static constexpr int kFailed = 3;

  const TileOptions options_;
  const std::size_t keep_;
  std::uint64_t acknowledged_ = 0;  ///< The last generation. 0: none.
  std::uint64_t begun_ = 0;
  std::size_t heard_ = 0;
  std::size_t being_made_ = 0;
  std::size_t left_in_part_ = 0;
};

}  // namespace torch_ext::test
