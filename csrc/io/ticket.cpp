#include "torch_ext/io/ticket.h"

#include <string>
#include <utility>

#include "base/mutex.h"
#include "ticket_state.h"
#include "torch_ext/base/error.h"

namespace torch_ext {

void Ticket::State::finish(std::exception_ptr failure) {
  {
    const MutexLock lock(mutex);
    done = true;
    error = std::move(failure);
  }
  changed.notify_all();
}

// Having no state is the cheapest way to say "ended well".
Ticket::Ticket() = default;

Ticket::Ticket(std::shared_ptr<State> state) : state_(std::move(state)) {}

bool Ticket::done() const noexcept {
  if (state_ == nullptr) return true;
  const MutexLock lock(state_->mutex);
  return state_->done;
}

bool Ticket::wait_for(std::chrono::nanoseconds timeout) const {
  if (state_ == nullptr) return true;
  MutexLock lock(state_->mutex);
  // Beyond a century, the clock's own arithmetic would overflow.
  constexpr std::chrono::nanoseconds kForEver = std::chrono::hours(24 * 36500);
  if (timeout >= kForEver) {
    while (!state_->done) state_->changed.wait(lock);
    return true;
  }
  return state_->changed.wait_for(
      lock, timeout, [this]() REQUIRES(state_->mutex) { return state_->done; });
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
  const MutexLock lock(state_->mutex);
  return state_->done ? state_->error : nullptr;
}

TicketSource::TicketSource() : ticket_(std::make_shared<Ticket::State>()) {}

void TicketSource::finish(std::exception_ptr error) {
  const std::shared_ptr<Ticket::State> state = ticket_.state_;
  state->finish(std::move(error));
}

}  // namespace torch_ext
