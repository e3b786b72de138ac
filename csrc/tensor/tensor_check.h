#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKey.h>
#include <c10/core/Layout.h>

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "torch_ext/base/error.h"

namespace torch_ext {

/// How far the elements of a strided tensor reach in its storage, in bytes from
/// the storage's beginning.
inline std::uint64_t end_in_storage(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return 0;
  std::int64_t last = tensor.storage_offset();
  for (std::int64_t i = 0; i < tensor.dim(); ++i) {
    last += (tensor.size(i) - 1) * tensor.stride(i);
  }
  return static_cast<std::uint64_t>(last + 1) * tensor.itemsize();
}

/// Throws TypeError unless the tensor's elements lie in memory of its own
/// device: dense and strided, with a data pointer that C++ may use. Throws
/// std::invalid_argument if its storage has been made too small for it.
inline void check_has_plain_memory(const at::Tensor& tensor,
                                   const std::string& operation) {
  const auto refuse = [&](const std::string& what) {
    throw TypeError(operation + ": " + what +
                    " tensors are not supported, only dense strided ones");
  };
  if (!tensor.defined()) refuse("undefined");
  if (tensor.is_meta()) refuse("meta");
  if (tensor.is_nested()) refuse("nested");
  if (tensor.layout() != c10::Layout::Strided) {
    std::ostringstream layout;
    layout << tensor.layout();
    refuse(layout.str());
  }
  if (tensor.is_quantized()) refuse("quantized");
  // DTensor, FakeTensor, functional and functorch wrappers: their data pointer
  // does not point to what they wrap.
  const c10::DispatchKeySet keys = tensor.key_set();
  if (keys.has(c10::DispatchKey::Python) ||
      keys.has(c10::DispatchKey::Functionalize) ||
      keys.has(c10::DispatchKey::FuncTorchBatched) ||
      keys.has(c10::DispatchKey::FuncTorchGradWrapper) ||
      keys.has(c10::DispatchKey::ZeroTensor) || !tensor.has_storage()) {
    refuse("subclass or wrapper");
  }
  const std::uint64_t end = end_in_storage(tensor);
  const std::uint64_t size = tensor.storage().nbytes();
  if (end > size || (end > 0 && tensor.const_data_ptr() == nullptr)) {
    throw std::invalid_argument(
        operation + ": the tensor's elements reach to byte " +
        std::to_string(end) + " of its storage, which has " +
        std::to_string(size) + " (was it resized?)");
  }
}

/// Whether no two elements of a strided tensor share memory, judged by strides
/// alone: each stride steps over all that the smaller ones reach. It is also
/// false for layouts that interleave without touching, such as sizes (2, 3)
/// with strides (3, 2).
inline bool has_nested_strides(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return true;
  std::vector<std::pair<std::int64_t, std::int64_t>> dims;  // Stride, steps.
  for (std::int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) > 1) {
      dims.emplace_back(tensor.stride(i), tensor.size(i) - 1);
    }
  }
  std::ranges::sort(dims);
  std::int64_t reached = 0;
  for (const auto& [stride, steps] : dims) {
    if (stride <= reached) return false;
    reached += stride * steps;
  }
  return true;
}

/// Throws std::invalid_argument unless each element of the tensor, which has
/// plain memory, can be written on its own. That is not so for an expanded
/// tensor, or any other without has_nested_strides(). Nor is it so for a lazily
/// conjugate or negative tensor on a device.
inline void check_is_destination(const at::Tensor& tensor,
                                 const std::string& operation) {
  if (!tensor.is_cpu() && (tensor.is_conj() || tensor.is_neg())) {
    throw std::invalid_argument(
        operation +
        ": out is lazily conjugate or negative (as after .conj()), which is "
        "supported on the CPU only");
  }
  if (!has_nested_strides(tensor)) {
    throw std::invalid_argument(operation +
                                ": elements of out share memory, or its "
                                "strides interleave (expanded, as_strided?)");
  }
}

}  // namespace torch_ext
