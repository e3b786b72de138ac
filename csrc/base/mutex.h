#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <utility>

// These say what a mutex protects, and which functions want it held. clang's
// analysis reads them, and tools/lint.sh runs it. They mean nothing to other
// compilers.
#ifdef __clang__
#define TORCH_EXT_THREADS(attribute) __attribute__((attribute))
#else
#define TORCH_EXT_THREADS(attribute)
#endif
#define GUARDED_BY(mutex) TORCH_EXT_THREADS(guarded_by(mutex))
#define ACQUIRED_BEFORE(mutex) TORCH_EXT_THREADS(acquired_before(mutex))
#define REQUIRES(mutex) TORCH_EXT_THREADS(requires_capability(mutex))
#define ACQUIRE(...) TORCH_EXT_THREADS(acquire_capability(__VA_ARGS__))
#define RELEASE(...) TORCH_EXT_THREADS(release_capability(__VA_ARGS__))
#define RETURNS_MUTEX(mutex) TORCH_EXT_THREADS(lock_returned(mutex))
#define SCOPED_LOCK TORCH_EXT_THREADS(scoped_lockable)
#define UNCHECKED_THREADS TORCH_EXT_THREADS(no_thread_safety_analysis)

namespace torch_ext {

/// A std::mutex with these attributes, which libstdc++'s lacks.
class TORCH_EXT_THREADS(capability("mutex")) Mutex {
 public:
  /// For pthread_atfork(). Others use MutexLock.
  void lock() ACQUIRE() { mutex_.lock(); }
  void unlock() RELEASE() { mutex_.unlock(); }

 private:
  friend class MutexLock;
  std::mutex mutex_;
};

/// Holds a mutex until its end, or until unlock().
class SCOPED_LOCK MutexLock {
 public:
  explicit MutexLock(Mutex& mutex) ACQUIRE(mutex) : lock_(mutex.mutex_) {}
  /// Takes the mutex. Calls `before` first if it has to wait.
  template <typename Before>
  MutexLock(Mutex& mutex, Before before) ACQUIRE(mutex)
      : lock_(mutex.mutex_, std::try_to_lock) {
    if (lock_.owns_lock()) return;
    before();
    lock_.lock();
  }
  ~MutexLock() RELEASE() = default;

  void lock() ACQUIRE() { lock_.lock(); }
  void unlock() RELEASE() { lock_.unlock(); }

 private:
  friend class CondVar;
  std::unique_lock<std::mutex> lock_;
};

/// A std::condition_variable for a MutexLock. `done`, which tells whether to go
/// on, is a function with REQUIRES(mutex).
class CondVar {
 public:
  void wait(MutexLock& lock) { changed_.wait(lock.lock_); }
  template <typename Done>
  void wait(MutexLock& lock, Done done) {
    changed_.wait(lock.lock_, std::move(done));
  }
  void wait_for(MutexLock& lock, std::chrono::nanoseconds time) {
    changed_.wait_for(lock.lock_, time);
  }
  /// Returns false if the time was over first.
  template <typename Done>
  bool wait_for(MutexLock& lock, std::chrono::nanoseconds time, Done done) {
    return changed_.wait_for(lock.lock_, time, std::move(done));
  }
  void notify_one() noexcept { changed_.notify_one(); }
  void notify_all() noexcept { changed_.notify_all(); }

 private:
  std::condition_variable changed_;
};

}  // namespace torch_ext
