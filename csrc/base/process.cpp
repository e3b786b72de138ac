#include "torch_ext/base/process.h"

#include <pthread.h>
#include <unistd.h>

#include <atomic>

namespace torch_ext {
namespace {

std::atomic<pid_t> id = 0;

void forget_id() { id = 0; }

/// Makes a forked child ask for its id anew. False if that cannot be had.
bool watch_forks() { return pthread_atfork(nullptr, nullptr, forget_id) == 0; }

const pid_t loaded_in = getpid();

}  // namespace

bool is_forked_child() noexcept { return process_id() != loaded_in; }

pid_t process_id() noexcept {
  static const bool watched = watch_forks();
  if (!watched) return getpid();
  if (id == 0) id = getpid();
  return id;
}

}  // namespace torch_ext
