#pragma once

// Binds the moving of tensors to and from files of the caller, and memory for
// them.
// Part of the one translation unit of _C: included by module.cpp only.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "bind_config.h"
#include "bind_swap.h"
#include "errors.h"
#include "gil.h"
#include "torch_ext/memory/pinned_memory.h"
#include "torch_ext/tensor/tensor_file_transfer.h"

namespace {

using torch_ext::TensorFileTransfer;

py::dict to_dict(const torch_ext::FileTransferStats& stats) {
  using namespace py::literals;  // NOLINT(google-build-using-namespace)
  return py::dict(
      "bytes_read"_a = stats.bytes_read,
      "bytes_written"_a = stats.bytes_written,
      "operations"_a = stats.operations, "failures"_a = stats.failures,
      "in_flight"_a = stats.in_flight, "host_bytes"_a = stats.host_bytes,
      "host_bytes_peak"_a = stats.host_bytes_peak,
      "descriptors"_a = stats.descriptors);
}

// Appends the ticket of what `start` starts. A ticket that was returned would
// be lost if a signal's handler raised before Python has it.
template <typename Start>
void add_ticket(py::list& tickets, Start start) {
  std::optional<TensorTicket> ticket;
  {
    const ReleasedGil released;
    ticket = start();
  }
  tickets.append(std::move(*ticket));
}

void bind_file_transfer(py::module_& m) {
  py::class_<TensorFileTransfer,
             std::unique_ptr<TensorFileTransfer, DeleteWithoutGil>>(
      m, "TensorFileTransfer", py::module_local())
      .def(py::init([](const AioConfig& aio, std::uint64_t host_memory,
                       std::string engine) {
             const ReleasedGil released;
             return std::unique_ptr<TensorFileTransfer, DeleteWithoutGil>(
                 new TensorFileTransfer({.aio = aio,
                                         .engine = std::move(engine),
                                         .host_memory = host_memory}));
           }),
           py::arg("aio"), py::arg("host_memory"), py::arg("engine"))
      .def(
          "write",
          [](TensorFileTransfer& self, const std::filesystem::path& path,
             std::uint64_t offset, const at::Tensor& tensor, py::list tickets) {
            add_ticket(tickets,
                       [&] { return self.write(path, offset, tensor); });
          },
          py::arg("path"), py::arg("offset"), py::arg("tensor"),
          py::arg("tickets"))
      .def(
          "write_fd",
          [](TensorFileTransfer& self, int fd, std::uint64_t offset,
             const at::Tensor& tensor, py::list tickets) {
            add_ticket(tickets, [&] { return self.write(fd, offset, tensor); });
          },
          py::arg("fd"), py::arg("offset"), py::arg("tensor"),
          py::arg("tickets"))
      .def(
          "read",
          [](TensorFileTransfer& self, const std::filesystem::path& path,
             std::uint64_t offset, const at::Tensor& tensor, py::list tickets) {
            add_ticket(tickets,
                       [&] { return self.read(path, offset, tensor); });
          },
          py::arg("path"), py::arg("offset"), py::arg("tensor"),
          py::arg("tickets"))
      .def("drop_deleted", &TensorFileTransfer::drop_deleted, release_gil())
      .def("notes", &TensorFileTransfer::notes, release_gil())
      .def("stats",
           [](const TensorFileTransfer& swapper) {
             return to_dict([&] {
               const ReleasedGil released;
               return swapper.stats();
             }());
           })
      .def("close", &TensorFileTransfer::close, release_gil());
}

void bind_pinned_memory(py::module_& m) {
  m.def(
      "pinned_zeros",
      [](std::int64_t count, const at::Tensor& like) {
        return torch_ext::pinned_zeros(count, like.scalar_type());
      },
      py::arg("count"), py::arg("like"), release_gil());
  m.def(
      "is_pinned",
      [](const at::Tensor& tensor) {
        if (!tensor.is_cpu() || !tensor.has_storage()) return false;
        return torch_ext::is_pinned(tensor.const_data_ptr(), tensor.nbytes());
      },
      py::arg("tensor"), release_gil());
  m.def(
      "disown_pinned",
      [](std::uintptr_t address) {
        // NOLINTNEXTLINE(performance-no-int-to-ptr): only compared.
        return torch_ext::disown_pinned(reinterpret_cast<void*>(address));
      },
      py::arg("address"), release_gil());
}

void bind_files(py::module_& m) {
  bind_file_transfer(m);
  bind_pinned_memory(m);
}

}  // namespace
