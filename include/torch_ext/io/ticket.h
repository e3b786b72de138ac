#pragma once

#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <optional>

namespace torch_ext {

/// The outcome of an asynchronous operation, known now or later. Copies share
/// it. Dropping a ticket cancels nothing and frees nothing early. Threads: any.
class Ticket {
 public:
  using Timeout = std::optional<std::chrono::nanoseconds>;

  /// An operation that has ended well.
  Ticket();

  /// True once the operation has ended, well or not.
  bool done() const noexcept;

  /// Blocks until done() or for `timeout`, and returns done().
  bool wait_for(std::chrono::nanoseconds timeout) const;

  /// Blocks until done(). Without a timeout it waits for ever. Errors: the
  /// operation's own exception, at each call; TimeoutError after `timeout`.
  void wait(Timeout timeout = std::nullopt) const;

  /// The operation's exception; null while it runs or if it ended well.
  std::exception_ptr error() const;

 private:
  friend class TicketSource;
  friend class IoQueue;
  friend class RunningOperation;
  friend class Store;
  struct State;
  explicit Ticket(std::shared_ptr<State> state);

  std::shared_ptr<State> state_;
};

/// The side that ends the operation, exactly once. Threads: any.
class TicketSource {
 public:
  TicketSource();

  const Ticket& ticket() const noexcept { return ticket_; }
  void finish(std::exception_ptr error = nullptr);

 private:
  Ticket ticket_;
};

}  // namespace torch_ext
