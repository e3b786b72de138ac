#pragma once

// Binds state in tiles, for an optimizer that is written in Python.
// Part of the one translation unit of _C: included by module.cpp only.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bind_optimizer.h"
#include "errors.h"
#include "gil.h"
#include "tensor/dense_tensor.h"
#include "tensor/snapshot.h"
#include "tensor/tensor_check.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/checksum.h"
#include "torch_ext/optim/adamw_update.h"
#include "torch_ext/optim/optimizer_offload.h"

namespace {

using torch_ext::OptimizerOffload;
using torch_ext::OrderedReader;
using torch_ext::Snapshot;
using torch_ext::StateFields;
using torch_ext::StateSegment;

/// An OptimizerOffload and the fields of its parameters.
class StateEngine {
 public:
  explicit StateEngine(torch_ext::OptimizerOffloadOptions options)
      : scratch_(options.scratch_bytes), offload_(options) {}

  /// Adds a parameter. `bytes` has the bytes of each field for one element.
  std::size_t add(std::uint64_t elements,
                  const std::vector<std::uint32_t>& bytes) {
    if (bytes.size() > StateFields::kMax) {
      throw std::invalid_argument("optimizer: more than " +
                                  std::to_string(StateFields::kMax) +
                                  " fields for an element");
    }
    StateFields fields;
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      fields.bytes_per_cut[i] = bytes[i] * StateFields::kCut;
    }
    const std::size_t number = offload_.add_parameter(elements, fields);
    if (number >= fields_.size()) fields_.resize(number + 1);
    fields_[number] = fields;
    return number;
  }

  const StateFields& fields(std::size_t number) const {
    return fields_.at(number);
  }

  /// Returns counters. Scratch is not lent: it is the part of the budget for
  /// what Python makes.
  torch_ext::OptimizerOffloadStats stats() const {
    auto stats = offload_.stats();
    if (stats.tile_visits > 0) stats.host_bytes_peak += scratch_;
    return stats;
  }

  OptimizerOffload& offload() { return offload_; }

 private:
  const std::uint64_t scratch_;
  OptimizerOffload offload_;
  std::vector<StateFields> fields_;
};

/// Calls Python once for a tile, with a list of its segments: (number, first
/// element, elements, [a tensor of bytes for each field]).
class PythonKernel final : public torch_ext::UpdateKernel {
 public:
  PythonKernel(const StateEngine& engine, py::function callback)
      : engine_(engine), callback_(std::move(callback)) {}

  void update(std::span<const StateSegment> segments) override {
    const AcquiredGil acquired;
    try {
      py::list list;
      for (const StateSegment& segment : segments) list.append(shown(segment));
      parked_at_exit([&] {
        callback_(list);
        // This is not left to a destructor, which lets no exception through. A
        // tensor that goes releases the GIL for a while.
        list.release().dec_ref();
      });
    } catch (const py::error_already_set& error) {
      error_ = error;
      const std::string text = error.what();
      throw torch_ext::StateError("an update failed: " +
                                  text.substr(0, text.find("\n\nAt:")));
    }
  }

  const std::optional<py::error_already_set>& error() const { return error_; }

 private:
  py::tuple shown(const StateSegment& segment) const {
    const StateFields& fields = engine_.fields(segment.parameter);
    py::list views;
    for (std::size_t i = 0; i < StateFields::kMax; ++i) {
      if (segment.fields[i] == nullptr) continue;
      views.append(torch_ext::host_view(
          segment.fields[i], fields.bytes(i, segment.count), at::kByte));
    }
    return py::make_tuple(segment.parameter, segment.first, segment.count,
                          views);
  }

  const StateEngine& engine_;
  const py::function callback_;
  std::optional<py::error_already_set> error_;
};

/// Runs `call` with a kernel. An exception of Python's comes out as it was.
template <typename Call>
void run_python(StateEngine& engine, py::function callback, Call call) {
  PythonKernel kernel(engine, std::move(callback));
  try {
    const ReleasedGil released;
    call(engine.offload(), kernel);
  } catch (...) {
    if (kernel.error()) throw py::error_already_set(*kernel.error());
    throw;
  }
}

void check_trained(const at::Tensor& tensor) {
  torch_ext::check_has_plain_memory(tensor, "OffloadedOptimizer");
  const c10::ScalarType dtype = tensor.scalar_type();
  std::ostringstream text;
  if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf) {
    text << "OffloadedOptimizer: a parameter of dtype " << dtype
         << " is not supported, only float32, bfloat16 and float16";
    throw torch_ext::TypeError(text.str());
  }
  if (tensor.is_neg() || !tensor.is_non_overlapping_and_dense()) {
    text << "OffloadedOptimizer: a parameter with sizes " << tensor.sizes()
         << " and strides " << tensor.strides()
         << " is not dense: its elements overlap or have gaps";
    throw std::invalid_argument(text.str());
  }
}

void check_gradient(const at::Tensor& gradient, const at::Tensor& parameter) {
  if (gradient.layout() != c10::Layout::Strided) {
    throw torch_ext::StateError(
        "OffloadedOptimizer: sparse gradients are not supported");
  }
  torch_ext::check_has_plain_memory(gradient, "OffloadedOptimizer: gradient");
  std::ostringstream text;
  if (!c10::isFloatingType(gradient.scalar_type())) {
    text << "OffloadedOptimizer: a gradient of dtype " << gradient.scalar_type()
         << " is not supported";
    throw torch_ext::TypeError(text.str());
  }
  if (gradient.sizes() != parameter.sizes()) {
    text << "OffloadedOptimizer: gradient has sizes " << gradient.sizes()
         << ", its parameter " << parameter.sizes();
    throw std::invalid_argument(text.str());
  }
}

/// Returns elements in host memory, in the order of the reader and in the
/// source's dtype. They are a view of the source's memory where that is
/// possible.
at::Tensor read_piece(const OrderedReader& reader, std::uint64_t first,
                      std::uint64_t count) {
  const at::Tensor& source = reader.source();
  const auto options = torch_ext::host_options(source.scalar_type());
  const auto size = static_cast<std::int64_t>(count);
  if (reader.direct()) {
    // This is no view of autograd's. Such a view would be an inference tensor
    // if the source is one, and nobody could train it.
    return at::from_blob(
        reader.pointer(first), {size},
        [storage = source.storage()](void*) mutable { storage = {}; }, options);
  }
  const at::Tensor piece = at::empty({size}, options);
  reader.copy_to(static_cast<std::byte*>(piece.mutable_data_ptr()), first,
                 count);
  return piece;
}

// The tensors of these two are 1-D, contiguous and of one length.

at::Tensor join_piece(const at::Tensor& parameter, const at::Tensor& low) {
  at::Tensor master =
      at::empty(parameter.sizes(), torch_ext::host_options(at::kFloat));
  torch_ext::join_master(
      static_cast<const std::uint16_t*>(parameter.const_data_ptr()),
      static_cast<const std::uint16_t*>(low.const_data_ptr()),
      master.mutable_data_ptr<float>(),
      static_cast<std::size_t>(parameter.numel()));
  return master;
}

void split_piece(const at::Tensor& master,
                 const std::optional<at::Tensor>& parameter,
                 const at::Tensor& low) {
  torch_ext::split_master(
      master.const_data_ptr<float>(),
      parameter ? static_cast<std::uint16_t*>(parameter->mutable_data_ptr())
                : nullptr,
      static_cast<std::uint16_t*>(low.mutable_data_ptr()),
      static_cast<std::size_t>(master.numel()));
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

void bind_pieces(py::module_& m) {
  m.def("users_of", &users_of, py::arg("tensor"));
  m.def("checksum_of", &checksum_of, py::arg("tensor"), release_gil());
  py::class_<OrderedReader>(m, "OrderedReader", py::module_local())
      .def(py::init([](const at::Tensor& source, const at::Tensor& like) {
             return OrderedReader(source, like.strides());
           }),
           py::arg("source"), py::arg("like"), release_gil())
      .def("read", &read_piece, py::arg("first"), py::arg("count"),
           release_gil());
  py::class_<Snapshot>(m, "Snapshot", py::module_local())
      .def(py::init([](const std::string& mode,
                       std::filesystem::path directory) {
             return std::make_unique<Snapshot>(
                 torch_ext::parse_state_dict_mode(mode), std::move(directory));
           }),
           py::arg("mode"), py::arg("directory"))
      .def(
          "add",
          [](Snapshot& snapshot, const at::Tensor& like,
             const at::Tensor& of_dtype) {
            return snapshot.add(like, of_dtype.scalar_type());
          },
          py::arg("like"), py::arg("of_dtype"))
      .def("open", &Snapshot::open, release_gil())
      .def(
          "write",
          [](Snapshot& snapshot, std::size_t tensor, std::uint64_t first,
             const at::Tensor& piece) {
            snapshot.write(
                tensor, first,
                {static_cast<const std::byte*>(piece.const_data_ptr()),
                 piece.nbytes()});
          },
          py::arg("tensor"), py::arg("first"), py::arg("piece"), release_gil())
      .def("finish", &Snapshot::finish, release_gil());
  m.def("check_trained", &check_trained, py::arg("parameter"));
  m.def("check_gradient", &check_gradient, py::arg("gradient"),
        py::arg("parameter"));
  m.def("join_master", &join_piece, py::arg("parameter"), py::arg("low"),
        release_gil());
  m.def("split_master", &split_piece, py::arg("master"), py::arg("parameter"),
        py::arg("low"), release_gil());
}

void bind_state_engine(py::module_& m) {
  using Numbers = std::vector<std::size_t>;
  py::class_<StateEngine, std::unique_ptr<StateEngine, DeleteWithoutGil>>(
      m, "StateEngine", py::module_local())
      .def(py::init([](const Directories& directories, const AioConfig& aio,
                       std::uint64_t host_memory, std::uint64_t scratch,
                       std::string engine, bool verify) {
             const ReleasedGil released;
             return std::unique_ptr<StateEngine, DeleteWithoutGil>(
                 new StateEngine({.store = {.directory = to_list(directories),
                                            .aio = aio,
                                            .engine = std::move(engine),
                                            .verify = verify},
                                  .host_memory = host_memory,
                                  .scratch_bytes = scratch}));
           }),
           py::arg("directories"), py::arg("aio"), py::arg("host_memory"),
           py::arg("scratch"), py::arg("engine"), py::arg("verify"))
      .def("add", &StateEngine::add, py::arg("elements"), py::arg("bytes"),
           release_gil())
      .def(
          "step",
          [](StateEngine& engine, const Numbers& numbers, py::function update) {
            run_python(engine, std::move(update),
                       [&](OptimizerOffload& offload, PythonKernel& kernel) {
                         offload.step(numbers, kernel);
                       });
          },
          py::arg("numbers"), py::arg("update"))
      .def(
          "read",
          [](StateEngine& engine, const Numbers& numbers, py::function show) {
            run_python(engine, std::move(show),
                       [&](OptimizerOffload& offload, PythonKernel& kernel) {
                         offload.read_state(numbers, kernel);
                       });
          },
          py::arg("numbers"), py::arg("show"))
      .def(
          "change",
          [](StateEngine& engine, const Numbers& numbers, py::function fill) {
            std::vector<OptimizerOffload::ParameterStep> steps;
            for (const std::size_t number : numbers) {
              steps.push_back({.parameter = number, .step = 0});
            }
            run_python(engine, std::move(fill),
                       [&](OptimizerOffload& offload, PythonKernel& kernel) {
                         offload.change_state(steps, kernel);
                       });
          },
          py::arg("numbers"), py::arg("fill"))
      .def(
          "forget",
          [](StateEngine& engine, const Numbers& numbers) {
            engine.offload().forget_state(numbers);
          },
          py::arg("numbers"), release_gil())
      .def(
          "remove",
          [](StateEngine& engine, std::size_t number) {
            engine.offload().remove_parameter(number);
          },
          py::arg("number"), release_gil())
      .def(
          "write",
          [](StateEngine& engine, const Numbers& numbers, py::function fill) {
            std::vector<OptimizerOffload::ParameterStep> steps;
            for (const std::size_t number : numbers) {
              steps.push_back({.parameter = number, .step = 0});
            }
            run_python(engine, std::move(fill),
                       [&](OptimizerOffload& offload, PythonKernel& kernel) {
                         offload.write_state(steps, kernel);
                       });
          },
          py::arg("numbers"), py::arg("fill"))
      .def("stats",
           [](StateEngine& engine) {
             return to_dict([&] {
               const ReleasedGil released;
               return engine.stats();
             }());
           })
      .def(
          "plan",
          [](StateEngine& engine, const Numbers& numbers) {
            return to_dict([&] {
              const ReleasedGil released;
              return engine.offload().plan(numbers);
            }());
          },
          py::arg("numbers"))
      .def("timeline",
           [](StateEngine& engine) {
             return to_list([&] {
               const ReleasedGil released;
               return engine.offload().timeline();
             }());
           })
      .def("notes",
           [](StateEngine& engine) { return engine.offload().notes(); })
      .def(
          "close", [](StateEngine& engine) { engine.offload().close(); },
          release_gil())
      .def_property_readonly("engine", [](StateEngine& engine) {
        return engine.offload().engine();
      });
}

void bind_state(py::module_& m) {
  bind_pieces(m);
  bind_state_engine(m);
}

}  // namespace
