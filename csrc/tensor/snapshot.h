#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "dense_tensor.h"
#include "plain_modes.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/available_memory.h"
#include "torch_ext/base/error.h"
#include "torch_ext/base/size.h"
#include "torch_ext/optim/snapshot_file.h"
#include "torch_ext/tensor/adamw_options.h"

namespace torch_ext {

/// Tensors that are filled piece by piece. Threads: one.
class Snapshot {
 public:
  /// `directory` is used by kMapped.
  Snapshot(StateDictMode mode, std::filesystem::path directory)
      : mode_(mode), directory_(std::move(directory)) {}

  /// Adds a tensor with the sizes and strides of `like`, which is dense.
  /// Returns its number, counted from 0.
  std::size_t add(const at::Tensor& like, c10::ScalarType dtype) {
    Place place{like, dtype, bytes_, {}};
    bytes_ += align_up(
        c10::elementSize(dtype) * static_cast<std::uint64_t>(like.numel()), 64);
    places_.push_back(std::move(place));
    return places_.size() - 1;
  }

  /// Takes the space. Called after the last add(). Errors: IoError (ENOMEM,
  /// ENOSPC).
  void open() {
    if (mode_ == StateDictMode::kMapped) {
      file_.emplace(directory_, bytes_);
      return;
    }
    // A process that touches more is killed, or makes another one be killed.
    const std::uint64_t left = available_memory() / 16 * 15;
    if (bytes_ > left) throw no_memory(left);
    const PlainModes plain;
    try {
      for (Place& place : places_) {
        place.tensor =
            at::empty_strided(place.like.sizes(), place.like.strides(),
                              host_options(place.dtype));
      }
    } catch (const c10::Error&) {
      throw no_memory(std::nullopt);
    }
  }

  /// Writes elements from `first` on, in the order of memory, as bytes. Errors:
  /// IoError.
  void write(std::size_t tensor, std::uint64_t first,
             std::span<const std::byte> bytes) {
    Place& place = places_.at(tensor);
    const std::uint64_t offset = first * c10::elementSize(place.dtype);
    if (file_) {
      file_->write(place.offset + offset, bytes);
    } else if (!bytes.empty()) {
      std::memcpy(
          static_cast<std::byte*>(place.tensor.mutable_data_ptr()) + offset,
          bytes.data(), bytes.size());
    }
  }

  /// Returns the tensors by number. Called after the last write(). The bytes of
  /// a file have been read back from the drive. Errors: as SnapshotFile::map().
  std::vector<at::Tensor> finish() {
    const PlainModes plain;
    std::shared_ptr<std::byte> memory;
    if (file_) memory = file_->map();
    std::vector<at::Tensor> tensors;
    for (Place& place : places_) {
      if (!file_) {
        tensors.push_back(std::move(place.tensor));
      } else if (place.like.numel() == 0) {
        tensors.push_back(at::empty_strided(place.like.sizes(),
                                            place.like.strides(),
                                            host_options(place.dtype)));
      } else {
        tensors.push_back(at::from_blob(
            memory.get() + place.offset, place.like.sizes(),
            place.like.strides(), [memory](void*) mutable { memory.reset(); },
            host_options(place.dtype)));
      }
    }
    return tensors;
  }

 private:
  struct Place {
    at::Tensor like;
    c10::ScalarType dtype;
    std::uint64_t offset;  ///< Bytes into the file.
    at::Tensor tensor;     ///< For kTensors.
  };

  IoError no_memory(std::optional<std::uint64_t> left) const {
    std::string text = "its tensors take " + format_size(bytes_) + " of memory";
    if (left) text += ", of which " + format_size(*left) + " are left";
    return IoError(
        {.op = "state_dict",
         .length = bytes_,
         .error = ENOMEM,
         .detail = text + "; state_dict_mode=\"mapped\" keeps them in a file"});
  }

  const StateDictMode mode_;
  const std::filesystem::path directory_;
  std::uint64_t bytes_ = 0;
  std::vector<Place> places_;
  std::optional<SnapshotFile> file_;
};

}  // namespace torch_ext
