#pragma once

// Binds what `python -m torch_ext` does with the files of stores.
// Part of the one translation unit of _C: included by module.cpp only.

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "bind_state.h"
#include "errors.h"
#include "gil.h"
#include "io/file_lock.h"
#include "store/store_check.h"
#include "torch_ext/io/file.h"

namespace {

using StoreFiles = std::vector<std::filesystem::path>;

py::bytes to_bytes(const torch_ext::StoreId& id) {
  return {reinterpret_cast<const char*>(id.data()), id.size()};
}

torch_ext::StoreId to_id(std::string_view bytes) {
  torch_ext::StoreId id;
  if (bytes.size() != id.size()) {
    throw std::invalid_argument("the id of a store has 16 bytes");
  }
  std::memcpy(id.data(), bytes.data(), id.size());
  return id;
}

py::dict to_dict(const torch_ext::StoreHeader& header) {
  using namespace py::literals;  // NOLINT(google-build-using-namespace)
  return py::dict("id"_a = to_bytes(header.store), "drive"_a = header.drive,
                  "drives"_a = header.weights.size(), "rank"_a = header.rank,
                  "world"_a = header.world, "epoch"_a = header.epoch,
                  "block_size"_a = header.block_size);
}

py::dict to_dict(const torch_ext::CommitReader::Found& found) {
  using namespace py::literals;  // NOLINT(google-build-using-namespace)
  std::uint64_t bytes = 0;
  for (const auto& extent : found.commit.extents) {
    if (extent != nullptr) bytes += extent->padded_size();
  }
  return py::dict("generation"_a = found.commit.generation,
                  "step"_a = found.commit.step, "time"_a = found.commit.time,
                  "bytes"_a = bytes, "fault"_a = to_text(found.fault),
                  "document"_a = to_text(found.commit.document));
}

py::dict to_dict(const torch_ext::StoreDamage& damage) {
  using namespace py::literals;  // NOLINT(google-build-using-namespace)
  return py::dict("path"_a = to_path(damage.path), "offset"_a = damage.offset,
                  "length"_a = damage.length, "what"_a = to_text(damage.what),
                  "generation"_a = damage.generation,
                  "extent"_a = damage.extent,
                  "extent_offset"_a = damage.extent_offset);
}

template <typename T>
py::list to_dicts(const std::vector<T>& items) {
  py::list dicts;
  for (const T& item : items) dicts.append(to_dict(item));
  return dicts;
}

py::dict to_dict(const torch_ext::StoreReport& report) {
  using namespace py::literals;  // NOLINT(google-build-using-namespace)
  return py::dict("commits"_a = to_dicts(report.commits),
                  "damage"_a = to_dicts(report.damage),
                  "committed"_a = report.committed,
                  "checked"_a = report.checked);
}

void bind_store(py::module_& m) {
  using torch_ext::File;
  m.def(
      "store_header",
      [](const std::filesystem::path& path) {
        const auto header = without_gil([&] {
          const File file = File::open(path, File::Mode::kRead);
          return torch_ext::is_store(file)
                     ? std::optional(torch_ext::read_header(file))
                     : std::nullopt;
        });
        return header ? py::object(to_dict(*header)) : py::none();
      },
      py::arg("path"));
  m.def(
      "store_owner",
      [](const std::filesystem::path& path) {
        return to_text(without_gil([&] {
          return torch_ext::lock_owner(File::open(path, File::Mode::kRead));
        }));
      },
      py::arg("path"));
  py::class_<torch_ext::FileLock>(m, "StoreLock", py::module_local())
      .def(py::init([](const std::filesystem::path& path) {
             return without_gil([&] {
               return torch_ext::FileLock(File::open(path, File::Mode::kRead));
             });
           }),
           py::arg("path"))
      .def("release", [](torch_ext::FileLock& lock) {
        const ReleasedGil released;
        lock = torch_ext::FileLock();
      });
  m.def(
      "read_store",
      [](const StoreFiles& files, bool extents, const py::object& progress) {
        torch_ext::StoreCheck check{.extents = extents};
        if (!progress.is_none()) {
          check.progress = [&progress](std::uint64_t done, std::uint64_t all) {
            const AcquiredGil acquired;
            parked_at_exit([&] { progress(done, all); });
          };
        }
        return to_dict(
            without_gil([&] { return torch_ext::read_store(files, check); }));
      },
      py::arg("files"), py::arg("extents"), py::arg("progress"));
  m.def(
      "remove_store",
      [](const StoreFiles& files, const py::bytes& id) {
        const torch_ext::StoreId store = to_id(std::string(id));
        const ReleasedGil released;
        torch_ext::remove_store(files, store);
      },
      py::arg("files"), py::arg("id"));
}

}  // namespace
