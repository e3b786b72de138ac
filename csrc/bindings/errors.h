#pragma once

// Turns C++ exceptions into Python's, and text in both directions.
// Part of the one translation unit of _C: included by module.cpp only.

#include <pybind11/pybind11.h>

#include <exception>
#include <stdexcept>
#include <string>
#include <string_view>

#include "torch_ext/base/error.h"

namespace py = pybind11;

namespace {

// Makes a str. Messages may quote file names and keys that are not UTF-8.
py::str to_text(std::string_view text) {
  return py::reinterpret_steal<py::str>(PyUnicode_DecodeUTF8(
      text.data(), static_cast<Py_ssize_t>(text.size()), "backslashreplace"));
}

py::str to_path(const std::string& path) {
  return py::reinterpret_steal<py::str>(PyUnicode_DecodeFSDefaultAndSize(
      path.data(), static_cast<Py_ssize_t>(path.size())));
}

void set_error(PyObject* type, const std::exception& error) {
  PyErr_SetObject(type, to_text(error.what()).ptr());
}

// Sets an OSError, which picks the subclass that belongs to the errno by
// itself.
void set_os_error(const torch_ext::IoError& error) {
  const std::string& path = error.failure().path;
  // In newer versions of pybind11, tuples with different members have different
  // types.
  py::tuple arguments = py::make_tuple(error.error(), to_text(error.what()));
  if (!path.empty()) {
    arguments = py::make_tuple(
        error.error(), to_text(error.text_without_path()), to_path(path));
  }
  PyErr_SetObject(PyExc_OSError, arguments.ptr());
}

// Returns the exception that Python would see if this one left a bound
// function.
py::object to_python(const std::exception_ptr& error) {
  const py::cpp_function raise([&error] { std::rethrow_exception(error); });
  try {
    raise();
  } catch (const py::error_already_set& raised) {
    return raised.value();
  }
  return py::none();
}

void bind_errors() {
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const torch_ext::IoError& e) {
      set_os_error(e);
    } catch (const torch_ext::KeyError& e) {
      set_error(PyExc_KeyError, e);
    } catch (const torch_ext::TimeoutError& e) {
      set_error(PyExc_TimeoutError, e);
    } catch (const torch_ext::BudgetError& e) {
      set_error(PyExc_MemoryError, e);
    } catch (const torch_ext::StateError& e) {
      set_error(PyExc_RuntimeError, e);
    } catch (const torch_ext::TypeError& e) {
      set_error(PyExc_TypeError, e);
    } catch (const std::invalid_argument& e) {
      set_error(PyExc_ValueError, e);
    }
  });
}

}  // namespace
