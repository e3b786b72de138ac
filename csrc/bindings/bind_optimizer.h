#pragma once

// Binds the engine behind OffloadedAdamW.
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

#include "bind_config.h"
#include "errors.h"
#include "gil.h"
#include "tensor/adamw_engine.h"
#include "tensor/adamw_hyper.h"
#include "tensor/backward_step.h"
#include "tensor/early_gradients.h"
#include "tensor/plain_modes.h"

namespace {

using torch_ext::AdamWEngine;
using torch_ext::AdamWHyper;
using torch_ext::BackwardStep;
// slot, parameter
using SlotArgs = std::pair<std::size_t, at::Tensor>;
// slot, parameter, gradient
using TrainedArgs = std::tuple<std::size_t, at::Tensor, at::Tensor>;
using GroupArgs = std::pair<AdamWHyper, std::vector<TrainedArgs>>;
// slot, parameter, step, exp_avg, exp_avg_sq, master
using SavedArgs =
    std::tuple<std::size_t, at::Tensor, std::uint64_t,
               std::optional<at::Tensor>, std::optional<at::Tensor>,
               std::optional<at::Tensor>>;

std::vector<AdamWEngine::Group> to_groups(const std::vector<GroupArgs>& from) {
  std::vector<AdamWEngine::Group> groups;
  groups.reserve(from.size());
  for (const auto& [hyper, trained] : from) {
    AdamWEngine::Group group{hyper, {}};
    for (const auto& [slot, parameter, gradient] : trained) {
      group.trained.push_back({{slot, parameter}, gradient});
    }
    groups.push_back(std::move(group));
  }
  return groups;
}

std::vector<AdamWEngine::Parameter> to_parameters(
    const std::vector<SlotArgs>& from) {
  std::vector<AdamWEngine::Parameter> parameters;
  for (const auto& [slot, tensor] : from) parameters.push_back({slot, tensor});
  return parameters;
}

py::dict to_dict(const torch_ext::OptimizerOffloadStats& stats) {
  using namespace py::literals;  // NOLINT(google-build-using-namespace)
  return py::dict("steps"_a = stats.steps, "bytes_read"_a = stats.bytes_read,
                  "bytes_written"_a = stats.bytes_written,
                  "read_seconds"_a = stats.read_seconds,
                  "update_seconds"_a = stats.update_seconds,
                  "write_seconds"_a = stats.write_seconds,
                  "wait_seconds"_a = stats.wait_seconds,
                  "elapsed_seconds"_a = stats.elapsed_seconds,
                  "host_memory"_a = stats.host_memory,
                  "host_bytes_peak"_a = stats.host_bytes_peak,
                  "state_bytes"_a = stats.state_bytes,
                  "resident_bytes"_a = stats.resident_bytes,
                  "tile_visits"_a = stats.tile_visits,
                  "tile_hits"_a = stats.tile_hits, "tiles"_a = stats.tiles,
                  "tile_bytes"_a = stats.tile_bytes,
                  "buffers"_a = stats.buffers);
}

py::dict to_dict(const torch_ext::OptimizerPlan& plan) {
  using namespace py::literals;  // NOLINT(google-build-using-namespace)
  return py::dict("host_memory"_a = plan.host_memory,
                  "scratch_bytes"_a = plan.scratch_bytes,
                  "state_bytes"_a = plan.state_bytes,
                  "tile_bytes"_a = plan.tile_bytes, "tiles"_a = plan.tiles,
                  "lane_buffers"_a = plan.lane_buffers,
                  "resident_tiles"_a = plan.resident_tiles,
                  "resident_bytes"_a = plan.resident_bytes,
                  "step_bytes"_a = plan.step_bytes,
                  "host_memory_for_all"_a = plan.host_memory_for_all);
}

py::list to_list(const std::vector<torch_ext::LaneEvent>& timeline) {
  constexpr const char* kLanes[] = {"read", "update", "write"};
  py::list list;
  for (const torch_ext::LaneEvent& event : timeline) {
    list.append(py::make_tuple(kLanes[static_cast<int>(event.lane)], event.tile,
                               event.start, event.end));
  }
  return list;
}

py::list save(AdamWEngine& engine, const std::vector<SlotArgs>& parameters) {
  std::vector<AdamWEngine::Saved> saved;
  {
    const ReleasedGil released;
    saved = engine.save(to_parameters(parameters));
  }
  py::list list;
  for (const auto& [parameter, state] : saved) {
    list.append(py::make_tuple(
        parameter.slot, state.step, state.exp_avg, state.exp_avg_sq,
        state.master.defined() ? py::cast(state.master) : py::none()));
  }
  return list;
}

std::vector<AdamWEngine::Saved> to_saved(const std::vector<SavedArgs>& from) {
  std::vector<AdamWEngine::Saved> saved;
  for (const auto& [slot, parameter, step, exp_avg, exp_avg_sq, master] :
       from) {
    saved.push_back(
        {{slot, parameter},
         {step, exp_avg.value_or(at::Tensor()),
          exp_avg_sq.value_or(at::Tensor()), master.value_or(at::Tensor())}});
  }
  return saved;
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
      .def(py::init<AdamWEngine&, bool>(), py::arg("engine"), py::arg("takes"),
           py::keep_alive<1, 2>())
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
            &torch_ext::EarlyGradients::room_for),
        py::arg("parameter"), py::arg("part"));
  py::class_<AdamWEngine, std::unique_ptr<AdamWEngine, DeleteWithoutGil>>(
      m, "AdamWEngine", py::module_local())
      .def(py::init([](const Directories& directories, const AioConfig& aio,
                       std::uint64_t host_memory, std::string engine,
                       bool verify, const std::string& state_format,
                       std::uint64_t seed, const std::string& update_on,
                       std::uint64_t early_bytes,
                       const std::string& state_dict_mode) {
             const ReleasedGil released;
             return std::unique_ptr<AdamWEngine, DeleteWithoutGil>(
                 new AdamWEngine(
                     {.store = {.directory = to_list(directories),
                                .aio = aio,
                                .engine = std::move(engine),
                                .verify = verify},
                      .host_memory = host_memory},
                     torch_ext::parse_state_format(state_format), seed,
                     torch_ext::parse_update_on(update_on), early_bytes,
                     torch_ext::parse_state_dict_mode(state_dict_mode)));
           }),
           py::arg("directories"), py::arg("aio"), py::arg("host_memory"),
           py::arg("engine"), py::arg("verify"), py::arg("state_format"),
           py::arg("seed"), py::arg("update_on"), py::arg("early_bytes"),
           py::arg("state_dict_mode"))
      .def("add", &AdamWEngine::add, py::arg("parameter"), py::arg("trained"),
           py::arg("first") = 0)
      .def(
          "check",
          [](AdamWEngine& engine, std::size_t slot, const at::Tensor& parameter,
             const std::optional<at::Tensor>& gradient) {
            const AdamWEngine::Parameter checked{slot, parameter};
            if (!gradient) return engine.check(checked);
            engine.check(AdamWEngine::Trained{checked, *gradient});
          },
          py::arg("slot"), py::arg("parameter"),
          py::arg("gradient") = py::none())
      .def("remove", &AdamWEngine::remove, py::arg("slot"), release_gil())
      .def(
          "step",
          [](AdamWEngine& engine, const std::vector<GroupArgs>& groups) {
            engine.step(to_groups(groups));
          },
          py::arg("groups"), release_gil())
      .def("in_step", &AdamWEngine::in_step)
      .def(
          "prefetch",
          [](AdamWEngine& engine, std::size_t slot, const at::Tensor& parameter,
             const at::Tensor& gradient) {
            engine.prefetch({{slot, parameter}, gradient});
          },
          py::arg("slot"), py::arg("parameter"), py::arg("gradient"),
          release_gil())
      .def(
          "init",
          [](AdamWEngine& engine, const std::vector<SlotArgs>& parameters) {
            engine.init(to_parameters(parameters));
          },
          py::arg("parameters"), release_gil())
      .def("save", &save, py::arg("parameters"))
      .def(
          "load",
          [](AdamWEngine& engine, const std::vector<SavedArgs>& states) {
            engine.load(to_saved(states));
          },
          py::arg("states"), release_gil())
      .def(
          "read",
          [](AdamWEngine& engine, std::size_t slot, const at::Tensor& parameter,
             std::size_t field) {
            return engine.read({slot, parameter}, field);
          },
          py::arg("slot"), py::arg("parameter"), py::arg("field"),
          release_gil())
      .def(
          "change",
          [](AdamWEngine& engine, const std::vector<SavedArgs>& states) {
            engine.change(to_saved(states));
          },
          py::arg("states"), release_gil())
      .def("forget", &AdamWEngine::forget, py::arg("slots"), release_gil())
      .def(
          "fits",
          [](AdamWEngine& engine, std::size_t slot,
             const at::Tensor& parameter) {
            return engine.fits({slot, parameter});
          },
          py::arg("slot"), py::arg("parameter"), release_gil())
      .def("has_state", &AdamWEngine::has_state, py::arg("slot"), release_gil())
      .def("step_of", &AdamWEngine::step_of, py::arg("slot"), release_gil())
      .def("stats",
           [](AdamWEngine& engine) {
             return to_dict([&] {
               const ReleasedGil released;
               return engine.offload().stats();
             }());
           })
      .def(
          "plan",
          [](AdamWEngine& engine, const std::vector<SlotArgs>& parameters) {
            return to_dict([&] {
              const ReleasedGil released;
              return engine.plan(to_parameters(parameters));
            }());
          },
          py::arg("parameters"))
      .def("timeline",
           [](AdamWEngine& engine) {
             return to_list([&] {
               const ReleasedGil released;
               return engine.offload().timeline();
             }());
           })
      .def("notes", [](AdamWEngine& engine) { return engine.notes(); })
      .def(
          "close", [](AdamWEngine& engine) { engine.close(); }, release_gil())
      .def_property_readonly("engine", [](AdamWEngine& engine) {
        return engine.offload().engine();
      });
  bind_backward_step(m);
}

}  // namespace
