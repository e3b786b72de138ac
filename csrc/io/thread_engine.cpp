#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <deque>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "base/thread.h"
#include "deadline.h"
#include "engines.h"
#include "torch_ext/base/error.h"
#include "torch_ext/base/process.h"

namespace torch_ext {
namespace {

constexpr std::size_t kMaxThreads = 16;

/// Makes the request's one system call. Returns bytes moved or -errno.
std::int64_t carry_out(const IoRequest& request) {
  const std::size_t length = std::min(request.length, IoRequest::kMaxTransfer);
  const auto offset = static_cast<off_t>(request.offset);
  std::int64_t result = -1;
  switch (request.op) {
    case IoRequest::Op::kRead:
      result = pread(request.fd, request.data, length, offset);
      break;
    case IoRequest::Op::kWrite:
      result = pwrite(request.fd, request.data, length, offset);
      break;
    case IoRequest::Op::kSync:
      result = fsync(request.fd);
      break;
  }
  return result >= 0 ? result : -errno;
}

class ThreadEngine final : public IoEngine {
 public:
  explicit ThreadEngine(std::size_t depth)
      : depth_(depth), max_threads_(std::min(depth, kMaxThreads)) {
    threads_.reserve(max_threads_);
    shared_->done.reserve(depth);
  }

  ~ThreadEngine() override {
    if (process_id() == owner_) {
      stop_threads();
    } else {
      leave_to_parent();
    }
  }

  std::string_view name() const noexcept override { return "threads"; }
  std::size_t depth() const noexcept override { return depth_; }

  std::size_t submit(std::span<const IoRequest> batch) override {
    batch = batch.first(std::min(batch.size(), depth_ - in_flight_));
    start_threads(std::min(max_threads_, in_flight_ + batch.size()));
    in_flight_ += batch.size();
    if (threads_.empty()) {
      for (const IoRequest& request : batch) {
        const std::int64_t result = carry_out(request);
        const MutexLock lock(shared_->mutex);
        shared_->done.push_back({request.cookie, result});
      }
      return batch.size();
    }
    {
      const MutexLock lock(shared_->mutex);
      shared_->queue.insert(shared_->queue.end(), batch.begin(), batch.end());
    }
    for (std::size_t i = 0; i < batch.size(); ++i) shared_->work.notify_one();
    return batch.size();
  }

  std::size_t poll(std::span<IoCompletion> out, std::size_t at_least,
                   std::chrono::nanoseconds timeout) override {
    at_least = std::min({at_least, out.size(), in_flight_});
    MutexLock lock(shared_->mutex);
    std::vector<IoCompletion>& done = shared_->done;
    if (done.size() < at_least) {
      const Deadline deadline(timeout);
      shared_->wanted = at_least;
      auto left = deadline.left();
      while (done.size() < at_least && !shared_->woken && left.count() > 0) {
        shared_->completed.wait_for(lock, left);
        left = deadline.left();
      }
      shared_->wanted = 0;
      shared_->woken = false;
    }
    const std::size_t count = take_first(done, out);
    in_flight_ -= count;
    return count;
  }

  void wake() noexcept override {
    const MutexLock lock(shared_->mutex);
    shared_->woken = true;
    shared_->completed.notify_one();
  }

 private:
  struct Shared {
    Mutex mutex;
    CondVar work;
    CondVar completed;
    std::deque<IoRequest> queue GUARDED_BY(mutex);
    std::vector<IoCompletion> done GUARDED_BY(mutex);
    /// How many poll() blocks for.
    std::size_t wanted GUARDED_BY(mutex) = 0;
    bool woken GUARDED_BY(mutex) = false;
    bool stopping GUARDED_BY(mutex) = false;
  };

  /// Starts threads until there are `count`. There are fewer, even none, where
  /// the system has no more threads to give.
  void start_threads(std::size_t count) {
    if (threads_.size() >= count) return;
    try {
      while (threads_.size() < count) {
        // Threads that get no signals cannot end the process by SIGXFSZ.
        threads_.push_back(start_thread(
            "torch_ext io", [shared = shared_.get()] { work(*shared); }));
      }
    } catch (const IoError&) {
    }
  }

  static void work(Shared& shared) {
    MutexLock lock(shared.mutex);
    while (true) {
      while (shared.queue.empty() && !shared.stopping) shared.work.wait(lock);
      if (shared.queue.empty()) return;
      const IoRequest request = shared.queue.front();
      shared.queue.pop_front();
      lock.unlock();
      const std::int64_t result = carry_out(request);
      lock.lock();
      shared.done.push_back({request.cookie, result});
      if (shared.done.size() == shared.wanted) shared.completed.notify_one();
    }
  }

  /// Ends the threads once the queue is empty.
  void stop_threads() {
    {
      const MutexLock lock(shared_->mutex);
      shared_->stopping = true;
    }
    shared_->work.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  /// A forked child has the threads' state, but not the threads. Joining them,
  /// or destroying what they wait on, would take for ever.
  void leave_to_parent() {
    for (std::thread& thread : threads_) thread.detach();
    static_cast<void>(shared_.release());
  }

  const std::size_t depth_;
  const std::size_t max_threads_;
  const pid_t owner_ = process_id();
  std::unique_ptr<Shared> shared_ = std::make_unique<Shared>();
  std::vector<std::thread> threads_;
  std::size_t in_flight_ = 0;
};

}  // namespace

std::unique_ptr<IoEngine> make_thread_engine(int depth) {
  return std::make_unique<ThreadEngine>(static_cast<std::size_t>(depth));
}

}  // namespace torch_ext
