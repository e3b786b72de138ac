#pragma once

// Binds the offload behind OffloadedAdamW.
// Part of the one translation unit of _C: included by module.cpp only.

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind_state.h"
#include "errors.h"
#include "gil.h"
#include "tensor/adamw_hyper.h"
#include "tensor/adamw_offload.h"
#include "tensor/backward_step.h"
#include "tensor/gradient_prefetch.h"
#include "tensor/plain_modes.h"

namespace {

using torch_ext::AdamWHyper;
using torch_ext::AdamWOffload;
using torch_ext::BackwardStep;
// slot, parameter, gradient
using TrainedArgs = std::tuple<std::size_t, at::Tensor, at::Tensor>;
using GroupArgs = std::pair<AdamWHyper, std::vector<TrainedArgs>>;

std::vector<AdamWOffload::Group> to_groups(const std::vector<GroupArgs>& from) {
  std::vector<AdamWOffload::Group> groups;
  groups.reserve(from.size());
  for (const auto& [hyper, trained] : from) {
    AdamWOffload::Group group{hyper, {}};
    for (const auto& [slot, parameter, gradient] : trained) {
      group.trained.push_back({{slot, parameter}, gradient});
    }
    groups.push_back(std::move(group));
  }
  return groups;
}

/// A context manager for Python.
class ModesGuard {
 public:
  void enter() { plain_ = std::make_unique<torch_ext::PlainModes>(); }
  void exit(const py::args&) { plain_.reset(); }

 private:
  std::unique_ptr<torch_ext::PlainModes> plain_;
};

void bind_modes(py::module_& m) {
  py::class_<ModesGuard>(m, "PlainModes", py::module_local())
      .def(py::init<>())
      .def("__enter__", &ModesGuard::enter)
      .def("__exit__", &ModesGuard::exit);
}

void bind_backward_step(py::module_& m) {
  py::class_<BackwardStep>(m, "BackwardStep", py::module_local())
      .def(py::init<AdamWOffload&, bool>(), py::arg("offload"),
           py::arg("takes"), py::keep_alive<1, 2>())
      .def("wants", &BackwardStep::wants, py::arg("slot"), py::arg("parameter"),
           py::arg("gradient"), py::arg("is_nested"))
      .def("is_open", &BackwardStep::is_open)
      .def(
          "begin",
          [](BackwardStep& step, const BackwardStep::Slots& groups,
             const std::vector<SlotArgs>& trained) {
            step.begin(groups, to_parameters(trained));
          },
          py::arg("groups"), py::arg("trained"), release_gil())
      .def("group_of", &BackwardStep::group_of, py::arg("slot"))
      .def("group_or", &BackwardStep::group_or, py::arg("slot"), py::arg("now"))
      .def("fix", &BackwardStep::fix, py::arg("group"), py::arg("options"))
      .def(
          "take",
          [](BackwardStep& step, std::size_t group, std::size_t slot,
             const at::Tensor& part, const at::Tensor& gradient,
             const at::Tensor& whole) {
            step.take(group, {{slot, part}, gradient}, whole);
          },
          py::arg("group"), py::arg("slot"), py::arg("part"),
          py::arg("gradient"), py::arg("whole"), release_gil())
      .def("taken", &BackwardStep::taken)
      .def("refusal", &BackwardStep::refusal, py::arg("slot"),
           py::arg("is_mark"))
      .def("finish", &BackwardStep::finish, py::arg("groups"),
           py::arg("options"), release_gil())
      .def("reset", &BackwardStep::reset);
}

void bind_optimizer(py::module_& m) {
  bind_modes(m);
  py::class_<AdamWHyper>(m, "AdamWHyper", py::module_local())
      .def(py::init<double, double, double, double, double, bool>(),
           py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
           py::arg("weight_decay"), py::arg("maximize"));
  m.def("early_bytes",
        py::overload_cast<const at::Tensor&, const at::Tensor&>(
            &torch_ext::GradientPrefetch::room_for),
        py::arg("parameter"), py::arg("part"));
  py::class_<AdamWOffload, TensorOffload,
             std::unique_ptr<AdamWOffload, DeleteWithoutGil>>(
      m, "AdamWOffload", py::module_local())
      .def(py::init(
               [](const Directories& directories, const AioConfig& aio,
                  std::uint64_t host_memory, std::string engine, bool verify,
                  const std::string& state_format, std::uint64_t seed,
                  const std::string& update_on, std::uint64_t early_bytes,
                  const std::string& state_dict_mode, const StorePlace& place) {
                 const ReleasedGil released;
                 return std::unique_ptr<AdamWOffload, DeleteWithoutGil>(
                     new AdamWOffload(
                         {.store = {.directory = to_list(directories),
                                    .aio = aio,
                                    .engine = std::move(engine),
                                    .verify = verify},
                          .host_memory = host_memory,
                          .name = place.name},
                         torch_ext::parse_state_format(state_format), seed,
                         torch_ext::parse_update_on(update_on), early_bytes,
                         torch_ext::parse_state_dict_mode(state_dict_mode),
                         place.choice));
               }),
           py::arg("directories"), py::arg("aio"), py::arg("host_memory"),
           py::arg("engine"), py::arg("verify"), py::arg("state_format"),
           py::arg("seed"), py::arg("update_on"), py::arg("early_bytes"),
           py::arg("state_dict_mode"), py::arg("place") = StorePlace())
      .def(
          "step",
          [](AdamWOffload& offload, const std::vector<GroupArgs>& groups) {
            offload.step(to_groups(groups));
          },
          py::arg("groups"), release_gil())
      .def("in_step", &AdamWOffload::in_step)
      .def(
          "prefetch",
          [](AdamWOffload& offload, std::size_t slot,
             const at::Tensor& parameter, const at::Tensor& gradient) {
            offload.prefetch({{slot, parameter}, gradient});
          },
          py::arg("slot"), py::arg("parameter"), py::arg("gradient"),
          release_gil())
      .def(
          "init",
          [](AdamWOffload& offload, const std::vector<SlotArgs>& parameters) {
            offload.init(to_parameters(parameters));
          },
          py::arg("parameters"), release_gil());
  bind_backward_step(m);
}

}  // namespace
