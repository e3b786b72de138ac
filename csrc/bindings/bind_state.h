#pragma once

// Binds state of parameters in tiles: what both optimizers share, and the
// pieces for an optimizer that is written in Python.
// Part of the one translation unit of _C: included by module.cpp only.

#include <ATen/core/Tensor.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind_config.h"
#include "errors.h"
#include "gil.h"
#include "optim/tile_layout.h"
#include "store/commit_log.h"
#include "tensor/piece_offload.h"
#include "tensor/state_checks.h"
#include "tensor/tensor_offload.h"
#include "torch_ext/base/checksum.h"
#include "waits.h"

namespace {

using torch_ext::PieceOffload;
using torch_ext::TensorOffload;
// slot, parameter
using SlotArgs = std::pair<std::size_t, at::Tensor>;
// slot, parameter, step, tensors
using SavedArgs = std::tuple<std::size_t, at::Tensor, std::uint64_t,
                             std::vector<std::optional<at::Tensor>>>;
// slot, parameter, where it begins in the whole
using CommittedArgs = std::tuple<std::size_t, at::Tensor, std::uint64_t>;
// slot, parameter, gradient, group, whether the gradient is written to
using TargetArgs = std::tuple<std::size_t, at::Tensor,
                              std::optional<at::Tensor>, std::size_t, bool>;

/// Which store an optimizer has, and what it goes on from.
struct StorePlace {
  torch_ext::StoreName name;
  torch_ext::CommitChoice choice;
};

std::vector<TensorOffload::Parameter> to_parameters(
    const std::vector<SlotArgs>& from) {
  std::vector<TensorOffload::Parameter> parameters;
  for (const auto& [slot, tensor] : from) parameters.push_back({slot, tensor});
  return parameters;
}

std::vector<TensorOffload::Saved> to_saved(const std::vector<SavedArgs>& from) {
  std::vector<TensorOffload::Saved> saved;
  for (const auto& [slot, parameter, step, tensors] : from) {
    saved.push_back({{slot, parameter}, step, {}});
    for (const auto& tensor : tensors) {
      saved.back().tensors.push_back(tensor.value_or(at::Tensor()));
    }
  }
  return saved;
}

py::list to_list(const std::vector<TensorOffload::Saved>& saved) {
  py::list list;
  for (const auto& [parameter, step, tensors] : saved) {
    list.append(py::make_tuple(parameter.slot, step, tensors));
  }
  return list;
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

py::list to_list(
    const std::vector<torch_ext::OptimizerOffload::Committed>& commits) {
  py::list list;
  for (const auto& [generation, step, time, document] : commits) {
    list.append(py::make_tuple(generation, step, time, document));
  }
  return list;
}

/// Returns what `call` returns, which runs without the GIL.
template <typename Call>
auto without_gil(Call call) {
  const ReleasedGil released;
  return call();
}

/// A function of Python's that the library calls on a thread that has not the
/// GIL. It is made and destroyed with the GIL.
class PythonFunction {
 public:
  explicit PythonFunction(py::function function)
      : function_(std::move(function)) {}

  /// Calls it with what `arguments()` returns, and hands the result to `take`.
  template <typename Arguments, typename Take>
  void operator()(const Arguments& arguments, const Take& take) {
    const AcquiredGil acquired;
    try {
      parked_at_exit([&] {
        py::object given = arguments();
        py::object result = function_(given);
        take(result);
        // This is not left to a destructor, which lets no exception through. A
        // tensor that goes releases the GIL for a while.
        result.release().dec_ref();
        given.release().dec_ref();
      });
    } catch (const py::error_already_set& error) {
      error_ = error;
      const std::string text = error.what();
      throw torch_ext::StateError("a call of Python's failed: " +
                                  text.substr(0, text.find("\n\nAt:")));
    }
  }

  /// Returns what `call` returns, which calls this function without the GIL. An
  /// exception of Python's comes out as it was.
  template <typename Call>
  auto within(const Call& call) {
    try {
      return without_gil(call);
    } catch (...) {
      if (error_) throw py::error_already_set(*error_);
      throw;
    }
  }

 private:
  const py::function function_;
  std::optional<py::error_already_set> error_;
};

/// How a group votes: by a function of Python's, which must outlive it. It is
/// given a function that raises this process's error, if there is one.
torch_ext::GroupVote asking(PythonFunction& vote) {
  return [&vote](const std::exception_ptr& error) {
    bool all = false;
    vote(
        [&] {
          return py::cpp_function([error] {
            if (error != nullptr) std::rethrow_exception(error);
          });
        },
        [&](const py::object& result) { all = result.cast<bool>(); });
    return all;
  };
}

/// The same, for as long as the vote itself is kept.
torch_ext::GroupVote asking_later(py::function vote) {
  const std::shared_ptr<PythonFunction> kept(
      new PythonFunction(std::move(vote)), [](PythonFunction* function) {
        const AcquiredGil acquired;
        delete function;
      });
  return
      [kept](const std::exception_ptr& error) { return asking(*kept)(error); };
}

// Python gets tensors of its own over the same memory. Their Python objects are
// gone when Python has let go of them, and not later, without the GIL.

py::list to_list(const std::vector<PieceOffload::Piece>& pieces) {
  py::list list;
  for (const PieceOffload::Piece& piece : pieces) {
    py::list fields;
    for (const at::Tensor& field : piece.fields) fields.append(field.detach());
    list.append(py::make_tuple(piece.target, piece.values.detach(),
                               piece.gradient.defined()
                                   ? py::cast(piece.gradient.detach())
                                   : py::none(),
                               piece.gradient_is_copy, fields));
  }
  return list;
}

void step(PieceOffload& offload, const std::vector<TargetArgs>& from,
          py::function update) {
  std::vector<PieceOffload::Target> targets;
  for (const auto& [slot, parameter, gradient, group, writes] : from) {
    targets.push_back(
        {{slot, parameter}, gradient.value_or(at::Tensor()), group, writes});
  }
  PythonFunction function(std::move(update));
  function.within([&] {
    offload.step(targets, [&](std::vector<PieceOffload::Piece>& pieces) {
      function([&] { return to_list(pieces); }, [](const py::object&) {});
    });
  });
}

/// `first_state((slot, values))` returns tensors.
py::list save(TensorOffload& offload, const std::vector<SlotArgs>& parameters,
              const std::optional<py::function>& first_state) {
  if (!first_state) {
    return to_list(
        without_gil([&] { return offload.save(to_parameters(parameters)); }));
  }
  PythonFunction function(*first_state);
  return to_list(function.within([&] {
    return offload.save(
        to_parameters(parameters),
        [&](const TensorOffload::Parameter& parameter,
            const at::Tensor& values) {
          std::vector<at::Tensor> made;
          function(
              [&] { return py::make_tuple(parameter.slot, values.detach()); },
              [&](const py::object& result) {
                for (const auto& tensor :
                     result.cast<std::vector<at::Tensor>>()) {
                  made.push_back(tensor.detach().contiguous());
                }
              });
          return made;
        });
  }));
}

/// How many tensors use a tensor's memory, itself included.
std::size_t users_of(const at::Tensor& tensor) {
  if (!tensor.has_storage()) return 0;
  const c10::Storage& storage = tensor.storage();
  // Python's object for the storage is not counted: it stays once it was asked
  // for.
  const auto* slot = storage.unsafeGetStorageImpl()->pyobj_slot();
  return storage.use_count() - (slot->load_pyobj() != nullptr ? 1 : 0);
}

/// The checksum of the bytes of a tensor on the CPU.
std::uint64_t checksum_of(const at::Tensor& tensor) {
  const at::Tensor dense =
      tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous();
  return torch_ext::checksum(
      {static_cast<const std::byte*>(dense.const_data_ptr()), dense.nbytes()});
}

py::tuple to_tuple(const torch_ext::CommitReport& report) {
  return py::make_tuple(report.generation, report.step, report.time,
                        report.bytes_written, report.seconds);
}

void bind_commit_ticket(py::module_& m) {
  using torch_ext::CommitTicket;
  py::class_<CommitTicket>(m, "CommitTicket", py::module_local())
      .def(
          "wait_source",
          [](const CommitTicket& ticket, const py::object& timeout) {
            wait_interruptibly(ticket, timeout, [&](auto slice) {
              return ticket.wait_source_for(slice);
            });
            const ReleasedGil released;
            ticket.wait_source();
          },
          py::arg("timeout") = py::none())
      .def(
          "wait",
          [](const CommitTicket& ticket, const py::object& timeout) {
            wait_interruptibly(ticket, timeout, [&](auto slice) {
              return ticket.wait_for(slice);
            });
            return to_tuple(without_gil([&] { return ticket.wait(); }));
          },
          py::arg("timeout") = py::none())
      .def_property_readonly("generation", &CommitTicket::generation)
      .def("done", &CommitTicket::done)
      .def("report", [](const CommitTicket& ticket) -> py::object {
        const auto report = ticket.report();
        if (!report) return py::none();
        return to_tuple(*report);
      });
}

void bind_tensor_offload(py::module_& m) {
  py::class_<TensorOffload, std::unique_ptr<TensorOffload, DeleteWithoutGil>>(
      m, "TensorOffload", py::module_local())
      .def("add", &TensorOffload::add, py::arg("parameter"), py::arg("trained"),
           py::arg("first") = 0, release_gil())
      .def("remove", &TensorOffload::remove, py::arg("slot"), release_gil())
      .def(
          "check",
          [](TensorOffload& offload, std::size_t slot,
             const at::Tensor& parameter,
             const std::optional<at::Tensor>& gradient) {
            if (!gradient) return offload.check({slot, parameter});
            offload.check({slot, parameter}, *gradient);
          },
          py::arg("slot"), py::arg("parameter"),
          py::arg("gradient") = py::none(), release_gil())
      .def("has_state", &TensorOffload::has_state, py::arg("slot"),
           release_gil())
      .def("step_of", &TensorOffload::step_of, py::arg("slot"), release_gil())
      .def(
          "fits",
          [](TensorOffload& offload, std::size_t slot,
             const at::Tensor& parameter) {
            return offload.fits({slot, parameter});
          },
          py::arg("slot"), py::arg("parameter"), release_gil())
      .def("save", &save, py::arg("parameters"),
           py::arg("first_state") = py::none())
      .def(
          "load",
          [](TensorOffload& offload, const std::vector<SavedArgs>& states) {
            offload.load(to_saved(states));
          },
          py::arg("states"), release_gil())
      .def(
          "read",
          [](TensorOffload& offload, std::size_t slot,
             const at::Tensor& parameter, std::size_t tensor) {
            return offload.read({slot, parameter}, tensor);
          },
          py::arg("slot"), py::arg("parameter"), py::arg("tensor"),
          release_gil())
      .def(
          "change",
          [](TensorOffload& offload, const std::vector<SavedArgs>& states) {
            offload.change(to_saved(states));
          },
          py::arg("states"), release_gil())
      .def("forget", &TensorOffload::forget, py::arg("slots"), release_gil())
      .def(
          "commit",
          [](TensorOffload& offload, std::uint64_t step,
             const std::string& document,
             const std::vector<at::Tensor>& tensors, std::size_t keep,
             std::uint64_t generation, std::optional<py::function> asked) {
            torch_ext::CommitGroup group{.generation = generation};
            PythonFunction vote(asked ? std::move(*asked) : py::function());
            if (generation != 0) group.vote = asking(vote);
            const torch_ext::CommitReport report = vote.within([&] {
              return offload.commit(step, document, tensors, keep, group);
            });
            return to_tuple(report);
          },
          py::arg("step"), py::arg("document"), py::arg("tensors"),
          py::arg("keep"), py::arg("generation") = 0,
          py::arg("vote") = py::none())
      .def(
          "snapshot",
          [](TensorOffload& offload, const Directories& directories,
             std::string place, bool replace,
             std::optional<py::function> asked) {
            torch_ext::SnapshotGroup group{.place = std::move(place),
                                           .replace = replace};
            const bool votes = asked.has_value();
            PythonFunction vote(votes ? std::move(*asked) : py::function());
            if (votes) group.vote = asking(vote);
            const torch_ext::SnapshotReport report = vote.within([&] {
              return offload.offload().snapshot(to_list(directories), group);
            });
            return py::make_tuple(report.step, report.reflink, report.bytes,
                                  report.seconds);
          },
          py::arg("directories"), py::arg("place") = "",
          py::arg("replace") = false, py::arg("vote") = py::none())
      .def(
          "look_at_snapshot",
          [](TensorOffload& offload, const Directories& directories,
             const std::string& place) {
            using Place = torch_ext::OptimizerOffload::SnapshotPlace;
            switch (offload.offload().look_at_snapshot(to_list(directories),
                                                       {.place = place})) {
              case Place::kFree:
                return "free";
              case Place::kUnfinished:
                return "unfinished";
              case Place::kSnapshot:
                return "snapshot";
              case Place::kOther:
                break;
            }
            return "other";
          },
          py::arg("directories"), py::arg("place") = "", release_gil())
      .def(
          "refuse_others_at_snapshot",
          [](TensorOffload& offload, const Directories& directories,
             const std::string& place) {
            offload.offload().refuse_others_at_snapshot(to_list(directories),
                                                        {.place = place});
          },
          py::arg("directories"), py::arg("place"), release_gil())
      .def(
          "start_commit",
          [](TensorOffload& offload, std::uint64_t step,
             const std::string& document,
             const std::vector<at::Tensor>& tensors, std::size_t keep,
             std::uint64_t generation, std::optional<py::function> asked) {
            torch_ext::CommitGroup group{.generation = generation};
            if (asked) group.vote = asking_later(std::move(*asked));
            return without_gil([&] {
              return offload.start_commit(step, document, tensors, keep, group);
            });
          },
          py::arg("step"), py::arg("document"), py::arg("tensors"),
          py::arg("keep"), py::arg("generation") = 0,
          py::arg("vote") = py::none())
      .def("commits",
           [](TensorOffload& offload) {
             return to_list(
                 without_gil([&] { return offload.offload().commits(); }));
           })
      .def(
          "take_commit",
          [](TensorOffload& offload, std::uint64_t generation,
             const std::vector<CommittedArgs>& from,
             const std::vector<at::Tensor>& tensors, std::size_t next) {
            std::vector<TensorOffload::Committed> parameters;
            for (const auto& [slot, parameter, first] : from) {
              parameters.push_back({{slot, parameter}, first});
            }
            offload.take_commit(generation, parameters, tensors, next);
          },
          py::arg("generation"), py::arg("parameters"), py::arg("tensors"),
          py::arg("next"), release_gil())
      .def(
          "renew",
          [](TensorOffload& offload, std::uint64_t generation) {
            offload.offload().renew(generation);
          },
          py::arg("generation"), release_gil())
      .def(
          "same_commit",
          [](TensorOffload& offload, const std::string& document) {
            return offload.offload().same_commit(document);
          },
          py::arg("document"), release_gil())
      .def("next_slot", &TensorOffload::next_slot)
      .def(
          "next_generation",
          [](TensorOffload& offload) {
            return offload.offload().next_generation();
          },
          release_gil())
      .def(
          "committed_values",
          [](TensorOffload& offload, std::uint64_t generation) {
            std::vector<std::pair<std::uint64_t, std::uint32_t>> values;
            for (const auto& [elements, bytes] :
                 offload.offload().contents(generation).values) {
              values.emplace_back(elements, bytes);
            }
            return values;
          },
          py::arg("generation"), release_gil())
      .def("stats",
           [](TensorOffload& offload) {
             return to_dict(without_gil([&] { return offload.stats(); }));
           })
      .def(
          "plan",
          [](TensorOffload& offload, const std::vector<SlotArgs>& parameters) {
            return to_dict(without_gil(
                [&] { return offload.plan(to_parameters(parameters)); }));
          },
          py::arg("parameters"))
      .def("timeline",
           [](TensorOffload& offload) {
             return to_list(
                 without_gil([&] { return offload.offload().timeline(); }));
           })
      .def("notes", [](TensorOffload& offload) { return offload.notes(); })
      .def("close", &TensorOffload::close, release_gil())
      .def_property_readonly("engine", [](TensorOffload& offload) {
        return offload.offload().engine();
      });
}

void bind_piece_offload(py::module_& m) {
  // name, dtype
  using FieldArgs = std::vector<std::pair<std::string, c10::ScalarType>>;
  py::class_<PieceOffload, TensorOffload,
             std::unique_ptr<PieceOffload, DeleteWithoutGil>>(
      m, "PieceOffload", py::module_local())
      .def(py::init([](const Directories& directories, const AioConfig& aio,
                       std::uint64_t host_memory, std::string engine,
                       bool verify, const std::string& state_dict_mode,
                       const StorePlace& place) {
             const ReleasedGil released;
             return std::unique_ptr<PieceOffload, DeleteWithoutGil>(
                 new PieceOffload(
                     {.store = {.directory = to_list(directories),
                                .aio = aio,
                                .engine = std::move(engine),
                                .verify = verify},
                      .host_memory = host_memory,
                      .name = place.name},
                     torch_ext::parse_state_dict_mode(state_dict_mode),
                     place.choice));
           }),
           py::arg("directories"), py::arg("aio"), py::arg("host_memory"),
           py::arg("engine"), py::arg("verify"), py::arg("state_dict_mode"),
           py::arg("place") = StorePlace())
      .def(
          "describe",
          [](PieceOffload& offload, std::size_t slot, const FieldArgs& from) {
            PieceOffload::Fields fields;
            for (const auto& [name, dtype] : from) {
              fields.push_back({name, dtype});
            }
            offload.describe(slot, std::move(fields));
          },
          py::arg("slot"), py::arg("fields"))
      .def("step", &step, py::arg("targets"), py::arg("update"));
}

void bind_state(py::module_& m) {
  py::class_<StorePlace>(m, "StorePlace", py::module_local())
      .def(py::init([](std::uint32_t rank, std::uint32_t world,
                       std::uint64_t newest, std::uint64_t generation,
                       std::uint32_t epoch) {
             return StorePlace{{.rank = rank, .world = world, .epoch = epoch},
                               {.generation = generation, .newest = newest}};
           }),
           py::arg("rank") = 0, py::arg("world") = 1, py::arg("newest") = 0,
           py::arg("generation") = 0, py::arg("epoch") = 0)
      .def_property_readonly(
          "file", [](const StorePlace& place) { return place.name.of_file(0); })
      .def(
          "file_of",
          [](const StorePlace& place, std::size_t drive) {
            return place.name.of_file(drive);
          },
          py::arg("drive"));
  m.attr("OTHERS_FAILED") = torch_ext::kOthersFailed;
  m.attr("HOST_MEMORY_TOO_SMALL") = torch_ext::kHostMemoryTooSmall;
  m.def(
      "find_commits",
      [](const Directories& directories, const AioConfig& aio,
         std::string engine, const StorePlace& place) {
        const auto all = without_gil([&] {
          return torch_ext::OptimizerOffload::find_commits(
              {.store = {.directory = to_list(directories),
                         .aio = aio,
                         .engine = std::move(engine)},
               .name = place.name});
        });
        py::list lists;
        for (const auto& commits : all) lists.append(to_list(commits));
        return lists;
      },
      py::arg("directories"), py::arg("aio"), py::arg("engine"),
      py::arg("place"));
  m.def("users_of", &users_of, py::arg("tensor"));
  m.def("checksum_of", &checksum_of, py::arg("tensor"), release_gil());
  m.def(
      "check_parameter",
      [](const std::string& optimizer, const at::Tensor& parameter) {
        torch_ext::check_parameter(optimizer, parameter);
      },
      py::arg("optimizer"), py::arg("parameter"));
  m.def(
      "check_plain_memory",
      [](const std::string& what, const at::Tensor& tensor) {
        torch_ext::check_has_plain_memory(tensor, what);
      },
      py::arg("what"), py::arg("tensor"));
  bind_commit_ticket(m);
  bind_tensor_offload(m);
  bind_piece_offload(m);
}

}  // namespace
