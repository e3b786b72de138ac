#pragma once

// Binds ModelOffload.
// Part of the one translation unit of _C: included by module.cpp only.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind_config.h"
#include "bind_swap.h"
#include "errors.h"
#include "gil.h"
#include "tensor/touch.h"
#include "torch_ext/tensor/model_offload.h"
#include "waits.h"

namespace {

using torch_ext::ModelOffload;
using torch_ext::ModelPass;

/// Parameters that have addresses from __enter__ to __exit__.
class GatheredTensors {
 public:
  GatheredTensors(ModelOffload& offload, std::vector<at::Tensor> tensors,
                  bool write, ModelPass pass)
      : offload_(offload),
        tensors_(std::move(tensors)),
        write_(write),
        pass_(pass) {}

  void enter() {
    const ReleasedGil released;
    gathered_ = offload_.gathered(tensors_, write_, pass_);
  }
  void exit() {
    const ReleasedGil released;
    gathered_ = {};
  }

 private:
  ModelOffload& offload_;
  const std::vector<at::Tensor> tensors_;
  const bool write_;
  const ModelPass pass_;
  ModelOffload::Gathered gathered_;
};

py::dict to_dict(const torch_ext::PagerStats& stats) {
  using namespace py::literals;  // NOLINT(google-build-using-namespace)
  return py::dict(
      "touches"_a = stats.touches, "foreseen"_a = stats.foreseen,
      "plans"_a = stats.plans, "hits"_a = stats.hits, "late"_a = stats.late,
      "misses"_a = stats.misses, "wait_seconds"_a = stats.wait_seconds,
      "bytes_read"_a = stats.bytes_read,
      "bytes_written"_a = stats.bytes_written, "host_bytes"_a = stats.memory,
      "host_bytes_in_use"_a = stats.in_use, "host_bytes_peak"_a = stats.peak,
      "resident_bytes"_a = stats.resident);
}

// torch turns a C++ exception of an operator into a RuntimeError. These are
// what they would be if they left a function of this module.
void raise_as_python() {
  const std::exception_ptr error = std::current_exception();
  try {
    std::rethrow_exception(error);
  } catch (const py::error_already_set&) {
    throw;
  } catch (...) {
    const AcquiredGil acquired;
    const py::object raised = to_python(error);
    if (raised.is_none()) return;
    PyErr_SetObject(py::type::handle_of(raised).ptr(), raised.ptr());
    throw py::error_already_set();
  }
}

/// Name, tensor, aliases, and whether it is a parameter.
using NamedParameters = std::vector<
    std::tuple<std::string, at::Tensor, std::vector<std::string>, bool>>;
using OwnedModelOffload = std::unique_ptr<ModelOffload, DeleteWithoutGil>;

OwnedModelOffload make_model_offload(const NamedParameters& parameters,
                                     const Directories& directories,
                                     const AioConfig& aio,
                                     std::uint64_t host_memory,
                                     std::string engine, bool verify,
                                     std::string checkpoint) {
  std::vector<torch_ext::NamedTensor> named;
  named.reserve(parameters.size());
  for (const auto& [name, tensor, aliases, is_parameter] : parameters) {
    named.push_back({name, tensor, aliases, is_parameter});
  }
  torch_ext::ModelOffloadOptions options{
      .store = {.directory = to_list(directories),
                .aio = aio,
                .engine = std::move(engine),
                .verify = verify},
      .host_memory = host_memory,
      .checkpoint = std::move(checkpoint),
      .while_waiting = &run_signal_handlers};
  const ReleasedGil released;
  return OwnedModelOffload(
      new ModelOffload(std::move(named), std::move(options)));
}

using PlannedStorage =
    std::tuple<std::string, std::uint64_t, std::string, bool>;

std::vector<PlannedStorage> plan_of(const ModelOffload& offload) {
  std::vector<PlannedStorage> plan;
  for (const auto& [name, bytes, stays, resident] : offload.plan()) {
    plan.emplace_back(name, bytes, stays, resident);
  }
  return plan;
}

void bind_model(py::module_& m) {
  torch_ext::set_touch_error_translator(&raise_as_python);
  py::enum_<ModelPass>(m, "ModelPass", py::module_local())
      .value("NONE", ModelPass::kNone)
      .value("FORWARD", ModelPass::kForward)
      .value("BACKWARD", ModelPass::kBackward);
  py::class_<GatheredTensors>(m, "GatheredTensors", py::module_local())
      .def("__enter__", &GatheredTensors::enter)
      .def("__exit__",
           [](GatheredTensors& gathered, const py::args&) { gathered.exit(); });
  py::class_<ModelOffload, OwnedModelOffload>(m, "ModelOffload",
                                              py::module_local())
      .def(py::init(&make_model_offload), py::arg("parameters"),
           py::arg("directories"), py::arg("aio"), py::arg("host_memory"),
           py::arg("engine"), py::arg("verify"), py::arg("checkpoint"))
      .def("snapshot", &ModelOffload::snapshot, py::arg("tensors"),
           release_gil())
      .def(
          "gathered",
          [](ModelOffload& offload, std::vector<at::Tensor> tensors, bool write,
             ModelPass pass) {
            return std::make_unique<GatheredTensors>(
                offload, std::move(tensors), write, pass);
          },
          py::arg("tensors"), py::arg("write"), py::arg("in_pass"),
          py::keep_alive<0, 1>())
      .def("close", &ModelOffload::close, release_gil())
      .def("plan", &plan_of)
      .def("stats",
           [](const ModelOffload& offload) { return to_dict(offload.stats()); })
      .def("notes", &ModelOffload::notes)
      .def_property_readonly("engine", &ModelOffload::engine);
  m.def("is_touched", &torch_ext::is_touched, py::arg("tensor"));
}

}  // namespace
