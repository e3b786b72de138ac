// The Python module torch_ext._C: converts types and releases the GIL, and
// leaves every decision to the layers below.

#include <pybind11/operators.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "torch_ext/base/error.h"
#include "torch_ext/base/size.h"
#include "torch_ext/config/aio_config.h"
#include "torch_ext/device/cuda_runtime.h"
#include "torch_ext/io/file.h"
#include "torch_ext/io/io_engine.h"
#include "torch_ext/swap/swapper.h"
#include "torch_ext/tensor/tensor_swapper.h"

namespace py = pybind11;

namespace {

using torch_ext::AioConfig;
using release_gil = py::call_guard<py::gil_scoped_release>;

// Messages may quote file names and keys that are not UTF-8.
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

// OSError itself picks the subclass that belongs to the errno.
void set_os_error(const torch_ext::IoError& error) {
  py::tuple arguments =
      error.failure().path.empty()
          ? py::make_tuple(error.error(), to_text(error.what()))
          : py::make_tuple(error.error(), to_text(error.text_without_path()),
                           to_path(error.failure().path));
  PyErr_SetObject(PyExc_OSError, arguments.ptr());
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
    } catch (const torch_ext::StateError& e) {
      set_error(PyExc_RuntimeError, e);
    } catch (const torch_ext::TypeError& e) {
      set_error(PyExc_TypeError, e);
    } catch (const std::invalid_argument& e) {
      set_error(PyExc_ValueError, e);
    }
  });
}

// Lone surrogates, which UTF-8 lacks, come out as `\udc80`.
std::string to_string(py::handle text) {
  auto bytes = py::reinterpret_steal<py::bytes>(
      PyUnicode_AsEncodedString(text.ptr(), "utf-8", "backslashreplace"));
  if (!bytes) throw py::error_already_set();
  return bytes;
}

torch_ext::OtherValue to_other_value(py::handle value) {
  try {
    return {to_string(py::repr(value))};
  } catch (const py::error_already_set&) {  // Too deep, too many digits, ...
    return {std::string("<") + Py_TYPE(value.ptr())->tp_name + ">"};
  }
}

torch_ext::ConfigValue to_integer_value(py::handle value) {
  auto number = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!number) {
    PyErr_Clear();  // numpy's bool has the slot, and raises.
    return to_other_value(value);
  }
  int overflow = 0;
  const long long narrow =
      PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  if (overflow == 0) return std::int64_t{narrow};
  if (overflow > 0) {
    const unsigned long long wide = PyLong_AsUnsignedLongLong(number.ptr());
    if (PyErr_Occurred() == nullptr) return std::uint64_t{wide};
    PyErr_Clear();
  }
  return to_other_value(number);
}

torch_ext::ConfigValue to_config_value(py::handle value) {
  if (value.is_none()) return nullptr;
  if (PyBool_Check(value.ptr())) return value.ptr() == Py_True;
  if (PyFloat_Check(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
  if (PyUnicode_Check(value.ptr())) return to_string(value);
  if (PyIndex_Check(value.ptr())) return to_integer_value(value);
  return to_other_value(value);
}

torch_ext::ConfigItems to_config_items(const py::dict& section) {
  torch_ext::ConfigItems items;
  items.reserve(section.size());
  for (auto [key, value] : section) {
    if (!PyUnicode_Check(key.ptr())) {
      throw std::invalid_argument("aio has the key " +
                                  to_other_value(key).text +
                                  ", which is not a string");
    }
    items.emplace_back(to_string(key), to_config_value(value));
  }
  return items;
}

py::tuple to_tuple(const torch_ext::ParsedAioConfig& parsed) {
  py::list warnings;
  for (const std::string& warning : parsed.warnings) {
    warnings.append(to_text(warning));
  }
  return py::make_tuple(parsed.config, warnings);
}

void bind_config(py::module_& m) {
  py::class_<AioConfig>(m, "AioConfig")
      .def(py::init<>())
      .def_readonly("block_size", &AioConfig::block_size)
      .def_readonly("queue_depth", &AioConfig::queue_depth)
      .def_readonly("thread_count", &AioConfig::thread_count)
      .def_readonly("single_submit", &AioConfig::single_submit)
      .def_readonly("overlap_events", &AioConfig::overlap_events)
      .def(py::self == py::self)
      .def("__repr__", [](const AioConfig& config) {
        return py::str(
                   "AioConfig(block_size={}, queue_depth={}, "
                   "thread_count={}, single_submit={}, overlap_events={})")
            .format(config.block_size, config.queue_depth, config.thread_count,
                    config.single_submit, config.overlap_events);
      });
  m.def("aio_keys", [] {
    const auto keys = torch_ext::aio_keys();
    return std::vector<std::string>(keys.begin(), keys.end());
  });
  m.def(
      "read_aio_section",
      [](const py::dict& section) {
        return to_tuple(torch_ext::read_aio_section(to_config_items(section)));
      },
      py::arg("section"));
  m.def(
      "parse_aio_config",
      [](std::string_view json) {
        const auto parsed = [json] {
          py::gil_scoped_release released;
          return torch_ext::parse_aio_config(json);
        }();
        return to_tuple(parsed);
      },
      py::arg("json"));
  m.def("parse_size", &torch_ext::parse_size, py::arg("text"));
  m.def("format_size", &torch_ext::format_size, py::arg("bytes"));
}

py::dict to_dict(const torch_ext::File& file) {
  using namespace py::literals;  // NOLINT(google-build-using-namespace)
  return py::dict("direct"_a = file.direct(),
                  "buffered_reason"_a = to_text(file.buffered_reason()),
                  "memory_alignment"_a = file.memory_alignment(),
                  "offset_alignment"_a = file.offset_alignment(),
                  "granule"_a = file.granule());
}

void bind_info(py::module_& m) {
  m.def("engine_info", [] {
    std::vector<std::pair<std::string, std::string>> engines;
    py::gil_scoped_release released;
    for (const std::string_view name : torch_ext::engine_names()) {
      engines.emplace_back(name, torch_ext::engine_unavailable_reason(name));
    }
    return engines;
  });
  m.def(
      "probe_directory",
      [](const std::filesystem::path& directory) {
        const auto file = [&directory] {
          py::gil_scoped_release released;
          return torch_ext::File::scratch(directory);
        }();
        return to_dict(file);
      },
      py::arg("directory"));
  m.def("cuda_runtime_info", [] {
    std::string why_not;
    const auto runtime = torch_ext::CudaRuntime::open({}, &why_not);
    return py::make_tuple(runtime ? runtime->version() : 0, to_text(why_not));
  });
}

using Seconds = std::optional<double>;
using torch_ext::TensorSwapper;
using torch_ext::TensorTicket;

// Waits without the GIL, in slices that let Ctrl-C through.
template <typename WaitFor>
bool wait_interruptibly(Seconds timeout, WaitFor wait_for) {
  using Clock = std::chrono::steady_clock;
  if (timeout && !(*timeout >= 0)) {
    throw std::invalid_argument("timeout must be None or >= 0, got " +
                                std::to_string(*timeout));
  }
  const auto start = Clock::now();
  while (true) {
    const double waited =
        std::chrono::duration<double>(Clock::now() - start).count();
    const double left = timeout ? std::max(0.0, *timeout - waited) : 1.0;
    const std::chrono::duration<double> slice(std::min(left, 0.05));
    bool done = false;
    {
      py::gil_scoped_release released;
      done = wait_for(std::chrono::ceil<std::chrono::nanoseconds>(slice));
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (done || (timeout && waited >= *timeout)) return done;
  }
}

// The error text of a wait names the time that the caller gave.
TensorTicket::Timeout rest_of(bool done, Seconds timeout) {
  if (done || !timeout) return std::nullopt;
  return std::chrono::nanoseconds(0);
}

void bind_ticket(py::module_& m) {
  py::class_<TensorTicket>(m, "SwapTicket")
      .def(
          "wait",
          [](const TensorTicket& ticket, Seconds timeout) {
            const bool done = wait_interruptibly(
                timeout, [&](auto slice) { return ticket.wait_for(slice); });
            py::gil_scoped_release released;
            ticket.wait(rest_of(done, timeout));
          },
          py::arg("timeout") = py::none())
      .def(
          "wait_source",
          [](const TensorTicket& ticket, Seconds timeout) {
            const bool done = wait_interruptibly(timeout, [&](auto slice) {
              return ticket.wait_source_for(slice);
            });
            py::gil_scoped_release released;
            ticket.wait_source(rest_of(done, timeout));
          },
          py::arg("timeout") = py::none())
      .def(
          "result",
          [](const TensorTicket& ticket, Seconds timeout) -> py::object {
            const bool done = wait_interruptibly(
                timeout, [&](auto slice) { return ticket.wait_for(slice); });
            const at::Tensor tensor = [&] {
              py::gil_scoped_release released;
              return ticket.result(rest_of(done, timeout));
            }();
            return tensor.defined() ? py::cast(tensor) : py::none();
          },
          py::arg("timeout") = py::none())
      .def("done", &TensorTicket::done, release_gil());
}

py::dict to_dict(const torch_ext::SwapperStats& stats) {
  using namespace py::literals;  // NOLINT(google-build-using-namespace)
  return py::dict(
      "bytes_out"_a = stats.bytes_out, "bytes_in"_a = stats.bytes_in,
      "operations"_a = stats.operations, "failures"_a = stats.failures,
      "in_flight"_a = stats.in_flight, "host_bytes"_a = stats.host_bytes,
      "host_bytes_peak"_a = stats.host_bytes_peak,
      "disk_bytes_written"_a = stats.store.bytes_written,
      "disk_bytes_read"_a = stats.store.bytes_read,
      "disk_bytes_allocated"_a = stats.store.allocated,
      "disk_file_size"_a = stats.store.file_size);
}

// The destructor waits for I/O: not while other Python threads stand still.
struct DeleteWithoutGil {
  template <typename T>
  void operator()(T* object) const {
    py::gil_scoped_release released;
    delete object;
  }
};

void bind_swap(py::module_& m) {
  bind_ticket(m);
  py::class_<TensorSwapper, std::unique_ptr<TensorSwapper, DeleteWithoutGil>>(
      m, "TensorSwapper")
      .def(py::init([](std::filesystem::path directory, const AioConfig& aio,
                       std::uint64_t host_memory, std::string engine,
                       bool verify) {
             py::gil_scoped_release released;
             return std::unique_ptr<TensorSwapper, DeleteWithoutGil>(
                 new TensorSwapper({.store = {.directory = std::move(directory),
                                              .aio = aio,
                                              .engine = std::move(engine),
                                              .verify = verify},
                                    .host_memory = host_memory}));
           }),
           py::arg("directory"), py::arg("aio"), py::arg("host_memory"),
           py::arg("engine"), py::arg("verify"))
      .def("swap_out", &TensorSwapper::swap_out, py::arg("key"),
           py::arg("tensor"), release_gil())
      .def("swap_in", &TensorSwapper::swap_in, py::arg("key"),
           py::arg("out") = py::none(), py::arg("device") = py::none(),
           release_gil())
      .def("delete", &TensorSwapper::remove, py::arg("key"), release_gil())
      .def("keys", &TensorSwapper::keys, release_gil())
      .def("notes", &TensorSwapper::notes, release_gil())
      .def("stats",
           [](const TensorSwapper& swapper) {
             return to_dict([&] {
               py::gil_scoped_release released;
               return swapper.stats();
             }());
           })
      .def("close", &TensorSwapper::close, release_gil())
      .def_property_readonly("engine", &TensorSwapper::engine);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled half of torch_ext; see the package itself.";
  bind_errors();
  bind_config(m);
  bind_info(m);
  bind_swap(m);
}
