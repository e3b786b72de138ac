#pragma once

// Binds commits that are read in place, and divided anew.
// Part of the one translation unit of _C: included by module.cpp only.

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind_state.h"
#include "bind_tensor_file.h"
#include "errors.h"
#include "gil.h"
#include "optim/commit_source.h"
#include "tensor/committed_elements.h"
#include "tensor/state_layout.h"
#include "tensor/tensor_export.h"
#include "tensor/tensor_offload.h"

namespace {

using torch_ext::CommitSource;
using torch_ext::CommittedTensor;

using Numbers = std::vector<std::uint64_t>;
// source, slot, number of its values or None, begin, sizes, order
using ShardArgs =
    std::tuple<std::shared_ptr<CommitSource>, std::size_t,
               std::optional<std::size_t>, Numbers, Numbers, Numbers>;
// fields with their dtypes, format
using CommittedLayoutArgs =
    std::pair<std::vector<std::pair<std::string, c10::ScalarType>>,
              std::string>;
// slot, parameter, first, step or None, begin, shards, layout
using DividedArgs = std::tuple<std::size_t, at::Tensor, std::uint64_t,
                               std::optional<std::uint64_t>, Numbers,
                               std::vector<ShardArgs>, CommittedLayoutArgs>;

std::vector<torch_ext::CommittedShard> to_shards(
    const std::vector<ShardArgs>& from) {
  std::vector<torch_ext::CommittedShard> shards;
  for (const auto& [source, slot, value, begin, sizes, order] : from) {
    if (source == nullptr) throw std::invalid_argument("a shard is None");
    shards.push_back({source, slot, value, {begin, sizes, order}});
  }
  return shards;
}

torch_ext::StateLayout to_layout(const CommittedLayoutArgs& from,
                                 c10::ScalarType dtype) {
  torch_ext::StateLayout layout{
      .fields = {},
      .master = torch_ext::master_format(dtype),
      .format = torch_ext::parse_state_format(from.second)};
  for (const auto& [name, of_field] : from.first) {
    layout.fields.push_back({name, of_field});
  }
  return layout;
}

/// Errors: std::invalid_argument if a shard's state is something else.
void check_shards(const std::vector<torch_ext::CommittedShard>& shards,
                  const torch_ext::StateLayout& layout) {
  for (const torch_ext::CommittedShard& shard : shards) {
    const auto& parameters = shard.source->document().parameters;
    std::uint64_t elements = 1;
    for (const std::uint64_t size : shard.box.sizes) elements *= size;
    if (shard.slot >= parameters.size() || !parameters[shard.slot].has_state ||
        parameters[shard.slot].elements != elements ||
        parameters[shard.slot].fields != layout.in_tiles()) {
      throw std::invalid_argument(
          shard.source->path() + ": the state in slot " +
          std::to_string(shard.slot) +
          " is for another number of elements, or in another format");
    }
  }
}

TensorOffload::Divided to_divided(const DividedArgs& from) {
  const auto& [slot, tensor, first, step, begin, shards, layout_args] = from;
  TensorOffload::Divided result{.committed = {{slot, tensor}, first},
                                .step = step.value_or(0),
                                .has_state = step.has_value()};
  if (!step) return result;
  const c10::ScalarType dtype = tensor.scalar_type();
  const torch_ext::StateLayout layout = to_layout(layout_args, dtype);
  const auto from_shards = to_shards(shards);
  check_shards(from_shards, layout);
  const torch_ext::TensorBox box = torch_ext::box_of(tensor, begin);
  const auto elements = [&](CommittedTensor::Kind kind, std::size_t field) {
    return std::make_shared<torch_ext::CommittedElements>(
        from_shards, CommittedTensor{kind, field, dtype, layout}, box);
  };
  for (std::size_t i = 0; i < layout.fields.size(); ++i) {
    result.tensors.push_back(
        torch_ext::read_committed(elements(CommittedTensor::Kind::kField, i)));
  }
  if (!layout.has_master()) return result;
  torch_ext::ReadElements value;
  if (layout.master == torch_ext::MasterFormat::kLow16) {
    // Without values in the commit, the parameter has what belongs to it.
    const bool all_there = std::ranges::all_of(
        shards,
        [](const ShardArgs& shard) { return std::get<2>(shard).has_value(); });
    value = all_there ? torch_ext::read_committed(
                            elements(CommittedTensor::Kind::kValue, 0))
                      : torch_ext::read_in_order(tensor, tensor.strides());
  }
  result.tensors.push_back(torch_ext::read_committed(
      elements(CommittedTensor::Kind::kMaster, 0), std::move(value)));
  return result;
}

/// `what`: "value", or a field of the layout. Errors: std::invalid_argument if
/// the shards have no such tensor.
CommittedTensor to_committed(
    const std::string& what,
    const std::vector<torch_ext::CommittedShard>& shards,
    const CommittedLayoutArgs& layout_args, c10::ScalarType dtype) {
  const torch_ext::StateLayout layout = to_layout(layout_args, dtype);
  CommittedTensor tensor{CommittedTensor::Kind::kValue, 0, dtype, layout};
  if (what == "value") return tensor;
  check_shards(shards, layout);
  while (tensor.field < layout.tensors() && what != layout.name(tensor.field)) {
    ++tensor.field;
  }
  if (tensor.field == layout.tensors()) {
    throw std::invalid_argument("the commit has no \"" + what + "\"");
  }
  tensor.kind = layout.is_master(tensor.field) ? CommittedTensor::Kind::kMaster
                                               : CommittedTensor::Kind::kField;
  return tensor;
}

// what, shards, layout, dtype of the parameter
using StoredArgs = std::tuple<std::string, std::vector<ShardArgs>,
                              CommittedLayoutArgs, c10::ScalarType>;
// name, dtype, sizes, group, what is stored or a tensor
using StreamedArgs =
    std::tuple<std::string, c10::ScalarType, std::vector<std::int64_t>,
               std::uint64_t, std::optional<StoredArgs>,
               std::optional<at::Tensor>>;

torch_ext::StreamedTensor to_streamed(const StreamedArgs& from) {
  const auto& [name, dtype, sizes, group, stored, tensor] = from;
  torch_ext::StreamedTensor result{name, dtype, sizes, {}, group};
  if (tensor) {
    if (tensor->sizes() != at::IntArrayRef(sizes) ||
        tensor->scalar_type() != dtype || !tensor->is_cpu()) {
      throw std::invalid_argument("export: '" + name + "' is another tensor");
    }
    std::vector<std::int64_t> strides(sizes.size());
    std::int64_t next = 1;
    for (std::size_t d = sizes.size(); d-- > 0; next *= sizes[d]) {
      strides[d] = next;
    }
    result.read = torch_ext::read_in_order(*tensor, strides);
  } else if (stored) {
    const auto& [what, shard_args, layout, of_parameter] = *stored;
    const auto shards = to_shards(shard_args);
    result.read = torch_ext::read_row_major(
        Numbers(sizes.size(), 0), Numbers(sizes.begin(), sizes.end()), shards,
        to_committed(what, shards, layout, of_parameter));
  } else {
    throw std::invalid_argument("export: '" + name + "' has no elements");
  }
  return result;
}

void bind_source(py::module_& m) {
  py::class_<CommitSource, std::shared_ptr<CommitSource>>(m, "CommitSource",
                                                          py::module_local())
      .def(py::init([](const std::vector<std::filesystem::path>& files,
                       const AioConfig& aio, std::string engine,
                       std::uint64_t generation) {
             return without_gil([&] {
               return std::make_shared<CommitSource>(
                   torch_ext::SourceOptions{
                       .files = files, .aio = aio, .engine = std::move(engine)},
                   generation);
             });
           }),
           py::arg("files"), py::arg("aio"), py::arg("engine"),
           py::arg("generation"))
      .def_property_readonly(
          "values",
          [](const CommitSource& source) {
            py::list all;
            for (const auto& value : source.document().values) {
              all.append(py::make_tuple(value.elements, value.element_bytes));
            }
            return all;
          })
      // For each slot its steps, or None without state.
      .def_property_readonly("steps", [](const CommitSource& source) {
        py::list all;
        for (const auto& parameter : source.document().parameters) {
          all.append(parameter.has_state ? py::object(py::int_(parameter.step))
                                         : py::none());
        }
        return all;
      });
  m.def(
      "list_commits",
      [](const std::vector<std::filesystem::path>& files, const AioConfig& aio,
         std::string engine) {
        const auto all = without_gil([&] {
          return CommitSource::list(
              {.files = files, .aio = aio, .engine = std::move(engine)});
        });
        py::list lists;
        for (const auto& commits : all) lists.append(to_list(commits));
        return lists;
      },
      py::arg("files"), py::arg("aio"), py::arg("engine"));
  m.def(
      "take_divided",
      [](TensorOffload& offload, const std::vector<DividedArgs>& from,
         std::size_t next) {
        const ReleasedGil released;
        std::vector<TensorOffload::Divided> parameters;
        for (const DividedArgs& each : from) {
          parameters.push_back(to_divided(each));
        }
        offload.take_divided(parameters, next);
      },
      py::arg("offload"), py::arg("parameters"), py::arg("next_slot"));
  m.def(
      "read_committed",
      [](const std::string& what, const std::vector<ShardArgs>& from,
         const CommittedLayoutArgs& layout_args, c10::ScalarType dtype,
         const Numbers& begin, const at::Tensor& out) {
        const ReleasedGil released;
        const auto shards = to_shards(from);
        torch_ext::fill_from_commit(
            out, begin, shards, to_committed(what, shards, layout_args, dtype));
      },
      py::arg("what"), py::arg("shards"), py::arg("layout"), py::arg("dtype"),
      py::arg("begin"), py::arg("out"));
  m.def(
      "export_tensors",
      [](const std::filesystem::path& path,
         const std::vector<StreamedArgs>& from,
         const torch_ext::FileMetadata& metadata, const py::object& progress) {
        torch_ext::ExportProgress report;
        if (!progress.is_none()) {
          report = [&progress](std::uint64_t done, std::uint64_t all) {
            const AcquiredGil acquired;
            parked_at_exit([&] { progress(done, all); });
          };
        }
        const ReleasedGil released;
        std::vector<torch_ext::StreamedTensor> tensors;
        for (const StreamedArgs& each : from) {
          tensors.push_back(to_streamed(each));
        }
        torch_ext::export_tensors(path, std::move(tensors), metadata,
                                  interruptible(), report);
      },
      py::arg("path"), py::arg("tensors"), py::arg("metadata"),
      py::arg("progress"));
}

}  // namespace
