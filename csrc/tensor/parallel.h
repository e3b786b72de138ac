#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <memory>

#include "one_thread.h"
#include "torch_ext/base/process.h"

namespace torch_ext {

/// Calls `work` for each number below `parts`, on `threads` threads in all.
/// They are the calling thread and, as far as they come in time, those of
/// PyTorch's inter-op pool. Throws what `work` has thrown first, when all is
/// done.
template <typename Work>
void run_in_parallel(std::size_t threads, std::size_t parts, const Work& work) {
  struct Shared {
    std::atomic<std::size_t> next = 0;
    std::atomic<std::size_t> done = 0;
    std::atomic_flag failed;
    std::exception_ptr error;
  };
  const auto shared = std::make_shared<Shared>();
  // A thread that comes late finds nothing to do. `work` is gone then.
  const auto help = [shared, parts, &work] {
    for (std::size_t i = shared->next++; i < parts; i = shared->next++) {
      try {
        const OneThread here;
        work(i);
      } catch (...) {
        if (!shared->failed.test_and_set()) {
          shared->error = std::current_exception();
        }
      }
      if (++shared->done == parts) shared->done.notify_all();
    }
  };
  // The pool of a forked child has no threads, and waking them may take for
  // ever.
  if (is_forked_child()) threads = 1;
  try {
    for (std::size_t i = 1; i < std::min(threads, parts); ++i) at::launch(help);
  } catch (...) {
    // There is no more help. This thread can do all of it.
  }
  help();
  for (std::size_t done = shared->done; done < parts; done = shared->done) {
    shared->done.wait(done);
  }
  if (shared->error != nullptr) std::rethrow_exception(shared->error);
}

}  // namespace torch_ext
