#pragma once

#include <exception>

#include "base/mutex.h"
#include "torch_ext/io/ticket.h"

namespace torch_ext {

/// What the copies of a ticket share. An operation that shall be found from its
/// ticket derives from it.
struct Ticket::State {
  State() = default;
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  virtual ~State() = default;

  /// Ends the operation. Whoever learns of the end may drop the last ticket at
  /// once, so the caller keeps the state alive until this returns.
  void finish(std::exception_ptr failure);

  Mutex mutex;
  CondVar changed;
  bool done GUARDED_BY(mutex) = false;
  /// Means nothing to others before `done`.
  std::exception_ptr error GUARDED_BY(mutex);
};

}  // namespace torch_ext
