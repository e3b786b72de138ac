#pragma once

#include <algorithm>
#include <chrono>

namespace torch_ext {

/// The end of a timeout. The timeout may be of any length, even
/// nanoseconds::max().
class Deadline {
 public:
  explicit Deadline(std::chrono::nanoseconds timeout)
      : start_(Clock::now()), timeout_(timeout) {}

  /// Time left: at least 0, and at most an hour, which every clock can add.
  /// Whoever waited that long asks again.
  std::chrono::nanoseconds left() const {
    const std::chrono::nanoseconds left = timeout_ - (Clock::now() - start_);
    return std::clamp<std::chrono::nanoseconds>(
        left, std::chrono::nanoseconds(0), std::chrono::hours(1));
  }

 private:
  using Clock = std::chrono::steady_clock;

  Clock::time_point start_;
  std::chrono::nanoseconds timeout_;
};

}  // namespace torch_ext
