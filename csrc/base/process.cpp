#include "torch_ext/base/process.h"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <string>

#include "owner_process.h"
#include "torch_ext/base/error.h"

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

void OwnerProcess::check() const {
  if (is_this()) return;
  throw StateError(std::string("this ") + what_ + " was created in process " +
                   std::to_string(id_) +
                   " and cannot be used in a forked child; create one in the "
                   "child");
}

}  // namespace torch_ext
