#pragma once

#include <condition_variable>
#include <exception>
#include <mutex>

#include "torch_ext/io/ticket.h"

namespace torch_ext {

/// What the copies of a ticket share; the base of an operation that wants to
/// be found from its ticket.
struct Ticket::State {
  State() = default;
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  virtual ~State() = default;

  /// Whoever learns of the end may drop the last ticket at once: the caller
  /// keeps the state alive until this returns.
  void finish(std::exception_ptr failure);

  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  std::exception_ptr error;  ///< Of no meaning to others before `done`.
};

}  // namespace torch_ext
