#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "torch_ext/swap/safetensors_checkpoint.h"
#include "torch_ext/tensor/model_offload.h"

namespace torch_ext {

/// Where a tensor on the meta device has its bytes. Null for other tensors.
using MetaSource = const SafetensorsCheckpoint::Tensor*;

/// Finds the bytes of the tensors that are on the meta device. `checkpoint` may
/// be null. Errors: std::invalid_argument if some are not in it, or have
/// another dtype or shape there; the text has their names. The same if there is
/// one and no tensor is on that device. TypeError for a tensor of another kind.
std::vector<MetaSource> find_meta_sources(
    const std::vector<NamedTensor>& tensors,
    const SafetensorsCheckpoint* checkpoint);

/// A storage on the CPU of so many bytes, without any yet.
c10::Storage make_empty_storage(std::uint64_t bytes);

/// A storage with the bytes of the source. Errors: IoError, std::bad_alloc.
c10::Storage load_storage(const SafetensorsCheckpoint::Tensor& source);

/// Gives tensors on the meta device a storage on the CPU. Unless keep() is
/// called, they are as before when this ends.
class GivenStorages {
 public:
  GivenStorages() = default;
  GivenStorages(const GivenStorages&) = delete;
  GivenStorages& operator=(const GivenStorages&) = delete;
  ~GivenStorages();

  /// The tensor stays the same object, contiguous in the storage.
  void give(const at::Tensor& tensor, const c10::Storage& storage);
  void keep() noexcept { before_.clear(); }

 private:
  /// Tensors, and what they were.
  std::vector<std::pair<at::Tensor, at::Tensor>> before_;
};

}  // namespace torch_ext
