#pragma once

// Ways to let go of the GIL, and to take it again.
// Part of the one translation unit of _C: included by module.cpp only.
//
// Once the interpreter is being taken down, a thread other than the main one
// does not get the GIL any more. Python before 3.14 ends the thread with
// pthread_exit(), which unwinds its stack. A C++ frame that lets nothing
// through, such as a destructor, then aborts the process. Python 3.14 lets such
// a thread sleep until the process is gone. These classes do that with every
// Python.

#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <optional>

namespace py = pybind11;

namespace {

/// Returns what `call` returns. `call` may take the GIL.
template <typename Call>
auto parked_at_exit(Call call) {
  try {
    return call();
  } catch (abi::__forced_unwind&) {
    // Leaving this handler would go on with the unwinding.
    for (;;) pause();
  }
}

/// Releases the GIL: other Python threads may run for as long as this lives.
class ReleasedGil {
 public:
  ReleasedGil() : thread_(PyEval_SaveThread()) {}
  ~ReleasedGil() {
    parked_at_exit([this] { PyEval_RestoreThread(thread_); });
  }
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

 private:
  PyThreadState* const thread_;
};

/// Takes the GIL: Python may be called for as long as this lives, inside
/// parked_at_exit().
class AcquiredGil {
 public:
  AcquiredGil() {
    parked_at_exit([this] { gil_.emplace(); });
  }
  AcquiredGil(const AcquiredGil&) = delete;
  AcquiredGil& operator=(const AcquiredGil&) = delete;

 private:
  std::optional<py::gil_scoped_acquire> gil_;
};

using release_gil = py::call_guard<ReleasedGil>;

// Deletes without the GIL. The destructor waits for I/O, and other Python
// threads must not stand still meanwhile.
struct DeleteWithoutGil {
  template <typename T>
  void operator()(T* object) const {
    const ReleasedGil released;
    delete object;
  }
};

}  // namespace
