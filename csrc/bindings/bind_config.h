#pragma once

// Binds AioConfig, sizes, and what `python -m torch_ext info` asks.
// Part of the one translation unit of _C: included by module.cpp only.

#include <pybind11/operators.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "errors.h"
#include "gil.h"
#include "torch_ext/base/size.h"
#include "torch_ext/config/aio_config.h"
#include "torch_ext/device/cuda_runtime.h"
#include "torch_ext/io/file.h"
#include "torch_ext/io/io_engine.h"

namespace {

using torch_ext::AioConfig;

// Converts text. Lone surrogates, which UTF-8 lacks, come out as `\udc80`.
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
    PyErr_Clear();  // numpy's bool has the slot, but raises.
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

// Makes an AioConfig. None means the default. Values are those of an `aio`
// section.
AioConfig make_config(const py::object& block_size,
                      const py::object& queue_depth,
                      const py::object& thread_count,
                      const py::object& single_submit,
                      const py::object& overlap_events) {
  return torch_ext::read_aio_section(
             {{"block_size", to_config_value(block_size)},
              {"queue_depth", to_config_value(queue_depth)},
              {"thread_count", to_config_value(thread_count)},
              {"single_submit", to_config_value(single_submit)},
              {"overlap_events", to_config_value(overlap_events)}})
      .config;
}

using Parse = torch_ext::ParsedAioConfig (*)(std::string_view);

void bind_parser(py::module_& m, const char* name, Parse parse) {
  m.def(
      name,
      [parse](std::string_view json) {
        const auto parsed = [json, parse] {
          const ReleasedGil released;
          return parse(json);
        }();
        return to_tuple(parsed);
      },
      py::arg("json"));
}

void bind_config(py::module_& m) {
  py::class_<AioConfig>(
      m, "AioConfig", py::module_local(),
      "The five knobs of an `aio` section, checked; cannot be changed.\n\n"
      "Args, each None for its default:\n"
      "    block_size: Bytes of a request (1 MiB), also \"512K\".\n"
      "    queue_depth: Requests in flight per I/O thread (8).\n"
      "    thread_count: I/O threads per object and drive (1).\n"
      "    single_submit: A kernel call for each request (False).\n"
      "    overlap_events: Refill the queue as requests end (True).\n\n"
      "Raises ValueError with the range that is allowed.")
      .def(py::init(&make_config), py::kw_only(),
           py::arg("block_size") = py::none(),
           py::arg("queue_depth") = py::none(),
           py::arg("thread_count") = py::none(),
           py::arg("single_submit") = py::none(),
           py::arg("overlap_events") = py::none())
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
      "read_aio_config",
      [](const py::dict& top, const std::optional<py::dict>& section,
         bool bare) {
        const auto items = [&] {
          return section ? to_config_items(*section) : torch_ext::ConfigItems();
        }();
        return to_tuple(torch_ext::read_aio_config(
            to_config_items(top), section ? &items : nullptr, bare));
      },
      py::arg("top"), py::arg("section"), py::arg("bare"));
  bind_parser(m, "parse_aio_config", &torch_ext::parse_aio_config);
  bind_parser(m, "parse_aio_settings", &torch_ext::parse_aio_settings);
  m.def("parse_size", &torch_ext::parse_size, py::arg("text"));
}

py::dict to_dict(const torch_ext::File& file) {
  using namespace py::literals;  // NOLINT(google-build-using-namespace)
  return py::dict("direct"_a = file.direct(),
                  "buffered_reason"_a = to_text(file.buffered_reason()),
                  "memory_alignment"_a = file.memory_alignment(),
                  "offset_alignment"_a = file.offset_alignment(),
                  "granule"_a = file.granule(),
                  "in_memory"_a = file.in_memory(),
                  "reserves"_a = file.reserves());
}

void bind_info(py::module_& m) {
  m.def("engine_info", [] {
    std::vector<std::pair<std::string, std::string>> engines;
    const ReleasedGil released;
    for (const std::string_view name : torch_ext::engine_names()) {
      engines.emplace_back(name, torch_ext::engine_unavailable_reason(name));
    }
    return engines;
  });
  m.def(
      "probe_directory",
      [](const std::filesystem::path& directory) {
        const auto file = [&directory] {
          const ReleasedGil released;
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

}  // namespace
