#pragma once

#include <future>
#include <thread>
#include <utility>

#include "base/mutex.h"
#include "base/thread.h"

namespace torch_ext {

/// A thread that does one job at a time. Threads: one starts jobs and waits.
class Updater {
 public:
  using Job = std::packaged_task<void()>;

  /// `name` is the thread's: see start_thread().
  explicit Updater(const char* name = "torch_ext step")
      : thread_(start_thread(name, [this] { run(); })) {}
  ~Updater() {
    start({});
    thread_.join();
  }

  /// Starts a job. An empty one ends the thread. REQUIRES: the last job has
  /// ended.
  void start(Job job) {
    const MutexLock lock(mutex_);
    job_ = std::move(job);
    given_ = true;
    changed_.notify_one();
  }

 private:
  Job next() {
    MutexLock lock(mutex_);
    while (!given_) changed_.wait(lock);
    given_ = false;
    return std::move(job_);
  }

  void run() {
    for (Job job = next(); job.valid(); job = next()) job();
  }

  Mutex mutex_;
  CondVar changed_;
  Job job_ GUARDED_BY(mutex_);
  bool given_ GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace torch_ext
