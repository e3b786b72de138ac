#include "torch_ext/io/ticket.h"

#include <condition_variable>
#include <mutex>
#include <utility>

#include "torch_ext/base/error.h"

namespace torch_ext {

struct Ticket::State {
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  std::exception_ptr error;
};

// No state at all is the cheapest way to say "done and well".
Ticket::Ticket() = default;

bool Ticket::done() const noexcept {
  if (state_ == nullptr) return true;
  std::lock_guard lock(state_->mutex);
  return state_->done;
}

bool Ticket::wait_for(std::chrono::nanoseconds timeout) const {
  if (state_ == nullptr) return true;
  std::unique_lock lock(state_->mutex);
  // Beyond a century the clock's own arithmetic would overflow.
  constexpr std::chrono::nanoseconds kForEver = std::chrono::hours(24 * 36500);
  if (timeout >= kForEver) {
    state_->changed.wait(lock, [this] { return state_->done; });
    return true;
  }
  return state_->changed.wait_for(lock, timeout,
                                  [this] { return state_->done; });
}

void Ticket::wait(Timeout timeout) const {
  if (!wait_for(timeout.value_or(std::chrono::nanoseconds::max()))) {
    throw TimeoutError("the operation did not end within " +
                       std::to_string(timeout->count() / 1e9) +
                       " s; it goes on");
  }
  if (std::exception_ptr failed = error()) std::rethrow_exception(failed);
}

std::exception_ptr Ticket::error() const {
  if (state_ == nullptr) return nullptr;
  std::lock_guard lock(state_->mutex);
  return state_->error;
}

TicketSource::TicketSource() {
  ticket_.state_ = std::make_shared<Ticket::State>();
}

void TicketSource::finish(std::exception_ptr error) {
  // Who learns of the end may drop this source at once: the copy keeps the
  // state until the waiters are notified.
  const std::shared_ptr<Ticket::State> state = ticket_.state_;
  {
    std::lock_guard lock(state->mutex);
    state->done = true;
    state->error = std::move(error);
  }
  state->changed.notify_all();
}

}  // namespace torch_ext
