#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKey.h>
#include <c10/core/Layout.h>

#include <sstream>
#include <string>

#include "torch_ext/base/error.h"

namespace torch_ext {

/// Throws TypeError unless the tensor's elements lie in memory of its own
/// device: dense and strided, with a data pointer that C++ may use.
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
  // DTensor, FakeTensor, functional and functorch wrappers: what they wrap,
  // if anything, is not where their data pointer points.
  const c10::DispatchKeySet keys = tensor.key_set();
  if (keys.has(c10::DispatchKey::Python) ||
      keys.has(c10::DispatchKey::Functionalize) ||
      keys.has(c10::DispatchKey::FuncTorchBatched) ||
      keys.has(c10::DispatchKey::FuncTorchGradWrapper) ||
      !tensor.has_storage()) {
    refuse("subclass or wrapper");
  }
}

}  // namespace torch_ext
