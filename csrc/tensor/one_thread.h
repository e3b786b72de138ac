#pragma once

#include <ATen/Parallel.h>

#include <optional>

#include "torch_ext/base/process.h"

/// From the OpenMP that PyTorch brings, if it brings one. It counts for the
/// calling thread only.
extern "C" void omp_set_num_threads(int) noexcept __attribute__((weak));

namespace torch_ext {

/// Makes the calling thread's operators run on it alone, for as long as this
/// lives. PyTorch's other threads would wait for the next operator without
/// sleeping, on cores that I/O needs.
class OneThread {
 public:
  OneThread() : before_(at::get_num_threads()) { set(1); }
  ~OneThread() { set(before_); }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

  /// Sets the number of threads for good.
  static void set(int threads) {
    if (omp_set_num_threads != nullptr) omp_set_num_threads(threads);
  }

 private:
  const int before_;
};

/// The same, but only in a forked child. There an operator would wait for ever
/// for PyTorch's other threads, which a child does not have.
class OneThreadInChild {
 public:
  OneThreadInChild() {
    if (is_forked_child()) one_.emplace();
  }

 private:
  std::optional<OneThread> one_;
};

}  // namespace torch_ext
