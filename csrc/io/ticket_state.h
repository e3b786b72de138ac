#pragma once

#include <condition_variable>
#include <exception>
#include <mutex>

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

  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  std::exception_ptr error;  ///< Means nothing to others before `done`.
};

}  // namespace torch_ext
