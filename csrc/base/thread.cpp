#include "thread.h"

#include <pthread.h>
#include <signal.h>

#include <system_error>
#include <utility>

#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

/// Blocks all signals for the calling thread, and for the threads that it
/// makes.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

}  // namespace

std::thread start_thread(const char* name, std::function<void()> body) {
  const SignalsBlocked signals_blocked;
  try {
    std::thread thread(std::move(body));
    pthread_setname_np(thread.native_handle(), name);
    return thread;
  } catch (const std::system_error& refused) {
    throw IoError({.op = "pthread_create", .error = refused.code().value()});
  }
}

}  // namespace torch_ext
