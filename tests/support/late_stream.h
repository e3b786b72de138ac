#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

namespace torch_ext::test {

class LateStream;

/// What the streams of one simulated machine share.
struct LateClock {
  /// No stream starts another copy while held.
  inline void hold_copies(bool hold);

  std::mutex mutex;
  std::condition_variable changed;   ///< For hosts that wait.
  std::vector<LateStream*> streams;  ///< All there are.
  bool copies_held = false;
};

/// A point in a stream's work. Fields: under the clock's mutex.
struct LateEvent {
  bool done = false;
  std::exception_ptr error;
  std::chrono::steady_clock::time_point time;
};
using LateEventPtr = std::shared_ptr<LateEvent>;

/// A simulated stream: a thread that does what is queued on it, in order, and
/// stops where a test says so. Only events order one stream after another.
/// Threads: any.
class LateStream {
 public:
  explicit LateStream(std::shared_ptr<LateClock> clock)
      : clock_(std::move(clock)) {
    std::lock_guard lock(clock_->mutex);
    clock_->streams.push_back(this);
  }

  /// Does what is queued, held or not; waits for other streams' events.
  ~LateStream() {
    {
      std::lock_guard lock(clock_->mutex);
      stopping_ = true;
      wake_.notify_one();
    }
    if (thread_.joinable()) thread_.join();
    std::lock_guard lock(clock_->mutex);
    std::erase(clock_->streams, this);
  }
  LateStream(const LateStream&) = delete;
  LateStream& operator=(const LateStream&) = delete;

  /// What the kernel throws, the next event carries.
  void run(std::function<void()> kernel) {
    push({.kernel = std::move(kernel)});
  }

  /// As run, for what release_copies counts.
  void run_copy(std::function<void()> copy) {
    push({.kernel = std::move(copy), .is_copy = true});
  }

  void record(LateEventPtr event) { push({.marks = std::move(event)}); }
  LateEventPtr record() {
    auto event = std::make_shared<LateEvent>();
    record(event);
    return event;
  }

  /// Later work waits for the event.
  void wait(std::shared_ptr<const LateEvent> event) {
    push({.after = std::move(event)});
  }

  /// With the clock's mutex held.
  bool is_idle() const { return !running_ && tasks_.empty(); }
  /// See settle(). With the clock's mutex held.
  bool is_settled() const { return !running_ && !can_go_on(); }

  /// Returns when all that was queued before is done.
  /// Errors: what it met, unless an event carries it.
  void synchronize() {
    const LateEventPtr end = record();
    std::unique_lock lock(clock_->mutex);
    clock_->changed.wait(lock, [&] { return end->done; });
    if (end->error != nullptr) std::rethrow_exception(end->error);
  }

  /// Nothing more starts until release(). What runs already ends first.
  void hold() {
    std::unique_lock lock(clock_->mutex);
    shut_ = true;
    copies_.reset();
    clock_->changed.notify_all();  // It has settled.
    clock_->changed.wait(lock, [this] { return !running_; });
  }

  void release() {
    std::lock_guard lock(clock_->mutex);
    shut_ = false;
    copies_.reset();
    wake_.notify_one();
  }

  /// Goes on until `more` copies have been made, and stops before the next.
  void release_copies(std::size_t more) {
    std::lock_guard lock(clock_->mutex);
    shut_ = false;
    copies_ = copies_.value_or(0) + more;
    wake_.notify_one();
  }

  /// Returns when the stream has done all that it can: it is empty, held, or
  /// waits for an event that is not done.
  void settle() {
    std::unique_lock lock(clock_->mutex);
    clock_->changed.wait(lock, [this] { return is_settled(); });
  }

 private:
  // One of the first three is set.
  struct Task {
    LateEventPtr marks = nullptr;
    std::shared_ptr<const LateEvent> after = nullptr;
    std::function<void()> kernel = nullptr;
    bool is_copy = false;
  };

  bool can_go_on() const {
    if (tasks_.empty()) return false;
    const Task& next = tasks_.front();
    if (next.after != nullptr && !next.after->done) return false;
    if (stopping_) return true;
    if (shut_) return false;
    return !next.is_copy || (!clock_->copies_held && copies_.value_or(1) > 0);
  }

  void push(Task task) {
    std::lock_guard lock(clock_->mutex);
    tasks_.push_back(std::move(task));
    // Not before it is needed: a test that forks while a thread starts would
    // leave its child with the locks of that thread.
    if (!thread_.joinable()) thread_ = std::thread([this] { work(); });
    wake_.notify_one();
  }

  void work() {
    std::unique_lock lock(clock_->mutex);
    for (;;) {
      wake_.wait(lock,
                 [this] { return can_go_on() || (stopping_ && is_idle()); });
      if (tasks_.empty()) return;
      Task task = std::move(tasks_.front());
      tasks_.pop_front();
      if (task.is_copy && copies_) --*copies_;
      running_ = true;
      if (task.kernel) {
        lock.unlock();
        std::exception_ptr error;
        try {
          task.kernel();
        } catch (...) {
          error = std::current_exception();
        }
        task.kernel = nullptr;
        lock.lock();
        if (error != nullptr) error_ = error;
      }
      if (task.marks != nullptr) {
        task.marks->error = std::exchange(error_, nullptr);
        task.marks->time = std::chrono::steady_clock::now();
        task.marks->done = true;
        wake_those_behind_events();
      }
      running_ = false;
      clock_->changed.notify_all();
    }
  }

  void wake_those_behind_events() {
    for (LateStream* stream : clock_->streams) {
      if (!stream->tasks_.empty() && stream->tasks_.front().after != nullptr) {
        stream->wake_.notify_one();
      }
    }
  }

  friend struct LateClock;
  const std::shared_ptr<LateClock> clock_;
  std::condition_variable wake_;  ///< For the thread.
  std::deque<Task> tasks_;
  bool shut_ = false;
  std::optional<std::size_t> copies_;  ///< How many may still start.
  bool running_ = false;
  bool stopping_ = false;
  std::exception_ptr error_;
  std::thread thread_;  // Last: it uses all the others.
};

inline void LateClock::hold_copies(bool hold) {
  std::lock_guard lock(mutex);
  copies_held = hold;
  for (LateStream* stream : streams) stream->wake_.notify_one();
  changed.notify_all();
}

}  // namespace torch_ext::test
