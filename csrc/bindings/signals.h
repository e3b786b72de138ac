#pragma once

// Keeps handlers of signals out of work that must not be seen half done.
// Part of the one translation unit of _C: included by module.cpp only.
//
// Python calls the handler of a signal between any two bytecodes of the main
// thread. It may raise, as that of Ctrl-C does, or save what it finds. While
// signals are held, a function stands in for each handler that was set from
// Python, and remembers which signals came. Then the handlers are put back, and
// those of the signals that came are called. This is C++, since handlers are
// also called between the lines of a context manager in Python.

#include <pybind11/pybind11.h>
#include <signal.h>

#include <array>
#include <optional>
#include <utility>

namespace py = pybind11;

namespace {

using PythonError = std::optional<py::error_already_set>;

/// Calls `call`, and returns what it has raised.
template <typename Call>
PythonError raised_by(Call call) {
  try {
    call();
  } catch (const py::error_already_set& error) {
    return error;
  }
  return std::nullopt;
}

/// The handlers of the process. All is done on the main thread, where they run.
class SignalHandlers {
 public:
  /// The one instance. It is never destroyed, since it holds Python objects.
  static SignalHandlers& instance() {
    static auto* const handlers = new SignalHandlers;
    return *handlers;
  }

  /// Holds the handlers. Returns false if there is nothing to do, as on any
  /// other thread. Errors: what a handler raises that still runs. All handlers
  /// are back then.
  bool hold() {
    bool held = false;
    for (int number = 1; number < kEnd; ++number) {
      py::object handler = handler_of(number);
      if (handler.is(stand_in_)) handler = last_[number];
      if (!PyCallable_Check(handler.ptr())) continue;
      struct sigaction action = {};
      sigaction(number, nullptr, &action);
      if (PythonError error = set(number, stand_in_)) {
        if (!held && is_of_another_thread(*error)) return false;
        if (held) release(std::move(error));
        throw py::error_already_set(*error);
      }
      replaced_[number] = {std::move(handler), action};
      held = holding_ = true;
    }
    return held;
  }

  /// Puts the handlers back and calls those of signals that came. Errors: the
  /// first exception that a handler raises, with those of others in its
  /// context.
  void release(PythonError error = std::nullopt) {
    for (int number = 1; number < kEnd; ++number) put_back(number, error);
    holding_ = false;
    for (int number = 1; number < kEnd; ++number) {
      if (!std::exchange(came_[number], false)) continue;
      add(error, raised_by([&] { call(handler_of(number), number); }));
    }
    if (error) throw py::error_already_set(*error);
  }

 private:
  static constexpr int kEnd = NSIG;
  struct Replaced {
    py::object handler;
    struct sigaction action;  ///< signal.signal() resets its flags.
  };

  SignalHandlers()
      : signal_(py::module_::import("_signal").attr("signal")),
        getsignal_(py::module_::import("_signal").attr("getsignal")),
        stand_in_(py::cpp_function([](int number, const py::object& frame) {
          instance().on_signal(number, frame);
        })) {}

  py::object handler_of(int number) const {
    // All handlers are asked for each time, so this avoids tuples and casts.
    PyObject* const handler =
        PyObject_CallOneArg(getsignal_.ptr(), py::int_(number).ptr());
    if (handler == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(handler);
  }

  /// Sets a handler. Returns what another handler has raised: signal.signal()
  /// first calls those of signals that have come, and if one raises, it sets
  /// nothing.
  PythonError set(int number, const py::object& handler) const {
    return raised_by([&] { signal_(number, handler); });
  }

  /// Whether signal.signal() itself has raised it, and nothing in Python.
  static bool is_of_another_thread(const py::error_already_set& error) {
    return error.matches(PyExc_ValueError) && !error.trace();
  }

  void put_back(int number, PythonError& error) {
    if (!replaced_[number]) return;
    const Replaced before = *std::exchange(replaced_[number], std::nullopt);
    if (!handler_of(number).is(stand_in_)) {
      // Somebody has set another handler, and may set the one before again.
      last_[number] = before.handler;
      return;
    }
    // Each time, another handler has run. There are not more than kEnd.
    for (int i = 0; i < kEnd; ++i) {
      PythonError raised = set(number, before.handler);
      if (!raised) {
        sigaction(number, &before.action, nullptr);
        return;
      }
      add(error, std::move(raised));
    }
  }

  static void add(PythonError& first, PythonError next) {
    if (!first) {
      first = std::move(next);
    } else if (next) {
      PyObject* const one = first->value().ptr();
      PyObject* const other = next->value().ptr();
      PyException_SetContext(other, PyException_GetContext(one));
      PyException_SetContext(
          one, py::reinterpret_borrow<py::object>(other).release().ptr());
    }
  }

  void on_signal(int number, const py::object& frame) {
    if (holding_) {
      came_[number] = true;
    } else if (last_[number]) {
      last_[number](number, frame);
    }
  }

  static void call(const py::object& handler, int number) {
    if (!PyCallable_Check(handler.ptr())) return;
    const auto frame =
        py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(
            PyThreadState_GetFrame(PyThreadState_Get())));
    handler(number, frame ? frame : py::none());
  }

  const py::object signal_;
  const py::object getsignal_;
  const py::object stand_in_;
  bool holding_ = false;
  std::array<bool, kEnd> came_ = {};
  std::array<std::optional<Replaced>, kEnd> replaced_ = {};
  std::array<py::object, kEnd> last_ = {};
};

/// The context manager. It may be entered again inside, and by any thread.
class HeldSignals {
 public:
  static void enter() {
    if (depth++ > 0) return;
    try {
      holds = SignalHandlers::instance().hold();
    } catch (...) {
      depth = 0;
      throw;
    }
  }

  static void exit() {
    if (--depth > 0 || !std::exchange(holds, false)) return;
    SignalHandlers::instance().release();
  }

 private:
  static inline thread_local int depth = 0;
  static inline thread_local bool holds = false;
};

void bind_signals(py::module_& m) {
  py::class_<HeldSignals>(m, "HeldSignals", py::module_local())
      .def(py::init<>())
      .def("__enter__", [](HeldSignals&) { HeldSignals::enter(); })
      .def("__exit__",
           [](HeldSignals&, const py::args&) { HeldSignals::exit(); });
}

}  // namespace
