#pragma once

// Binds the saving and loading of files of tensors.
// Part of the one translation unit of _C: included by module.cpp only.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <filesystem>
#include <utility>

#include "errors.h"
#include "gil.h"
#include "torch_ext/tensor/tensor_file.h"
#include "waits.h"

namespace {

/// Options whose interrupt lets the handlers of signals run. They may raise.
torch_ext::TensorFileOptions interruptible() {
  torch_ext::TensorFileOptions options;
  options.interrupt = &run_signal_handlers;
  return options;
}

/// A dict in the order of the file.
py::dict to_dict(const torch_ext::NamedTensors& tensors) {
  py::dict all;
  for (const auto& [name, tensor] : tensors) all[py::str(name)] = tensor;
  return all;
}

void bind_tensor_file(py::module_& m) {
  m.def(
      "save_tensors",
      [](const std::filesystem::path& path,
         const torch_ext::NamedTensors& tensors,
         const torch_ext::FileMetadata& metadata) {
        const ReleasedGil released;
        torch_ext::save_tensors(path, tensors, metadata, interruptible());
      },
      py::arg("path"), py::arg("tensors"), py::arg("metadata"));
  m.def(
      "load_tensors",
      [](const std::filesystem::path& path, c10::Device device, bool mapped) {
        torch_ext::NamedTensors tensors;
        {
          const ReleasedGil released;
          tensors = torch_ext::load_tensors(
              path, {.device = device, .mapped = mapped}, interruptible());
        }
        return to_dict(tensors);
      },
      py::arg("path"), py::arg("device"), py::arg("mapped"));
  m.def(
      "load_metadata",
      [](const std::filesystem::path& path) {
        torch_ext::FileMetadata metadata;
        {
          const ReleasedGil released;
          metadata = torch_ext::load_metadata(path);
        }
        py::dict all;
        for (const auto& [key, value] : metadata) all[py::str(key)] = value;
        return all;
      },
      py::arg("path"));
}

}  // namespace
