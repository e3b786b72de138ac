#pragma once

// Binds TensorSwapper and its tickets.
// Part of the one translation unit of _C: included by module.cpp only.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "bind_config.h"
#include "errors.h"
#include "gil.h"
#include "torch_ext/swap/swapper.h"
#include "torch_ext/tensor/tensor_swapper.h"
#include "waits.h"

namespace {

using torch_ext::TensorSwapper;
using torch_ext::TensorTicket;

void wait_for_bytes(const TensorTicket& ticket, const py::object& timeout) {
  wait_interruptibly(ticket, timeout,
                     [&](auto slice) { return ticket.wait_for(slice); });
  const ReleasedGil released;
  ticket.wait();
}

// Waits, and returns what wait() would raise for the operation. What this
// raises belongs to this wait: its timeout, or what a signal's handler raised.
py::object outcome_of(const TensorTicket& ticket, const py::object& timeout) {
  wait_interruptibly(ticket, timeout,
                     [&](auto slice) { return ticket.wait_for(slice); });
  try {
    const ReleasedGil released;
    ticket.wait();
  } catch (...) {
    return to_python(std::current_exception());
  }
  return py::none();
}

void wait_for_source(const TensorTicket& ticket, const py::object& timeout) {
  wait_interruptibly(ticket, timeout,
                     [&](auto slice) { return ticket.wait_source_for(slice); });
  const ReleasedGil released;
  ticket.wait_source();
}

py::object result_of(const TensorTicket& ticket, const py::object& timeout) {
  wait_for_bytes(ticket, timeout);
  const at::Tensor tensor = [&ticket] {
    const ReleasedGil released;
    return ticket.result();
  }();
  return tensor.defined() ? py::cast(tensor) : py::none();
}

void bind_ticket(py::module_& m) {
  py::class_<TensorTicket>(
      m, "TensorTicket", py::module_local(),
      "An operation of a TensorSwapper, which goes on whether it is waited for "
      "or not.\n\nWaits raise what the operation met (OSError and others), "
      "TimeoutError after\n``timeout`` seconds (None: never), and "
      "KeyboardInterrupt on Ctrl-C; after the\nlast two it can be waited for "
      "again. Threads may share a ticket.")
      .def("wait", &wait_for_bytes, py::arg("timeout") = py::none(),
           "Returns when the bytes are on disk; of a swap-in, when work queued "
           "from now on sees\nthe tensor's bytes.")
      .def("outcome", &outcome_of, py::arg("timeout") = py::none(),
           "As wait(), but returns what the operation met, or None.")
      .def("wait_source", &wait_for_source, py::arg("timeout") = py::none(),
           "Returns when the tensor that is swapped out may be overwritten by "
           "work queued from\nnow on; its bytes need not be on disk yet.")
      .def("result", &result_of, py::arg("timeout") = py::none(),
           "wait(), then the tensor that was swapped in; None of a swap-out.")
      .def("done", &TensorTicket::done, release_gil(),
           "Whether the operation has ended, well or not; never blocks.");
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

/// Paths with their weights.
using Directories = std::vector<std::pair<std::filesystem::path, int>>;

torch_ext::DirectoryList to_list(const Directories& directories) {
  std::vector<torch_ext::WeightedDirectory> list;
  list.reserve(directories.size());
  for (const auto& [path, weight] : directories) list.push_back({path, weight});
  return list;
}

void bind_swap(py::module_& m) {
  bind_ticket(m);
  py::class_<TensorSwapper, std::unique_ptr<TensorSwapper, DeleteWithoutGil>>(
      m, "TensorSwapper", py::module_local())
      .def(py::init([](const Directories& directories, const AioConfig& aio,
                       std::uint64_t host_memory, std::string engine,
                       bool verify) {
             const ReleasedGil released;
             return std::unique_ptr<TensorSwapper, DeleteWithoutGil>(
                 new TensorSwapper({.store = {.directory = to_list(directories),
                                              .aio = aio,
                                              .engine = std::move(engine),
                                              .verify = verify},
                                    .host_memory = host_memory}));
           }),
           py::arg("directories"), py::arg("aio"), py::arg("host_memory"),
           py::arg("engine"), py::arg("verify"))
      .def("swap_out", &TensorSwapper::swap_out, py::arg("key"),
           py::arg("tensor"), release_gil())
      .def(
          "swap_in",
          [](TensorSwapper& swapper, const std::string& key,
             const std::optional<at::Tensor>& out,
             std::optional<c10::Device> device, bool prefetch) {
            return swapper.swap_in(key, out, device,
                                   prefetch ? torch_ext::IoPriority::kPrefetch
                                            : torch_ext::IoPriority::kNow);
          },
          py::arg("key"), py::arg("out") = py::none(),
          py::arg("device") = py::none(), py::arg("prefetch") = false,
          release_gil())
      .def("remove", &TensorSwapper::remove, py::arg("key"), release_gil())
      .def("keys", &TensorSwapper::keys, release_gil())
      .def("notes", &TensorSwapper::notes, release_gil())
      .def("stats",
           [](const TensorSwapper& swapper) {
             return to_dict([&] {
               const ReleasedGil released;
               return swapper.stats();
             }());
           })
      .def("close", &TensorSwapper::close, release_gil())
      .def_property_readonly("engine", &TensorSwapper::engine);
  m.def("to_seconds", &to_seconds, py::arg("timeout"));
}

}  // namespace
