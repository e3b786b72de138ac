#pragma once

// Waits of Python: with a timeout, without the GIL, and until Ctrl-C.
// Part of the one translation unit of _C: included by module.cpp only.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <optional>
#include <stdexcept>
#include <string>

#include "bind_config.h"
#include "errors.h"
#include "gil.h"

namespace {

// Called without the GIL by what waits in C++. Errors: what a handler raises.
void run_signal_handlers() {
  const AcquiredGil acquired;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

using Seconds = std::optional<double>;

// Writes 2 as "2", and 0.05 as "0.05".
std::string to_shortest(double number) {
  std::array<char, 32> text{};
  const auto [end, error] =
      std::to_chars(text.data(), text.data() + text.size(), number,
                    std::chars_format::general, 15);
  return {text.data(), end};
}

Seconds to_seconds(const py::object& timeout) {
  if (timeout.is_none()) return std::nullopt;
  const double seconds = PyFloat_AsDouble(timeout.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw torch_ext::TypeError("timeout must be None or a number, not " +
                               to_other_value(timeout).text);
  }
  if (!(seconds >= 0)) {
    throw std::invalid_argument("timeout must be None or >= 0, got " +
                                to_shortest(seconds));
  }
  return seconds;
}

// Waits without the GIL until `wait_for(slice)` is true. After it, wait()
// returns or throws at once. Slices let Ctrl-C through. Errors: TimeoutError;
// what a signal's handler raised.
template <typename Ticket, typename WaitFor>
void wait_interruptibly(const Ticket& ticket, const py::object& timeout,
                        WaitFor wait_for) {
  using Clock = std::chrono::steady_clock;
  using Duration = std::chrono::duration<double>;
  const Seconds seconds = to_seconds(timeout);
  const auto start = Clock::now();
  while (true) {
    const double waited = Duration(Clock::now() - start).count();
    const double left = seconds ? std::max(0.0, *seconds - waited) : 1.0;
    const Duration slice(std::min(left, 0.05));
    bool done = false;
    {
      const ReleasedGil released;
      done = wait_for(std::chrono::ceil<std::chrono::nanoseconds>(slice));
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (done) return;
    if (seconds && waited >= *seconds) {
      throw ticket.timed_out(
          std::chrono::round<std::chrono::nanoseconds>(Duration(*seconds)));
    }
  }
}

}  // namespace
