#pragma once

// Ways to let go of the GIL.
// Part of the one translation unit of _C: included by module.cpp only.

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

using release_gil = py::call_guard<py::gil_scoped_release>;

// The destructor waits for I/O: not while other Python threads stand still.
struct DeleteWithoutGil {
  template <typename T>
  void operator()(T* object) const {
    py::gil_scoped_release released;
    delete object;
  }
};

}  // namespace
