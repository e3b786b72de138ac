#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace torch_ext::test {

/// A sanitizer finds no more in more of the same: the short form makes fewer.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

/// Whether the long form was asked for: TORCH_EXT_TEST_FAULTS=all.
inline bool all_faults() {
  const char* wanted = std::getenv("TORCH_EXT_TEST_FAULTS");
  return wanted != nullptr && std::strcmp(wanted, "all") == 0;
}

/// Counts of what came of trials. Threads: any.
class Tally {
 public:
  void add(const std::string& trial, std::size_t errors,
           const std::string& wrong) {
    std::lock_guard lock(mutex_);
    ++trials_;
    ++(errors > 0 ? reported_ : survived_);
    if (!wrong.empty()) broken_.push_back(trial + ": " + wrong);
  }

  std::size_t trials() const { return trials_; }
  /// Trials that broke a promise.
  const std::vector<std::string>& broken() const { return broken_; }
  std::string text(const std::string& what = "faults") const {
    return std::to_string(trials_) + " " + what + ": " +
           std::to_string(survived_) + " survived, " +
           std::to_string(reported_) + " reported, " +
           std::to_string(broken_.size()) + " broke a promise";
  }

 private:
  std::mutex mutex_;
  std::size_t trials_ = 0;
  std::size_t survived_ = 0;
  std::size_t reported_ = 0;
  std::vector<std::string> broken_;
};

/// Runs jobs on `threads` threads, since most of them wait. One that takes
/// longer than its limit hangs: the process is ended with its name, for its
/// memory may still be written to.
class Jobs {
 public:
  /// `step` makes the job's next trial and returns whether there is another.
  void add(std::string name, std::function<bool()> step) {
    jobs_.push_back({std::move(name), std::move(step)});
  }

  /// Runs them in this thread: a sanitizer's runtime survives a fork only in a
  /// process that has no other. Nobody looks for one that hangs.
  void run_here() {
    for (const Job& job : jobs_) {
      while (job.step()) {
      }
    }
  }

  void run(std::size_t threads,
           std::chrono::seconds limit = std::chrono::minutes(2)) {
    std::vector<Running> running(std::min(threads, jobs_.size()));
    std::vector<std::thread> workers;
    busy_ = running.size();
    for (Running& mine : running) {
      workers.emplace_back([this, &mine] { work(mine); });
    }
    std::unique_lock lock(mutex_);
    while (busy_ > 0) {
      idle_.wait_for(lock, std::chrono::seconds(1));
      for (const Running& mine : running) {
        if (Clock::now() - mine.since < limit) continue;
        if (mine.job == nullptr) continue;
        std::fprintf(stderr, "HANG: %s\n", mine.job->name.c_str());
        std::_Exit(1);
      }
    }
    lock.unlock();
    for (std::thread& worker : workers) worker.join();
  }

 private:
  using Clock = std::chrono::steady_clock;
  struct Job {
    std::string name;
    std::function<bool()> step;
  };
  struct Running {
    Job* job = nullptr;
    Clock::time_point since = Clock::now();
  };

  Job* begin(Running& mine, bool again) {
    std::lock_guard lock(mutex_);
    if (!again) {
      mine.job = next_ < jobs_.size() ? &jobs_[next_++] : nullptr;
      if (mine.job == nullptr && --busy_ == 0) idle_.notify_all();
    }
    mine.since = Clock::now();
    return mine.job;
  }

  void work(Running& mine) {
    bool again = false;
    while (Job* job = begin(mine, again)) again = job->step();
  }

  std::vector<Job> jobs_;
  std::mutex mutex_;
  std::condition_variable idle_;
  std::size_t next_ = 0;
  std::size_t busy_ = 0;
};

}  // namespace torch_ext::test
